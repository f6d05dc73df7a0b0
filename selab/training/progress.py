"""What a running training reports."""

from collections.abc import Callable

from selab.records.types import Frozen
from selab.training.record import Epoch


class TrainingProgress(Frozen, frozen=True, kw_only=True):
    """How far a training is.

    Attributes:
        epoch: the running one, from 1.
        step: finished steps of the epoch's `steps`; all of them while the network is being tested.
        images_per_s: training images, since the last report.
        eta_s: seconds until the end of the training; None while unknown.
        epoch_s: seconds that an epoch takes with its test; None before this process has tested the network.
        loss: mean over the epoch's steps so far.
        last: the last finished epoch.
        total_eta_s: seconds until the end of all trainings of a comparison; None while unknown or with one training.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    images_per_s: float
    eta_s: float | None
    epoch_s: float | None = None
    loss: float
    top1_pct: float
    last: Epoch | None
    total_eta_s: float | None = None


Report = Callable[[TrainingProgress], object]
