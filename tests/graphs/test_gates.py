"""The gates of an ONNX network, read while it runs."""

import numpy as np
import pytest
import spelled
from spelled import CHANNELS, SIZE, Net

from selab.errors import InsertionError, ModelError
from selab.graphs.gates import gates_of, with_gates

pytest.importorskip("onnxruntime")
X = np.random.default_rng(2).normal(size=(2, CHANNELS, SIZE, SIZE)).astype(np.float32)
SPELLINGS = [
    *(spelled.pool_and_convolutions, spelled.mean_and_gemm, spelled.paddle, spelled.tensorflow),
    *(spelled.swish_between, spelled.one_layer),
]


def model_of(spelling, **options):
    net = Net(shape=("n", CHANNELS, SIZE, SIZE), **options)
    return net.model(spelling(net, "x"))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda one: one.__name__)
def test_the_gate_is_what_the_map_is_multiplied_by(spelling):
    ((output, (gate,)),) = gates_of(model_of(spelling), [X], place="net.onnx")
    assert gate.shape == (2, CHANNELS)
    np.testing.assert_allclose(output, X * gate[:, :, None, None], rtol=1e-5, atol=1e-6)
    assert gate.std() > 0


def test_batch_by_batch_is_all_at_once():
    model = model_of(spelled.paddle)
    ((_, (together,)),) = gates_of(model, [X], place="net.onnx")
    alone = [gates[0] for _, gates in gates_of(model, [X[:1], X[1:]], place="net.onnx")]
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=1e-6)


def test_several_blocks_in_the_order_of_the_network():
    net = Net(shape=("n", CHANNELS, SIZE, SIZE))
    first = spelled.pool_and_convolutions(net, "x")
    model = net.model(spelled.paddle(net, first))
    before = model.SerializeToString()
    ((output, gates),) = gates_of(model, [X], place="net.onnx")
    assert [gate.shape for gate in gates] == [(2, CHANNELS)] * 2
    np.testing.assert_allclose(output, X * (gates[0] * gates[1])[:, :, None, None], rtol=1e-5, atol=1e-6)
    assert model.SerializeToString() == before


def test_a_gate_that_is_an_output_already():
    net = Net(shape=("n", CHANNELS, SIZE, SIZE))
    out = spelled.pool_and_convolutions(net, "x")
    gate = net.nodes[-1].input[0]
    model = net.model(out, gate)
    ((_, (found,)),) = gates_of(model, [X], place="net.onnx")
    assert found.shape == (2, CHANNELS)
    assert len(with_gates(model, []).graph.output) == 2


def test_no_block_at_all():
    net = Net()
    with pytest.raises(InsertionError, match=r"net\.onnx: has no SE block: a mean over the map"):
        list(gates_of(net.model(net("Relu", "x")), [X], place="net.onnx"))


def test_images_of_another_shape():
    with pytest.raises(ModelError, match=r"net\.onnx: ONNX Runtime fails on images of 2x1x6x6; give their size: "):
        list(gates_of(model_of(spelled.paddle), [X[:, :1]], place="net.onnx"))


def test_a_gate_that_is_not_finite():
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        list(gates_of(model_of(spelled.paddle), [X * np.float32("nan")], place="net.onnx"))
