"""The graph of an ONNX network: who makes and who reads a tensor, and which ones are constant."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from selab.graphs.reading import onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Operators that return what they were given, in another shape, order or type.
RESHAPING = frozenset(
    {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Dropout"}
)


class Graph:
    """A network for looking things up; the model is not changed.

    Args:
        model: without local functions.
    """

    def __init__(self, model: "ModelProto") -> None:
        self.model = model
        self.nodes: Sequence[NodeProto] = list(model.graph.node)
        self.makers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def tensors(self) -> "dict[str, TensorProto]":
        """The constants that are written down: initializers, and the outputs of Constant."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        found[node.output[0]] = attribute.t
        return found

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor does not depend on the input."""
        return not name or name in self.tensors or name in self._computed

    @cached_property
    def _computed(self) -> set[str]:
        """The tensors that operators make of constants alone; an ONNX file has its operators in order."""
        found: set[str] = set()
        for node in self.nodes:
            inputs = [name for name in node.input if name]
            if node.op_type == "Constant" or (inputs and all(one in self.tensors or one in found for one in inputs)):
                found.update(node.output)
        return found

    def data_inputs(self, node: "NodeProto") -> list[str]:
        """Return the inputs of a node that depend on the network's input."""
        return [name for name in node.input if name and not self.is_constant(name)]

    def constant(self, name: str) -> "TensorProto | None":
        """Return a constant as it is written down, perhaps reshaped or cast behind that; None for other tensors."""
        return self.tensors.get(self.source(name))

    def written(self, name: str) -> Any:
        """Return the values of a constant that is written down; None for other tensors."""
        tensor = self.constant(name)
        return None if tensor is None else onnx().numpy_helper.to_array(tensor)

    def scalar(self, name: str) -> float | None:
        """Return a constant of one element as a number; None for anything else."""
        values = self.written(name)
        return float(values.reshape(-1)[0]) if values is not None and values.size == 1 else None

    def source(self, name: str) -> str:
        """Return the tensor that this one is, but for shape, order and type."""
        while (maker := self.makers.get(name)) is not None and maker.op_type in RESHAPING:
            name = maker.input[0]
        return name

    def before(self, name: str) -> "NodeProto | None":
        """Return the operator that computes a tensor, but for shape, order and type; None for an input."""
        return self.makers.get(self.source(name))


def attribute(node: "NodeProto", name: str, default: Any = None) -> Any:
    """Return an attribute of a node, as a Python value."""
    for one in node.attribute:
        if one.name == name:
            return onnx().helper.get_attribute_value(one)
    return default


def dimensions(tensor: "TensorProto | None") -> tuple[int, ...]:
    """Return the shape of a constant; empty for one that is not written down."""
    return () if tensor is None else tuple(tensor.dims)


def axes_of(graph: Graph, node: "NodeProto") -> list[int] | None:
    """Return the axes of a reduction: an attribute, or from opset 18 on an input; None for all, or unknown ones."""
    given = attribute(node, "axes")
    if given is None and len(node.input) > 1 and node.input[1]:
        values = graph.written(node.input[1])
        given = None if values is None else np.atleast_1d(values).tolist()
    return None if given is None else [int(axis) for axis in given]


def alive(among: "Sequence[NodeProto]", outputs: Sequence[str]) -> "list[NodeProto]":
    """Return the nodes that these outputs need, in the order of the network."""
    needed = set(outputs)
    nodes: list[NodeProto] = []
    for node in reversed(among):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input) | set(captured(node))
    return nodes[::-1]


def captured(node: "NodeProto") -> Iterator[str]:
    """Yield the tensors that the bodies of a node's branches and loops read from outside."""
    for one in node.attribute:
        for body in (one.g, *one.graphs):
            for inner in body.node:
                yield from inner.input
                yield from captured(inner)
            yield from (output.name for output in body.output)
