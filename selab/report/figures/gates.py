"""Gates by channel for some classes, and by depth."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selab import units
from selab.judging.record import Gates
from selab.judging.statistics import BlockGates
from selab.report.figures.style import COLOURS, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 2
_PANEL_IN, _GAP_IN = 1.15, 0.5


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One block: the mean gate of each channel, over all images and over those of some classes."""

    name: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class GatePanels:
    """The gates of a network, one panel a block."""

    title: str
    circumstances: str
    classes: tuple[str, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class GateDepth:
    """Spread and class specificity of each block, by depth.

    Attributes:
        specificity: share and its interval, of each block; empty without labels.
    """

    title: str
    circumstances: str
    names: tuple[str, ...]
    spread: tuple[float, ...]
    specificity: tuple[tuple[float, float, float], ...]


def gate_panels(gates: Gates) -> GatePanels:
    """Return the gates by channel; a channel's place is its number, as in the paper's figures."""
    panels = [
        Panel(
            name=block.path,
            mean=block.mean,
            deviation=block.deviation,
            classes=tuple(means[place] for means in gates.class_means.values()),
        )
        for place, block in enumerate(gates.blocks)
    ]
    return GatePanels(
        title=f"Gates by channel: {gates.arch}",
        circumstances=_circumstances(gates),
        classes=tuple(gates.class_means),
        panels=tuple(panels),
    )


def gate_depth(gates: Gates) -> GateDepth:
    """Return spread and specificity by depth."""
    found = [_specificity(block) for block in gates.blocks]
    return GateDepth(
        title=f"Gates by depth: {gates.arch}",
        circumstances=_circumstances(gates),
        names=tuple(block.path for block in gates.blocks),
        spread=tuple(block.spread for block in gates.blocks),
        specificity=tuple(one for one in found if one is not None) if all(found) else (),
    )


def _specificity(block: BlockGates) -> tuple[float, float, float] | None:
    share = block.specificity
    if share is None:
        return None
    low, high = block.specificity_low, block.specificity_high
    return share, share if low is None else low, share if high is None else high


def _circumstances(gates: Gates) -> str:
    parts = [f"{units.counted(gates.images, 'image')} of {gates.data}"]
    parts += [units.counted(len(gates.classes), "class", "classes")] if gates.classes else []
    parts += [gates.weights] if gates.weights else []
    return ", ".join(parts)


def panels_figure(shown: GatePanels) -> "Figure":
    """Draw the gates by channel, one panel a block."""
    from matplotlib.lines import Line2D

    rows = math.ceil(len(shown.panels) / _ACROSS)
    plot_in = rows * (_PANEL_IN + _GAP_IN)
    handles = [Line2D([], [], color=INK, linewidth=1.6, label="all images")]
    handles += [
        Line2D([], [], color=COLOURS[place % len(COLOURS)], linewidth=0.9, label=name)
        for place, name in enumerate(shown.classes)
    ]
    notes = ["Mean gate of each channel; the band is one deviation over all images."]
    figure, whole = new_figure(shown, plot_in=plot_in, left_in=0.5, handles=handles, notes=notes)
    box = whole.get_position()
    whole.remove()
    width, height = box.width / _ACROSS, box.height / rows
    for place, panel in enumerate(shown.panels):
        row, column = divmod(place, _ACROSS)
        left, bottom = box.x0 + column * width, box.y1 - (row + 1) * height
        part = _PANEL_IN / (_PANEL_IN + _GAP_IN)
        axes = figure.add_axes((left, bottom + height * (1 - part) * 0.3, width * 0.88, height * part))
        channels = range(len(panel.mean))
        both = list(zip(panel.mean, panel.deviation, strict=True))
        axes.fill_between(channels, [m - d for m, d in both], [m + d for m, d in both], color="#c8c8c8", linewidth=0)
        for number, values in enumerate(panel.classes):
            axes.plot(channels, values, color=COLOURS[number % len(COLOURS)], linewidth=0.6)
        axes.plot(channels, panel.mean, color=INK, linewidth=1.1)
        axes.set_ylim(min(0.0, *panel.mean), max(1.0, *panel.mean))
        axes.set_xlim(0, max(1, len(panel.mean) - 1))
        axes.set_title(panel.name, size=8, loc="left", pad=2)
        axes.tick_params(labelsize=7)
    return figure


def depth_figure(shown: GateDepth) -> "Figure":
    """Draw spread and specificity by depth, one row a block, the first one on top."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[0], marker="o", markersize=4, label="spread over the images")]
    notes = ["Spread: the root of the channels' mean variance."]
    if shown.specificity:
        label = "share of the variance between classes"
        handles.append(Line2D([], [], color=COLOURS[1], marker="s", markersize=4, linestyle="--", label=label))
        notes.append("Whiskers: 95 % intervals of the share.")
    left_in = 0.4 + _LETTER_IN * max(map(len, shown.names))
    plot_in = max(1.2, _ROW_IN * len(shown.names))
    figure, whole = new_figure(shown, plot_in=plot_in, left_in=left_in, handles=handles, notes=notes)
    box = whole.get_position()
    whole.remove()
    rows = range(len(shown.names))
    width = box.width / 2 if shown.specificity else box.width
    axes = figure.add_axes((box.x0, box.y0, width * 0.92, box.height))
    axes.plot(shown.spread, rows, color=COLOURS[0], marker="o", markersize=4)
    axes.set_xlim(left=0)
    axes.set_yticks(list(rows), labels=shown.names, size=7)
    if shown.specificity:
        other = figure.add_axes((box.x0 + width * 1.04, box.y0, width * 0.94, box.height), sharey=axes)
        shares = [share for share, _, _ in shown.specificity]
        other.plot(shares, rows, color=COLOURS[1], marker="s", markersize=4, linestyle="--")
        for row, (_, low, high) in zip(rows, shown.specificity, strict=True):
            other.plot([low, high], [row, row], color=COLOURS[1], linewidth=0.9)
        other.set_xlim(0, 1)
        other.tick_params(labelleft=False)
    axes.set_ylim(len(shown.names) - 0.5, -0.5)
    return figure


_ROW_IN, _LETTER_IN = 0.19, 0.058
