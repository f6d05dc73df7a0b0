"""Records, counted costs and published errors → what a picture shows, before any ink (`selab.ink` draws it).

A picture is data: `Scatter` and `Bars` say what stands where, and what was left out and why.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from selab import catalog, stats, units, verdict
from selab.accuracy_record import AccuracyRecord
from selab.accuracy_tables import Compared, not_published, trainings
from selab.accuracy_tables import name_of as comparison_name
from selab.accuracy_verdict import Comparison, compare_verdict
from selab.errors import RecordError, SelabError, UnknownNameError, nearest
from selab.published import published_pair
from selab.record import Cost, Phase, Record
from selab.spec import Metric, Variant
from selab.tables import check_one_machine, name_of, variants_of
from selab.tax_record import AGAIN, IMPLEMENTATIONS, TaxRecord, least

# ---------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """A quantity that can stand on an axis.

    Attributes:
        origin: who says so: our counter, a paper, a profile, or a comparison of accuracy.
        path: the field of a `Cost`, a `Memory` or a verdict, the metric, or the phase that it is read from.
        short: what it is called in a title.
        label: what is said along the axis.
        unit: of its values; `%` is percent, not a fraction.
    """

    name: str
    origin: Literal["counted", "published", "measured", "trained"]
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
    Axis("top1_error_trained", "trained", "top1", "top-1 error", "top-1 error, trained here (%)", "%", False),
    Axis("top5_error_trained", "trained", "top5", "top-5 error", "top-5 error, trained here (%)", "%", False),
    Axis("latency", "measured", "forward", _TIME, _TIME, "s"),
    Axis(
        "latency_fwd_bwd", "measured", "forward_backward", "time of both passes", f"{_TIME} and the backward one", "s"
    ),
    Axis("tax", "measured", "forward", "time added to a forward pass", _ADDED, "%", False),
    Axis("saved_for_backward", "measured", "saved_for_backward_bytes", _SAVED, _SAVED, "B"),
)
AXES = {axis.name: axis for axis in _ALL_AXES}
TRAINED = "trained"


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


def with_unit(unit: str, value: float) -> str:
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
    trained: AccuracyRecord | None = None


@dataclass(frozen=True, kw_only=True)
class _Both:
    """One quantity of a pair."""

    base: float
    se: float
    interval: tuple[float, float] | None = None
    resolved: bool = True
    source: str = ""
    dataset: str = ""


def _recorded(record: Record) -> _Subject:
    variant, baseline = variants_of(record)
    return _Subject(
        name=name_of(record),
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
    if {"measured", TRAINED} & {one.origin for one in both} or "counted" not in (one.origin for one in both):
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
    interval = verdict.not_excluded(latency)
    if interval is None or latency.baseline_s is None or latency.variant_s is None or latency.ratio is None:
        return "no result"
    resolved = latency.verdict_kind != "undecided"
    if which.name == "tax":
        # Below the control floor the figure is the machine's own, and an interval has no place to point at.
        percents = (interval[0] * 100, interval[1] * 100)
        return _Both(base=0.0, se=(latency.ratio - 1) * 100, interval=percents) if resolved else "difference unresolved"
    low, high = (latency.baseline_s * (1 + bound) for bound in interval)
    return _Both(base=latency.baseline_s, se=latency.variant_s, interval=(low, high), resolved=resolved)


def _trained(subject: _Subject, which: Axis) -> _Both | str:
    """Both networks' error on the test images, means over seeds, with the interval of their paired difference."""
    record = subject.trained
    if record is None:
        return "not trained"
    found: Comparison | None = getattr(compare_verdict(record), which.path)
    if found is None or found.baseline is None or found.variant is None:
        return f"no {which.short}"
    base, se, half = 100 - found.baseline.mean, 100 - found.variant.mean, found.difference.half_width
    return _Both(
        base=base,
        se=se,
        interval=None if half is None else (se - half, se + half),
        resolved=found.difference.kind in ("better", "worse"),
        dataset=record.data.title,
    )


def _saved(record: Record) -> _Both | str:
    both = (record.baseline_memory, record.memory)
    base, se = (None if one is None else one.saved_for_backward_bytes for one in both)
    return "memory not measured" if base is None or se is None else _Both(base=base, se=se)


