"""Fused blocks and joins on one image without a batch dimension: as before `fuse`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_networks import ReluJoin
from torch import nn

import selab
from selab.fusion.external import FusedExternal
from selab.fusion.fuse import fuse


class SqueezeExcitation(nn.Module):
    """Stands for torchvision's class of this name, which takes (C, H, W) as well."""

    def __init__(self, channels=8, hidden=4):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


SqueezeExcitation.__module__ = "torchvision.ops.misc"


class Gate(nn.Module):
    """A block of nobody's library, which takes (C, H, W) as well."""

    def __init__(self, channels=8):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), *([] if block is None else [block]))
        self.join = ReluJoin()

    def forward(self, x):
        return self.join(self.branch(x), x)


def network(block):
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), relu, block, Residual(copy.deepcopy(block)), Residual(None)).eval()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [lambda: selab.SqueezeExcitation(8, 4), SqueezeExcitation, Gate])
def test_as_before(make, compiled):
    torch._dynamo.reset()
    net = network(make())
    x = torch.randn(3, 10, 9)
    with torch.no_grad():
        expected = net(x)
        fuse(net, input_nchw=(1, 3, 10, 9))
        run = torch.compile(net, backend="eager") if compiled else net
        for _ in range(2):
            torch.testing.assert_close(run(x), expected)
            torch.testing.assert_close(run(x[None])[0], expected)


def test_the_reason_is_said():
    net = network(SqueezeExcitation())
    fuse(net, input_nchw=(1, 3, 10, 9))
    assert isinstance(net[2], FusedExternal)
    assert net[2].runtime(torch.randn(8, 4, 4)) == ("reference", "the feature map is not (N, C, H, W)")
    assert net[2].runtime(torch.randn(1, 8, 4, 4))[0] != "reference"


def test_with_an_image_as_the_example():
    net = network(selab.SqueezeExcitation(8, 4))
    x = torch.randn(3, 10, 9)
    with torch.no_grad():
        expected = net(x)
        fuse(net, inputs=x)
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net(x[None])[0], expected)
