"""Measure for a long time in this process, or for a short time in each of many fresh ones.

A fresh process is `worker_main`. It reads a `WorkerJob` as JSON from its standard input. It writes one JSON object per
line, its raw runs, to its standard output.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import IO, Any

import msgspec
from torch import nn

from selab import units
from selab.bench.latency import RawPhase, measure_phase, measure_short, networks
from selab.bench.progress import Progress, Report
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
    """A short run of one process, or why it has none.

    Attributes:
        process: its number, from 0.
        threads: of the row.
    """

    process: int
    threads: int
    found: RawPhase | Failed


class Ended(Frozen, frozen=True, kw_only=True):
    """The end of a process of short runs.

    Attributes:
        process: its number, from 0.
        died: why its runs must not count; empty if it ended well.
        ready_s: from its start to its first run.
        elapsed_s: from its start to its end.
    """

    process: int
    died: str = ""
    ready_s: float = 0.0
    elapsed_s: float = 0.0


class _Line(Frozen, frozen=True, kw_only=True):
    """One line of a child process: a result with the threads of its row, that the networks are ready, or an error."""

    threads: int = 0
    raw: RawPhase | None = None
    failed: Failed | None = None
    ready: bool = False
    error: str = ""


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


def short_runs(order: WorkerJob, ready: Callable[[], object]) -> Iterator[tuple[int, RawPhase | Failed]]:
    """Measure every phase of a job for a short time, on so many threads as each row says; yield the row's threads.

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
                for phase in request.phases:
                    try:
                        raws = measure_short(
                            nets,
                            phase,
                            order.job.plan.short(order.seconds),
                            seed=order.quad_seed,
                            control=order.control,
                            cold=request.cold,
                        )
                    except (ModelError, OutOfMemoryError) as error:
                        yield threads, Failed(phase=phase, error=str(error))
                    else:
                        for raw in raws.values():
                            yield threads, raw
        except OutOfMemoryError as error:
            for phase in request.phases:
                yield threads, Failed(phase=phase, error=str(error))


def short_runs_of_child(order: WorkerJob, process: int, clock: Callable[[], float]) -> Iterator[Placed | Ended]:
    """Measure as `short_runs` does in a fresh process; its end is yielded last, also where it died.

    Args:
        order: what the process does.
        process: its number, from 0.
        clock: seconds.

    Raises:
        SelabError: the networks cannot be measured at all.
    """
    began = clock()
    ready_s: float | None = None
    try:
        for line in _lines_of_child(order):
            found = line.raw or line.failed
            if found is not None:
                yield Placed(process=process, threads=line.threads, found=found)
            elif line.ready and ready_s is None:
                ready_s = clock() - began
    except _DiedError as error:
        yield Ended(process=process, died=str(error), elapsed_s=clock() - began)
    else:
        yield Ended(process=process, ready_s=ready_s or 0.0, elapsed_s=clock() - began)


class _DiedError(SelabError):
    """A measuring process ended before its work was done."""


def _lines_of_child(order: WorkerJob) -> Iterator[_Line]:
    """Start a process and yield its lines.

    Raises:
        SelabError: it says why it cannot measure.
        _DiedError: it ended otherwise.
    """
    # Without -P, the current folder would be the first place to import from: a random.py in it would run.
    command = [sys.executable, "-P", "-c", _START]
    with ExitStack() as ended:
        with _signals_postponed():
            process = ended.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            ended.push(lambda kind, *_: process.terminate() if kind is not None else None)
        assert process.stdin is not None
        assert process.stdout is not None
        _write_all(process.stdin, msgspec.json.encode(order))
        for text in process.stdout:
            line = msgspec.json.decode(text, type=_Line)
            if line.error:
                raise SelabError(line.error)
            yield line
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise _DiedError(f"a measuring process was ended by {name}; is the memory full?")
    if process.returncode:
        raise _DiedError(f"a measuring process ended with status {process.returncode}; see its message above")


@contextmanager
def _signals_postponed() -> Iterator[None]:
    """Let signals that would interrupt the program wait until the end of the block.

    An exception in the midst of a start leaves a process that nobody knows of.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []
    before: dict[int, Callable[[int, Any], object]] = {}
    for one in signal.valid_signals():
        handler = signal.getsignal(one)
        if callable(handler):
            before[one] = handler
            signal.signal(one, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _write_all(pipe: IO[bytes], order: bytes) -> None:
    """Write an order and close the pipe.

    A process that ended before it read the order is no error here: its status says how.
    """
    for step in (lambda: pipe.write(order), pipe.close):
        with suppress(BrokenPipeError):
            step()


def worker_main() -> None:
    """Run the child process: read one job, write lines."""
    lines = sys.stdout.buffer

    def write(line: _Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")
        lines.flush()

    try:
        try:
            order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerJob)
        except msgspec.DecodeError:
            sys.exit(1)  # the parent ended while it wrote
        # A user's network may print; standard output is for the lines alone.
        with redirect_stdout(sys.stderr):
            for threads, one in short_runs(order, lambda: write(_Line(ready=True))):
                if isinstance(one, Failed):
                    write(_Line(threads=threads, failed=one))
                else:
                    write(_Line(threads=threads, raw=one))
    except SelabError as error:
        write(_Line(error=str(error)))
    except KeyboardInterrupt:
        sys.exit(1)  # the parent was interrupted as well, and says so
    except BrokenPipeError:
        # The parent has ended. Nobody reads what the interpreter would still flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), lines.fileno())
        sys.exit(1)


if __name__ == "__main__":
    worker_main()
