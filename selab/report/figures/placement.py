"""Held-out accuracy against the cost of every network that a placement tried."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selab import units
from selab.judging.placement import Placement, finalists, front
from selab.report.figures.style import COLOURS, FAINT, INK, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = {
    "original": "as it is",
    "tried": "blocks at some sites",
    "last": "blocks at the last sites",
    "all": "all blocks",
    "width": "more width",
    "depth": "more depth",
}
_PLOT_IN, _LEFT_IN, _ROOM = 3.2, 0.7, 0.12


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One network: its cost over the original's, and its answers to the held-out images."""

    kind: str
    cost: float
    held_out_pct: float
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class PlacementFront:
    """What every network costs and brings.

    Attributes:
        front: cost and accuracy of those that no other one beats, by cost.
        named: cost, accuracy and name of those that were compared at the end.
    """

    title: str
    circumstances: str
    axis: str
    limit: float
    tried: tuple[Tried, ...]
    front: tuple[tuple[float, float], ...]
    named: tuple[tuple[float, float, str], ...]


def placement_front(record: Placement) -> PlacementFront:
    """Return the networks of a placement in the plane of cost and held-out accuracy."""
    trained = [one for one in record.arms if one.held_out_pct is not None]
    ends = finalists(record)
    parts = [record.data, f"{units.counted(record.search_epochs, 'epoch')}, one seed", record.block]
    return PlacementFront(
        title=f"Where blocks pay: {record.arch} under {record.limit.words}",
        circumstances=", ".join(parts),
        axis=f"{record.limit.quantity}, over the network as it is",
        limit=record.limit.ratio,
        tried=tuple(
            Tried(kind=one.kind, cost=one.cost, held_out_pct=one.held_out_pct or 0.0, stopped=one.stopped)
            for one in trained
        ),
        front=tuple((one.cost, one.held_out_pct or 0.0) for one in front(record.arms)),
        named=tuple((one.cost, one.held_out_pct or 0.0, one.name) for one in trained if one.name in ends),
    )


def placement_figure(shown: PlacementFront) -> "Figure":
    """Draw the networks, the front, and the limit."""
    from matplotlib.lines import Line2D

    kinds = [kind for kind in _KINDS if any(one.kind == kind for one in shown.tried)]
    styles = {kind: (COLOURS[place % len(COLOURS)], MARKERS[place]) for place, kind in enumerate(_KINDS)}
    handles = [
        Line2D([], [], color=styles[kind][0], marker=styles[kind][1], linestyle="", markersize=5, label=_KINDS[kind])
        for kind in kinds
    ]
    handles += [Line2D([], [], color=INK, linewidth=1.0, label="front")]
    handles += [Line2D([], [], color=FAINT, linestyle=":", label="limit")]
    notes = ["Right answers to training images that were held back, in percent. Hollow: ended early."]
    figure, axes = new_figure(shown, plot_in=_PLOT_IN, left_in=_LEFT_IN, handles=handles, notes=notes)
    for one in shown.tried:
        colour, marker = styles[one.kind]
        axes.plot(
            [one.cost],
            [one.held_out_pct],
            marker=marker,
            markersize=5,
            color=colour,
            markerfacecolor="white" if one.stopped else colour,
            linestyle="",
        )
    axes.plot([x for x, _ in shown.front], [y for _, y in shown.front], color=INK, linewidth=1.0, zorder=1)
    axes.axvline(shown.limit, color=FAINT, linestyle=":", linewidth=1.0)
    for x, y, name in shown.named:
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", size=7, color=INK)
    axes.set_xlabel(shown.axis)
    axes.set_ylabel("held-out accuracy, %")
    costs = [*(one.cost for one in shown.tried), shown.limit, 1.0]
    room = _ROOM * (max(costs) - min(costs))
    axes.set_xlim(min(costs) - room / 3, max(costs) + room)
    return figure
