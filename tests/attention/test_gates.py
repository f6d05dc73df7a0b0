import sys
import types

import pytest
import torch
from torch import nn

from selab.attention.blocks import ECA, ESE, GatherExcite
from selab.attention.gates import convert_gates
from selab.attention.se import GATES, SqueezeExcitation
from selab.errors import ModelError
from selab.fusion.fuse import fuse

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", ["he", "identity"])
@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "hardsigmoid"])
@pytest.mark.parametrize("before", ["sigmoid", "tanh", "hardsigmoid"])
def test_a_converted_block_is_one_built_with_that_gate(before, gate, init):
    torch.manual_seed(0)
    block = SqueezeExcitation(8, 2, gate=before, init=init)
    nn.init.normal_(block.fc2.weight)
    block(X)
    keys = list(block.state_dict())
    done = convert_gates(nn.Sequential(block), gate)
    assert (done[0].path, done[0].before, done[0].after, done[0].reason) == ("0", before, gate, "")
    assert list(block.state_dict()) == keys
    fresh = SqueezeExcitation(8, 2, gate=gate, init=init, impl="reference")
    fresh.load_state_dict({**block.state_dict(), **{k: v for k, v in fresh.state_dict().items() if "affine" in k}})
    torch.testing.assert_close(block(X), fresh(X))


def test_fuse_knows_a_converted_block():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2, gate="tanh")).eval()
    assert fuse(model, input_nchw=(1, 3, 8, 8)).blocks[0].reason
    convert_gates(model, "hardsigmoid")
    assert not fuse(model, input_nchw=(1, 3, 8, 8)).blocks[0].reason


def test_other_blocks():
    model = nn.Sequential(ECA(8), ESE(8), GatherExcite(8))
    done = convert_gates(model, "hardsigmoid")
    assert [(one.before, one.after, bool(one.reason)) for one in done] == [
        ("sigmoid", "hardsigmoid", False),
        ("hardsigmoid", "hardsigmoid", False),
        ("sigmoid", "sigmoid", True),
    ]
    assert model[0].gate.hard
    assert "1 gate converted from sigmoid to hardsigmoid; 1 left: GatherExcite has no gate" in str(done)
    assert "takes sigmoid and hardsigmoid only" in str(convert_gates(nn.Sequential(ECA(8)), "tanh"))


def test_a_block_of_another_library(monkeypatch):
    module = types.ModuleType("torchvision.ops.misc")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class SqueezeExcitation(nn.Module):
        __module__ = "torchvision.ops.misc"

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
            self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

        def forward(self, x):
            return x * self.scale_activation(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))

    model = nn.Sequential(SqueezeExcitation())
    expected = X * model[0].fc2(model[0].fc1(X.mean((2, 3), keepdim=True)).relu())
    expected = X * nn.functional.hardsigmoid(model[0].fc2(model[0].fc1(X.mean((2, 3), keepdim=True)).relu()))
    assert str(convert_gates(model, "hardsigmoid")) == "1 gate converted from sigmoid to hardsigmoid"
    torch.testing.assert_close(model(X), expected)


def test_nonsense_is_refused():
    with pytest.raises(ModelError, match="convert_gates: no gate 'hard_sigmoid'; did you mean hardsigmoid"):
        convert_gates(nn.Sequential(), "hard_sigmoid")
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got int"):
        convert_gates(3, "sigmoid")


def test_what_cannot_be_converted_is_left():
    own = SqueezeExcitation(8, 2)
    own.gate = nn.Softsign()
    identity = SqueezeExcitation(8, 2, init="identity")
    done = convert_gates(nn.Sequential(own, identity), "relu")
    assert [one.reason for one in done] == [
        "unsupported gate: Softsign",
        "a block that starts as the identity needs a bias of one for a ReLU gate",
    ]
    assert set(GATES) == {"sigmoid", "tanh", "relu", "hardsigmoid"}
