"""A grid of paired measurements: its cells, and what is known of each already."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from selab.bench.machine import machine as this_machine
from selab.bench.progress import Report, prefixed
from selab.errors import OutOfMemoryError, RecordError, SelabError
from selab.experiments.job import Job, Request, job_of, resolve
from selab.experiments.profiling import Profile, count_job
from selab.experiments.schedule import effort_of
from selab.models.provenance import is_stale
from selab.records import files, store
from selab.records.bounds import json_fault
from selab.records.types import Frozen, Machine, Record

State = Literal["measured", "taken over", "out of memory", "skipped", "failed"]
Measure = Callable[[Job, Report], Record]


class Mark(Frozen, frozen=True, kw_only=True):
    """The file of a cell that ran out of memory: why, and the command that asks for the cell."""

    reason: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a cell on a machine.

    Attributes:
        text: why it was not measured, in one line; empty if it was.
        record: what was measured; of a cell that ran out of memory, the phases that did not.
    """

    job: Job
    machine: Machine
    state: State
    text: str = ""
    record: Record | None = None


# --------------------------------------------------------------------------------------------------------------- cells
def cells(archs: Sequence[str], resolutions: Sequence[int], batches: Sequence[int], **axes: Any) -> list[Request]:
    """Return every combination, network by network. Batches rise within resolutions: the largest cells come last.

    Args:
        archs: networks, changes included.
        resolutions: height and width of the inputs; none for the networks' own.
        batches: images.
        axes: further fields of a request; a list is an axis, any other value is the same in every cell.
    """
    sizes: list[int | None] = [*sorted(set(resolutions))] or [None]
    lists = {name: list(dict.fromkeys(value)) for name, value in axes.items() if isinstance(value, list)}
    fixed = {name: value for name, value in axes.items() if name not in lists}
    return [
        Request(arch=arch, resolution=resolution, batch=batch, **dict(zip(lists, chosen, strict=True)), **fixed)
        for arch in dict.fromkeys(archs)
        for chosen in itertools.product(*lists.values())
        for resolution in sizes
        for batch in sorted(set(batches))
    ]


def resolve_cells(asked: Sequence[Request]) -> tuple[list[Job], list[str]]:
    """Look up each network once, and count it at each of its input shapes; nothing is measured.

    Returns:
        The jobs, one for each cell that is right, and what is wrong with the others, one line for each network and
        input.
    """
    jobs: list[Job] = []
    networks: dict[tuple[str, str | None], Job | None] = {}
    counted: dict[tuple[str, str | None, tuple[int, ...]], bool] = {}
    wrong: dict[str, None] = {}
    for request in asked:
        name = (request.arch, request.baseline)
        if name not in networks:
            networks[name] = _found(request, wrong)
        known = networks[name]
        if known is None:
            continue
        job = job_of(request, known.variant, known.baseline)
        key = (*name, job.workload.input_chw)
        if key not in counted:
            counted[key] = _can_be_counted(job, wrong)
        if counted[key]:
            jobs.append(job)
    return jobs, list(wrong)


def _found(request: Request, wrong: dict[str, None]) -> Job | None:
    try:
        job = resolve(request)
        job.pair  # noqa: B018 - raises where there is no baseline
    except SelabError as error:
        wrong[str(error)] = None
        return None
    return job


def _can_be_counted(job: Job, wrong: dict[str, None]) -> bool:
    resolution = job.request.resolution
    place = "" if resolution is None else f"--resolution {resolution}: "
    try:
        count_job(job.changed(batch=1), counters=False)
    except SelabError as error:
        wrong[f"{place}{job.request.arch}: {error}"] = None
        return False
    return True


def cell_words(job: Job) -> str:
    """Return what tells a cell from the others: `se_mobilenet, batch 8, 3×224×224, bf16, channels last`."""
    threads = [f"{job.workload.threads} threads"] if job.workload.threads > 1 else []
    return ", ".join([job.request.arch, *job.workload.words(device=False), *threads])


def resolution_of(job: Job) -> int:
    """Return the height of the input of a job, in pixels."""
    return job.workload.input_chw[1]


# ----------------------------------------------------------------------------------------------------------- measuring
def measure(job: Job, report: Report) -> Record:
    """Measure one cell in this process.

    Raises:
        SelabError: as `Profile.run`.
    """
    profile = Profile(job)
    profile.run(report)
    return profile.record()


