"""Records, counted costs and published errors → pictures, as SVG or PNG.

A picture is data first (`Scatter`, `Bars`: what stands where, and what was left out and why) and ink second (`draw`).
The same data gives the same bytes.
"""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selab import catalog, units
from selab.errors import RecordError, SelabError, UnknownNameError, nearest
from selab.published import published_pair
from selab.record import Cost, Latency, Phase, Record
from selab.spec import Metric, Variant
from selab.store import write_atomically
from selab.tables import check_one_machine, is_stale

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png")


# ---------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """A quantity that can stand on an axis.

    Attributes:
        origin: who says so: our counter, a paper, or a record.
        path: the field of a `Cost` or a `Memory`, the metric, or the phase that it is read from.
        short: what it is called in a title.
        label: what is said along the axis.
        unit: of its values; `%` is percent, not a fraction.
    """

    name: str
    origin: Literal["counted", "published", "measured"]
    path: str
    short: str
    label: str
    unit: Literal["", "B", "s", "%"] = ""
    logarithmic: bool = True


_MACS = "multiply-accumulates of a forward pass"
_TIME = "time of a forward pass"
_ADDED = "time that SE adds to a forward pass (% of the base)"
_SAVED = "memory kept for the backward pass"
_ALL_AXES = (
    Axis("params", "counted", "params", "parameters", "parameters"),
    Axis("macs", "counted", "macs.paper", "MACs", f"{_MACS} (convention: paper)"),
    Axis("macs_all", "counted", "macs.all", "MACs", f"{_MACS} (convention: all operations)"),
    Axis("flops", "counted", "flops", "FLOPs", "floating-point operations of a forward pass"),
    Axis("bytes", "counted", "bytes", "bytes moved", "bytes moved in a forward pass", "B"),
    Axis("activations", "counted", "activations", "activations", "activations (elements of convolution outputs)"),
    Axis("top1_error", "published", "top1_error_pct", "top-1 error", "top-1 error, published (%)", "%", False),
    Axis("top5_error", "published", "top5_error_pct", "top-5 error", "top-5 error, published (%)", "%", False),
    Axis("latency", "measured", "forward", _TIME, _TIME, "s"),
    Axis(
        "latency_fwd_bwd", "measured", "forward_backward", "time of both passes", f"{_TIME} and the backward one", "s"
    ),
    Axis("tax", "measured", "forward", "time added to a forward pass", _ADDED, "%", False),
    Axis("saved_for_backward", "measured", "saved_for_backward_bytes", _SAVED, _SAVED, "B"),
)
AXES = {axis.name: axis for axis in _ALL_AXES}


def axis(name: str, *, option: str = "axis") -> Axis:
    """A quantity by its name.

    Args:
        name: the word.
        option: where it was given, for the message.

    Raises:
        UnknownNameError: nothing has this name; the message lists the nearest ones.
    """
    if name not in AXES:
        raise UnknownNameError(f"{option} {name}: no such quantity{nearest(name, AXES)}")
    return AXES[name]


def _text(unit: str, value: float) -> str:
    """A tick's value with as many digits as it has: 2e8 → `200 M`, 0.025 → `25 ms`."""
    if unit == "%":
        return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
    show = {"": units.count, "B": units.size, "s": units.seconds}[unit]
    texts = [show(value, digits=digits) for digits in range(1, 8)]
    return next(text for text in texts if float(text.split()[0]) == float(texts[-1].split()[0]))


# ---------------------------------------------------------------------------------------------------- what stands where


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network: a value on each axis, in base units."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A network without SE and with it.

    Attributes:
        x_interval: the 95 % interval of the SE point's value, where the axis has one.
        resolved: whether the measured difference is the networks' and not the machine's own.
    """

    name: str
    family: str
    base: Point
    se: Point
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    resolved: bool = True


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was asked for and is not drawn, and why."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Base → SE in the plane of two quantities.

    Attributes:
        circumstances: machine, threads, dtype, batch; one line under the title.
        sources: where published values stand.
    """

    title: str
    circumstances: str
    x: Axis
    y: Axis
    pairs: tuple[Pair, ...]
    sources: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What SE adds to one network, as fractions of the base.

    Attributes:
        forward: of the time of a forward pass; None where it cannot be quoted.
        interval: what the measurement does not exclude; None where there is no result.
    """

    name: str
    macs: float
    bytes: float
    forward: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What SE adds, side by side, one row per network."""

    title: str
    circumstances: str
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """Everything known about one pair; a record's costs are those of its workload."""

    name: str
    family: str
    variant: Variant | None
    baseline: Variant | None
    cost: Cost | None
    baseline_cost: Cost | None
    record: Record | None = None


@dataclass(frozen=True, kw_only=True)
class _Both:
    """One quantity of a pair."""

    base: float
    se: float
    interval: tuple[float, float] | None = None
    resolved: bool = True
    source: str = ""
    dataset: str = ""


