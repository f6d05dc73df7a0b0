"""Measure in this process or in fresh ones; both give raw runs.

A fresh process is `worker_main`. It reads a `WorkerJob` as JSON from its standard input. It writes one
JSON object per line, progress and raw runs, to its standard output.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import msgspec
from torch import nn

from selab import units
from selab.bench.latency import RawPhase, measure_phase, networks
from selab.bench.progress import Progress, Report, prefixed
from selab.errors import ModelError, OutOfMemoryError, SelabError
from selab.experiments.job import Job
from selab.models.build import Built, build
from selab.records.types import Frozen, Phase

# The folder of this package comes last: it is needed only where the package is not installed.
_START = (
    f"import sys; sys.path.append({str(Path(__file__).resolve().parents[2])!r}); "
    "from selab.experiments.workers import worker_main; worker_main()"
)


class Failed(Frozen, frozen=True, kw_only=True):
    """A phase without a result: out of memory, or the network fails in it."""

    phase: Phase
    error: str


def build_pair(job: Job) -> tuple[Built, Built]:
    """Build the variant and the baseline of a job, with the same seed."""
    made = [build(one, seed=job.request.seed, input_chw=job.workload.input_chw) for one in job.pair]
    return made[0], made[1]


def raw_runs(
    job: Job, variant: nn.Module, baseline: nn.Module, report: Report, *, quad_seed: int | None = None
) -> Iterator[RawPhase | Failed]:
    """Measure every phase of a job in this process. A phase that fails is yielded as `Failed`; the next one is tried.

    The weights and the input come from the request's seed. The order of the quads may have a seed of its own, so that
    processes differ in nothing else.
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
                        seed=request.seed if quad_seed is None else quad_seed,
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


class _Line(Frozen, frozen=True, kw_only=True):
    """One line of a child process: progress, a result, or an error."""

    label: str = ""
    blocks: int = 0
    half_width: float | None = None
    elapsed_s: float = 0.0
    budget_s: float = 0.0
    raw: RawPhase | None = None
    failed: Failed | None = None
    error: str = ""


class WorkerJob(Frozen, frozen=True, kw_only=True):
    """The input of a child process: a job, and the seed of the order of its quads."""

    job: Job
    quad_seed: int


def raw_runs_of_children(job: Job, report: Report) -> Iterator[RawPhase | Failed]:
    """Measure as `raw_runs` does, in as many fresh processes as the request names, one after the other."""
    processes = job.request.processes
    for number in range(processes):
        order = WorkerJob(job=job, quad_seed=job.request.seed + number)
        yield from _child(order, prefixed(report, f"process {number + 1} of {processes}"))


def _child(order: WorkerJob, report: Report) -> Iterator[RawPhase | Failed]:
    # Without -P, the current folder would be the first place to import from: a random.py in it would run.
    command = [sys.executable, "-P", "-c", _START]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(order))
        process.stdin.close()
        try:
            for text in process.stdout:
                line = msgspec.json.decode(text, type=_Line)
                if line.error:
                    raise SelabError(line.error)
                if line.raw is not None:
                    yield line.raw
                elif line.failed is not None:
                    yield line.failed
                else:
                    report(line.label, _progress(line))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SelabError(f"a measuring process ended with status {process.returncode}; see its message above")


def _progress(line: _Line) -> Progress | None:
    if not line.budget_s:
        return None
    return Progress(blocks=line.blocks, half_width=line.half_width, elapsed_s=line.elapsed_s, budget_s=line.budget_s)


def worker_main() -> None:
    """Run the child process: read one job, write lines."""
    lines = sys.stdout.buffer

    def write(line: _Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")
        lines.flush()

    def report(label: str, state: Progress | None) -> None:
        if state is None:
            write(_Line(label=label))
        else:
            width, elapsed = state.half_width, state.elapsed_s
            write(_Line(label=label, blocks=state.blocks, half_width=width, elapsed_s=elapsed, budget_s=state.budget_s))

    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerJob)
        # A user's network may print; standard output is for the lines alone.
        with redirect_stdout(sys.stderr):
            first, second = (built.model for built in build_pair(order.job))
            for raw in raw_runs(order.job, first, second, report, quad_seed=order.quad_seed):
                write(_Line(failed=raw) if isinstance(raw, Failed) else _Line(raw=raw))
    except SelabError as error:
        write(_Line(error=str(error)))
    except KeyboardInterrupt:
        sys.exit(1)  # the parent was interrupted as well, and says so


if __name__ == "__main__":
    worker_main()
