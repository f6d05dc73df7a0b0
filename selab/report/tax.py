"""Tables of SE implementations: each one's overhead and the lower bound, the stages, memory."""

from collections.abc import Iterator, Sequence
from itertools import product

from selab import units
from selab.experiments.tax_exported import advice
from selab.experiments.tax_record import (
    AGAIN,
    BASELINE,
    FUSED,
    IMPLEMENTATIONS,
    LATE,
    REFERENCE,
    WITHOUT,
    TaxPair,
    TaxRecord,
    least,
    words_of,
)
from selab.models.provenance import name_of
from selab.records.estimate import estimate
from selab.records.flag_texts import causes
from selab.records.types import PHASE_NAMES, TORCH, Latency
from selab.records.verdict import NOT_SIGNIFICANT, TOO_NOISY, change_words, no_result_reasons, not_excluded
from selab.report.machines import by_machine
from selab.report.profiles import workload_title
from selab.report.table import Table
from selab.report.wording import tax_words, time_words, verdict_word, words_note
from selab.units import NONE

_TAX = (
    "Tax: time over the baseline's, the network without SE, which selab.fuse changed too; in brackets 95 % intervals."
)
_EXPORTED = "Tax: time over the baseline's, the network without SE in the same runtime; in brackets 95 % intervals."
_LATE_NOTE = "late: the runtime's own spelling, with the blocks on maps of at most a 16th of the input's height."
_LEAST: dict[bool, str] = {
    False: "Least: each block's map y read once more (its mean must be known before it can be scaled), and the weights "
    "of the two layers; scaling is counted as part of a pass that the baseline makes anyway.",
    True: "Least: y read once more in the forward pass; in the backward pass, beyond what the baseline moves, y and "
    "the gradient dz behind the block read and dy written, for the gate's gradient must be known before dy is; the "
    "layers' weights read twice and their gradients written.",
}


# --------------------------------------------------------------------------------------------------------------- tables
def tax_tables(record: TaxRecord) -> list[Table]:
    """Return the tables of `selab tax`: implementations and their lower bound, by method; the stages; memory."""
    grids = [_tax_table(record, method) for method in record.methods]
    split = _split_table(record)
    saved = _saved_table(record)
    return [*grids, *([split] if split else []), *([saved] if saved else [])]


def _title(record: TaxRecord, method: str) -> str:
    how = "" if method == "wall" else f", {method}"
    return f"{PHASE_NAMES[record.phase]}, {workload_title(record.workload)}{how}"


def _tax_table(record: TaxRecord, method: str) -> Table:
    rows = []
    shown = [pair for pair in record.pairs if pair.latency.method == method]
    control = next((pair.latency for pair in shown if pair.variant == AGAIN), None)
    baseline_s = None if control is None else control.baseline_s
    rows.append((BASELINE, time_words(baseline_s), "", "", ""))
    rows += [(words_of(one.variant), *_tax_cells(one.latency)) for one in shown if one.baseline == BASELINE]
    at_least = least(record)
    part = NONE if baseline_s is None else units.percent(at_least.seconds / baseline_s)
    rows.append((f"least ({units.size(at_least.bytes, digits=3)})", time_words(at_least.seconds), part, "", ""))
    return Table(
        title=f"The SE tax of {record.arch} over {record.baseline} ({_title(record, method)})",
        columns=("", "time", "tax", "verdict", "flags"),
        rows=tuple(rows),
        notes=(
            f"{_EXPORTED if record.workload.runtime != TORCH else _TAX} {_runs_words(record)}",
            *([_LATE_NOTE] if any(one.variant == LATE for one in shown) else []),
            *([said] if (said := advice(record)) else []),
            *_direct_words(record, method),
            *_removed_words(record, method),
            *_whole_words(record),
            f"{_LEAST[record.phase != 'forward']} At the bandwidth of copies measured in this run.",
            *(f"{remark}." for remark in record.remarks),
            *_failures(record, method),
            *words_note(rows),
            *causes(flag for one in shown for flag in one.latency.flags),
        ),
        words=frozenset({0, 3, 4}),
        drop_first=(4,),
    )


def _runs_words(record: TaxRecord) -> str:
    unit = next((pair.latency.unit for pair in record.pairs), "pair")
    if unit == "process":
        number = max(len(pair.latency.runs) for pair in record.pairs)
        return f"All are arms of one interleaved run in each of {number} fresh processes."
    return "All in one interleaved run, in one process."