def _facts(name: str | None, file: str) -> Variant | None:
    """A record's network as the catalog knows it today, if it does."""
    try:
        return None if name is None else catalog.find(f"{file}:{name}" if file else name)
    except SelabError:
        return None


def _recorded(record: Record) -> _Subject:
    variant = _facts(record.arch, record.origin)
    baseline = _facts(record.baseline, record.baseline_origin)
    own = variant is not None and record.baseline == variant.baseline
    name = record.arch + ("" if own else f" against {record.baseline}") + (" (stale)" if is_stale(record) else "")
    return _Subject(
        name=name,
        family="unknown" if variant is None else variant.family,
        variant=variant,
        baseline=baseline,
        cost=record.cost,
        baseline_cost=record.baseline_cost,
        record=record,
    )


def _baseline_word(variant: Variant) -> str:
    return f"{variant.file}:{variant.baseline}" if variant.file else str(variant.baseline)


def _words(archs: Sequence[str]) -> list[str]:
    """The variants that were named, or of every installed base the first with SE; a base has nothing to stand beside.

    Raises:
        UnknownNameError: a name that nothing has, or that of a baseline.
    """
    if not archs:
        with_se = [one for one in catalog.installed().values() if one.se is not None]
        first = {one.baseline: one.name for one in reversed(with_se)}
        return [one.name for one in with_se if first[one.baseline] == one.name]
    for word in archs:
        variant = catalog.find(word)
        if variant.baseline is None:
            known = [one.name for one in catalog.installed().values() if one.baseline == variant.name]
            raise UnknownNameError(f"--arch {word}: a baseline; name what is compared with it{nearest(word, known)}")
    return list(dict.fromkeys(archs))


def costs_needed(x: str, y: str, archs: Sequence[str] = ()) -> tuple[str, ...]:
    """The networks that must be counted for a picture; none if a record brings their costs along.

    Raises:
        UnknownNameError: an axis or a network that there is not.
    """
    both = (axis(x, option="--x"), axis(y, option="--y"))
    if "measured" in (one.origin for one in both) or "counted" not in (one.origin for one in both):
        return ()
    words = [word for word in _words(archs) if not _why_unpublished(_catalogued(word, {}), both)]
    return tuple(dict.fromkeys(word for one in words for word in (_baseline_word(catalog.find(one)), one)))


def _why_unpublished(subject: _Subject, axes: Iterable[Axis]) -> str:
    found = [_published(subject, one) for one in axes if one.origin == "published"]
    return next((one for one in found if isinstance(one, str)), "")


def _catalogued(word: str, costs: Mapping[str, Cost]) -> _Subject:
    variant = catalog.find(word)
    return _Subject(
        name=variant.name,
        family=variant.family,
        variant=variant,
        baseline=catalog.baseline_of(variant),
        cost=costs.get(word),
        baseline_cost=costs.get(_baseline_word(variant)),
    )


# -------------------------------------------------------------------------------------------------- one quantity, twice


def _published(subject: _Subject, which: Axis) -> _Both | str:
    """Both networks' error, from one table and on the same data."""
    metric: Metric = which.path  # type: ignore[assignment]
    ours, theirs = published_pair(subject.variant, subject.baseline, metric)
    if ours is None:
        return f"no {which.short} published"
    if theirs is None:
        return f"no {which.short} of the base published in the same table"
    if ours.dataset != theirs.dataset:
        return f"{which.short} of the base published on other data"
    return _Both(se=ours.value, base=theirs.value, source=f"{ours.source}, {ours.table}", dataset=ours.dataset)


def _counted(subject: _Subject, which: Axis) -> _Both | str:
    if subject.cost is None or subject.baseline_cost is None:
        return "not counted"
    read = attrgetter(which.path)
    return _Both(base=read(subject.baseline_cost), se=read(subject.cost))


def _measured(subject: _Subject, which: Axis) -> _Both | str:
    if subject.record is None:
        return "no record"
    if which.name == "saved_for_backward":
        return _saved(subject.record)
    phase: Phase = which.path  # type: ignore[assignment]
    latency = subject.record.latency.get(phase)
    if latency is None:
        return f"{phase.replace('_', ' and ')} not measured"
    interval = _quotable(latency)
    if interval is None or latency.baseline_s is None or latency.variant_s is None or latency.ratio is None:
        return "no result"
    resolved = latency.verdict_kind != "undecided"
    if which.name == "tax":
        # Below the control floor the figure is the machine's own, and an interval has no place to point at.
        percents = (interval[0] * 100, interval[1] * 100)
        return _Both(base=0.0, se=(latency.ratio - 1) * 100, interval=percents) if resolved else "difference unresolved"
    low, high = (latency.baseline_s * (1 + bound) for bound in interval)
    return _Both(base=latency.baseline_s, se=latency.variant_s, interval=(low, high), resolved=resolved)


