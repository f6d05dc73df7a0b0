"""Rooflines as tables, and how far the roof is from what networks take."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from selab import catalog, units
from selab.build import build
from selab.devices import DeviceFacts
from selab.errors import SelabError
from selab.grid import NONE, Grid
from selab.measure.roofline import Peaks, Point, Roofline, roofline
from selab.plots import Roof, RoofMark
from selab.record import Distance, Dtype, RoofDistances, Workload
from selab.request import Request, workload_of


@dataclass(frozen=True, kw_only=True)
class Group:
    """All calls of an operator, or of one stage of the blocks, together."""

    name: str
    calls: int
    flops: int
    bytes: int
    least_s: float
    measured_s: float | None


def published_peaks(device: DeviceFacts, dtype: Dtype) -> Peaks:
    """A device's published peaks as those of a roofline; it has one bandwidth, that of its memory."""
    return Peaks(
        dtype=dtype,
        flops_per_s=device.flops_per_s[dtype],
        bandwidths=((0, device.bandwidth),),
        source=f"published: {device.source}",
    )


def roofline_of(request: Request, peaks: Peaks, *, measured: bool, budget_s: float) -> Roofline:
    """Builds the network that is asked for and holds it under these peaks.

    Raises:
        SelabError: it cannot be built, or fails.
    """
    variant = catalog.find(request.arch)
    workload = workload_of(request, variant)
    built = build(variant, input_chw=workload.input_chw, device="cpu" if measured else "meta")
    return roofline(built.model, workload, peaks, native=built.native, measured=measured, budget_s=budget_s)


def groups(found: Roofline) -> list[Group]:
    """The operators by name, the slowest first; those of SE blocks apart, by stage."""
    sorted_out: dict[str, list[Point]] = {}
    for point in found.points:
        sorted_out.setdefault(f"se.{point.stage}: {point.name}" if point.stage else point.name, []).append(point)
    made = [_group(name, points) for name, points in sorted_out.items()]
    return sorted(made, key=lambda one: -(one.least_s if one.measured_s is None else one.measured_s))


def _group(name: str, points: Sequence[Point]) -> Group:
    times = [point.measured_s for point in points if point.measured_s is not None]
    return Group(
        name=name,
        calls=len(points),
        flops=sum(point.flops for point in points),
        bytes=sum(point.bytes for point in points),
        least_s=sum(point.least_s for point in points),
        measured_s=sum(times) if len(times) == len(points) else None,
    )


def roofline_grid(found: Roofline, *, arch: str, workload: Workload, place: str) -> Grid:
    """The table of `selab roofline`: operators, least and measured time, efficiency.

    Args:
        found: of one network.
        arch: its name.
        workload: what it was run on.
        place: what the peaks are of.
    """
    predicted = found.measured_s is None
    rows: list[tuple[str, ...]] = [_row(one) for one in groups(found)]
    inside = [point for point in found.points if point.stage]
    if inside:
        rows.append(_row(_group("SE together", inside)))
    rows.append(_row(_group("all operators", found.points)))
    notes = [
        f"Peaks, {found.peaks.source}: {_rate(found.peaks.flops_per_s, 'FLOP/s')} in {found.peaks.dtype}, "
        f"{_rate(found.peaks.memory_bandwidth, 'B/s')} of memory{_cache_words(found.peaks)}; {place}.",
        "Least: the longer of arithmetic and bytes at these peaks.",
    ]
    if predicted:
        notes.append("Predicted, not measured: the least times of published peaks, which no network reaches.")
    elif found.whole_s is not None:
        notes.append(
            f"The whole pass takes {units.seconds(found.whole_s)} when nothing is timed inside it, "
            f"{found.whole_s / found.least_s:.1f} times the least."
        )
    columns: tuple[str, ...] = ("", "FLOPs", "bytes", "FLOP/B", "least", "took", "of roof")
    if predicted:
        columns = (*columns[:4], "predicted")
        rows = [row[:5] for row in rows]
    head = "predicted for" if predicted else "on"
    size = "×".join(map(str, workload.input_chw))
    return Grid(
        title=f"{arch} {head} {place}: roofline of a forward pass (batch {workload.batch}, {size}, {workload.dtype})",
        columns=columns,
        rows=tuple(rows),
        notes=tuple(notes),
        words=frozenset({0}),
    )


def _row(one: Group) -> tuple[str, ...]:
    measured = one.measured_s
    return (
        f"{one.name} ×{one.calls}",
        units.count(one.flops, digits=3),
        units.size(one.bytes, digits=3),
        f"{one.flops / one.bytes:.3g}" if one.bytes else NONE,
        units.seconds(one.least_s, digits=3),
        NONE if measured is None else units.seconds(measured, digits=3),
        units.share(one.least_s / measured) if measured else NONE,
    )


def _rate(value: float, unit: str) -> str:
    return f"{units.count(value, digits=3)}{unit}"


def _cache_words(peaks: Peaks) -> str:
    """How fast small copies are, where they were measured."""
    if len(peaks.bandwidths) < 2:
        return ""
    size, rate = max(peaks.bandwidths, key=lambda one: one[1])
    return f" (up to {_rate(rate, 'B/s')} for {units.size(size, digits=2)}, in the caches)"


def roof(found: Roofline, *, arch: str, workload: Workload, place: str) -> Roof:
    """The picture of a roofline: every operator call that was measured, under the device's roof."""
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
        raise SelabError(f"{arch}: nothing was measured, so there is no picture; leave --as away")
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


# ----------------------------------------------------------------------------------------------- how good a prediction


def distances(
    archs: Iterable[str], peaks: Peaks, report: Callable[[str, Any], object], *, budget_s: float = 0.0
) -> Iterator[Distance | SelabError]:
    """Each network's time over its least time, on this device; a network that fails gives its error.

    Args:
        archs: as `--arch`.
        peaks: of this device, on one CPU thread.
        report: told the name of each before it runs.
        budget_s: seconds to repeat each network for; it is run at least five times.
    """
    for arch in archs:
        report(arch, None)
        try:
            found = roofline_of(Request(arch=arch, threads=1), peaks, measured=True, budget_s=budget_s)
        except SelabError as error:
            yield error
            continue
        if found.whole_s is not None:
            yield Distance(name=arch, least_s=found.least_s, whole_s=found.whole_s)


def distances_grid(all_of: RoofDistances) -> Grid:
    """The table of `selab roofline --all`: what a prediction by the roof alone is worth there."""
    found = all_of.networks
    factors = sorted(one.factor for one in found)
    rows = tuple(
        (one.name, units.seconds(one.least_s), units.seconds(one.whole_s), f"{one.factor:.2f}")
        for one in sorted(found, key=lambda one: one.factor)
    )
    low, high = (quantiles(factors, n=20)[index] for index in (0, -1)) if len(factors) > 1 else factors * 2
    notes = [
        f"Measured over predicted: median {median(factors):.2f}, nine of ten between {low:.2f} and {high:.2f}, over "
        f"{len(factors)} networks (one image, fp32, {all_of.place}).",
        f"Multiplied by {median(factors):.2f}, a prediction is off by {units.share(_spread(factors))} in the median.",
    ]
    if all_of.failed:
        notes.append(f"{all_of.failed} networks failed and are left out.")
    return Grid(
        title="How far the roof is from what networks take",
        columns=("", "predicted (least)", "measured", "measured / predicted"),
        rows=rows,
        notes=tuple(notes),
    )


def _spread(factors: Sequence[float]) -> float:
    """The median error of a prediction that is scaled by the median factor."""
    middle = median(factors)
    return median(abs(middle / factor - 1) for factor in factors)
