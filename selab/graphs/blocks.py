"""Find the SE blocks of an ONNX network by structure, however its exporter spelled them.

A block is a product of a feature map and a gate; the gate is computed by layers from the mean of the same map:

    squeeze (GlobalAveragePool, or ReduceMean over the map) → layer (1x1 Conv, Gemm or MatMul; the bias may be an Add)
    → activation → layer → Sigmoid, HardSigmoid, or HardSigmoid written as a Clip → Mul with the map
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from selab.graphs.graph import Graph, attribute, axes_of, dimensions

if TYPE_CHECKING:
    from onnx import NodeProto

Gate = Literal["sigmoid", "hardsigmoid"]
# Between squeeze and gate: activations, and what is left of normalisations and of biases.
_BETWEEN = frozenset(
    {
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Softplus", "Tanh", "Clip", "Sigmoid", "Gelu"),
        *("HardSigmoid", "HardSwish", "Mish", "BatchNormalization", "LayerNormalization", "Add", "Sub", "Mul", "Div"),
        *("Min", "Max"),
    }
)
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_CHANNELS_LAST = ([1, 2], [-3, -2])
# No block is deeper; a longer path is something else.
_LONGEST = 40


@dataclass(frozen=True, kw_only=True)
class GraphBlock:
    """An SE block.

    Attributes:
        name: of the product, or its place among the operators where it has no name.
        x: the tensor that is gated.
        squeeze: the operator that takes the mean.
        layers: from the squeeze to the gate.
        gate: its kind.
        gate_tensor: the gate's values.
        scale: the product.
        inner: the operators between squeeze and scale.
        params: elements of the layers' weights and biases.
        channels: of the map; `squeeze_channels`: between the first layer and the second, None with one layer.
        channels_last: whether the map is (N, H, W, C), as TensorFlow's exporter leaves it.
    """

    name: str
    x: str
    squeeze: "NodeProto"
    layers: "tuple[NodeProto, ...]"
    gate: Gate
    gate_tensor: str
    scale: "NodeProto"
    inner: "tuple[NodeProto, ...]"
    params: int
    channels: int | None
    squeeze_channels: int | None
    channels_last: bool


def find_blocks(graph: Graph) -> list[GraphBlock]:
    """Return the SE blocks of a network, in its order."""
    found = []
    for place, node in enumerate(graph.nodes):
        if node.op_type != "Mul" or len(graph.data_inputs(node)) != 2:
            continue
        for gate_tensor, x in (tuple(node.input), tuple(reversed(node.input))):
            block = _block(graph, node, gate_tensor, x, node.name or f"Mul {place}")
            if block is not None:
                found.append(block)
                break
    return found


def _block(graph: Graph, scale: "NodeProto", gate_tensor: str, x: str, name: str) -> GraphBlock | None:
    gate = _gate(graph, gate_tensor)
    if gate is None:
        return None
    kind, before, inner = gate
    path = _path(graph, before)
    if path is None:
        return None
    squeeze, steps = path
    layers = tuple(node for node in steps if node.op_type in _LAYERS)
    if not layers or graph.source(squeeze.input[0]) != graph.source(x):
        return None
    widths = [_width(graph, layer) for layer in layers]
    return GraphBlock(
        name=name,
        x=x,
        squeeze=squeeze,
        layers=layers,
        gate=kind,
        gate_tensor=gate_tensor,
        scale=scale,
        inner=(*steps, *inner),
        params=sum(_size(graph, one) for node in steps for one in node.input),
        channels=widths[-1],
        squeeze_channels=widths[0] if len(layers) > 1 else None,
        channels_last=axes_of(graph, squeeze) in _CHANNELS_LAST,
    )


def _gate(graph: Graph, name: str) -> "tuple[Gate, str, list[NodeProto]] | None":
    """Return a gate's kind, the tensor that it is a function of, and its operators; None for anything else."""
    node = graph.before(name)
    if node is None:
        return None
    if node.op_type in ("Sigmoid", "HardSigmoid"):
        return ("sigmoid" if node.op_type == "Sigmoid" else "hardsigmoid"), node.input[0], [node]
    return _clipped(graph, node)


def _clipped(graph: Graph, node: "NodeProto") -> "tuple[Gate, str, list[NodeProto]] | None":
    """Match a hard sigmoid that is written out: a line through (0, 1/2), cut to the interval from 0 to 1.

    The cut stands before the division, clip(x + 3, 0, 6) / 6, or behind it, clip(x / 6 + 1/2, 0, 1).
    """
    slope, offset, low, high = 1.0, 0.0, float("-inf"), float("inf")
    nodes: list[NodeProto] = []
    # Walk back: the gate is slope * t + offset of the tensor t reached, cut in units of t.
    current: NodeProto | None = node
    name = ""
    while current is not None and len(nodes) < _LONGEST:
        data = graph.data_inputs(current)
        if len(data) != 1:
            break
        step = _line(graph, current, data[0])
        cut = _cut(graph, current)
        if step is not None:
            by, plus = step
            slope, offset = slope * by, offset + slope * plus
            low, high = (low - plus) / by, (high - plus) / by
        elif cut is not None:
            low, high = max(low, cut[0]), min(high, cut[1])
        else:
            break
        nodes.append(current)
        name = data[0]
        current = graph.before(name)
    if not nodes or slope <= 0 or not _near(offset, 0.5):
        return None
    if not (_near(slope * low + offset, 0.0) and _near(slope * high + offset, 1.0)):
        return None
    return "hardsigmoid", name, nodes


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) < 1e-3