def _quotable(latency: Latency) -> tuple[float, float] | None:
    """What a latency does not exclude, as fractions of the base; None where there is no result.

    Where the difference is not resolved it reaches from the lower to the upper end of interval and control floor, as in
    the verdict's words.
    """
    if latency.verdict_kind == "no_result" or latency.ratio_low is None or latency.ratio_high is None:
        return None
    low, high = latency.ratio_low - 1, latency.ratio_high - 1
    if latency.verdict_kind == "undecided" and latency.control_floor is not None and (low > 0 or high < 0):
        low, high = min(low, -latency.control_floor), max(high, latency.control_floor)
    return low, high


def _saved(record: Record) -> _Both | str:
    both = (record.baseline_memory, record.memory)
    base, se = (None if one is None else one.saved_for_backward_bytes for one in both)
    return "memory not measured" if base is None or se is None else _Both(base=base, se=se)


def _value(subject: _Subject, which: Axis) -> _Both | str:
    """A quantity of a pair, or why there is none."""
    found = {"counted": _counted, "published": _published, "measured": _measured}[which.origin](subject, which)
    if which.logarithmic and isinstance(found, _Both) and min(found.base, found.se) <= 0:
        return f"{which.short} of zero has no place on a logarithmic axis"
    return found


# ------------------------------------------------------------------------------------------------------------- pictures


def points(
    x: str,
    y: str,
    *,
    records: Sequence[Record] = (),
    costs: Mapping[str, Cost] | None = None,
    archs: Sequence[str] = (),
    workload: str | None = None,
) -> Scatter:
    """Base and SE network of every pair, in the plane of two quantities.

    With a measured quantity the pairs are those of the records, and what is counted is counted for their workload;
    otherwise they are the catalog's, and what is counted is counted for one image.

    Args:
        x: a name from `AXES`.
        y: another.
        records: of one machine.
        costs: of `costs_needed(x, y, archs)`, by those words.
        archs: only these variants.
        workload: the slug of the records' workload, where they have several; by default that of most of them.

    Raises:
        UnknownNameError: an axis, a variant or a workload that there is not.
        RecordError: records are needed and there are none, or they are of several machines.
        SelabError: no pair has both quantities; the message says of each why.
    """
    across, up = axis(x, option="--x"), axis(y, option="--y")
    if across == up:
        raise SelabError(f"--y {y}: stands on the other axis already; name another quantity{nearest('', AXES)}")
    left_out: list[LeftOut] = []
    if "measured" in (across.origin, up.origin):
        chosen, left_out = _chosen(records, archs, workload, what=f"plot of {x} and {y}")
        subjects = [_recorded(record) for record in chosen]
        circumstances = _circumstances(chosen[0])
    else:
        subjects = [_catalogued(word, costs or {}) for word in _words(archs)]
        counted = "counted" in (across.origin, up.origin)
        circumstances = "Counted for one image of the networks' own size" if counted else "As published"
    found = []
    for subject in subjects:
        why = _why_unpublished(subject, (across, up))
        on_x, on_y = (why or _value(subject, one) for one in (across, up))
        if isinstance(on_x, str) or isinstance(on_y, str):
            left_out.append(LeftOut(name=subject.name, why=next(one for one in (on_x, on_y) if isinstance(one, str))))
        else:
            found.append((subject, on_x, on_y))
    found, others = _of_one_dataset(found)
    left_out += others
    if not found:
        raise SelabError(
            f"nothing to draw for {x} and {y}: {_reasons(left_out)}; choose other networks or other quantities"
        )
    pairs = tuple(
        Pair(
            name=subject.name,
            family=subject.family,
            base=Point(x=on_x.base, y=on_y.base),
            se=Point(x=on_x.se, y=on_y.se),
            x_interval=on_x.interval,
            y_interval=on_y.interval,
            resolved=on_x.resolved and on_y.resolved,
        )
        for subject, on_x, on_y in found
    )
    return Scatter(
        title=f"{up.short[0].upper()}{up.short[1:]} against {across.short}: base and SE",
        circumstances=circumstances,
        x=across,
        y=up,
        pairs=pairs,
        sources=_sources([both for _, *twice in found for both in twice]),
        left_out=tuple(left_out),
    )


_Found = tuple[_Subject, _Both, _Both]


def _of_one_dataset(found: Sequence[_Found]) -> tuple[list[_Found], list[LeftOut]]:
    """Errors on different data share no axis: those of most pairs stay."""
    names = Counter(both.dataset for _, *twice in found for both in twice if both.dataset)
    if len(names) < 2:
        return list(found), []
    kept = min(names, key=lambda name: (-names[name], name))
    inside = [one for one in found if {one[1].dataset, one[2].dataset} <= {kept, ""}]
    return inside, [
        LeftOut(name=one[0].name, why=f"published on {one[1].dataset or one[2].dataset}")
        for one in found
        if one not in inside
    ]


