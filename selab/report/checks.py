"""Tables of budgets, record differences and machine checks."""

from collections.abc import Sequence
from operator import attrgetter

from selab import units
from selab.experiments.budget import Finding, State, plain_ratio
from selab.experiments.diff import RatioChange, ratio_changes
from selab.experiments.doctor import Snapshot, other_programs, problems
from selab.kernels.cpu import native_reason
from selab.records.types import (
    COST_ROWS,
    MEMORY_ROWS,
    PHASE_NAMES,
    Record,
)
from selab.records.verdict import NOT_SIGNIFICANT, TOO_NOISY, change_words
from selab.report.profiles import workload_title
from selab.report.table import Table
from selab.report.wording import words_note
from selab.units import NONE


def machine_tables(found: Snapshot) -> list[Table]:
    """Return the tables of `selab machine`: what it is, and what is wrong with it."""
    place, around = found.machine, found.surroundings
    rows = [
        ("name in records", place.name),
        ("processor", place.cpu),
        (
            "cores that may be used",
            f"{place.cores}" + ("" if place.quota_cores is None else f", {place.quota_cores:g} worth of time"),
        ),
        ("memory", units.size(place.memory_bytes, digits=3)),
        ("governor", place.governor or "unknown"),
        ("clock now", "unknown" if around.clock_mhz is None else f"{around.clock_mhz:.0f} MHz"),
        ("clocks above the base one", {None: "unknown", True: "allowed", False: "off"}[around.turbo]),
        ("load of the last minute", "unknown" if around.load is None else f"{around.load:.2f}"),
        ("used by others now", f"{other_programs(found):.2f} cores" if found.after is not None else "unknown"),
        ("stolen by the host", _stolen(found)),
        ("thread variables", ", ".join(f"{name}={value}" for name, value in around.thread_variables.items()) or "none"),
    ]
    if place.gpu is not None:
        rows += [("GPU", place.gpu), ("GPU memory", units.size(place.gpu_memory_bytes or 0, digits=3))]
        rows += [
            ("driver", place.driver or "unknown"),
            *(("GPU " + name, text) for name, text in found.gpu_facts.items()),
        ]
    rows += [("SE blocks on the CPU", native_reason() or "native code")]
    if place.gpu is not None:
        from selab.kernels.ops import gpu_reason

        rows += [("SE blocks on the GPU", gpu_reason() or "Triton kernels")]
    rows += [
        ("system", f"{place.system}, Python {place.python}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in place.libraries.items())),
    ]
    listed = problems(found)
    wrong = Table(
        title=f"What is wrong with it for measuring ({len(listed)})"
        if listed
        else "Nothing is wrong with it for measuring",
        columns=("what", "what helps"),
        rows=tuple((one.what, one.advice) for one in listed),
        words=frozenset({0, 1}),
    )
    facts = Table(title="This machine", columns=("", ""), rows=tuple(rows), words=frozenset({0, 1}))
    return [facts, wrong] if listed else [facts]


def _stolen(found: Snapshot) -> str:
    if found.before is None or found.after is None:
        return "unknown"
    elapsed = found.after.at_s - found.before.at_s
    return f"{(found.after.stolen_s - found.before.stolen_s) / elapsed:.2f} cores"


_WORDS: dict[State, str] = {
    "within": "within",
    "over": "OVER",
    "not_decided": "not decided: the limit is inside the interval",
    "no_result": TOO_NOISY,
}


def check_table(findings: Sequence[Finding]) -> Table:
    """Return the table of `selab check`, one row for each limit."""
    rows = tuple((one.name, one.limit, _allowed(one), one.text, _WORDS[one.state]) for one in findings)
    over = sum(one.state == "over" for one in findings)
    return Table(
        title=f"Budgets: {over} of {len(findings)} limits exceeded",
        columns=("budget", "limit", "at most", "found", "state"),
        rows=rows,
        notes=("A measured ratio is over its limit only if the whole of its 95 % interval is.", *words_note(rows)),
        words=frozenset({0, 1, 3, 4}),
        drop_first=(2,),
    )


def _allowed(one: Finding) -> str:
    if "ratio" in one.limit:
        return plain_ratio(one.allowed)
    return (units.size if "memory" in one.limit or one.limit == "bytes" else units.count)(one.allowed)


def diff_table(before: Record, after: Record) -> Table:
    """Return the table of `selab diff`: costs and memory of the variant, and its ratios to the baseline."""
    rows = [
        _row(label, attrgetter(path)(before.cost), attrgetter(path)(after.cost), show)
        for label, path, show in COST_ROWS
    ]
    if before.memory is not None and after.memory is not None:
        rows += [
            _row(label, getattr(before.memory, name), getattr(after.memory, name), units.size)
            for label, name in MEMORY_ROWS
        ]
    for one in ratio_changes(before, after):
        words = [change_words(record.latency[one.phase]) for record in (before, after)]
        rows.append((f"{PHASE_NAMES[one.phase]}, against the baseline", *words, _change(one)))
    libraries = before.machine.libraries, after.machine.libraries
    both = (("before", before), ("after", after))
    notes = [
        f"The record {word} was interrupted; what it lacks is not compared." for word, one in both if not one.complete
    ]
    notes += [one.text for one in ratio_changes(before, after)]
    notes += [
        f"{name} {libraries[0].get(name, 'none')} before, {libraries[1].get(name, 'none')} after"
        for name in dict.fromkeys((*libraries[0], *libraries[1]))
        if libraries[0].get(name) != libraries[1].get(name)
    ]
    same = before.arch == after.arch
    title = f"{before.arch}: before and after" if same else f"{before.arch} and {after.arch}"
    return Table(
        title=f"{title} ({workload_title(before.workload)})",
        columns=("", "before", "after", "change"),
        rows=tuple(rows),
        notes=(*notes, *words_note(rows)),
    )


def _change(one: RatioChange) -> str:
    if one.change is None or one.low is None or one.high is None:
        return TOO_NOISY
    places = units.decimals_for((one.high - one.low) / 2)
    shown = NOT_SIGNIFICANT if one.kind == "not_shown" else units.percent(one.change, decimals=places)
    return f"{shown} [{100 * one.low:.{places}f}, {100 * one.high:.{places}f}]"


def _row(label: str, before: float | None, after: float | None, show: units.Format) -> tuple[str, ...]:
    cells = (NONE if one is None else show(one) for one in (before, after))
    if before is None or after is None:
        return (label, *cells, NONE)
    return (label, *cells, "=" if before == after else units.percent(after / before - 1) if before else "new")
