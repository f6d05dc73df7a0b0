"""What SE costs in the runtimes that ship: one table per machine, the fastest runtime of each network first."""

import math
from collections.abc import Sequence
from statistics import median
from typing import TypeVar

from selab import units
from selab.experiments.tax_record import AGAIN, LATE, TaxRecord, words_of
from selab.models.provenance import name_of
from selab.records.exported import Exported
from selab.records.imported import Imported
from selab.records.types import RUNTIMES, TORCH, Record
from selab.records.verdict import change_words
from selab.report.table import Table
from selab.report.wording import tax_words, time_words, words_note
from selab.units import NONE

_R = TypeVar("_R", Record, TaxRecord)
# Runtime → the package whose version decides.
_PACKAGES = {"litert": "ai-edge-litert", "aoti": "torch"}
_COLUMNS = (
    "",
    "runtime",
    "type",
    "base",
    "SE adds",
    "all cores",
    "file",
    "SE adds to it",
    "parts",
    "error",
    "same top-1",
)


def shown_records(records: Sequence[Record]) -> list[Record]:
    """Return the records of forward passes in another runtime, and those of eager PyTorch beside them.

    Args:
        records: profiles; those of other phases alone, of larger batches or of a GPU are left out.

    Returns:
        Network by network, the fastest baseline first.
    """
    shown = [record for record in records if _is_shown(record)]
    exported = {(record.machine.name, record.arch) for record in shown if record.workload.runtime != TORCH}
    shown = [record for record in shown if (record.machine.name, record.arch) in exported]
    order = list(dict.fromkeys(record.arch for record in shown))
    return sorted(shown, key=lambda record: (order.index(record.arch), _base_s(record)))


def runtime_tables(records: Sequence[Record]) -> list[Table]:
    """Return the tables of `shown_records` by network, runtime and type."""
    return [_table(place, group) for place, group in _by_name(shown_records(records)).items()]


def spelling_tables(records: Sequence[TaxRecord]) -> list[Table]:
    """Return what each spelling of a network's SE blocks costs: one table per machine and network.

    Args:
        records: those of PyTorch and of GPUs are left out.
    """
    exported = [record for record in records if record.workload.runtime != TORCH]
    tables = []
    for place, group in _by_name(exported).items():
        networks: dict[str, list[TaxRecord]] = {}
        for record in group:
            work = record.workload
            shape = "×".join(map(str, work.input_chw))
            networks.setdefault(f"{name_of(record)}, batch {work.batch}, {shape}", []).append(record)
        tables += [_spelling_table(f"{name} ({place})", ones) for name, ones in networks.items()]
    return tables


def _spelling_table(title: str, records: Sequence[TaxRecord]) -> Table:
    order = list(RUNTIMES)
    records = sorted(records, key=lambda one: (one.workload.dtype, order.index(one.workload.runtime)))
    names = list(dict.fromkeys(name for record in records for name in record.implementations))
    controls = [record.latency(AGAIN, method=record.methods[0]) for record in records]
    rows = [("baseline", *(time_words(None if one is None else one.baseline_s) for one in controls))]
    rows += [
        (words_of(name), *(tax_words(record.latency(name, method=record.methods[0])) for record in records))
        for name in names
    ]
    kinds = [f"{record.workload.runtime} {_type_words(record)}" for record in records]
    return Table(
        title=f"What SE adds by spelling: {title}",
        columns=("", *kinds),
        rows=tuple(rows),
        notes=(
            "Time over the baseline's, the network without SE in the same runtime; in brackets 95 % intervals. All "
            "spellings of a column alternate in each of several fresh processes.",
            *(
                ["late: the runtime's own spelling, with the blocks on maps of at most a 16th of the input's height."]
                if LATE in names
                else []
            ),
            *words_note(rows),
            _versions(records),
        ),
    )


def _by_name(records: Sequence[_R]) -> dict[str, list[_R]]:
    """Return records by machine. The version of torch, which only exported the networks, does not divide them."""
    groups: dict[str, list[_R]] = {}
    for record in records:
        groups.setdefault(record.machine.name, []).append(record)
    return groups


def _versions(records: Sequence[Record] | Sequence[TaxRecord]) -> str:
    """Return `Versions: onnxruntime 1.23.2, openvino 2025.3.0.`."""
    found: dict[str, None] = {}
    for record in records:
        package = _PACKAGES.get(record.workload.runtime, record.workload.runtime)
        version = record.machine.libraries.get(package)
        if version is not None:
            found[f"{package} {version}"] = None
    return f"Versions: {', '.join(found)}."


