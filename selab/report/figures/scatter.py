"""Records, counted costs and published errors → what a picture shows, and how it is drawn.

A picture is data: `Scatter` and `Bars` say what stands where, and what was left out and why.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from selab.errors import RecordError, SelabError, nearest
from selab.experiments.compared import Compared
from selab.models import catalog
from selab.models.provenance import variants_of
from selab.records.types import Cost, Record
from selab.report.accuracy import name_of as comparison_name
from selab.report.accuracy import not_published, trainings
from selab.report.figures.axes import AXES, TRAINED, Axis, axis, tick_labels
from selab.report.figures.base import (
    BothValues,
    LeftOut,
    Subject,
    baseline_word,
    block_of,
    chosen_records,
    circumstances_of,
    measured_values,
    names_as_given,
    reasons,
    recorded,
)
from selab.report.figures.style import (
    COLOURS,
    DISTANCES,
    FAINT,
    INK,
    MARKERS,
    NOT_RESOLVED,
    UNRESOLVED,
    Box,
    gap,
    left_out_note,
    limits,
    nearest_in,
    new_figure,
    placed,
    ticks,
)
from selab.report.published import published_pair
from selab.training.record import AccuracyRecord
from selab.training.verdict import compare_verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from selab.models.spec import Metric


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
        block: the kind of attention block.
    """

    name: str
    family: str
    base: Point
    se: Point
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    resolved: bool = True
    block: str = "SE"


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


