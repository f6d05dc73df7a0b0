"""Bar charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selab import units
from selab.errors import SelabError
from selab.records import verdict as records_verdict
from selab.records.types import Record
from selab.records.verdict import NOT_SIGNIFICANT, TOO_NOISY
from selab.report.figures.axes import tick_labels
from selab.report.figures.base import LeftOut, chosen_records, circumstances_of, reasons, recorded
from selab.report.figures.style import FAINT, FILLS, INK, NOT_RESOLVED, left_out_note, new_figure, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def bars(records: Sequence[Record], *, archs: Sequence[str] = (), workload: str | None = None) -> Bars:
    """Return what SE adds to each network that has a record: MACs, bytes, time of a forward pass.

    Args:
        records: of one machine.
        archs: only these variants.
        workload: as in `points`.

    Raises:
        UnknownNameError: a variant or a workload that there is not.
        RecordError: there are no records, or they are of several machines.
        SelabError: no record has a forward pass that was measured; the message says of each why.
    """
    chosen, left_out = chosen_records(records, archs, workload, what="plot of what SE adds")
    rows = []
    for record in sorted(chosen, key=lambda one: one.cost.macs.all):
        name, base, latency = recorded(record).name, record.baseline_cost, record.latency.get("forward")
        if base is None or latency is None:
            left_out.append(LeftOut(name=name, why="base not counted" if base is None else "forward not measured"))
            continue
        interval = records_verdict.not_excluded(latency)
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
        circumstances=circumstances_of(chosen[0]),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


_BAR = 0.26


def bars_figure(shown: Bars) -> "Figure":
    """Draw bars."""
    from matplotlib.patches import Patch

    notes = []
    if any(row.interval is not None for row in shown.rows):
        notes.append("Whiskers and brackets: 95 % intervals. MACs by the convention of the paper.")
    if any(row.forward is None and row.interval is not None for row in shown.rows):
        notes.append(NOT_RESOLVED)
    missing = sum(row.interval is None for row in shown.rows)
    if missing:
        notes.append(
            f"{TOO_NOISY}: no bar for {missing} of {units.counted(len(shown.rows), 'time')}; their records say why."
        )
    notes += left_out_note(shown.left_out, len(shown.rows))
    handles = [Patch(facecolor=fill, edgecolor=FAINT, linewidth=0.5, label=name) for name, fill in FILLS.items()]
    left_in = 0.3 + 0.075 * max(len(row.name) for row in shown.rows)
    figure, axes = new_figure(
        shown, plot_in=0.25 + 0.5 * len(shown.rows), left_in=left_in, handles=handles, notes=notes
    )
    fills = list(FILLS.values())
    ends = [end for row in shown.rows for end in (row.macs, row.bytes, row.forward or 0.0, *(row.interval or ()))]
    for index, row in enumerate(shown.rows):
        for offset, value, colour in ((-_BAR, row.macs, fills[0]), (0.0, row.bytes, fills[1])):
            draw_bar(axes, index + offset, value, colour)
        draw_interval(axes, index + _BAR, row.forward, row.interval, fills[2])
    set_bars(axes, ends, [row.name for row in shown.rows])
    axes.set_xlabel("added by SE (% of the base)")
    return figure


def set_bars(axes: "Axes", ends: Sequence[float], names: Sequence[str]) -> None:
    """Set up axes for rows of bars, with room for the text after each bar."""
    low, high = min(0.0, *ends) * 100, max(0.0, *ends) * 100
    axes.set_xlim(low - (0.06 * (high - low) if low < 0 else 0), high + 0.25 * (high - low))
    axes.set_ylim(len(names) - 0.45, -0.55)
    at = [value for value in ticks(*axes.get_xlim(), logarithmic=False) if value <= high]
    axes.set_xticks(at, labels=tick_labels("%", at))
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=3)
    axes.spines["left"].set_visible(False)


def draw_bar(axes: "Axes", y: float, value: float, colour: str, *, told: bool = True, height: float = _BAR) -> None:
    """Draw one bar, labelled with its percentage."""
    axes.barh(y, value * 100, height=height, color=colour, edgecolor=FAINT, linewidth=0.5, zorder=2)
    if told:
        _write(axes, y, max(0.0, value) * 100, units.percent(value))


def draw_interval(
    axes: "Axes",
    y: float,
    value: float | None,
    interval: tuple[float, float] | None,
    colour: str,
    *,
    height: float = _BAR,
) -> None:
    """Draw a measured bar and its 95 % interval as whiskers; say so where there is none."""
    if interval is None:
        _write(axes, y, 0, TOO_NOISY, color=FAINT, style="italic")
        return
    low, high = interval
    decimals = units.decimals_for((high - low) / 2)
    brackets = f"[{low * 100:.{decimals}f}, {high * 100:.{decimals}f}]"
    if value is not None:
        draw_bar(axes, y, value, colour, told=False, height=height)
    axes.plot([low * 100, high * 100], [y, y], color=INK, linewidth=1.1, marker="|", markersize=5, zorder=4)
    text = NOT_SIGNIFICANT if value is None else units.percent(value, decimals=decimals)
    _write(axes, y, max(0.0, high) * 100, f"{text} {brackets}")


def _write(axes: "Axes", y: float, right: float, text: str, **look: Any) -> None:
    axes.annotate(text, (right, y), xytext=(3, 0), textcoords="offset points", size=7.5, va="center", **look)
