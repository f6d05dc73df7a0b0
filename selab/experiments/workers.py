"""Measure for a long time in this process, or for a short time in each of many fresh ones."""

from collections.abc import Callable, Iterator
from random import Random

import msgspec
from torch import nn

from selab import units
from selab.bench.backends import backend, together
from selab.bench.energy import ENERGY_PHASES, EnergyMeter, energy_blocks, energy_meter
from selab.bench.latency import Networks, RawPhase, measure_short, networks, phase_runs
from selab.bench.progress import Progress, Report
from selab.errors import DeviceError, ModelError, OutOfMemoryError
from selab.experiments.children import child
from selab.experiments.job import Job
from selab.models.build import Built, build
from selab.records.energy import summarise
from selab.records.types import Device, Energy, EnergyBlock, Frozen, Phase

# Seconds of a sample of energy, at least and at most; NVML's counter moves every 0.1 s. ABBA blocks in a long run.
_ENERGY_SAMPLE_S: dict[Device, tuple[float, float]] = {"cpu": (0.15, 1.0), "cuda": (0.4, 1.0)}
_ENERGY_BLOCKS = 4


class Failed(Frozen, frozen=True, kw_only=True):
    """A phase without a result: out of memory, or the network fails in it."""

    phase: Phase
    error: str


def build_pair(job: Job) -> tuple[Built, Built]:
    """Build the variant and the baseline of a job, with the same seed."""
    made = [build(one, seed=job.request.seed, input_chw=job.workload.input_chw) for one in job.pair]
    return made[0], made[1]


def raw_runs(
    job: Job, variant: nn.Module, baseline: nn.Module, report: Report, meter: EnergyMeter | None = None
) -> Iterator[RawPhase | Failed | Energy]:
    """Measure every phase of a job in this process. A phase that fails is yielded as `Failed`; the next one is tried.

    Weights, input and the order of the quads come from the request's seed.

    Args:
        job: what to measure.
        variant: the network; it is left unchanged.
        baseline: likewise.
        report: called with what is measured, after every ABBA block.
        meter: also measures the energy of the phases.
    """
    request, workload = job.request, job.workload
    threads = f", {units.counted(workload.threads, 'thread')}" if workload.device == "cpu" else ""
    report(f"preparing{threads}", None)
    names = (request.baseline or f"the baseline of {request.arch}", request.arch)
    done: set[Phase] = set()
    try:
        with networks(baseline, variant, workload, seed=request.seed, names=names) as nets:
            for phase in request.phases:
                try:
                    yield from phase_runs(
                        nets,
                        phase,
                        job.plan.warmed() if done else job.plan,
                        seed=request.seed,
                        cold=request.cold,
                        progress=_of_phase(report, phase, threads),
                    )
                except (ModelError, OutOfMemoryError) as error:
                    yield Failed(phase=phase, error=str(error))
                done.add(phase)
                if meter is not None and phase in ENERGY_PHASES:
                    report(f"energy of {phase.replace('_', '+')}{threads}", None)
                    least_s, most_s = _ENERGY_SAMPLE_S[workload.device]
                    sample_s = min(most_s, max(least_s, job.plan.budget_s / 40))
                    yield spent(nets, phase, job, meter, blocks=_ENERGY_BLOCKS, sample_s=sample_s, seed=request.seed)
    except OutOfMemoryError as error:
        for phase in request.phases:
            if phase not in done:
                yield Failed(phase=phase, error=str(error))


def spent(
    nets: Networks, phase: Phase, job: Job, meter: EnergyMeter, *, blocks: int, sample_s: float, seed: int
) -> Energy:
    """Measure the energy of a phase; what fails is said in the result."""
    found: list[EnergyBlock] = []
    plan, error = job.plan.short(sample_s), ""
    try:
        found.extend(energy_blocks(nets, phase, plan, meter, blocks=blocks, sample_s=sample_s, seed=seed))
    except (ModelError, OutOfMemoryError, DeviceError) as problem:
        error = str(problem)
    return summarise(phase, meter.name, found, batch=nets.workload.batch, error=error)


def _of_phase(report: Report, phase: Phase, threads: str) -> Report:
    name = phase.replace("_", "+")

    def labelled(label: str, state: Progress | None) -> object:
        return report((name if label == phase else f"{name}, {label} run") + threads, state)

    return labelled


class Placed(Frozen, frozen=True, kw_only=True):
    """A short run of a process, or why it has none.

    Attributes:
        threads: of the row.
    """

    threads: int
    raw: RawPhase | None = None
    failed: Failed | None = None
    spent: Energy | None = None


class WorkerJob(Frozen, frozen=True, kw_only=True):
    """The input of a child process.

    Attributes:
        quad_seed: of the order of the quads.
        rows: the number of threads of each.
        seconds: of sampling in a run.
        control: whether a run also measures the baseline against its second instance.
        energy: whether to measure the energy of the first row too.
    """

    job: Job
    quad_seed: int
    rows: tuple[int, ...]
    seconds: float
    control: bool
    energy: bool = False


def short_runs(order: WorkerJob, ready: Callable[[], object]) -> Iterator[Placed]:
    """Measure every phase of a job for a short time, on so many threads as each row says.

    The order in which the networks are built and copied is drawn by the seed, so that they lie elsewhere in memory in
    each process. A phase that fails is yielded as `Failed`.

    Args:
        order: what to measure.
        ready: called when the networks of a row are ready.
    """
    request = order.job.request
    drawn = Random(f"placement {order.quad_seed}")
    pair = list(enumerate(order.job.pair))
    drawn.shuffle(pair)
    built = {place: build(one, seed=request.seed, input_chw=order.job.workload.input_chw) for place, one in pair}
    names = (request.baseline or f"the baseline of {request.arch}", request.arch)
    for threads in order.rows:
        workload = msgspec.structs.replace(order.job.workload, threads=threads)
        try:
            with networks(
                built[1].model, built[0].model, workload, seed=request.seed, names=names, shuffle=order.quad_seed
            ) as nets:
                ready()
                for phases in together(backend(workload.runtime), workload, request.phases):
                    try:
                        raws = measure_short(
                            nets,
                            phases,
                            order.job.plan.short(order.seconds),
                            seed=order.quad_seed,
                            control=order.control,
                            cold=request.cold,
                        )
                    except (ModelError, OutOfMemoryError) as error:
                        for phase in phases:
                            yield Placed(threads=threads, failed=Failed(phase=phase, error=str(error)))
                    else:
                        for raw in raws:
                            yield Placed(threads=threads, raw=raw)
                if order.energy and threads == order.rows[0]:
                    for one in _spent_shortly(order, nets):
                        yield Placed(threads=threads, spent=one)
        except OutOfMemoryError as error:
            for phase in request.phases:
                yield Placed(threads=threads, failed=Failed(phase=phase, error=str(error)))


def _spent_shortly(order: WorkerJob, nets: Networks) -> Iterator[Energy]:
    meter, (least_s, _) = energy_meter(nets.workload.device), _ENERGY_SAMPLE_S[nets.workload.device]
    for phase in order.job.request.phases:
        if phase in ENERGY_PHASES:
            yield spent(nets, phase, order.job, meter, blocks=1, sample_s=least_s, seed=order.quad_seed)


def child_main() -> None:
    """Run the program of a process."""
    child(WorkerJob, short_runs)
