"""A site with a block: its keys, attributes, paths and dtypes."""

import pytest
import torch
from gated_networks import CHW, Residual, blocks, example, gated, network
from torch import nn

from selab.attention.gated_site import GatedSite, named_sites
from selab.attention.insert import insert_se, remove_se
from selab.attention.inserted import inserted_blocks
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError


@pytest.fixture
def image():
    return example()


class TestKeys:
    def test_the_site_s_keys_stay_and_the_block_s_are_new(self):
        base, model = network().state_dict(), gated("1.bn", "2", "2.conv").state_dict()
        new = [key for key in model if key not in base]
        assert [key for key in model if key in base] == list(base)
        layers = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        assert sorted(new) == sorted(f"{site}.se.{layer}" for site in ("1.bn", "2", "2.conv") for layer in layers)
        assert model._metadata["1.bn"] == {"version": 2}

    def test_missing_and_unexpected_keys_and_errors_have_the_site_s_names(self):
        model, state = gated("1.bn", "2", "2.bn"), network().state_dict()
        del state["1.bn.weight"], state["2.bn.bias"]
        state["2.bn.scale"] = state["2.se.fc1.more"] = torch.zeros(1)
        result = model.load_state_dict(state, strict=False)
        assert {"1.bn.weight", "2.bn.bias", "1.bn.se.fc1.weight"} < set(result.missing_keys)
        assert set(result.unexpected_keys) == {"2.bn.scale", "2.se.fc1.more"}
        assert not [key for key in (*result.missing_keys, *result.unexpected_keys) if "inner" in key]
        state["2.conv.weight"] = torch.zeros(3)
        with pytest.raises(RuntimeError, match=r"size mismatch for 2\.conv\.weight") as raised:
            model.load_state_dict(state)
        assert "inner" not in str(raised.value)

    @pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
    def test_round_trip_of_nested_sites(self, wrap, image):
        one, other = wrap(gated("1.bn", "2", "2.bn")), wrap(gated("1.bn", "2", "2.bn"))
        state = {key: torch.rand_like(value.float()).to(value.dtype) for key, value in one.state_dict().items()}
        assert not any(other.load_state_dict(state))
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())

    def test_the_version_of_a_norm_is_read(self):
        """A BatchNorm since version 2 misses a count of batches; one of version 1 has none."""
        model = gated("1.bn")
        state = model.state_dict()
        del state["1.bn.num_batches_tracked"]
        assert model.load_state_dict(state, strict=False).missing_keys == ["1.bn.num_batches_tracked"]
        state._metadata["1.bn"]["version"] = 1
        assert not any(model.load_state_dict(state))

    def test_assign(self):
        model = gated("1.bn", "2")
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert all(value.data_ptr() == state[key].data_ptr() for key, value in model.state_dict().items())

    def test_the_names_of_an_export_load(self, image):
        model, other = gated(), gated(init="identity")
        state = {key: value * 0.5 for key, value in model.named_parameters()}
        assert "2.inner.conv.weight" in state
        missing, unexpected = other.load_state_dict(state, strict=False)
        assert not unexpected
        assert all("running" in key or "num_batches" in key or "affine" in key for key in missing)


