"""The commands about accuracy: train, eval, compare."""

import json
import os
import signal

import pytest
import safetensors.torch
from PIL import Image

from selab.errors import SelabError
from selab.training.record import save_accuracy_record


class TestAccuracy:
    def test_a_comparison_from_the_shell(self, selab, tiny, tmp_path, one_line):
        words = ["compare", f"{tiny}:tiny", f"{tiny}:se_tiny", "--data", "synthetic", "--seeds", 1, "--epochs", 1]
        status, out, error = selab(*words, "--batch", 2000, "--threads", 1, "--no-latency", "--out", tmp_path)
        assert status == 0, error
        assert "top-1: one seed shows no uncertainty; run at least 3" in " ".join(out.split())
        (path,) = tmp_path.glob("*/accuracy/*.json")
        record = json.loads(path.read_text())
        weights = next(tmp_path.glob("runs/se_tiny*/weights.safetensors"))
        status, _, error = selab(*words, "--out", tmp_path)
        assert status == 1
        assert f"{path}: exists" in one_line(error)

        words = ["eval", "--weights", weights, "--data", "synthetic"]
        status, out, _ = selab(*words, "--arch", f"{tiny}:se_tiny", "--json", "-")
        assert json.loads(out)["top1_correct"] == record["seeds"][0]["variant"]["test"]["top1_correct"]
        status, _, error = selab(*words, "--arch", f"{tiny}:tiny")
        assert status == 1
        assert one_line(error)

        status, out, _ = selab("plot", "curves", "--record", path, "--out", tmp_path / "curves.svg")
        assert (status, out) == (0, f"picture: {tmp_path / 'curves.svg'}\n")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["compare", "small_cnn"], "is a baseline itself"),
            (["compare", "small_cn"], "error: compare small_cn: no such architecture; did you mean small_cnn"),
            (["compare", "small_cnn", "se_small_cn"], "error: compare se_small_cn: no such architecture; did you mean"),
            (["compare", "small_cnn", "no/file.py:Net"], "error: compare no/file.py:Net: there is no file no/file.py"),
            (["train", "--arch", "small_cnn", "--recipe", "cifar_shor"], "no such recipe; did you mean cifar_short"),
            (
                ["train", "--arch", "small_cnn", "--seed", 2**64],
                "seed: 18446744073709551616; allowed are 0 to 2^64 - 1",
            ),
            (["train", "--arch", "small_cnn", "--seed", -1], "seed: -1; allowed are 0 to 2^64 - 1"),
            (["eval", "--arch", "small_cnn", "--weights", "none.pth", "--data", "synthetic"], "none.pth"),
            (
                ["train", "--arch", "small_cnn", "--data", "imagenet", "--recipe", "cifar_short", "--data-dir", "none"],
                "--recipe cifar_short: is for images in memory; for image folders, such as imagenet, use one of",
            ),
            (
                ["compare", "se_small_cnn", "--recipe", "imagenet_senet", "--data-dir", "none"],
                "--recipe imagenet_senet: is for image folders; for images in memory, such as cifar10, use one of",
            ),
        ],
    )
    def test_mistakes(self, selab, words, message, one_line):
        status, _, error = selab(*words)
        assert status == 1
        assert message in one_line(error)

    def test_interrupted_before_anything_is_trained(self, selab, tiny, tmp_path, one_line, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("selab.experiments.equal_time.equal_time", interrupted)
        words = ["compare", f"{tiny}:se_tiny", "--data", "synthetic", "--equal-time", "--out", tmp_path]
        status, _, error = selab(*words)
        assert status == 130
        assert "interrupted before networks that are equally slow were found; nothing was trained" in one_line(error)

    def test_several_networks_with_one_baseline(self, selab, tiny, tmp_path):
        names = [f"{tiny}:{name}" for name in ("tiny", "se_tiny", "se_tiny+reduction=2")]
        common = ["--data", "synthetic", "--seeds", 1, "--epochs", 1, "--batch", 2000, "--threads", 1, "--no-latency"]
        common += ["--out", tmp_path]
        status, out, error = selab("compare", *names, *common, "--json", tmp_path / "both.json")
        assert status == 0, error
        paths = [line.removeprefix("record: ") for line in out.splitlines() if line.startswith("record: ")]
        records = [json.loads((tmp_path / path).read_text()) for path in paths]
        assert [record["arch"] for record in records] == ["se_tiny", "se_tiny+reduction=2"]
        assert json.loads((tmp_path / "both.json").read_text()) == records
        # The baseline is trained once.
        assert records[0]["seeds"][0]["baseline"] == records[1]["seeds"][0]["baseline"]
        assert len(list(tmp_path.glob("runs/tiny.*"))) == 1
        # What is finished is shown again.
        status, again, error = selab("compare", *names, *common)
        assert status == 0
        assert again == out
        assert f"{paths[0]}: already finished; more --seeds extend it" in " ".join(error.split())

    def test_several_trainings_at_once(self, selab, tiny, tmp_path):
        names = [f"{tiny}:{name}" for name in ("tiny", "se_tiny", "se_tiny+reduction=2")]
        common = ["--data", "synthetic", "--seeds", 1, "--epochs", 1, "--batch", 2000, "--threads", 1, "--no-latency"]
        status, _, error = selab("compare", *names, *common, "--out", tmp_path / "alone")
        assert status == 0, error
        status, _, error = selab("compare", *names, *common, "--out", tmp_path / "at_once", "--jobs", 2)
        assert status == 0, error
        assert "3 trainings × 1 epoch on synthetic, 2 at once" in error
        assert len(list(tmp_path.glob("at_once/runs/*/weights.safetensors"))) == 3
        for one in tmp_path.glob("alone/*/accuracy/*.json"):
            here, there = (json.loads(path.read_text()) for path in (one, *tmp_path.glob(f"at_once/*/*/{one.name}")))
            assert here["options"] == there["options"]
            assert [one["variant"]["at_once"] for one in (*here["seeds"], *there["seeds"])] == [1, 2]
            for before, after in zip(here["seeds"], there["seeds"], strict=True):
                assert [before[arm]["test"] for arm in ("baseline", "variant")] == [
                    after[arm]["test"] for arm in ("baseline", "variant")
                ]

    def test_a_network_for_other_images_is_found_out_before_training(self, selab, tmp_path):
        (tmp_path / "nets.py").write_text(
            "from torch import nn\n"
            "def plain():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
            "def hundred():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))\n"
        )
        names = [f"{tmp_path / 'nets.py'}:{name}" for name in ("plain", "hundred")]
        status, _, error = selab("compare", *names, "--data", "synthetic", "--no-latency", "--out", tmp_path / "out")
        assert status == 1
        assert "has 100 classes, synthetic has 10" in error
        assert not list(tmp_path.glob("out/runs/*"))

    def test_cuda_graphs_are_refused_on_the_cpu(self, selab, one_line, tmp_path):
        words = ("train", "--arch", "small_cnn", "--data", "synthetic", "--cuda-graph", "--out", tmp_path)
        status, _, error = selab(*words)
        assert status == 1
        assert "--cuda-graph: is for one process on --device cuda, without --compile" in one_line(error)

    def test_half_precision_of_the_gpu_is_refused_on_the_cpu(self, selab, one_line):
        status, _, error = selab("train", "--arch", "small_cnn", "--data", "synthetic", "--amp", "fp16")
        assert status == 1
        assert "--amp fp16: is for --device cuda; on a CPU use bf16" in one_line(error)

    @pytest.mark.parametrize(
        "words",
        [
            ["train", "--arch", "small_cnn"],
            ["compare", "se_small_cnn"],
            ["eval", "--arch", "small_cnn", "--weights", "none.pth"],
        ],
    )
    def test_the_file_of_the_result_is_tried_before_anything_is_done(self, selab, tmp_path, words, one_line):
        status, _, error = selab(*words, "--data-dir", tmp_path, "--no-download", "--json", tmp_path)
        assert status == 1
        assert f"{tmp_path}: is a folder; name a file in it" in one_line(error)

    def test_interrupted_while_the_networks_are_timed(self, selab, tmp_path, monkeypatch, compared_small_cnn, one_line):
        from selab.experiments.compare import Comparison

        def interrupt(*_):
            raise KeyboardInterrupt

        def trained(comparisons, *_, **__):
            for one in comparisons:
                save_accuracy_record(compared_small_cnn([80.0], [81.0]), one.path)

        monkeypatch.setattr("selab.experiments.trainings.run_all", trained)
        monkeypatch.setattr(Comparison, "measure", interrupt)
        status, out, error = selab("compare", "se_small_cnn", "--data", "synthetic", "--seeds", 1, "--out", tmp_path)
        assert (status, out) == (130, "")
        (path,) = tmp_path.glob("*/accuracy/*.json")
        assert f"interrupted; the comparison is in {path}, times are missing" in one_line(error)
        assert f"`selab table accuracy --profiles {path.parents[1]}`" in one_line(error)

    @pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_training_that_a_signal_stops_has_the_status_of_the_signal(
        self, selab, tiny, tmp_path, monkeypatch, number, expected
    ):
        from selab.training.engine import Engine

        def signalled(engine, stop):
            os.kill(os.getpid(), number)
            assert stop.wanted
            raise engine._stopped()

        monkeypatch.setattr(Engine, "_train_epoch", signalled)
        words = ["--data", "synthetic", "--epochs", 1, "--threads", 1, "--out", tmp_path / "out"]
        status, _, error = selab("train", "--arch", f"{tiny}:tiny", *words)
        assert status == expected
        assert "the same command resumes there" in error

    def test_data_that_is_not_there(self, selab, tmp_path, one_line):
        words = ["train", "--arch", "small_cnn", "--data-dir", tmp_path, "--no-download", "--out", tmp_path]
        status, _, error = selab(*words)
        assert status == 1
        assert "cifar-10-binary.tar.gz" in one_line(error)

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            (["train", "--arch", "small_cnn"], "cifar_short_plain"),
            (["train", "--arch", "vgg16_cifar"], "cifar_short"),
            (["compare", "small_cnn", "resnet20_cifar"], "cifar_short_plain"),
            (["compare", "resnet20_cifar", "small_cnn"], "cifar_short"),
        ],
    )
    def test_the_recipe_of_who_names_none(self, selab, tmp_path, monkeypatch, words, name, one_line):
        def tell(variant, data, recipe, **_):
            raise SelabError(recipe.name)

        for place in ("selab.training.train.train", "selab.experiments.trainings.train"):
            monkeypatch.setattr(place, tell)
        _, _, error = selab(*words, "--data", "synthetic", "--out", tmp_path)
        assert one_line(error) == f"error: {name}"


