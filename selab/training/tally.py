"""What is counted of a network's outputs on test images, by each process and by all together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from selab.errors import ModelError, OutOfMemoryError
from selab.meta import first_line
from selab.training.record import Accuracy

if TYPE_CHECKING:
    from selab.training.data import Data


class NotFiniteError(ModelError):
    """Logits are not finite, and so the loss is not either."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one rank has counted.

    Attributes:
        images: that it has tested.
        unreadable: images that it could not decode.
        skipped: the first of these.
    """

    images: int
    unreadable: int
    skipped: tuple[str, ...]


class Tally(Protocol):
    """What is counted of a network's outputs."""

    images: int

    def run(self, network: nn.Module, images: Any) -> Any:
        """Return a network's outputs for a batch.

        Raises:
            ModelError: it fails, or is not for such data.
            OutOfMemoryError: the device does not hold the batch.
        """
        ...

    def add(self, outputs: Any, labels: Tensor) -> None:
        """Add a batch."""
        ...

    def totals(self) -> Totals:
        """Return what this rank has counted."""
        ...

    def result(self, ranks: list[Any], skipped: list[str]) -> Accuracy:
        """Return the result of all ranks.

        Args:
            ranks: their totals.
            skipped: names of images that could not be decoded.
        """
        ...


def unreadable_in(data: "Data") -> dict[str, Any]:
    """Return the test images that could not be decoded, as `Totals` has them."""
    problems: Any = getattr(data, "problems", None)
    if problems is None:
        return {"unreadable": 0, "skipped": ()}
    names = (*problems.corrupt.first, *problems.truncated.first)
    tested = (name for name in names if not (data.train_size and name.startswith("train")))
    return {"unreadable": problems.unreadable, "skipped": tuple(tested)}


def passed(network: nn.Module, images: Any, shape: tuple[int, ...], data: "Data") -> Any:
    """Return what a network returns for images.

    Args:
        network: as it is to be called.
        images: a batch, or a list.
        shape: of them, for messages.
        data: what they are from.

    Raises:
        ModelError: the forward pass fails.
        OutOfMemoryError: the device does not hold the images.
    """
    try:
        return network(images)
    except Exception as error:
        text = first_line(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            raise OutOfMemoryError(
                f"out of memory with images of shape {shape}: {text}; use a smaller batch"
            ) from error
        raise ModelError(
            f"{type(network).__name__}: forward fails on images of shape {shape}: {text}; they are {data.title}'s: "
            "build the network for these"
        ) from error
