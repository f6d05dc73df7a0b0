"""Related blocks, of libraries and of anybody's, run their own code between a native squeeze and a native scale."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from selab.fusion.fuse import fuse
from selab.fusion.related import SteppedBlock
from selab.kernels import cpu

SIZE = (1, 3, 6, 5)
pytestmark = pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")


class Gate(nn.Module):
    """The most common spelling: pooling, a view, layers in one nn.Sequential, expand_as."""

    def __init__(self, channels=16, activation=nn.ReLU):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(
            nn.Linear(channels, 4, bias=False), activation(), nn.Linear(4, channels), nn.Sigmoid()
        )

    def forward(self, x):
        n, c, _, _ = x.size()
        return x * self.layers(self.pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)


class ByMean(nn.Module):
    """Convolutions with a norm between them; the gate comes first in the product."""

    def __init__(self, channels=16):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        s = torch.mean(x, dim=(-2, -1), keepdim=True)
        return torch.mul(F.hardsigmoid(self.two(F.leaky_relu(self.norm(self.one(s))))), x)


class OverChannels(nn.Module):
    """A convolution over the channels, as ECA's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0]
        return x.mul(gate.sigmoid()[:, :, None, None])


class WithMaximum(Gate):
    def forward(self, x):
        pooled = x.mean([2, 3]) + x.amax((2, 3))
        return x * self.layers(pooled)[:, :, None, None]


class WithSwitch(Gate):
    """Its code branches on an attribute."""

    doubled = False

    def forward(self, x):
        gate = self.layers(x.mean((2, 3)))[:, :, None, None]
        return x * (2 * gate) if self.doubled else x * gate


class WithOption(Gate):
    def forward(self, x, shift=None):
        out = super().forward(x)
        return out if shift is None else out + shift


KINDS = [
    Gate,
    lambda: Gate(activation=nn.GELU),
    lambda: Gate(activation=nn.Hardswish),
    lambda: Gate(activation=nn.LeakyReLU),
    ByMean,
    OverChannels,
    WithMaximum,
    WithSwitch,
    WithOption,
]


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), kind(), nn.Conv2d(16, 2, 1)).eval()


def fused(model):
    twin = copy.deepcopy(model)
    return twin, fuse(twin, input_nchw=SIZE)


@pytest.fixture
def natively(monkeypatch):
    """Count the native passes."""
    seen = []
    for name in ("native_squeezed", "native_scaled"):
        run = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, run=run, name=name, **kwargs: seen.append(name) or run(*args, **kwargs)
        )
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_squeeze_and_scale_are_native(kind, memory_format, natively):
    model = network(kind)
    twin, fusion = fused(model)
    assert [(one.path, one.stepwise, one.reason) for one in fusion.blocks] == [("1", True, "its class is not known")]
    assert str(fusion) == "fused squeeze and scale of 1 block: its class is not known"
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        found = twin(x)
        torch.testing.assert_close(found, model(x))
    assert type(found) is torch.Tensor
    assert natively == ["native_squeezed", "native_scaled"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_gradients_its_own_code_runs(kind, natively):
    model = network(kind)
    twin, _ = fused(model)
    x = torch.randn(2, 3, 6, 5)
    for one in (model, twin):
        one(x).square().sum().backward()
    for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    assert not natively


def low_rank(block):
    layer = block.layers[0]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)

        def forward(self, x):
            return self.layer(x) + self.more(x)

    block.layers[0] = Wrapped()


def hooked(block):
    block.layers[2].register_forward_hook(lambda _module, _args, out: 2 * out)


def switched(block):
    block.doubled = True


def pruned(block):
    prune.l1_unstructured(block.layers[2], "weight", 0.5)


def weight_norm(block):
    parametrizations.weight_norm(block.layers[2])
    with torch.no_grad():
        block.layers[2].parametrizations.weight.original0.mul_(2)


def pooling_replaced(block):
    block.pool = nn.AdaptiveMaxPool2d(1)


