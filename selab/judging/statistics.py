"""Statistics of a block's gates in one pass over the images; memory does not grow with their number.

Free of torch, so that gates of any runtime can be looked at.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selab.errors import ModelError, SelabError
from selab.records import stats
from selab.records.frozen import Frozen

Floats = NDArray[np.float64]

LOW, HIGH = 0.05, 0.95
"""A factor below or above is saturated."""
CONSTANT = 0.01
"""A channel whose factors all lie within so much of each other is constant."""
# Groups of images whose differences give the interval, and channels that it is computed from.
_GROUPS = 10
_SAMPLED = 64


class BlockGates(Frozen, frozen=True, kw_only=True):
    """What the gates of a block do.

    Attributes:
        path: of the block.
        images: that were looked at.
        classes: with at least one image; 0 without labels.
        mean: of each channel, over the images.
        deviation: of each channel, over the images.
        lowest: of each channel; `highest` likewise.
        low: share of the images with a factor below 0.05, of each channel; `high`: above 0.95.
        between: share of each channel's variance that lies between the classes, without the part that classes of
            few images show by chance (epsilon squared); None without labels.
        spread: of the block: the root of the channels' mean variance.
        specificity: of the block: the share of the variance of all channels between the classes; None without labels.
        specificity_low: of its 95 % interval, over groups of images; None for too few.
    """

    path: str
    images: int
    classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    between: tuple[float, ...] | None
    spread: float
    specificity: float | None
    specificity_low: float | None
    specificity_high: float | None

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.mean)

    @property
    def constant(self) -> tuple[int, ...]:
        """The channels whose factor is the same for all images, to a hundredth."""
        both = zip(self.lowest, self.highest, strict=True)
        return tuple(place for place, (lowest, highest) in enumerate(both) if highest - lowest < CONSTANT)

    @property
    def dead(self) -> tuple[int, ...]:
        """The channels whose factor is always about zero."""
        both = zip(self.lowest, self.highest, strict=True)
        return tuple(place for place, (low, high) in enumerate(both) if low > -LOW and high < LOW)


class GateStatistics:
    """Sums over the gates of one block, batch after batch.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979;
        epsilon squared: Kelley, An unbiased correlation ratio measure, 1935; interval: the jackknife over groups.

    Args:
        path: of the block.
        channels: of its gate.
        classes: numbers of classes; 0 without labels.
    """

    def __init__(self, path: str, channels: int, *, classes: int = 0) -> None:
        self.path, self.channels, self.classes = path, channels, classes
        self.images = 0
        self._mean = np.zeros(channels)
        self._squares = np.zeros(channels)
        self._lowest = np.full(channels, np.inf)
        self._highest = np.full(channels, -np.inf)
        self._low = np.zeros(channels, np.int64)
        self._high = np.zeros(channels, np.int64)
        self._class_images = np.zeros(classes, np.int64)
        self._class_sums = np.zeros((classes, channels))
        self._sampled = np.linspace(0, channels - 1, min(channels, _SAMPLED)).round().astype(np.int64)
        # Of the sampled channels, about the first batch's mean: sums by group and class, and squares by group.
        self._shift: Floats | None = None
        width = len(self._sampled)
        self._group_images = np.zeros((_GROUPS, classes), np.int64)
        self._group_sums = np.zeros((_GROUPS, classes, width))
        self._group_squares = np.zeros((_GROUPS, width))

    def add(self, gates: NDArray[np.floating], labels: NDArray[np.int64] | None = None) -> None:
        """Take in the gates of a batch.

        Args:
            gates: (N, channels).
            labels: (N,), the numbers of the images' classes; None where the statistics have none.

        Raises:
            ModelError: another number of channels, or a factor that is not finite.
            SelabError: labels are missing or not wanted, not one for each image, or none of the classes.
        """
        values = np.asarray(gates, np.float64)
        if values.ndim != 2 or values.shape[1] != self.channels:
            raise ModelError(f"{self.path}: its gate is {list(values.shape)}, expected (images, {self.channels})")
        if not np.isfinite(values).all():
            raise ModelError(f"{self.path}: its gate holds NaN or infinity")
        if not len(values):
            return
        self._check_labels(labels, len(values))
        number, total = len(values), self.images + len(values)
        mean = values.mean(0)
        gap = mean - self._mean
        self._squares += ((values - mean) ** 2).sum(0) + gap**2 * (self.images * number / total)
        self._mean += gap * (number / total)
        self._lowest = np.minimum(self._lowest, values.min(0))
        self._highest = np.maximum(self._highest, values.max(0))
        self._low += (values < LOW).sum(0)
        self._high += (values > HIGH).sum(0)
        if labels is not None:
            np.add.at(self._class_images, labels, 1)
            np.add.at(self._class_sums, labels, values)
            self._add_to_groups(values[:, self._sampled], labels)
        self.images = total

    def _check_labels(self, labels: NDArray[np.int64] | None, number: int) -> None:
        if (labels is not None) != (self.classes > 0):
            raise SelabError(f"{self.path}: {'labels are missing' if labels is None else 'no labels are wanted'}")
        if labels is None:
            return
        if labels.shape != (number,):
            raise SelabError(f"{self.path}: {labels.size} labels for {number} images")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise SelabError(f"{self.path}: a label is not from 0 to {self.classes - 1}")

    def _add_to_groups(self, values: Floats, labels: NDArray[np.int64]) -> None:
        if self._shift is None:
            self._shift = values.mean(0)
        moved = values - self._shift
        groups = (self.images + np.arange(len(values))) % _GROUPS
        np.add.at(self._group_images, (groups, labels), 1)
        np.add.at(self._group_sums, (groups, labels), moved)
        np.add.at(self._group_squares, groups, moved**2)

    @property
    def images_of_classes(self) -> tuple[int, ...]:
        """The number of images of each class."""
        return tuple(self._class_images.tolist())

    def class_mean(self, label: int) -> tuple[float, ...]:
        """Return the mean gate of a class's images, one factor per channel.

        Raises:
            SelabError: the class has no image.
        """
        if not 0 <= label < self.classes or not self._class_images[label]:
            raise SelabError(f"class {label}: has no image")
        return tuple((self._class_sums[label] / self._class_images[label]).tolist())

    def summary(self) -> BlockGates:
        """Return what was seen so far.

        Raises:
            SelabError: no image was.
        """
        if not self.images:
            raise SelabError(f"{self.path}: no image was looked at")
        variance = self._squares / self.images
        between: tuple[float, ...] | None = None
        specificity = low = high = None
        used = self._class_images > 0
        if self.classes and used.sum() > 1 and self.images > used.sum():
            means = self._class_sums[used] / self._class_images[used, None]
            ours = (self._class_images[used, None] * (means - self._mean) ** 2).sum(0)
            shares = _epsilon_squared(ours, self._squares, self.images, int(used.sum()))
            between = tuple(shares.tolist())
            specificity = float(_epsilon_squared(ours.sum(), self._squares.sum(), self.images, int(used.sum())))
            low, high = self._interval(specificity)
        return BlockGates(
            path=self.path,
            images=self.images,
            classes=int(used.sum()),
            mean=tuple(self._mean.tolist()),
            deviation=tuple(np.sqrt(variance).tolist()),
            lowest=tuple(self._lowest.tolist()),
            highest=tuple(self._highest.tolist()),
            low=tuple((self._low / self.images).tolist()),
            high=tuple((self._high / self.images).tolist()),
            between=between,
            spread=math.sqrt(float(variance.mean())),
            specificity=specificity,
            specificity_low=low,
            specificity_high=high,
        )

    def _interval(self, specificity: float) -> tuple[float | None, float | None]:
        """Return the 95 % interval of the block's share between classes, by leaving out each group of images."""
        counts, sums, squares = self._group_images, self._group_sums, self._group_squares
        found = []
        for one in range(_GROUPS):
            rest = counts.sum(0) - counts[one], sums.sum(0) - sums[one], squares.sum(0) - squares[one]
            share = _share_of_sums(*rest)
            if share is None:
                return None, None
            found.append(share)
        error = (_GROUPS - 1) / math.sqrt(_GROUPS) * stats.sample_deviation(found)
        half = stats.student_quantile(_GROUPS - 1) * error
        return max(0.0, specificity - half), min(1.0, specificity + half)


