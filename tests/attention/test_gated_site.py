"""What is done to a site's own module neither drops the block nor changes it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from selab.attention.base import Attention
from selab.attention.gated_site import GatedSite, named_sites
from selab.attention.insert import insert_se, remove_se
from selab.attention.inserted import inserted_blocks
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError

CHW = (1, 3, 10, 10)


class Residual(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


def network():
    """Two residual blocks; the statistics are not those of a new network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(), Residual()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def gated(*sites, **options):
    model = network()
    torch.manual_seed(1)
    insert_se(model, list(sites or ("1.bn", "2")), input_nchw=CHW, **{"reduction": 4, **options})
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))


def blocks(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


class FrozenNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def freeze_by_children(model):
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, FrozenNorm(child))
        else:
            freeze_by_children(child)
    return model


def freeze_by_path(model):
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, FrozenNorm(module))
    return model


def fold_with_fx(model):
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


CONVERSIONS = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "frozen by children": freeze_by_children,
    "frozen by path": freeze_by_path,
    "deepcopy": copy.deepcopy,
    "torch.fx": torch.fx.symbolic_trace,
    "torch.fx fuse": fold_with_fx,
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, torch.zeros(2, 3, 10, 10)),
    "export": lambda model: torch.export.export(model, (torch.zeros(2, 3, 10, 10),)).module(),
    "fold the inner module": lambda model: torch.ao.quantization.fuse_modules(model, [["1.conv", "1.bn.inner"]]),
}


