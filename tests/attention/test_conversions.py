"""What is done to a site's own module neither drops the block nor changes it."""

import copy
import io

import pytest
import torch
from gated_networks import CHW, blocks, example, gated, network
from torch import nn
from torch.nn.utils import prune

import selab
from selab.attention.insert import insert_se, remove_se
from selab.attention.se import SqueezeExcitation


@pytest.fixture
def image():
    return example()


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


class Quantised(nn.Module):
    """A network as static quantisation in eager mode wants it, without an activation at its end."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.c1, self.relu, self.c2 = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        return self.dequant(self.c2(self.relu(self.c1(self.quant(x)))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("site", ["c1", "relu", "c2", "dequant"])
@pytest.mark.parametrize(
    "keys",
    [
        {"reduction": 4},
        {"reduction": 4, "init": "identity"},
        {"block": "eca"},
        {"block": "cbam", "reduction": 4},
        {"block": "scse", "reduction": 4},
        {"block": "ese"},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad
def test_a_network_with_blocks_can_be_quantised_statically(site, keys, fused, monkeypatch):
    engines = [one for one in ("fbgemm", "x86", "qnnpack") if one in torch.backends.quantized.supported_engines]
    if not engines:
        pytest.skip("torch was built without an engine for quantised convolutions")
    monkeypatch.setattr(torch.backends.quantized, "engine", engines[0])
    torch.manual_seed(0)
    model, x = Quantised().eval(), torch.randn(4, 3, 12, 12)
    selab.insert_se(model, site, input_nchw=(1, 3, 12, 12), **keys)
    if fused:
        selab.fuse(model, input_nchw=(1, 3, 12, 12))
    expected = model(x)
    model.qconfig = torch.ao.quantization.get_default_qconfig(engines[0])
    torch.ao.quantization.prepare(model, inplace=True)
    model(x)
    torch.ao.quantization.convert(model, inplace=True)
    assert "Quantized" in str(model)
    out = model(x)
    assert out.dtype == torch.float32
    # Four tensors of 8 bits follow each other.
    assert (out - expected).norm() < 0.06 * expected.norm()
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), out)
    assert selab.check_inserted(model, input_nchw=(1, 3, 12, 12), on="cpu") == (site,)
    assert selab.remove_se(model) == 1
