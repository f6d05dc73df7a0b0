"""Records and published numbers → tables."""

from collections.abc import Sequence
from operator import attrgetter

from selab import units
from selab.errors import RecordError
from selab.experiments.tax_record import TaxRecord
from selab.models.provenance import is_own_baseline, name_of, variants_of
from selab.models.spec import Variant
from selab.records.types import (
    COST_ROWS,
    MEMORY_ROWS,
    PHASE_NAMES,
    Cost,
    Latency,
    Memory,
    Record,
    Workload,
)
from selab.records.verdict import change_words
from selab.report.published import (
    points,
    published_pair,
)
from selab.report.table import Table
from selab.units import NONE


# ---------------------------------------------------------------------------------------------------- one architecture
def _row(label: str, base: float | None, variant: float | None, show: units.Format) -> tuple[str, ...]:
    if variant is None:
        return (label, NONE if base is None else show(base), NONE, NONE, NONE)
    if base is None:
        return (label, NONE, show(variant), NONE, NONE)
    change = units.percent(variant / base - 1) if base else NONE
    difference = variant - base
    return (label, show(base), show(variant), f"{'+' if difference > 0 else ''}{show(difference)}", change)


_MORE_COST_ROWS: tuple[tuple[str, str, units.Format], ...] = (
    ("FLOPs, forward", "flops", units.count),
    ("FLOPs, backward", "flops_backward", units.count),
    ("activations (conv outputs)", "activations", units.count),
    ("buffers (running statistics)", "buffer_elements", units.count),
)


def _cost_rows(cost: Cost, base: Cost | None, which: Sequence[tuple[str, str, units.Format]]) -> list[tuple[str, ...]]:
    return [
        _row(label, None if base is None else attrgetter(path)(base), attrgetter(path)(cost), show)
        for label, path, show in which
    ]


def _latency_row(latency: Latency, *, label: str) -> tuple[str, ...]:
    if latency.error or latency.baseline_s is None or latency.variant_s is None:
        return (label, NONE, NONE, NONE, "no result")
    base, variant = units.seconds(latency.baseline_s), units.seconds(latency.variant_s)
    if latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None or latency.difference_s is None:
        return (label, base, variant, NONE, "no result")
    half = (latency.ratio_high - latency.ratio_low) / 2
    change = units.percent(latency.ratio - 1, decimals=units.decimals_for(half))
    shown = {"no_result": "no result", "undecided": "not shown", "equal": "equal"}.get(latency.verdict_kind, change)
    sign = "+" if latency.difference_s > 0 else ""
    return (label, base, variant, f"{sign}{units.seconds(latency.difference_s, digits=3)}", shown)


def _latencies(record: Record) -> list[tuple[str, Latency]]:
    """Every latency of a record with its label, in the order of the table."""
    found: list[tuple[str, Latency]] = []
    for group in (record.latency, record.latency_all_cores):
        for phase, latency in group.items():
            where = "" if record.workload.device != "cpu" else f", {latency.threads} thr"
            found.append((PHASE_NAMES[phase] + where, latency))
    for phase, methods in record.gpu_methods.items():
        found += [
            (f"{PHASE_NAMES[phase]}, {method}", latency)
            for method, latency in methods.items()
            if latency != record.latency.get(phase)
        ]
    return found


def _memory_rows(memory: Memory | None, base: Memory | None) -> list[tuple[str, ...]]:
    if memory is None or base is None:
        return []
    return [_row(label, getattr(base, name), getattr(memory, name), units.size) for label, name in MEMORY_ROWS]


