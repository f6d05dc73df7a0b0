"""Count an ONNX network by the conventions of `selab.cost`: parameters, MACs, FLOPs and bytes of a forward pass.

Shapes come from onnx's shape inference with the input's size filled in. An operator without a rule, or one whose shapes
cannot be inferred, is listed in `Cost.unknown`, and its cost is not in the totals. There is no backward pass.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from selab.errors import ModelError
from selab.graphs.blocks import GraphBlock, find_blocks
from selab.graphs.graph import Graph, attribute
from selab.graphs.reading import onnx
from selab.graphs.shapes import Shape, known_shapes, with_shapes
from selab.records.types import Cost, Insertion, Macs, OperatorCost, SECost, StageCost

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto


@dataclass(frozen=True)
class _Known:
    """A tensor of known shape.

    Attributes:
        size: bytes of an element.
    """

    shape: Shape
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.size


@dataclass(frozen=True)
class _Work:
    """Arithmetic of an operator: MACs of products; all else in fused multiply-adds, and in FLOPs."""

    macs: int = 0
    other: int = 0
    other_flops: int = 0


_Tensors = Sequence[_Known | None]
_Rule = Callable[["NodeProto", _Tensors, _Known], _Work | None]


def _per_output(count: int, flops: int | None = None) -> _Rule:
    each = count if flops is None else flops
    return lambda _node, _inputs, out: _Work(other=count * out.elements, other_flops=each * out.elements)


def _per_input(count: int) -> _Rule:
    def rule(_node: "NodeProto", inputs: _Tensors, _out: _Known) -> _Work | None:
        x = inputs[0]
        return None if x is None else _Work(other=count * x.elements, other_flops=count * x.elements)

    return rule


def _convolution(weight_at: int) -> _Rule:
    """Each output is made of one group's channels, in a window."""

    def rule(_node: "NodeProto", inputs: _Tensors, out: _Known) -> _Work | None:
        weight = inputs[weight_at]
        return None if weight is None else _Work(macs=out.elements * prod(weight.shape[1:]))

    return rule


def _transposed(_node: "NodeProto", inputs: _Tensors, _out: _Known) -> _Work | None:
    x, weight = inputs[:2]
    return None if x is None or weight is None else _Work(macs=x.elements * prod(weight.shape[1:]))


def _matrix_product(left_at: int) -> _Rule:
    def rule(node: "NodeProto", inputs: _Tensors, out: _Known) -> _Work | None:
        left = inputs[left_at]
        if left is None or not left.shape:
            return None
        across = left.shape[0] if attribute(node, "transA", 0) else left.shape[-1]
        return _Work(macs=out.elements * across)

    return rule


def _pooling(node: "NodeProto", _inputs: _Tensors, out: _Known) -> _Work:
    count = out.elements * prod(attribute(node, "kernel_shape", [1]))
    return _Work(other=count, other_flops=count)


def _resize(node: "NodeProto", _inputs: _Tensors, out: _Known) -> _Work:
    neighbours = {"linear": 4, "cubic": 16}.get(_text(attribute(node, "mode", b"nearest")), 0)
    return _Work(other=neighbours * out.elements, other_flops=neighbours * out.elements)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _nothing(_node: "NodeProto", _inputs: _Tensors, _out: _Known) -> _Work:
    return _Work()


