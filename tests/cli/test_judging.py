"""The gates of trained networks, on the command line."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import selab as selab_package
from selab.attention.se import SqueezeExcitation
from selab.errors import SelabError
from selab.judging.choose import Choice
from selab.judging.folding import read_folding
from selab.judging.ranking import read_ranking
from selab.judging.record import read_gates
from selab.models.build import build
from selab.models.catalog import find
from selab.models.checkpoint import load

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(build(find("se_small_cnn"), seed=3).model.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 256, (24, 24, 3), np.uint8)
        image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


def test_a_trained_network_on_its_test_images(selab, tmp_path, weights):
    words = ("gates", "--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 250)
    status, out, err = selab(*words, "--json", tmp_path / "g.json", "--pictures", tmp_path / "p", "--classes", "0,7")
    assert status == 0, err
    said = " ".join(out.split())
    assert "The gates of se_small_cnn over 250 images of synthetic (test), 10 classes" in said
    record = read_gates(tmp_path / "g.json")
    assert (record.images, record.weights) == (250, "w.safetensors")
    assert [one.channels for one in record.blocks] == [32, 32, 64, 64]
    assert list(record.class_means) == ["0", "7"]
    assert record.blocks[0].specificity is not None
    for name in ("gates.svg", "depth.svg"):
        assert "se_small_cnn" in (tmp_path / "p" / name).read_text()


def test_an_onnx_file_over_a_folder_has_the_gates_of_its_network(selab, tmp_path, photos, weights):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    export = ("export", "--arch", "se_small_cnn", "--weights", weights, "--to", "onnx", "--batch", 5, "--out", path)
    status, _, err = selab(*export)
    assert status == 0, err
    found = []
    for words in (("--arch", path, "--batch", 5), ("--arch", "se_small_cnn", "--weights", weights)):
        status, out, err = selab("gates", *words, "--images", photos, "--input", "3x32x32", "--json", "-")
        assert status == 0, err
        found.append(json.loads(out))
        # The network without --arch, and the folder as --data.
        shorter = ("gates", *words[1:], "--data", photos, "--input", "3x32x32", "--json", "-")
        assert json.loads(selab(*shorter)[1]) == found[-1]
    assert [one["images"] for one in found] == [5, 5]
    assert [one["classes"] for one in found] == [[], []]
    for graph, module in zip(*(one["blocks"] for one in found), strict=True):
        np.testing.assert_allclose(graph["mean"], module["mean"], rtol=1e-4)
        np.testing.assert_allclose(graph["deviation"], module["deviation"], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--arch", "se_small_cnn", "--data", "synthetic"), "se_small_cnn: has random weights"),
        (("--arch", "small_cnn", "--weights", "base", "--data", "synthetic"), "no block with one gate per channel"),
        (("--arch", "se_small_cnn", "--weights", "none.pt", "--data", "synthetic"), "none.pt"),
        (("--arch", "se_small_cnn", "--weights", "w", "--data", "synthetic", "--classes", "cat"), "no such class"),
        (("--arch", "se_small_cnn", "--weights", "w", "--images", "nowhere"), "nowhere: is no folder"),
        (("--arch", "se_resnet18", "--weights", "w", "--images", "photos"), "w.safetensors"),
    ],
)
def test_bad_input_is_one_line(selab, tmp_path, monkeypatch, weights, photos, words, said):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    save_file(build(find("small_cnn")).model.state_dict(), base)
    files = {"base": base, "w": weights}
    status, _, err = selab("gates", *(files.get(word, word) for word in words), "--json", "g.json")
    assert status != 0
    assert said in " ".join(err.split())
    assert err.count("error:") == 1
    assert not (tmp_path / "g.json").exists()


# -------------------------------------------------------------------------------------------------------- fold, blocks
@pytest.fixture
def still(tmp_path):
    """Weights of se_small_cnn whose first two gates are constants, and the network itself."""
    model = build(find("se_small_cnn"), seed=3).model
    blocks = [module for module in model.modules() if isinstance(module, SqueezeExcitation)]
    with torch.no_grad():
        for place, block in enumerate(blocks):
            if place < 2:
                block.fc2.weight.zero_()  # all factors are a half
            else:
                block.fc2.weight.normal_(std=20, generator=torch.Generator().manual_seed(place))
    path = tmp_path / "still.safetensors"
    save_file(model.state_dict(), path)
    return path, model.eval()


def test_constant_gates_fold_without_any_loss(selab, tmp_path, still):
    weights, _ = still
    out = tmp_path / "out"
    words = (
        "--arch",
        "se_small_cnn",
        "--weights",
        weights,
        "--data",
        "synthetic",
        "--most",
        200,
        "--max-error",
        1e-5,
        "--budget",
        0,
    )
    status, said, err = selab("fold", *words, "--out", out)
    assert status == 0, err
    record = read_folding(out / "se_small_cnn.folding.json")
    first = [one.path for one in record.choices][:2]
    assert list(record.folded) == first
    assert record.loss.points == 0
    assert (record.chosen_on, record.reported_on) == (134, 66)
    assert f"{len(record.folded)} of 4 fold at 1e-05 of the largest output" in " ".join(said.split())
    # Loaded again by its description, it computes what the network does.
    made = build(find(f"{out / 'se_small_cnn.toml'}:folded"))
    load(made.model, out / "se_small_cnn.safetensors", variant=find(f"{out / 'se_small_cnn.toml'}:folded"))
    left = [one for one in made.model.modules() if isinstance(one, SqueezeExcitation)]
    assert len(left) == 4 - len(record.folded)
    assert all((tmp_path / "out" / name).exists() for name in record.files)


def test_the_files_are_a_network_like_any_other(selab, tmp_path, still):
    weights, _ = still
    out = tmp_path / "out"
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 100, "--max-drop", 100)
    status, said, err = selab("fold", *words, "--budget", 1, "--out", out)
    assert status == 0, err
    record = read_folding(out / "se_small_cnn.folding.json")
    assert len(record.folded) == 4
    assert record.after.params == record.before.params - 2 * (2 * 32 * 2 + 2 * 64 * 4)
    assert record.latency is not None
    assert "forward, torch" in said
    base = build(find("small_cnn")).model.eval()
    base.load_state_dict(load_file(out / "se_small_cnn.safetensors"))
    status, said, err = selab("count", "--arch", f"{out / 'se_small_cnn.toml'}:folded")
    assert status == 0, err
    # Nothing is overwritten unless it is said.
    status, _, err = selab("fold", *words, "--budget", 0, "--out", out)
    assert status != 0
    assert "use --replace" in err


def test_a_fold_that_costs_too_much_is_not_made(selab, tmp_path, monkeypatch, still):
    weights, _ = still
    # What decides says nothing of the other images.
    from selab.experiments import folding

    monkeypatch.setattr(folding, "choose", lambda found, *_, **__: [taken(one) for one in found])
    words = (
        "--arch",
        "se_small_cnn",
        "--weights",
        weights,
        "--data",
        "synthetic",
        "--most",
        100,
        "--max-error",
        "1e-9",
    )
    status, said, err = selab("fold", *words, "--budget", 0, "--out", tmp_path / "out")
    assert status != 0
    assert "no network was written; allow more, or give more images" in " ".join(err.split())
    assert "before and after" in said
    assert not (tmp_path / "out").exists()


def taken(one):
    return Choice(path=one.path, spread=one.spread, folded=True, where=one.where)


def test_an_onnx_file_folds_as_its_network_does(selab, tmp_path, photos, still):
    pytest.importorskip("onnxruntime")
    weights, _ = still
    path = tmp_path / "net.onnx"
    status, _, err = selab("export", "--arch", "se_small_cnn", "--weights", weights, "--to", "onnx", "--out", path)
    assert status == 0, err
    words = ("--arch", path, "--images", photos, "--max-error", 0.5, "--budget", 0)
    status, _, err = selab("fold", *words, "--out", tmp_path / "out")
    assert status == 0, err
    record = read_folding(tmp_path / "out" / "net.folding.json")
    assert (record.chosen_on, record.reported_on, record.loss) == (4, 1, None)
    assert len(record.folded) >= 2
    assert record.error <= 0.5
    assert (tmp_path / "out" / "net.onnx").stat().st_size < path.stat().st_size
    status, _, err = selab("fold", *words, "--out", tmp_path)
    assert status != 0
    assert "is the network itself" in err


def test_worth_beside_price(selab, tmp_path, still):
    weights, _ = still
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 300)
    status, said, err = selab("blocks", *words, "--json", tmp_path / "b.json")
    assert status == 0, err
    record = read_ranking(tmp_path / "b.json")
    assert [one.channels for one in record.blocks] == [32, 32, 64, 64]
    first, second, *_ = record.blocks
    # Their gates are constants: nothing is lost at the mean.
    assert (first.loss_mean.points, second.loss_mean.points) == (0, 0)
    assert first.error_mean < 1e-5
    assert first.error_one > 0.01
    assert first.params == 2 * 32 * 2
    assert first.bytes > 0
    assert record.front
    assert "Lost: points of accuracy" in " ".join(said.split())


def test_worth_without_labels(selab, tmp_path, photos, still):
    weights, _ = still
    words = ("--weights", weights, "--images", photos, "--input", "3x32x32", "--json", tmp_path / "b.json")
    status, said, err = selab("blocks", "--arch", "se_small_cnn", *words)
    assert status == 0, err
    record = read_ranking(tmp_path / "b.json")
    assert record.images == 5
    assert record.blocks[0].loss_mean is None
    assert record.blocks[0].worth == record.blocks[0].error_mean < record.blocks[2].error_mean
    assert "change at its mean" in said


def test_the_time_of_each_block(selab, tmp_path, still):
    weights, _ = still
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 100)
    status, said, err = selab("blocks", *words, "--runtime", "torch", "--budget", 2, "--json", tmp_path / "b.json")
    assert status == 0, err
    record = read_ranking(tmp_path / "b.json")
    assert all(one.latency is not None and one.latency.ratio is not None for one in record.blocks)
    assert (record.runtime, record.threads) == ("torch", 1)
    assert "without it" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "synthetic", "--max-drop", "0.1", "--max-error", "0.1"), "contradicts --max-drop"),
        (("--images", "photos", "--input", "3x32x32", "--max-drop", "1"), "the images have no labels"),
        (("--data", "synthetic", "--max-drop", "101"), "allowed: 0 to 100"),
        (("--data", "synthetic", "--most", "1"), "of three images two decide and one reports; give 3 or more"),
        (("--data", "synthetic", "--images", "photos"), "--images: contradicts --data; leave one of them out"),
        (("--data", "nowhere"), "--data: 'nowhere' is no folder, and not one of cifar10, cifar100, synthetic, "),
        (("--data", "photos", "--input", "3x32x32", "--max-drop", "1"), "the images have no labels"),
        (("--data", "photos", "--images", "photos"), "--images: contradicts --data; leave one of them out"),
        (("--images", "photos", "--input", "3x32x32", "--finetune", "1"), "--finetune: needs images with labels"),
        (("--data", "synthetic", "--max-error", "nan"), "allowed: 0 to 1"),
        (
            (
                "--images",
                "nowhere",
            ),
            "nowhere: is no folder",
        ),
    ],
)
def test_bad_input_of_fold_is_one_line(selab, tmp_path, monkeypatch, weights, photos, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = selab("fold", "--arch", "se_small_cnn", "--weights", weights, *words, "--budget", 0)
    assert status != 0
    assert said in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "folded").exists()


def test_channels_that_are_always_closed_are_taken_out(selab, tmp_path, still):
    _, model = still
    path = "block2.conv1.se"
    block = model.get_submodule(path)
    with torch.no_grad():
        # The columns of the squeeze are 0 as well, so that nothing but the map is lost.
        block.fc1.weight[:, [2, 3, 5]] = 0
    assert block.fc2.bias is None
    weights = tmp_path / "closed.safetensors"
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 100, "--budget", 0)
    # Without a bias a sigmoid is closed by a large input alone.
    with torch.no_grad():
        block.fc1.weight.abs_()
        block.fc2.weight[[2, 3, 5]] = -1e4
    save_file(model.state_dict(), weights)
    status, said, err = selab("fold", *words, "--max-drop", 100, "--out", tmp_path / "told")
    assert status == 0, err
    told = read_folding(tmp_path / "told" / "se_small_cnn.folding.json")
    (dead,) = (one for one in told.dead if one.path == path)
    assert {2, 3, 5} <= set(dead.channels)
    # conv2d: 32 input channels, 3x3; the map is 15x15.
    assert dead.macs == len(dead.channels) * 32 * 9 * 15 * 15
    assert not dead.pruned
    assert f"{path}: {len(dead.channels)} channels always about 0; the convolution before" in " ".join(said.split())
    status, said, err = selab("fold", *words, "--max-drop", 100, "--prune", "--out", tmp_path / "out")
    assert status == 0, err
    record = read_folding(tmp_path / "out" / "se_small_cnn.folding.json")
    (dead,) = (one for one in record.dead if one.path == path)
    assert dead.pruned
    assert "taken out" in said
    arch = f"{tmp_path / 'out' / 'se_small_cnn.toml'}:folded"
    made = build(find(arch)).model
    made.load_state_dict(load_file(tmp_path / "out" / "se_small_cnn.safetensors"))
    assert made.block2.conv1.conv.out_channels == 64 - len(dead.channels)
    assert made(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    status, said, err = selab("count", "--arch", arch)
    assert status == 0, err


def test_a_network_at_hand_folds(still):
    _, model = still
    model.train()
    images = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(images).argmax(1)
    loader = [(images[:16], labels[:16]), (images[16:], labels[16:])]
    folded, record = selab_package.fold_gates(model, loader, max_drop=0)
    assert {"block1.conv1.se", "block1.conv2.se"} <= set(record.folded)
    assert (record.chosen_on, record.reported_on, record.unit) == (27, 13, "points")
    assert model.training
    assert not folded.training
    left = [one for one in folded.modules() if isinstance(one, SqueezeExcitation)]
    assert len(left) == 4 - len(record.folded)


@pytest.mark.parametrize(
    ("loader", "how", "said"),
    [
        ([], {}, "the loader holds no image"),
        (iter([torch.zeros(2, 3, 32, 32)]), {}, "can be read only once"),
        ([torch.zeros(2, 3, 32, 32)], {"max_drop": 1}, "has no labels to lose points by"),
        ([torch.zeros(2, 3, 32, 32)], {"max_drop": 1, "max_error": 1}, "contradict each other"),
        ([torch.zeros(2, 3, 32, 32)], {"gate": "tanh"}, "gate 'tanh': allowed: hardsigmoid"),
    ],
)
def test_what_a_network_at_hand_needs(still, loader, how, said):
    with pytest.raises(SelabError, match=said):
        selab_package.fold_gates(still[1], loader, **how)


def test_counts_need_no_time(selab, tmp_path, still):
    weights, _ = still
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 60, "--max-drop", 100)
    status, said, err = selab("fold", *words, "--gate", "hardsigmoid", "--budget", 0, "--out", tmp_path / "out")
    assert status == 0, err
    record = read_folding(tmp_path / "out" / "se_small_cnn.folding.json")
    assert record.latency is None
    assert record.before.params - record.after.params == 2 * (2 * 32 * 2 + 2 * 64 * 4)
    # All operators, so that the blocks are not free: squeeze and scale are counted.
    assert record.before.macs - record.after.macs > 4 * 32 * 30 * 30
    # No gate was left to convert.
    assert record.gate_loss.images == 20
    told = " ".join(said.split())
    assert "Every block is folded: no gate is left to convert." in told
    assert "of that by" not in told
    assert f"(--arch {tmp_path / 'out' / 'se_small_cnn.toml'}:folded)" in told


def test_a_network_without_blocks_is_told_before_weights_are_asked_for(selab):
    status, _, err = selab("gates", "--arch", "small_cnn", "--data", "synthetic")
    assert status != 0
    assert "has no block with one gate per channel" in err
    assert "--weights" not in err


def test_few_images_do_not_say_that_a_gate_is_still(selab, weights):
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic")
    status, said, err = selab("gates", *words, "--most", 1)
    assert status == 0, err
    told = " ".join(said.split())
    assert "Few images (1) say little about how much gates vary" in told
    assert "do not depend on the image" not in told


def test_options_that_would_do_nothing_are_refused(selab, weights, photos, tmp_path):
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic")
    for command, more, said in (
        ("gates", ("--classes", "0"), "--classes: is of pictures and JSON; give --pictures or --json too"),
        ("gates", ("--input", "3x16x16"), "--input: the images of synthetic are 3x32x32"),
        ("blocks", ("--budget", "5"), "--budget: is for times; give --runtime too, torch or another"),
        ("blocks", ("--fused",), "--fused: is for times; give --runtime too, torch or another"),
        ("blocks", ("--runtime", "foo"), "runtime foo: unknown; known: "),
    ):
        status, _, err = selab(command, *words, *more)
        assert status != 0
        assert said in " ".join(err.split())
        assert "looking" not in err
    folder = tmp_path / "classes"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        (photos / f"{number}.png").rename(folder / name / "a.png")
    status, _, err = selab("gates", *words[:4], "--data", folder, "--input", "3x32x32")
    assert status != 0
    assert "are 3x224x224; --resize and --crop choose another, or --images any shape" in " ".join(err.split())


def test_a_folder_of_classes_is_named_with_the_size_of_its_images(selab, photos, tmp_path):
    folder = tmp_path / "ten"
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
    for number in range(4):
        (photos / f"{number}.png").rename(folder / str(number) / "a.png")
    path = tmp_path / "w.safetensors"
    save_file(build(find("se_small_cnn"), seed=3).model.state_dict(), path)
    words = ("se_small_cnn", "--weights", path, "--data", folder, "--resize", "32", "--crop", "32")
    status, said, err = selab("gates", *words, "--most", "3")
    assert status == 0, err
    assert "The gates of se_small_cnn over 3 images of ten (test, 3×32×32), 10 classes" in " ".join(said.split())
    assert "4, 5, 6, 7, 8 and 1 more: no image in it; it is numbered as a class all the same" in " ".join(err.split())


def test_a_network_that_is_always_wrong_has_other_classes(selab, still, monkeypatch, tmp_path):
    from selab.experiments import folding

    def wrong(batches, arms):
        return [np.zeros(50, np.bool_) for _ in arms]

    monkeypatch.setattr(folding, "answers", wrong)
    words = ("se_small_cnn", "--weights", still[0], "--data", "synthetic", "--most", 60, "--out", tmp_path / "out")
    status, _, err = selab("fold", *words, "--max-drop", 1)
    assert status != 0
    assert "has none of 50 images right, so that no gate can cost a point" in err
    assert not (tmp_path / "out").exists()


def test_a_network_at_hand_is_told_that_few_images_show_little(still):
    model = still[1]
    loader = [(torch.randn(9, 3, 32, 32), torch.zeros(9, dtype=torch.int64))]
    with pytest.warns(UserWarning, match=r"fold_gates: .* did not decide.* does not show that the limit is kept"):
        _, record = selab_package.fold_gates(model, loader, max_drop=5)
    assert repr(record).startswith("SmallCNN: ")
    assert "blocks folded at 5 points" in repr(record)
    assert [row[0] for row in record.rows()] == [one.path for one in record.choices]


def test_gates_print_as_a_table(still):
    found = selab_package.gates(still[1], [torch.randn(4, 3, 32, 32)])
    assert repr(found) == "gates of SmallCNN: 4 blocks, over 4 images of a loader" or len(repr(found)) < 100
    assert len(found.rows()) == 4
    assert len(found.rows()[0]) == len(found.columns())


def test_classes_are_checked_before_the_pass(selab, weights, monkeypatch):
    from selab.experiments import judged

    monkeypatch.setattr(judged.JudgedModule, "gates", lambda *_, **__: pytest.fail("it looked"))
    words = ("--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--classes", "nope")
    status, _, err = selab("gates", *words, "--json", "-")
    assert status != 0
    assert "--classes nope: no such class" in err


def test_channels_of_an_onnx_file_stay(selab, tmp_path, photos, still):
    from selab.deploy.onnx import export_onnx

    _, model = still
    export_onnx(model, (1, 3, 32, 32), tmp_path / "net.onnx", name="net")
    words = ("--arch", tmp_path / "net.onnx", "--images", photos, "--prune", "--out", tmp_path / "out")
    status, _, err = selab("fold", *words)
    assert status != 0
    assert "is an ONNX network; only networks in PyTorch lose channels" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_the_description_is_found_from_any_folder(selab, tmp_path, still, monkeypatch):
    weights, _ = still
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text("import selab\n\n\ndef net():\n    return selab.build('se_small_cnn')\n")
    monkeypatch.chdir(tmp_path / "mine")
    words = ("--arch", "net.py:net", "--input", "3x32x32", "--weights", weights, "--data", "synthetic", "--most", 60)
    status, _, err = selab("fold", *words, "--max-drop", 100, "--budget", 0, "--out", "out")
    assert status == 0, err
    monkeypatch.chdir(tmp_path)
    status, _, err = selab("count", "--arch", "mine/out/net.toml:folded", "--input", "3x32x32")
    assert status == 0, err
