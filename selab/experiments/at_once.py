"""Several trainings at the same time, each in a process of its own: one on each GPU, or on its share of the cores."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from selab import units
from selab.bench.heap import keep_freed
from selab.bench.machine import available_cores
from selab.errors import SelabError
from selab.experiments.children import DiedError, lines_of, obey
from selab.experiments.compare import Report, Say
from selab.experiments.trainings import Pending, Schedule, result_of
from selab.models import catalog
from selab.models.provenance import address
from selab.records.types import Device, Frozen
from selab.training.data import open_data
from selab.training.interrupt import stoppable
from selab.training.progress import TrainingProgress
from selab.training.recipe import BoxRecipe, ImageRecipe, Recipe
from selab.training.record import Options
from selab.training.train import DivergedError, TrainingStoppedError, train

if TYPE_CHECKING:
    import subprocess

# Each takes about a gigabyte.
_MOST_JOBS = 8
# Seconds between two looks for a request to stop.
_LOOK_S = 0.2


class Source(Frozen, frozen=True, kw_only=True):
    """Where each process finds the images; see `selab.training.data.open_data`."""

    name: str
    data_dir: str
    classes_file: str | None = None
    workers: int | None = None
    image: ImageRecipe | None = None
    boxes: BoxRecipe | None = None


class Place(Frozen, frozen=True, kw_only=True):
    """What one training computes on.

    Attributes:
        threads: of the CPU; None for torch's own choice.
        gpu: as `CUDA_VISIBLE_DEVICES` names it; None for none, or for any.
    """

    threads: int | None = None
    gpu: str | None = None


class _Order(Frozen, frozen=True, kw_only=True):
    """What one process is to train.

    Attributes:
        arch: as `--arch` takes it in this folder; the file of a user's own network is read again.
        weights: a file that the training starts from; empty for random weights.
    """

    arch: str
    facts_hash: str
    recipe: Recipe
    options: Options
    seed: int
    folder: str
    source: Source
    data_sha256: str
    weights: str = ""


class _Line(Frozen, frozen=True, kw_only=True):
    """A line of a process: how far it is, a sentence, or how its training ended."""

    progress: TrainingProgress | None = None
    said: str = ""
    finished: bool = False
    diverged: str = ""
    error: str = ""


def check_jobs(device: Device, jobs: int | None) -> None:
    """Refuse more trainings at once than there are GPUs, or cores.

    Raises:
        SelabError: there are fewer.
    """
    what, there = ("GPU", len(_gpus())) if device == "cuda" else ("core", available_cores())
    if jobs is not None and jobs > there:
        found = f"there {'is' if there == 1 else 'are'} {units.counted(there, what)}"
        raise SelabError(f"--jobs {jobs}: {found}, and each training takes one; give at most {there}")


def places_of(
    device: Device, jobs: int | None, *, trainings: int, threads: int | None = None, in_memory: bool = True
) -> list[Place]:
    """Return where trainings run at the same time.

    Args:
        device: on GPUs, each training has one of its own.
        jobs: how many; None for one on each GPU. On the CPU, small images are then trained on as many at once as there
            are cores, eight at most: a small network does not use several.
        trainings: how many there are.
        threads: of each training; None to share the cores.
        in_memory: whether the images are small and lie in memory; those of a folder are decoded by all cores.

    Raises:
        SelabError: as `check_jobs`.
    """
    check_jobs(device, jobs)
    if device == "cuda":
        return [Place(threads=threads, gpu=gpu) for gpu in _gpus()[: min(jobs or trainings, trainings)]]
    most = jobs or (own_jobs() if in_memory else 1)
    count = max(1, min(most, trainings))
    share = None if count == 1 else max(1, available_cores() // count)
    return [Place(threads=threads or share) for _ in range(count)]


def own_jobs() -> int:
    """Return how many trainings run at once on the CPU where nobody says so."""
    return min(available_cores(), _MOST_JOBS)


def _gpus() -> list[str]:
    """Return the GPUs that torch sees, as `CUDA_VISIBLE_DEVICES` names them."""
    seen = torch.cuda.device_count()
    named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return named[:seen] if len(named) >= seen else [str(number) for number in range(seen)]


class _Running:
    """A training in its process, seen from a thread that reads its lines."""

    def __init__(self, one: Pending, place: Place, source: Source, events: "SimpleQueue[tuple[_Running, object]]"):
        self.one, self.place = one, place
        self.ended: _Line = _Line()
        self.died = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted, self._asked = True, False
        self._events = events
        options = msgspec.structs.replace(one.comparison.plan.options, threads=place.threads)
        self._order = _Order(
            # As given: the process works in the same folder, and a path is part of what the hash is over.
            arch=address(one.variant.name, one.variant.file),
            facts_hash=one.variant.facts_hash,
            recipe=one.recipe,
            options=options,
            seed=one.seed,
            folder=str(one.folder),
            source=source,
            data_sha256=one.comparison.data.sha256,
            weights="" if one.weights is None else str(one.weights),
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the process to save everything and end; once is enough."""
        self._wanted = False
        if self._process is not None and not self._asked:
            self._asked = True
            with suppress(OSError):
                self._process.send_signal(signal.SIGTERM)

    def _started(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        if not self._wanted:
            self.stop()

    def join(self) -> None:
        """Wait for its thread, which has ended or is about to."""
        self._thread.join()

    def _read(self) -> None:
        environment = None if self.place.gpu is None else {"CUDA_VISIBLE_DEVICES": self.place.gpu}
        try:
            lines = lines_of(
                __name__,
                msgspec.json.encode(self._order),
                does="training",
                environment=environment,
                started=self._started,
            )
            with closing(lines):
                for text in lines:
                    line = msgspec.json.decode(text, type=_Line)
                    if line.progress is None and not line.said:
                        self.ended = line
                    else:
                        self._events.put((self, line))
        except (DiedError, OSError, msgspec.DecodeError) as error:
            self.died = str(error)
        self._events.put((self, None))


def runs_at_once(places: Sequence[Place], source: Source) -> Callable[[Schedule, Report, Say], None]:
    """Return what runs the trainings of a schedule at the same time, for `selab.experiments.trainings.run_all`.

    Args:
        places: one for each training that runs at a time.
        source: of the images.
    """

    def run(schedule: Schedule, report: Report, say: Say) -> None:
        _run(schedule, places, source, report, say)

    return run


def _run(schedule: Schedule, places: Sequence[Place], source: Source, report: Report, say: Say) -> None:
    """Run the trainings of a schedule, one on each place.

    The first error ends all of them, after each has saved everything.

    Raises:
        TrainingStoppedError: a signal asked to stop.
        SelabError: as `selab.training.train.train`.
    """
    events: SimpleQueue[tuple[_Running, object]] = SimpleQueue()
    waiting, free = deque(schedule.pending), list(places)
    running: list[_Running] = []
    fault, unsettled = "", {one.label: one for one in waiting}
    with stoppable(alone=False) as stop, ExitStack() as at_end:
        at_end.callback(_end_all, running)
        while running or (waiting and not fault and not stop.wanted):
            while waiting and free and not fault and not stop.wanted:
                one = waiting.popleft()
                schedule.begin(one)
                report(one.label, None)
                running.append(_Running(one, free.pop(0), source, events))
            if fault or stop.wanted:
                for each in running:
                    each.stop()
            try:
                other, line = events.get(timeout=_LOOK_S)
            except Empty:
                continue
            if isinstance(line, _Line):
                _tell(other.one, line, schedule, report, say)
                continue
            running.remove(other)
            other.join()
            free.append(other.place)
            schedule.end(other.one)
            wrong = _settle(other, schedule, report, say)
            if not wrong:
                del unsettled[other.one.label]
            # A process that was asked to end says so; that is no fault. A Ctrl-C reaches it together with this one.
            fault = fault or ("" if stop.wanted else wrong)
        if fault:
            raise SelabError(fault)
        if unsettled:
            # What another command has trained is no work.
            left = units.counted(sum(not one.finished for one in unsettled.values()), "training")
            raise TrainingStoppedError(f"stopped with {left} left; everything is saved: the same command resumes")


def _end_all(running: Sequence[_Running]) -> None:
    """End the processes that an error in this one leaves behind."""
    for each in running:
        each.stop()
    for each in running:
        each.join()


def _tell(one: Pending, line: _Line, schedule: Schedule, report: Report, say: Say) -> None:
    if line.said:
        say(f"{one.label}: {line.said}")
    if line.progress is not None:
        report(one.label, schedule.timed(one, line.progress))


def _settle(done: _Running, schedule: Schedule, report: Report, say: Say) -> str:
    """Note the result of a process that has ended; return why there is none, if there is none."""
    one, ended = done.one, done.ended
    if ended.finished:
        one.settle(result_of(one, schedule, report, lambda _: None), at_once=schedule.at_once)
    elif ended.diverged:
        say(f"{one.label}: {ended.diverged}")
        one.settle(DivergedError(ended.diverged))
    else:
        return ended.error or f"{one.label}: {done.died or 'its process ended early'}; the same command resumes"
    return ""


def child_main() -> None:
    """Run the program of a process that trains one network."""
    obey(_Order, _train)


def _train(order: _Order, write: Callable[..., Any]) -> None:
    """Train one network, and write lines about it."""
    keep_freed(order.options.device)
    source = order.source
    try:
        data = open_data(
            source.name,
            data_dir=Path(source.data_dir),
            download=False,
            image=source.image,
            boxes=source.boxes,
            workers=source.workers,
            classes_file=None if source.classes_file is None else Path(source.classes_file),
        )
        if data.sha256 != order.data_sha256:
            raise SelabError(f"{source.data_dir}: the images have changed since the command began; run it again")
        variant = catalog.find(order.arch)
        if variant.facts_hash != order.facts_hash:
            raise SelabError(f"{order.arch}: has changed since the command began; run it again")
        train(
            variant,
            data,
            order.recipe,
            seed=order.seed,
            folder=Path(order.folder),
            options=order.options,
            report=lambda state: write(progress=state),
            say=lambda text: write(said=text),
            weights=Path(order.weights) if order.weights else None,
        )
    except DivergedError as error:
        write(diverged=str(error))
    except SelabError as error:
        write(error=str(error))
    else:
        write(finished=True)