def _sources(both: Iterable[_Both]) -> tuple[str, ...]:
    """`arXiv 1709.01507, Table 2` and `…, Table 3` → one line per source."""
    tables: dict[str, set[str]] = {}
    data = set()
    for one in both:
        if one.source:
            source, _, table = one.source.rpartition(", ")
            tables.setdefault(source, set()).add(table)
            data.add(one.dataset)
    lines = [f"{source}, {', '.join(sorted(tables[source], key=_natural))}" for source in sorted(tables)]
    return (f"Errors: {'; '.join(lines)}" + "".join(f"; {name}" for name in sorted(data) if name),) if lines else ()


def _natural(text: str) -> tuple[str, int]:
    """Table 2 before Table 10."""
    word, _, number = text.rpartition(" ")
    return (word, int(number)) if number.isdigit() else (text, 0)


def bars(records: Sequence[Record], *, archs: Sequence[str] = (), workload: str | None = None) -> Bars:
    """What SE adds to each network that has a record: MACs, bytes, time of a forward pass.

    Args:
        records: of one machine.
        archs: only these variants.
        workload: as in `points`.

    Raises:
        UnknownNameError: a variant or a workload that there is not.
        RecordError: there are no records, or they are of several machines.
        SelabError: no record has a forward pass that was measured; the message says of each why.
    """
    chosen, left_out = _chosen(records, archs, workload, what="plot of what SE adds")
    rows = []
    for record in sorted(chosen, key=lambda one: one.cost.macs.all):
        name, base, latency = _recorded(record).name, record.baseline_cost, record.latency.get("forward")
        if base is None or latency is None:
            left_out.append(LeftOut(name=name, why="base not counted" if base is None else "forward not measured"))
            continue
        interval = _quotable(latency)
        said = interval is not None and latency.ratio is not None and latency.verdict_kind != "undecided"
        rows.append(
            Row(
                name=name,
                macs=record.cost.macs.paper / base.macs.paper - 1,
                bytes=record.cost.bytes / base.bytes - 1,
                forward=latency.ratio - 1 if said and latency.ratio is not None else None,
                interval=interval,
            )
        )
    if not rows:
        raise SelabError(f"nothing to draw: {_reasons(left_out)}; measure with `selab profile --phase forward`")
    return Bars(
        title="What SE adds to a network: MACs, bytes, time",
        circumstances=_circumstances(chosen[0]),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


def _reasons(left_out: Sequence[LeftOut], *, most: int | None = None) -> str:
    """`no result (se_resnet18, se_vgg16); no record (se_mobilenet)`, of each at most so many names."""
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.why, []).append(one.name)
    parts = []
    for why, which in names.items():
        more = f" and {len(which) - most} more" if most is not None and len(which) > most else ""
        parts.append(f"{why} ({', '.join(which[:most])}{more})")
    return "; ".join(parts)


def _chosen(
    records: Sequence[Record], archs: Sequence[str], workload: str | None, *, what: str
) -> tuple[list[Record], list[LeftOut]]:
    """The profiles of one machine and one workload, and what that leaves out."""
    profiles = [record for record in records if record.kind == "profile"]
    if not profiles:
        raise RecordError(f"{what}: no records; measure with `selab profile`, and name their folder: --profiles")
    check_one_machine(profiles)
    left_out = []
    if archs:
        wanted = [catalog.find(word) for word in _words(archs)]
        keys = {(one.name, one.file) for one in wanted}
        there = {(record.arch, record.origin) for record in profiles}
        left_out = [LeftOut(name=one.name, why="no record") for one in wanted if (one.name, one.file) not in there]
        profiles = [record for record in profiles if (record.arch, record.origin) in keys]
        if not profiles:
            known = ", ".join(sorted({name for name, _ in there}))
            raise RecordError(f"{what}: no record of {', '.join(archs)}; there are some of {known}; or measure it")
    slug = _workload(profiles, workload)
    inside = [record for record in profiles if record.workload.slug == slug]
    others = [record for record in profiles if record.workload.slug != slug]
    left_out += [LeftOut(name=one.arch, why=f"measured under {one.workload.slug}") for one in others]
    return inside, left_out


def _workload(records: Sequence[Record], wanted: str | None) -> str:
    counts = Counter(record.workload.slug for record in records)
    if wanted is not None:
        if wanted not in counts:
            raise UnknownNameError(f"--workload {wanted}: no records of it{nearest(wanted, counts)}")
        return wanted
    most = [slug for slug in sorted(counts) if counts[slug] == max(counts.values())]
    if len(most) > 1:
        raise RecordError(f"records of different workloads share no picture; choose one: --workload {' | '.join(most)}")
    return most[0]


