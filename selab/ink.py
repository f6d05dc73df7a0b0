"""Data of a picture → SVG or PNG with matplotlib: axes, arrows, labels that keep out of each other's way.

The same data gives the same bytes, in colour and readable in grey.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selab import units
from selab.errors import SelabError
from selab.plots import (
    Bars,
    Curves,
    LeftOut,
    Lines,
    Pair,
    Picture,
    Point,
    Roof,
    Scatter,
    TaxBars,
    reasons,
    with_unit,
)
from selab.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png")


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
_NOT_SHOWN = "Not resolved: no difference of accuracy is shown, or the base's time differs from itself as much."
# What the intervals along an axis are of, by its name or by who says it.
_WHISKERS = {
    "tax": "",
    "measured": " of the ratio, from the base's time",
    "trained": " of the difference in accuracy, paired by seed",
}
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
        match shown:
            case Scatter():
                figure = _scatter_figure(shown)
            case Bars():
                figure = _bars_figure(shown)
            case Curves():
                figure = _curves_figure(shown)
            case Roof():
                figure = _roof_figure(shown)
            case Lines():
                figure = _lines_figure(shown)
            case TaxBars():
                figure = _tax_figure(shown)
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
    return [f"Left out {len(left_out)} of {shown + len(left_out)}: {reasons(left_out, most=4)}."]


def _scatter_figure(shown: Scatter) -> "Figure":
    from matplotlib.lines import Line2D

    families = list(dict.fromkeys(sorted(pair.family for pair in shown.pairs)))
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
        notes.append(_NOT_SHOWN if trained else _NOT_RESOLVED)
    notes += [f"{source}." for source in shown.sources]
    notes += _left_out_note(shown.left_out, len(shown.pairs))
    kinds = [("white", "base"), (_FAINT, "with SE")]
    kinds += [] if all(pair.resolved for pair in shown.pairs) else [(_UNRESOLVED, "with SE, not shown")]
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
        ruler.set_ticks(at, labels=[with_unit(which.unit, value) for value in at])
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
        notes.append(f"No result, and no bar, for {missing} of {len(shown.rows)} times; their records say why.")
    notes += _left_out_note(shown.left_out, len(shown.rows))
    handles = [Patch(facecolor=fill, edgecolor=_FAINT, linewidth=0.5, label=name) for name, fill in _FILLS.items()]
    left_in = 0.3 + 0.075 * max(len(row.name) for row in shown.rows)
    figure, axes = _figure(shown, plot_in=0.25 + 0.5 * len(shown.rows), left_in=left_in, handles=handles, notes=notes)
    fills = list(_FILLS.values())
    ends = [end for row in shown.rows for end in (row.macs, row.bytes, row.forward or 0.0, *(row.interval or ()))]
    for index, row in enumerate(shown.rows):
        for offset, value, colour in ((-_BAR, row.macs, fills[0]), (0.0, row.bytes, fills[1])):
            _draw_bar(axes, index + offset, value, colour)
        _draw_interval(axes, index + _BAR, row.forward, row.interval, fills[2])
    _set_bars(axes, ends, [row.name for row in shown.rows])
    axes.set_xlabel("added by SE (% of the base)")
    return figure


def _set_bars(axes: "Axes", ends: Sequence[float], names: Sequence[str]) -> None:
    """Rows of bars by their names, and room for fractions of the base, with what is written behind them."""
    low, high = min(0.0, *ends) * 100, max(0.0, *ends) * 100
    axes.set_xlim(low - (0.06 * (high - low) if low < 0 else 0), high + 0.25 * (high - low))
    axes.set_ylim(len(names) - 0.45, -0.55)
    at = [value for value in ticks(*axes.get_xlim(), logarithmic=False) if value <= high]
    axes.set_xticks(at, labels=[with_unit("%", value) for value in at])
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=3)
    axes.spines["left"].set_visible(False)


def _draw_bar(axes: "Axes", y: float, value: float, colour: str, *, told: bool = True, height: float = _BAR) -> None:
    axes.barh(y, value * 100, height=height, color=colour, edgecolor=_FAINT, linewidth=0.5, zorder=2)
    if told:
        _write(axes, y, max(0.0, value) * 100, units.percent(value))


def _draw_interval(
    axes: "Axes",
    y: float,
    value: float | None,
    interval: tuple[float, float] | None,
    colour: str,
    *,
    height: float = _BAR,
) -> None:
    """A measured bar; its interval is a line with whiskers over it."""
    if interval is None:
        _write(axes, y, 0, "no result", color=_FAINT, style="italic")
        return
    low, high = interval
    decimals = units.decimals_for((high - low) / 2)
    brackets = f"[{low * 100:.{decimals}f}, {high * 100:.{decimals}f}]"
    if value is not None:
        _draw_bar(axes, y, value, colour, told=False, height=height)
    axes.plot([low * 100, high * 100], [y, y], color=_INK, linewidth=1.1, marker="|", markersize=5, zorder=4)
    text = "not shown" if value is None else units.percent(value, decimals=decimals)
    _write(axes, y, max(0.0, high) * 100, f"{text} {brackets}")


def _write(axes: "Axes", y: float, right: float, text: str, **look: Any) -> None:
    axes.annotate(text, (right, y), xytext=(3, 0), textcoords="offset points", size=7.5, va="center", **look)


_TALL_BAR = 0.6


def _tax_figure(shown: TaxBars) -> "Figure":
    from matplotlib.patches import Patch

    notes = ["Least: the bytes that SE must move, at the bandwidth of copies. Whiskers and brackets: 95 % intervals."]
    if any(bar.tax is None and bar.interval is not None for bar in shown.bars):
        notes.append(_NOT_RESOLVED)
    notes += _left_out_note(shown.left_out, len(shown.bars))
    fills = [_FILLS["time of a forward pass"], _FILLS["bytes moved"]]
    handles = [
        Patch(facecolor=fill, edgecolor=_FAINT, linewidth=0.5, label=name)
        for fill, name in zip(fills, ("measured", "least"), strict=True)
    ]
    names = [*(bar.name for bar in shown.bars), "least"]
    left_in = 0.3 + 0.075 * max(map(len, names))
    figure, axes = _figure(shown, plot_in=0.25 + 0.34 * len(names), left_in=left_in, handles=handles, notes=notes)
    for index, bar in enumerate(shown.bars):
        _draw_interval(axes, index, bar.tax, bar.interval, fills[0], height=_TALL_BAR)
    _draw_bar(axes, len(shown.bars), shown.least, fills[1], height=_TALL_BAR)
    ends = [shown.least, *(end for bar in shown.bars for end in (bar.tax or 0.0, *(bar.interval or ())))]
    _set_bars(axes, ends, names)
    axes.set_xlabel("added by SE (% of the baseline's time)")
    return figure


# Base and variant, told apart in grey too: by shade, and by the dashes of the base.
_CURVE_STYLES: tuple[tuple[str, Literal["--", "-"]], ...] = (("#6b6b6b", "--"), ("#08519c", "-"))


def _curves_figure(shown: Curves) -> "Figure":
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = [
        Line2D([], [], color=colour, linestyle=dashes, label=curve.name)
        for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=True)
    ]
    figure, axes = _figure(shown, plot_in=3.2, left_in=0.85, handles=handles, notes=shown.notes)
    for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=True):
        epochs = range(1, len(curve.mean) + 1)
        axes.fill_between(epochs, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(epochs, curve.mean, color=colour, linestyle=dashes, marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(shown.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def _lines_figure(shown: Lines) -> "Figure":
    from matplotlib.lines import Line2D

    looks: list[dict[str, Any]] = [
        {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
            "markersize": 5,
        }
        for index in range(len(shown.series))
    ]
    handles = [Line2D([], [], label=one.name, **look) for one, look in zip(shown.series, looks, strict=True)]
    drawn = sum(len(one.xs) for one in shown.series)
    notes = ["Whiskers: 95 % intervals.", *_left_out_note(shown.left_out, drawn)]
    figure, axes = _figure(shown, plot_in=3.2, left_in=0.85, handles=handles, notes=notes)
    for one, look in zip(shown.series, looks, strict=True):
        axes.plot(one.xs, one.ys, linewidth=1.2, **look)
        for at, interval in zip(one.xs, one.intervals, strict=True):
            axes.plot([at, at], interval, color=look["color"], linewidth=0.9, marker="_", markersize=5)
    places = sorted({at for one in shown.series for at in one.xs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels=[f"{at:g}" for at in places])
    axes.set_xticks([], minor=True)
    axes.set_xlim(*_limits(places, logarithmic=True))
    axes.axhline(0, color=_FAINT, linewidth=0.8, zorder=1)
    axes.set_xlabel(shown.x)
    axes.set_ylabel(shown.y)
    return figure


# SE's operators and the others, told apart in grey too: by shade and by shape.
_MARKS = (("SE", "#08519c", "D"), ("other operators", "#a8a8a8", "o"))


def _roof_figure(shown: Roof) -> "Figure":
    from matplotlib.lines import Line2D

    handles: list[Line2D] = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=name) for name, colour, marker in _MARKS
    ]
    handles += [
        Line2D([], [], color=_INK, label="memory and arithmetic"),
        Line2D([], [], color=_INK, linestyle=":", label="fastest cache"),
    ]
    figure, axes = _figure(shown, plot_in=3.6, left_in=0.95, handles=handles, notes=shown.notes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    at = [mark.intensity for mark in shown.marks]
    low, high = min(at) / 2, max(*at, shown.peak_flops_per_s / shown.memory_bandwidth) * 2
    for bandwidth, dashes in ((shown.memory_bandwidth, "-"), (shown.cache_bandwidth, ":")):
        corner = shown.peak_flops_per_s / bandwidth
        across = sorted({low, max(low, corner), high})
        axes.plot(
            across, [min(shown.peak_flops_per_s, bandwidth * one) for one in across], dashes, color=_INK, zorder=1
        )
    for (_, colour, marker), inside in zip(_MARKS, (True, False), strict=True):
        drawn = [mark for mark in shown.marks if mark.inside_se == inside]
        axes.scatter(
            [mark.intensity for mark in drawn],
            [mark.flops_per_s for mark in drawn],
            s=[8 + 900 * mark.share for mark in drawn],
            color=colour,
            marker=marker,
            alpha=0.75,
            linewidths=0,
            zorder=3 if inside else 2,
        )
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOPs per byte moved")
    axes.set_ylabel("FLOP/s")
    return figure
