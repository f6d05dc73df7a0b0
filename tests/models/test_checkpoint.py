import hashlib
import pickle
from collections import Counter

import pytest
import torch
from catalog_networks import built
from safetensors.torch import load_file, save_file

from selab._version import __version__
from selab.errors import SelabError, UnknownNameError
from selab.models import checkpoint, key_maps
from selab.models.build import build
from selab.models.catalog import installed
from selab.models.checkpoint import WeightsError, convert, load, read_metadata, read_state
from selab.training.recipe import read_image_recipe

# MobileNetV3-Small has SE of 1x1 convolutions, hidden and last layer, and is small.
SMALL = {"source": "torchvision", "arch": "mobilenet_v3_small"}


@pytest.fixture(scope="session")
def listings(root):
    """(source, model) → key → shape, of the state dicts in data/foreign_keys.txt."""
    found = {}
    for line in (root / "tests" / "data" / "foreign_keys.txt").read_text().splitlines():
        if line.startswith("["):
            shapes = found[tuple(line.strip("[]").split())] = {}
        elif not line.startswith("#"):
            module, size = line.split()
            shape = tuple(map(int, size.removesuffix("+").split("x")))
            if len(shape) == 1:
                for leaf in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{module}.{leaf}"] = shape
                shapes[f"{module}.num_batches_tracked"] = ()
            else:
                shapes[f"{module}.weight"] = shape
                if size.endswith("+"):
                    shapes[f"{module}.bias"] = shape[:1]
    return found


def filled(shapes):
    """A state dict of these shapes, no two tensors alike."""
    random = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(shape, generator=random) if shape else torch.tensor(7 + index)
        for index, (key, shape) in enumerate(shapes.items())
    }
    return {key: value.abs() if key.endswith("running_var") else value for key, value in state.items()}


@pytest.fixture(scope="session")
def foreign(listings):
    """torchvision's mobilenet_v3_small, as a state dict."""
    return filled(listings["torchvision", "mobilenet_v3_small"])


@pytest.fixture
def saved(foreign, tmp_path):
    """Saves a changed copy of it; says where."""

    def save(change=lambda state: None, name="in.pth"):
        state = dict(foreign)
        torch.save(change(state) or state, tmp_path / name)
        return tmp_path / name

    return save


def refused(path, words, *, out=None, error=WeightsError, **options):
    """Converting fails in one line with these words, and leaves the folder as it was."""
    before = {one: one.is_file() and one.read_bytes() for one in path.parent.iterdir()}
    with pytest.raises(error) as caught:
        convert(path, out or path.parent / "out.safetensors", **{**SMALL, **options})
    assert "\n" not in str(caught.value)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value)
    assert {one: one.is_file() and one.read_bytes() for one in path.parent.iterdir()} == before


class TestKeys:
    def test_a_pair_is_declared_once_and_for_a_network_that_exists(self):
        declared = Counter((port.source, port.arch) for port in (*key_maps.PORTS, *key_maps.UNEQUAL))
        assert [pair for pair, times in declared.items() if times > 1] == []
        assert {port.arch for port in (*key_maps.PORTS, *key_maps.UNEQUAL)} <= installed().keys()

    def test_what_is_equal_has_no_difference_and_what_is_not_has_one(self):
        assert not any(port.unequal for port in key_maps.PORTS)
        assert all(port.unequal for port in key_maps.UNEQUAL)

    @pytest.mark.xdist_group("catalog")
    def test_every_recorded_network_becomes_ours(self, listings):
        """Names and number of values; that the functions are equal is tests/interop's."""
        ports = {(port.source, port.model): port for port in key_maps.PORTS}
        for pair, shapes in listings.items():
            port = ports[pair]
            ours = built(port.arch).model.state_dict()
            sizes = {key_maps.renamed(key, port.rules): torch.Size(shape).numel() for key, shape in shapes.items()}
            if port.folds_bias:
                sizes = {key: size for key, size in sizes.items() if not key.endswith(".conv.bias")}
            assert sizes == {key: value.numel() for key, value in ours.items()}, pair

    def test_equal_shapes_are_not_enough(self):
        with pytest.raises(UnknownNameError, match=r"torchvision's resnet50 strides in the 3x3 .* resnet50_v1_5"):
            key_maps.port_for("torchvision", "resnet50")
        assert key_maps.port_for("torchvision", "resnet50_v1_5").model == "resnet50"

    def test_what_a_source_does_not_have_names_what_it_has_nearest_first(self):
        with pytest.raises(
            UnknownNameError, match="cadene has no network that equals it; from cadene there are se_res"
        ):
            key_maps.port_for("cadene", "se_resnet34")

    def test_an_unknown_source(self):
        with pytest.raises(UnknownNameError, match="--from tim: no such source; did you mean timm"):
            key_maps.port_for("tim", "resnet18")


