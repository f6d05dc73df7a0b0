"""Data of a picture → SVG, PNG or PDF with matplotlib: axes, arrows, labels that keep out of each other's way.

The same data gives the same bytes, in colour and readable in grey.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from selab.report.figures.base import LeftOut, reasons

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


_OCTAVE = math.log10(2)
_LEAST_SPAN = 0.1


def limits(
    values: Sequence[float], *, logarithmic: bool, around: float = 0.12, wide: bool = False
) -> tuple[float, float]:
    """Return the values with room around them; a single value stands in the middle.

    Args:
        values: what is drawn along the axis.
        logarithmic: whether equal ratios have equal lengths.
        around: room at each end, a fraction of the values' span.
        wide: show at least an octave (logarithmic) or ±10 % (linear), so that a small difference looks small.
    """
    if logarithmic:
        low, high = limits([math.log10(value) for value in values], logarithmic=False, around=around)
        if wide and high - low < _OCTAVE:
            middle = (low + high) / 2
            low, high = middle - _OCTAVE / 2, middle + _OCTAVE / 2
        return 10.0**low, 10.0**high
    low, high = min(values), max(values)
    room = around * (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - room, high + room
    middle = (low + high) / 2
    least = _LEAST_SPAN * abs(middle) if wide else 0.0
    return min(low, middle - least), max(high, middle + least)


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
DISTANCES = (7.0, 14.0, 24.0, 38.0, 56.0, 80.0)


def placed(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Return places for labels, near their anchors, that cover neither each other nor what is drawn.

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
            candidates = [_at(anchor, size, way, far) for far in DISTANCES for way in _DIRECTIONS]
            costs = [
                10 * sum(_overlap(candidate, other) for other in others)
                + 8 * sum(_overlap(candidate, box) for box in taken)
                + 30 * (size[0] * size[1] - _overlap(candidate, bounds))
                + 0.4 * gap(candidate, anchor) ** 1.5
                for candidate in candidates
            ]
            boxes[index] = candidates[costs.index(min(costs))]
    return [box for box in boxes if box is not None]


def _at(anchor: tuple[float, float], size: tuple[float, float], way: tuple[int, int], far: float) -> Box:
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


def nearest_in(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """Return the point of a box that is nearest to a point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def gap(box: Box, point: tuple[float, float]) -> float:
    """Return the distance between a box and a point."""
    return math.dist(nearest_in(box, point), point)


# ----------------------------------------------------------------------------------------------------------------- ink


# Families differ in the marker and, for those who see it, in a colour; all are dark enough to be read in grey.
MARKERS = "os^Dv<>PXph*"
COLOURS = ("#08519c", "#a63603", "#1b7837", "#6a3d9a", "#7a5c00", "#9e1a5b", "#00676b", "#404040")
FILLS = {"MACs": "#d4d4d4", "bytes moved": "#82b1d6", "time of a forward pass": "#33689c"}
INK, FAINT, _GRID, UNRESOLVED = "#1a1a1a", "#5f5f5f", "#e4e4e4", "#d0d0d0"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "text.color": INK,
    # Text stays text, and names in the file come from its content: the same picture is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "selab",
    # TrueType: an editor finds letters, not outlines.
    "pdf.fonttype": 42,
}
_WIDTH_IN, _RIGHT_IN = 7.2, 0.25
_LINE_IN, _CAPTION_CHARACTERS = 0.155, 122


NOT_RESOLVED = "n.s.: not significant, the base differs from itself as much; brackets hold what is not excluded."


class Captioned(Protocol):
    """What every picture says of itself."""

    @property
    def title(self) -> str:
        """One line above the plot."""

    @property
    def circumstances(self) -> str:
        """Device, dtype, batch and input, below the title."""


def new_figure(
    shown: Captioned, *, plot_in: float, left_in: float, handles: Sequence["Artist"], notes: Sequence[str]
) -> tuple["Figure", "Axes"]:
    """Return a figure with title, circumstances and legend above the plot and notes below it, and its axes."""
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
    figure.text(edge, 1 - 0.34 / height, shown.circumstances, size=8, color=FAINT, va="top")
    for index, line in enumerate(lines):
        y = (0.08 + _LINE_IN * (len(lines) - 1 - index)) / height
        figure.text(edge, y, line, size=7.5, color=FAINT, va="bottom")
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


def left_out_note(left_out: Sequence[LeftOut], shown: int) -> list[str]:
    """Return `Left out 5 of 9: too noisy (se_vgg16, …); …`."""
    if not left_out:
        return []
    return [f"Left out {len(left_out)} of {shown + len(left_out)}: {reasons(left_out, most=4)}."]
