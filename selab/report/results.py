"""Records as the Python API returns them: they print well, are saved, and give plain values."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group

from selab import units
from selab.errors import RecordError
from selab.experiments.compared import Compared
from selab.experiments.diff import RatioChange, check_comparable, grew, ratio_changes
from selab.experiments.tax_record import SCHEMA as TAX_SCHEMA
from selab.experiments.tax_record import TaxRecord, read_tax_record, save_tax_record
from selab.records.bounds import json_fault
from selab.records.display import Displayed
from selab.records.files import check_writable, read_text
from selab.records.store import read_record, save
from selab.records.types import COST_ROWS, PHASE_NAMES, SCHEMA, Latency, Record
from selab.records.verdict import change_words
from selab.report.accuracy import comparison_table
from selab.report.checks import diff_table
from selab.report.profiles import profile_table, single_count_table
from selab.report.table import Table
from selab.report.tax import tax_tables
from selab.training.record import SCHEMA as ACCURACY_SCHEMA
from selab.training.record import AccuracyRecord, read_accuracy_record, save_accuracy_record

AnyRecord = Record | TaxRecord | AccuracyRecord
_LATENCY = (
    *("phase", "method", "threads", "mode", "baseline_s", "variant_s", "ratio", "ratio_low", "ratio_high"),
    *("noise_floor", "verdict_kind", "verdict"),
)


class RecordResult(Displayed):
    """A record with its fields as attributes: `result.cost`, `result.latency["forward"]`.

    Attributes:
        record: the record itself, a frozen value.
    """

    def __init__(self, record: AnyRecord) -> None:
        self.record = record

    def __getattr__(self, name: str) -> Any:
        if name == "record" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.record, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.record.__struct_fields__})

    def save(self, path: str | Path, *, replace: bool = False) -> Path:
        """Write the record as JSON, whole or not at all.

        Args:
            path: of the file.
            replace: whether an existing file may be replaced.

        Returns:
            The path that was written.

        Raises:
            RecordError: the file exists, or cannot be written.
        """
        target = Path(path)
        if target.is_file() and not replace:
            raise RecordError(f"{target}: exists; pass replace=True to overwrite it")
        check_writable(target, replace=replace)
        if isinstance(self.record, TaxRecord):
            save_tax_record(self.record, target)
        elif isinstance(self.record, AccuracyRecord):
            return save_accuracy_record(self.record, target)
        else:
            save(self.record, target)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as plain values, raw samples included, as its JSON has them."""
        plain: dict[str, Any] = msgspec.to_builtins(self.record)
        return plain

    def tables(self) -> list[Table]:
        """Return the tables that the command line prints for this record."""
        if isinstance(self.record, TaxRecord):
            return tax_tables(self.record)
        if isinstance(self.record, AccuracyRecord):
            return [comparison_table(Compared(record=self.record))]
        if self.record.kind == "count":
            return [single_count_table(self.record)]
        return [profile_table(self.record)]

    def summary(self) -> str:
        """Return the networks and the headline in one line."""
        record = self.record
        head = f"{record.arch} against {record.baseline}" if record.baseline else record.arch
        if isinstance(record, AccuracyRecord):
            done = sum(seed.pair is not None for seed in record.seeds)
            return f"{head}: accuracy on {record.data.name}, {done} of {units.counted(len(record.seeds), 'seed')}"
        if isinstance(record, TaxRecord):
            return (
                f"{head}: {PHASE_NAMES[record.phase]}, {units.counted(len(record.implementations), 'implementation')}"
            )
        parts = [_costs(record)]
        parts += [f"{PHASE_NAMES[phase]} {change_words(latency)}" for phase, latency in record.latency.items()]
        return f"{head}: {'; '.join(parts)}"

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        if isinstance(self.record, AccuracyRecord):
            score = "ap_pct" if self.record.data.task == "detection" else "top1_pct"
            return "seed", f"baseline_{score}", f"variant_{score}", "baseline_seconds", "variant_seconds"
        if isinstance(self.record, TaxRecord):
            return "baseline", "variant", *_LATENCY
        if self.record.latency:
            return "arch", "baseline", *_LATENCY
        return "arch", *(path for _, path, _ in COST_ROWS)

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each seed, pair or phase; of a count for each network. Base units."""
        record = self.record
        if isinstance(record, AccuracyRecord):
            return [
                (
                    seed.seed,
                    *(None if one is None else one.test.score_pct for one in (seed.baseline, seed.variant)),
                    *(None if one is None else one.seconds for one in (seed.baseline, seed.variant)),
                )
                for seed in record.seeds
            ]
        if isinstance(record, TaxRecord):
            return [(pair.baseline, pair.variant, *_figures(pair.latency)) for pair in record.pairs]
        if record.latency:
            latencies = [*record.latency.values(), *record.latency_all_cores.values()]
            return [(record.arch, record.baseline, *_figures(latency)) for latency in latencies]
        costs = [(record.arch, record.cost), (record.baseline, record.baseline_cost)]
        return [
            (name, *(attrgetter(path)(cost) for _, path, _ in COST_ROWS)) for name, cost in costs if cost is not None
        ]

    def __rich__(self) -> Any:
        return Group(*self.tables())

    def _repr_html_(self) -> str:
        return _html(self.summary(), self.tables())


def _figures(latency: Latency) -> list[object]:
    return [getattr(latency, name) for name in _LATENCY]


def _costs(record: Record) -> str:
    if record.baseline_cost is None:
        return record.cost.summary()
    both = record.cost, record.baseline_cost
    params = units.percent(both[0].params / both[1].params - 1) if both[1].params else "?"
    macs = units.percent(both[0].macs.paper / both[1].macs.paper - 1) if both[1].macs.paper else "?"
    return f"{params} parameters, {macs} MACs"


class RecordChanges(Displayed):
    """The changes from one record to another of equal workload, machine and baseline.

    Attributes:
        before: the first record.
        after: the second record.
        ratios: the change of each phase's ratio to the baseline.
        worse: names of what costs more, or is shown to be slower.
    """

    def __init__(self, before: Record, after: Record, *, names: tuple[str, str]) -> None:
        check_comparable(before, after, names=names)
        self.before, self.after = before, after
        self.ratios: tuple[RatioChange, ...] = tuple(ratio_changes(before, after))
        self.worse: tuple[str, ...] = tuple(grew(before, after))

    def summary(self) -> str:
        """Return what got worse, and each phase's change, in one line."""
        parts = [one.text for one in self.ratios]
        parts.append(f"worse: {', '.join(self.worse)}" if self.worse else "nothing is worse")
        return "; ".join(parts)

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return "quantity", "before", "after", "change", "change_low", "change_high"

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each cost and each phase; changes are fractions."""
        rows: list[tuple[object, ...]] = []
        for _, path, _ in COST_ROWS:
            old, new = (attrgetter(path)(record.cost) for record in (self.before, self.after))
            rows.append((path, old, new, new / old - 1 if old else None, None, None))
        for one in self.ratios:
            old, new = (record.latency[one.phase].ratio for record in (self.before, self.after))
            rows.append((f"{one.phase} ratio", old, new, one.change, one.low, one.high))
        return rows

    def __rich__(self) -> Any:
        return diff_table(self.before, self.after)

    def _repr_html_(self) -> str:
        return _html(self.summary(), [diff_table(self.before, self.after)])


def _html(summary: str, tables: Sequence[Table]) -> str:
    from html import escape

    parts = [f"<p>{escape(summary)}</p>"]
    for table in tables:
        head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(f"<p><b>{escape(table.title)}</b></p>")
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        parts += [f"<p>{escape(note)}</p>" for note in table.notes]
    return "".join(parts)


def read_any(path: Path) -> AnyRecord:
    """Read a record of any kind: a profile or count, an overhead comparison, or an accuracy comparison.

    Raises:
        RecordError: the file is not a record, or cannot be trusted.
    """
    text = read_text(path)
    try:
        head: Any = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise RecordError(f"{path}: not a record: {json_fault(text, error)}") from None
    found = head.get("schema") if isinstance(head, dict) else None
    kind = found.partition("/")[0] if isinstance(found, str) else ""
    known = {one.partition("/")[0]: one for one in (SCHEMA, TAX_SCHEMA, ACCURACY_SCHEMA)}
    if kind == TAX_SCHEMA.partition("/")[0]:
        return read_tax_record(path)
    if kind == ACCURACY_SCHEMA.partition("/")[0]:
        return read_accuracy_record(path)
    if kind == SCHEMA.partition("/")[0]:
        return read_record(path)
    raise RecordError(f"{path}: schema is {found!r}; allowed: {', '.join(known.values())}")
