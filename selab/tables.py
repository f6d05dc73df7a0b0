"""Records and published numbers → tables."""

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from selab import catalog, foreign, units
from selab.accuracy_record import AccuracyRecord
from selab.errors import RecordError, SelabError
from selab.grid import NONE, Grid
from selab.published import (
    cost_numbers,
    differences,
    marked_numbers,
    points,
    published,
    published_pair,
    reproduced,
)
from selab.record import (
    Cost,
    Insertion,
    Latency,
    Memory,
    Phase,
    Record,
    Workload,
)
from selab.spec import SEFacts, SiteFacts, Variant, pair_hash
from selab.tax_record import TaxRecord
from selab.verdict import not_excluded

if TYPE_CHECKING:
    from selab.fusing import Runtime

PHASE_NAMES: dict[Phase, str] = {"forward": "forward", "backward": "backward", "forward_backward": "forward+backward"}


# ---------------------------------------------------------------------------------------------------- one architecture


def _row(label: str, base: float | None, variant: float | None, show: units.Format) -> tuple[str, ...]:
    if variant is None:
        return (label, NONE if base is None else show(base), NONE, NONE, NONE)
    if base is None:
        return (label, NONE, show(variant), NONE, NONE)
    change = units.percent(variant / base - 1) if base else NONE
    difference = variant - base
    return (label, show(base), show(variant), f"{'+' if difference > 0 else ''}{show(difference)}", change)


COST_ROWS: tuple[tuple[str, str, units.Format], ...] = (
    ("parameters", "params", units.count),
    ("MACs, conv+linear", "macs.conv_linear", units.count),
    ("MACs, paper", "macs.paper", units.count),
    ("MACs, all operations", "macs.all", units.count),
    ("MACs backward, conv+linear", "macs_backward.conv_linear", units.count),
    ("bytes moved, forward", "bytes", units.size),
)
MEMORY_ROWS = (
    ("peak memory, forward", "peak_forward_bytes"),
    ("peak memory, fwd+bwd", "peak_forward_backward_bytes"),
    ("saved for backward", "saved_for_backward_bytes"),
)
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