def _circumstances(record: Record) -> str:
    """`Intel Xeon, one thread, fp32, batch 1, 3×224×224, torch 2.13`: what every figure of the picture shares."""
    work, machine = record.workload, record.machine
    parts = [machine.gpu or machine.cpu if work.device != "cpu" else machine.cpu]
    if work.device == "cpu":
        parts.append("one thread" if work.threads == 1 else f"{work.threads} threads")
    parts += [work.dtype, f"batch {work.batch}", "×".join(map(str, work.input_chw))]
    parts += ["channels last"] if work.memory_format == "channels_last" else []
    parts += ["compiled"] if work.compiled else []
    parts += [f"{work.mode} mode"] if work.mode != "auto" else []
    parts += [f"torch {machine.libraries['torch']}"] if "torch" in machine.libraries else []
    return ", ".join(parts)


Picture = Scatter | Bars
_AXES_OF = {"cost": ("macs", "latency"), "accuracy": ("macs", "top1_error")}
NAMES = (*_AXES_OF, "added")


def axes_of(name: str, x: str | None = None, y: str | None = None) -> tuple[str, str] | None:
    """The axes of a picture by its name, where none were asked for; None for `added`, which has no choice of them.

    Raises:
        UnknownNameError: there is no such picture, or no such quantity.
        SelabError: axes were asked for where there are none.
    """
    if name not in NAMES:
        raise UnknownNameError(f"plot {name}: no such picture{nearest(name, NAMES)}")
    if name not in _AXES_OF:
        if x is not None or y is not None:
            raise SelabError(f"plot {name}: shows MACs, bytes and time; --x and --y are for {' and '.join(_AXES_OF)}")
        return None
    across, up = _AXES_OF[name]
    return axis(x or across, option="--x").name, axis(y or up, option="--y").name


def picture(
    name: str,
    *,
    x: str | None = None,
    y: str | None = None,
    records: Sequence[Record] = (),
    costs: Mapping[str, Cost] | None = None,
    archs: Sequence[str] = (),
    workload: str | None = None,
) -> Picture:
    """A picture by its name: `cost` and `accuracy` are scatters with axes of their own choice, `added` is bars.

    Raises:
        SelabError: as `axes_of`, `points` and `bars`.
    """
    axes = axes_of(name, x, y)
    if axes is None:
        return bars(records, archs=archs, workload=workload)
    return points(*axes, records=records, costs=costs, archs=archs, workload=workload)


# ----------------------------------------------------------------------------------------------- places, without ink


Box = tuple[float, float, float, float]
"""left, bottom, right, top"""


def ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Round values within an axis: 1, 2, 5 times powers of ten on a logarithmic one, or even steps.

    A logarithmic axis with room for fewer than three of the former gets even steps too.
    """
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ("125", "13", "1"):
            values = [float(f"{step}e{decade}") for decade in decades for step in steps]
            inside = [value for value in values if low <= value <= high]
            if 3 <= len(inside) <= 8:
                return inside
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _limits(values: Sequence[float], *, logarithmic: bool, around: float = 0.12) -> tuple[float, float]:
    """The values with room around them; a single value stands in the middle."""
    if logarithmic:
        low, high = _limits([math.log10(value) for value in values], logarithmic=False, around=around)
        return 10.0**low, 10.0**high
    low, high = min(values), max(values)
    room = around * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (7.0, 14.0, 24.0, 38.0, 56.0, 80.0)


def placed(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Where labels go so that they cover neither each other nor what is drawn, as near to their anchors as possible.

    Each in turn takes the cheapest of 48 places around its anchor, three times over, so that the first can move for the
    last. There is no chance in it.

    Args:
        anchors: the points that the labels belong to.
        sizes: width and height of each label, in the anchors' unit.
        taken: what must stay visible.
        bounds: the frame.
    """
    boxes: list[Box | None] = [None] * len(anchors)
    for _ in range(3):
        for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            others = [box for other, box in enumerate(boxes) if other != index and box is not None]
            candidates = [_beside(anchor, size, way, far) for far in _DISTANCES for way in _DIRECTIONS]
            costs = [
                10 * sum(_overlap(candidate, other) for other in others)
                + 3 * sum(_overlap(candidate, box) for box in taken)
                + 30 * (size[0] * size[1] - _overlap(candidate, bounds))
                + 0.4 * _gap(candidate, anchor) ** 1.5
                for candidate in candidates
            ]
            boxes[index] = candidates[costs.index(min(costs))]
    return [box for box in boxes if box is not None]


