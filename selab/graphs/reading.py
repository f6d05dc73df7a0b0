"""Read an ONNX file as data: nothing in it is run, and nothing outside its folder is read."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selab.errors import DeviceError, ModelError, SpecError
from selab.records.files import shown

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# What protobuf can hold in one message.
MOST_BYTES = 2**31 - 1
_STANDARD = {"", "ai.onnx", "ai.onnx.ml"}


def onnx() -> Any:
    """Return the package onnx.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import onnx as package
        import onnx.inliner
        import onnx.reference
        import onnx.shape_inference
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"an ONNX file: needs the package {error.name}, which is not installed; run pip install 'selab[onnx]'"
        ) from None
    return package


def read(path: Path) -> "ModelProto":
    """Return the network in a file, its weights loaded and its local functions written out.

    Args:
        path: of the file; weights beside it must lie in its folder.

    Raises:
        DeviceError: the package onnx is not installed.
        SpecError: no such file, or not an ONNX network; weights that are missing, too short, or outside of the folder;
            operators of a library of their own.
    """
    place, package = shown(path), onnx()
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise SpecError(f"{place}: has {size:,} bytes, an ONNX file at most 2 GiB; keep the weights beside it")
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{place}: cannot be read: {error.strerror}") from None
    if not raw:
        raise SpecError(f"{place}: is empty; name an ONNX file")
    model = package.ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception:
        raise SpecError(f"{place}: is not an ONNX file, or is cut off; name an ONNX file, or copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise SpecError(f"{place}: is not an ONNX network: it has no operators")
    _check_weights(model, path)
    package.load_external_data_for_model(model, str(path.parent))
    model = package.inliner.inline_local_functions(model)
    _check_operators(model, place)
    return model


def _check_weights(model: "ModelProto", path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if not tensor.external_data:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        name = facts.get("location", "")
        what = f"{shown(path)}: the weights of {tensor.name or 'a constant'}"
        file = (folder / name).resolve()
        if not name or not file.is_relative_to(folder):
            raise SpecError(
                f"{what} lie outside of its folder ({shown(name)}), where nothing is read; save it with its weights "
                "beside it"
            )
        if not file.is_file():
            raise SpecError(f"{what} are in {shown(name)}, which is not there; copy it beside the file")
        try:
            needed = int(facts.get("offset") or 0) + int(facts.get("length") or _bytes_of(tensor))
        except ValueError:
            raise SpecError(f"{what}: offset or length is not a number") from None
        if needed > file.stat().st_size:
            raise SpecError(
                f"{what}: {shown(name)} has {file.stat().st_size:,} bytes, {needed:,} are needed; copy it again"
            )


def _bytes_of(tensor: "TensorProto") -> int:
    """Return how many bytes a tensor's values take."""
    kind = onnx().helper.tensor_dtype_to_np_dtype(tensor.data_type)
    size: int = math.prod(tensor.dims) * int(kind.itemsize)
    return size


def _tensors(model: "ModelProto") -> "list[TensorProto]":
    found: list[TensorProto] = []
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        found += graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                found += [attribute.t, *attribute.tensors]
                graphs += [one for one in (attribute.g, *attribute.graphs) if one.node]
    return found


def _check_operators(model: "ModelProto", place: str) -> None:
    own = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in _STANDARD})
    foreign = [name for name in own if not name.startswith("com.microsoft.")]
    if foreign:
        raise SpecError(
            f"{place}: has operators of a library of its own ({', '.join(foreign[:3])}); no such library is loaded; "
            "write it with standard operators"
        )


def image_shape(model: "ModelProto", place: str) -> tuple[str, tuple[int | None, ...]]:
    """Return the name and the shape of the network's only image input; None for a dimension that is free.

    Raises:
        ModelError: there are several inputs, or it has not four dimensions.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise ModelError(f"{place}: has {len(inputs)} inputs ({names}); only networks of one image are measured")
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ModelError(f"{place}: its input {inputs[0].name} has {len(dims)} dimensions; an image has 4 (N, C, H, W)")
    return inputs[0].name, tuple(dim.dim_value if dim.dim_value > 0 else None for dim in dims)
