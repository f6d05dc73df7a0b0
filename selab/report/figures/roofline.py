"""Roofline charts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selab import units
from selab.errors import SelabError
from selab.records.types import Workload
from selab.report.figures.style import INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from selab.bench.roofline import Roofline


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


def roof(found: "Roofline", *, arch: str, workload: Workload, place: str) -> Roof:
    """Return the data of a roofline figure: every measured operator call under the device's roofline."""
    marks = tuple(
        RoofMark(
            intensity=point.intensity,
            flops_per_s=point.flops / point.measured_s,
            share=point.measured_s / (found.measured_s or 1.0),
            inside_se=bool(point.stage),
        )
        for point in found.points
        if point.measured_s and point.flops and point.bytes
    )
    if not marks:
        raise SelabError(f"{arch}: nothing was measured, so there is no picture; drop --as")
    size = "×".join(map(str, workload.input_chw))
    return Roof(
        title=f"Roofline of {arch}: every operator of a forward pass",
        circumstances=f"{place}, {workload.dtype}, batch {workload.batch}, {size}; peaks {found.peaks.source}",
        peak_flops_per_s=found.peaks.flops_per_s,
        memory_bandwidth=found.peaks.memory_bandwidth,
        cache_bandwidth=max(rate for _, rate in found.peaks.bandwidths),
        marks=marks,
        notes=(
            f"All operators take {units.seconds(found.measured_s or 0.0)}, at the roof {units.seconds(found.least_s)}. "
            "Areas: their share of the time. Operators without arithmetic (copies) are not drawn.",
        ),
    )


# SE's operators and the others, told apart in grey too: by shade and by shape.
_MARKS = (("SE", "#08519c", "D"), ("other operators", "#a8a8a8", "o"))


def roof_figure(shown: Roof) -> "Figure":
    """Draw a roofline."""
    from matplotlib.lines import Line2D

    handles: list[Line2D] = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=name) for name, colour, marker in _MARKS
    ]
    handles += [
        Line2D([], [], color=INK, label="memory and arithmetic"),
        Line2D([], [], color=INK, linestyle=":", label="fastest cache"),
    ]
    figure, axes = new_figure(shown, plot_in=3.6, left_in=0.95, handles=handles, notes=shown.notes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    at = [mark.intensity for mark in shown.marks]
    low, high = min(at) / 2, max(*at, shown.peak_flops_per_s / shown.memory_bandwidth) * 2
    for bandwidth, dashes in ((shown.memory_bandwidth, "-"), (shown.cache_bandwidth, ":")):
        corner = shown.peak_flops_per_s / bandwidth
        across = sorted({low, max(low, corner), high})
        axes.plot(across, [min(shown.peak_flops_per_s, bandwidth * one) for one in across], dashes, color=INK, zorder=1)
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