class TestConvert:
    def test_every_value_arrives(self, foreign, saved, tmp_path):
        done = convert(saved(), tmp_path / "out.safetensors", **SMALL)
        written = load_file(tmp_path / "out.safetensors")
        ours = built("mobilenet_v3_small").model.state_dict()
        assert {key: value.shape for key, value in written.items()} == {key: v.shape for key, v in ours.items()}
        assert len(done.renamed) == len(foreign)
        for step in done.renamed:
            assert torch.equal(written[step.ours].flatten(), foreign[step.theirs].flatten())

    def test_se_of_1x1_convolutions_becomes_fully_connected(self, foreign, saved, tmp_path):
        convert(saved(), tmp_path / "out.safetensors", **SMALL)
        weight = load_file(tmp_path / "out.safetensors")["stage1.0.branch.depthwise.se.fc1.weight"]
        assert weight.shape == (8, 16)
        assert torch.equal(weight, foreign["features.1.block.1.fc1.weight"][:, :, 0, 0])

    def test_the_output_says_where_it_comes_from(self, saved, tmp_path):
        path = saved()
        done = convert(path, tmp_path / "out.safetensors", **SMALL)
        assert read_metadata(tmp_path / "out.safetensors") == done.metadata
        assert done.metadata == {
            "source": "torchvision",
            "model": "mobilenet_v3_small",
            "arch": "mobilenet_v3_small",
            "facts_hash": installed()["mobilenet_v3_small"].facts_hash,
            "input_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "selab": __version__,
        }

    def test_a_dry_run_finds_out_and_writes_nothing(self, saved, tmp_path):
        path = saved()
        done = convert(path, None, **SMALL)
        first = done.renamed[0]
        assert (first.theirs, first.ours, first.shape) == ("features.0.0.weight", "stem.conv.weight", (16, 3, 3, 3))
        assert list(tmp_path.iterdir()) == [path]

    def test_a_dry_run_finds_faults(self, saved):
        with pytest.raises(WeightsError, match="NaN"):
            convert(
                saved(lambda state: state.update({"classifier.0.bias": torch.full((1024,), torch.nan)})), None, **SMALL
            )

    def test_safetensors(self, foreign, tmp_path):
        save_file(foreign, tmp_path / "in.safetensors")
        done = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", **SMALL)
        assert len(done.renamed) == len(foreign)

    def test_the_older_format_of_torch_save(self, foreign, tmp_path):
        torch.save(foreign, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
        assert read_state(tmp_path / "in.pth").keys() == foreign.keys()

    def test_old_files_have_no_counters(self, saved, tmp_path):
        def drop_counters(state):
            for key in [key for key in state if key.endswith("num_batches_tracked")]:
                del state[key]

        done = convert(saved(drop_counters), tmp_path / "out.safetensors", **SMALL)
        # 34 BN: stem, 11 blocks of 3 less the first one's expansion, and the head's.
        assert len(done.filled) == 1 + 11 * 3 - 1 + 1
        assert load_file(tmp_path / "out.safetensors")["stem.bn.num_batches_tracked"] == 0

    def test_where_training_scripts_put_it(self, foreign, saved):
        path = saved(lambda state: {"epoch": 3, "state_dict": {f"module.{key}": one for key, one in state.items()}})
        assert read_state(path).keys() == foreign.keys()
        assert convert(path, None, **SMALL).metadata["under"] == "state_dict"

    def test_averaged_weights_come_first(self, foreign, saved):
        path = saved(lambda state: {"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": state})
        assert read_state(path).keys() == foreign.keys()

    def test_half_precision_becomes_single(self, foreign, saved, tmp_path):
        path = saved(lambda state: {key: one.half() if one.is_floating_point() else one for key, one in state.items()})
        convert(path, tmp_path / "out.safetensors", **SMALL)
        weight = load_file(tmp_path / "out.safetensors")["stem.conv.weight"]
        assert torch.equal(weight, foreign["features.0.0.weight"].half().float())

    def test_a_convolution_over_the_whole_map_becomes_fully_connected(self):
        conv, layer = torch.empty(4, 5, 7, 7, device="meta"), torch.empty(4, 5 * 49, device="meta")
        assert checkpoint._fits(conv, layer)
        assert not checkpoint._fits(layer, conv)
        assert not checkpoint._fits(torch.empty(4, 7, 7, 4, device="meta"), layer)

    def test_a_bias_is_taken_off_the_mean(self, listings, tmp_path):
        state = filled(listings["cadene", "bninception"])
        torch.save(state, tmp_path / "in.pth")
        done = convert(tmp_path / "in.pth", tmp_path / "out.safetensors", source="cadene", arch="bn_inception")
        written = load_file(tmp_path / "out.safetensors")
        # bn(y + bias) with mean m is bn(y) with mean m - bias.
        expected = state["conv1_7x7_s2_bn.running_mean"] - state["conv1_7x7_s2.bias"]
        assert torch.equal(written["stem.conv1.bn.running_mean"], expected)
        # BN-Inception: 3 convolutions in the stem, 7 in each of 8 modules, 5 in each of the 2 that stride.
        assert sum(step.folded for step in done.renamed) == 3 + 8 * 7 + 2 * 5
        del state["inception_5b_1x1.bias"]
        torch.save(state, tmp_path / "in.pth")
        with pytest.raises(
            WeightsError, match=r"missing \(by our names\): stage5\.inception5b\.branches\.path1x1\.conv\.bias$"
        ):
            convert(tmp_path / "in.pth", None, source="cadene", arch="bn_inception")


class Evil:
    """Unpickled as Python does it, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestRefused:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_runs_code(self, foreign, tmp_path, zipped):
        bait = tmp_path / "created"
        pickle.loads(pickle.dumps(Evil(bait))).close()
        assert bait.exists(), "the bait is live"
        bait.unlink()
        path = tmp_path / "in.pth"
        torch.save({**foreign, "evil": Evil(bait)}, path, _use_new_zipfile_serialization=zipped)
        refused(path, ["is refused", "io.open", "could run any code", "save its state dict alone"])
        with pytest.raises(WeightsError):
            read_state(path)
        assert not bait.exists()

    def test_a_bare_pickle_that_runs_code(self, tmp_path):
        (tmp_path / "in.pt").write_bytes(pickle.dumps(Evil(tmp_path / "created"), protocol=2))
        refused(tmp_path / "in.pt", "is refused")

    def test_a_whole_network(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "in.pth")
        refused(tmp_path / "in.pth", ["is refused", "torch.nn.modules.linear.Linear"])

    @pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
    @pytest.mark.parametrize("keep", [0, 5, 1000, -100])
    def test_a_truncated_file(self, foreign, tmp_path, name, keep):
        path = tmp_path / name
        save_file(foreign, path) if name.endswith("safetensors") else torch.save(foreign, path)
        path.write_bytes(path.read_bytes()[:keep])
        refused(path, ["is broken or no", "get it again"])

    @pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
    def test_a_page_of_text(self, tmp_path, name):
        (tmp_path / name).write_text("<html>404 Not Found</html>\n" * 20)
        refused(tmp_path / name, "is broken or no")

    def test_no_state_dict(self, saved):
        refused(saved(lambda state: list(state.values())), "has no state dict")
        refused(
            saved(lambda state: {"weights": state}),
            "has no state dict (tensors by name) at the top level or under state_dict, model or another usual name",
        )
        refused(
            saved(lambda state: {f"key{index}": index for index in range(5)}), "5 keys: key0, key1, key2 and 2 more"
        )
        refused(saved(lambda state: {"model": {}}), "has no state dict")

    def test_no_such_file(self, tmp_path):
        refused(tmp_path / "in.pth", "No such file")

    def test_another_kind_of_file(self, tmp_path):
        refused(tmp_path / "in.onnx", "allowed are .safetensors, .pt, .pth, .pth.tar, .ckpt and .bin")

    def test_a_sparse_tensor(self, saved):
        refused(
            saved(lambda state: state.update({"classifier.3.bias": torch.zeros(1000).to_sparse()})), "classifier.3.bias"
        )

    def test_another_number_of_classes(self, saved):
        def ten(state):
            state["classifier.3.weight"], state["classifier.3.bias"] = torch.zeros(10, 1024), torch.zeros(10)

        refused(saved(ten), ["classifier.3.weight has 10 classes", "mobilenet_v3_small has 1000"])

    def test_another_network_of_the_source(self, listings, tmp_path):
        torch.save(filled(listings["torchvision", "resnet18"]), tmp_path / "in.pth")
        refused(
            tmp_path / "in.pth",
            [
                "does not match torchvision's mobilenet_v3_small",
                " missing (by our names): stem.conv.weight, ",
                ", …; 122 unexpected: conv1.weight, …",
            ],
        )

    def test_a_wrong_shape(self, saved):
        words = ": 1 of the wrong shape or type: features.0.1.bias (17,) instead of (16,)"
        refused(saved(lambda state: state.update({"features.0.1.bias": torch.zeros(17)})), words)

    def test_a_wrong_type(self, saved):
        words = "features.0.1.bias int64 instead of float32"
        refused(saved(lambda state: state.update({"features.0.1.bias": torch.zeros(16, dtype=torch.long)})), words)

    def test_the_first_three_and_how_many_there_are(self, saved):
        def add_seven(state):
            state.update({f"extra{index}": torch.zeros(1) for index in range(7)})

        refused(saved(add_seven), ": 7 unexpected: extra0, extra1, extra2, …")

    def test_two_tensors_for_one_place(self, saved):
        refused(saved(lambda state: state.update({"stem.conv.weight": torch.zeros(16, 3, 3, 3)})), "stem.conv.weight")

    def test_nan(self, saved):
        def spoil(state):
            state["features.0.0.weight"] = torch.full((16, 3, 3, 3), torch.inf)

        refused(saved(spoil), ["stem.conv.weight", "NaN or infinite"])

    @pytest.mark.parametrize("value", [-1.0, -1e-30])
    def test_a_variance_below_zero(self, saved, value):
        def spoil(state):
            state["features.0.1.running_var"] = torch.full((16,), value)

        refused(saved(spoil), ["stem.bn.running_var: holds negative values, and a variance has none; get the file"])

    def test_a_variance_of_zero_is_one(self, saved, tmp_path):
        path = saved(lambda state: state.update({"features.0.1.running_var": torch.zeros(16)}))
        assert convert(path, None, **SMALL).renamed

    @pytest.mark.parametrize("head", ["keep", "drop"])
    @pytest.mark.parametrize(
        ("dtype", "size", "words"),
        [
            (torch.complex64, 1000, "1 of the wrong shape or type: classifier.3.bias complex64 instead of float32"),
            (torch.bool, 1000, "classifier.3.bias bool instead of float32"),
            (torch.int8, 1000, "classifier.3.bias int8 instead of float32"),
            (torch.complex64, 10, "classifier.3.bias complex64 (10,) instead of float32 (1000,)"),
        ],
    )
    def test_a_classifier_of_another_type(self, saved, dtype, size, words, head):
        def spoil(state):
            state["classifier.3.bias"] = torch.zeros(size, dtype=dtype)

        refused(saved(spoil), words, head=head)

    def test_a_network_that_is_not_equal(self, saved):
        refused(saved(), "strides in the 3x3", arch="resnet50", error=UnknownNameError)
        refused(saved(), "no such architecture", arch="mobilenet_v3_smal", error=UnknownNameError)

    def test_a_users_own_network_of_the_same_name(self, saved, toy):
        text = toy.read_text().replace("[variants.slow]", "[variants.resnet18]")
        toy.write_text(text)
        refused(saved(), "no network that equals it", arch=f"{toy}:resnet18", error=UnknownNameError)

    def test_an_existing_output(self, saved, tmp_path):
        out = tmp_path / "out.safetensors"
        out.write_text("precious")
        path = saved()
        refused(path, ["exists", "--replace"])
        refused(saved(lambda state: state.update({"extra": torch.zeros(1)})), "extra", replace=True)
        convert(saved(), out, **SMALL, replace=True)
        assert read_metadata(out)["arch"] == "mobilenet_v3_small"

    def test_the_input_as_the_output(self, foreign, tmp_path):
        save_file(foreign, tmp_path / "in.safetensors")
        refused(tmp_path / "in.safetensors", "is the input", out=tmp_path / "in.safetensors", replace=True)

    def test_an_output_that_cannot_be(self, saved, tmp_path):
        path = saved()
        refused(path, "is a .safetensors file", out=tmp_path / "out.pth")
        (tmp_path / "folder.safetensors").mkdir()
        refused(path, "is a folder", out=tmp_path / "folder.safetensors")
        refused(path, "cannot be written", out=path / "out.safetensors", error=SelabError)


class TestLoad:
    @pytest.fixture
    def converted(self, saved, tmp_path):
        convert(saved(), tmp_path / "out.safetensors", **SMALL)
        return tmp_path / "out.safetensors"

    def test_every_value_arrives(self, converted):
        variant = installed()["mobilenet_v3_small"]
        model = build(variant).model
        load(model, converted, variant=variant)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in load_file(converted).items())

    def test_all_or_nothing(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "2.bias": torch.zeros(1)}
        with pytest.raises(WeightsError) as caught:
            load(model, state)
        assert str(caught.value) == (
            "the state dict: does not fit Sequential: 4 missing: 1.weight, …; "
            "1 unexpected: 2.bias; 1 of the wrong shape or type: 0.bias (4,) instead of (3,)"
        )
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_counters_may_be_missing(self):
        model = torch.nn.BatchNorm1d(3)
        model.num_batches_tracked.fill_(5)
        load(model, {key: value for key, value in model.state_dict().items() if key != "num_batches_tracked"})
        assert model.num_batches_tracked == 0

    def test_a_file_for_other_facts_is_refused_although_it_fits(self, converted):
        model = build(installed()["mobilenet_v3_small"]).model
        other = installed()["mobilenetv3_small_100"]
        with pytest.raises(WeightsError, match="was converted for mobilenet_v3_small, not for mobilenetv3_small_100"):
            load(model, converted, variant=other)

    @pytest.mark.parametrize("told", ["no JSON", '{"test_crop": 0}', '{"crop": 1}'])
    def test_metadata_that_tell_of_no_image_recipe(self, tmp_path, told):
        path = tmp_path / "odd.safetensors"
        save_file({"a": torch.zeros(1)}, path, {"image": told})
        with pytest.raises(WeightsError, match=r"odd\.safetensors: its metadata's image: .*; get the file again"):
            read_image_recipe(path)
