"""The network without its blocks computes what it would without them, and has nothing left of them."""

import numpy as np
import onnx
import pytest
import spelled
from onnx.reference import ReferenceEvaluator
from spelled import CHANNELS, SIZE, Net

from selab.errors import InsertionError
from selab.graphs.baseline import without_blocks
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph

X = np.random.default_rng(1).normal(size=(1, CHANNELS, SIZE, SIZE)).astype(np.float32)


def output(model):
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": X})


def operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "spelling",
    [spelled.pool_and_convolutions, spelled.mean_and_gemm, spelled.paddle, spelled.swish_between],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("folded", [True, False], ids=["initializers", "Constant"])
def test_the_map_passes_unchanged(spelling, folded):
    net = Net(folded=folded)
    model = net.model(net("Neg", spelling(net, net("Relu", "x"))))
    before = model.SerializeToString()
    base = without_blocks(model)
    assert operators(base) == ["Relu", "Neg"]
    assert not base.graph.initializer
    np.testing.assert_array_equal(output(base)[0], -np.maximum(X, 0))
    assert model.SerializeToString() == before


def test_channels_last_between_transpositions():
    net = Net()
    base = without_blocks(net.model(spelled.tensorflow(net, "x")))
    assert operators(base) == ["Transpose", "Transpose"]
    np.testing.assert_array_equal(output(base)[0], X)


def test_a_block_that_is_an_output_and_one_whose_map_is_another_s_product():
    net = Net()
    first = spelled.pool_and_convolutions(net, net("Relu", "x"))
    second = spelled.paddle(net, first)
    base = without_blocks(net.model(first, second))
    assert operators(base) == ["Relu", "Identity", "Identity"]
    for found in output(base):
        np.testing.assert_array_equal(found, np.maximum(X, 0))


def test_only_the_chosen_blocks_go():
    net = Net()
    first = spelled.pool_and_convolutions(net, "x")
    model = net.model(spelled.paddle(net, first))
    blocks = find_blocks(Graph(model))
    base = without_blocks(model, blocks[1:])
    assert len(find_blocks(Graph(base))) == 1
    gated = Net()
    expected = output(gated.model(spelled.pool_and_convolutions(gated, "x")))[0]
    np.testing.assert_allclose(output(base)[0], expected, rtol=1e-6)


def test_what_others_need_of_a_block_stays():
    net = Net()
    x = net("Relu", "x")
    y = spelled.pool_and_convolutions(net, x)
    squeezed = net.nodes[1].output[0]
    base = without_blocks(net.model(net("Add", y, squeezed)))
    assert operators(base) == ["Relu", "GlobalAveragePool", "Add"]


def test_a_network_without_blocks_is_refused():
    net = Net()
    with pytest.raises(InsertionError, match="no SE block"):
        without_blocks(net.model(net("Relu", "x")))
