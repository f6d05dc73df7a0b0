"""Detectors: how they are prepared for a training, their loss, and the boxes that they find in test images.

A detector here is what torchvision's are: in train mode it takes a list of images and their boxes and returns a
dictionary of losses; in eval mode it returns `boxes`, `labels` and `scores` of each image.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selab.errors import ModelError
from selab.meta import first_line
from selab.models import catalog, composed
from selab.models.backbones import Backbone
from selab.models.build import build
from selab.models.checkpoint import load, read_state
from selab.models.spec import Variant
from selab.training.precision import COLUMNS, average_precision
from selab.training.recipe import BoxRecipe, Recipe
from selab.training.record import Accuracy
from selab.training.tally import NotFiniteError, Totals, passed, unreadable_in

if TYPE_CHECKING:
    from selab.training.coco import CocoImages
    from selab.training.data import Data

_MOST_BOXES = 100
"""Boxes of an image that COCO's benchmark looks at, those of the highest scores."""
_BODY = "backbone.body"


def configure(model: nn.Module, boxes: BoxRecipe) -> None:
    """Let a detector resize its images, and choose boxes for its second stage, as a recipe says.

    Args:
        model: has a `transform` as torchvision's detectors do; others resize their images themselves.
        boxes: the sizes. SSD makes all images `min_size` high and `max_size` wide.
    """
    transform: Any = getattr(model, "transform", None)
    if transform is not None:
        if getattr(transform, "fixed_size", None) is not None:
            transform.fixed_size = (boxes.max_size, boxes.min_size)
        transform.min_size, transform.max_size = (boxes.min_size,), boxes.max_size
    rpn, heads = getattr(model, "rpn", None), getattr(model, "roi_heads", None)
    if rpn is not None and heads is not None:
        heads.fg_bg_sampler.batch_size_per_image = boxes.sampled
        rpn._post_nms_top_n = {**rpn._post_nms_top_n, "testing": boxes.proposals}


def freeze(model: nn.Module, boxes: BoxRecipe, name: str) -> None:
    """Keep the parts of a detector's backbone as they are that a recipe names.

    Raises:
        ModelError: it has no backbone of this package, or one with fewer feature maps.
    """
    if not boxes.freezes:
        return
    body = _body(model)
    if body is None:
        raise ModelError(
            f"{name}: its {_BODY} is not selab's, so that its stages are not known; use a recipe with "
            "frozen_stages = 0 and frozen_norms = false"
        )
    body.freeze(stages=boxes.frozen_stages, norms=boxes.frozen_norms)


def start_from(model: nn.Module, weights: Path, variant: Variant, fitted: Variant) -> tuple[str, ...]:
    """Load the weights that a training starts from: of the detector, or of the classifier that is its backbone.

    Args:
        model: the detector.
        weights: a file.
        variant: as named.
        fitted: with the data's classes and image size.

    Returns:
        The keys that were left out: the classifier's own layers, or those for another number of classes.

    Raises:
        WeightsError: they do not fit.
    """
    body = _body(model)
    state = read_state(weights)
    if body is None or not composed.is_one(variant) or any(key.startswith("backbone.") for key in state):
        own = model.state_dict()
        others = [key for key in own if key in state and state[key].shape != own[key].shape]
        if not others or any(state[key].shape[1:] != own[key].shape[1:] for key in others):
            return load(model, weights, variant=variant, fitted=fitted).dropped
        # Layers with outputs for each class, of another number of classes.
        return load(model, state | {key: own[key] for key in others}).dropped or tuple(others)
    trunk = msgspec.structs.replace(catalog.find(str(variant.arguments["trunk"])), se=variant.se)
    whole = build(trunk).model
    load(whole, weights, variant=trunk, head="drop")
    values = whole.state_dict()
    body.load_state_dict({key: values[key] for key in body.state_dict()})
    return tuple(key for key in values if key not in body.state_dict() and not key.endswith("num_batches_tracked"))


def _body(model: nn.Module) -> Backbone | None:
    try:
        body = model.get_submodule(_BODY)
    except AttributeError:
        return None
    return body if isinstance(body, Backbone) else None


