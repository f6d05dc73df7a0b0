"""Records and published numbers → tables."""

from collections.abc import Sequence
from operator import attrgetter

from selab import units
from selab.models.provenance import is_own_baseline, name_of, variants_of
from selab.models.spec import Variant
from selab.records.flag_texts import causes
from selab.records.types import (
    COST_ROWS,
    MEMORY_ROWS,
    PHASE_NAMES,
    TORCH,
    Cost,
    Energy,
    Latency,
    Memory,
    Record,
    Workload,
)
from selab.records.verdict import change_s, change_words
from selab.report.exports import exported_notes
from selab.report.machines import by_machine
from selab.report.published import (
    points,
    published_pair,
)
from selab.report.table import Table
from selab.report.wording import verdict_sentence, verdict_word, words_note
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
        # A network in a file of another runtime has no backward pass.
        if "backward" not in path or attrgetter(path)(cost)
    ]


def _latency_row(latency: Latency, *, label: str) -> tuple[str, ...]:
    word = verdict_word(latency)
    if latency.error or latency.baseline_s is None or latency.variant_s is None:
        return (label, NONE, NONE, NONE, word)
    base, variant = units.seconds(latency.baseline_s), units.seconds(latency.variant_s)
    if latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None:
        return (label, base, variant, NONE, word)
    half = (latency.ratio_high - latency.ratio_low) / 2
    change = units.percent(latency.ratio - 1, decimals=units.decimals_for(half))
    added_s = change_s(latency.baseline_s, latency.ratio)
    sign = "+" if added_s > 0 else ""
    shown = change if word in ("slower", "faster") else word
    if latency.unit == "process":
        shown = change_words(latency)
    return (label, base, variant, f"{sign}{units.seconds(added_s, digits=3)}", shown)


def _energy_row(energy: Energy) -> tuple[str, ...]:
    label = f"energy, {PHASE_NAMES[energy.phase]}"
    if energy.baseline_j is None or energy.variant_j is None or energy.ratio is None:
        return (label, NONE, NONE, NONE, "failed")
    change = f"about {units.percent(energy.ratio - 1, decimals=0)}"
    if energy.ratio_low is not None and energy.ratio_high is not None:
        change = units.change(energy.ratio, energy.ratio_low, energy.ratio_high)
    difference = energy.variant_j - energy.baseline_j
    sign = "+" if difference > 0 else ""
    base, variant = units.joules(energy.baseline_j), units.joules(energy.variant_j)
    return (label, base, variant, f"{sign}{units.joules(difference, digits=3)}", change)


def _latencies(record: Record) -> list[tuple[str, Latency]]:
    """Return every latency of a record with its label, in the order of the table."""
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
    """Return what the figures of a table share: `batch 1, 3×224×224, fp32, cpu`."""
    return ", ".join(work.words())


def profile_table(record: Record) -> Table:
    """Return the table of `selab profile`: base, variant, difference in units and in percent."""
    variant, baseline = variants_of(record)
    rows = _cost_rows(record.cost, record.baseline_cost, COST_ROWS)
    rows += [_latency_row(latency, label=label) for label, latency in _latencies(record)]
    rows += [_energy_row(one) for one in record.energy.values()]
    # Phases that were not asked for have no memory, and no row.
    rows += [row for row in _memory_rows(record.memory, record.baseline_memory) if set(row[1:]) != {units.NONE}]
    notes = (
        ["difference of times: the base's time multiplied by the change, which is measured in pairs"]
        if record.latency
        else []
    )
    notes += [
        f"energy: of one image, by {one}" for one in dict.fromkeys(energy.counter for energy in record.energy.values())
    ]
    notes += [f"energy: not measured: {record.energy_left_out}"] if record.energy_left_out else []
    notes += ["counted before torch.compile, which fuses operators"] if record.workload.compiled else []
    notes += ["counted as written, before selab.fuse, which moves fewer bytes"] if record.workload.fused else []
    notes += exported_notes(record.exported) if record.exported is not None else []
    notes += ["counted in fp32, before it was quantised"] if record.workload.dtype == "int8" else []
    if variant is not None:
        rows += _published_rows(variant, baseline)
        sources = {f"{one.source}, {one.where}" for one in variant.published if one.metric.startswith("top")}
        notes += [f"published: {'; '.join(sorted(sources))}"] if sources else []
    partial = "" if record.complete else " (partial)"
    return Table(
        title=f"{record.arch} against {record.baseline} ({workload_title(record.workload)}){partial}",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=(*notes, *words_note(rows)),
    )