def _published_rows(variant: Variant, baseline: Variant | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, label in (("top1_error_pct", "published top-1 error"), ("top5_error_pct", "published top-5 error")):
        ours, theirs = published_pair(variant, baseline, metric)  # type: ignore[arg-type]
        if ours is None:
            continue
        difference = NONE if theirs is None else f"{ours.value - theirs.value:+.2f} pp"
        rows.append((label, NONE if theirs is None else points(theirs), points(ours), difference, ""))
    return rows


def workload_title(work: Workload) -> str:
    """What a table's figures share: `batch 1, 3×224×224, fp32, cpu`."""
    size = "×".join(map(str, work.input_chw))
    parts = [f"batch {work.batch}", size, work.dtype, "channels last" if work.memory_format == "channels_last" else ""]
    parts += ["compiled" if work.compiled else "", "fused" if work.fused else ""]
    parts += ["heap held" if work.held_heap else "", f"{work.mode} mode" if work.mode != "auto" else "", work.device]
    parts += [f"{work.threads} threads" if work.device == "cpu" and work.threads > 1 else ""]
    return ", ".join(part for part in parts if part)


def profile_table(record: Record) -> Table:
    """The table of `selab profile`: base, variant, difference in units and in percent."""
    variant, baseline = variants_of(record)
    rows = _cost_rows(record.cost, record.baseline_cost, COST_ROWS)
    rows += [_latency_row(latency, label=label) for label, latency in _latencies(record)]
    rows += _memory_rows(record.memory, record.baseline_memory)
    notes = ["counted before torch.compile, which fuses operators"] if record.workload.compiled else []
    notes += ["counted as written, before selab.fuse, which moves fewer bytes"] if record.workload.fused else []
    if variant is not None:
        rows += _published_rows(variant, baseline)
        sources = {f"{one.source}, {one.where}" for one in variant.published if one.metric.startswith("top")}
        notes += [f"published: {'; '.join(sorted(sources))}"] if sources else []
    return Table(
        title=f"{record.arch} against {record.baseline} ({workload_title(record.workload)})",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def stage_table(cost: Cost) -> Table:
    """What SE costs by stage, against the whole network."""
    rows = []
    for name in ("squeeze", "excitation", "scale"):
        stage = getattr(cost.se, name)
        rows.append(
            (
                name,
                units.count(stage.macs),
                units.percent(stage.macs / cost.macs.all).lstrip("+"),
                units.size(stage.bytes),
                units.percent(stage.bytes / cost.bytes).lstrip("+"),
            )
        )
    title = f"The blocks by part ({cost.se.blocks} blocks, {units.exact(cost.se.params)} parameters)"
    return Table(title=title, columns=("", "MACs, all", "of network", "bytes", "of network"), rows=tuple(rows))


def verdict_lines(record: Record) -> list[str]:
    """One sentence per latency, and under it what the reader must know about it."""
    lines = [f"warning: {warning}" for warning in record.warnings]
    told: set[tuple[str, str]] = set()
    for label, latency in _latencies(record):
        lines.append(f"{label}: {latency.verdict}")
        for flag in latency.flags:
            if (flag.name, flag.detail) not in told:
                lines.append(f"  flag {flag.name}: {flag.detail}")
                told.add((flag.name, flag.detail))
    for name, memory in ((record.arch, record.memory), (record.baseline, record.baseline_memory)):
        if memory is not None and memory.error:
            lines.append(f"memory of {name}: {memory.error}")
    return lines


def count_table(records: Sequence[Record]) -> Table:
    """The table of `selab count` for several networks: one row each."""
    rows = []
    for record in records:
        cost = record.cost
        figures = (cost.params, cost.macs.conv_linear, cost.macs.paper, cost.macs.all)
        rows.append((record.arch, *(units.count(figure) for figure in figures), units.size(cost.bytes)))
    columns = ("", "params", "conv+linear", "paper", "all", "bytes")
    work = records[0].workload
    return Table(title=f"Forward cost, MACs by convention (batch {work.batch})", columns=columns, rows=tuple(rows))


def single_count_table(record: Record) -> Table:
    """The table of `selab count` for one network, beside its baseline if it has one."""
    cost, base = record.cost, record.baseline_cost
    rows = _cost_rows(cost, base, (*COST_ROWS, *_MORE_COST_ROWS))
    against = f" against {record.baseline}" if record.baseline else ""
    return Table(
        title=f"{record.arch}{against} ({workload_title(record.workload)})",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=record.warnings,
    )


def share_table(record: Record, by: str) -> Table:
    """A network's cost by operator or by module."""
    shares = record.cost.by_operator if by == "operator" else record.cost.by_module
    rows = tuple(
        (
            name or "(the network itself)",
            str(share.calls),
            *map(units.count, (share.macs, share.flops)),
            units.size(share.bytes),
        )
        for name, share in shares.items()
    )
    return Table(title=f"{record.arch} by {by}", columns=("", "calls", "MACs, all", "FLOPs", "bytes"), rows=rows)


def counters_table(cost: Cost) -> Table:
    """Other counters beside ours, each difference in words, until nothing is left."""
    rows: list[tuple[str, ...]] = []
    notes = []
    for counter in cost.counters.values():
        name = f"{counter.name} {counter.version}, {counter.direction.replace('_', '+')}"
        if counter.total is None:
            rows.append((f"{name}: failed: {counter.error}", NONE, counter.unit))
            continue
        rows.append((f"{name}: total", units.exact(counter.total), counter.unit))
        rows.append(("  ours, conv+linear", units.exact(counter.ours), counter.unit))
        rows += [
            (f"  {one.cause}", f"{one.amount:+,}" if one.amount else "0", counter.unit) for one in counter.differences
        ]
        rows.append(("  not explained", units.exact(counter.remainder or 0), counter.unit))
        if counter.uncounted:
            listed = ", ".join(f"{op} ({calls})" for op, calls in sorted(counter.uncounted.items()))
            notes.append(f"{counter.name} does not count: {listed}")
    return Table(
        title="Other counters", columns=("", "amount", "unit"), rows=tuple(rows), notes=tuple(dict.fromkeys(notes))
    )


# --------------------------------------------------------------------------------------------- measured, many records
def check_one_machine(records: Sequence[Record | TaxRecord], *, one_torch: bool = True) -> None:
    """Raises RecordError where records do not share their circumstances: another machine, or another torch on it."""
    places = {
        (record.machine.name, record.machine.libraries.get("torch", "") if one_torch else "any") for record in records
    }
    if len(places) > 1:
        listed = "; ".join(f"{name} with torch {version}" for name, version in sorted(places))
        raise RecordError(f"records of different machines do not share a table: {listed}; name one machine's folder")


def _by_workload(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By the whole workload, whose title tells all of it."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(workload_title(record.workload), []).append(record)
    return groups


def latency_tables(records: Sequence[Record]) -> list[Table]:
    """One machine's ratios, variant over baseline with the 95 % interval: one table per workload and phase.

    Raises:
        RecordError: the records are of several machines.
    """
    check_one_machine(records)
    grids = []
    for work, group in _by_workload(records).items():
        rows: dict[str, list[tuple[str, ...]]] = {}
        for record in group:
            for label, latency in _latencies(record):
                rows.setdefault(label, []).append((name_of(record), *ratio_cells(latency)))
        columns = ("", "base", "variant", "ratio", "95 % interval", "verdict")
        grids += [
            Table(title=f"{label} ({work})", columns=columns, rows=tuple(lines), words=frozenset({0, 5}))
            for label, lines in rows.items()
        ]
    return grids


def added_tables(records: Sequence[Record]) -> list[Table]:
    """What SE adds to each network, everything in percent of the baseline; one table per workload.

    Raises:
        RecordError: the records are of several machines.
    """
    check_one_machine(records)
    machine = records[0].machine
    own = [record for record in records if is_own_baseline(record)]
    columns = ("", "params", "MACs", "bytes", "forward", "forward+backward", "saved for backward", "top-1 error")
    return [
        Table(
            title=f"What SE adds ({work})",
            columns=columns,
            rows=tuple(_added_row(record) for record in sorted(group, key=lambda record: record.cost.macs.all)),
            notes=(
                f"Measured on {machine.gpu or machine.cpu}"
                + (", one thread" if group[0].workload.threads == 1 and machine.gpu is None else "")
                + ", 95 % intervals in brackets. MACs by the convention `paper`. Top-1 error as published, in points.",
            ),
        )
        for work, group in _by_workload(own).items()
    ]


def _added_row(record: Record) -> tuple[str, ...]:
    cost, base = record.cost, record.baseline_cost
    figures = [NONE] * 3
    if base is not None:
        pairs = ((cost.params, base.params), (cost.macs.paper, base.macs.paper), (cost.bytes, base.bytes))
        figures = [_relative(ours, theirs) for ours, theirs in pairs]
    saved = [memory.saved_for_backward_bytes if memory else None for memory in (record.memory, record.baseline_memory)]
    ours, theirs = published_pair(*variants_of(record), "top1_error_pct")
    return (
        name_of(record),
        *figures,
        change_words(record.latency.get("forward")),
        change_words(record.latency.get("forward_backward")),
        _relative(*saved),
        f"{ours.value - theirs.value:+.2f}" if ours is not None and theirs is not None else NONE,
    )


def _relative(ours: float | None, theirs: float | None) -> str:
    return NONE if ours is None or not theirs else units.percent(ours / theirs - 1)


def ratio_cells(latency: Latency) -> tuple[str, str, str, str, str]:
    """Both times, their ratio, its interval, and the verdict with its flags."""
    flags = ", ".join(flag.name for flag in latency.flags)
    verdict = latency.verdict + (f" (flags: {flags})" if flags else "")
    if latency.baseline_s is None or latency.variant_s is None:
        return (NONE, NONE, NONE, NONE, verdict)
    times = (units.seconds(latency.baseline_s), units.seconds(latency.variant_s))
    if latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None:
        return (*times, NONE, NONE, verdict)
    interval = f"[{latency.ratio_low:.4f}, {latency.ratio_high:.4f}]"
    return (*times, f"{latency.ratio:.4f}", interval, verdict)
