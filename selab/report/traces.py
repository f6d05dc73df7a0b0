"""Tables of rooflines and timelines."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from selab import units
from selab.bench.profiler import Timeline
from selab.bench.roofline import Peaks, Point, Roofline
from selab.records.acceptance import RoofDistances
from selab.records.types import Workload
from selab.report.table import Table
from selab.units import NONE


@dataclass(frozen=True, kw_only=True)
class Group:
    """All calls of an operator, or of one stage of the blocks, together."""

    name: str
    calls: int
    flops: int
    bytes: int
    least_s: float
    measured_s: float | None


def groups(found: Roofline) -> list[Group]:
    """Return the operators by name, the slowest first; those of SE blocks apart, by stage."""
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


def roofline_table(found: Roofline, *, arch: str, workload: Workload, place: str) -> Table:
    """Return the table of `selab roofline`: operators, least and measured time, efficiency.

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
    return Table(
        title=f"{arch} {head} {place}: roofline of a forward pass ({', '.join(workload.words(device=False))})",
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
    """Return the bandwidth of small copies in words, if measured."""
    if len(peaks.bandwidths) < 2:
        return ""
    size, rate = max(peaks.bandwidths, key=lambda one: one[1])
    return f" (up to {_rate(rate, 'B/s')} for {units.size(size, digits=2)}, in the caches)"


def distances_table(all_of: RoofDistances) -> Table:
    """Return the table of `selab roofline --all`: how far predictions by the roofline are off."""
    found = all_of.networks
    factors = sorted(one.factor for one in found)
    rows = tuple(
        (one.name, units.seconds(one.least_s), units.seconds(one.whole_s), f"{one.factor:.2f}")
        for one in sorted(found, key=lambda one: one.factor)
    )
    low, high = (quantiles(factors, n=20)[index] for index in (0, -1)) if len(factors) > 1 else factors * 2
    notes = [
        f"Measured over predicted: median {median(factors):.2f}, nine of ten between {low:.2f} and {high:.2f}, over "
        f"{units.counted(len(factors), 'network')} (one image, fp32, {all_of.place}).",
        f"Multiplied by {median(factors):.2f}, a prediction is off by {units.share(_spread(factors))} in the median.",
    ]
    if all_of.failed:
        notes.append(f"{units.counted(all_of.failed, 'network')} failed, and left out.")
    return Table(
        title="How far the roof is from what networks take",
        columns=("", "predicted (least)", "measured", "measured / predicted"),
        rows=rows,
        notes=tuple(notes),
    )


def _spread(factors: Sequence[float]) -> float:
    """Return the median error of a prediction scaled by the median factor."""
    middle = median(factors)
    return median(abs(middle / factor - 1) for factor in factors)


_SHOWN = 12


def how_to_look(path: Path) -> list[str]:
    """Return the commands that show a trace."""
    return [
        f"tensorboard --logdir {shlex.quote(str(path.parent.parent))}  # then http://localhost:6006/#pytorch_profiler",
        f"https://ui.perfetto.dev: Open trace file, {path}  # search for se.",
    ]


def timeline_tables(arch: str, found: Timeline) -> list[Table]:
    """Return the tables of `selab timeline`: the operators that take longest, and the blocks by stage."""
    rows = tuple(
        (one.name, f"{one.calls:g}", units.seconds(one.self_s), units.share(one.self_s / found.total_s))
        for one in found.operators[:_SHOWN]
    )
    rest = found.operators[_SHOWN:]
    if rest:
        left = sum(one.self_s for one in rest)
        calls = f"{sum(one.calls for one in rest):g}"
        rows += ((units.counted(len(rest), "other"), calls, units.seconds(left), units.share(left / found.total_s)),)
    operators = Table(
        title=f"{arch}: operators of a step ({found.phase.replace('_', '+')}, {units.seconds(found.total_s)})",
        columns=("", "calls", "own time", "of the step"),
        rows=rows,
        notes=(
            f"Mean of {units.counted(found.steps, 'step')} under the profiler, which slows small "
            "operators more than large ones: this says where to look; how much it is, `selab profile` measures.",
        ),
    )
    # Through torch.compile the ranges of the stages are not there.
    return [operators, _stages_table(found)] if found.blocks and any(found.stages.values()) else [operators]


def _stages_table(found: Timeline) -> Table:
    lines = [*found.stages.items(), ("together", sum(found.stages.values()))]
    return Table(
        title=f"The blocks by stage ({units.counted(found.blocks, 'block')})",
        columns=("", "own time", "of the step"),
        rows=tuple(
            (name, units.seconds(value), units.share(value / found.total_s, decimals=2)) for name, value in lines
        ),
    )
