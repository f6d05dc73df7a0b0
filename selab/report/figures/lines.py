"""Line charts of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from selab.errors import SelabError
from selab.models.provenance import name_of
from selab.records.types import Phase, Record
from selab.report.figures.axes import AXES
from selab.report.figures.base import BothValues, LeftOut, circumstance_parts, measured_values, reasons, recorded
from selab.report.figures.style import COLOURS, FAINT, MARKERS, left_out_note, limits, new_figure
from selab.report.machines import check_one_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a `Lines`: a value and its 95 % interval at each place."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """One measured quantity over another; `x` and `y` label the axes, and `x` is in powers of two."""

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
    """Return what SE adds to the time by batch or resolution; a line for each network and other setting.

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
    found: dict[str, list[tuple[float, BothValues]]] = {}
    for record in sorted(records, key=lambda one: _setting(one, along)):
        name = ", ".join([name_of(record), *(_setting_words(record, one) for one in told)])
        both = measured_values(recorded(record), tax)
        if isinstance(both, str):
            left_out.append(LeftOut(name=f"{name}, {_setting_words(record, along)}", why=both))
        else:
            found.setdefault(name, []).append((float(_setting(record, along)), both))
    if not found:
        raise SelabError(f"nothing to draw: {reasons(left_out, most=4) or 'no records'}; measure longer")
    parts = [circumstance_parts(record) for record in records]
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


_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def lines_figure(shown: Lines) -> "Figure":
    """Draw lines over one axis of a sweep."""
    from matplotlib.lines import Line2D

    looks: list[dict[str, Any]] = [
        {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)],
            "markersize": 5,
        }
        for index in range(len(shown.series))
    ]
    handles = [Line2D([], [], label=one.name, **look) for one, look in zip(shown.series, looks, strict=True)]
    drawn = sum(len(one.xs) for one in shown.series)
    notes = ["Whiskers: 95 % intervals.", *left_out_note(shown.left_out, drawn)]
    figure, axes = new_figure(shown, plot_in=3.2, left_in=0.85, handles=handles, notes=notes)
    for one, look in zip(shown.series, looks, strict=True):
        axes.plot(one.xs, one.ys, linewidth=1.2, **look)
        for at, interval in zip(one.xs, one.intervals, strict=True):
            axes.plot([at, at], interval, color=look["color"], linewidth=0.9, marker="_", markersize=5)
    places = sorted({at for one in shown.series for at in one.xs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels=[f"{at:g}" for at in places])
    axes.set_xticks([], minor=True)
    axes.set_xlim(*limits(places, logarithmic=True))
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_xlabel(shown.x)
    axes.set_ylabel(shown.y)
    return figure