def _direct_words(record: TaxRecord, method: str) -> Iterator[str]:
    """Yield the fused time over the reference's, which is no overhead and so no row; nothing without a result."""
    latency = record.latency(FUSED, over=REFERENCE, method=method)
    if latency is not None and latency.verdict_kind != "no_result":
        yield f"Time of fused over that of the reference: {change_words(latency)}, in the same run."


def removed(record: TaxRecord, method: str) -> tuple[float, tuple[float, float] | None] | None:
    """Return the removed share of the reference overhead, 1 - (fused - 1) / (reference - 1), and its interval.

    Both ratios have intervals of 97.5 %, so that both hold at once with 95 %, however they depend on each other. If the
    difference of the fused network to the baseline is not resolved, its interval extends to the noise floor.

    Returns:
        None if the reference overhead is not significant, or without a result; the interval alone is None if the 97.5 %
        interval of the reference includes zero.

    Source: Bonferroni's inequality, for the two intervals.
    """
    reference, fused = (record.latency(name, method=method) for name in (REFERENCE, FUSED))
    if reference is None or fused is None or reference.verdict_kind != "slower":
        return None
    left = not_excluded(fused)
    if left is None or reference.ratio is None or fused.ratio is None:
        return None
    whole, rest = (estimate(one.runs, one.statistic, confidence=0.975, unit=one.unit) for one in (reference, fused))
    share = 1 - (fused.ratio - 1) / (reference.ratio - 1)
    if whole.ratio_low <= 1:
        return share, None
    ends = (min(left[0], rest.ratio_low - 1), max(left[1], rest.ratio_high - 1))
    shares = [1 - end / (bound - 1) for end, bound in product(ends, (whole.ratio_low, whole.ratio_high))]
    return share, (min(shares), max(shares))


def _removed_words(record: TaxRecord, method: str) -> Iterator[str]:
    """Yield the share of the overhead that fusing removes, as a sentence; nothing without both results."""
    latencies = [record.latency(name, method=method) for name in (REFERENCE, FUSED)]
    if any(one is None or one.verdict_kind == "no_result" for one in latencies):
        return
    found = removed(record, method)
    if found is None:
        yield "The share that fused removes is not given: the reference overhead is not significant."
        return
    share, interval = found
    if interval is None:
        shown = units.share(share, decimals=0)
        yield f"fused removes {shown} of the reference overhead; no interval: that overhead is too close to zero."
        return
    low, high = interval
    decimals = units.decimals_for((high - low) / 2)
    shown = units.share(share, decimals=decimals) if low > 0 or high < 0 else NOT_SIGNIFICANT
    yield (
        f"fused removes {shown} [{low * 100:.{decimals}f}, {high * 100:.{decimals}f}] of the reference overhead: "
        "1 - (fused - 1) / (reference - 1) of the ratios, at least 95 %."
    )


def _of_whole_blocks(record: TaxRecord) -> bool:
    """Return whether the profiled blocks are another library's, which are not split into stages."""
    return record.profiled is not None and not set(WITHOUT) & set(record.profiled.stages)


def _whole_words(record: TaxRecord) -> Iterator[str]:
    if record.profiled is not None and _of_whole_blocks(record):
        share = sum(record.profiled.stages.values()) / record.profiled.total_s
        yield f"Of a step of the reference, as the profiler sees it, its SE blocks are {units.share(share)}."


def _tax_cells(latency: Latency) -> tuple[str, str, str, str]:
    flags = ", ".join(flag.name for flag in latency.flags)
    return time_words(latency.variant_s), tax_words(latency), verdict_word(latency), flags


def _split_table(record: TaxRecord) -> Table | None:
    asked = {stage: name for stage, name in WITHOUT.items() if name in record.implementations}
    profiled = None if _of_whole_blocks(record) else record.profiled
    if not asked and profiled is None:
        return None
    method = record.methods[0]
    rows = []
    for stage in WITHOUT:
        share = NONE if profiled is None else units.share(profiled.stages[stage] / profiled.total_s)
        rows.append((stage, saving_words(record, stage, method), share))
    if profiled is not None:
        together = sum(profiled.stages.values())
        rows.append(
            (
                "all three",
                change_words(record.latency(REFERENCE, method=method)),
                units.share(together / profiled.total_s),
            )
        )
    return Table(
        title=f"The reference's tax by stage ({_title(record, method)})",
        columns=("", "saved by leaving it out", "of the step, profiled"),
        rows=tuple(rows),
        notes=(
            "Saved: in percent of the baseline's time, against the reference; in brackets 95 % intervals. Without "
            "squeeze the gate comes from a fixed vector; without excitation it is the mean's own, without the two "
            "layers; without scale the map is returned as it came. Parts need not add up: what one stage leaves in a "
            "cache the next one finds there.",
        ),
    )