def profile_grid(record: Record) -> Grid:
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
    return Grid(
        title=f"{record.arch} against {record.baseline} ({workload_title(record.workload)})",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def address(name: str, origin: str) -> str:
    """What `--arch` finds a record's network by: its name, and the TOML that it stands in if it is a user's own."""
    return f"{origin}:{name}" if origin else name


def variants_of(record: Record | AccuracyRecord | TaxRecord) -> tuple[Variant | None, Variant | None]:
    """The facts of a record's two networks as they are today; None where they are not to be had any more."""

    def facts(name: str | None, file: str) -> Variant | None:
        if name is None:
            return None
        try:
            return catalog.find(address(name, file))
        except SelabError:
            return None

    baseline = None if isinstance(record, TaxRecord) and record.bare else record.baseline
    return facts(record.arch, record.origin), facts(baseline, record.baseline_origin)


def _is_own_baseline(record: Record | TaxRecord) -> bool:
    if isinstance(record, TaxRecord) and record.bare:
        return True
    variant, _ = variants_of(record)
    return variant is not None and record.baseline == variant.baseline


def is_stale(record: Record | TaxRecord) -> bool:
    """Whether the catalog's facts have changed since the record was made."""
    variant, baseline = variants_of(record)
    return variant is not None and pair_hash(variant, baseline) != record.facts_hash


def stage_grid(cost: Cost) -> Grid:
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
    return Grid(title=title, columns=("", "MACs, all", "of network", "bytes", "of network"), rows=tuple(rows))


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


def count_grid(records: Sequence[Record]) -> Grid:
    """The table of `selab count` for several networks: one row each."""
    rows = []
    for record in records:
        cost = record.cost
        figures = (cost.params, cost.macs.conv_linear, cost.macs.paper, cost.macs.all)
        rows.append((record.arch, *(units.count(figure) for figure in figures), units.size(cost.bytes)))
    columns = ("", "params", "conv+linear", "paper", "all", "bytes")
    work = records[0].workload
    return Grid(title=f"Forward cost, MACs by convention (batch {work.batch})", columns=columns, rows=tuple(rows))


def single_count_grid(record: Record) -> Grid:
    """The table of `selab count` for one network, beside its baseline if it has one."""
    cost, base = record.cost, record.baseline_cost
    rows = _cost_rows(cost, base, (*COST_ROWS, *_MORE_COST_ROWS))
    against = f" against {record.baseline}" if record.baseline else ""
    return Grid(
        title=f"{record.arch}{against} ({workload_title(record.workload)})",
        columns=("", "base", "variant", "difference", "change"),
        rows=tuple(rows),
        notes=record.warnings,
    )


def share_grid(record: Record, by: str) -> Grid:
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
    return Grid(title=f"{record.arch} by {by}", columns=("", "calls", "MACs, all", "FLOPs", "bytes"), rows=rows)


def counters_grid(cost: Cost) -> Grid:
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
    return Grid(
        title="Other counters", columns=("", "amount", "unit"), rows=tuple(rows), notes=tuple(dict.fromkeys(notes))
    )


# ------------------------------------------------------------------------------------------------- facts of a variant


def facts_grid(variant: Variant) -> Grid:
    """What the catalog says about a variant."""
    facts = {
        "title": variant.title,
        "family": f"{variant.family} ({variant.source})",
        "builder": variant.builder,
        "arguments": ", ".join(f"{key}={value}" for key, value in variant.arguments.items()) or NONE,
        "input": "×".join(map(str, variant.input_chw)),
        "classes": NONE if foreign.runs_code_of(variant) and not variant.file else str(variant.num_classes),
        "baseline": variant.baseline or NONE,
    }
    if variant.se is not None:
        sites = variant.se.sites if isinstance(variant.se.sites, str) else ", ".join(variant.se.sites)
        stages = f", stages {', '.join(map(str, variant.se.stages))} only" if variant.se.stages else ""
        facts["SE sites"] = f"{sites}, placement {variant.se.placement}{stages}"
        facts["SE block"] = block_words(variant.se)
    facts |= {"note": variant.note} if variant.note else {}
    facts["facts from"] = f"{variant.origin} ({variant.facts_hash})"
    rows = tuple(facts.items())
    return Grid(title=variant.name, columns=("", ""), rows=rows, words=frozenset({0, 1}))


def block_words(facts: SiteFacts) -> str:
    """What kind of block stands at the sites, in words."""
    if isinstance(facts, SEFacts):
        return (
            f"reduction {facts.reduction} of the {facts.squeeze_from}'s channels, squeeze {facts.squeeze}, "
            f"gate {facts.gate}, activation {facts.activation}, {'with' if facts.bias else 'without'} bias"
        )
    own = [name for name in facts.__struct_fields__ if name not in SiteFacts.__struct_fields__]
    return ", ".join([str(facts.__struct_config__.tag), *(f"{name} {getattr(facts, name)}" for name in own)])


def sites_grid(insertions: Sequence[Insertion]) -> Grid:
    """Where SE stands in a network, and what each block costs."""
    rows = tuple(
        (
            one.path,
            f"{one.channels}→{one.squeeze_channels}" if one.squeeze_channels else str(one.channels),
            f"{one.height}×{one.width}",
            units.exact(one.params),
            units.count(one.macs),
        )
        for one in insertions
    )
    title = f"SE sites ({len(insertions)}, placement {insertions[0].placement})"
    return Grid(title=title, columns=("module", "channels", "map", "params", "MACs, all"), rows=rows)


def runtime_grid(found: "Sequence[Runtime]", *, title: str) -> Grid:
    """How each block would run, and why not faster."""
    rows = []
    for one in found:
        done = [
            word
            for word, is_so in (
                ("BatchNorm before it", one.block.normalising),
                ("ReLU before it", one.block.absorbed),
                ("join", one.block.joined),
                ("in place", one.block.in_place),
            )
            if is_so and one.impl != "reference"
        ]
        shape = "×".join(map(str, one.map_nchw[1:]))
        rows.append((one.block.path, shape, one.impl, ", ".join(done) or NONE, one.reason or NONE))
    columns = ("block", "map", "runs as", "with it", "why not faster")
    return Grid(title=title, columns=columns, rows=tuple(rows), words=frozenset({0, 2, 3, 4}))


def published_grid(variant: Variant) -> Grid:
    """What others published about a variant."""
    rows = tuple(
        (one.metric, one.printed or f"{one.value:g}", one.dataset, f"{one.source}, {one.where}")
        for one in variant.published
    )
    notes = tuple(f"{one.metric}: {one.note}" for one in variant.published if one.note)
    columns = ("published", "value", "on", "source")
    return Grid(title="Published", columns=columns, rows=rows, notes=notes, words=frozenset({0, 2, 3}))


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


def name_of(record: Record | TaxRecord) -> str:
    """As a table or a picture calls a record: with its baseline where that is not its own, and whether it is stale."""
    against = "" if _is_own_baseline(record) else f" against {record.baseline}"
    return record.arch + against + (" (stale)" if is_stale(record) else "")


def latency_grids(records: Sequence[Record]) -> list[Grid]:
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
            Grid(title=f"{label} ({work})", columns=columns, rows=tuple(lines), words=frozenset({0, 5}))
            for label, lines in rows.items()
        ]
    return grids