def _beside(anchor: tuple[float, float], size: tuple[float, float], way: tuple[int, int], far: float) -> Box:
    (x, y), (width, height) = anchor, size
    if all(way):
        far *= math.sqrt(0.5)
    left = x + way[0] * far - (0 if way[0] > 0 else width if way[0] < 0 else width / 2)
    bottom = y + way[1] * far - (0 if way[1] > 0 else height if way[1] < 0 else height / 2)
    return left, bottom, left + width, bottom + height


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _nearest_in(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _gap(box: Box, point: tuple[float, float]) -> float:
    return math.dist(_nearest_in(box, point), point)


# ----------------------------------------------------------------------------------------------------------------- ink


# Families differ in the marker and, for those who see it, in a colour; all are dark enough to be read in grey.
_MARKERS = "os^Dv<>PXph*"
_COLOURS = ("#08519c", "#a63603", "#1b7837", "#6a3d9a", "#7a5c00", "#9e1a5b", "#00676b", "#404040")
_FILLS = {"MACs": "#d4d4d4", "bytes moved": "#82b1d6", "time of a forward pass": "#33689c"}
_INK, _FAINT, _GRID, _UNRESOLVED = "#1a1a1a", "#5f5f5f", "#e4e4e4", "#d0d0d0"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "text.color": _INK,
    # Text stays text, and names in the file come from its content: the same picture is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "selab",
}
_WIDTH_IN, _RIGHT_IN = 7.2, 0.25
_LINE_IN, _CAPTION_CHARACTERS = 0.155, 122
_PNG_DPI = 200
_NOT_RESOLVED = "Not resolved: the base differs from itself as much; the whiskers hold what cannot be excluded."


def check_file(path: Path) -> None:
    """Raises SelabError for a file whose ending is not that of a picture."""
    if path.suffix.lower() not in ENDINGS:
        raise SelabError(f"--out {path}: {path.suffix or 'no ending'}; a picture ends in {' or '.join(ENDINGS)}")


def draw(shown: Picture, path: Path) -> None:
    """Writes a picture whole or not at all, as SVG or PNG by the file's ending.

    Raises:
        SelabError: another ending.
        RecordError: the folder cannot be written.
    """
    check_file(path)
    write_atomically(path, rendered(shown, path.suffix.lower()))


def rendered(shown: Picture, ending: str) -> bytes:
    """A picture as the bytes of an `.svg` or a `.png` file; no date and no user's style enter."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        figure = _scatter_figure(shown) if isinstance(shown, Scatter) else _bars_figure(shown)
        file = io.BytesIO()
        if ending == ".svg":
            metadata = {"Title": shown.title, "Date": None, "Creator": None}
            figure.savefig(file, format="svg", metadata=metadata)
        else:
            figure.savefig(file, format="png", dpi=_PNG_DPI, metadata={"Title": shown.title, "Software": None})
    return file.getvalue()


def _figure(
    shown: Picture, *, plot_in: float, left_in: float, handles: Sequence["Artist"], notes: Sequence[str]
) -> tuple["Figure", "Axes"]:
    """Title, circumstances and legend above, the plot, its axis, and the notes below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for note in notes for line in textwrap.wrap(note, _CAPTION_CHARACTERS)]
    keys_in = sum(0.5 + 0.068 * len(str(handle.get_label())) for handle in handles)
    key_rows = math.ceil(keys_in / _WIDTH_IN)
    above, below = 0.62 + 0.19 * key_rows, 0.52 + _LINE_IN * len(lines) + (0.08 if lines else 0)
    height = above + plot_in + below
    figure = Figure(figsize=(_WIDTH_IN, height), facecolor="white")
    FigureCanvasAgg(figure)
    span = _WIDTH_IN - left_in - _RIGHT_IN
    axes = figure.add_axes((left_in / _WIDTH_IN, below / height, span / _WIDTH_IN, plot_in / height))
    edge = 0.14 / _WIDTH_IN
    figure.text(edge, 1 - 0.12 / height, shown.title, size=11, weight="bold", va="top")
    figure.text(edge, 1 - 0.34 / height, shown.circumstances, size=8, color=_FAINT, va="top")
    for index, line in enumerate(lines):
        y = (0.08 + _LINE_IN * (len(lines) - 1 - index)) / height
        figure.text(edge, y, line, size=7.5, color=_FAINT, va="bottom")
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.06 / _WIDTH_IN, 1 - 0.48 / height),
        ncols=math.ceil(len(handles) / key_rows),
        fontsize=8,
        handletextpad=0.3,
        columnspacing=1.2,
        borderpad=0.3,
    )
    return figure, axes


def _left_out_note(left_out: Sequence[LeftOut], shown: int) -> list[str]:
    """`Left out 5 of 9: no result (se_vgg16, …); …`."""
    if not left_out:
        return []
    return [f"Left out {len(left_out)} of {shown + len(left_out)}: {_reasons(left_out, most=4)}."]