# ------------------------------------------------------------------------------------------------------------ training
class Detection:
    """Boxes: the sum of a detector's own losses; see `selab.training.objective.Objective`.

    Args:
        recipe: how it is trained.
        name: of the network, for messages.
    """

    counts_right = False

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._boxes = recipe.boxes or BoxRecipe()
        self._name = name

    def prepare(self, model: nn.Module) -> None:
        """See `Objective.prepare`: image sizes, and the parts of the backbone that stay as they are."""
        configure(model, self._boxes)
        freeze(model, self._boxes, self._name)

    def start_from(self, model: nn.Module, weights: Path, variant: Variant, fitted: Variant) -> tuple[str, ...]:
        """See `Objective.start_from`; of a classifier's weights the backbone is loaded."""
        return start_from(model, weights, variant, fitted)

    def parts(self, images: list[Tensor], targets: list[Any], count: int) -> Iterator[tuple[list[Tensor], list[Any]]]:
        """See `Objective.parts`."""
        size = len(images) // count
        for start in range(0, size * count, size):
            yield images[start : start + size], targets[start : start + size]

    def loss(self, forward: Callable[..., Any], images: list[Tensor], targets: list[Any]) -> tuple[Tensor, None]:
        """See `Objective.loss`."""
        expected = "a detector returns a dictionary of losses in train mode, as torchvision's do"
        try:
            losses = forward(images, targets)
        except TypeError as error:
            raise ModelError(f"{self._name}: fails with images and boxes: {first_line(error)}; {expected}") from error
        if not isinstance(losses, Mapping) or not losses:
            raise ModelError(f"{self._name}: returned a {type(losses).__name__}; {expected}")
        return torch.stack([one.sum() for one in losses.values()]).sum(), None


# ---------------------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True, kw_only=True)
class _Totals(Totals):
    tested: tuple[int, ...]
    found: NDArray[np.float64]


class Detections:
    """The boxes that a detector has found in this rank's images; see `selab.training.tally.Tally`.

    Args:
        data: the images and their boxes.
    """

    def __init__(self, data: "Data") -> None:
        self.data: CocoImages = data  # type: ignore[assignment]
        self.images = 0
        self._tested: list[int] = []
        self._found: list[NDArray[np.float64]] = []

    def run(self, network: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """See `Tally.run`: boxes, labels and scores of each image."""
        found = passed(network, images, tuple(images[0].shape), self.data)
        name = type(network).__name__
        parts = ("boxes", "labels", "scores")
        if not isinstance(found, list) or not all(isinstance(one, dict) and set(parts) <= set(one) for one in found):
            raise ModelError(
                f"{name}: returned a {type(found).__name__}, not {', '.join(parts)} of each image; "
                f"{self.data.title} is for detectors, such as faster_rcnn_resnet50_fpn"
            )
        return found

    def add(self, outputs: list[dict[str, Tensor]], labels: Tensor) -> None:
        """See `Tally.add`: boxes of each image, and the numbers of the images in `data.truth`."""
        for index, one in zip(labels.tolist(), outputs, strict=True):
            scores, order = one["scores"].double().sort(descending=True, stable=True)
            best = order[:_MOST_BOXES]
            boxes = one["boxes"].double()[best]
            columns = [
                torch.full((len(best), 1), float(self.data.truth.ids[index]), dtype=torch.float64),
                boxes[:, :2].cpu(),
                (boxes[:, 2:] - boxes[:, :2]).cpu(),
                scores[:_MOST_BOXES, None].cpu(),
                one["labels"][best, None].double().cpu(),
            ]
            self._found.append(torch.cat(columns, dim=1).numpy())
            self._tested.append(index)
        self.images += len(outputs)

    def totals(self) -> _Totals:
        """See `Tally.totals`."""
        found = np.concatenate(self._found) if self._found else np.zeros((0, COLUMNS))
        return _Totals(images=self.images, tested=tuple(self._tested), found=found, **unreadable_in(self.data))

    def result(self, ranks: list[_Totals], skipped: list[str]) -> Accuracy:
        """See `Tally.result`."""
        found = np.concatenate([each.found for each in ranks])
        if not np.isfinite(found).all():
            raise NotFiniteError("boxes or scores of test images are not finite; the training may have diverged")
        tested = np.array(sorted(index for each in ranks for index in each.tested), dtype=np.int64)
        precision = average_precision(self.data.truth.select(tested), self.data.categories, found)
        return Accuracy(
            images=len(tested),
            top1_correct=None,
            top5_correct=None,
            loss=None,
            precision=precision,
            skipped=tuple(skipped),
        )
