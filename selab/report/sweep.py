"""Tables, flat rows and pictures of a sweep."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selab import units
from selab.attention.config import SEConfig
from selab.bench.progress import Report
from selab.errors import SelabError
from selab.experiments.job import Job
from selab.experiments.sweep import Outcome, cell_words, is_of_memory, resolution_of
from selab.records import files
from selab.records.flag_texts import causes
from selab.records.types import PHASE_NAMES, Latency, Machine
from selab.records.verdict import change_words
from selab.report.figures import base as report_figures_base
from selab.report.figures import lines as report_figures_lines
from selab.report.figures import registry, scatter
from selab.report.table import Table
from selab.report.wording import words_note
from selab.units import NONE

if TYPE_CHECKING:
    from rich.console import Console


# ---------------------------------------------------------------------------------------------------------------- rows
_TEXT, _WHOLE, _REAL = "text", "whole", "real"
COLUMNS = {
    "arch": _TEXT,
    "baseline": _TEXT,
    "batch": _WHOLE,
    "resolution": _WHOLE,
    "dtype": _TEXT,
    "memory_format": _TEXT,
    "threads": _WHOLE,
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
    """Return one flat row for each cell and phase, in base units; unknown values are None. MACs by `paper`."""
    return [_row(outcome, latency, phase) for outcome in outcomes for phase, latency in _by_phase(outcome)]


def _by_phase(outcome: Outcome) -> list[tuple[str, Latency | None]]:
    found = {} if outcome.record is None else outcome.record.latency
    return [(phase, found.get(phase)) for phase in outcome.job.request.phases]


def _row(outcome: Outcome, latency: Latency | None, phase: str) -> Row:
    request, record = outcome.job.request, outcome.record
    variant, baseline = outcome.job.pair
    cost = None if record is None else record.cost
    memory = None if record is None else record.memory
    return {
        "arch": variant.name,
        "baseline": baseline.name,
        "batch": request.batch,
        "resolution": resolution_of(outcome.job),
        "dtype": request.dtype,
        "memory_format": request.memory_format,
        "threads": outcome.job.workload.threads,
        "reduction": variant.se.reduction if isinstance(variant.se, SEConfig) else None,
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
        "command": request.command(),
    }


def _status(outcome: Outcome, latency: Latency | None) -> str:
    """Return the state of one phase: where only another one failed, this one is measured."""
    if latency is None or outcome.state in ("measured", "taken over"):
        return outcome.state
    if not latency.error:
        return "measured"
    return "out of memory" if is_of_memory(latency.error) else "failed"


def by_machine(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Figures of different machines share neither a table nor a picture."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.machine.name, []).append(one)
    return groups


def check_table(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        SelabError: its ending is unknown, or the library that writes it is not installed.
    """
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
    """Write the rows; those of several machines as one file each, `name.<machine>.csv`.

    Raises:
        SelabError: as `check_table`.
        RecordError: a file cannot be written.
    """
    check_table(path)
    groups = by_machine(outcomes)
    written = []
    for name, group in groups.items():
        to = path if len(groups) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")
        files.write_atomically(to, _encoded(rows(group), to))
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
_AXES: Mapping[str, Callable[[Job], str]] = {
    "batch": lambda one: str(one.workload.batch),
    "resolution": lambda one: str(resolution_of(one)),
    "dtype": lambda one: one.workload.dtype,
    "runtime": lambda one: one.workload.runtime,
    "memory format": lambda one: one.workload.memory_format.replace("_", " "),
    "threads": lambda one: str(one.workload.threads),
}


def sweep_tables(outcomes: Sequence[Outcome], asked: Sequence[Job]) -> list[Table]:
    """Return the table of a sweep, one for each machine: what varies, the base's time, the change, the verdict.

    Args:
        outcomes: of the cells that are done.
        asked: all cells; what they share stands in the title.
    """
    values = {name: list(dict.fromkeys(map(read, asked))) for name, read in _AXES.items()}
    varying = [name for name in _AXES if len(values[name]) > 1]
    fixed = [f"{name} {values[name][0]}" for name in _AXES if name not in varying]
    phases = asked[0].request.phases
    columns = ("", *varying, *(["phase"] if len(phases) > 1 else []), "base", "change", "verdict")
    fixed += [] if len(phases) > 1 else [PHASE_NAMES[phases[0]]]
    tables = []
    for group in by_machine(outcomes).values():
        rows = tuple(line for one in group for line in _lines(one, varying))
        latencies = [latency for one in group for _, latency in _by_phase(one) if latency is not None]
        tables.append(
            Table(
                title=f"What attention adds ({', '.join(fixed)}; {_place(group[0].machine)})",
                columns=columns,
                rows=rows,
                notes=(
                    *_notes(group),
                    "In brackets 95 % intervals, of the time against the base.",
                    *words_note(rows),
                    *causes(flag for latency in latencies for flag in latency.flags),
                ),
                words=frozenset(
                    {0, len(columns) - 1, *(index for index, name in enumerate(columns) if name == "phase")}
                ),
                drop_first=(len(columns) - 3,),
            )
        )
    return tables


