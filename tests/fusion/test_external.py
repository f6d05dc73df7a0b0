"""Fused blocks of other libraries run their own code wherever a layer is not a plain convolution of its own weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from selab.fusion.external import FusedExternal, external_params, external_squeeze_channels
from selab.fusion.fuse import fuse


class SEModule(nn.Module):
    """Stands for timm's class of this name."""

    def __init__(self, channels=16, hidden=4):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


SEModule.__module__ = "timm.layers.squeeze_excite"


class LowRank(nn.Module):
    """A layer with an adapter, as LoRA's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.adapter = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.adapter(x)


def wrapped(block):
    block.fc1 = LowRank(block.fc1)


def weight_norm(block):
    block.fc1 = parametrizations.weight_norm(block.fc1)
    with torch.no_grad():
        block.fc1.parametrizations.weight.original0.mul_(2)


def pruned(block):
    prune.l1_unstructured(block.fc2, "weight", amount=0.5)


def permanently_pruned_with_a_plain_tensor(block):
    weight = block.fc2.weight.detach() * 2
    del block.fc2.weight
    block.fc2.weight = weight


def own_forward(block):
    block.fc1.forward = lambda x: x.new_ones(x.shape[0], 4, 1, 1)


def hooked(block):
    block.fc1.register_forward_hook(lambda _module, _args, out: 2 * out)


def hooked_before(block):
    block.fc2.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def strided(block):
    block.fc1.stride = (2, 2)


def padded(block):
    block.fc1.padding = (1, 1)
    block.fc1.forward = lambda x: nn.functional.conv2d(x, block.fc1.weight, block.fc1.bias)


HOWS = {
    wrapped: "unsupported fc1: LowRank",
    weight_norm: "unsupported fc1: ParametrizedConv2d",
    pruned: "unsupported fc2: its weight is computed",
    permanently_pruned_with_a_plain_tensor: "unsupported fc2: its weight is computed",
    own_forward: "unsupported fc1: its weight is computed",
    hooked: "a hook is registered on one of its layers",
    hooked_before: "a hook is registered on one of its layers",
    strided: "unsupported fc1: not a plain 1x1 convolution",
    padded: "unsupported fc1: not a plain 1x1 convolution",
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), SEModule()).eval()


@pytest.mark.parametrize("when", ["before fusing", "after fusing", "after a call"])
@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.__name__)
def test_a_layer_that_must_be_called_is_called(how, when):
    model, x = network(), torch.randn(2, 3, 6, 5)
    fused = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(x)
        for one in (model, fused):
            torch.manual_seed(1)
            if when == "before fusing" or one is model:
                how(one[1])
        fusion = fuse(fused, input_nchw=(1, 3, 6, 5))
        if when != "before fusing":
            if when == "after a call":
                fused(x)
            torch.manual_seed(1)
            how(fused[1])
        else:
            assert HOWS[how] in fusion.blocks[0].reason
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x))
    if how not in (strided, padded):
        assert not torch.allclose(plain, model(x))
    if isinstance(fused[1], FusedExternal):
        impl, reason = fused[1].runtime(torch.randn(2, 16, 6, 5))
        assert impl == "reference"
        assert HOWS[how] in reason


@pytest.mark.parametrize("how", [wrapped, hooked, own_forward], ids=lambda how: how.__name__)
def test_compiled_too(how):
    torch.compiler.reset()
    model, x = network(), torch.randn(2, 3, 6, 5)
    fuse(model, input_nchw=(1, 3, 6, 5))
    how(model[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_without_its_hook_a_block_is_fast_again():
    model, x = network(), torch.randn(2, 3, 6, 5)
    handle = model[1].fc1.register_forward_hook(lambda _module, _args, out: 2 * out)
    assert fuse(model, input_nchw=(1, 3, 6, 5)).blocks[0].reason == "a hook is registered on one of its layers"
    handle.remove()
    assert model[1].runtime(torch.randn(2, 16, 6, 5))[0] != "reference"
    torch.testing.assert_close(model(x), network()(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "gate", nn.Tanh()), "unsupported gate: Tanh (supported: Sigmoid, Hardsigmoid)"),
        (lambda block: setattr(block, "act", nn.GELU()), "unsupported activation: GELU (supported: ReLU, SiLU)"),
        (lambda block: setattr(block, "bn", nn.BatchNorm2d(4)), "unsupported: a normalisation between the layers"),
        (lambda block: setattr(block, "add_maxpool", True), "unsupported: a maximum added to the mean"),
        (lambda block: delattr(block, "fc1"), "unsupported fc1: NoneType (supported: a 1x1 Conv2d)"),
    ],
)
def test_what_else_is_refused(change, reason):
    block = SEModule()
    change(block)
    assert external_params(block) == reason


def test_a_module_of_another_class():
    assert external_params(nn.ReLU()) == "unsupported block: ReLU"
    assert external_squeeze_channels(nn.ReLU()) is None
    assert external_squeeze_channels(SEModule()) == 4
