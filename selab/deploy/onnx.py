"""Write networks as ONNX, as PyTorch's own exporter spells them, in fp32 or quantised by ONNX Runtime's tools."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selab.deploy.spelling import Spelling
from selab.deploy.target import REPLACE, Order, Partitions, counted, exporting, muted, needed, place_of, quiet, scratch
from selab.errors import ModelError, one_line
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.graphs.reading import onnx, read
from selab.graphs.shapes import with_shapes
from selab.meta import evaluating
from selab.records.files import write_atomically

if TYPE_CHECKING:
    from onnx import ModelProto

_OPSET = 18
# The first one whose DequantizeLinear is per channel.
_INT8_OPSET = 13
_REORDERS = frozenset({"ReorderInput", "ReorderOutput"})
_SILENT = 4


def export_onnx(model: nn.Module, image: tuple[int, ...], path: Path, *, name: str) -> None:
    """Write a network of one image as an ONNX file, in eval mode and with its weights inside.

    Args:
        model: its mode is restored.
        image: (N, C, H, W) of the input.
        path: of the file; it is written as a whole or not at all.
        name: of the network, for messages.

    Raises:
        DeviceError: the package onnx is not installed.
        ModelError: PyTorch cannot export it, or it is larger than a file can hold.
        RecordError: the file cannot be written.
    """
    onnx()
    written = io.BytesIO()
    try:
        with evaluating(model), quiet(), muted():
            # The exporter by tracing takes a file object, which its annotation forgets.
            to: Any = written
            torch.onnx.export(model, (torch.zeros(image),), to, dynamo=False, opset_version=_OPSET, input_names=["x"])
    except Exception as error:
        where = place_of(model, torch.zeros(image), error)
        raise ModelError(f"{name}: cannot be exported to ONNX{where}: {one_line(error)}; {REPLACE}") from error
    write_atomically(path, written.getvalue())


def onnx_of(order: Order) -> "ModelProto":
    """Return the network of an order in fp32, with its shapes fixed.

    Raises:
        DeviceError: the package onnx is not installed.
        ModelError: PyTorch cannot export it.
    """
    if isinstance(order.model, OnnxNetwork):
        model = with_shapes(order.model.model, order.image, order.name)
        if order.precision == "int8":
            model = _with_opset(model, _INT8_OPSET, order.name)
    else:
        with scratch() as folder:
            export_onnx(order.model, order.image, folder / "network.onnx", name=order.name)
            model = read(folder / "network.onnx")
    for place, node in enumerate(model.graph.node):
        # What is left in fp32 is said by name.
        node.name = node.name or f"{node.op_type}_{place}"
    return model


def _with_opset(model: "ModelProto", least: int, name: str) -> "ModelProto":
    """Return a network of an opset that int8 has, converted by onnx's own tool where it is older.

    Raises:
        ModelError: it cannot be converted.
    """
    own = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), least)
    if own >= least:
        return model
    try:
        import onnx.version_converter

        return onnx.version_converter.convert_version(model, least)
    except Exception as error:
        raise ModelError(
            f"{name}: has opset {own}, int8 needs {least}, and onnx cannot convert it ({one_line(error)}); write it "
            f"anew with opset {least} or later, or use --runtime openvino"
        ) from error


def block_operators(model: "ModelProto") -> list[str]:
    """Return the names of all operators of the network's SE blocks, from the squeeze to the product."""
    blocks = find_blocks(Graph(model))
    nodes = [node for block in blocks for node in (block.squeeze, *block.inner, block.scale)]
    return [node.name for node in nodes if node.name]


class OnnxTarget:
    """ONNX Runtime on a CPU.

    int8 is static, per channel, in QDQ form, with unsigned activations and signed weights: on x86 these products have
    kernels that signed activations do not have.
    """

    name = "onnxruntime"
    suffix = ".onnx"
    spelling = Spelling(squeeze="pool", layers="conv")

    def write(self, order: Order) -> None:
        """Write the file; see `Target.write`."""
        model = onnx_of(order)
        if order.precision == "fp32":
            write_atomically(order.path, model.SerializeToString())
            return
        with exporting(order, self.name), scratch() as folder:
            write_atomically(order.path, _quantised(model, order, folder))

    def partitions(self, path: Path) -> Partitions:
        """Return the operators after ONNX Runtime's optimisations, and its changes between NCHW and NCHWc."""
        with needed(self.name):
            import onnxruntime
        with scratch() as folder:
            optimised = folder / "optimised.onnx"
            options = onnxruntime.SessionOptions()
            options.log_severity_level = _SILENT
            options.optimized_model_filepath = str(optimised)
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            nodes = onnx().load(str(optimised)).graph.node
        kinds = counted([node.op_type for node in nodes])
        return Partitions(reorders=sum(kinds.get(name, 0) for name in _REORDERS), operators=kinds)


def _quantised(model: "ModelProto", order: Order, folder: Path) -> bytes:
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Its tools make sessions of their own, which tell of every initializer that they remove.
    onnxruntime.set_default_logger_severity(_SILENT)
    kept = [] if order.float_blocks is None else block_operators(model)
    prepared, written = folder / "prepared.onnx", folder / "int8.onnx"
    # Symbolic inference is for networks of free shapes; these are fixed.
    given = folder / "given.onnx"
    given.write_bytes(model.SerializeToString())
    quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(written),
        _Images(order),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
    )
    return written.read_bytes()


class _Images:
    """The images for calibration, as ONNX Runtime reads them."""

    def __init__(self, order: Order) -> None:
        model = order.model
        self._name = model.input_name if isinstance(model, OnnxNetwork) else "x"
        self._left = iter(order.images)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next image by the name of the input; None after the last."""
        image = next(self._left, None)
        return None if image is None else {self._name: image.numpy()}


TARGET = OnnxTarget()
