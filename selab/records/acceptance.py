"""Records of acceptance measurements."""

from typing import Literal

from selab.records.types import Flag, Frozen, Latency, Machine, VerdictKind


class LiveAcceptance(Frozen, frozen=True, kw_only=True):
    """A network against itself, and against itself slowed down, measured live on one machine.

    Attributes:
        median_error: of |ratio - 1| where the truth is one, and its 95th percentile.
        intervals_holding_one: of `trials`.
        slower_by_calibration: by how much the second kind was slowed down, as timed apart.
        slower_detected: trials of `slower_trials` whose verdict was `slower`.
        same: ratio, low and high of each trial of the first kind.
        slowed: of the second kind, with the noise floor and the verdict.
    """

    kind: Literal["aa"]
    machine: Machine
    arch: str
    trials: int
    seconds_per_trial: float
    median_error: float
    p95_error: float
    intervals_holding_one: int
    slower_by_calibration: float
    slower_detected: int
    slower_trials: int
    flags: tuple[Flag, ...]
    same: tuple[tuple[float, float, float], ...]
    slowed: tuple[tuple[float | None, float | None, float | None, float | None, VerdictKind], ...]


class CountingTime(Frozen, frozen=True, kw_only=True):
    """Latency of other counters against selab's at batch 1, by their names."""

    kind: Literal["counting"]
    arch: str
    machine: Machine
    comparisons: dict[str, Latency]


class LoadingTime(Frozen, frozen=True, kw_only=True):
    """Latency of torchvision's pipeline against selab's, by name: batches alone, and whole training steps.

    Attributes:
        arch: the trained network.
        images_per_call: images in one sample, by comparison.
        torchvision: its version.
    """

    kind: Literal["loading"]
    arch: str
    batch: int
    data: dict[str, str]
    images_per_call: dict[str, int]
    machine: Machine
    torchvision: str
    flags: tuple[Flag, ...]
    comparisons: dict[str, Latency]


class Distance(Frozen, frozen=True, kw_only=True):
    """The time of a network and the sum of its operators' least times."""

    name: str
    least_s: float
    whole_s: float

    @property
    def factor(self) -> float:
        """Measured over predicted."""
        return self.whole_s / self.least_s


class RoofDistances(Frozen, frozen=True, kw_only=True):
    """The accuracy of a prediction by the roofline alone: every network's time over its least time.

    Attributes:
        place: the processor and its threads.
        flops_per_s: the measured peak of matrix products, fp32.
        bandwidths: (bytes moved, bytes per second) of measured copies.
        failed: networks that could not be run.
    """

    kind: Literal["roofline"] = "roofline"
    machine: Machine
    place: str
    flops_per_s: float
    bandwidths: tuple[tuple[int, float], ...]
    networks: tuple[Distance, ...]
    failed: int


class Acceptance(Frozen, frozen=True, kw_only=True):
    """Results of the measurements of selab itself on one machine.

    Attributes:
        live: by `nox -s aa`.
        counting: by `nox -s bench_counts` and `nox -s bench_tables`.
        loading: by `nox -s bench_data`.
        roof: by `selab roofline --all`.
    """

    live: LiveAcceptance | None
    counting: tuple[CountingTime, ...]
    loading: LoadingTime | None
    roof: RoofDistances | None