def _named(rule: _Rule, names: str) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, _Rule] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    **_named(_matrix_product(0), "Gemm MatMul MatMulInteger QGemm"),
    "QLinearMatMul": _matrix_product(0),
    **_named(
        _per_output(1),
        "Add Sub Mul Div Pow Min Max Mod Relu Sigmoid HardSigmoid HardSwish Clip Tanh LeakyRelu PRelu Elu Celu Selu "
        "Mish Softplus Softsign Swish Gelu Erf Exp Log Sqrt Reciprocal Neg Abs Sign Floor Ceil Round Sin Cos Where Not "
        "And Or Xor Equal Less Greater LessOrEqual GreaterOrEqual IsNaN CumSum ThresholdedRelu QLinearAdd QLinearMul "
        "QLinearSigmoid QLinearLeakyRelu DequantizeLinear QuickGelu",
    ),
    **_named(_per_output(2), "QuantizeLinear DynamicQuantizeLinear"),
    **_named(
        _per_input(1),
        "GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ArgMax ArgMin ReduceL1 "
        "ReduceL2 QLinearGlobalAveragePool",
    ),
    **_named(_per_input(2), "ReduceSumSquare"),
    **_named(_per_input(3), "ReduceLogSumExp"),
    **_named(_pooling, "AveragePool MaxPool LpPool QLinearAveragePool"),
    **_named(_per_output(3), "Softmax LogSoftmax Hardmax"),
    "BatchNormalization": _per_output(1, 2),
    **_named(_per_output(3, 4), "LayerNormalization InstanceNormalization GroupNormalization"),
    **_named(_resize, "Resize Upsample"),
    **_named(
        _nothing,
        "Concat Split Slice Gather GatherElements GatherND Transpose Pad Expand Tile DepthToSpace SpaceToDepth "
        "ScatterND ScatterElements Cast CastLike",
    ),
}
"""Operator → its arithmetic, of the standard domain and of onnxruntime's quantised operators."""
_FREE = frozenset(
    {
        *("Constant", "ConstantOfShape", "Shape", "Size", "Range", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
        *("Identity", "Dropout", "EyeLike"),
    }
)
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
_STATISTICS = {"BatchNormalization": (3, 4)}
# Constants that steer an operator, by their place: shapes, axes, limits, scales and zero points. They are no weights.
_STEERING = {"Reshape", "Slice", "Resize", "Upsample", "Pad", "Clip", "Expand", "Tile", "Gather", "Split", "Unsqueeze"}


def count_graph(model: "ModelProto", image: Shape, place: str = "the network") -> Cost:
    """Count one forward pass.

    Args:
        model: without local functions; not changed.
        image: (N, C, H, W) of the input.
        place: of the network, for messages.

    Raises:
        ModelError: the input is no image, or has another fixed size; the network's shapes contradict each other.
    """
    graph, known, works = _looked_at(model, image, place)
    used = [node for node in graph.nodes if id(node) in works]
    unknown = Counter(node.op_type for node in used if works[id(node)] is None)
    counted = [(node, work) for node in used if (work := works[id(node)]) is not None]
    blocks = find_blocks(graph)
    products = sum(work.macs for _, (work, _) in counted)
    other = sum(work.other for _, (work, _) in counted)
    squeezes = {id(block.squeeze) for block in blocks}
    squeezed = sum(work.other for node, (work, _) in counted if id(node) in squeezes)
    params, statistics = _weights(graph)
    return Cost(
        params=params,
        buffer_elements=statistics,
        macs=Macs(conv_linear=products, paper=products + squeezed, all=products + other),
        macs_backward=Macs(conv_linear=0, paper=0, all=0),
        flops=sum(2 * work.macs + work.other_flops for _, (work, _) in counted),
        flops_backward=0,
        bytes=sum(moved for _, (_, moved) in counted),
        activations=sum(known[node.output[0]].elements for node, _ in counted if node.op_type in _CONVOLUTIONS),
        se=_blocks_cost(blocks, {id(node): found for node, found in counted}),
        by_operator=_grouped(counted),
        by_module={},
        unknown=dict(unknown),
    )


def blocks_of(model: "ModelProto", image: Shape, place: str = "the network") -> tuple[Insertion, ...]:
    """Return the SE blocks as rows of a record.

    Args:
        model: without local functions; not changed.
        image: (N, C, H, W) of the input.
        place: of the network, for messages.

    Raises:
        ModelError: as `count_graph`, or the size of a block's map cannot be inferred.
    """
    graph, known, works = _looked_at(model, image, place)
    rows = []
    for block in find_blocks(graph):
        shape = known[block.x].shape if block.x in known else ()
        if len(shape) != 4:
            raise ModelError(f"{place}: {block.name}: the size of the map that it gates cannot be inferred")
        channels, height, width = (shape[3], *shape[1:3]) if block.channels_last else shape[1:]
        own = [works.get(id(node)) for node in (block.squeeze, *block.inner, block.scale)]
        rows.append(
            Insertion(
                path=block.name,
                placement=f"as in the file, {block.gate}",
                channels=channels,
                squeeze_channels=block.squeeze_channels,
                params=block.params,
                height=height,
                width=width,
                macs=sum(found[0].macs + found[0].other for found in own if found is not None) // shape[0],
            )
        )
    return tuple(rows)


def _looked_at(
    model: "ModelProto", image: Shape, place: str
) -> tuple[Graph, dict[str, _Known], dict[int, tuple[_Work, int] | None]]:
    """Return the graph with shapes, the known tensors, and the work and bytes of each operator that is not constant."""
    inferred = with_shapes(model, image, place)
    graph, known = Graph(inferred), _shapes(inferred)
    return graph, known, {id(node): _counted(node, known) for node in graph.nodes if not _is_constant(graph, node)}


def _shapes(model: "ModelProto") -> dict[str, _Known]:
    """Return the tensors of known shape by name."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in _values(model)}
    found = {name: _Known(shape, _bytes_of(kinds[name])) for name, shape in known_shapes(model).items() if kinds[name]}
    for name, tensor in Graph(model).tensors.items():
        found[name] = _Known(tuple(tensor.dims), _bytes_of(tensor.data_type))
    return found


def _values(model: "ModelProto") -> "list[ValueInfoProto]":
    return [*model.graph.input, *model.graph.value_info, *model.graph.output]


def _bytes_of(kind: int) -> int:
    return int(onnx().helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _is_constant(graph: Graph, node: "NodeProto") -> bool:
    return all(graph.is_constant(name) for name in node.output)


def _counted(node: "NodeProto", known: dict[str, _Known]) -> tuple[_Work, int] | None:
    """Return an operator's arithmetic and the bytes that it moves; None if it has no rule, or a shape is unknown."""
    if node.op_type in _FREE:
        return _Work(), 0
    rule, out = RULES.get(node.op_type), known.get(node.output[0])
    if rule is None or out is None:
        return None
    inputs = [known.get(name) if name else None for name in node.input]
    work = rule(node, inputs, out)
    if work is None:
        return None
    steering = set(range(1, len(inputs))) if node.op_type in _STEERING else set()
    read = {
        name: one for at, (name, one) in enumerate(zip(node.input, inputs, strict=True)) if one and at not in steering
    }
    written = [known[name] for name in node.output if name in known]
    return work, sum(one.bytes for one in read.values()) + sum(one.bytes for one in written)


def _weights(graph: Graph) -> tuple[int, int]:
    """Return the elements of weights and biases, and of running statistics; each constant once.

    A constant of one number is a coefficient of a formula, unless it is the bias of a layer of one output.
    """
    weights: dict[str, int] = {}
    statistics: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type in _FREE or node.op_type in _STEERING:
            continue
        for at, name in enumerate(node.input):
            tensor = graph.constant(name)
            # Axes and sizes are 64-bit integers, weights never.
            if tensor is None or tensor.data_type == onnx().TensorProto.INT64:
                continue
            into = statistics if at in _STATISTICS.get(node.op_type, ()) else weights
            if prod(tensor.dims) > 1 or node.op_type in ("Conv", "ConvTranspose", "Gemm"):
                into[graph.source(name)] = prod(tensor.dims)
    return sum(weights.values()), sum(statistics.values())


def _blocks_cost(blocks: Sequence[GraphBlock], found: dict[int, tuple[_Work, int]]) -> SECost:
    def stage(nodes: "Sequence[NodeProto]") -> StageCost:
        own = [found[id(node)] for node in nodes if id(node) in found]
        return StageCost(macs=sum(work.macs + work.other for work, _ in own), bytes=sum(moved for _, moved in own))

    return SECost(
        blocks=len(blocks),
        params=sum(block.params for block in blocks),
        squeeze=stage([block.squeeze for block in blocks]),
        excitation=stage([node for block in blocks for node in block.inner]),
        scale=stage([block.scale for block in blocks]),
    )


def _grouped(counted: "Sequence[tuple[NodeProto, tuple[_Work, int]]]") -> dict[str, OperatorCost]:
    sums: dict[str, list[int]] = {}
    for node, (work, moved) in counted:
        if node.op_type in _FREE:
            continue
        row = sums.setdefault(node.op_type, [0, 0, 0, 0])
        for at, value in enumerate((1, work.macs + work.other, 2 * work.macs + work.other_flops, moved)):
            row[at] += value
    return {
        name: OperatorCost(calls=calls, macs=macs, flops=flops, bytes=moved)
        for name, (calls, macs, flops, moved) in sorted(sums.items())
    }
