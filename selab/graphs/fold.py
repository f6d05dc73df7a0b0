"""Fold gates of an ONNX network that are constants into the weights before or behind their blocks.

A constant factor per channel goes through what treats channels alike and alone (pooling; a ReLU where no factor is
negative), and ends in a batch normalisation, in the output channels of a convolution, or in the input channels of the
next one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from selab.graphs.baseline import without_blocks
from selab.graphs.blocks import GraphBlock, find_blocks
from selab.graphs.graph import Graph, alive, attribute, captured
from selab.graphs.reading import onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_POSITIVE = frozenset({"Relu", "LeakyRelu", "MaxPool", "GlobalMaxPool", "PRelu"})
_LINEAR = frozenset({"Identity", "Dropout", "AveragePool", "GlobalAveragePool"})
_MAP_DIMENSIONS = 4
# FLOAT, FLOAT16 and DOUBLE of onnx.TensorProto.
_FLOATS = frozenset({1, 10, 11})


@dataclass(frozen=True, kw_only=True)
class GraphPlace:
    """Where the factors of a block go.

    Attributes:
        way: into what: `scale`, `output channels` or `input channels`.
        node: the operator's name, for messages.
        weights: names of the constants that are multiplied, with their axis of channels.
        groups: of a convolution whose input channels are multiplied.
        needs_positive: whether a ReLU or a maximum stands between.
    """

    way: str
    node: str
    weights: tuple[tuple[str, int], ...]
    groups: int = 1
    needs_positive: bool = False

    @property
    def words(self) -> str:
        """Where, in words."""
        return f"{self.way} of {self.node}"


def places(model: "ModelProto", blocks: Sequence[GraphBlock]) -> dict[str, GraphPlace | str]:
    """Return where the factors of each block could go, or why they cannot be folded.

    Args:
        model: without local functions; not changed.
        blocks: of `find_blocks`.
    """
    looked = _Looked(_copied(model))
    return {block.name: looked.place_of(block) for block in blocks}


def fold(
    model: "ModelProto", constants: Mapping[str, NDArray[Any]]
) -> "tuple[ModelProto, dict[str, GraphPlace | str]]":
    """Return a copy of a network whose blocks are constants in other weights, and where each of them went.

    Args:
        model: left unchanged.
        constants: name of a block → its factors, (C).

    Returns:
        The copy, and for each block the place, or why it stays as it is.
    """
    # A block without a name is called by its place, which changes with every block that goes; what it returns does not.
    names = {block.scale.output[0]: block.name for block in find_blocks(Graph(model))}
    left = dict(constants)
    found: dict[str, GraphPlace | str] = dict.fromkeys(constants, "there is no such block")
    folded = _copied(model)
    while (now := _foldable(folded, left, names, found)) is not None:
        block, place = now
        _scale(folded, place, np.asarray(left.pop(names[block.scale.output[0]])))
        folded = without_blocks(folded, [block])
    return folded, found


def _foldable(
    model: "ModelProto",
    left: Mapping[str, NDArray[Any]],
    names: Mapping[str, str],
    found: dict[str, GraphPlace | str],
) -> tuple[GraphBlock, GraphPlace] | None:
    """Return a block that can be folded now, and where it goes; note in `found` why others cannot."""
    looked = _Looked(model)
    for block in find_blocks(looked.graph):
        name = names.get(block.scale.output[0], "")
        if name not in left:
            continue
        place = looked.place_of(block)
        if not isinstance(place, str) and place.needs_positive and bool((np.asarray(left[name]) < 0).any()):
            place = "a factor is negative, and a ReLU or a maximum stands between"
        found[name] = place
        if not isinstance(place, str):
            return block, place
    return None


def _copied(model: "ModelProto") -> "ModelProto":
    """Return a copy whose constants are all initializers; some exporters write the outputs of Constant."""
    copy: ModelProto = onnx().ModelProto()
    copy.CopyFrom(model)
    kept = []
    for node in copy.graph.node:
        tensor = attribute(node, "value") if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
            continue
        moved = copy.graph.initializer.add()
        moved.CopyFrom(tensor)
        moved.name = node.output[0]
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy


class _Looked:
    """A network with the readers of each tensor."""

    def __init__(self, model: "ModelProto") -> None:
        self.graph = Graph(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.nodes:
            for name in {*node.input, *captured(node)}:
                self.readers.setdefault(name, []).append(node)

    def place_of(self, block: GraphBlock) -> GraphPlace | str:
        """Return where the factors of a block could go, or why they cannot be folded."""
        if block.channels_last:
            return "its map has the channels last"
        own = {node.output[0] for node in (block.scale, block.squeeze, *block.inner)}
        before = self._before(block.x, own)
        if isinstance(before, GraphPlace):
            return before
        behind = self._behind(block.scale.output[0])
        return behind if isinstance(behind, GraphPlace) else f"{before}; {behind}"

    def _before(self, name: str, readers: set[str]) -> GraphPlace | str:
        positive = False
        while True:
            if name in self.outputs or any(node.output[0] not in readers for node in self.readers.get(name, ())):
                return "its input is read elsewhere too"
            node = self.graph.makers.get(name)
            if node is None:
                return "its input is the network's own"
            if node.op_type in ("BatchNormalization", "Conv"):
                axis = 0
                return self._place(node, [(one, axis) for one in node.input[1:3] if one], positive=positive)
            if node.op_type == "Add" and (bias := self._bias(node)) is not None:
                constant, data = bias
                place = self._before(data, {node.output[0]})
                if isinstance(place, str):
                    return place
                if not self._is_own(constant):
                    return f"{constant} is used more than once"
                scaled = (*place.weights, (constant, len(self.weights[constant].dims) - 3))
                return replace(place, weights=scaled, needs_positive=place.needs_positive or positive)
            if node.op_type not in _POSITIVE | _LINEAR:
                return f"{node.op_type} stands before it"
            positive |= node.op_type in _POSITIVE
            name, readers = node.input[0], {node.output[0]}

    def _bias(self, node: "NodeProto") -> tuple[str, str] | None:
        """Return the constant of an addition with one value per channel, and its other input."""
        for constant, data in (node.input, tuple(reversed(node.input))):
            tensor = self.weights.get(constant)
            if tensor is None or len(tensor.dims) not in (3, _MAP_DIMENSIONS):
                continue
            shape = list(tensor.dims)[-3:]
            if shape[1:] == [1, 1] and shape[0] > 1 and (len(tensor.dims) == 3 or tensor.dims[0] == 1):
                return constant, data
        return None

    def _behind(self, name: str) -> GraphPlace | str:
        positive = False
        while True:
            readers = self.readers.get(name, [])
            if name in self.outputs or len(readers) != 1 or readers[0].input[0] != name:
                return "its output does not go into one convolution alone"
            (node,) = readers
            if node.op_type == "Conv":
                groups = int(attribute(node, "group", 1))
                return self._place(node, [(node.input[1], 1)], positive=positive, groups=groups, way="input channels")
            if node.op_type not in _POSITIVE | _LINEAR:
                return f"{node.op_type} stands behind it"
            positive |= node.op_type in _POSITIVE
            name = node.output[0]

    def _place(
        self, node: "NodeProto", weights: list[tuple[str, int]], *, positive: bool, groups: int = 1, way: str = ""
    ) -> GraphPlace | str:
        for name, _ in weights:
            if name not in self.weights:
                return f"{name} is computed"
            if not self._is_own(name):
                return f"{name} is used more than once"
        way = way or ("scale" if node.op_type == "BatchNormalization" else "output channels")
        return GraphPlace(
            way=way,
            node=node.name or node.output[0],
            weights=tuple(weights),
            groups=groups,
            needs_positive=positive,
        )

    def _is_own(self, name: str) -> bool:
        return len(self.readers.get(name, ())) == 1 and name not in self.outputs


def _scale(model: "ModelProto", place: GraphPlace, factors: NDArray[Any]) -> None:
    for tensor in model.graph.initializer:
        for name, axis in place.weights:
            if tensor.name != name:
                continue
            values = onnx().numpy_helper.to_array(tensor)
            if place.way == "input channels":
                # (O, I / groups, ...): the inputs of group g are channels g I / groups and following.
                shape = (place.groups, values.shape[0] // place.groups, *values.shape[1:])
                by_group = factors.reshape(place.groups, 1, -1, *[1] * (values.ndim - 2))
                scaled = (values.reshape(shape) * by_group).reshape(values.shape)
            else:
                scaled = values * factors.reshape([-1 if one == axis else 1 for one in range(values.ndim)])
            tensor.CopyFrom(onnx().numpy_helper.from_array(scaled.astype(values.dtype), name))


def with_hard_gates(model: "ModelProto") -> "ModelProto":
    """Return a copy of a network whose SE blocks have a hard sigmoid, clip(x / 6 + 1/2, 0, 1), for a sigmoid.

    Args:
        model: not changed; without local functions.
    """
    copy: ModelProto = onnx().ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    for block in find_blocks(graph):
        gate = graph.before(block.gate_tensor)
        if block.gate == "sigmoid" and gate is not None and gate.op_type == "Sigmoid":
            gate.op_type = "HardSigmoid"
            gate.attribute.extend(onnx().helper.make_attribute(*one) for one in (("alpha", 1 / 6), ("beta", 0.5)))
    return copy


def with_constants(
    model: "ModelProto", blocks: Sequence[GraphBlock], constants: Mapping[str, NDArray[Any]]
) -> "ModelProto":
    """Return a copy of a network that multiplies by constants instead of some gates.

    Args:
        model: not changed; without local functions.
        blocks: of `find_blocks`.
        constants: name of a block → its factors, (C).
    """
    copy: ModelProto = onnx().ModelProto()
    copy.CopyFrom(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    usual = next((kind for kind in types.values() if kind in _FLOATS), onnx().TensorProto.FLOAT)
    for place, block in enumerate(one for one in blocks if one.name in constants):
        name = f"selab_constant_{place}"
        shape = (1, 1, 1, -1) if block.channels_last else (1, -1, 1, 1)
        factors = np.asarray(constants[block.name]).reshape(shape)
        kind = onnx().helper.tensor_dtype_to_np_dtype(usual)
        copy.graph.initializer.append(onnx().numpy_helper.from_array(factors.astype(kind), name))
        for node in copy.graph.node:
            if list(node.output) == list(block.scale.output):
                node.input[:] = [block.x, name]
    kept = alive(list(copy.graph.node), [output.name for output in copy.graph.output])
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy
