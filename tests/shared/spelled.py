"""SE blocks as different exporters spell them, written node by node."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, HIDDEN, SIZE = 8, 2, 6


class Net:
    """A graph that grows: `x = net("Relu", x)` adds an operator and returns its output's name."""

    def __init__(self, opset=17, *, shape=(1, CHANNELS, SIZE, SIZE), folded=True):
        self.opset, self.shape, self.folded = opset, shape, folded
        self.nodes, self.weights, self.count = [], [], 0
        self.random = np.random.default_rng(0)

    def __call__(self, kind, *inputs, **attributes):
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value):
        """A constant: an initializer, or the output of a Constant where the exporter folds none."""
        self.count += 1
        tensor = numpy_helper.from_array(np.asarray(value), f"c{self.count}")
        if self.folded:
            self.weights.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
        return tensor.name

    def weight(self, *shape):
        return self.constant(self.random.normal(size=shape).astype(np.float32))

    def number(self, value):
        return self.constant(np.float32(value))

    def clip(self, x, low, high):
        if self.opset < 11:
            return self("Clip", x, min=float(low), max=float(high))
        return self("Clip", x, self.number(low), self.number(high))

    def mean(self, x, axes=(2, 3), keepdims=1):
        if self.opset < 18:
            return self("ReduceMean", x, axes=list(axes), keepdims=keepdims)
        return self("ReduceMean", x, self.constant(np.array(axes, np.int64)), keepdims=keepdims)

    def model(self, *outputs, dims=4):
        """The network; its outputs have so many dimensions of any size."""
        free = [f"d{at}" for at in range(dims)]
        out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, free) for name in outputs]
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.shape))
        graph = helper.make_graph(self.nodes, "net", [image], out, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def pool_and_convolutions(net, x):
    """GlobalAveragePool, 1x1 convolutions with their biases, Sigmoid: torchvision's spelling."""
    s = net("GlobalAveragePool", x)
    h = net("Relu", net("Conv", s, net.weight(HIDDEN, CHANNELS, 1, 1), net.weight(HIDDEN)))
    t = net("Conv", h, net.weight(CHANNELS, HIDDEN, 1, 1), net.weight(CHANNELS))
    return net("Mul", net("Sigmoid", t), x)


def mean_and_gemm(net, x):
    """A mean without kept dimensions, fully connected layers, a reshaped gate: a typical PyTorch block."""
    s = net.mean(x, keepdims=0)
    h = net("Relu", net("Gemm", s, net.weight(HIDDEN, CHANNELS), net.weight(HIDDEN), transB=1))
    t = net("Gemm", h, net.weight(CHANNELS, HIDDEN), net.weight(CHANNELS), transB=1)
    shape = net.constant(np.array([-1, CHANNELS, 1, 1], np.int64))
    return net("Mul", x, net("Reshape", net("Sigmoid", t), shape))


def paddle(net, x):
    """Biases as additions of a reshaped constant, and a HardSigmoid with Paddle's slope of 0.2."""
    s = net("GlobalAveragePool", x)
    shape = [net.constant(np.array([1, width, 1, 1], np.int64)) for width in (HIDDEN, CHANNELS)]
    h = net("Conv", s, net.weight(HIDDEN, CHANNELS, 1, 1))
    h = net("Relu", net("Add", h, net("Reshape", net.weight(HIDDEN), shape[0])))
    t = net("Conv", h, net.weight(CHANNELS, HIDDEN, 1, 1))
    t = net("Add", t, net("Reshape", net.weight(CHANNELS), shape[1]))
    return net("Mul", x, net("HardSigmoid", t, alpha=0.2, beta=0.5))


def tensorflow(net, x):
    """Channels last between transpositions, MatMul and Add."""
    x = net("Transpose", x, perm=[0, 2, 3, 1])
    s = net.mean(x, axes=(1, 2))
    h = net("Add", net("MatMul", s, net.weight(CHANNELS, HIDDEN)), net.weight(HIDDEN))
    t = net("Add", net("MatMul", net("Relu", h), net.weight(HIDDEN, CHANNELS)), net.weight(CHANNELS))
    return net("Transpose", net("Mul", x, net("Sigmoid", t)), perm=[0, 3, 1, 2])


def hard_gate(net, x, spelled):
    s = net("GlobalAveragePool", x)
    h = net("Relu", net("Conv", s, net.weight(HIDDEN, CHANNELS, 1, 1)))
    return net("Mul", spelled(net, net("Conv", h, net.weight(CHANNELS, HIDDEN, 1, 1))), x)


def cut_then_divide(net, t):
    return net("Div", net.clip(net("Add", t, net.number(3.0)), 0, 6), net.number(6.0))


def cut_then_multiply(net, t):
    return net("Mul", net.clip(net("Add", net.number(3.0), t), 0, 6), net.number(1 / 6))


def scale_then_cut(net, t):
    line = net("Add", net("Mul", t, net.number(1 / 6)), net.number(0.5))
    return net.clip(line, 0, 1)


def two_cuts(net, t):
    low = net("Relu", net("Add", t, net.number(3.0)))
    return net("Div", net("Min", low, net.number(6.0)), net.number(6.0))


def swish_between(net, x):
    """EfficientNet's block: a SiLU of two operators between the layers."""
    s = net.mean(x)
    h = net("Conv", s, net.weight(HIDDEN, CHANNELS, 1, 1), net.weight(HIDDEN))
    h = net("Mul", h, net("Sigmoid", h))
    return net("Mul", x, net("Sigmoid", net("Conv", h, net.weight(CHANNELS, HIDDEN, 1, 1), net.weight(CHANNELS))))


def one_layer(net, x):
    """Effective SE (eSE): a single layer."""
    s = net("GlobalAveragePool", x)
    return net("Mul", x, net("HardSigmoid", net("Conv", s, net.weight(CHANNELS, CHANNELS, 1, 1)), alpha=1 / 6))
