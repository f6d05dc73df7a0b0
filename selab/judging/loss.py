"""Accuracy that a change costs, with its interval over the same images; free of torch."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from selab.records.frozen import Frozen

Bools = NDArray[np.bool_]
_NORMAL = NormalDist().inv_cdf(0.975)


class Loss(Frozen, frozen=True, kw_only=True):
    """Accuracy that a change costs, over the same images.

    Attributes:
        images: how many.
        before: correct answers without the change; `after` with it.
        worse: images that were right and are wrong; `better` the reverse.
        points: lost, in percentage points; negative for a gain.
        low: of the 95 % interval; `high` likewise.
    """

    images: int
    before: int
    after: int
    worse: int
    better: int
    points: float
    low: float
    high: float


def loss_of(before: Bools, after: Bools) -> Loss:
    """Return what was lost between two answers to the same images.

    Args:
        before: (N,), whether each answer was right.
        after: (N,), the same with the change.

    Source: Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, 2012.
    """
    images, worse, better = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    one, two = (worse + 1) / (images + 2), (better + 1) / (images + 2)
    middle = one - two
    half = _NORMAL * math.sqrt((one + two - middle**2) / (images + 2))
    return Loss(
        images=images,
        before=int(before.sum()),
        after=int(after.sum()),
        worse=worse,
        better=better,
        points=100 * (worse - better) / images,
        low=100 * (middle - half),
        high=100 * (middle + half),
    )
