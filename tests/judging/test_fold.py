"""A gate that is a constant goes into the weights beside it, and its block disappears."""

import pytest
import torch
from torch import nn

import selab
from selab.attention.se import SqueezeExcitation
from selab.errors import ModelError
from selab.judging.fold import Place, fold, places
from selab.judging.watch import gated_blocks
from selab.judging.worth import replaced
from selab.models.build import build
from selab.models.catalog import find

C = 8


class Own(nn.Module):
    """A block of a user's class."""

    def __init__(self, channels=C):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels))

    def forward(self, x):
        return x * torch.sigmoid(self.layers(x.mean((2, 3))))[:, :, None, None]


def settled(net):
    """Statistics and affines that are not those of a new batch normalisation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in net.modules():
            if isinstance(one, nn.BatchNorm2d):
                for tensor in (one.weight, one.running_var):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (one.bias, one.running_mean):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return net.eval()


def conv(*, bias=False, groups=1, out=C):
    return nn.Conv2d(C, out, 3, padding=1, bias=bias, groups=groups)


def se(*, relu_in=False):
    made = SqueezeExcitation(C, 2)
    made.relu_in = relu_in
    return made


BEFORE = {
    "convolution and batch normalisation": ([conv(), nn.BatchNorm2d(C), se()], "scale of 1"),
    "convolution with a bias": ([conv(bias=True), se()], "output channels of 0"),
    "convolution without a bias": ([conv(), se()], "output channels of 0"),
    "depthwise": ([conv(groups=C), se()], "output channels of 0"),
    "grouped, and a user's block": ([conv(groups=2), nn.BatchNorm2d(C), Own()], "scale of 1"),
    "through a ReLU": ([conv(), nn.BatchNorm2d(C), nn.ReLU(), se()], "scale of 1"),
    "through pooling and dropout": (
        [conv(), nn.AvgPool2d(2), nn.Dropout(0.5), nn.MaxPool2d(2), se()],
        "output channels of 0",
    ),
    "its own ReLU": ([conv(), se(relu_in=True)], "output channels of 0"),
    "behind a SiLU, into the next convolution": ([conv(), nn.SiLU(), se(), conv(out=4)], "input channels of 3"),
    "into a grouped one": ([conv(), nn.SiLU(), se(), nn.ReLU(), conv(groups=4)], "input channels of 4"),
    "into a depthwise one": ([conv(), nn.SiLU(), se(), conv(groups=C)], "input channels of 3"),
    "a norm without a scale, into the next": (
        [conv(), nn.BatchNorm2d(C, affine=False), se(), conv()],
        "input channels of 3",
    ),
}


@pytest.mark.parametrize(("layers", "where"), BEFORE.values(), ids=BEFORE)
def test_every_placement_folds_to_equal_outputs(layers, where):
    torch.manual_seed(0)
    net = settled(nn.Sequential(*layers))
    blocks = gated_blocks(net)
    (path,) = blocks
    constants = {path: torch.rand(C, generator=torch.Generator().manual_seed(1))}
    x = torch.randn(3, C, 8, 8, generator=torch.Generator().manual_seed(2))
    before = {name: one.clone() for name, one in net.state_dict().items()}
    with torch.no_grad(), replaced(blocks, constants):
        expected = net(x)
    made, went = fold(net, constants, x)
    assert isinstance(went[path], Place), went[path]
    assert went[path].words == where
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    # The block is gone, and the network itself is as it was.
    assert not any(isinstance(one, SqueezeExcitation | Own) for one in made.modules())
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())


@pytest.mark.parametrize("arch", ["se_resnet20_cifar", "se_small_cnn", "se_mobilenet_cifar"])
def test_a_network_of_the_catalog_becomes_its_baseline(arch):
    net = settled(build(find(arch), seed=2).model)
    blocks = gated_blocks(net)
    random = torch.Generator().manual_seed(1)
    constants = {path: torch.rand(one.channels, generator=random) for path, one in blocks.items()}
    x = torch.randn(2, 3, 32, 32, generator=random)
    with torch.no_grad(), replaced(blocks, constants):
        expected = net(x)
    made, went = fold(net, constants, x)
    assert all(isinstance(one, Place) for one in went.values()), went
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-9)
    base = build(find(find(arch).baseline)).model.eval()
    base.load_state_dict(made.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-9)


class Twice(nn.Module):
    """The map that the block gates is read elsewhere too."""

    def __init__(self):
        super().__init__()
        self.conv, self.se = conv(), se()

    def forward(self, x):
        x = self.conv(x)
        return self.se(x) + x


class Shared(nn.Module):
    """One convolution runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.se = conv(), se()

    def forward(self, x):
        return self.se(self.conv(self.conv(x)))


class Repeated(nn.Module):
    """One block runs twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.se = conv(), conv(), se()

    def forward(self, x):
        return self.se(self.two(self.se(self.one(x))))


REFUSED = {
    "read elsewhere": (Twice(), "its input is read elsewhere too"),
    "a weight of two calls": (Shared(), "conv.weight is used more than once"),
    "a block of two calls": (Repeated(), "it does not run exactly once"),
    "the input": (nn.Sequential(se(), nn.Flatten()), "its input is the network's own; flatten stands behind it"),
    "a SiLU": (nn.Sequential(conv(), nn.SiLU(), se()), "silu stands before it"),
    "a clamp": (nn.Sequential(conv(), nn.ReLU6(), se()), "hardtanh stands before it"),
}


@pytest.mark.parametrize(("net", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_folded_says_why_and_stays(net, why):
    net.eval()
    (path,) = gated_blocks(net)
    x = torch.randn(2, C, 8, 8)
    made, went = fold(net, {path: torch.full((C,), 0.5)}, x)
    assert why in went[path]
    with torch.no_grad():
        assert torch.equal(made(x), net(x))


def test_a_negative_factor_does_not_go_through_a_relu():
    net = nn.Sequential(conv(), nn.ReLU(), se()).eval()
    factors = torch.full((C,), 0.5)
    factors[3] = -0.1
    _, went = fold(net, {"2": factors}, torch.randn(1, C, 8, 8))
    assert went["2"].startswith("a factor is negative")
    net = nn.Sequential(conv(), se()).eval()
    x = torch.randn(1, C, 8, 8)
    with torch.no_grad(), replaced(gated_blocks(net), {"1": factors}):
        expected = net(x)
    made, _ = fold(net, {"1": factors}, x)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)


def test_a_network_that_cannot_be_exported_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = se()

        def forward(self, x):
            return self.se(x) if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match="Odd: cannot be followed"):
        places(Odd(), ["se"], torch.randn(1, C, 4, 4))


def test_an_inserted_block_leaves_its_site():
    net = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv())
    selab.insert_se(net, ["1"], input_nchw=(1, C, 8, 8), reduction=4)
    settled(net)
    blocks = gated_blocks(net)
    (path,) = blocks
    constants = {path: torch.rand(C)}
    x = torch.randn(1, C, 8, 8)
    with torch.no_grad(), replaced(blocks, constants):
        expected = net(x)
    made, _ = fold(net, constants, x)
    assert type(made[1]) is nn.BatchNorm2d
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
