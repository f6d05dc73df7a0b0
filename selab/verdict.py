"""From raw samples to what may be said: ratio, interval, control floor, flags, and one sentence.

Everything here is a pure function of raw runs, so that a record can be recomputed by whoever reads it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from selab import stats, units
from selab.errors import RecordError, SelabError
from selab.record import Estimate, Flag, Latency, Phase, Quad, Run, Statistic, VerdictKind

MIN_PAIRS = 20
"""Fewer pairs than this in a process give no interval."""
EQUAL_BAND = 0.01
"""`equal` means that the whole interval lies within 1 % of equality."""
WIDEST_HALF_WIDTH = 0.05
"""A wider interval, or a control floor above it, is no result."""
FIGURES = ("baseline_s", "variant_s", "ratio", "ratio_low", "ratio_high", "difference_s", "control_floor")
"""The fields of a `Latency` that are computed from its raw runs, besides its flags and its verdict."""

_DISPERSION = 0.05
_OUTLIER_SPREADS = 5.0
_OUTLIER_SHARE = 0.05
_LEAST_SPREAD = 0.001
_LEVEL_DRIFT = 0.05
_RATIO_DRIFT = 0.01
_ORDER_EFFECT = 0.01
_SURE = 4.0
_CONTENTION = frozenset({"contention", "oversubscribed"})


class InsufficientPairsError(SelabError):
    """A run has too few pairs for an interval."""


# ---------------------------------------------------------------------------------------------------- pairs of samples


def quad_pairs(quad: Quad, statistic: Statistic) -> tuple[tuple[float, float], tuple[float, float]]:
    """(s0, s1, s2, s3) of ABBA → (s0, s1), (s3, s2); of BAAB → (s1, s0), (s2, s3): neighbours, baseline first.

    Returns:
        Two (baseline, variant) pairs in seconds per call. In one the baseline ran first, in the other the variant.

    Raises:
        RecordError: a sample is not a positive, finite time.
    """
    samples: tuple[float, float, float, float] = getattr(quad, statistic)
    for sample in samples:
        if not 0 < sample < math.inf:
            raise RecordError(f"quads: a {statistic} sample of {sample!r} s; samples are positive times; measure again")
    first, second, third, fourth = samples
    if quad.order == "ABBA":
        return (first, second), (fourth, third)
    return (second, first), (third, fourth)


def pairs(run: Run, statistic: Statistic) -> list[tuple[float, float]]:
    """All adjacent (baseline, variant) pairs of a run, two from each quad, in seconds per call."""
    return [pair for quad in run.quads for pair in quad_pairs(quad, statistic)]


def log_ratio(baseline_s: float, variant_s: float) -> float:
    """ln(variant) - ln(baseline): a difference of logarithms, so that swapping the arms negates it exactly."""
    return math.log(variant_s) - math.log(baseline_s)


def _log_ratios(quads: Iterable[Quad], statistic: Statistic) -> list[float]:
    return [log_ratio(*pair) for quad in quads for pair in quad_pairs(quad, statistic)]


# --------------------------------------------------------------------------------------------------- ratio and interval


@dataclass(frozen=True, kw_only=True)
class _LogEstimate:
    centre: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def _within(quads: Sequence[Quad], statistic: Statistic, confidence: float = 0.95) -> _LogEstimate | None:
    if 2 * len(quads) < MIN_PAIRS:
        return None
    logs = _log_ratios(quads, statistic)
    interval = stats.median_interval(logs, confidence)
    if interval is None:
        return None
    return _LogEstimate(centre=stats.median(logs), low=interval[0], high=interval[1])


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


def half_width(quads: Sequence[Quad], statistic: Statistic) -> float | None:
    """Half the width of the 95 % interval of ln(variant / baseline): 0.005 reads as ±0.5 % of the ratio.

    On the logarithm, so that swapping the arms leaves it unchanged. This is what a measurement stops on.

    Returns:
        None below 20 pairs.
    """
    found = _within(quads, statistic)
    return None if found is None else found.half_width


def relative_half_width(estimate: Estimate) -> float:
    """`half_width` of a finished estimate: (ln high - ln low) / 2."""
    return (math.log(estimate.ratio_high) - math.log(estimate.ratio_low)) / 2


def _sample_medians(runs: Iterable[Run], statistic: Statistic) -> tuple[float, float]:
    both = [pair for run in runs for pair in pairs(run, statistic)]
    return stats.median([pair[0] for pair in both]), stats.median([pair[1] for pair in both])


def estimate(runs: Sequence[Run], statistic: Statistic, *, confidence: float = 0.95) -> Estimate:
    """exp(median of ln(variant / baseline)), with an exact interval, by default of 95 %.

    One process: the order-statistic interval of the median. Several: the mean of their medians, with a half-width of
    max(median of the half-widths within, t sd / sqrt(P)), both on the logarithm.

    Args:
        runs: one per process.
        statistic: which value stands for a sample.
        confidence: the interval's coverage.

    Raises:
        InsufficientPairsError: no run, or one with fewer than 20 pairs.
        RecordError: a sample is not a positive time.

    Source: Hahn and Meeker, Statistical Intervals (1991), section 5.2 (within); Student's t on P means (across);
        Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013 (why processes are the unit).
    """
    found = _across(runs, statistic, confidence)
    baseline_s, variant_s = _sample_medians(runs, statistic)
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
    """Median of variant - baseline over adjacent pairs, in seconds per call; the mean of these medians over processes.

    It can differ a little from the difference of the two arms' medians, which the machine's drift enters; its sign is
    the ratio's.

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