class TestConversions:
    @pytest.mark.parametrize("name", CONVERSIONS)
    def test_a_conversion_of_the_network_keeps_the_block(self, name, image):
        model = gated()
        with torch.no_grad():
            expected, without = model(image), network()(image)
            assert (expected - without).abs().max() > 0.01
            converted = CONVERSIONS[name](model).eval() if name != "export" else CONVERSIONS[name](model)
            torch.testing.assert_close(converted(image), expected, rtol=1e-4, atol=1e-5)

    def test_compiled_in_one_graph(self, image):
        model = gated()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(image), model(image))

    @pytest.mark.parametrize("kind", [nn.Module, nn.Sequential])
    @pytest.mark.parametrize("method", ["fuse", "reparameterize", "switch_to_deploy"])
    def test_a_walk_that_lets_modules_convert_themselves(self, method, kind):
        """As timm's `reparameterize_model` has it: a child is replaced by what `fuse` returns, or changes itself."""

        class Folding(kind):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

            if kind is nn.Module:

                def forward(self, x):
                    return self.norm(self.conv(x))

            def folded(self):
                return nn.utils.fuse_conv_bn_eval(self.conv, self.norm)

        def convert(self):
            folded = self.folded()
            if method == "fuse":
                return folded
            self.conv, self.norm = folded, nn.Identity()
            return None

        setattr(Folding, method, convert)

        def walk(module):
            for name, child in module.named_children():
                made = getattr(child, method)() if hasattr(child, method) else None
                if made is not None:
                    setattr(module, name, made)
                walk(made or child)

        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Identity(), Folding()).eval(), torch.randn(2, 4, 5, 5)
        nn.init.uniform_(net[1].norm.running_var, 0.5, 2)
        insert_se(net, "1", reduction=2, input_nchw=(1, 4, 5, 5))
        expected = net(x)
        walk(net)
        assert not any(isinstance(one, nn.BatchNorm2d) for one in net.modules())
        assert sum(isinstance(one, SqueezeExcitation) for one in net.modules()) == 1
        torch.testing.assert_close(net(x), expected)

    def test_folding_by_hand_is_refused(self):
        model = gated("1.bn", "2.conv")
        with pytest.raises(AttributeError, match=r"BatchNorm2d.running_mean: an attention block is inserted"):
            torch.nn.utils.fusion.fuse_conv_bn_eval(model[1].conv, model[1].bn)
        with pytest.raises(AttributeError, match=r"BatchNorm2d.running_var: an attention block is inserted"):
            model[1].bn.weight.div(torch.sqrt(model[1].bn.eps + model[1].bn.running_var))
        with pytest.raises(AttributeError, match=r"Conv2d.groups: an attention block is inserted"):
            nn.Conv2d(8, 8, 3, groups=model[2].conv.groups)
        assert len(blocks(model)) == 2

    @pytest.mark.parametrize("kind", ["convolution", "transposed", "linear"])
    def test_a_norm_behind_the_gate_cannot_be_folded_into_the_layer_before_it(self, kind):
        layer, size, fold = {
            "convolution": (nn.Conv2d(3, 8, 3, bias=False), (1, 3, 8, 8), nn.utils.fusion.fuse_conv_bn_eval),
            "transposed": (
                nn.ConvTranspose2d(3, 8, 3),
                (1, 3, 8, 8),
                lambda conv, norm: nn.utils.fusion.fuse_conv_bn_eval(conv, norm, transpose=True),
            ),
            "linear": (nn.Linear(8, 8), (1, 8, 8, 8), nn.utils.fusion.fuse_linear_bn_eval),
        }[kind]
        model = nn.Sequential(layer, nn.BatchNorm2d(8)).eval()
        insert_se(model, "0", input_nchw=size, reduction=2)
        with pytest.raises(
            AttributeError, match=r"\.weight: an attention block is inserted .* cannot be folded across"
        ):
            fold(model[0], model[1])
        with pytest.raises(AttributeError, match=r"\.bias: an attention block is inserted"):
            model[0].bias = nn.Parameter(torch.zeros(8))
        model[0].inner.weight = nn.Parameter(layer.weight * 2)
        assert model[0].weight is layer.weight

    def test_a_norm_behind_a_convolution_with_a_gated_input(self, image):
        """The gate stands before both, so torch's fold is right; one that makes a new convolution would drop it."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        nn.init.uniform_(model[2].running_var, 0.5, 2)
        insert_se(model, "1", placement="pre", input_nchw=CHW, reduction=2)
        with torch.no_grad():
            expected = model(image)
            folded = nn.Sequential(model[0], nn.utils.fusion.fuse_conv_bn_eval(model[1], model[2]))
            torch.testing.assert_close(folded(image), expected)
        with pytest.raises(AttributeError, match=r"Conv2d.groups: an attention block is inserted"):
            nn.Conv2d(8, 8, 3, groups=model[1].groups)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_statistics_of_a_norm_are_refused(self, frozen):
        model = network()
        if frozen:
            freeze_by_children(model)
        insert_se(model, "1.bn", input_nchw=CHW, reduction=4)
        for name in ("running_mean", "running_var"):
            with pytest.raises(AttributeError, match=f"Norm.*{name}: an attention block is inserted"):
                getattr(model[1].bn, name)
            assert getattr(model[1].bn.inner, name).shape == (8,)

    def test_quantization_of_conv_and_norm_is_refused(self):
        model = gated("1.bn")
        with pytest.raises((AssertionError, NotImplementedError), match="GatedMap"):
            torch.ao.quantization.fuse_modules(model, [["1.conv", "1.bn"]])

    def test_pruning_and_parametrizing_the_place_is_refused_and_changes_nothing(self, image):
        model = gated("1.conv")
        keys, expected = list(model.state_dict()), model(image)
        with pytest.raises(AttributeError):
            prune.l1_unstructured(model[1].conv, "weight", 0.5)
        with pytest.raises(ValueError, match="does not have a parameter"):
            torch.nn.utils.parametrizations.weight_norm(model[1].conv)
        assert list(model.state_dict()) == keys
        assert torch.equal(model(image), expected)
        prune.l1_unstructured(model[1].conv.inner, "weight", 0.5)
        assert not torch.equal(model(image), expected)

    def test_what_is_done_to_every_norm_leaves_the_block_alone(self, image):
        model = gated("1.bn").bfloat16()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.requires_grad_(False)
            norm.float()
        (block,) = blocks(model)
        own = {id(parameter) for norm in norms for parameter in norm.parameters()}
        assert all(one.requires_grad and one.dtype == torch.bfloat16 for one in block.parameters())
        assert own.isdisjoint(map(id, block.parameters()))
        assert len(own) == 2 * len(norms)
        assert model(image.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [
            (lambda module: module.float(), torch.float32),
            (lambda module: module.double(), torch.float64),
            (lambda module: module.half(), torch.float16),
            (lambda module: module.type(torch.float32), torch.float32),
            (lambda module: module.to(torch.float64), torch.float64),
            (lambda module: module.to(torch.zeros(1, dtype=torch.float64)), torch.float64),
            (lambda module: module.to("cpu", torch.float32), torch.float32),
        ],
    )
    def test_a_conversion_of_the_place_meets_the_site_s_own_module(self, convert, dtype):
        model = gated("1.bn").bfloat16()
        assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        assert convert(model[1].bn) is model[1].bn
        assert model[1].bn.weight.dtype == model[1].bn.inner.running_mean.dtype == dtype
        assert {one.dtype for one in model[1].bn.se.parameters()} == {torch.bfloat16}
        assert {one.dtype for one in convert(model).parameters()} == {dtype}

    def test_a_conversion_of_the_place_to_bfloat16_or_the_meta_device(self):
        model = gated("1.bn")
        assert model[1].bn.bfloat16().weight.dtype == torch.bfloat16
        assert {one.dtype for one in model[1].bn.se.parameters()} == {torch.float32}
        model[1].bn.to("meta", torch.float64)
        assert all(one.is_meta for one in model[1].bn.parameters())
        assert {one.dtype for one in model[1].bn.se.parameters()} == {torch.float32}

    def test_freezing_the_place_freezes_the_site_s_own_module(self):
        model = gated("1.bn")
        assert model[1].bn.requires_grad_(False) is model[1].bn
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        assert frozen == {"1.bn.inner.weight", "1.bn.inner.bias"}
        own = {id(one) for one in model[1].bn.inner.parameters()}
        both = {id(one) for one in model[1].bn.parameters()}
        assert both == own | {id(one) for one in model[1].bn.se.parameters()}
        model.requires_grad_(False)
        assert not any(one.requires_grad for one in model.parameters())

    def test_averaged_and_parallel(self, image):
        model = gated()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        assert torch.equal(averaged(image), model(image))
        parallel = nn.DataParallel(model)
        assert {key.removeprefix("module.") for key in parallel.state_dict()} == model.state_dict().keys()
        assert not any(parallel.load_state_dict(parallel.state_dict()))

    def test_functional_call_by_the_names_of_parameters(self, image):
        model, other = gated(), gated()
        state = {name: value * 1.5 for name, value in [*model.named_parameters(), *model.named_buffers()]}
        other.load_state_dict(state)
        assert torch.equal(torch.func.functional_call(model, state, image), other(image))
        assert not torch.equal(model(image), other(image))

    @pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
    def test_dynamic_quantization_of_the_block(self, image):
        model = gated()
        with torch.no_grad():
            expected = model(image)
            quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
            assert (quantized(image) - expected).norm() < 0.05 * (expected - network()(image)).norm()
        assert not any(quantized.load_state_dict(quantized.state_dict()))

    def test_weights_saved_with_the_whole_network(self, image):
        model, file = gated(), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(image), model(image))
        assert remove_se(loaded) == 2
        assert repr(loaded) == repr(network())

    def test_hooks_of_the_user(self, image):
        model, seen = network(), []
        before = model[1].bn.register_forward_hook(lambda _module, _args, out: seen.append(out))
        insert_se(model, "1.bn", input_nchw=CHW, reduction=4)
        seen.clear()
        after = model[1].bn.register_forward_hook(lambda _module, _args, out: seen.append(out))
        with torch.no_grad():
            model(image)
            ungated, out = seen
            assert torch.equal(model[1].bn.se(ungated), out)
            remove_se(model)
            seen.clear()
            model(image)
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])
        before.remove()
        after.remove()


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
@pytest.mark.parametrize("block", ["se", "eca", "cbam", "coordinate", "scse", "sse", "ese", "gather_excite"])
def test_every_block_can_be_scripted(block, init, image):
    if (block, init) == ("gather_excite", "identity"):
        pytest.skip("it has no parameters")
    model = network()
    options = {"reduction": 2} if block in ("se", "cbam") else {}
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
    with pytest.raises(AttributeError, match=r"weight_orig|weight_mask"):
        torch.nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