class TestAttributes:
    def test_reading_and_setting_go_to_the_site_s_own_module(self):
        model = gated("1.bn", "2")
        own = model[2].inner
        assert model[2].conv is own.conv
        assert model[2].conv.weight.dtype == torch.float32
        assert (model[1].bn.eps, model[1].bn.num_features) == (1e-5, 8)
        model[1].bn.eps = 0.1
        model[2].from_layer = -1
        assert (model[1].bn.inner.eps, own.from_layer) == (0.1, -1)
        model[2].bn = replaced = nn.Identity()
        assert own.bn is replaced
        del model[2].bn
        assert not hasattr(model[2], "bn")
        assert not hasattr(model[1].bn, "nothing")
        assert {"eps", "se", "state_dict"} < set(dir(model[1].bn))
        assert model.get_parameter("1.bn.weight") is model[1].bn.inner.weight
        assert model.get_submodule("2.conv") is own.conv

    def test_a_container_can_be_indexed_and_iterated(self, image):
        class Stage(nn.ModuleList):
            def forward(self, x):
                for module in self:
                    x = module(x)
                return x

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stage = Stage([nn.Conv2d(3, 8, 3), nn.ReLU()])

            def forward(self, x):
                return self.stage(x) * len(self.stage) * float(self.stage[0].stride[0])

        model = Net()
        expected = model(image)
        insert_se(model, "stage", input_nchw=CHW, reduction=2, init="identity")
        assert torch.equal(model(image), expected)
        assert len(model.stage) == 2
        assert list(model.stage) == [model.stage[0], model.stage[1]]
        assert model.stage[1] in model.stage
        model.stage[1] = nn.Identity()
        assert isinstance(model.stage.inner[1], nn.Identity)

    @pytest.mark.parametrize("value", [None, False, 16, nn.Identity(), nn.BatchNorm2d(8)])
    def test_a_taken_name(self, value, image):
        class Taken(Residual):
            def __init__(self):
                super().__init__()
                self.se = value

            def forward(self, x):
                y = super().forward(x)
                return self.se(y) if isinstance(self.se, nn.Module) else y

        model = nn.Sequential(nn.Conv2d(3, 8, 3), Taken()).eval()
        keys, text, expected = list(model.state_dict()), repr(model), model(image)
        insert_se(model, "1", input_nchw=CHW, reduction=2)
        for block in blocks(model):
            nn.init.zeros_(block.fc2.weight)
        torch.testing.assert_close(model(image), expected / 2)
        assert model[1].se is value
        assert [key for key in model.state_dict() if key in keys] == keys
        assert list(inserted_blocks(model)) == ["1.se_1"]
        assert not any(model.load_state_dict(model.state_dict()))
        assert remove_se(model, "1") == 1
        assert (list(model.state_dict()), repr(model)) == (keys, text)
        assert torch.equal(model(image), expected)

    def test_a_taken_name_in_a_sequence(self, image):
        from collections import OrderedDict

        model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), se=nn.ReLU()))
        outer = nn.Sequential(model)
        expected = outer(image)
        insert_se(outer, "0", input_nchw=CHW, reduction=2)
        for block in blocks(outer):
            nn.init.zeros_(block.fc2.weight)
        torch.testing.assert_close(outer(image), expected / 2)
        remove_se(outer)
        assert torch.equal(outer(image), expected)

    def test_modules_that_a_network_holds_in_a_list(self, image):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = []
                for number, channels in enumerate((3, 8)):
                    self.add_module(f"layer{number}", nn.Conv2d(channels, 8, 3))
                    self.layers.append(getattr(self, f"layer{number}"))
                self.by_name = {"last": (self.layer1, 7)}

            def forward(self, x):
                return self.by_name["last"][0](self.layers[0](x))

        model = Listed()
        listed, expected = list(model.layers), model(image)
        insert_se(model, ["layer0", "layer1"], input_nchw=CHW, reduction=2)
        assert not torch.equal(model(image), expected)
        remove_se(model)
        assert model.layers == listed
        assert model.by_name == {"last": (listed[1], 7)}
        assert torch.equal(model(image), expected)

    @pytest.mark.parametrize("placement", ["standard", "pre"])
    def test_several_arguments_and_keywords(self, placement, image):
        class Scaled(nn.Module):
            def forward(self, x, factor, *, shift=0.0):
                return x * factor + shift

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.scaled = nn.Conv2d(3, 8, 3), Scaled()

            def forward(self, x):
                return self.scaled(self.conv(x), 3.0, shift=1.0)

        model = Net()
        y = model.conv(image)
        insert_se(model, "scaled", placement=placement, input_nchw=CHW, reduction=2)
        nn.init.zeros_(model.scaled.se.fc2.weight)
        expected = y / 2 * 3 + 1 if placement == "pre" else (y * 3 + 1) / 2
        torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(image), expected)