def stage_table(cost: Cost) -> Table:
    """Return what the blocks cost by stage, against the whole network."""
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
    title = f"The blocks by part ({units.counted(cost.se.blocks, 'block')}, {units.exact(cost.se.params)} parameters)"
    return Table(title=title, columns=("", "MACs, all", "of network", "bytes", "of network"), rows=tuple(rows))


def verdict_lines(record: Record, *, verbose: bool = False) -> list[str]:
    """Return warnings, one sentence for each latency, and remarks; as short as can be, or everything.

    Args:
        record: of `selab profile`.
        verbose: every reason and every flag; without it the first reason, and at most three remarks in all.
    """
    warnings = [f"warning: {warning}" for warning in record.warnings]
    sentences = [phase_sentence(record, label, latency, verbose=verbose) for label, latency in _latencies(record)]
    found = remarks(record)
    if verbose:
        flags = dict.fromkeys(
            f"flag {flag.name}: {flag.detail}" for _, latency in _latencies(record) for flag in latency.flags
        )
        return [*warnings, *sentences, *found, *flags]
    most = max(0, _MOST_REMARKS - len(warnings))
    if len(found) > most:
        rest = len(found) - most + 1
        found = [*found[: max(0, most - 1)], f"{units.counted(rest, 'more remark')}: --verbose shows all."]
    return [*warnings, *sentences, *found]


_MOST_REMARKS = 3


def phase_sentence(record: Record, label: str, latency: Latency, *, verbose: bool = False) -> str:
    """Return what one latency says: `forward, 1 thr: slower by 9.3 % …; 11.6 → 10.6 samples/s`."""
    said = verdict_sentence(latency)
    if not verbose and latency.verdict_kind == "no_result":
        said = said.split("; ")[0]
    if latency.baseline_s and latency.variant_s:
        said += f"; {samples_per_second(record.workload.batch, latency)} samples/s"
    return f"{label}: {said}"


def samples_per_second(batch: int, latency: Latency) -> str:
    """Return `47.6 → 42.7`: images, or inputs of another kind, per second of base and variant."""
    rates = (NONE if not seconds else f"{batch / seconds:,.4g}" for seconds in (latency.baseline_s, latency.variant_s))
    return " → ".join(rates)


def remarks(record: Record) -> list[str]:
    """Return what a reader must know about the measurement, each cause once, the most important first."""
    failed = [
        f"memory of {name}: {memory.error}"
        for name, memory in ((record.arch, record.memory), (record.baseline, record.baseline_memory))
        if memory is not None and memory.error
    ]
    failed += [f"energy of {PHASE_NAMES[one.phase]}: {one.error}" for one in record.energy.values() if one.error]
    return [*failed, *causes(flag for _, latency in _latencies(record) for flag in latency.flags)]


PAPER_FLOPS = "(paper's FLOPs): multiply-accumulates as arXiv 1709.01507 counts them, which it prints as FLOPs."


def count_table(records: Sequence[Record]) -> Table:
    """Return the table of `selab count` for several networks: of two their difference, of more one row each."""
    if len(records) == 2:
        return _difference_table(*records)
    rows = []
    for record in records:
        cost = record.cost
        figures = (cost.params, cost.macs.conv_linear, cost.macs.paper, cost.macs.all)
        rows.append((record.arch, *(units.count(figure) for figure in figures), units.size(cost.bytes)))
    work = records[0].workload
    return Table(
        title=f"Forward cost (batch {work.batch})",
        columns=("", "params", "MACs, conv+linear", "MACs (paper's FLOPs)", "MACs, all", "bytes"),
        rows=tuple(rows),
        notes=(f"MACs {PAPER_FLOPS}", *_warnings(records)),
        drop_first=(2, 4),
    )


def _warnings(records: Sequence[Record]) -> list[str]:
    return [f"{record.arch}: {warning}" for record in records for warning in record.warnings]


def _difference_table(first: Record, second: Record) -> Table:
    """Return two networks side by side with their difference; a baseline stands before its variant."""
    base, variant = (second, first) if second.arch == first.baseline else (first, second)
    return Table(
        title=f"{variant.arch} against {base.arch} ({workload_title(variant.workload)})",
        columns=("", base.arch, variant.arch, "difference", "change"),
        rows=tuple(_cost_rows(variant.cost, base.cost, (*COST_ROWS, *_MORE_COST_ROWS))),
        notes=(f"MACs {PAPER_FLOPS}", *_warnings((base, variant))),
    )


