"""Measure for a long time in this process, or for a short time in each of many fresh ones."""

from collections.abc import Callable, Iterator
from random import Random

import msgspec
from torch import nn

from selab import units
from selab.bench.backends import backend, together
from selab.bench.latency import RawPhase, measure_phase, measure_short, networks
from selab.bench.progress import Progress, Report
from selab.errors import ModelError, OutOfMemoryError
from selab.experiments.children import child
from selab.experiments.job import Job
from selab.models.build import Built, build
from selab.records.types import Frozen, Phase


class Failed(Frozen, frozen=True, kw_only=True):
    """A phase without a result: out of memory, or the network fails in it."""

    phase: Phase
    error: str


def build_pair(job: Job) -> tuple[Built, Built]:
    """Build the variant and the baseline of a job, with the same seed."""
    made = [build(one, seed=job.request.seed, input_chw=job.workload.input_chw) for one in job.pair]
    return made[0], made[1]


def raw_runs(job: Job, variant: nn.Module, baseline: nn.Module, report: Report) -> Iterator[RawPhase | Failed]:
    """Measure every phase of a job in this process. A phase that fails is yielded as `Failed`; the next one is tried.

    Weights, input and the order of the quads come from the request's seed.
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
                    raws = measure_phase(
                        nets,
                        phase,
                        job.plan.warmed() if done else job.plan,
                        seed=request.seed,
                        cold=request.cold,
                        progress=_of_phase(report, phase, threads),
                    )
                except (ModelError, OutOfMemoryError) as error:
                    yield Failed(phase=phase, error=str(error))
                else:
                    yield from raws.values()
                done.add(phase)
    except OutOfMemoryError as error:
        for phase in request.phases:
            if phase not in done:
                yield Failed(phase=phase, error=str(error))


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


class WorkerJob(Frozen, frozen=True, kw_only=True):
    """The input of a child process.

    Attributes:
        quad_seed: of the order of the quads.
        rows: the number of threads of each.
        seconds: of sampling in a run.
        control: whether a run also measures the baseline against its second instance.
    """

    job: Job
    quad_seed: int
    rows: tuple[int, ...]
    seconds: float
    control: bool


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
        except OutOfMemoryError as error:
            for phase in request.phases:
                yield Placed(threads=threads, failed=Failed(phase=phase, error=str(error)))


def child_main() -> None:
    """Run the program of a process."""
    child(WorkerJob, short_runs)