class ResultCache:
    """What is known of the cells on one machine; its folder holds records, and marks of what ran out of memory.

    Args:
        out: records go to OUT/<machine>/.
        machine: what is measured on.
        retry: whether to forget the marks, and to measure again what gave no result.

    Raises:
        RecordError: the folder cannot be written.
    """

    def __init__(self, out: Path, machine: Machine, *, retry: bool = False) -> None:
        files.check_writable(out / machine.name / "record.json", replace=True)
        self.out, self.machine, self.retry = out, machine, retry
        self._lost: list[Request] = []

    def _records(self, job: Job) -> Iterator[Record]:
        for path in job.paths(self.out, self.machine.name):
            if path.exists():
                yield store.read_record(path)

    def known(self, job: Job) -> Outcome | None:
        """Return the outcome of a cell that need not be measured; None for a cell that must be.

        Raises:
            RecordError: its record or its mark cannot be read.
        """
        there = list(self._records(job))
        record = next((one for one in there if self._holds(one, job)), None)
        if record is not None:
            return self._outcome(job, "taken over", record=record)
        mark = store.failed_path(self._path(job))
        if mark.exists() and not self.retry:
            self._lost.append(job.request)
            return self._outcome(job, "out of memory", _read_mark(mark).reason, there[0] if there else None)
        with suppress(FileNotFoundError):
            mark.unlink()
        smaller = next((lost for lost in self._lost if _is_larger(job.request, lost)), None)
        if smaller is None:
            return None
        size = job.changed(resolution=smaller.resolution)
        why = f"skipped: batch {smaller.batch} at {resolution_of(size)} ran out of memory"
        return self._outcome(job, "skipped", why)

    def wanted(self, job: Job) -> Job:
        """Return the cell as it is to be measured: no less thoroughly than the record that it replaces."""
        path = self._path(job)
        record = store.read_record(path) if path.exists() else None
        if record is None or not self._is_current(record):
            return job
        there = [one for one in record.latency.values() if not one.error]
        request, target = job.request, min((one.target_half_width for one in there), default=1.0)
        processes = request.processes and max(request.processes, *(len(one.runs) for one in there))
        thorough = job.changed(quick=False, thorough=True)
        if target <= thorough.plan.target_half_width:
            return thorough.changed(processes=processes)
        return job.changed(processes=processes, quick=request.quick and target >= job.plan.target_half_width)

    def measured(self, job: Job, record: Record) -> Outcome:
        """Keep a cell's record, unless every phase failed; a cell that ran out of memory is marked.

        Raises:
            RecordError: it cannot be written.
        """
        errors = [one.error for one in record.latency.values() if one.error and one.phase in job.request.phases]
        kept = None if errors and all(one.error for one in record.latency.values()) else record
        if kept is not None:
            store.save(kept, self._path(job))
        of_memory = next(filter(is_of_memory, errors), None)
        if of_memory is not None:
            return self._marked(job, of_memory, kept)
        return self._outcome(job, "failed" if errors else "measured", errors[0] if errors else "", kept)

    def failed(self, job: Job, error: str, *, of_memory: bool = False) -> Outcome:
        """Note why a cell was not measured.

        Raises:
            RecordError: the mark cannot be written.
        """
        if of_memory or is_of_memory(error):
            return self._marked(job, error, None)
        return self._outcome(job, "failed", error)

    def _path(self, job: Job) -> Path:
        return job.path(self.out, self.machine.name)

    def _marked(self, job: Job, reason: str, record: Record | None) -> Outcome:
        mark = Mark(reason=reason, command=job.command())
        path = store.failed_path(self._path(job))
        files.write_atomically(path, msgspec.json.format(msgspec.json.encode(mark), indent=1) + b"\n")
        self._lost.append(job.request)
        return self._outcome(job, "out of memory", reason, record)

    def _outcome(self, job: Job, state: State, text: str = "", record: Record | None = None) -> Outcome:
        return Outcome(job=job, machine=self.machine, state=state, text=text, record=record)

    def _is_current(self, record: Record) -> bool:
        torch = [one.libraries.get("torch") for one in (record.machine, self.machine)]
        return record.complete and not is_stale(record) and torch[0] == torch[1]

    def _holds(self, record: Record, job: Job) -> bool:
        """Whether a record has all that is asked for: each phase, as narrowly, as long and from as many processes."""
        found = [record.latency.get(phase) for phase in job.request.phases]
        # Of a whole budget the controls take as much as the comparisons, and something goes beside the sampling.
        whole = job.request.budget_s
        budget_s = job.plan.budget_s if whole is None else whole / len(job.request.phases) / 4
        return self._is_current(record) and all(
            one is not None
            and not one.error
            and one.target_half_width <= job.plan.target_half_width
            and (one.unit == "process" or job.request.in_this_process)
            and len(one.runs) >= effort_of(job.request).least
            # Of short runs their number decides, and none of them is long.
            and (
                one.unit == "process" or all(run.status == "converged" or run.elapsed_s >= budget_s for run in one.runs)
            )
            and not (self.retry and one.verdict_kind == "no_result")
            for one in found
        )


def _read_mark(path: Path) -> Mark:
    text = files.read_text(path)
    try:
        return msgspec.json.decode(text, type=Mark)
    except msgspec.DecodeError as error:
        raise RecordError(
            f"{path}: {json_fault(text, error)}; remove the file, and the cell is measured again"
        ) from None


def is_of_memory(error: str) -> bool:
    """Return whether an error message of a measuring process says out of memory."""
    # A process of its own tells its error as text alone.
    return "out of memory" in error


def _is_larger(request: Request, lost: Request) -> bool:
    same = msgspec.structs.replace(request, batch=lost.batch, resolution=lost.resolution) == lost
    larger = request.batch >= lost.batch and (request.resolution or 0) >= (lost.resolution or 0)
    return same and larger and request != lost


def sweep(
    asked: Sequence[Job],
    out: Path,
    report: Report,
    *,
    retry: bool = False,
    machine: Machine | None = None,
    measure: Measure = measure,
) -> Iterator[Outcome]:
    """Go through the cells on this machine. A cell's record is on the disk before its outcome is yielded.

    Args:
        asked: of `resolve_cells`.
        out: records go to OUT/<machine>/.
        report: called with the progress.
        retry: whether to measure again what ran out of memory or gave no result.
        machine: what is measured on; this one by default.
        measure: how.

    Raises:
        RecordError: a record cannot be written.
    """
    cache = ResultCache(out, machine or this_machine(asked[0].workload.device), retry=retry)
    for number, job in enumerate(asked, start=1):
        report_cell = prefixed(report, f"{number} of {len(asked)}")
        report_cell(cell_words(job), None)
        yield _swept(cache, job, report_cell, measure)


def _swept(cache: ResultCache, job: Job, report: Report, measure: Measure) -> Outcome:
    try:
        known = cache.known(job)
        if known is not None:
            return known
        record = measure(cache.wanted(job), report)
    except SelabError as error:
        return cache.failed(job, str(error), of_memory=isinstance(error, OutOfMemoryError))
    return cache.measured(job, record)
