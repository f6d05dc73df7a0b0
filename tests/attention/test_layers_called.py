"""Whoever watches, replaces or wraps the layers of a block sees them called."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from selab.attention.blocks import CBAM, ESE, SCSE
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