def costs_needed(x: str, y: str, archs: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the networks to count for a figure; none if records have their costs.

    Raises:
        UnknownNameError: an axis or a network that there is not.
    """
    both = (axis(x, option="--x"), axis(y, option="--y"))
    if {"measured", TRAINED} & {one.origin for one in both} or "counted" not in (one.origin for one in both):
        return ()
    words = [word for word in names_as_given(archs) if not _why_unpublished(_catalogued(word, {}), both)]
    return tuple(dict.fromkeys(word for one in words for word in (baseline_word(catalog.find(one)), one)))


def _why_unpublished(subject: Subject, axes: Iterable[Axis]) -> str:
    found = [_published(subject, one) for one in axes if one.origin == "published"]
    return next((one for one in found if isinstance(one, str)), "")


def _catalogued(word: str, costs: Mapping[str, Cost]) -> Subject:
    variant = catalog.find(word)
    return Subject(
        name=variant.name,
        family=variant.family,
        variant=variant,
        baseline=catalog.baseline_of(variant),
        cost=costs.get(word),
        baseline_cost=costs.get(baseline_word(variant)),
    )


# -------------------------------------------------------------------------------------------------- one quantity, twice
def _published(subject: Subject, which: Axis) -> BothValues | str:
    """Return both networks' error, from one table and on the same data."""
    metric: Metric = which.path  # type: ignore[assignment]
    ours, theirs = published_pair(subject.variant, subject.baseline, metric)
    if ours is None:
        return f"no {which.short} published"
    if theirs is None:
        return f"no {which.short} of the base published in the same table"
    if ours.dataset != theirs.dataset:
        return f"{which.short} of the base published on other data"
    return BothValues(se=ours.value, base=theirs.value, source=f"{ours.source}, {ours.table}", dataset=ours.dataset)


def _counted(subject: Subject, which: Axis) -> BothValues | str:
    if subject.cost is None or subject.baseline_cost is None:
        return "not counted"
    read = attrgetter(which.path)
    return BothValues(base=read(subject.baseline_cost), se=read(subject.cost))


def _trained(subject: Subject, which: Axis) -> BothValues | str:
    """Return both networks' test error, means over seeds, with the interval of their paired difference."""
    record = subject.trained
    if record is None:
        return "not trained"
    found = compare_verdict(record).of(which.path)
    if found is None or found.baseline is None or found.variant is None:
        return f"no {which.short}"
    base, se, half = 100 - found.baseline.mean, 100 - found.variant.mean, found.difference.half_width
    return BothValues(
        base=base,
        se=se,
        interval=None if half is None else (se - half, se + half),
        resolved=found.difference.kind in ("better", "worse"),
        dataset=record.data.title,
    )


def _value(subject: Subject, which: Axis) -> BothValues | str:
    """Return a quantity of a pair, or why there is none."""
    readers = {"counted": _counted, "published": _published, "measured": measured_values, "trained": _trained}
    found = readers[which.origin](subject, which)
    if which.logarithmic and isinstance(found, BothValues) and min(found.base, found.se) <= 0:
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
    """Return the base and SE network of every pair, in the plane of two quantities.

    With an accuracy that was trained here the pairs are those of the comparisons, with the forward pass of one image;
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
        chosen, left_out = chosen_records(records, archs, workload, what=f"plot of {x} and {y}")
        subjects = [recorded(record) for record in chosen]
        circumstances = circumstances_of(chosen[0])
    else:
        subjects = [_catalogued(word, costs or {}) for word in names_as_given(archs)]
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
            block=block_of(subject.variant),
        )
        for subject, on_x, on_y in found
    )
    return Scatter(
        title=f"{up.short[0].upper()}{up.short[1:]} against {across.short}: base and with {_with(pairs)}",
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


def _compared_subjects(compared: Sequence[Compared], archs: Sequence[str], *, what: str) -> tuple[list[Subject], str]:
    """Return the comparisons to draw, and what their figures share."""
    chosen = [one for one in compared if not archs or one.record.arch in archs]
    if not chosen:
        there = ", ".join(one.record.arch for one in compared)
        known = f"there are some of {there}" if there else "train with `selab compare`, and name the folder: --profiles"
        raise RecordError(f"{what}: no comparisons{' of ' + ', '.join(archs) if archs else ''}; {known}")
    subjects = []
    for one in chosen:
        variant, baseline = variants_of(one.record)
        subjects.append(
            Subject(
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
    places = dict.fromkeys(circumstances_of(one.forward) for one in chosen if one.forward is not None)
    return subjects, "; ".join((*lines, *places))


def _training_notes(records: Sequence[AccuracyRecord]) -> list[str]:
    """Return how the networks were trained, and whether their data set is not the published one."""
    how = [f"Trained: {'; '.join(trainings(records))}"] if records else []
    return how + [note.removesuffix(".") for note in not_published(records)]


_Found = tuple[Subject, BothValues, BothValues]


def _of_one_dataset(found: Sequence[_Found]) -> tuple[list[_Found], list[LeftOut]]:
    """Keep the pairs of the commonest data set: errors on different data share no axis."""
    names = Counter(both.dataset for _, *twice in found for both in twice if both.dataset)
    if len(names) < 2:
        return list(found), []
    kept = min(names, key=lambda name: (-names[name], name))
    inside = [one for one in found if {one[1].dataset, one[2].dataset} <= {kept, ""}]
    return inside, [
        LeftOut(name=one[0].name, why=f"on {one[1].dataset or one[2].dataset}") for one in found if one not in inside
    ]


def _sources(both: Iterable[BothValues]) -> tuple[str, ...]:
    """Join `arXiv 1709.01507, Table 2` and `…, Table 3` → one line per source."""
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


_NOT_SHOWN = "n.s.: not significant, no difference in accuracy, or the base's time differs from itself as much."
# What the intervals along an axis are of, by its name or by who says it.
_WHISKERS = {
    "tax": "",
    "measured": " of the ratio, from the base's time",
    "trained": " of the difference in accuracy, paired by seed",
}


def scatter_figure(shown: Scatter) -> "Figure":
    """Draw pairs of points, base → variant."""
    from matplotlib.lines import Line2D

    notes = []
    shown_intervals = (
        (shown.x, any(pair.x_interval for pair in shown.pairs)),
        (shown.y, any(pair.y_interval for pair in shown.pairs)),
    )
    of = [_WHISKERS.get(axis.name, _WHISKERS.get(axis.origin, "")) for axis, there in shown_intervals if there]
    if of:
        notes.append(f"Whiskers: 95 % intervals{' and'.join(words for words in of if words)}.")
    if not all(pair.resolved for pair in shown.pairs):
        trained = "trained" in (shown.x.origin, shown.y.origin)
        notes.append(_NOT_SHOWN if trained else NOT_RESOLVED)
    notes += [f"{source}." for source in shown.sources]
    notes += left_out_note(shown.left_out, len(shown.pairs))
    kinds = [("white", "base"), (FAINT, f"with {_with(shown.pairs)}")]
    kinds += [] if all(pair.resolved for pair in shown.pairs) else [(UNRESOLVED, f"with {_with(shown.pairs)}, n.s.")]
    look: dict[str, Any] = {"linestyle": "", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", markeredgecolor=FAINT, markerfacecolor=fill, label=text, **look)
        for fill, text in kinds
    ]
    looks = _looks(shown.pairs)
    handles += [
        Line2D([], [], marker=marker, color=colour, label=label, **look)
        for label, (marker, colour) in _legend(looks).items()
    ]
    figure, axes = new_figure(
        shown, plot_in=3.6 + 0.08 * max(0, len(shown.pairs) - 20), left_in=0.95, handles=handles, notes=notes
    )
    _set_axes(axes, shown)
    for pair in shown.pairs:
        _draw_pair(axes, pair, *looks[pair.family, pair.block])
    colours = {pair.name: looks[pair.family, pair.block][1] for pair in shown.pairs}
    _label(figure, axes, shown, colours if len({pair.block for pair in shown.pairs}) > 1 else {})
    return figure


def _with(pairs: Sequence[Pair]) -> str:
    """Return the kind of block that all pairs share, or `a block`."""
    kinds = {pair.block for pair in pairs}
    return kinds.pop() if len(kinds) == 1 else "a block"


_Look = tuple[str, str]


def _looks(pairs: Sequence[Pair]) -> dict[tuple[str, str], _Look]:
    """Return marker and colour by family and kind of block.

    With one kind of block, families differ in both; with several, kinds differ in colour, and what is left, families or
    kinds, in the marker.
    """
    families = sorted({pair.family for pair in pairs})
    kinds = sorted({pair.block for pair in pairs}, key=lambda kind: (kind != "SE", kind))
    found = {}
    for family, kind in {(pair.family, pair.block) for pair in pairs}:
        of_family, of_kind = families.index(family), kinds.index(kind)
        marker = of_family if len(families) > 1 else of_kind
        colour = of_kind if len(kinds) > 1 else of_family
        found[family, kind] = (MARKERS[marker % len(MARKERS)], COLOURS[colour % len(COLOURS)])
    return found


def _legend(looks: dict[tuple[str, str], _Look]) -> dict[str, _Look]:
    """Return what markers and colours mean, where there are several."""
    families = sorted({family for family, _ in looks})
    kinds = sorted({kind for _, kind in looks}, key=lambda kind: (kind != "SE", kind))
    several_kinds, several_families = len(kinds) > 1, len(families) > 1
    legend: dict[str, _Look] = {}
    for family, kind in sorted(looks):
        marker, colour = looks[family, kind]
        if several_families:
            legend.setdefault(family, (marker, FAINT if several_kinds else colour))
    for kind in kinds if several_kinds else []:
        marker, colour = next(look for (_, one), look in looks.items() if one == kind)
        legend[kind] = ("s" if several_families else marker, colour)
    return legend


def _set_axes(axes: "Axes", shown: Scatter) -> None:
    for which, read in ((shown.x, "x"), (shown.y, "y")):
        values = [getattr(point, read) for pair in shown.pairs for point in (pair.base, pair.se)]
        values += [end for pair in shown.pairs for end in getattr(pair, f"{read}_interval") or ()]
        low, high = limits(values, logarithmic=which.logarithmic, wide=True)
        at = ticks(low, high, logarithmic=which.logarithmic)
        if which.logarithmic:
            (axes.set_xscale if read == "x" else axes.set_yscale)("log")
        (axes.set_xlim if read == "x" else axes.set_ylim)(low, high)
        ruler = axes.xaxis if read == "x" else axes.yaxis
        ruler.set_ticks(at, labels=tick_labels(which.unit, at))
        ruler.set_ticks([], minor=True)
        (axes.set_xlabel if read == "x" else axes.set_ylabel)(
            which.label if read == "x" else textwrap.fill(which.label, _LABEL_CHARACTERS)
        )


# A longer label along the vertical axis would reach the legend.
_LABEL_CHARACTERS = 44


def _draw_pair(axes: "Axes", pair: Pair, marker: str, colour: str) -> None:
    """Draw the base hollow and SE filled, with an arrow between them where there is room."""
    base, se = (pair.base.x, pair.base.y), (pair.se.x, pair.se.y)
    look: dict[str, Any] = {"linestyle": "", "marker": marker, "markersize": 6, "markeredgecolor": colour, "zorder": 4}
    start, end = (axes.transData.transform(point) for point in (base, se))
    if math.dist(start, end) * 72 / axes.get_figure().dpi > 14:  # type: ignore[union-attr]
        arrow = {
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.0,
            "shrinkA": 4,
            # Before a whisker, or its cap and the head would be one blot.
            "shrinkB": 4 if pair.x_interval is None and pair.y_interval is None else 8,
            "mutation_scale": 8,
        }
        axes.annotate("", xy=se, xytext=base, arrowprops=arrow, zorder=3)
    whiskers: dict[str, Any] = {"color": colour, "linewidth": 0.9, "zorder": 3, "marker": "|", "markersize": 6}
    if pair.x_interval is not None:
        axes.plot(pair.x_interval, [se[1]] * 2, **whiskers)
    if pair.y_interval is not None:
        axes.plot([se[0]] * 2, pair.y_interval, **{**whiskers, "marker": "_"})
    axes.plot(*([value] for value in base), markerfacecolor="white", **look)
    # Above every base: blocks that cost next to nothing stand on theirs.
    look["zorder"] = 5
    axes.plot(*([value] for value in se), markerfacecolor=colour if pair.resolved else UNRESOLVED, **look)


def _label(figure: "Figure", axes: "Axes", shown: Scatter, colours: Mapping[str, str]) -> None:
    """Write each name near its SE point; a thin line leads to one further away."""
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
            pair.name,
            data,
            xytext=middle,
            textcoords="offset points",
            size=size,
            color=colours.get(pair.name, INK),
            ha="center",
            va="center",
            zorder=6,
        )
        if gap(box, anchor) > DISTANCES[1]:
            nearest_point = nearest_in(box, anchor)
            offset = (nearest_point[0] - anchor[0], nearest_point[1] - anchor[1])
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", xy=data, xytext=offset, textcoords="offset points", arrowprops=line, zorder=2)


def _covered(base: tuple[float, float], se: tuple[float, float]) -> list[Box]:
    """Return what a pair covers, in points: a box around each marker, and small ones along the arrow."""
    return [(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in (base, se)] + _along(base, se)


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Return a thin line as a row of small boxes, because it may be slanted."""
    steps = max(1, round(math.dist(start, end) / 5))
    places = [[one + (two - one) * step / steps for one, two in zip(start, end, strict=True)] for step in range(steps)]
    return [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in places]
