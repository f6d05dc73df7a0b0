"""An ONNX network in the place of a module, so that it is named, counted and measured like any other."""

from typing import TYPE_CHECKING, Any

from torch import nn

from selab.errors import ModelError
from selab.graphs.baseline import without_blocks

if TYPE_CHECKING:
    from onnx import ModelProto


class OnnxNetwork(nn.Module):
    """A network that ONNX Runtime runs. It has no parameters in PyTorch, and no forward pass there.

    Args:
        model: without local functions.
        place: of its file, for messages.
    """

    def __init__(self, model: "ModelProto", place: str) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, *_inputs: object, **_named: object) -> Any:
        """Refuse to run.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.place}: is an ONNX network, which PyTorch does not run; it runs in ONNX Runtime")

    def without_blocks(self) -> "OnnxNetwork":
        """Return the network without its SE blocks.

        Raises:
            InsertionError: it has none.
        """
        return OnnxNetwork(without_blocks(self.model), self.place)