OWN_RECIPE = """
[recipes.own]
title = "Own"
source = "this test"
where = "above"
lr = 0.01
momentum = 0.9
weight_decay = 0.0
batch = 4
epochs = 1
schedule = "constant"
image = { train_size = 32, test_resize = 32, test_crop = 32, pixel_jitter = 0, std = [1, 1, 1] }
[recipes.memory]
title = "For the other kind of data"
source = "this test"
where = "above"
lr = 0.01
momentum = 0.9
weight_decay = 0.0
batch = 4
epochs = 1
schedule = "constant"
flip = true
"""


class TestImageFolders:
    @pytest.fixture
    def words(self, tmp_path, tiny):
        """The options of a data set of two classes; one of its test images cannot be read, and one is grey."""
        for split in ("train", "val"):
            for number in range(6):
                path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (48, 40), (40 * number, 0, 90)).save(path)
        (tmp_path / "data/val/a/broken.png").write_bytes(b"no image")
        Image.new("L", (48, 40), 7).save(tmp_path / "data/val/a/grey.png")
        (tmp_path / "own.toml").write_text(OWN_RECIPE)
        return ["--data", "folder", "--data-dir", tmp_path / "data", "--workers", 0]

    @pytest.fixture
    def trained(self, selab, tmp_path, tiny, words):
        """Its weights, and what the training said."""
        more = ["--recipe", tmp_path / "own.toml:own", "--threads", 1, "--out", tmp_path / "out"]
        status, out, error = selab("train", "--arch", f"{tiny}:tiny", *words, *more)
        assert status == 0, error
        return next((tmp_path / "out").glob("**/weights.safetensors")), out

    def test_weights_bring_their_preparation(self, selab, tiny, words, trained):
        weights, out = trained
        assert "recipe: own\n" in out
        told = "images read: 1 left out (val/a/broken.png), 1 grey, 0 CMYK\n"
        assert out.endswith(told)
        training = json.loads((weights.parent / "training.json").read_text())
        assert training["problems"]["corrupt"] == {"count": 1, "first": ["val/a/broken.png"]}

        words = ["eval", "--arch", f"{tiny}:tiny", "--weights", weights, *words]
        status, out, _ = selab(*words, "--json", "-")
        assert status == 0
        found = json.loads(out)
        assert {key: found[key] for key in training["test"]} == training["test"]
        assert (found["prepared"]["std"], found["prepared_by"]) == ([1, 1, 1], "as trained")
        assert found["data_sha256"] == training["data_sha256"]
        low, high = found["top1_interval_pct"]
        assert 0 <= low < 100 * found["top1_correct"] / 7 < high <= 100
        assert found["top5_interval_pct"] is None
        assert found["problems"] == training["problems"]

        _, out, _ = selab(*words)
        prepared = "images: resize 32, crop 32, bilinear, mean 0.485 0.456 0.406, std 1 1 1"
        assert f"{prepared} (as trained)\n" in out
        assert out.endswith(told)

    def test_options_come_before_a_recipe_and_a_recipe_before_the_weights(self, selab, tiny, words, trained, tmp_path):
        words = ["eval", "--arch", f"{tiny}:tiny", "--weights", trained[0], *words]
        _, out, _ = selab(*words, "--resize", 40, "--crop", 36)
        assert (
            "images: resize 40, crop 36, bilinear, mean 0.485 0.456 0.406, std 1 1 1 (as trained, --resize, --crop)"
            in out
        )
        _, out, _ = selab(*words, "--recipe", "imagenet_senet_299", "--crop", 64)
        assert "images: resize 352, crop 64, " in out
        assert "(recipe imagenet_senet_299, --crop)" in out
        # A file that says nothing.
        state = safetensors.torch.load_file(trained[0])
        safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
        words[words.index(trained[0])] = tmp_path / "bare.safetensors"
        _, out, _ = selab(*words)
        assert "images: resize 256, crop 224, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (default)" in out

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--crop", 33], "--crop 33: does not fit into images resized to 32; give a larger --resize"),
            (["--recipe", "cifar_short"], "--recipe cifar_short: is for images in memory"),
            (["--recipe", "own.toml:memory"], "--recipe memory: is for images in memory"),
            (["--data", "synthetic", "--crop", 20], "are for image folders; synthetic needs none of them"),
            (["--data", "synthetic", "--classes-file", "x"], "--classes-file x: is for image folders"),
            (["--classes-file", "none.txt"], "none.txt: cannot be read"),
        ],
    )
    def test_preparations_that_cannot_be(self, selab, tiny, words, trained, tmp_path, monkeypatch, changes, message):
        monkeypatch.chdir(tmp_path)
        status, _, error = selab("eval", "--arch", f"{tiny}:tiny", "--weights", trained[0], *words, *changes)
        assert status == 1
        assert message in error.splitlines()[-1]

    def test_a_comparison_tells_what_was_left_out(self, selab, tiny, words, tmp_path):
        more = ["--recipe", tmp_path / "own.toml:own", "--seeds", 1, "--no-latency", "--out", tmp_path / "out"]
        status, out, error = selab("compare", f"{tiny}:se_tiny", *words, *more)
        assert status == 0, error
        assert "images read: 1 left out (val/a/broken.png), 1 grey, 0 CMYK" in out
