"""A grid of paired measurements: its cells, what is known of each already, and rows, tables and pictures of them."""

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from selab import catalog, plots, store, units
from selab.errors import OutOfMemoryError, RecordError, SelabError
from selab.grid import NONE, Grid
from selab.measure.latency import PHASES
from selab.measure.machine import machine as this_machine
from selab.profiling import Profile, count_record
from selab.record import Frozen, Latency, Machine, Record
from selab.request import Request, pair, plan_of, workload_of
from selab.spec import SEFacts
from selab.tables import PHASE_NAMES, change_words, is_stale
from selab.workers import Report

if TYPE_CHECKING:
    from rich.console import Console

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
    parts = [request.arch, f"batch {request.batch}", f"{_resolution(request)}", request.dtype]
    return ", ".join([*parts, *(["channels last"] if request.memory_format == "channels_last" else [])])


def _resolution(request: Request) -> int:
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


class Ledger:
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
        why = f"skipped: batch {smaller.batch} at {_resolution(smaller)} ran out of memory"
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
        of_memory = next(filter(_is_of_memory, errors), None)
        if of_memory is not None:
            return self._marked(request, of_memory, kept)
        return self._outcome(request, "failed" if errors else "measured", errors[0] if errors else "", kept)

    def failed(self, request: Request, error: str, *, of_memory: bool = False) -> Outcome:
        """Notes why a cell was not measured.

        Raises:
            RecordError: the mark cannot be written.
        """
        if of_memory or _is_of_memory(error):
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


def _is_of_memory(error: str) -> bool:
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
    ledger = Ledger(out, machine or this_machine(asked[0].device), retry=retry)
    for number, request in enumerate(asked, start=1):
        report(f"{number} of {len(asked)}: {cell_words(request)}", None)
        yield _swept(ledger, request, _of_cell(report, number, len(asked)), measure)


def _of_cell(report: Report, number: int, total: int) -> Report:
    return lambda label, state: report(f"{number} of {total}: {label}", state)


def _swept(ledger: Ledger, request: Request, report: Report, measure: Measure) -> Outcome:
    try:
        known = ledger.known(request)
        if known is not None:
            return known
        record = measure(ledger.wanted(request), report)
    except SelabError as error:
        return ledger.failed(request, str(error), of_memory=isinstance(error, OutOfMemoryError))
    return ledger.measured(request, record)


# ---------------------------------------------------------------------------------------------------------------- rows

