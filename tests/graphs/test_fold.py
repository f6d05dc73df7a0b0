"""Gates of an ONNX network that are constants go into the weights beside them."""

import numpy as np
import onnx
import pytest
import spelled
from onnx.reference import ReferenceEvaluator
from spelled import CHANNELS, SIZE, Net

from selab.graphs.blocks import find_blocks
from selab.graphs.fold import GraphPlace, fold, places, with_constants
from selab.graphs.graph import Graph

X = np.random.default_rng(1).normal(size=(1, CHANNELS, SIZE, SIZE)).astype(np.float32)
FACTORS = np.random.default_rng(4).uniform(0.1, 0.9, CHANNELS)


def outputs(model):
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": X})[0]


def conv(net, x, *, bias=False, group=1, out=CHANNELS):
    weights = [net.weight(out, CHANNELS // group, 3, 3), *([net.weight(out)] if bias else [])]
    return net("Conv", x, *weights, pads=[1, 1, 1, 1], group=group)


def norm(net, x):
    variance = net.constant(net.random.uniform(0.5, 2, CHANNELS).astype(np.float32))
    return net("BatchNormalization", x, *(net.weight(CHANNELS) for _ in range(3)), variance)


def bias(net, x):
    return net("Add", x, net.weight(1, CHANNELS, 1, 1))


def reversed_bias(net, x):
    return net("Add", net.weight(CHANNELS, 1, 1), x)


BEFORE = {
    "convolution": (lambda net, x: conv(net, x), "output channels"),
    "convolution with a bias": (lambda net, x: conv(net, x, bias=True), "output channels"),
    "depthwise": (lambda net, x: conv(net, x, group=CHANNELS), "output channels"),
    "batch normalisation": (lambda net, x: norm(net, conv(net, x)), "scale"),
    "an addition": (lambda net, x: bias(net, conv(net, x)), "output channels"),
    "an addition and a ReLU": (lambda net, x: net("Relu", reversed_bias(net, conv(net, x))), "output channels"),
    "pooling": (
        lambda net, x: net("MaxPool", conv(net, x), kernel_shape=[2, 2], strides=[1, 1]),
        "output channels",
    ),
}
BEHIND = {
    "the next": (lambda net, x: conv(net, x, out=4), "input channels"),
    "a grouped one": (lambda net, x: conv(net, x, group=4), "input channels"),
    "a depthwise one": (lambda net, x: conv(net, net("Relu", x), group=CHANNELS), "input channels"),
}


@pytest.mark.parametrize("constants", [True, False], ids=["initializers", "Constant"])
@pytest.mark.parametrize(("layers", "way"), BEFORE.values(), ids=BEFORE)
def test_into_what_stands_before(layers, way, constants):
    net = Net(folded=constants)
    check(net.model(spelled.pool_and_convolutions(net, layers(net, "x"))), way)


@pytest.mark.parametrize("spelling", [spelled.mean_and_gemm, spelled.paddle, spelled.one_layer])
def test_every_spelling(spelling):
    net = Net()
    check(net.model(spelling(net, conv(net, "x"))), "output channels")


@pytest.mark.parametrize(("layers", "way"), BEHIND.values(), ids=BEHIND)
def test_into_what_stands_behind(layers, way):
    net = Net()
    check(net.model(layers(net, spelled.paddle(net, net("HardSwish", conv(net, "x"))))), way)


def check(model, way):
    before = model.SerializeToString()
    (block,) = find_blocks(Graph(model))
    constants = {block.name: FACTORS}
    (place,) = places(model, [block]).values()
    assert isinstance(place, GraphPlace), place
    assert place.way == way
    expected = outputs(with_constants(model, [block], constants))
    assert not np.allclose(expected, outputs(model))
    folded, went = fold(model, constants)
    assert went[block.name].way == way
    np.testing.assert_allclose(outputs(folded), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert not find_blocks(Graph(folded))
    assert len(folded.graph.node) < len(model.graph.node)
    assert model.SerializeToString() == before


def test_two_blocks_without_names():
    net = Net()
    x = spelled.pool_and_convolutions(net, conv(net, "x"))
    model = net.model(spelled.paddle(net, conv(net, net("Relu", x))))
    blocks = find_blocks(Graph(model))
    constants = {block.name: FACTORS * (1 + place) / 2 for place, block in enumerate(blocks)}
    assert len(constants) == 2
    expected = outputs(with_constants(model, blocks, constants))
    folded, went = fold(model, constants)
    assert all(isinstance(place, GraphPlace) for place in went.values())
    np.testing.assert_allclose(outputs(folded), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    # One of both: the other keeps its gate.
    last = blocks[1].name
    folded, _ = fold(model, {last: constants[last]})
    expected = outputs(with_constants(model, blocks, {last: constants[last]}))
    np.testing.assert_allclose(outputs(folded), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def read_elsewhere(net):
    x = conv(net, "x")
    return net("Add", spelled.pool_and_convolutions(net, x), x)


def swish_on_both_sides(net):
    return net("HardSwish", spelled.pool_and_convolutions(net, net("HardSwish", conv(net, "x"))))


def shared_weights(net):
    x = conv(net, "x")
    weight = net.nodes[-1].input[1]
    return spelled.pool_and_convolutions(net, net("Conv", x, weight, pads=[1, 1, 1, 1]))


REFUSED = {
    "read elsewhere": (read_elsewhere, "its input is read elsewhere too"),
    "the input": (
        lambda net: spelled.pool_and_convolutions(net, "x"),
        "its input is the network's own; its output does not go into one convolution alone",
    ),
    "activations": (swish_on_both_sides, "HardSwish stands before it; HardSwish stands behind it"),
    "shared": (shared_weights, "is used more than once"),
    "channels last": (lambda net: spelled.tensorflow(net, conv(net, "x")), "its map has the channels last"),
}


@pytest.mark.parametrize(("build", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_folded_says_why_and_stays(build, why):
    net = Net()
    model = net.model(build(net))
    (block,) = find_blocks(Graph(model))
    folded, went = fold(model, {block.name: FACTORS})
    assert why in went[block.name]
    np.testing.assert_array_equal(outputs(folded), outputs(model))


def test_a_negative_factor_does_not_go_through_a_relu():
    net = Net()
    model = net.model(spelled.pool_and_convolutions(net, net("Relu", conv(net, "x"))))
    (block,) = find_blocks(Graph(model))
    factors = FACTORS.copy()
    factors[3] = -0.1
    _, went = fold(model, {block.name: factors})
    assert went[block.name].startswith("a factor is negative")


def test_no_such_block():
    net = Net()
    model = net.model(spelled.pool_and_convolutions(net, conv(net, "x")))
    _, went = fold(model, {"nowhere": FACTORS})
    assert went == {"nowhere": "there is no such block"}
