"""A grid of paired measurements: its cells, what is known of each already, and rows, tables and pictures of them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from selab.bench.machine import machine as this_machine
from selab.errors import OutOfMemoryError, RecordError, SelabError
from selab.experiments.job import Request, pair, plan_of, workload_of
from selab.experiments.profiling import Profile, count_record
from selab.experiments.workers import Report
from selab.models import catalog
from selab.models.provenance import is_stale
from selab.records import store
from selab.records.types import PHASES, Frozen, Machine, Record

State = Literal["measured", "taken over", "out of memory", "skipped", "failed"]
Measure = Callable[[Request, Report], Record]


class Mark(Frozen, frozen=True, kw_only=True):
    """What is left of a cell that ran out of memory: why, and the command that asks for it."""

    reason: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell on a machine.

    Attributes:
        text: why it was not measured, in one line; empty if it was.
        record: what was measured; of a cell that ran out of memory the phases that did not.
    """

    request: Request
    machine: Machine
    state: State
    text: str = ""
    record: Record | None = None


# --------------------------------------------------------------------------------------------------------------- cells
def cells(archs: Sequence[str], resolutions: Sequence[int], batches: Sequence[int], **axes: Any) -> list[Request]:
    """Every combination, network by network; batches rise within resolutions, so that the largest cells come last.

    Args:
        archs: networks, changes included.
        resolutions: height and width of the inputs; none for the networks' own.
        batches: images.
        axes: further fields of a request; a list is gone through, anything else is the same in every cell.
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


def mistakes(asked: Sequence[Request]) -> list[str]:
    """What is wrong with the cells, one line each: networks, baselines, resolutions; nothing is measured."""
    found: dict[str, None] = {}
    for arch, resolution in dict.fromkeys((one.arch, one.resolution) for one in asked):
        try:
            pair(Request(arch=arch))
        except SelabError as error:
            found[str(error)] = None
            continue
        try:
            count_record(arch, batch=1, resolution=resolution, counters=False)
        except SelabError as error:
            place = f"--resolution {resolution}: " if resolution is not None else ""
            found[f"{place}{arch}: {error}"] = None
    return list(found)


def cell_path(request: Request, out: Path, machine: str) -> Path:
    """Where `selab profile` puts the cell's record on a machine of this name."""
    variant, _ = pair(request)
    slug = workload_of(request, variant).slug
    return store.record_path(out, machine=machine, arch=variant.name, against=None, workload=slug)


def cell_words(request: Request) -> str:
    """`se_mobilenet, batch 8, 224, bf16, channels last`: what tells a cell from the others."""
    parts = [request.arch, f"batch {request.batch}", f"{resolution_of(request)}", request.dtype]
    return ", ".join([*parts, *(["channels last"] if request.memory_format == "channels_last" else [])])


def resolution_of(request: Request) -> int:
    """Return the height of the input of a request, in pixels."""
    return workload_of(request, catalog.find(request.arch)).input_chw[1]


# ----------------------------------------------------------------------------------------------------------- measuring
def measure(request: Request, report: Report) -> Record:
    """One cell, here and now.

    Raises:
        SelabError: as `Profile.run`.
    """
    profile = Profile(request)
    profile.run(report)
    return profile.record()


