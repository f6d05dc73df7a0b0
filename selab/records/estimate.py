"""Point estimates and intervals of a latency ratio, computed from raw samples."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from selab.errors import RecordError, SelabError
from selab.records import stats
from selab.records.types import ABBABlock, Estimate, Run, Statistic, Unit

MIN_PAIRS = 20
LEAST_PROCESSES = 3
"""Fewer short runs have no interval: Student's t of one degree of freedom is 12.7."""
LEAST_CONTROLS = 2


class InsufficientPairsError(SelabError):
    """A run has too few pairs for an interval."""


def block_pairs(block: ABBABlock, statistic: Statistic) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return neighbouring samples as pairs, baseline first: of ABBA (s0, s1), (s3, s2); of BAAB (s1, s0), (s2, s3).

    Returns:
        Two (baseline, variant) pairs in seconds per call. In one the baseline ran first, in the other the variant.

    Raises:
        RecordError: a sample is not a positive, finite time.
    """
    samples: tuple[float, float, float, float] = getattr(block, statistic)
    for sample in samples:
        if not 0 < sample < math.inf:
            raise RecordError(f"quads: a {statistic} sample of {sample!r} s; samples are positive times; measure again")
    first, second, third, fourth = samples
    if block.order == "ABBA":
        return (first, second), (fourth, third)
    return (second, first), (third, fourth)


def pairs(run: Run, statistic: Statistic) -> list[tuple[float, float]]:
    """Return all adjacent (baseline, variant) pairs of a run, two from each ABBA block, in seconds per call."""
    return [pair for block in run.quads for pair in block_pairs(block, statistic)]


def log_ratio(baseline_s: float, variant_s: float) -> float:
    """Return ln(variant) - ln(baseline); as a difference of logarithms, swapping the arms negates it exactly."""
    return math.log(variant_s) - math.log(baseline_s)


def _log_ratios(blocks: Iterable[ABBABlock], statistic: Statistic) -> list[float]:
    return [log_ratio(*pair) for block in blocks for pair in block_pairs(block, statistic)]


@dataclass(frozen=True, kw_only=True)
class _LogEstimate:
    centre: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def _within(blocks: Sequence[ABBABlock], statistic: Statistic, confidence: float = 0.95) -> _LogEstimate | None:
    if 2 * len(blocks) < MIN_PAIRS:
        return None
    logs = _log_ratios(blocks, statistic)
    interval = stats.median_interval(logs, confidence)
    if interval is None:
        return None
    return _LogEstimate(centre=stats.median(logs), low=interval[0], high=interval[1])


def _process_centres(runs: Iterable[Run], statistic: Statistic) -> list[float]:
    """Return the median of ln(variant / baseline) of each run that has a pair."""
    return [stats.median(logs) for logs in (_log_ratios(run.quads, statistic) for run in runs) if logs]


def _between(runs: Sequence[Run], statistic: Statistic, confidence: float) -> _LogEstimate:
    """Return the mean of the runs' medians with Student's t interval; what varies within a run is part of it."""
    centres = _process_centres(runs, statistic)
    if len(centres) < LEAST_PROCESSES:
        raise InsufficientPairsError(
            f"{len(centres)} of {LEAST_PROCESSES} processes that an interval needs; raise the budget"
        )
    error = stats.sample_deviation(centres) / math.sqrt(len(centres))
    half = stats.student_quantile(len(centres) - 1, confidence) * error
    centre = stats.mean(centres)
    return _LogEstimate(centre=centre, low=centre - half, high=centre + half)


def _across(runs: Sequence[Run], statistic: Statistic, confidence: float) -> _LogEstimate:
    if not runs:
        raise InsufficientPairsError(f"no runs; at least one with {MIN_PAIRS} pairs is needed")
    found = []
    for run in runs:
        single = _within(run.quads, statistic, confidence)
        if single is None:
            raise InsufficientPairsError(
                f"{2 * len(run.quads)} pairs in {run.elapsed_s:.3g} s, {MIN_PAIRS} are needed; raise the budget"
            )
        found.append(single)
    if len(found) == 1:
        return found[0]
    centres = [single.centre for single in found]
    centre = stats.mean(centres)
    error = stats.sample_deviation(centres) / math.sqrt(len(centres))
    half = max(
        stats.median([single.half_width for single in found]),
        stats.student_quantile(len(centres) - 1, confidence) * error,
    )
    return _LogEstimate(centre=centre, low=centre - half, high=centre + half)


def centre_of(runs: Sequence[Run], statistic: Statistic) -> float | None:
    """Return exp(mean of the runs' medians of ln(variant / baseline)); None where there is no pair yet."""
    centres = _process_centres(runs, statistic)
    return math.exp(stats.mean(centres)) if centres else None


def interval_within(runs: Sequence[Run], statistic: Statistic) -> tuple[float, float] | None:
    """Return Student's t interval over all ABBA blocks, as if the processes had no effect of their own.

    A provisional answer, for as long as there are too few processes: it is narrower than the truth. It lies around
    `centre_of`, whose medians a few slow blocks do not move.

    Returns:
        None below three blocks.
    """
    logs = [stats.mean(_log_ratios([block], statistic)) for run in runs for block in run.quads]
    if len(logs) < LEAST_PROCESSES:
        return None
    half = stats.student_quantile(len(logs) - 1, 0.95) * stats.sample_deviation(logs) / math.sqrt(len(logs))
    centre = stats.mean(_process_centres(runs, statistic))
    return math.exp(centre - half), math.exp(centre + half)


def half_width(blocks: Sequence[ABBABlock], statistic: Statistic) -> float | None:
    """Return half the width of the 95 % interval of ln(variant / baseline): 0.005 reads as ±0.5 % of the ratio.

    The width is that of the logarithm, so that swapping the arms leaves it unchanged. A measurement stops on it.

    Returns:
        None below 20 pairs.
    """
    found = _within(blocks, statistic)
    return None if found is None else found.half_width


def relative_half_width(estimate: Estimate) -> float:
    """Return `half_width` of a finished estimate: (ln high - ln low) / 2."""
    return (math.log(estimate.ratio_high) - math.log(estimate.ratio_low)) / 2


def sample_medians(runs: Iterable[Run], statistic: Statistic) -> tuple[float, float]:
    """Return the median time per call of baseline and variant, in seconds."""
    both = [pair for run in runs for pair in pairs(run, statistic)]
    return stats.median([pair[0] for pair in both]), stats.median([pair[1] for pair in both])


def estimate(runs: Sequence[Run], statistic: Statistic, *, confidence: float = 0.95, unit: Unit = "pair") -> Estimate:
    """Return exp(median of ln(variant / baseline)) with an exact interval, by default of 95 %.

    Unit `process`: the runs are short and each is one sample, its median. Their mean has Student's t interval.

    Unit `pair`: one process has the order-statistic interval of the median. Several have the mean of their medians,
    with a half-width of max(median of the half-widths within, t sd / sqrt(P)), both on the logarithm.

    Args:
        runs: one per process.
        statistic: the value that represents a sample.
        confidence: the interval's coverage.
        unit: what the interval counts.

    Raises:
        InsufficientPairsError: no run, or one with fewer than 20 pairs; of short runs, fewer than three.
        RecordError: a sample is not a positive time.

    Source: Hahn and Meeker, Statistical Intervals (1991), section 5.2 (within); Student's t on P means (across);
        Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013 (why processes are the unit).
    """
    found = (_between if unit == "process" else _across)(runs, statistic, confidence)
    baseline_s, variant_s = sample_medians(runs, statistic)
    return Estimate(
        baseline_s=baseline_s,
        variant_s=variant_s,
        ratio=math.exp(found.centre),
        ratio_low=math.exp(found.low),
        ratio_high=math.exp(found.high),
        pairs=2 * sum(len(run.quads) for run in runs),
        processes=len(runs),
    )


def paired_difference_s(runs: Sequence[Run], statistic: Statistic) -> float:
    """Return the median of variant - baseline over adjacent pairs, in seconds per call, averaged over processes.

    It can differ slightly from the difference of the two arms' medians, which includes the machine's drift. Its sign
    is that of ln(ratio).

    Raises:
        InsufficientPairsError: a run without pairs.
    """
    medians = []
    for run in runs:
        differences = [variant - baseline for baseline, variant in pairs(run, statistic)]
        if not differences:
            raise InsufficientPairsError("no pairs; raise the budget")
        medians.append(stats.median(differences))
    if not medians:
        raise InsufficientPairsError("no runs; measure again")
    return stats.mean(medians)


def noise_floor(controls: Sequence[Run], statistic: Statistic, *, unit: Unit = "pair") -> float:
    """Return by how much the baseline differs from a second instance of itself: no difference below it is real.

    Of one long run, this is the greatest |ratio - 1| + half-width of its controls. Of short runs, each in a process,
    it is |ratio - 1| of all controls together: how much processes differ is in the comparison's interval already, and
    what the controls show is a bias.

    Raises:
        InsufficientPairsError: no control, or one with fewer than 20 pairs; of short runs, fewer than two.
    """
    if unit == "process" and controls:
        centres = _process_centres(controls, statistic)
        if len(centres) < LEAST_CONTROLS:
            raise InsufficientPairsError(
                f"{len(centres)} of {LEAST_CONTROLS} processes that it needs; raise the budget"
            )
        return abs(math.expm1(stats.mean(centres)))
    if not controls:
        raise InsufficientPairsError("no control run; measure the baseline against a second instance of itself")
    found = [estimate([control], statistic) for control in controls]
    return max(abs(each.ratio - 1) + relative_half_width(each) for each in found)