@pytest.mark.parametrize("change", [low_rank, hooked, switched, pruned, weight_norm, pooling_replaced])
def test_what_is_changed_after_fusing_is_seen(change):
    model = network(Gate if change is pooling_replaced else WithSwitch)
    twin, _ = fused(model)
    x = torch.randn(2, 3, 6, 5)
    with torch.inference_mode():
        plain = model(x)
        twin(x)
        for one in (model, twin):
            torch.manual_seed(1)
            change(one[1])
        torch.testing.assert_close(twin(x), model(x))
        assert not torch.allclose(model(x), plain)


def test_quantised_layers_are_called():
    model = network(Gate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        twin, fusion = fused(quantised)
        x = torch.randn(2, 3, 6, 5)
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), quantised(x))
    assert not fusion.blocks or fusion.blocks[0].stepwise


def test_other_arguments_are_passed_on():
    model = network(WithOption)
    twin, _ = fused(model)
    x = torch.randn(2, 16, 6, 5)
    with torch.inference_mode():
        torch.testing.assert_close(twin[1](x, shift=1.0), model[1](x, shift=1.0))
        torch.testing.assert_close(twin[1](x, 1.0), model[1](x, 1.0))
        torch.testing.assert_close(twin[1](x=x), model[1](x))


class Doubles(Gate):
    def forward(self, x):
        return 2 * super().forward(x)


class Adds(Gate):
    def forward(self, x):
        return x + self.layers(x.mean((2, 3)))[:, :, None, None]


class PerPosition(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


class Fails(Gate):
    def forward(self, x):
        raise RuntimeError("needs another input")


class Spatial(ByMean):
    def __init__(self):
        super().__init__()
        self.three = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return super().forward(self.three(x))


class TwoMaps(Gate):
    def forward(self, x, other):
        return super().forward(x) + other


@pytest.mark.parametrize("kind", [Doubles, Adds, PerPosition, Fails, Spatial, TwoMaps])
def test_a_module_that_returns_something_else_is_no_block(kind):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), kind())
    twin, fusion = fused(model)
    assert not fusion.blocks
    assert type(twin[1]) is kind


def test_a_module_around_a_block_is_not_the_block():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            return self.gate(x)

    _, fusion = fused(nn.Sequential(Around()))
    assert [one.path for one in fusion.blocks] == ["0.gate"]


def test_copied_pickled_and_fused_again():
    model = network(Gate)
    twin, fusion = fused(model)
    assert fuse(twin, input_nchw=SIZE).blocks == fusion.blocks
    x = torch.randn(2, 3, 6, 5)
    with torch.inference_mode():
        for one in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert isinstance(one[1], SteppedBlock)
            assert isinstance(one[1], Gate)
            torch.testing.assert_close(one(x), model(x))


@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (2, 3, 1, 1), (1, 3, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_sizes_and_types(shape, dtype):
    model = network(Gate).to(dtype)
    twin, _ = fused(model)
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(twin(x), model(x))
        strided = torch.randn(2, 6, 5, 16, dtype=dtype)[:, ::2].movedim(3, 1)
        torch.testing.assert_close(twin[1](strided), model[1](strided))


def test_compiled_and_traced():
    torch.compiler.reset()
    model = network(Gate)
    twin, _ = fused(model)
    x = torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(x), model(x))
        torch.testing.assert_close(torch.jit.trace(twin, x)(x), model(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(twin)(x), model(x))
        torch.testing.assert_close(torch.export.export(twin, (x,)).module()(x), model(x))


def test_additions_in_the_code_of_a_library_s_class_are_named():
    class BasicBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return (self.conv(x) + x).relu()

    BasicBlock.__module__ = "torchvision.models.resnet"
    fusion = fuse(nn.Sequential(BasicBlock(), BasicBlock()), input_nchw=SIZE)
    assert fusion.inline_joins == ("BasicBlock", "BasicBlock")
    words = "nothing to fuse; left 2 residual additions unchanged: written in the code of BasicBlock"
    assert str(fusion) == words