def _scatter_figure(shown: Scatter) -> "Figure":
    from matplotlib.lines import Line2D

    families = list(dict.fromkeys(sorted(pair.family for pair in shown.pairs)))
    notes = []
    if any(pair.x_interval or pair.y_interval for pair in shown.pairs):
        of = "" if "tax" in (shown.x.name, shown.y.name) else " of the ratio, from the base's time"
        notes.append(f"Whiskers: 95 % intervals{of}.")
    notes += [] if all(pair.resolved for pair in shown.pairs) else [_NOT_RESOLVED]
    notes += [f"{source}." for source in shown.sources]
    notes += _left_out_note(shown.left_out, len(shown.pairs))
    kinds = [("white", "base"), (_FAINT, "with SE")]
    kinds += [] if all(pair.resolved for pair in shown.pairs) else [(_UNRESOLVED, "with SE, not resolved")]
    look: dict[str, Any] = {"linestyle": "", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", markeredgecolor=_FAINT, markerfacecolor=fill, label=text, **look)
        for fill, text in kinds
    ]
    looks = {
        family: (_MARKERS[index % len(_MARKERS)], _COLOURS[index % len(_COLOURS)])
        for index, family in enumerate(families)
    }
    if len(families) > 1:
        handles += [
            Line2D([], [], marker=marker, color=colour, label=family, **look)
            for family, (marker, colour) in looks.items()
        ]
    figure, axes = _figure(
        shown, plot_in=3.6 + 0.08 * max(0, len(shown.pairs) - 20), left_in=0.85, handles=handles, notes=notes
    )
    _set_axes(axes, shown)
    for pair in shown.pairs:
        _draw_pair(axes, pair, *looks[pair.family])
    _label(figure, axes, shown)
    return figure


def _set_axes(axes: "Axes", shown: Scatter) -> None:
    for which, read in ((shown.x, "x"), (shown.y, "y")):
        values = [getattr(point, read) for pair in shown.pairs for point in (pair.base, pair.se)]
        values += [end for pair in shown.pairs for end in getattr(pair, f"{read}_interval") or ()]
        low, high = _limits(values, logarithmic=which.logarithmic)
        at = ticks(low, high, logarithmic=which.logarithmic)
        if which.logarithmic:
            (axes.set_xscale if read == "x" else axes.set_yscale)("log")
        (axes.set_xlim if read == "x" else axes.set_ylim)(low, high)
        ruler = axes.xaxis if read == "x" else axes.yaxis
        ruler.set_ticks(at, labels=[_text(which.unit, value) for value in at])
        ruler.set_ticks([], minor=True)
        (axes.set_xlabel if read == "x" else axes.set_ylabel)(which.label)


def _draw_pair(axes: "Axes", pair: Pair, marker: str, colour: str) -> None:
    """Base hollow, SE filled, an arrow between them where there is room for one."""
    base, se = (pair.base.x, pair.base.y), (pair.se.x, pair.se.y)
    look: dict[str, Any] = {"linestyle": "", "marker": marker, "markersize": 6, "markeredgecolor": colour, "zorder": 4}
    start, end = (axes.transData.transform(point) for point in (base, se))
    if math.dist(start, end) * 72 / axes.get_figure().dpi > 14:  # type: ignore[union-attr]
        arrow = {
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.0,
            "shrinkA": 4,
            "shrinkB": 4,
            "mutation_scale": 8,
        }
        axes.annotate("", xy=se, xytext=base, arrowprops=arrow, zorder=3)
    whiskers: dict[str, Any] = {"color": colour, "linewidth": 0.9, "zorder": 3, "marker": "|", "markersize": 4}
    if pair.x_interval is not None:
        axes.plot(pair.x_interval, [se[1]] * 2, **whiskers)
    if pair.y_interval is not None:
        axes.plot([se[0]] * 2, pair.y_interval, **{**whiskers, "marker": "_"})
    axes.plot(*([value] for value in base), markerfacecolor="white", **look)
    axes.plot(*([value] for value in se), markerfacecolor=colour if pair.resolved else _UNRESOLVED, **look)