def _type_words(record: Record | TaxRecord) -> str:
    return record.workload.dtype + (", SE in fp32" if record.workload.float_blocks else "")


def imported_table(records: Sequence[Imported]) -> Table:
    """Return what benchmark tools measured on devices: times of both networks, and the ratio of their pairs."""
    rows = tuple(
        (
            f"{one.arch} against {one.baseline}",
            one.device,
            one.runtime,
            one.dtype,
            str(one.threads),
            *(units.seconds(median([run.typical_s for run in runs])) for runs in (one.baseline_runs, one.variant_runs)),
            _pairs_words(one),
        )
        for one in records
    )
    few = any(one.ratio_low is None for one in records)
    return Table(
        title="SE on devices, as the runtimes' own tools timed it",
        columns=("", "device", "runtime", "type", "threads", "base", "variant", "SE adds"),
        rows=rows,
        notes=(
            "A run of a tool is one network alone; pairs of runs are compared"
            + ("." if all(one.ratio_low is None for one in records) else "; in brackets the 95 % interval."),
            *(["No interval: give three runs of each or more, made in turn (base, variant, base, …)."] if few else []),
        ),
        words=frozenset({0, 1, 2, 3}),
        drop_first=(4, 3, 2, 1, 5, 6),
    )


def _pairs_words(one: Imported) -> str:
    if one.ratio_low is None or one.ratio_high is None:
        return f"about {units.percent(one.ratio - 1, decimals=0)}, no interval"
    return units.change(one.ratio, one.ratio_low, one.ratio_high)


def _is_shown(record: Record) -> bool:
    workload = record.workload
    in_torch = workload.dtype == "fp32" and not workload.fused and workload.frozen == workload.compiled
    return (
        (workload.runtime != TORCH or in_torch)
        and workload.device == "cpu"
        and workload.batch == 1
        and "forward" in record.latency
    )


def _table(place: str, records: Sequence[Record]) -> Table:
    rows = tuple(map(_row, records))
    threads = {record.workload.threads for record in records}
    return Table(
        title=f"SE in the runtimes that ship ({place})",
        columns=_COLUMNS,
        rows=rows,
        notes=(
            f"Batch 1, forward, {'one thread' if threads == {1} else 'the threads of each record'} and all cores, 95 % "
            "intervals in brackets. The fastest runtime of each network first; torch is eager PyTorch, torch.compile "
            "has frozen weights.",
            "Parts: subgraphs of the delegate (one is best), or changes of the memory layout that a block adds. "
            "Error: the largest difference to the network in fp32, over its largest output.",
            *words_note(rows),
            _versions(records),
        ),
        words=frozenset({0, 1, 2}),
        drop_first=(7, 6, 10, 5),
    )


def runtime_words(record: Record) -> str:
    """Return what ran the networks of a record: `openvino`, `torch`, `torch.compile`."""
    return "torch.compile" if record.workload.compiled else record.workload.runtime


def _base_s(record: Record) -> float:
    seconds = record.latency["forward"].baseline_s
    return math.inf if seconds is None else seconds


def _row(record: Record) -> tuple[str, ...]:
    workload, latency = record.workload, record.latency["forward"]
    how = runtime_words(record) + (f", {workload.spelling}" if workload.spelling else "")
    time = NONE if latency.baseline_s is None else units.seconds(latency.baseline_s, digits=3)
    cells = [
        name_of(record),
        how,
        _type_words(record),
        time,
        change_words(latency),
        change_words(record.latency_all_cores.get("forward")),
    ]
    return (*cells, *_exported_cells(record.exported))


def _exported_cells(facts: Exported | None) -> tuple[str, ...]:
    if facts is None:
        return (NONE,) * 5
    base, found = facts.without_blocks, facts.agreement
    added = NONE if base is None else units.percent(facts.with_blocks.bytes / base.bytes - 1)
    same = NONE if found.same_top_1 is None else units.share(found.same_top_1)
    return (units.size(facts.with_blocks.bytes, digits=3), added, _parts(facts), f"{found.max_relative:.2g}", same)


def _parts(facts: Exported) -> str:
    """Return `1` for one subgraph, `7 (+6)` where SE adds six, `+4 a block` for changes of layout."""
    mine, base = facts.with_blocks.partitions, facts.without_blocks
    if mine.subgraphs is not None:
        more = mine.subgraphs - (base.partitions.subgraphs or 0) if base is not None else 0
        return f"{mine.subgraphs} ({more:+d})" if more else str(mine.subgraphs)
    if mine.reorders is None or base is None or base.partitions.reorders is None or not facts.blocks:
        return NONE
    return f"{(mine.reorders - base.partitions.reorders) / facts.blocks:+.2g} a block"
