"""The shapes of an ONNX network's tensors for one size of the input, also behind operators that compute with shapes."""

from typing import TYPE_CHECKING, Any

from selab.errors import ModelError, one_line
from selab.graphs.graph import Graph
from selab.graphs.reading import image_shape, onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Shape = tuple[int, ...]
# A computation with shapes has few numbers; more are weights.
_MOST_NUMBERS = 256
# Each round goes one Reshape further; a network has seldom more than some of them behind each other.
_MOST_ROUNDS = 50


def with_shapes(model: "ModelProto", image: Shape, place: str) -> "ModelProto":
    """Return a copy whose input has this size and whose tensors have the shapes that follow.

    Args:
        model: without local functions; not changed.
        image: (N, C, H, W).
        place: of the network, for messages.

    Raises:
        ModelError: the input is no image, or has another fixed size; the network's shapes contradict each other.
    """
    copy = _of_size(model, image, place)
    for _ in range(_MOST_ROUNDS):
        try:
            copy = onnx().shape_inference.infer_shapes(copy, strict_mode=False, data_prop=True)
        except Exception as error:
            raise ModelError(f"{place}: its shapes cannot be inferred: {one_line(error)}") from None
        if not _fold(copy):
            break
    return copy


def _of_size(model: "ModelProto", image: Shape, place: str) -> "ModelProto":
    name, own = image_shape(model, place)
    wrong = [axis for axis, (given, wanted) in enumerate(zip(own, image, strict=True)) if given not in (None, wanted)]
    if wrong:
        shown = "x".join("?" if size is None else str(size) for size in own)
        raise ModelError(f"{place}: its input is {shown}, not {'x'.join(map(str, image))}; only the ? may be chosen")
    copy: ModelProto = onnx().ModelProto()
    copy.CopyFrom(model)
    for given in copy.graph.input:
        if given.name == name:
            for dim, size in zip(given.type.tensor_type.shape.dim, image, strict=True):
                dim.ClearField("dim_param")
                dim.dim_value = size
    # What the exporter remembered may be of another size.
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    return copy


def known_shapes(model: "ModelProto") -> dict[str, Shape]:
    """Return the shapes that are known in full, by the tensor's name."""
    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        if kind.HasField("shape") and all(size >= 0 for size in dims):
            found[value.name] = dims
    return found


def _fold(model: "ModelProto") -> bool:
    """Replace operators whose result follows from shapes by constants; return whether there were some."""
    graph, shapes = Graph(model), known_shapes(model)
    numbers = {name: value for name in graph.tensors if (value := _few(graph, name)) is not None}
    folded: dict[str, Any] = {}
    for node in graph.nodes:
        result = _result(node, shapes, numbers)
        if result is not None:
            numbers[node.output[0]] = folded[node.output[0]] = result
    if not folded:
        return False
    helper, numpy_helper = onnx().helper, onnx().numpy_helper
    for place, node in enumerate(model.graph.node):
        if node.output[0] in folded:
            value = numpy_helper.from_array(folded[node.output[0]])
            model.graph.node[place].CopyFrom(helper.make_node("Constant", [], [node.output[0]], value=value))
    return True


def _few(graph: Graph, name: str) -> Any:
    tensor = graph.tensors[name]
    elements = 1
    for size in tensor.dims:
        elements *= size
    return onnx().numpy_helper.to_array(tensor) if elements <= _MOST_NUMBERS else None


def _result(node: "NodeProto", shapes: dict[str, Shape], numbers: dict[str, Any]) -> Any:
    """Return the value of an operator on known numbers; None where it is none, or not known."""
    if node.op_type == "Constant" or len(node.output) != 1:
        return None
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        # As an input, a tensor of that shape without memory: the operator may return a part of it.
        inputs = None if shape is None else {node.input[0]: _empty(shape)}
    else:
        inputs = {name: numbers[name] for name in node.input if name in numbers}
        if not node.input or len(inputs) != len({name for name in node.input if name}):
            return None
    if inputs is None:
        return None
    try:
        (value,) = onnx().reference.ReferenceEvaluator(node).run(None, inputs)
    except Exception:
        return None  # no such operator in the evaluator: the shape stays unknown, and the operator is listed
    return value if getattr(value, "size", _MOST_NUMBERS + 1) <= _MOST_NUMBERS else None


def _empty(shape: Shape) -> Any:
    import numpy as np

    return np.broadcast_to(np.zeros((), np.float32), shape)