def control_floor(controls: Sequence[Run], statistic: Statistic) -> float:
    """Greatest |ratio - 1| + half-width of the controls: what this machine shows where there is nothing to show.

    Raises:
        InsufficientPairsError: no control, or one with fewer than 20 pairs.
    """
    if not controls:
        raise InsufficientPairsError("no control run; measure the baseline against a second instance of itself")
    found = [estimate([control], statistic) for control in controls]
    return max(abs(each.ratio - 1) + relative_half_width(each) for each in found)


# --------------------------------------------------------------------------------------------------------------- flags


def _contrast(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Median of `one` minus that of `other`, and its standard error: 1.2533 sd sqrt(1/n + 1/m), sd pooled.

    The ordinary deviation, though spikes inflate it: a few values have no robust one, and a flag that is raised for
    nothing does more harm than one that outliers, which have a flag of their own, hold back.

    Source: 1.2533 = sqrt(pi / 2) is the asymptotic standard error of a normal sample's median over that of its mean.
    """
    means = [(values, stats.mean(values)) for values in (one, other)]
    squares = [(value - centre) ** 2 for values, centre in means for value in values]
    deviation = math.sqrt(math.fsum(squares) / (len(squares) - 2))
    error = math.sqrt(math.pi / 2) * deviation * math.sqrt(1 / len(one) + 1 / len(other))
    return stats.median(one) - stats.median(other), error


def _shift(values: Sequence[float]) -> tuple[float, float]:
    """The last third of the values against the first."""
    third = len(values) // 3
    return _contrast(values[-third:], values[:third])


def _dispersion(logs: dict[str, list[float]]) -> list[Flag]:
    spreads = {arm: stats.robust_spread(values) for arm, values in logs.items()}
    arm = max(spreads, key=lambda name: spreads[name])
    if spreads[arm] <= _DISPERSION:
        return []
    spread = units.share(spreads[arm])
    detail = f"the {arm}'s samples spread by {spread} (robust deviation); quiet the machine and measure again"
    return [Flag(name="dispersion", detail=detail)]


def _outliers(logs: dict[str, list[float]]) -> list[Flag]:
    far = total = 0
    for values in logs.values():
        centre, spread = stats.median(values), max(stats.robust_spread(values), _LEAST_SPREAD)
        far += sum(abs(value - centre) > _OUTLIER_SPREADS * spread for value in values)
        total += len(values)
    if far <= _OUTLIER_SHARE * total:
        return []
    detail = (
        f"{far} of {total} samples lie more than {_OUTLIER_SPREADS:.0f} robust deviations from their arm's median; "
        "look for another program that runs now and then"
    )
    return [Flag(name="outliers", detail=detail)]


def _drift(logs: dict[str, list[float]], ratios: Sequence[float]) -> list[Flag]:
    level, level_error = _shift(logs["baseline"])
    # Over whole quads, whose two pairs have opposite orders: an order effect is no drift.
    ratio, ratio_error = _shift([(one + other) / 2 for one, other in zip(ratios[0::2], ratios[1::2], strict=True)])
    found = []
    if abs(level) > max(_LEVEL_DRIFT, _SURE * level_error):
        found.append(f"the baseline's time changed by {units.percent(math.expm1(level), decimals=1)}")
    if abs(ratio) > max(_RATIO_DRIFT, _SURE * ratio_error):
        found.append(f"the ratio changed by {units.percent(math.expm1(ratio), decimals=1)}")
    if not found:
        return []
    detail = (
        f"from the first third of the run to the last, {' and '.join(found)}; let the machine settle and measure again"
    )
    return [Flag(name="drift", detail=detail)]


def _order_effect(ratios: Sequence[float]) -> list[Flag]:
    # The caller hands each quad's pairs over with the one in front whose baseline ran first.
    contrast, error = _contrast(ratios[0::2], ratios[1::2])
    effect = contrast / 2
    if abs(effect) <= max(_ORDER_EFFECT, _SURE * error / 2):
        return []
    word = "slower" if effect > 0 else "faster"
    detail = (
        f"the second sample of a pair is {units.share(abs(math.expm1(effect)))} {word} than the first; "
        "the orders balance it, but the interval is wider for it: let the machine cool, or measure longer"
    )
    return [Flag(name="order_effect", detail=detail)]


def run_flags(run: Run, statistic: Statistic) -> tuple[Flag, ...]:
    """What one run's samples show and what its sampler noted; flags mark samples and never remove them."""
    flags = [] if run.steady else [_unsteady(run)]
    if 2 * len(run.quads) >= MIN_PAIRS:
        both = pairs(run, statistic)
        logs = {
            "baseline": [math.log(baseline) for baseline, _ in both],
            "variant": [math.log(variant) for _, variant in both],
        }
        ratios = [log_ratio(*pair) for quad in run.quads for pair in _baseline_first(quad, statistic)]
        flags += [*_dispersion(logs), *_outliers(logs), *_drift(logs, ratios), *_order_effect(ratios)]
    return (*flags, *run.flags)


def _unsteady(run: Run) -> Flag:
    detail = (
        f"after {run.warmup_s:.3g} s and {run.warmup_calls} calls of warm-up two equal windows still differed by 1 % "
        "or more; quiet the machine and measure again"
    )
    return Flag(name="no_steady_state", detail=detail)


def _baseline_first(quad: Quad, statistic: Statistic) -> tuple[tuple[float, float], tuple[float, float]]:
    one, other = quad_pairs(quad, statistic)
    return (one, other) if quad.order == "ABBA" else (other, one)


def merged_flags(runs: Sequence[Run], statistic: Statistic) -> tuple[Flag, ...]:
    """Each flag once: the detail of the first run that shows it and, of several runs, how many do."""
    shown: dict[str, list[str]] = {}
    for run in runs:
        for name, detail in {flag.name: flag.detail for flag in reversed(run_flags(run, statistic))}.items():
            shown.setdefault(name, []).append(detail)
    if len(runs) == 1:
        return tuple(Flag(name=name, detail=details[0]) for name, details in sorted(shown.items()))
    return tuple(
        Flag(name=name, detail=f"in {len(details)} of {len(runs)} processes: {details[0]}")
        for name, details in sorted(shown.items())
    )


# ------------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What may be said, for a program (`kind`) and for a reader (`text`)."""

    kind: VerdictKind
    text: str


def no_result(reasons: Sequence[str]) -> Verdict:
    """`no result: reason; reason`."""
    return Verdict(kind="no_result", text=f"no result: {'; '.join(reasons)}")


def decide(found: Estimate, floor: float) -> Literal["slower", "faster", "equal", "undecided"]:
    """The kind of a verdict, given that there is a result.

    A difference that is resolved is said, however small: `slower` and `faster` come before `equal`. `equal` asks the
    same of the control as of the interval, for a claim within 1 % means little on a machine whose baseline differs by
    more from itself.

    Args:
        found: ratio and interval.
        floor: the control floor.
    """
    excludes_one = found.ratio_low > 1 or found.ratio_high < 1
    if excludes_one and abs(found.ratio - 1) > floor:
        return "slower" if found.ratio > 1 else "faster"
    if _within_band(found) and floor <= EQUAL_BAND:
        return "equal"
    return "undecided"


def sentence(found: Estimate, floor: float, difference_s: float) -> Verdict:
    """The verdict in words: percent of the baseline's time, digits by the half-width, the difference in time beside it.

    Where the interval excludes equality but the control floor does not, what cannot be excluded reaches from the lower
    to the upper end of both.

    Args:
        found: ratio and interval.
        floor: the control floor.
        difference_s: variant - baseline, in seconds per call.
    """
    kind = decide(found, floor)
    half = relative_half_width(found)
    low, high = found.ratio_low - 1, found.ratio_high - 1
    difference = _signed_time(difference_s, half * found.baseline_s)
    if kind == "undecided":
        return Verdict(kind=kind, text=_undecided(found, floor))
    if kind == "equal":
        places = units.decimals_for(half)
        inside = f"[{_percent(low, places, sign=True)}, {_percent(high, places, sign=True)}]"
        return Verdict(kind=kind, text=f"equal within 1 % {inside}, {difference}")
    # Of a faster variant the gain is told: positive numbers, the smaller one first.
    change, least, most = (found.ratio - 1, low, high) if kind == "slower" else (1 - found.ratio, -high, -low)
    places = _decimals_that_show(half, least)
    bounds = f"[{_percent(least, places)}, {_percent(most, places)}]"
    band = " (within 1 %)" if _within_band(found) else ""
    return Verdict(kind=kind, text=f"{kind} by {_percent(change, places)} % {bounds}{band}, {difference}")


def not_excluded(latency: Latency) -> tuple[float, float] | None:
    """What a measured latency does not exclude, as fractions of the baseline's time; None where there is no result.

    Where the difference is not resolved it reaches from the lower to the upper end of interval and control floor, as in
    the verdict's words.
    """
    if latency.verdict_kind == "no_result" or latency.ratio_low is None or latency.ratio_high is None:
        return None
    low, high = latency.ratio_low - 1, latency.ratio_high - 1
    if latency.verdict_kind == "undecided" and latency.control_floor is not None and (low > 0 or high < 0):
        low, high = min(low, -latency.control_floor), max(high, latency.control_floor)
    return low, high


def _undecided(found: Estimate, floor: float) -> str:
    half = relative_half_width(found)
    places = units.decimals_for(half)
    low, high = found.ratio_low - 1, found.ratio_high - 1
    note = ""
    if low > 0 or high < 0:
        note = f"; {_percent(found.ratio - 1, places, sign=True)} % is within the control floor"
        note += f" of {_percent(floor, places)} %"
        low, high = min(low, -floor), max(high, floor)
    elif _within_band(found):
        note = f"; the control floor is {_percent(floor, places)} %"
    times = [_signed_time(end * found.baseline_s, half * found.baseline_s) for end in (low, high)]
    ends = f"{units.percent(low, decimals=places)}..{units.percent(high, decimals=places)}"
    return f"no difference measured; cannot exclude {ends} ({times[0]}..{times[1]}){note}"


def _within_band(found: Estimate) -> bool:
    return found.ratio_low >= 1 - EQUAL_BAND and found.ratio_high <= 1 + EQUAL_BAND


def _percent(fraction: float, decimals: int, *, sign: bool = False) -> str:
    text = units.percent(fraction, decimals=decimals).removesuffix(" %")
    return text if sign else text.removeprefix("+")


def _decimals_that_show(half: float, least: float) -> int:
    """Decimals by the half-width, and more where the end nearest to equality would read as equality."""
    decimals = units.decimals_for(half)
    while decimals < 6 and float(_percent(least, decimals)) == 0:
        decimals += 1
    return decimals


def _signed_time(value_s: float, half_s: float) -> str:
    """A difference in time, to one digit beyond the first of its half-width."""
    digits = 3
    if value_s and half_s:
        digits = max(1, math.floor(math.log10(abs(value_s))) - math.floor(math.log10(half_s)) + 2)
    return f"{'+' if value_s > 0 else ''}{units.seconds(value_s, digits=min(digits, 6))}"


# ------------------------------------------------------------------------------------------------------------- summary


def _estimated(runs: Sequence[Run], statistic: Statistic) -> tuple[Estimate | None, list[str]]:
    """The estimate if there is one, and why it may not be quoted."""
    try:
        found = estimate(runs, statistic)
    except InsufficientPairsError as short:
        return None, [str(short)]
    half = relative_half_width(found)
    if half <= WIDEST_HALF_WIDTH:
        return found, []
    elapsed_s = sum(run.elapsed_s for run in runs)
    widest = units.share(WIDEST_HALF_WIDTH, decimals=0)
    reason = f"the interval is ±{units.share(half)} of the ratio after {elapsed_s:.3g} s, more than ±{widest}"
    return found, [f"{reason}; quiet the machine or raise the budget"]


def _controlled(controls: Sequence[Run], statistic: Statistic) -> tuple[float | None, list[str]]:
    """The control floor if there is one, and why the control fails."""
    try:
        floor = control_floor(controls, statistic)
    except InsufficientPairsError as short:
        return None, [f"control: {short}"]
    if floor <= WIDEST_HALF_WIDTH:
        return floor, []
    widest = units.share(WIDEST_HALF_WIDTH, decimals=0)
    reason = f"control: the baseline against itself shows up to {units.share(floor)}, more than {widest}"
    return floor, [f"{reason}; quiet the machine"]


def _contended(runs: Sequence[Run], threads: int) -> list[str]:
    """Several threads wait for the slowest of them, so a contended one decides the figure: that is no result."""
    seen = {flag.name for run in runs for flag in run.flags} & _CONTENTION
    if threads == 1 or not seen:
        return []
    return [f"{' and '.join(sorted(seen))} while {threads} threads were measured; stop other work, or use --threads 1"]


def _judged(
    runs: Sequence[Run], controls: Sequence[Run], statistic: Statistic, threads: int, error: str
) -> tuple[Estimate | None, float | None, list[str]]:
    """The estimate and the control floor, where there are such, and every reason against a result."""
    if error and not runs and not controls:
        return None, None, [error]
    found, against = _estimated(runs, statistic)
    floor, failing = _controlled(controls, statistic)
    return found, floor, [*([error] if error else []), *against, *failing, *_contended(runs, threads)]


def no_result_reasons(latency: Latency) -> list[str]:
    """Why there is no result, each reason by itself; none where there is one."""
    return _judged(latency.runs, latency.controls, latency.statistic, latency.threads, latency.error)[2]


def summarise(
    *,
    phase: Phase,
    method: str,
    statistic: Statistic,
    threads: int,
    mode: Literal["train", "eval"],
    runs: Sequence[Run],
    controls: Sequence[Run],
    target_half_width: float = 0.005,
    error: str = "",
) -> Latency:
    """Raw runs and controls → a `Latency` with every figure, flag and the verdict.

    There is no result if a run has fewer than 20 pairs, if the half-width exceeds 5 %, if several threads were measured
    under contention, or if the control fails: none was taken, one has fewer than 20 pairs, or its floor exceeds 5 %.
    What can be computed stands in the fields all the same (the medians of two arms from the first quad on, ratio and
    interval from 20 pairs on), so that nothing is hidden; `verdict_kind` says whether it may be quoted.

    Args:
        phase: what one call was.
        method: how it was timed.
        statistic: which value stands for a sample.
        threads: CPU threads that the process used.
        mode: of both networks.
        runs: one per process.
        controls: baseline against a second baseline instance.
        target_half_width: what the sampler aimed at; kept, not judged.
        error: why nothing could be measured; it becomes the reason.

    Raises:
        RecordError: a sample is not a positive time.
    """
    baseline_s = variant_s = difference = None
    if any(run.quads for run in runs):
        baseline_s, variant_s = _sample_medians(runs, statistic)
    found, floor, against = _judged(runs, controls, statistic, threads, error)
    if found is not None:
        difference = paired_difference_s(runs, statistic)
    if against or found is None or floor is None or difference is None:
        verdict = no_result(against)
    else:
        verdict = sentence(found, floor, difference)
        if len(runs) == 1:
            verdict = Verdict(kind=verdict.kind, text=f"{verdict.text}; in one process")
    return Latency(
        phase=phase,
        method=method,
        statistic=statistic,
        threads=threads,
        mode=mode,
        baseline_s=baseline_s,
        variant_s=variant_s,
        ratio=None if found is None else found.ratio,
        ratio_low=None if found is None else found.ratio_low,
        ratio_high=None if found is None else found.ratio_high,
        difference_s=difference,
        control_floor=floor,
        verdict=verdict.text,
        verdict_kind=verdict.kind,
        flags=merged_flags(runs, statistic),
        target_half_width=target_half_width,
        runs=tuple(runs),
        controls=tuple(controls),
        error=error,
    )


def recompute(latency: Latency) -> Latency:
    """The same raw runs, everything else computed again."""
    return summarise(
        phase=latency.phase,
        method=latency.method,
        statistic=latency.statistic,
        threads=latency.threads,
        mode=latency.mode,
        runs=latency.runs,
        controls=latency.controls,
        target_half_width=latency.target_half_width,
        error=latency.error,
    )


def check(latency: Latency) -> Latency:
    """Holds what a record states against its raw samples: figures to 1e-9, and which flags and verdict there are.

    Returns:
        The same with its words written anew: how a verdict is worded may change, what it says may not.

    Raises:
        RecordError: a stored figure disagrees; the message names the field.
    """
    again = recompute(latency)
    for name in FIGURES:
        stored, computed = getattr(latency, name), getattr(again, name)
        if not _agree(stored, computed):
            raise _disagreement(latency, name, stored, computed)
    if latency.verdict_kind != again.verdict_kind:
        raise _disagreement(latency, "verdict_kind", latency.verdict_kind, again.verdict_kind)
    stored_flags, computed_flags = ([flag.name for flag in one.flags] for one in (latency, again))
    if stored_flags != computed_flags:
        raise _disagreement(latency, "flags", stored_flags, computed_flags)
    return again


def _agree(stored: float | None, computed: float | None) -> bool:
    if stored is None or computed is None:
        return stored is computed
    # Another machine's logarithm may differ in the last bit.
    return math.isclose(stored, computed, rel_tol=1e-9, abs_tol=1e-12)


def _disagreement(latency: Latency, name: str, stored: object, computed: object) -> RecordError:
    return RecordError(
        f"{latency.phase} {latency.method}: {name} is stored as {stored!r}, its samples give {computed!r}; "
        "restore the file or measure again"
    )
