"""Read the gates of an ONNX network's SE blocks while it runs in ONNX Runtime."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from selab.errors import DeviceError, InsertionError, ModelError, one_line
from selab.graphs.blocks import GraphBlock, find_blocks
from selab.graphs.graph import Graph
from selab.graphs.reading import image_shape, onnx

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[np.float32]
# Only errors: warnings go to standard error, one for each node.
_ERRORS = 3


def with_gates(model: "ModelProto", blocks: Sequence[GraphBlock]) -> "ModelProto":
    """Return a copy of a network that returns the gates of these blocks after its own outputs, in their order.

    Args:
        model: not changed; without local functions.
        blocks: of `find_blocks`. Gates that blocks share are returned for each.
    """
    copy: ModelProto = onnx().ModelProto()
    copy.CopyFrom(model)
    helper = onnx().helper
    for place, block in enumerate(blocks):
        # Under a name of its own: a gate may be an output already, or that of two blocks.
        name = f"selab_gate_{place}"
        copy.graph.node.append(helper.make_node("Identity", [block.gate_tensor], [name]))
        copy.graph.output.append(helper.make_tensor_value_info(name, onnx().TensorProto.FLOAT, None))
    return copy


def blocks_in(model: "ModelProto", place: str) -> list[GraphBlock]:
    """Return the SE blocks of a network.

    Raises:
        InsertionError: there is none.
    """
    blocks = find_blocks(Graph(model))
    if not blocks:
        raise InsertionError(
            f"{place}: has no SE block: a mean over the map, layers, a sigmoid or hard sigmoid, a product"
        )
    return list(blocks)


def gates_of(model: "ModelProto", images: Iterable[Array], *, place: str) -> Iterator[tuple[Array, list[Array]]]:
    """Run a network on batches of images; yield its first output, and the gate of each SE block.

    Args:
        model: without local functions.
        images: (N, C, H, W) each.
        place: of its file, for messages.

    Yields:
        The output, and for each block of `find_blocks` its factors, (N, channels).

    Raises:
        DeviceError: the package onnxruntime is not installed.
        InsertionError: there is no SE block.
        ModelError: the network does not run, or a gate is not finite or has not one factor per channel.
    """
    blocks = blocks_in(model, place)
    session = session_of(with_gates(model, blocks), place)
    name, _ = image_shape(model, place)
    for image in images:
        try:
            found = session.run(None, {name: image})
        except Exception as error:
            shape = "x".join(map(str, image.shape))
            raise ModelError(
                f"{place}: ONNX Runtime fails on images of {shape}; give their size: --input, or --crop for a folder "
                f"of classes ({one_line(error)})"
            ) from error
        gates = [
            _factors(gate, block, len(image), place) for gate, block in zip(found[-len(blocks) :], blocks, strict=True)
        ]
        yield found[0], gates


def session_of(model: "ModelProto", place: str) -> Any:
    """Return a session of ONNX Runtime on the CPU.

    Raises:
        DeviceError: the package onnxruntime is not installed.
        ModelError: it does not take the network.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise DeviceError(f"{place}: needs the package onnxruntime; run pip install 'selab[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"{place}: ONNX Runtime fails: {one_line(error)}") from error


def _factors(gate: Array, block: GraphBlock, number: int, place: str) -> Array:
    """Return a gate as (N, channels): exporters leave ones in its shape, in front or behind."""
    if gate.size % number or (block.channels is not None and gate.size != number * block.channels):
        raise ModelError(
            f"{place}: the gate of {block.name} is {list(gate.shape)} for {number} images: not one per channel"
        )
    factors = gate.reshape(number, -1)
    if not np.isfinite(factors).all():
        raise ModelError(f"{place}: the gate of {block.name} holds NaN or infinity")
    return factors