def _value(subject: _Subject, which: Axis) -> _Both | str:
    """A quantity of a pair, or why there is none."""
    readers = {"counted": _counted, "published": _published, "measured": _measured, "trained": _trained}
    found = readers[which.origin](subject, which)
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
    compared: Sequence[Compared] = (),
) -> Scatter:
    """Base and SE network of every pair, in the plane of two quantities.

    With an accuracy that was trained here the pairs are those of the comparisons, beside the forward pass of one image;
    with a measured quantity those of the records, and what is counted is counted for their workload; otherwise those of
    the catalog, and what is counted is counted for one image.

    Args:
        x: a name from `AXES`.
        y: another.
        records: of one machine.
        costs: of `costs_needed(x, y, archs)`, by those words.
        archs: only these variants.
        workload: the slug of the records' workload, where they have several; by default that of most of them.
        compared: comparisons of one machine, for accuracies that were trained here.

    Raises:
        UnknownNameError: an axis, a variant or a workload that there is not.
        RecordError: records are needed and there are none, or they are of several machines.
        SelabError: no pair has both quantities; the message says of each why.
    """
    across, up = axis(x, option="--x"), axis(y, option="--y")
    if across == up:
        raise SelabError(f"--y {y}: stands on the other axis already; name another quantity{nearest('', AXES)}")
    left_out: list[LeftOut] = []
    if TRAINED in (across.origin, up.origin):
        subjects, circumstances = _compared_subjects(compared, archs, what=f"plot of {x} and {y}")
    elif "measured" in (across.origin, up.origin):
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
            f"nothing to draw for {x} and {y}: {reasons(left_out)}; choose other networks or other quantities"
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
        sources=(
            *_sources([both for _, *twice in found for both in twice]),
            *_training_notes([one.trained for one, *_ in found if one.trained is not None]),
        ),
        left_out=tuple(left_out),
    )


def _compared_subjects(compared: Sequence[Compared], archs: Sequence[str], *, what: str) -> tuple[list[_Subject], str]:
    """The comparisons that are drawn, and what their figures share."""
    chosen = [one for one in compared if not archs or one.record.arch in archs]
    if not chosen:
        there = ", ".join(one.record.arch for one in compared)
        known = f"there are some of {there}" if there else "train with `selab compare`, and name the folder: --profiles"
        raise RecordError(f"{what}: no comparisons{' of ' + ', '.join(archs) if archs else ''}; {known}")
    subjects = []
    for one in chosen:
        variant, baseline = variants_of(one.record)
        subjects.append(
            _Subject(
                name=comparison_name(one.record),
                family="unknown" if variant is None else variant.family,
                variant=variant,
                baseline=baseline,
                cost=one.costs.get(one.record.arch),
                baseline_cost=one.costs.get(one.record.baseline),
                record=one.forward,
                trained=one.record,
            )
        )
    lines = dict.fromkeys(one.record.data.title for one in chosen)
    places = dict.fromkeys(_circumstances(one.forward) for one in chosen if one.forward is not None)
    return subjects, "; ".join((*lines, *places))


def _training_notes(records: Sequence[AccuracyRecord]) -> list[str]:
    """How the networks were trained, and that their data set is not the published one; without the last full stop."""
    how = [f"Trained: {'; '.join(trainings(records))}"] if records else []
    return how + [note.removesuffix(".") for note in not_published(records)]


_Found = tuple[_Subject, _Both, _Both]