def _line(graph: Graph, node: "NodeProto", data: str) -> tuple[float, float] | None:
    """Return (slope, offset) of an operator with one number: Add, Sub, Mul or Div; None for others."""
    others = [name for name in node.input if name != data]
    number = graph.scalar(others[0]) if len(others) == 1 else None
    if number is None:
        return None
    if node.op_type == "Add":
        return 1.0, number
    if node.op_type == "Sub" and node.input[0] == data:
        return 1.0, -number
    if node.op_type == "Mul" and number > 0:
        return number, 0.0
    if node.op_type == "Div" and node.input[0] == data and number > 0:
        return 1.0 / number, 0.0
    return None


def _cut(graph: Graph, node: "NodeProto") -> tuple[float, float] | None:
    """Return the limits of Clip, Relu, Min or Max with numbers; None for others."""
    infinity = float("inf")
    if node.op_type == "Relu":
        return 0.0, infinity
    if node.op_type == "Clip":
        limits = []
        # Attributes until opset 10, inputs from 11 on.
        for place, (key, default) in enumerate((("min", -infinity), ("max", infinity)), start=1):
            given = attribute(node, key)
            if given is None and len(node.input) > place and node.input[place]:
                given = graph.scalar(node.input[place])
                if given is None:
                    return None
            limits.append(default if given is None else float(given))
        return limits[0], limits[1]
    if node.op_type in ("Min", "Max"):
        numbers = [graph.scalar(name) for name in node.input if graph.is_constant(name)]
        if len(numbers) != 1 or numbers[0] is None:
            return None
        return (-infinity, numbers[0]) if node.op_type == "Min" else (numbers[0], infinity)
    return None


def _path(graph: Graph, name: str) -> "tuple[NodeProto, list[NodeProto]] | None":
    """Follow a gate's input back to the squeeze; return it and the operators between, first to last.

    None where the path is none of an SE block: an operator that is no layer and no activation, or a fork.
    """
    steps: list[NodeProto] = []
    while len(steps) < _LONGEST:
        node = graph.before(name)
        if node is None:
            return None
        if _is_squeeze(graph, node):
            return node, steps[::-1]
        data = graph.data_inputs(node)
        if node.op_type in _LAYERS:
            if len(data) != 1 or not _is_pointwise(graph, node):
                return None
            name = data[0]
        elif node.op_type in _BETWEEN and len(data) == 1:
            name = data[0]
        elif node.op_type == "Mul" and (inside := _swish(graph, node)) is not None:
            name, more = inside
            steps += more
        else:
            return None
        steps.append(node)
    return None


def _swish(graph: Graph, node: "NodeProto") -> "tuple[str, list[NodeProto]] | None":
    """Match t * sigmoid(t), or its hard form, an activation of two operators and more; return t and the inner ones."""
    for gate_tensor, other in (tuple(node.input), tuple(reversed(node.input))):
        gate = _gate(graph, gate_tensor)
        if gate is not None and graph.source(gate[1]) == graph.source(other):
            return gate[1], gate[2]
    return None


def _is_squeeze(graph: Graph, node: "NodeProto") -> bool:
    if node.op_type == "GlobalAveragePool":
        return True
    if node.op_type == "ReduceMean":
        axes = axes_of(graph, node)
        return axes is not None and sorted(axes) in ([2, 3], [-2, -1], *_CHANNELS_LAST)
    return False


def _is_pointwise(graph: Graph, layer: "NodeProto") -> bool:
    """Return whether a layer mixes channels only: a matrix, or a convolution of one point in one group."""
    if layer.op_type != "Conv":
        return True
    shape = _weight(graph, layer)
    return len(shape) == 4 and shape[2:] == (1, 1) and int(attribute(layer, "group", 1)) == 1


def _weight(graph: Graph, layer: "NodeProto") -> tuple[int, ...]:
    """Return the shape of a layer's weight as it is written down, in whatever shape and type it is used."""
    constants = [name for name in layer.input[:2] if graph.is_constant(name)]
    return dimensions(graph.constant(constants[0])) if constants else ()


def _width(graph: Graph, layer: "NodeProto") -> int | None:
    """Return the number of output channels of a layer."""
    shape = _weight(graph, layer)
    if layer.op_type == "Conv":
        return shape[0] if shape else None
    if len(shape) != 2:
        return None
    rows_are_outputs = layer.op_type == "Gemm" and int(attribute(layer, "transB", 0)) == 1
    # A matrix on the left of MatMul has its outputs in rows as well.
    on_the_left = graph.is_constant(layer.input[0])
    return shape[0] if rows_are_outputs or on_the_left else shape[1]


def _size(graph: Graph, name: str) -> int:
    """Return the elements of a weight or bias; zero for other tensors, and for numbers of one element."""
    tensor = graph.constant(name)
    elements = 1
    for length in dimensions(tensor):
        elements *= length
    return 0 if tensor is None or elements == 1 else elements


def words_of(blocks: Sequence[GraphBlock]) -> str:
    """Return the kinds of gates and their numbers: `9 hardsigmoid, 1 sigmoid`."""
    kinds = [block.gate for block in blocks]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "no SE block"
