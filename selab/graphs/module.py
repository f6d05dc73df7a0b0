"""Networks in files in the place of a module, so that they are named, counted and measured like any other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from selab.errors import ModelError
from selab.graphs.baseline import without_blocks
from selab.graphs.reading import image_shape

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

    @property
    def input_name(self) -> str:
        """The name of the image."""
        return image_shape(self.model, self.place)[0]

    def without_blocks(self) -> "OnnxNetwork":
        """Return the network without its SE blocks.

        Raises:
            InsertionError: it has none.
        """
        return OnnxNetwork(without_blocks(self.model), self.place)


class DeployedNetwork(nn.Module):
    """A network that another runtime runs from a file.

    Args:
        path: of the file.
        runtime: that it was written for.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        super().__init__()
        self.path, self.runtime = path, runtime

    @property
    def place(self) -> str:
        """Its file, for messages."""
        return self.path.name

    def forward(self, *_inputs: object, **_named: object) -> Any:
        """Refuse to run.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.place}: is a network for {self.runtime}, which PyTorch does not run")