def single_count_table(record: Record) -> Table:
    """Return the table of `selab count` for one network, with its baseline if it has one."""
    cost, base = record.cost, record.baseline_cost
    rows = _cost_rows(cost, base, (*COST_ROWS, *_MORE_COST_ROWS))
    if base is None:
        return Table(
            title=f"{record.arch} ({workload_title(record.workload)})",
            columns=("", "count"),
            rows=tuple((label, variant) for label, _, variant, *_ in rows),
            notes=record.warnings,
        )
    return Table(
        title=f"{record.arch} against {record.baseline} ({workload_title(record.workload)})",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=record.warnings,
    )


def share_table(record: Record, by: str) -> Table:
    """Return a network's cost by operator or by module."""
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
    """Return other counters' totals and each difference to ours, until nothing is left."""
    rows: list[tuple[str, ...]] = []
    notes = []
    for counter in cost.counters.values():
        name = f"{counter.name} {counter.version}, {counter.direction.replace('_', '+')}"
        if counter.total is None:
            # Why is said once, by the warnings of the record.
            rows.append((f"{name}: failed", NONE, counter.unit))
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
def _groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Return records by machine and workload, each group with what its figures share, in words."""
    machines = by_machine(records)
    found = []
    for place, group in machines.items():
        workloads: dict[str, list[Record]] = {}
        for record in group:
            workloads.setdefault(workload_title(record.workload), []).append(record)
        found += [(f"{work}; {place}" if len(machines) > 1 else work, same) for work, same in workloads.items()]
    return found


def latency_tables(records: Sequence[Record]) -> list[Table]:
    """Return ratios, variant over baseline with the 95 % interval: one table per machine, workload and phase."""
    tables = []
    for work, group in _groups(records):
        rows: dict[str, list[tuple[Record, Latency]]] = {}
        for record in group:
            for label, latency in _latencies(record):
                rows.setdefault(label, []).append((record, latency))
        tables += [_latency_table(f"{label} ({work})", lines) for label, lines in rows.items()]
    return tables


def _latency_table(title: str, lines: Sequence[tuple[Record, Latency]]) -> Table:
    rows = []
    seen: dict[str, list[str]] = {}
    failed = []
    for record, latency in lines:
        name = name_of(record)
        base, variant, ratio, interval, verdict = ratio_cells(latency)
        rate = NONE if latency.baseline_s is None else samples_per_second(record.workload.batch, latency)
        rows.append((name, base, variant, rate, ratio, interval, verdict))
        failed += [f"{name}: {verdict_sentence(latency)}"] if latency.error else []
        for cause in causes(latency.flags):
            seen.setdefault(cause, []).append(name)
    notes = [
        sentence if len(names) == len(lines) else f"{', '.join(names)}: {sentence}" for sentence, names in seen.items()
    ]
    return Table(
        title=title,
        columns=("", "base", "variant", "samples/s", "ratio", "95 % interval", "verdict"),
        rows=tuple(rows),
        notes=(*words_note(rows), *failed, *notes),
        words=frozenset({0, 6}),
        drop_first=(3, 1, 2),
    )


def added_tables(records: Sequence[Record]) -> list[Table]:
    """Return what SE adds to each network, in percent of the baseline; one table per machine and workload."""
    own = [record for record in records if is_own_baseline(record) and record.workload.runtime == TORCH]
    columns = ("", "params", "MACs", "bytes", "forward", "forward+backward", "saved for backward", "top-1 error")
    tables = []
    for work, group in _groups(own):
        machine = group[0].machine
        rows = tuple(_added_row(record) for record in sorted(group, key=lambda record: record.cost.macs.all))
        where = ", one thread" if group[0].workload.threads == 1 and machine.gpu is None else ""
        tables.append(
            Table(
                title=f"What SE adds ({work})",
                columns=columns,
                rows=rows,
                notes=(
                    f"Measured on {machine.gpu or machine.cpu}{where}, 95 % intervals in brackets. "
                    "MACs by the convention `paper`. Top-1 error as published, in points.",
                    *words_note(rows),
                ),
                drop_first=(6, 7, 1),
            )
        )
    return tables


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
    """Return both times, their ratio, its interval, and the verdict in a word."""
    verdict = verdict_word(latency)
    if latency.baseline_s is None or latency.variant_s is None:
        return (NONE, NONE, NONE, NONE, verdict)
    times = (units.seconds(latency.baseline_s), units.seconds(latency.variant_s))
    if latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None:
        return (*times, NONE, NONE, verdict)
    interval = f"[{latency.ratio_low:.4f}, {latency.ratio_high:.4f}]"
    return (*times, f"{latency.ratio:.4f}", interval, verdict)
