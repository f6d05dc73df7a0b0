"""Whoever watches, replaces or wraps the layers of a block sees them called."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from selab.attention.blocks import CBAM, ESE, SCSE
from selab.attention.insert import insert_se
from selab.attention.se import PositionLinear, SqueezeExcitation

BLOCKS = [
    lambda: SqueezeExcitation(16, 4),
    lambda: SqueezeExcitation(16, 4, squeeze="none"),
    lambda: SqueezeExcitation(16, 4, squeeze="max", bias=False),
    lambda: CBAM(16, reduction=4),
    lambda: SCSE(16),
    lambda: ESE(16),
]


@pytest.fixture(params=range(len(BLOCKS)), ids=["se", "se per position", "se max", "cbam", "scse", "ese"])
def block(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 16, 6, 5)


def linears(block):
    return {path: one for path, one in block.named_modules() if isinstance(one, nn.Linear)}


class LowRank(nn.Module):
    """A wrapper as LoRA's: the layer's output and a correction of rank 2."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        out = self.layer(x.movedim(-1, 1)).movedim(1, -1) if isinstance(self.layer, PositionLinear) else self.layer(x)
        return out + self.up(self.down(x))


def test_dynamic_quantisation(block, x):
    with warnings.catch_warnings():
        # torch 2.13 deprecates quantised tensors; who still uses them must not meet an error of ours.
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(block), {nn.Linear})
        changed = any("quantized" in type(one).__module__ for one in quantised.modules())
        assert changed == any(type(one) is nn.Linear for one in block.modules())
        with torch.inference_mode():
            torch.testing.assert_close(quantised(x), block(x), atol=0.05, rtol=0.05)


def test_a_wrapped_layer_is_called(block, x):
    wrapped = copy.deepcopy(block)
    for path, layer in linears(block).items():
        wrapper = LowRank(copy.deepcopy(layer))
        setattr(wrapped, path, wrapper)
    plain = block(x)
    assert not torch.allclose(wrapped(x), plain, atol=1e-5)
    for one in wrapped.modules():
        if isinstance(one, LowRank):
            nn.init.zeros_(one.up.weight)
    torch.testing.assert_close(wrapped(x), plain)


def test_a_hook_sees_every_layer(block, x):
    seen = []
    for path, layer in linears(block).items():
        layer.register_forward_hook(lambda _module, _args, out, path=path: seen.append((path, out.shape)))
    block(x)
    assert {path for path, _ in seen} == linears(block).keys()


def test_a_pruned_layer_is_pruned(block, x):
    expected = copy.deepcopy(block)
    for layer in linears(block).values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    for path, layer in linears(expected).items():
        layer.weight.data = linears(block)[path].weight.data.clone()
    torch.testing.assert_close(block(x), expected(x))
    for layer in linears(block).values():
        prune.remove(layer, "weight")
    torch.testing.assert_close(block(x), expected(x))


def test_weight_norm(block, x):
    plain = block(x)
    for path, layer in linears(block).items():
        setattr(block, path, parametrizations.weight_norm(layer))
    torch.testing.assert_close(block(x), plain)


def zeros(x, layer):
    """Of the shape that a layer returns, whose channels come last or, at every position, second."""
    shape = list(x.shape)
    shape[1] = layer.out_features
    return x.new_zeros(shape)


def test_a_forward_of_its_own(block, x):
    for layer in linears(block).values():
        layer.forward = lambda x, layer=layer: zeros(x, layer)
    reference = copy.deepcopy(block)
    for layer in linears(reference).values():
        del layer.forward
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    torch.testing.assert_close(block(x), reference(x))


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_an_implementation_that_was_asked_for_says_why_it_cannot_run(impl, x):
    block = SqueezeExcitation(16, 4, impl=impl)
    block.fc1 = LowRank(block.fc1)
    with pytest.raises(Exception, match=f"impl '{impl}': unsupported fc1: LowRank; use impl='auto'"):
        block(x)


def test_compiled_with_a_wrapped_layer(x):
    torch.compiler.reset()
    block = SqueezeExcitation(16, 4).eval().requires_grad_(False)
    block.fc1 = LowRank(block.fc1).requires_grad_(False)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


def test_compiled_with_pruning(x):
    torch.compiler.reset()
    block = SqueezeExcitation(16, 4).eval()
    prune.l1_unstructured(block.fc2, "weight", amount=0.5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="eager")(x), block(x))


class _Adapter(nn.Module):
    """As an adapter of peft: another class, with the layer inside."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + 2 * self.b(self.a(x))


def _patch_forward(block):
    before = block.fc1.forward
    block.fc1.forward = lambda x: 2 * before(x)


class _Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs()


def _parametrize(block):
    nn.utils.parametrize.register_parametrization(block.fc1, "weight", _Absolute())
    nn.utils.parametrize.register_parametrization(block.fc2, "bias", _Absolute())


CHANGES = {
    "adapter": lambda block: (setattr(block, "fc1", _Adapter(block.fc1)), setattr(block, "fc2", _Adapter(block.fc2))),
    "parametrization": _parametrize,
    "orthogonal": lambda block: nn.utils.parametrizations.orthogonal(block.fc1),
    "hook that changes the output": lambda block: block.fc1.register_forward_hook(lambda _m, _a, out: 2 * out),
    "hook that changes the input": lambda block: block.fc2.register_forward_pre_hook(lambda _m, args: (2 * args[0],)),
    "hook with keywords": lambda block: block.fc2.register_forward_hook(lambda _m, _a, _k, o: 3 * o, with_kwargs=True),
    "hook of the gate": lambda block: block.gate.register_forward_hook(lambda _m, _a, out: 3 * out),
    "forward of the instance": _patch_forward,
    "sequence": lambda block: setattr(block, "fc1", nn.Sequential(block.fc1, nn.Identity())),
    "activation": lambda block: setattr(block, "activation", nn.GELU()),
    "gate": lambda block: setattr(block, "gate", nn.Softmax(1)),
    "other width": lambda block: (setattr(block, "fc1", nn.Linear(8, 3)), setattr(block, "fc2", nn.Linear(3, 8))),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("init", ["he", "identity"])
@pytest.mark.parametrize("name", CHANGES)
def test_an_inserted_block_calls_what_was_changed(name, init, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    insert_se(model, "1", input_nchw=(1, 3, 6, 6), reduction=2, init=init)
    block, x = model[1].se, torch.randn(2, 3, 6, 6)
    nn.init.normal_(block.fc2.weight)
    with torch.set_grad_enabled(mode == "train"):
        model(x)
        model(x)
        CHANGES[name](block)
        getattr(model, mode)()
        y = model[1].inner(model[0](x))
        factor = block.gate(block.fc2(block.activation(block.fc1(y.mean((2, 3))))))
        if block.gate_affine is not None:
            factor = factor * block.gate_affine[0] + block.gate_affine[1]
        torch.testing.assert_close(model(x), y * factor[:, :, None, None])