def _place(machine: Machine) -> str:
    return f"{machine.gpu or machine.cpu}, torch {machine.libraries.get('torch', '')}"


def _notes(group: Sequence[Outcome]) -> list[str]:
    """Return why cells were not measured, each reason once."""
    reasons: dict[str, int] = Counter(one.text for one in group if one.text and one.state != "skipped")
    return [f"{reason} ({units.counted(count, 'cell')})" for reason, count in reasons.items()]


def _lines(outcome: Outcome, varying: Sequence[str]) -> list[tuple[str, ...]]:
    request = outcome.job.request
    several = len(request.phases) > 1
    lines = []
    for phase, latency in _by_phase(outcome):
        cells = (request.arch, *(_AXES[name](outcome.job) for name in varying))
        cells += (PHASE_NAMES[phase],) if several else ()  # type: ignore[index]
        base = NONE if latency is None or latency.baseline_s is None else units.seconds(latency.baseline_s)
        lines.append((*cells, base, change_words(latency), _said(outcome, latency)))
    return lines


def _said(outcome: Outcome, latency: Latency | None) -> str:
    status = _status(outcome, latency)
    if latency is None or latency.error:
        return outcome.text if status == "skipped" else status
    # `n.s.` and `too noisy` stand in the column before this one.
    words = [latency.verdict_kind] if latency.verdict_kind in ("slower", "faster", "equal") else []
    return "; ".join([*words, *(["taken over"] if status == "taken over" else [])])


@contextmanager
def showing(
    console: "Console", asked: Sequence[Job], words: Callable[[Any], str]
) -> Iterator[tuple[Report, Callable[[Outcome], object]]]:
    """Show the table while it grows; it is drawn only between samples, so that nothing disturbs a measurement.

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
            said = "; ".join(" ".join(filter(None, line[1:])) for line in _lines(outcome, ()))
            console.print(
                f"{len(done)}: {cell_words(outcome.job)}: {said}", highlight=False, soft_wrap=True, markup=False
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
            last = done[-max(1, (console.height - 8) // (2 * len(asked[0].request.phases))) :]
            live.update(Group(*sweep_tables(last, asked), line), refresh=True)

        def tell_live(outcome: Outcome) -> None:
            done.append(outcome)
            draw(cell_words(outcome.job), None)

        yield draw, tell_live


# ------------------------------------------------------------------------------------------------------------ pictures
def write_pictures(outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    """Draw what a sweep found; several machines get a folder each.

    Returns:
        A line for each picture: where it is, or why there is none.

    Raises:
        RecordError: the folder cannot be written.
    """
    from selab.report.figures import registry

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
                registry.draw(shown, into / file)
                lines.append(f"picture: {into / file}")
    return lines


def _pictures(group: Sequence[Outcome]) -> dict[str, Callable[[], registry.Picture]]:
    """Return the figures of one machine's cells, by file name."""
    records = [one.record for one in group if one.record is not None]
    phase = group[0].job.request.phases[0]
    missing = [
        report_figures_base.LeftOut(name=cell_words(one.job), why=one.state) for one in group if one.record is None
    ]
    slugs = Counter(record.workload.slug for record in records)
    commonest = min(slugs, key=lambda slug: (-slugs[slug], slug), default=None)
    found: dict[str, Callable[[], registry.Picture]] = {
        "tax_batch.svg": lambda: report_figures_lines.tax_lines(records, "batch", phase=phase, missing=missing),
        "latency_macs.svg": lambda: scatter.points("macs", "latency", records=records, workload=commonest),
    }
    if len({resolution_of(one.job) for one in group}) > 1:
        found["tax_resolution.svg"] = lambda: report_figures_lines.tax_lines(
            records, "resolution", phase=phase, missing=missing
        )
    return found
