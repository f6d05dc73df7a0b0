"""The same network without its SE blocks: each product becomes its map, and what nobody needs any more is left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selab.errors import InsertionError
from selab.graphs.blocks import GraphBlock, find_blocks
from selab.graphs.graph import Graph, alive, captured
from selab.graphs.reading import onnx

if TYPE_CHECKING:
    from onnx import ModelProto


def without_blocks(model: "ModelProto", blocks: Sequence[GraphBlock] | None = None) -> "ModelProto":
    """Return a copy of a network in which these blocks pass their map on.

    Args:
        model: not changed; without local functions.
        blocks: of `find_blocks`; None for all.

    Raises:
        InsertionError: there is none.
    """
    graph = Graph(model)
    chosen = find_blocks(graph) if blocks is None else blocks
    if not chosen:
        raise InsertionError("the network has no SE block: nothing to leave out")
    # A map may itself be the product of an earlier block.
    instead = {block.scale.output[0]: block.x for block in chosen}
    outputs = [output.name for output in model.graph.output]
    copy = onnx().ModelProto()
    copy.CopyFrom(model)
    kept = [node for node in copy.graph.node if not set(node.output) & set(instead)]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = _followed(name, instead)
    kept = alive(kept, [_followed(name, instead) for name in outputs])
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    for name in outputs:
        if name in instead:
            copy.graph.node.append(onnx().helper.make_node("Identity", [_followed(name, instead)], [name]))
    _drop_unused(copy)
    return copy


def _followed(name: str, instead: dict[str, str]) -> str:
    while name in instead:
        name = instead[name]
    return name


def _drop_unused(model: "ModelProto") -> None:
    """Leave out the constants and the remembered shapes that no operator and no output has."""
    graph = model.graph
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    read |= {output.name for output in graph.output}
    made = {name for node in graph.node for name in node.output}
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    shapes = [value for value in graph.value_info if value.name in made]
    gone = {tensor.name for tensor in graph.initializer} - read
    inputs = [value for value in graph.input if value.name not in gone]
    for field, kept in ((graph.initializer, weights), (graph.value_info, shapes), (graph.input, inputs)):
        del field[:]
        field.extend(kept)
