"""Figures of many short processes: each is one sample of where weights and buffers lie in memory."""

from collections.abc import Callable, Sequence

from selab import units
from selab.bench.latency import RawPhase
from selab.bench.runner import mode_of
from selab.experiments.job import Job
from selab.experiments.workers import Placed
from selab.records import estimate, verdict
from selab.records.types import PHASE_NAMES, Estimate, Latency, Phase, Unit, Workload

Keep = Callable[[dict[Phase, Latency], Phase, str, Latency], None]
"""Receives a row, a phase, a method and the figures of all processes so far."""


class Placements:
    """The runs of all processes so far.

    Args:
        rows: the job of each row with the dictionary that its latencies are kept in.
        keep: keeps the figures of a row's phase.
    """

    def __init__(self, *, rows: Sequence[tuple[Job, dict[Phase, Latency]]], keep: Keep) -> None:
        self._rows = {job.workload.threads: (job, into) for job, into in rows}
        self._keep = keep
        self._runs: dict[tuple[int, Phase, str], dict[int, RawPhase]] = {}
        self._errors: dict[tuple[int, Phase], tuple[int, str]] = {}

    def add(self, process: int, placed: Placed) -> None:
        """Keep one short run of a process, or why there is none, and compute the figures anew."""
        threads = placed.threads
        if placed.failed is not None:
            self._errors.setdefault((threads, placed.failed.phase), (process, placed.failed.error))
            self._show(threads, placed.failed.phase, method_of(self._rows[threads][0].workload))
        if placed.raw is not None:
            self._runs.setdefault((threads, placed.raw.phase, placed.raw.method), {})[process] = placed.raw
            self._show(threads, placed.raw.phase, placed.raw.method)

    def drop(self, process: int) -> None:
        """Leave out the runs of a process that died."""
        for key, runs in self._runs.items():
            if runs.pop(process, None) is not None:
                self._show(*key)
        for row, (failed, _) in list(self._errors.items()):
            if failed == process:
                del self._errors[row]

    def _show(self, threads: int, phase: Phase, method: str) -> None:
        job, into = self._rows[threads]
        raws = list(self._runs.get((threads, phase, method), {}).values())
        _, error = self._errors.get((threads, phase), (0, ""))
        self._keep(into, phase, method, summary(phase, method, job, raws, error, unit="process"))

    def words(self) -> str:
        """Return the figures of the first row in a few words: `forward +8.9 % [7.4, 10.4], backward +9 %`."""
        into = next(iter(self._rows.values()))[1]
        return ", ".join(f"{PHASE_NAMES[one.phase]} {so_far(one)}" for one in into.values()) or "measuring"


def _estimate(latency: Latency) -> Estimate | None:
    try:
        return estimate.estimate(latency.runs, latency.statistic, unit=latency.unit)
    except estimate.InsufficientPairsError:
        return None


def so_far(latency: Latency) -> str:
    """Return a figure that is still growing: its interval is that within the processes until there are three."""
    found = _estimate(latency)
    if found is not None:
        return units.change(found.ratio, found.ratio_low, found.ratio_high)
    centre = estimate.centre_of(latency.runs, latency.statistic)
    if centre is None:
        return "…"
    within = estimate.interval_within(latency.runs, latency.statistic)
    if within is None:
        return f"about {units.percent(centre - 1, decimals=0)}"
    return f"about {units.change(centre, *within)}"


def method_of(workload: Workload, *, cold: bool = False) -> str:
    """Return the headline's way of timing."""
    if workload.device == "cpu":
        return "wall"
    return "eager_event" if cold else "eager_wall"


def summary(
    phase: Phase, method: str, job: Job, raws: Sequence[RawPhase], error: str = "", *, unit: Unit = "pair"
) -> Latency:
    """Return the figures of some runs of a job's phase."""
    return verdict.summarise(
        phase=phase,
        method=method,
        statistic=job.plan.statistic,
        threads=job.workload.threads,
        mode=mode_of(phase, job.workload),
        runs=[raw.run for raw in raws],
        controls=[control for raw in raws for control in raw.controls],
        target_half_width=job.plan.target_half_width,
        error=error,
        unit=unit,
    )
