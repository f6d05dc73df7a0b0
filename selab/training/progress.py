"""What a running training reports."""

from collections.abc import Callable

from selab.records.types import Frozen
from selab.training.record import Epoch

# Images per second below which decimals say something.
_FEW = 10


class TrainingProgress(Frozen, frozen=True, kw_only=True):
    """How far a training is.

    Attributes:
        epoch: the running one, from 1.
        step: finished steps of the epoch's `steps`; all of them while the network is being tested.
        images_per_s: training images, since the last report.
        eta_s: seconds until the end of the training; None while unknown.
        epoch_s: seconds that an epoch takes with its test; None before this process has tested the network.
        loss: mean over the epoch's steps so far.
        top1_pct: the same; None for a detector.
        last: the last finished epoch.
        judged: what its test was on: `test` images, or those that were held back from training.
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
    top1_pct: float | None
    last: Epoch | None
    judged: str = "test"
    total_eta_s: float | None = None

    @property
    def words(self) -> str:
        """`epoch 2 of 4, step 3 of 78, loss 1.2500, top-1 45.0 %, 900 images/s, 2 min left`, for a line of a log."""
        last = "" if self.last is None else f"; {self.judged} {self.last.score_words}"
        left = f", {self.left}" if self.left else ""
        top1 = "" if self.top1_pct is None else f"top-1 {self.top1_pct:.1f} %, "
        return (
            f"epoch {self.epoch} of {self.epochs}, step {self.step} of {self.steps}, loss {self.loss:.4f}, "
            f"{top1}{_per_second(self.images_per_s)}{left}{last}"
        )

    @property
    def short_words(self) -> str:
        """`epoch 2/4  900 images/s  2 min left  loss 1.25  top-1 45.0 %`, for beside a bar."""
        last = "" if self.last is None else f", {self.judged} {self.last.score_pct:.1f} %"
        left = f"{self.left}  " if self.left else ""
        top1 = "" if self.top1_pct is None else f"  top-1 {self.top1_pct:.1f} %"
        return (
            f"epoch {self.epoch}/{self.epochs}  {_per_second(self.images_per_s)}  {left}"
            f"loss {self.loss:.2f}{top1}{last}"
        )

    @property
    def left(self) -> str:
        """`2 min left`, `2 min left, 1 h 37 min for all` among several trainings; empty while unknown."""
        if self.eta_s is None:
            return ""
        for_all = "" if self.total_eta_s is None else f", {duration(self.total_eta_s)} for all"
        return f"{duration(self.eta_s)} left{for_all}"


def _per_second(images: float) -> str:
    """Return `900 images/s`, with decimals where a second has few."""
    return f"{images:,.0f} images/s" if images >= _FEW else f"{images:.2g} images/s"


Report = Callable[[TrainingProgress], object]


def duration(seconds: float) -> str:
    """Return `12 min` or `1 h 37 min`."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