_TEXT, _WHOLE, _REAL = "text", "whole", "real"
COLUMNS = {
    "arch": _TEXT,
    "baseline": _TEXT,
    "batch": _WHOLE,
    "resolution": _WHOLE,
    "dtype": _TEXT,
    "memory_format": _TEXT,
    "reduction": _WHOLE,
    "phase": _TEXT,
    "status": _TEXT,
    "ratio": _REAL,
    "ratio_low": _REAL,
    "ratio_high": _REAL,
    "baseline_s": _REAL,
    "variant_s": _REAL,
    "verdict": _TEXT,
    "macs": _WHOLE,
    "params": _WHOLE,
    "bytes": _WHOLE,
    "peak_forward_bytes": _WHOLE,
    "machine": _TEXT,
    "torch": _TEXT,
    "command": _TEXT,
}
Row = dict[str, str | int | float | None]
_FIGURES = ("ratio", "ratio_low", "ratio_high", "baseline_s", "variant_s")
ENDINGS = (".csv", ".json", ".parquet")


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One flat row for each cell and phase, in base units; what is not known is None. MACs by `paper`."""
    return [_row(outcome, latency, phase) for outcome in outcomes for phase, latency in _by_phase(outcome)]


def _by_phase(outcome: Outcome) -> list[tuple[str, Latency | None]]:
    found = {} if outcome.record is None else outcome.record.latency
    return [(phase, found.get(phase)) for phase in outcome.request.phases]


def _row(outcome: Outcome, latency: Latency | None, phase: str) -> Row:
    request, record = outcome.request, outcome.record
    variant, baseline = pair(request)
    cost = None if record is None else record.cost
    memory = None if record is None else record.memory
    return {
        "arch": variant.name,
        "baseline": baseline.name,
        "batch": request.batch,
        "resolution": _resolution(request),
        "dtype": request.dtype,
        "memory_format": request.memory_format,
        "reduction": variant.se.reduction if isinstance(variant.se, SEFacts) else None,
        "phase": phase,
        "status": _status(outcome, latency),
        **{name: None if latency is None else getattr(latency, name) for name in _FIGURES},
        "verdict": outcome.text if latency is None else latency.verdict,
        "macs": None if cost is None else cost.macs.paper,
        "params": None if cost is None else cost.params,
        "bytes": None if cost is None else cost.bytes,
        "peak_forward_bytes": None if memory is None else memory.peak_forward_bytes,
        "machine": outcome.machine.name,
        "torch": outcome.machine.libraries.get("torch"),
        "command": request.command,
    }


def _status(outcome: Outcome, latency: Latency | None) -> str:
    """Of one phase: where only another one failed, this one is measured."""
    if latency is None or outcome.state in ("measured", "taken over"):
        return outcome.state
    if not latency.error:
        return "measured"
    return "out of memory" if _is_of_memory(latency.error) else "failed"


def by_machine(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Figures of different machines share neither a table nor a picture."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.machine.name, []).append(one)
    return groups


def check_table(path: Path) -> None:
    """Raises SelabError for an ending that is not known, or where what writes it is not installed."""
    if path.suffix.lower() not in ENDINGS:
        raise SelabError(f"--table {path}: {path.suffix or 'no ending'}; a table ends in {', '.join(ENDINGS)}")
    if path.suffix.lower() == ".parquet":
        _pyarrow(path)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise SelabError(f"--table {path}: Parquet needs pyarrow; pip install 'selab[parquet]', or use .csv") from None
    return pyarrow


def write_tables(outcomes: Sequence[Outcome], path: Path) -> list[Path]:
    """Writes the rows; those of several machines as one file each, `name.<machine>.csv`.

    Raises:
        SelabError: as `check_table`.
        RecordError: a file cannot be written.
    """
    check_table(path)
    groups = by_machine(outcomes)
    written = []
    for name, group in groups.items():
        to = path if len(groups) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")
        store.write_atomically(to, _encoded(rows(group), to))
        written.append(to)
    return written


def _encoded(lines: Sequence[Row], path: Path) -> bytes:
    ending = path.suffix.lower()
    if ending == ".json":
        return (json.dumps(lines, indent=1, ensure_ascii=False) + "\n").encode()
    if ending == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue().encode()
    arrow = _pyarrow(path)
    kinds = {_TEXT: arrow.string(), _WHOLE: arrow.int64(), _REAL: arrow.float64()}
    # The types are named, for a column without a value has none of its own.
    table = arrow.Table.from_pylist(lines, schema=arrow.schema([(name, kinds[one]) for name, one in COLUMNS.items()]))
    file = io.BytesIO()
    arrow.parquet.write_table(table, file)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------------- shown

_VERDICTS = {"undecided": "no difference measured", "no_result": "no result"}
_AXES: Mapping[str, Callable[[Request], str]] = {
    "batch": lambda one: str(one.batch),
    "resolution": lambda one: str(_resolution(one)),
    "dtype": lambda one: one.dtype,
    "memory format": lambda one: one.memory_format.replace("_", " "),
}


def sweep_grids(outcomes: Sequence[Outcome], asked: Sequence[Request]) -> list[Grid]:
    """The table of a sweep, one for each machine: what varies, the base's time, the change, what may be said.

    Args:
        outcomes: of the cells that are done.
        asked: all cells; what they share stands in the title.
    """
    values = {name: list(dict.fromkeys(map(read, asked))) for name, read in _AXES.items()}
    varying = [name for name in _AXES if len(values[name]) > 1]
    fixed = [f"{name} {values[name][0]}" for name in _AXES if name not in varying]
    phases = asked[0].phases
    columns = ("", *varying, *(["phase"] if len(phases) > 1 else []), "base", "change", "verdict")
    fixed += [] if len(phases) > 1 else [PHASE_NAMES[phases[0]]]
    return [
        Grid(
            title=f"What attention adds ({', '.join(fixed)}; {_place(group[0].machine)})",
            columns=columns,
            rows=tuple(line for one in group for line in _lines(one, varying)),
            notes=(*_notes(group), "In brackets 95 % intervals, of the time against the base."),
            words=frozenset({0, len(columns) - 1, *(index for index, name in enumerate(columns) if name == "phase")}),
        )
        for group in by_machine(outcomes).values()
    ]


def _place(machine: Machine) -> str:
    return f"{machine.gpu or machine.cpu}, torch {machine.libraries.get('torch', '')}"


def _notes(group: Sequence[Outcome]) -> list[str]:
    """Why a cell was not measured, each reason once."""
    reasons: dict[str, int] = Counter(one.text for one in group if one.text and one.state != "skipped")
    return [f"{reason} ({count} cell{'s' if count > 1 else ''})" for reason, count in reasons.items()]


def _lines(outcome: Outcome, varying: Sequence[str]) -> list[tuple[str, ...]]:
    request = outcome.request
    several = len(request.phases) > 1
    lines = []
    for phase, latency in _by_phase(outcome):
        cells = (request.arch, *(_AXES[name](request) for name in varying))
        cells += (PHASE_NAMES[phase],) if several else ()  # type: ignore[index]
        base = NONE if latency is None or latency.baseline_s is None else units.seconds(latency.baseline_s)
        lines.append((*cells, base, change_words(latency), _said(outcome, latency)))
    return lines


def _said(outcome: Outcome, latency: Latency | None) -> str:
    status = _status(outcome, latency)
    if latency is None or latency.error:
        return outcome.text if status == "skipped" else status
    words = [_VERDICTS.get(latency.verdict_kind, latency.verdict_kind)]
    words += [f"flags: {', '.join(flag.name for flag in latency.flags)}"] if latency.flags else []
    return "; ".join([*words, *(["taken over"] if status == "taken over" else [])])


@contextmanager
def showing(
    console: "Console", asked: Sequence[Request], words: Callable[[Any], str]
) -> Iterator[tuple[Report, Callable[[Outcome], object]]]:
    """The table while it grows, drawn only when something is told, so that nothing runs beside a measurement.

    Off a terminal there is one line for each cell that is done.

    Args:
        console: where.
        asked: all cells.
        words: a measurement's progress in words.
    """
    done: list[Outcome] = []
    if not console.is_terminal:

        def tell(outcome: Outcome) -> None:
            done.append(outcome)
            said = "; ".join(" ".join(line[1:]) for line in _lines(outcome, ()))
            console.print(
                f"{len(done)}: {cell_words(outcome.request)}: {said}", highlight=False, soft_wrap=True, markup=False
            )

        yield lambda _label, _state: None, tell
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as live:

        def draw(label: str, state: Any) -> None:
            line = Text(label if state is None else f"{label}: {words(state)}")
            # The last cells that fit; all of them are printed at the end. A row may take two lines.
            last = done[-max(1, (console.height - 8) // (2 * len(asked[0].phases))) :]
            live.update(Group(*sweep_grids(last, asked), line), refresh=True)

        def tell_live(outcome: Outcome) -> None:
            done.append(outcome)
            draw(cell_words(outcome.request), None)

        yield draw, tell_live


# ------------------------------------------------------------------------------------------------------------ pictures


def write_pictures(outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    """Draws what a sweep found; of several machines each into a folder of its own.

    Returns:
        A line for each picture: where it is, or why there is none.

    Raises:
        RecordError: the folder cannot be written.
    """
    from selab import ink

    groups = by_machine(outcomes)
    lines = []
    for name, group in groups.items():
        into = folder if len(groups) == 1 else folder / name
        for file, make in _pictures(group).items():
            try:
                shown = make()
            except SelabError as error:
                lines.append(f"no {into / file}: {error}")
            else:
                ink.draw(shown, into / file)
                lines.append(f"picture: {into / file}")
    return lines


def _pictures(group: Sequence[Outcome]) -> dict[str, Callable[[], plots.Picture]]:
    """What is drawn of one machine's cells, by the file's name."""
    records = [one.record for one in group if one.record is not None]
    phase = group[0].request.phases[0]
    missing = [plots.LeftOut(name=cell_words(one.request), why=one.state) for one in group if one.record is None]
    slugs = Counter(record.workload.slug for record in records)
    commonest = min(slugs, key=lambda slug: (-slugs[slug], slug), default=None)
    found: dict[str, Callable[[], plots.Picture]] = {
        "tax_batch.svg": lambda: plots.tax_lines(records, "batch", phase=phase, missing=missing),
        "latency_macs.svg": lambda: plots.points("macs", "latency", records=records, workload=commonest),
    }
    if len({_resolution(one.request) for one in group}) > 1:
        found["tax_resolution.svg"] = lambda: plots.tax_lines(records, "resolution", phase=phase, missing=missing)
    return found