def _share_of_sums(images: NDArray[np.int64], sums: Floats, squares: Floats) -> float | None:
    """Return the share between classes of all channels; None where it cannot be estimated."""
    used = images > 0
    total, classes = int(images.sum()), int(used.sum())
    if classes < 2 or total <= classes:
        return None
    mean = sums.sum(0) / total
    whole = squares - total * mean**2
    ours = (images[used, None] * (sums[used] / images[used, None] - mean) ** 2).sum(0)
    return float(_epsilon_squared(ours.sum(), whole.sum(), total, classes))


def _epsilon_squared(between: Floats | float, whole: Floats | float, images: int, classes: int) -> Floats:
    """Return (SS_between - (k - 1) MS_within) / SS_total, from 0 on; 0 where nothing varies."""
    between, whole = np.asarray(between, np.float64), np.asarray(whole, np.float64)
    within = np.maximum(whole - between, 0.0) / (images - classes)
    safe = np.where(whole > 0, whole, 1.0)
    return np.where(whole > 0, np.maximum((between - (classes - 1) * within) / safe, 0.0), 0.0)


def ranked(blocks: Sequence[BlockGates]) -> list[BlockGates]:
    """Return blocks by how little their gates vary, those that vary least first."""
    return sorted(blocks, key=lambda block: block.spread)