def _label(figure: "Figure", axes: "Axes", shown: Scatter) -> None:
    """The names, each beside its SE point; a thin line leads to one that had to go further away."""
    points_per_pixel = 72 / figure.dpi
    size = 8.0 if len(shown.pairs) <= 20 else 6.5
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]

    def place(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point.x, point.y))
        return float(x) * points_per_pixel, float(y) * points_per_pixel

    sizes = []
    for pair in shown.pairs:
        probe = figure.text(0, 0, pair.name, size=size)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        # A viewer without our font may set the text wider.
        sizes.append((extent.width * points_per_pixel * 1.06, extent.height * points_per_pixel))
    anchors = [place(pair.se) for pair in shown.pairs]
    taken = []
    for pair, anchor in zip(shown.pairs, anchors, strict=True):
        taken += _covered(place(pair.base), anchor)
        ends = [Point(x=end, y=pair.se.y) for end in pair.x_interval or ()]
        ends += [Point(x=pair.se.x, y=end) for end in pair.y_interval or ()]
        taken += [box for end in ends for box in _along(place(end), anchor)]
    frame = axes.get_window_extent(renderer)
    left, bottom, right, top = (edge * points_per_pixel for edge in (frame.x0, frame.y0, frame.x1, frame.y1))
    boxes = placed(anchors, sizes, taken, (left, bottom, right, top))
    for pair, anchor, box in zip(shown.pairs, anchors, boxes, strict=True):
        middle = ((box[0] + box[2]) / 2 - anchor[0], (box[1] + box[3]) / 2 - anchor[1])
        data = (pair.se.x, pair.se.y)
        axes.annotate(
            pair.name, data, xytext=middle, textcoords="offset points", size=size, ha="center", va="center", zorder=5
        )
        if _gap(box, anchor) > _DISTANCES[1]:
            nearest_point = _nearest_in(box, anchor)
            offset = (nearest_point[0] - anchor[0], nearest_point[1] - anchor[1])
            line = {"arrowstyle": "-", "color": _FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", xy=data, xytext=offset, textcoords="offset points", arrowprops=line, zorder=2)


def _covered(base: tuple[float, float], se: tuple[float, float]) -> list[Box]:
    """What a pair covers, in points: a box around each marker, and small ones along the arrow."""
    return [(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in (base, se)] + _along(base, se)


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """A thin line as a row of small boxes, for it may be slanted."""
    steps = max(1, round(math.dist(start, end) / 5))
    places = [[one + (two - one) * step / steps for one, two in zip(start, end, strict=True)] for step in range(steps)]
    return [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in places]


_BAR = 0.26


def _bars_figure(shown: Bars) -> "Figure":
    from matplotlib.patches import Patch

    notes = []
    if any(row.interval is not None for row in shown.rows):
        notes.append("Whiskers and brackets: 95 % intervals. MACs by the convention of the paper.")
    if any(row.forward is None and row.interval is not None for row in shown.rows):
        notes.append(_NOT_RESOLVED)
    missing = sum(row.interval is None for row in shown.rows)
    if missing:
        notes.append(f"No result, and no bar, for {missing} of {len(shown.rows)} times: the machine was too noisy.")
    notes += _left_out_note(shown.left_out, len(shown.rows))
    handles = [Patch(facecolor=fill, edgecolor=_FAINT, linewidth=0.5, label=name) for name, fill in _FILLS.items()]
    left_in = 0.3 + 0.075 * max(len(row.name) for row in shown.rows)
    figure, axes = _figure(shown, plot_in=0.25 + 0.5 * len(shown.rows), left_in=left_in, handles=handles, notes=notes)
    fills = list(_FILLS.values())
    ends = [end for row in shown.rows for end in (row.macs, row.bytes, row.forward or 0.0, *(row.interval or ()))]
    low, high = min(0.0, *ends) * 100, max(0.0, *ends) * 100
    axes.set_xlim(low - (0.06 * (high - low) if low < 0 else 0), high + 0.25 * (high - low))
    axes.set_ylim(len(shown.rows) - 0.45, -0.55)
    for index, row in enumerate(shown.rows):
        _draw_row(axes, index, row, fills)
    at = [value for value in ticks(*axes.get_xlim(), logarithmic=False) if value <= high]
    axes.set_xticks(at, labels=[_text("%", value) for value in at])
    axes.set_yticks(range(len(shown.rows)), labels=[row.name for row in shown.rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=3)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("added by SE (% of the base)")
    return figure


def _draw_row(axes: "Axes", index: int, row: Row, fills: Sequence[str]) -> None:
    """Three bars, each with its value at the end; the time's interval is a line with whiskers over it."""

    def write(y: float, right: float, text: str, **look: Any) -> None:
        axes.annotate(text, (right, y), xytext=(3, 0), textcoords="offset points", size=7.5, va="center", **look)

    def fill(y: float, value: float, colour: str) -> None:
        axes.barh(y, value * 100, height=_BAR, color=colour, edgecolor=_FAINT, linewidth=0.5, zorder=2)

    for offset, value, colour in ((-_BAR, row.macs, fills[0]), (0.0, row.bytes, fills[1])):
        fill(index + offset, value, colour)
        write(index + offset, max(0.0, value) * 100, units.percent(value))
    y = index + _BAR
    if row.interval is None:
        write(y, 0, "no result", color=_FAINT, style="italic")
        return
    low, high = row.interval
    decimals = units.decimals_for((high - low) / 2)
    brackets = f"[{low * 100:.{decimals}f}, {high * 100:.{decimals}f}]"
    if row.forward is not None:
        fill(y, row.forward, fills[2])
    axes.plot([low * 100, high * 100], [y, y], color=_INK, linewidth=1.1, marker="|", markersize=5, zorder=4)
    text = "not resolved" if row.forward is None else units.percent(row.forward, decimals=decimals)
    write(y, max(0.0, high) * 100, f"{text} {brackets}")