class TestPaths:
    def test_paths_stay_those_of_the_network(self, image):
        model = gated("2", "2.bn")
        listed = [path for path, _ in named_sites(model)]
        assert [path for path in listed if ".se" not in path] == [path for path, _ in network().named_modules()]
        assert all(isinstance(model.get_submodule(path), nn.Module) for path in listed)
        assert list(inserted_blocks(model)) == ["2.bn.se", "2.se"]
        inserted = insert_se(model, ["*.conv"], input_nchw=CHW, reduction=4)
        assert [one.path for one in inserted] == ["1.conv", "2.conv"]
        with pytest.raises(InsertionError, match=r"2\.bn: already holds an SE block"):
            insert_se(model, "2.bn", input_nchw=CHW)
        assert remove_se(model, "2.conv") == 1
        assert remove_se(model, ["2", "2.bn.se"]) == 2
        assert list(inserted_blocks(model)) == ["1.conv.se"]

    def test_removal_restores_the_same_objects(self, image):
        model = network()
        modules, text, keys = list(model.modules()), repr(model), list(model.state_dict())
        children = [list(module._modules) for module in modules]
        expected = model(image)
        insert_se(model, ["1.bn", "2", "2.conv"], input_nchw=CHW, reduction=4)
        assert sum(isinstance(module, GatedSite) for module in model.modules()) == 3
        assert remove_se(model) == 3
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
        assert [list(module._modules) for module in modules] == children
        assert (repr(model), list(model.state_dict())) == (text, keys)
        assert torch.equal(model(image), expected)
        assert not any(vars(module).get("_load_from_state_dict") for module in modules)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("site", ["1.bn", "1", "1.conv"])
    def test_the_block_has_the_dtype_of_its_feature_map(self, dtype, site, image):
        model = network().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and dtype != torch.float64:
                module.float()
        insert_se(model, site, input_nchw=CHW, reduction=4)
        (block,) = blocks(model)
        assert block.fc1.weight.dtype == dtype
        assert model(image.to(dtype)).dtype == dtype

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize(("of_map", "of_block"), [("float32", "float16"), ("bfloat16", "float32")])
    def test_a_block_of_another_dtype_keeps_that_of_the_map(self, mode, of_map, of_block):
        block = getattr(SqueezeExcitation(8, 2, init="identity"), mode)().to(getattr(torch, of_block))
        x = torch.randn(2, 8, 5, 5).to(getattr(torch, of_map))
        with torch.set_grad_enabled(mode == "train"):
            assert torch.equal(block(x), x)
        kind, reason = block.runtime(x)
        assert kind == "reference"
        assert reason


@pytest.mark.parametrize("init", ["he", "identity"])
@pytest.mark.parametrize(
    "block",
    [
        "se",
        "eca",
        "cbam",
        "coordinate",
        "scse",
        "sse",
        "ese",
        "gather_excite",
        "grn",
        "simam",
        "global_context",
        "triplet",
        "ela",
        "sk",
        "ge_theta",
        "ge_theta_plus",
    ],
)
def test_every_block_can_be_scripted(block, init, image):
    if block in ("gather_excite", "simam", "sk") and init == "identity":
        pytest.skip("it cannot start as the identity")
    model = network()
    options = {"reduction": 2} if block in ("se", "cbam", "global_context", "ge_theta_plus") else {}
    insert_se(model, "1.bn", block=block, init=init, input_nchw=CHW, **options)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(image), model(image))


def test_thop_counts_through_a_place():
    """It adds two buffers to every module, and reads and writes them by their names."""
    thop = pytest.importorskip("thop")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    insert_se(model, "1", input_nchw=(1, 3, 8, 8), reduction=2)
    keys = list(model.state_dict())
    macs, params = thop.profile(model, (torch.zeros(1, 3, 8, 8),), verbose=False)
    # The convolution's products and the block's two layers; thop counts other things too.
    assert macs >= 3 * 8 * 9 * 36 + 2 * 8 * 4
    assert params == sum(p.numel() for p in model.parameters())
    # It leaves buffers of its own at the modules that have children; none of ours is lost or renamed.
    assert [key for key in model.state_dict() if "total" not in key] == keys


def test_pruning_a_place_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    insert_se(model, "1", input_nchw=(1, 3, 8, 8), reduction=2)
    from torch.nn.utils import prune  # torch does not import it by itself

    with pytest.raises(AttributeError, match=r"weight_orig|weight_mask"):
        prune.l1_unstructured(model[1], "weight", 0.5)
