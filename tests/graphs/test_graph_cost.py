"""ONNX networks are counted by the conventions of the counter for PyTorch."""

import io
import warnings

import numpy as np
import onnx
import pytest
import spelled
import torch
from onnx import helper
from spelled import CHANNELS, HIDDEN, SIZE, Net

from selab.cost.count import count
from selab.errors import ModelError
from selab.graphs.cost import count_graph
from selab.models.build import build
from selab.models.catalog import find

IMAGE = (1, CHANNELS, SIZE, SIZE)
EXPORTED = ["small_cnn", "se_small_cnn", "mobilenet_0_25", "se_resnet20_cifar", "se_shufflenet_v2_x0_5"]


def test_one_block_by_hand():
    net = Net()
    cost = count_graph(net.model(spelled.pool_and_convolutions(net, "x")), IMAGE)
    area, map_bytes = SIZE * SIZE, 4 * CHANNELS * SIZE * SIZE
    assert cost.macs.conv_linear == 2 * CHANNELS * HIDDEN
    assert cost.macs.paper == 2 * CHANNELS * HIDDEN + CHANNELS * area
    # Squeeze, ReLU, sigmoid, scale.
    assert cost.macs.all == 2 * CHANNELS * HIDDEN + CHANNELS * area + HIDDEN + CHANNELS + CHANNELS * area
    assert cost.params == cost.se.params == 2 * CHANNELS * HIDDEN + CHANNELS + HIDDEN
    assert cost.se.squeeze.bytes == map_bytes + 4 * CHANNELS
    assert cost.se.scale.bytes == 2 * map_bytes + 4 * CHANNELS
    assert cost.se.scale.macs == CHANNELS * area
    assert (cost.unknown, cost.macs_backward.all, cost.activations) == ({}, 0, HIDDEN + CHANNELS)
    assert sum(row.macs for row in cost.by_operator.values()) == cost.macs.all


def exported(arch):
    variant = find(arch)
    model = build(variant, seed=0).model.eval()
    raw = io.BytesIO()
    example = torch.zeros(1, *variant.input_chw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, example, raw, dynamo=False, do_constant_folding=True)
    return onnx.load_from_string(raw.getvalue()), count(model, (1, *variant.input_chw)), (1, *variant.input_chw)


@pytest.mark.parametrize(
    "arch", ["small_cnn", "se_small_cnn", "mobilenet_0_25", "se_resnet20_cifar", "se_shufflenet_v2_x0_5"]
)
def test_an_exported_network_has_the_products_of_the_original(arch):
    model, ours, image = exported(arch)
    cost = count_graph(model, image)
    assert cost.macs.conv_linear == ours.macs.conv_linear
    assert cost.unknown == {}


def without_a_rule(opset=17):
    net = Net(opset)
    y = net("LRN", net("Relu", "x"), size=3)
    return net.model(net("Neg", y))


def test_an_operator_without_a_rule_is_listed():
    cost = count_graph(without_a_rule(), IMAGE)
    assert cost.unknown == {"LRN": 1}
    assert cost.macs.all == 2 * CHANNELS * SIZE * SIZE


def test_free_dimensions_take_the_given_size():
    net = Net(shape=("n", CHANNELS, "h", "w"))
    model = net.model(spelled.pool_and_convolutions(net, "x"))
    small, large = (count_graph(model, (1, CHANNELS, size, size)) for size in (4, 8))
    assert large.se.scale.macs == 4 * small.se.scale.macs


def test_a_fixed_dimension_cannot_be_chosen():
    net = Net(shape=("n", CHANNELS, SIZE, SIZE))
    model = net.model(net("Relu", "x"))
    with pytest.raises(ModelError, match=r"net.onnx: its input is \?x8x6x6, not 1x8x9x9; only the \? may be chosen"):
        count_graph(model, (1, CHANNELS, 9, 9), "net.onnx")


def test_shapes_that_are_computed_are_known():
    """A flatten as old exporters write it: Shape, Slice, Concat, Cast, Reshape."""
    net = Net(shape=("n", CHANNELS, "h", "w"))
    shape = net("Cast", net("Shape", "x"), to=onnx.TensorProto.INT32)
    first = net("Slice", shape, net.constant(np.array([0])), net.constant(np.array([1])), net.constant(np.array([0])))
    target = net(
        "Cast", net("Concat", first, net.constant(np.array([-1], np.int32)), axis=0), to=onnx.TensorProto.INT64
    )
    flat = net("Reshape", "x", target)
    model = net.model(net("MatMul", flat, net.weight(CHANNELS * SIZE * SIZE, 5)), dims=2)
    cost = count_graph(model, (2, CHANNELS, SIZE, SIZE))
    assert cost.unknown == {}
    assert cost.macs.conv_linear == 2 * CHANNELS * SIZE * SIZE * 5


def test_quantised_layers_count_as_their_products():
    net = Net()
    x = net("QuantizeLinear", "x", net.number(0.1), net.constant(np.uint8(3)))
    weight = net.constant(np.ones((5, CHANNELS, 1, 1), np.int8))
    scale, zero = net.number(0.1), net.constant(np.uint8(3))
    y = net("QLinearConv", x, scale, zero, weight, net.number(0.2), net.constant(np.int8(0)), scale, zero)
    cost = count_graph(net.model(net("DequantizeLinear", y, scale, zero)), IMAGE)
    assert cost.macs.conv_linear == 5 * CHANNELS * SIZE * SIZE
    assert cost.params == 5 * CHANNELS
    # The map is read as bytes and written as bytes; two scales and two zero points, each tensor once.
    assert cost.by_operator["QLinearConv"].bytes == CHANNELS * SIZE * SIZE + 5 * CHANNELS + 5 * SIZE * SIZE + 2 * 4 + 2


def test_several_inputs_are_refused():
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "net",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, IMAGE) for name in "ab"],
        [helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, IMAGE)],
    )
    with pytest.raises(ModelError, match=r"has 2 inputs \(a, b\)"):
        count_graph(helper.make_model(graph), IMAGE)


def test_axes_are_no_parameters():
    """From opset 18 on the axes of a mean are an input."""
    costs = []
    for opset in (17, 18):
        net = Net(opset=opset)
        costs.append(count_graph(net.model(spelled.swish_between(net, "x")), IMAGE))
    assert costs[0].params == costs[1].params == 2 * CHANNELS * HIDDEN + CHANNELS + HIDDEN
