"""Gates of PyTorch networks, read while they run."""

import pytest
import torch
from torch import nn

import selab
from selab.attention.blocks import CBAM, ECA
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, ModelError
from selab.judging.watch import gated_blocks, watched
from selab.models.build import build
from selab.models.catalog import find

X = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A block of a user's class, with a mean that keeps no dimensions."""

    def __init__(self, channels=8):
        super().__init__()
        self.down, self.up = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


def read(net, x=X):
    seen = {}
    with torch.no_grad(), watched(gated_blocks(net), lambda path, gate: seen.setdefault(path, []).append(gate.clone())):
        out = net(x)
    return out, seen


def se(**options):
    torch.manual_seed(1)
    made = SqueezeExcitation(8, 2, **options)
    with torch.no_grad():
        made.fc2.weight.normal_()
    return made.eval()


@pytest.mark.parametrize("block", [se(), se(init="identity"), se(squeeze="max"), ECA(8).eval(), Own()], ids=repr)
def test_the_gate_is_what_the_map_is_multiplied_by(block):
    net = nn.Sequential(block)
    with torch.no_grad():
        expected = net(X)
    out, seen = read(net)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (gate,) = seen["0"]
    assert gate.shape == (3, 8)
    torch.testing.assert_close(X * gate[:, :, None, None], expected, rtol=1e-5, atol=1e-6)
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_every_block_of_a_network_in_its_order(fused):
    net = build(find("se_resnet20_cifar")).model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
    if fused:
        selab.fuse(net, input_nchw=(2, 3, 32, 32))
    out, seen = read(net, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [gate.shape[1] for (gate,) in seen.values()] == [16] * 3 + [32] * 3 + [64] * 3
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_runs_twice_is_taken_twice():
    block = se()
    _, seen = read(nn.Sequential(block, nn.ReLU(), block))
    assert len(seen["0"]) == 2


def test_no_block_with_a_gate_per_channel():
    with pytest.raises(InsertionError, match="Sequential: has no block with one gate per channel"):
        gated_blocks(nn.Sequential(nn.Conv2d(8, 8, 1), CBAM(8, reduction=2)))


def test_a_block_that_does_something_else_is_named():
    class Adds(Own):
        def forward(self, x):
            return x + x.mean((2, 3), keepdim=True)

    net = nn.Sequential(Adds())
    with pytest.raises(ModelError, match="0: does not multiply its input"), watched({"0": net[0]}, lambda *_: None):
        net(X)