def added_grids(records: Sequence[Record]) -> list[Grid]:
    """What SE adds to each network, everything in percent of the baseline; one table per workload.

    Raises:
        RecordError: the records are of several machines.
    """
    check_one_machine(records)
    machine = records[0].machine
    own = [record for record in records if _is_own_baseline(record)]
    columns = ("", "params", "MACs", "bytes", "forward", "forward+backward", "saved for backward", "top-1 error")
    return [
        Grid(
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


def change_words(latency: Latency | None) -> str:
    """`+21.7 % [19.3, 23.4]`, or why there is none."""
    if latency is None or latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None:
        return NONE
    left = not_excluded(latency)
    if left is None:
        return "no result"
    decimals = units.decimals_for((latency.ratio_high - latency.ratio_low) / 2)
    low, high = (100 * bound for bound in left)
    change = units.percent(latency.ratio - 1, decimals=decimals)
    # Below the control floor the figure is the machine's own, so only what cannot be excluded is shown.
    shown = "not shown" if latency.verdict_kind == "undecided" else change
    return f"{shown} [{low:.{decimals}f}, {high:.{decimals}f}]"


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


MOBILE = (
    "se_mobilenet",
    "se_shufflenet",
    "se_mobilenet_v2",
    "se_shufflenet_v2_x0_5",
    "se_shufflenet_v2_x1_0",
    "se_shufflenet_v2_x1_5",
    "se_shufflenet_v2_x2_0",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet_a1",
    "efficientnet_b0",
    "ghostnet_100",
    "se_regnet_x_400mf",
    "regnet_y_400mf",
    "se_regnet_x_800mf",
    "regnet_y_800mf",
)


def mobile_names() -> list[str]:
    """The mobile networks, base and SE in turn."""
    known = catalog.installed()
    return [name for one in MOBILE for name in (str(known[one].baseline), one)]


def mobile_grid(costs: dict[str, Cost], records: Sequence[Record]) -> Grid:
    """The mobile networks: cost, measured ratio of a forward pass, and published error, base and SE in turn."""
    measured = {record.arch: record for record in records if _is_plain(record)}
    rows = []
    for one in (catalog.installed()[name] for name in mobile_names()):
        cost, record = costs[one.name], measured.get(one.name)
        forward = record.latency.get("forward") if record is not None else None
        top1 = published(one, "top1_error_pct")
        rows.append(
            (
                one.name,
                units.count(cost.params),
                units.count(cost.macs.paper),
                units.size(cost.bytes),
                change_words(forward),
                NONE if top1 is None else points(top1),
            )
        )
    columns = ("", "params", "MACs, paper", "bytes", "forward", "top-1 error")
    machines = {record.machine.gpu or record.machine.cpu for record in measured.values()}
    note = "forward: SE against base, batch 1, fp32"
    note += (
        f", on {', '.join(machines)}, 95 % intervals in brackets"
        if machines
        else ": no records were given (--profiles)"
    )
    return Grid(title="Mobile networks", columns=columns, rows=tuple(rows), notes=(note,))


def mobile_published_grid(costs: dict[str, Cost]) -> Grid:
    """What was published of the mobile networks' costs, each number with its mark, and the causes where not met."""
    known = catalog.installed()
    variants = [known[name] for name in mobile_names() if cost_numbers(known[name])]
    rows = tuple(
        (one.name, *(marked_numbers(one, costs[one.name], metric) for metric in ("params", "macs"))) for one in variants
    )
    equal, total = reproduced(variants, costs)
    closing = f"{equal} of {total} published cost numbers reproduced to the printed digit (=)."
    conventions = "Parameters are learnable ones. MACs are compared by `paper` where it says so, else by `conv+linear`."
    return Grid(
        title="Published costs of the mobile networks",
        columns=("", "params", "MACs"),
        rows=rows,
        notes=(closing, conventions, *differences(variants, costs)),
    )


_PLAIN = Workload(
    batch=1,
    input_chw=(0, 0, 0),
    device="cpu",
    dtype="fp32",
    memory_format="contiguous",
    mode="auto",
    threads=1,
)


def _is_plain(record: Record) -> bool:
    """Whether a record is of the workload that needs no words: its own baseline, one image, fp32, one CPU thread."""
    work = record.workload
    plain = msgspec.structs.replace(work, input_chw=(0, 0, 0)) == _PLAIN
    variant, _ = variants_of(record)
    size = variant is not None and work.input_chw == variant.input_chw
    return record.kind == "profile" and plain and size and _is_own_baseline(record)
