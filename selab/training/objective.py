"""What a network is trained for: its loss on a batch, and how a batch is split."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.models.checkpoint import load
from selab.models.spec import Variant
from selab.training.recipe import Recipe
from selab.training.record import task_of

if TYPE_CHECKING:
    from selab.training.data import Data

Forward = Callable[..., Any]


class Objective(Protocol):
    """What a network is trained for.

    Attributes:
        counts_right: whether `loss` counts right answers.
    """

    counts_right: bool

    def prepare(self, model: nn.Module) -> None:
        """Set what the recipe says of the network, before there is an optimizer.

        Raises:
            ModelError: the recipe does not suit the network.
        """
        ...

    def start_from(self, model: nn.Module, weights: Path, variant: Variant, fitted: Variant) -> tuple[str, ...]:
        """Load weights to start from; return the keys that were left out.

        Raises:
            WeightsError: they do not fit.
        """
        ...

    def parts(self, images: Any, targets: Any, count: int) -> Iterator[tuple[Any, Any]]:
        """Yield the micro-batches of a batch, all of one size."""
        ...

    def loss(self, forward: Forward, images: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss over a micro-batch, and how many answers are right.

        Raises:
            ModelError: the network does not return what it must.
        """
        ...


class Classification:
    """One class per image: the cross entropy of the logits."""

    counts_right = True

    def __init__(self, recipe: Recipe, *, channels_last: bool) -> None:
        self._smoothing = recipe.label_smoothing
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, model: nn.Module) -> None:
        """See `Objective.prepare`; nothing is to be set."""

    def start_from(self, model: nn.Module, weights: Path, variant: Variant, fitted: Variant) -> tuple[str, ...]:
        """See `Objective.start_from`; a classifier of another number of classes is left out."""
        return load(model, weights, variant=variant, fitted=fitted, head="drop").dropped

    def parts(self, images: Tensor, targets: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Objective.parts`."""
        yield from zip(images.contiguous(memory_format=self._layout).chunk(count), targets.chunk(count), strict=True)

    def loss(self, forward: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.loss`."""
        logits = forward(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self._smoothing)
        return loss, (logits.detach().argmax(1) == targets).sum()


def objective_of(data: "Data", recipe: Recipe, *, name: str, channels_last: bool) -> Objective:
    """Return what a network is trained for on these data.

    Args:
        data: what to train on.
        recipe: how.
        name: of the network, for messages.
        channels_last: the memory format of batches that are one tensor.
    """
    if task_of(data) == "detection":
        from selab.training.detection import Detection

        return Detection(recipe, name)
    return Classification(recipe, channels_last=channels_last)
