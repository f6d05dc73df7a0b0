"""Figures of many short processes: each is one sample of where weights and buffers lie in memory."""

from collections.abc import Callable, Sequence

from selab import units
from selab.bench.latency import RawPhase
from selab.bench.runner import mode_of
from selab.experiments.job import Job, Request
from selab.experiments.schedule import Schedule
from selab.experiments.workers import Failed, Placed
from selab.records import estimate, verdict
from selab.records.types import PHASE_NAMES, Estimate, Latency, Phase, Unit, Workload

# Seconds of a whole profile.
_DEFAULT_S, _QUICK_S = 80.0, 27.0

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

    def add(self, placed: Placed) -> None:
        """Keep one short run, or why there is none, and compute the figures anew."""
        found, threads = placed.found, placed.threads
        if isinstance(found, Failed):
            self._errors.setdefault((threads, found.phase), (placed.process, found.error))
            self._show(threads, found.phase, method_of(self._rows[threads][0].workload))
            return
        self._runs.setdefault((threads, found.phase, found.method), {})[placed.process] = found
        self._show(threads, found.phase, found.method)

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
    """Return a figure that is still growing: with its interval from three processes on, else without."""
    found = _estimate(latency)
    if found is not None:
        half = estimate.relative_half_width(found)
        places = units.decimals_for(half)
        low, high = (f"{100 * (bound - 1):.{places}f}" for bound in (found.ratio_low, found.ratio_high))
        return f"{units.percent(found.ratio - 1, decimals=places)} [{low}, {high}]"
    centre = estimate.centre_of(latency.runs, latency.statistic)
    return "…" if centre is None else f"about {units.percent(centre - 1, decimals=0)}"


def schedule_of(request: Request, *, began: float, clock: Callable[[], float], runs: int) -> Schedule:
    """Return when the processes of a request end.

    Args:
        request: how long, how exact, how many processes.
        began: when the command began, by the clock.
        clock: seconds.
        runs: short runs of each process.
    """
    budget_s = request.budget_s or (_QUICK_S if request.quick else _DEFAULT_S)
    return Schedule(end=began + budget_s, runs=runs, processes=request.processes, clock=clock)


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
