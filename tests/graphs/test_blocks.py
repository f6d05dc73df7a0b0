"""SE blocks are found however an exporter spells them, and nothing else is taken for one."""

import numpy as np
import pytest
import spelled
from spelled import CHANNELS, HIDDEN, SIZE, Net

from selab.graphs.blocks import find_blocks, words_of
from selab.graphs.graph import Graph

SPELLINGS = [
    spelled.pool_and_convolutions,
    spelled.mean_and_gemm,
    spelled.paddle,
    spelled.tensorflow,
    spelled.swish_between,
]
HARD = [spelled.cut_then_divide, spelled.cut_then_multiply, spelled.scale_then_cut, spelled.two_cuts]


def blocks_of(net, *outputs):
    return find_blocks(Graph(net.model(*outputs)))


@pytest.mark.parametrize("folded", [True, False], ids=["initializers", "Constant"])
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda one: one.__name__)
def test_every_spelling(spelling, opset, folded):
    net = Net(opset, folded=folded)
    (block,) = blocks_of(net, spelling(net, net("Relu", "x")))
    assert (block.channels, block.squeeze_channels) == (CHANNELS, HIDDEN)
    weights = 2 * CHANNELS * HIDDEN
    assert block.params == weights + CHANNELS + HIDDEN
    assert block.gate == ("hardsigmoid" if spelling is spelled.paddle else "sigmoid")
    assert [layer.op_type for layer in block.layers] in (["Conv"] * 2, ["Gemm"] * 2, ["MatMul"] * 2)


@pytest.mark.parametrize("opset", [9, 11, 17])
@pytest.mark.parametrize("gate", HARD, ids=lambda one: one.__name__)
def test_a_hard_gate_that_is_written_out(gate, opset):
    net = Net(opset)
    (block,) = blocks_of(net, spelled.hard_gate(net, "x", gate))
    assert (block.gate, block.params) == ("hardsigmoid", 2 * CHANNELS * HIDDEN)


def test_a_single_layer_has_no_squeezed_width():
    net = Net()
    (block,) = blocks_of(net, spelled.one_layer(net, "x"))
    assert (block.channels, block.squeeze_channels, len(block.layers)) == (CHANNELS, None, 1)


def test_several_blocks_stand_in_the_network_s_order():
    net = Net()
    first = spelled.pool_and_convolutions(net, "x")
    out = spelled.paddle(net, spelled.one_layer(net, first))
    found = blocks_of(net, out)
    assert [len(block.layers) for block in found] == [2, 1, 2]
    assert words_of(found) == "1 sigmoid, 2 hardsigmoid"
    assert words_of([]) == "no SE block"


# ---------------------------------------------------------------------------------------------------------- others' kin
def another_map(net, x):
    """The gate of one map multiplies another one."""
    s = net("GlobalAveragePool", net("Relu", x))
    gate = net("Sigmoid", net("Conv", s, net.weight(CHANNELS, CHANNELS, 1, 1)))
    return net("Mul", x, gate)


def spatial(net, x):
    """CBAM's spatial half: the mean over channels."""
    s = net.mean(x, axes=(1,))
    return net("Mul", x, net("Sigmoid", net("Conv", s, net.weight(1, 1, 7, 7), pads=[3, 3, 3, 3])))


def eca(net, x):
    """A convolution along the channels."""
    s = net("GlobalAveragePool", x)
    s = net("Reshape", s, net.constant(np.array([1, 1, CHANNELS], np.int64)))
    t = net("Conv", s, net.weight(1, 1, 3), pads=[1, 1])
    gate = net("Reshape", net("Sigmoid", t), net.constant(np.array([1, CHANNELS, 1, 1], np.int64)))
    return net("Mul", x, gate)


def no_layer(net, x):
    return net("Mul", x, net("Sigmoid", net("GlobalAveragePool", x)))


def swish(net, x):
    return net("Mul", x, net("Sigmoid", x))


def hard_swish(net, x):
    return net("Mul", x, spelled.cut_then_divide(net, x))


def wide_layer(net, x):
    s = net("GlobalAveragePool", x)
    return net("Mul", x, net("Sigmoid", net("Conv", s, net.weight(CHANNELS, CHANNELS, 3, 3), pads=[1, 1, 1, 1])))


def grouped_layer(net, x):
    s = net("GlobalAveragePool", x)
    return net("Mul", x, net("Sigmoid", net("Conv", s, net.weight(CHANNELS, 1, 1, 1), group=CHANNELS)))


def other_cut(net, x):
    """Cut at 0 and 3 instead of 6: no hard sigmoid."""

    def gate(net, t):
        return net("Div", net.clip(net("Add", t, net.number(3.0)), 0, 3), net.number(6.0))

    return spelled.hard_gate(net, x, gate)


def constant_scale(net, x):
    return net("Mul", x, net.weight(1, CHANNELS, 1, 1))


@pytest.mark.parametrize(
    "other",
    [another_map, spatial, eca, no_layer, swish, hard_swish, wide_layer, grouped_layer, other_cut, constant_scale],
    ids=lambda one: one.__name__,
)
def test_what_is_no_block(other):
    net = Net()
    assert blocks_of(net, other(net, "x")) == []


def test_a_deep_network_is_no_recursion():
    net, x = Net(), "x"
    for _ in range(3000):
        x = net("Relu", x)
    assert len(blocks_of(net, spelled.pool_and_convolutions(net, x))) == 1


def test_the_map_s_size_does_not_matter():
    net = Net(shape=("batch", CHANNELS, "height", SIZE))
    assert len(blocks_of(net, spelled.mean_and_gemm(net, "x"))) == 1