class ResultCache:
    """What is known of the cells on one machine; its folder holds records, and marks of what memory forbids.

    Args:
        out: records go to OUT/<machine>/.
        machine: what is measured on.
        retry: whether to forget the marks, and to measure again what gave no result.

    Raises:
        RecordError: the folder cannot be written.
    """

    def __init__(self, out: Path, machine: Machine, *, retry: bool = False) -> None:
        store.check_writable(out / machine.name / "record.json", replace=True)
        self.out, self.machine, self.retry = out, machine, retry
        self._lost: list[Request] = []

    def known(self, request: Request) -> Outcome | None:
        """The outcome of a cell that need not be measured; None for one that must be.

        Raises:
            RecordError: its record or its mark cannot be read.
        """
        path = cell_path(request, self.out, self.machine.name)
        record = store.read_record(path) if path.exists() else None
        if record is not None and self._holds(record, request):
            return self._outcome(request, "taken over", record=record)
        mark = store.failed_path(path)
        if mark.exists() and not self.retry:
            self._lost.append(request)
            return self._outcome(request, "out of memory", _read_mark(mark).reason, record)
        with suppress(FileNotFoundError):
            mark.unlink()
        smaller = next((lost for lost in self._lost if _is_larger(request, lost)), None)
        if smaller is None:
            return None
        why = f"skipped: batch {smaller.batch} at {resolution_of(smaller)} ran out of memory"
        return self._outcome(request, "skipped", why)

    def wanted(self, request: Request) -> Request:
        """The cell as it is to be measured: what its record holds is measured again, and no less thoroughly."""
        path = cell_path(request, self.out, self.machine.name)
        record = store.read_record(path) if path.exists() else None
        if record is None or not self._is_current(record):
            return request
        there = [one for one in record.latency.values() if not one.error]
        target = plan_of(request, record.workload).target_half_width
        return msgspec.structs.replace(
            request,
            phases=tuple(one for one in PHASES if one in request.phases or one in record.latency),
            processes=max(request.processes, *(len(one.runs) for one in there), 1),
            quick=request.quick and all(one.target_half_width >= target for one in there),
        )

    def measured(self, request: Request, record: Record) -> Outcome:
        """Keeps a cell's record, unless every phase failed; one that ran out of memory is marked.

        Raises:
            RecordError: it cannot be written.
        """
        errors = [one.error for one in record.latency.values() if one.error and one.phase in request.phases]
        kept = None if errors and all(one.error for one in record.latency.values()) else record
        if kept is not None:
            store.save(kept, cell_path(request, self.out, self.machine.name))
        of_memory = next(filter(is_of_memory, errors), None)
        if of_memory is not None:
            return self._marked(request, of_memory, kept)
        return self._outcome(request, "failed" if errors else "measured", errors[0] if errors else "", kept)

    def failed(self, request: Request, error: str, *, of_memory: bool = False) -> Outcome:
        """Notes why a cell was not measured.

        Raises:
            RecordError: the mark cannot be written.
        """
        if of_memory or is_of_memory(error):
            return self._marked(request, error, None)
        return self._outcome(request, "failed", error)

    def _marked(self, request: Request, reason: str, record: Record | None) -> Outcome:
        mark = Mark(reason=reason, command=request.command)
        path = store.failed_path(cell_path(request, self.out, self.machine.name))
        store.write_atomically(path, msgspec.json.format(msgspec.json.encode(mark), indent=1) + b"\n")
        self._lost.append(request)
        return self._outcome(request, "out of memory", reason, record)

    def _outcome(self, request: Request, state: State, text: str = "", record: Record | None = None) -> Outcome:
        return Outcome(request=request, machine=self.machine, state=state, text=text, record=record)

    def _is_current(self, record: Record) -> bool:
        torch = [one.libraries.get("torch") for one in (record.machine, self.machine)]
        return record.complete and not is_stale(record) and torch[0] == torch[1]

    def _holds(self, record: Record, request: Request) -> bool:
        """Whether a record has all that is asked for: each phase, as narrowly, as long and from as many processes."""
        plan = plan_of(request, record.workload)
        found = [record.latency.get(phase) for phase in request.phases]
        return self._is_current(record) and all(
            one is not None
            and not one.error
            and one.target_half_width <= plan.target_half_width
            and len(one.runs) >= request.processes
            and all(run.status == "converged" or run.elapsed_s >= plan.budget_s for run in one.runs)
            and not (self.retry and one.verdict_kind == "no_result")
            for one in found
        )


def _read_mark(path: Path) -> Mark:
    try:
        return msgspec.json.decode(store.read_text(path), type=Mark)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RecordError(f"{path}: {error}; remove the file, and the cell is measured again") from None


def is_of_memory(error: str) -> bool:
    """Return whether an error message of a measuring process says out of memory."""
    # A process of its own tells its error as text alone.
    return "out of memory" in error


def _is_larger(request: Request, lost: Request) -> bool:
    same = msgspec.structs.replace(request, batch=lost.batch, resolution=lost.resolution) == lost
    larger = request.batch >= lost.batch and (request.resolution or 0) >= (lost.resolution or 0)
    return same and larger and request != lost


def sweep(
    asked: Sequence[Request],
    out: Path,
    report: Report,
    *,
    retry: bool = False,
    machine: Machine | None = None,
    measure: Measure = measure,
) -> Iterator[Outcome]:
    """Goes through the cells on this machine; whatever was measured is on the disk before its outcome is told.

    Args:
        asked: of `cells`.
        out: records go to OUT/<machine>/.
        report: told of the progress.
        retry: whether to measure again what ran out of memory or gave no result.
        machine: what is measured on; this one by default.
        measure: how.

    Raises:
        RecordError: a record cannot be written.
    """
    ledger = ResultCache(out, machine or this_machine(asked[0].device), retry=retry)
    for number, request in enumerate(asked, start=1):
        report(f"{number} of {len(asked)}: {cell_words(request)}", None)
        yield _swept(ledger, request, _of_cell(report, number, len(asked)), measure)


def _of_cell(report: Report, number: int, total: int) -> Report:
    return lambda label, state: report(f"{number} of {total}: {label}", state)


def _swept(ledger: ResultCache, request: Request, report: Report, measure: Measure) -> Outcome:
    try:
        known = ledger.known(request)
        if known is not None:
            return known
        record = measure(ledger.wanted(request), report)
    except SelabError as error:
        return ledger.failed(request, str(error), of_memory=isinstance(error, OutOfMemoryError))
    return ledger.measured(request, record)