def saving(record: TaxRecord, stage: str, method: str) -> tuple[float | None, tuple[float, float]] | None:
    """Return what leaving a stage out of the reference saves, as a fraction of the baseline's time, and its interval.

    Returns:
        None where there is no result; the saving alone is None where no difference is shown.
    """
    whole = record.latency(REFERENCE, method=method)
    without = record.latency(WITHOUT[stage], over=REFERENCE, method=method)
    left = None if without is None else not_excluded(without)
    if whole is None or whole.ratio is None or without is None or without.ratio is None or left is None:
        return None
    shown = without.verdict_kind != "undecided"
    low, high = sorted(-bound * whole.ratio for bound in left)
    return ((1 - without.ratio) * whole.ratio if shown else None), (low, high)


def saving_words(record: TaxRecord, stage: str, method: str) -> str:
    """Return `2.1 % [1.8, 2.4]`, or why there is none."""
    if record.latency(WITHOUT[stage], over=REFERENCE, method=method) is None:
        return NONE
    found = saving(record, stage, method)
    if found is None:
        return TOO_NOISY
    value, (low, high) = found
    decimals = units.decimals_for((high - low) / 2)
    shown = NOT_SIGNIFICANT if value is None else units.share(value, decimals=decimals)
    return f"{shown} [{low * 100:.{decimals}f}, {high * 100:.{decimals}f}]"


def _saved_table(record: TaxRecord) -> Table | None:
    sizes = record.saved_for_backward_bytes
    if not sizes:
        return None
    base = sizes.get(BASELINE)
    rows = tuple(
        (words_of(name), units.size(size), units.percent(size / base - 1) if base else NONE)
        for name, size in sizes.items()
    )
    return Table(title="Saved for backward", columns=("", "bytes", "over the baseline"), rows=rows)


def summary_tables(records: Sequence[TaxRecord]) -> list[Table]:
    """Return one table per machine, torch, workload, phase and method: the implementations side by side.

    Records of other runtimes compare spellings, and are left out: see `selab.report.runtimes.spelling_tables`.
    """
    records = [record for record in records if record.workload.runtime == TORCH]
    machines = by_machine(records)
    several = len({record.machine.name for record in records}) > 1
    groups: dict[str, list[tuple[TaxRecord, str]]] = {}
    for place, group in machines.items():
        where = place if several else f"torch {group[0].machine.libraries.get('torch', '')}"
        suffix = f", {where}" if len(machines) > 1 else ""
        for record in group:
            for method in record.methods:
                groups.setdefault(_title(record, method) + suffix, []).append((record, method))
    return [_summary_table(title, group) for title, group in groups.items()]


def _summary_table(title: str, group: Sequence[tuple[TaxRecord, str]]) -> Table:
    rows = []
    for record, method in group:
        control = record.latency(AGAIN, method=method)
        at_least = NONE
        if control is not None and control.baseline_s:
            at_least = units.percent(least(record).seconds / control.baseline_s, decimals=1)
        cells = [tax_words(record.latency(name, method=method)) for name in IMPLEMENTATIONS]
        rows.append((name_of(record), time_words(None if control is None else control.baseline_s), *cells, at_least))
    return Table(
        title=f"The SE tax ({title})",
        columns=("", "baseline", *map(words_of, IMPLEMENTATIONS), "least"),
        rows=tuple(rows),
        notes=(
            f"{_TAX} Least: the bytes that SE must move, at the bandwidth of copies.",
            *words_note(rows),
            *(f"{record.arch}, {note}" for record, method in group for note in _failures(record, method)),
        ),
    )


def _failures(record: TaxRecord, method: str) -> Iterator[str]:
    """Yield why there is no result: each reason once, after the pairs that it holds for."""
    whys: dict[tuple[str, str], list[str]] = {}
    for pair in record.pairs:
        if pair.latency.method == method and pair.latency.verdict_kind == "no_result":
            for why in no_result_reasons(pair.latency):
                whys.setdefault((verdict_word(pair.latency), why), []).append(_pair_words(pair))
    shared: dict[tuple[str, str], list[str]] = {}
    for (word, why), names in whys.items():
        shared.setdefault((", ".join(names), word), []).append(why)
    yield from (f"{names}: {word}: {'; '.join(same)}" for (names, word), same in shared.items())


def _pair_words(pair: TaxPair) -> str:
    """Return the name of its row; over the reference, it is without a stage, or the fused one."""
    words = words_of(pair.variant)
    return f"{words} against the reference" if (pair.baseline, pair.variant) == (REFERENCE, FUSED) else words