def _of_one_dataset(found: Sequence[_Found]) -> tuple[list[_Found], list[LeftOut]]:
    """Errors on different data share no axis: those of most pairs stay."""
    names = Counter(both.dataset for _, *twice in found for both in twice if both.dataset)
    if len(names) < 2:
        return list(found), []
    kept = min(names, key=lambda name: (-names[name], name))
    inside = [one for one in found if {one[1].dataset, one[2].dataset} <= {kept, ""}]
    return inside, [
        LeftOut(name=one[0].name, why=f"on {one[1].dataset or one[2].dataset}") for one in found if one not in inside
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
        interval = verdict.not_excluded(latency)
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
        raise SelabError(f"nothing to draw: {reasons(left_out)}; measure with `selab profile --phase forward`")
    return Bars(
        title="What SE adds to a network: MACs, bytes, time",
        circumstances=_circumstances(chosen[0]),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


def reasons(left_out: Sequence[LeftOut], *, most: int | None = None) -> str:
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


def _circumstances(record: Record | TaxRecord) -> str:
    """`Intel Xeon, one thread, fp32, batch 1, 3×224×224, torch 2.13`: what every figure of the picture shares."""
    return ", ".join(_circumstance_parts(record))


def _circumstance_parts(record: Record | TaxRecord) -> list[str]:
    work, machine = record.workload, record.machine
    parts = [machine.gpu or machine.cpu if work.device != "cpu" else machine.cpu]
    if work.device == "cpu":
        parts.append("one thread" if work.threads == 1 else f"{work.threads} threads")
    parts += [work.dtype, f"batch {work.batch}", "×".join(map(str, work.input_chw))]
    parts += ["channels last"] if work.memory_format == "channels_last" else []
    parts += ["compiled"] if work.compiled else []
    parts += ["fused"] if work.fused else []
    parts += ["heap held"] if work.held_heap else []
    parts += [f"{work.mode} mode"] if work.mode != "auto" else []
    parts += [f"torch {machine.libraries['torch']}"] if "torch" in machine.libraries else []
    return parts


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a `Lines`: a value and its 95 % interval at each place."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A measured quantity along another; `x` and `y` are what is said along the axes, the former in powers of two."""

    title: str
    circumstances: str
    x: str
    y: str
    series: tuple[Line, ...]
    left_out: tuple[LeftOut, ...] = ()


Along = Literal["batch", "resolution"]
_ALONG: Mapping[Along, tuple[str, str]] = {
    "batch": ("batch size", "batch (images)"),
    "resolution": ("resolution", "height and width of the input (pixels)"),
}


def _setting(record: Record, name: str) -> int | str:
    work = record.workload
    return work.input_chw[1] if name == "resolution" else getattr(work, name)


def tax_lines(
    records: Sequence[Record], along: Along, *, phase: Phase = "forward", missing: Sequence[LeftOut] = ()
) -> Lines:
    """What SE adds to the time, along the batch or the resolution; a line for each network and each other setting.

    Args:
        records: of one machine.
        along: what varies within a line.
        phase: whose time.
        missing: what was asked for and has no record.

    Raises:
        RecordError: the records are of several machines.
        SelabError: there is nothing to draw; the message says why.
    """
    check_one_machine(records)
    tax = replace(AXES["tax"], path=phase)
    others = [name for name in ("batch", "resolution", "dtype", "memory_format") if name != along]
    told = [name for name in others if len({_setting(record, name) for record in records}) > 1]
    left_out = list(missing)
    found: dict[str, list[tuple[float, _Both]]] = {}
    for record in sorted(records, key=lambda one: _setting(one, along)):
        name = ", ".join([name_of(record), *(_setting_words(record, one) for one in told)])
        both = _measured(_recorded(record), tax)
        if isinstance(both, str):
            left_out.append(LeftOut(name=f"{name}, {_setting_words(record, along)}", why=both))
        else:
            found.setdefault(name, []).append((float(_setting(record, along)), both))
    if not found:
        raise SelabError(f"nothing to draw: {reasons(left_out, most=4) or 'no records'}; measure longer")
    parts = [_circumstance_parts(record) for record in records]
    what = phase.replace("_", " and ") + (" passes" if "_" in phase else " pass")
    short, label = _ALONG[along]
    return Lines(
        title=f"Time added to a {what}, by {short}",
        circumstances=", ".join(part for part in parts[0] if all(part in other for other in parts)),
        x=label,
        y="time added (% of the base)",
        series=tuple(
            Line(
                name=name,
                xs=tuple(at for at, _ in places),
                ys=tuple(both.se for _, both in places),
                intervals=tuple(both.interval for _, both in places if both.interval is not None),
            )
            for name, places in sorted(found.items())
        ),
        left_out=tuple(left_out),
    )


def _setting_words(record: Record, name: str) -> str:
    value = _setting(record, name)
    return (
        f"batch {value}" if name == "batch" else f"{value} px" if name == "resolution" else str(value).replace("_", " ")
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One network's figure after each epoch: the mean over its seeds, the least and the greatest of them."""

    name: str
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Learning curves of a comparison, base first; `notes` is what stands below."""

    title: str
    circumstances: str
    label: str
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]


def curves(record: AccuracyRecord) -> Curves:
    """Test accuracy after each epoch, of both networks, over the seeds that are finished.

    Raises:
        RecordError: none is.
    """
    verdict = compare_verdict(record)
    done = [one.pair for one in record.seeds if one.pair]
    if not done:
        then = f"{verdict.diverged}; compare with another recipe" if verdict.diverged else "go on with the comparison"
        raise RecordError(f"plot curves: {record.arch}: no seed is finished for both networks; {then}")
    found = []
    for name, outcomes in zip((record.baseline, record.arch), zip(*done, strict=True), strict=True):
        by_epoch = list(zip(*([epoch.test_top1_pct for epoch in one.epochs] for one in outcomes), strict=True))
        found.append(
            Curve(
                name=name,
                mean=tuple(stats.mean(values) for values in by_epoch),
                low=tuple(min(values) for values in by_epoch),
                high=tuple(max(values) for values in by_epoch),
            )
        )
    seeds = "1 seed" if len(done) == 1 else f"{len(done)} seeds"
    machine = record.machine.gpu or record.machine.cpu
    recipe = f"recipe {record.recipe.name}, batch {record.recipe.batch}"
    return Curves(
        title=f"Top-1 accuracy by epoch: {record.arch} and {record.baseline}",
        circumstances=f"{record.data.title}, {recipe}, {seeds}; {machine}",
        label="top-1 accuracy on the test images (%)",
        curves=tuple(found),
        notes=(
            "Lines: means over the seeds; bands: from the least to the greatest of them.",
            f"At the end: {verdict.top1.difference.text}.",
            *([f"{verdict.diverged}; drawn are the others."] if verdict.diverged else []),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class RoofMark:
    """One operator call under a roof.

    Attributes:
        intensity: FLOPs per byte.
        share: of the pass's time.
    """

    intensity: float
    flops_per_s: float
    share: float
    inside_se: bool


@dataclass(frozen=True, kw_only=True)
class Roof:
    """Operators under the peaks of a device: FLOP/s against FLOPs per byte; bandwidths in bytes per second."""

    title: str
    circumstances: str
    peak_flops_per_s: float
    memory_bandwidth: float
    cache_bandwidth: float
    marks: tuple[RoofMark, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaxBar:
    """One implementation's tax, as a fraction of the baseline's time.

    Attributes:
        tax: None where no difference is shown.
        interval: what the measurement does not exclude; None where there is no result.
    """

    name: str
    tax: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TaxBars:
    """Implementations of the same block over the same baseline; `least` is what the bytes alone would cost."""

    title: str
    circumstances: str
    bars: tuple[TaxBar, ...]
    least: float
    left_out: tuple[LeftOut, ...] = ()


def tax_bars(record: TaxRecord, *, method: str | None = None) -> TaxBars:
    """What each implementation adds to the baseline's time.

    Args:
        record: of one network.
        method: one of the record's; by default its headline's.

    Raises:
        RecordError: the baseline was not measured.
    """
    method = method or record.methods[0]
    control = record.latency(AGAIN, method=method)
    if control is None or control.baseline_s is None:
        raise RecordError(f"plot tax: {record.arch}: the baseline was not measured; measure again with `selab tax`")
    bars, left_out = [], []
    for name in IMPLEMENTATIONS:
        latency = record.latency(name, method=method)
        if latency is None or latency.ratio is None:
            left_out.append(LeftOut(name=name, why="not asked for" if latency is None else "failed"))
            continue
        interval = verdict.not_excluded(latency)
        said = interval is not None and latency.verdict_kind != "undecided"
        bars.append(TaxBar(name=name, tax=latency.ratio - 1 if said else None, interval=interval))
    what = record.phase.replace("_", " and ") + (" passes" if "_" in record.phase else " pass")
    return TaxBars(
        title=f"The SE tax of {name_of(record)}: what a {what} takes longer",
        circumstances=_circumstances(record) + ("" if method == "wall" else f", {method}"),
        bars=tuple(bars),
        least=least(record).seconds / control.baseline_s,
        left_out=tuple(left_out),
    )


Picture = Scatter | Bars | Curves | Roof | Lines | TaxBars
_AXES_OF = {"cost": ("macs", "latency"), "accuracy": ("macs", "top1_error")}
CURVES, TAX = "curves", "tax"
OF_ONE_RECORD = (CURVES, TAX)
NAMES = (*_AXES_OF, "added", *OF_ONE_RECORD)


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
    compared: Sequence[Compared] = (),
) -> Picture:
    """A picture by its name: `cost` and `accuracy` are scatters with axes of their own choice, `added` is bars.

    Raises:
        SelabError: as `axes_of`, `points` and `bars`.
    """
    axes = axes_of(name, x, y)
    if axes is None:
        return bars(records, archs=archs, workload=workload)
    return points(*axes, records=records, costs=costs, archs=archs, workload=workload, compared=compared)
