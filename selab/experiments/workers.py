"""Measuring in this process or in fresh ones; both give raw runs.

A fresh process is this module run as a program: it reads an order as JSON from its standard input and writes one JSON
object per line, progress and raw runs, to its standard output.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import msgspec
from torch import nn

from selab.bench.latency import RawPhase, measure_phase, networks
from selab.bench.sampler import Progress
from selab.errors import ModelError, OutOfMemoryError, SelabError
from selab.experiments.job import Request, pair, plan_of
from selab.models.build import Built, build
from selab.models.spec import Variant
from selab.records.types import Frozen, Phase, Workload

Report = Callable[[str, Progress | None], object]


class Failed(Frozen, frozen=True, kw_only=True):
    """A phase that cannot run: the memory does not hold it, or the network fails in it."""

    phase: Phase
    error: str


def build_pair(request: Request, workload: Workload, variant: Variant, baseline: Variant) -> tuple[Built, Built]:
    """Both networks of a request, with the same seed."""
    made = [build(one, seed=request.seed, input_chw=workload.input_chw) for one in (variant, baseline)]
    return made[0], made[1]


def raw_runs(
    request: Request,
    workload: Workload,
    variant: nn.Module,
    baseline: nn.Module,
    report: Report,
    *,
    quad_seed: int | None = None,
) -> Iterator[RawPhase | Failed]:
    """Measures every phase in this process; a phase that cannot run is told and the next one is tried.

    The weights and the input come from the request's seed; the order of the quads may have its own, so that processes
    differ in nothing else.
    """
    plan = plan_of(request, workload)
    threads = f", {workload.threads} thread{'s' if workload.threads > 1 else ''}" if workload.device == "cpu" else ""
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
                        plan,
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
        return report((name if label == phase else f"{name} ({label})") + threads, state)

    return labelled


class _Line(Frozen, frozen=True, kw_only=True):
    """One line that a child process writes: progress, a result, or why it ended."""

    label: str = ""
    quads: int = 0
    half_width: float | None = None
    elapsed_s: float = 0.0
    budget_s: float = 0.0
    raw: RawPhase | None = None
    failed: Failed | None = None
    error: str = ""


class WorkerJob(Frozen, frozen=True, kw_only=True):
    """What a child process is asked."""

    request: Request
    workload: Workload
    quad_seed: int


def raw_runs_of_children(request: Request, workload: Workload, report: Report) -> Iterator[RawPhase | Failed]:
    """The same from as many fresh processes as the request asks for, one after the other."""
    for number in range(request.processes):
        order = WorkerJob(request=request, workload=workload, quad_seed=request.seed + number)
        yield from _child(order, _of_process(report, number + 1, request.processes))


def _of_process(report: Report, number: int, processes: int) -> Report:
    return lambda label, state: report(f"process {number} of {processes}: {label}", state)


def _child(order: WorkerJob, report: Report) -> Iterator[RawPhase | Failed]:
    command = [sys.executable, "-m", "selab.experiments.workers"]
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
    return Progress(quads=line.quads, half_width=line.half_width, elapsed_s=line.elapsed_s, budget_s=line.budget_s)


def worker_main() -> None:
    """The child: one order in, lines out."""
    lines = sys.stdout.buffer

    def write(line: _Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")
        lines.flush()

    def report(label: str, state: Progress | None) -> None:
        if state is None:
            write(_Line(label=label))
        else:
            width, elapsed = state.half_width, state.elapsed_s
            write(_Line(label=label, quads=state.quads, half_width=width, elapsed_s=elapsed, budget_s=state.budget_s))

    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerJob)
        variant, baseline = pair(order.request)
        # What a user's network prints is none of the lines.
        with redirect_stdout(sys.stderr):
            first, second = (built.model for built in build_pair(order.request, order.workload, variant, baseline))
            for raw in raw_runs(order.request, order.workload, first, second, report, quad_seed=order.quad_seed):
                write(_Line(failed=raw) if isinstance(raw, Failed) else _Line(raw=raw))
    except SelabError as error:
        write(_Line(error=str(error)))
    except KeyboardInterrupt:
        sys.exit(1)  # the parent was interrupted as well, and is_rank_zero


if __name__ == "__main__":
    worker_main()
