"""Channels whose factor is always zero, taken out."""

import copy

import pytest
import torch

import selab
from selab.errors import DeviceError, SpecError
from selab.judging import prune as judging_prune
from selab.judging.fold import places
from selab.judging.prune import macs_of_channels, prune
from selab.judging.watch import gated_blocks
from selab.models.folded import narrow, sizes_in, sizes_text

DEAD = (1, 4, 5)


def planted(arch, chw, number=1):
    """A network with the path of a block of which some channels have the factor 0 and do not count in the squeeze."""
    torch.manual_seed(0)
    net = selab.build(arch).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    path = list(gated_blocks(net))[number]
    block = net.get_submodule(path)
    if block.fc2.bias is None:
        block.fc2.bias = torch.nn.Parameter(torch.zeros(block.channels))
    with torch.no_grad():
        block.fc2.weight[list(DEAD)] = 0
        block.fc2.bias[list(DEAD)] = -200  # a sigmoid and a hard sigmoid are 0 there
        block.fc1.weight[:, list(DEAD)] = 0
    return net, path, torch.randn(2, *chw)


@pytest.mark.parametrize(
    ("arch", "chw"),
    [
        ("se_small_cnn", (3, 32, 32)),
        # The channels go through a depthwise convolution, up to the one that expands.
        ("mobilenet_v3_small", (3, 64, 64)),
        ("se_vgg16", (3, 32, 32)),
    ],
)
def test_what_is_left_computes_the_same(arch, chw):
    net, path, x = planted(arch, chw)
    place = places(net, [path], x)[path]
    before = copy.deepcopy(net.state_dict())
    made, changed = prune(net, path, DEAD, place, x)
    with torch.no_grad():
        expected, found = net(x), made(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert changed[path] == {"channels": net.get_submodule(path).channels - len(DEAD)}
    params = [sum(one.numel() for one in each.parameters()) for each in (made, net)]
    assert params[0] < params[1]
    # Left as it was, and the copy runs as before: compiled operators and all.
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)
    assert made.get_submodule(path).impl == net.get_submodule(path).impl


def test_a_description_makes_the_same_network():
    net, path, x = planted("mobilenet_v3_small", (3, 64, 64))
    made, changed = prune(net, path, DEAD, places(net, [path], x)[path], x)
    assert sizes_in(sizes_text(changed)) == changed
    again = selab.build("mobilenet_v3_small")
    narrow(again, sizes_in(sizes_text(changed)))
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), made(x))


@pytest.mark.parametrize(
    ("arch", "chw", "said"),
    [
        ("se_resnet20_cifar", (3, 32, 32), "its map is joined with others, whose channels stay"),
        ("se_shufflenet", (3, 64, 64), "a grouped convolution takes part"),
    ],
)
def test_channels_that_others_need_stay(arch, chw, said):
    net, path, x = planted(arch, chw)
    assert prune(net, path, DEAD, places(net, [path], x)[path], x) == said


def test_a_block_keeps_a_channel():
    net, path, x = planted("se_small_cnn", (3, 32, 32))
    everything = range(net.get_submodule(path).channels)
    assert prune(net, path, everything, places(net, [path], x)[path], x) == "all channels go"


def test_the_macs_that_make_channels():
    net, path, x = planted("se_small_cnn", (3, 32, 32))
    place = places(net, [path], x)[path]
    # conv2: 32 input channels, 3x3, on a map of 30x30 without padding.
    assert macs_of_channels(net, {path: (3, place)}, x) == {path: 3 * 32 * 9 * 30 * 30}
    net, path, x = planted("mobilenet_v3_small", (3, 64, 64))
    place = places(net, [path], x)[path]
    # The depthwise convolution, though the factors go into the one behind: 5x5, on a map of 4x4.
    assert macs_of_channels(net, {path: (2, place)}, x) == {path: 2 * 25 * 4 * 4}


def test_without_the_package_it_is_said(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch_pruning":
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    net, path, x = planted("se_small_cnn", (3, 32, 32))
    place = places(net, [path], x)[path]
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DeviceError, match=r"pip install 'selab\[prune\]'"):
        judging_prune.prune(net, path, DEAD, place, x)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere:out_channels=3", "there is no such layer"),
        ("block1.conv1.conv:out_channels=33", "out_channels=33 is no size of a Conv2d like this"),
        ("block1.conv1.conv:out_channels=0", "out_channels=0"),
        ("block1.conv1.conv:bias=1", "bias=1 is no size"),
        ("block1.conv1.conv:out_channels=a", r"is written PATH:SIZE=N,SIZE=N"),
        ("block1.conv1.conv", "is written PATH"),
    ],
)
def test_sizes_that_are_none(text, said):
    with pytest.raises(SpecError, match=said):
        narrow(selab.build("se_small_cnn"), sizes_in(text))
