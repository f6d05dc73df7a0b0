"""From raw samples to a conclusion: ratio, interval, noise floor, flags, and one sentence.

Everything here is a pure function of raw runs, so that any reader can recompute a record.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selab import units
from selab.errors import RecordError
from selab.records.estimate import (
    InsufficientPairsError,
    estimate,
    noise_floor,
    paired_difference_s,
    relative_half_width,
    sample_medians,
)
from selab.records.flags import merged_flags
from selab.records.types import (
    Estimate,
    Latency,
    Phase,
    Run,
    Statistic,
    Unit,
    VerdictKind,
)
from selab.units import NONE

EQUAL_BAND = 0.01
"""The verdict `equal` requires the whole interval within 1 % of equality."""
WIDEST_HALF_WIDTH = 0.05
"""A wider interval, or a noise floor above it, gives no result."""
FIGURES = ("baseline_s", "variant_s", "ratio", "ratio_low", "ratio_high", "difference_s", "noise_floor")
"""The fields of a `Latency` that are computed from its raw runs, besides its flags and its verdict."""
NOT_SIGNIFICANT = "n.s."
TOO_NOISY = "too noisy"
"""What tables and figures show for `undecided` and for `no_result`."""


_CONTENTION = frozenset({"contention", "oversubscribed"})


# ------------------------------------------------------------------------------------------------------------- verdict
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion, for a program (`kind`) and for a reader (`text`)."""

    kind: VerdictKind
    text: str


def no_result(reasons: Sequence[str]) -> Verdict:
    """Return the verdict `no result: reason; reason`."""
    return Verdict(kind="no_result", text=f"no result: {'; '.join(reasons)}")


def decide(found: Estimate, floor: float) -> Literal["slower", "faster", "equal", "undecided"]:
    """Return the kind of a verdict, given that there is a result.

    A resolved difference is reported, however small: `slower` and `faster` come before `equal`. `equal` requires the
    noise floor within 1 % as well: otherwise the baseline differs by more from itself.

    Args:
        found: ratio and interval.
        floor: the noise floor.
    """
    excludes_one = found.ratio_low > 1 or found.ratio_high < 1
    if excludes_one and abs(found.ratio - 1) > floor:
        return "slower" if found.ratio > 1 else "faster"
    if _within_band(found) and floor <= EQUAL_BAND:
        return "equal"
    return "undecided"


def sentence(found: Estimate, floor: float, difference_s: float) -> Verdict:
    """Return the verdict in words: percent of the baseline's time, digits by the half-width, the difference in time.

    If the interval excludes equality but the noise floor does not, the range that cannot be excluded is the union of
    both.

    Args:
        found: ratio and interval.
        floor: the noise floor.
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
    # A faster variant is reported by its gain: positive numbers, the smaller one first.
    change, least, most = (found.ratio - 1, low, high) if kind == "slower" else (1 - found.ratio, -high, -low)
    places = _decimals_that_show(half, least)
    bounds = f"[{_percent(least, places)}, {_percent(most, places)}]"
    band = " (within 1 %)" if _within_band(found) else ""
    return Verdict(kind=kind, text=f"{kind} by {_percent(change, places)} % {bounds}{band}, {difference}")


def not_excluded(latency: Latency) -> tuple[float, float] | None:
    """Return the range of changes that a latency does not exclude, as fractions of the baseline's time.

    If the difference is not resolved, this is the union of interval and noise floor, as in the verdict's words. None if
    there is no result.
    """
    if latency.verdict_kind == "no_result" or latency.ratio_low is None or latency.ratio_high is None:
        return None
    low, high = latency.ratio_low - 1, latency.ratio_high - 1
    if latency.verdict_kind == "undecided" and latency.noise_floor is not None and (low > 0 or high < 0):
        low, high = min(low, -latency.noise_floor), max(high, latency.noise_floor)
    return low, high


def _undecided(found: Estimate, floor: float) -> str:
    half = relative_half_width(found)
    places = units.decimals_for(half)
    low, high = found.ratio_low - 1, found.ratio_high - 1
    note = ""
    if low > 0 or high < 0:
        note = f"; {_percent(found.ratio - 1, places, sign=True)} % is within the noise floor"
        note += f" of {_percent(floor, places)} %"
        low, high = min(low, -floor), max(high, floor)
    elif _within_band(found):
        note = f"; the noise floor is {_percent(floor, places)} %"
    times = [_signed_time(end * found.baseline_s, half * found.baseline_s) for end in (low, high)]
    ends = f"{units.percent(low, decimals=places)}..{units.percent(high, decimals=places)}"
    return f"no difference measured; cannot exclude {ends} ({times[0]}..{times[1]}){note}"


def _within_band(found: Estimate) -> bool:
    return found.ratio_low >= 1 - EQUAL_BAND and found.ratio_high <= 1 + EQUAL_BAND


def _percent(fraction: float, decimals: int, *, sign: bool = False) -> str:
    text = units.percent(fraction, decimals=decimals).removesuffix(" %")
    return text if sign else text.removeprefix("+")


def _decimals_that_show(half: float, least: float) -> int:
    """Return decimals by the half-width, and more if the end nearest to equality would otherwise print as equality."""
    decimals = units.decimals_for(half)
    while decimals < 6 and float(_percent(least, decimals)) == 0:
        decimals += 1
    return decimals


def _signed_time(value_s: float, half_s: float) -> str:
    """Return a difference in time, to one digit beyond the first of its half-width."""
    digits = 3
    if value_s and half_s:
        digits = max(1, math.floor(math.log10(abs(value_s))) - math.floor(math.log10(half_s)) + 2)
    return f"{'+' if value_s > 0 else ''}{units.seconds(value_s, digits=min(digits, 6))}"


# ------------------------------------------------------------------------------------------------------------- summary
def _estimated(runs: Sequence[Run], statistic: Statistic, unit: Unit) -> tuple[Estimate | None, list[str]]:
    """Return the estimate if there is one, and the reasons against quoting it."""
    try:
        found = estimate(runs, statistic, unit=unit)
    except InsufficientPairsError as short:
        return None, [str(short)]
    half = relative_half_width(found)
    if half <= WIDEST_HALF_WIDTH:
        return found, []
    elapsed_s = sum(run.elapsed_s for run in runs)
    widest = units.share(WIDEST_HALF_WIDTH, decimals=0)
    reason = (
        f"the interval is ±{units.share(half)} of the ratio after {elapsed_s:.3g} s of sampling, more than ±{widest}"
    )
    return found, [f"{reason}; quiet the machine or raise the budget"]


def _controlled(controls: Sequence[Run], statistic: Statistic, unit: Unit) -> tuple[float | None, list[str]]:
    """Return the noise floor if there is one, and the reasons why the control fails."""
    try:
        floor = noise_floor(controls, statistic, unit=unit)
    except InsufficientPairsError as short:
        return None, [f"control: {short}"]
    if floor <= WIDEST_HALF_WIDTH:
        return floor, []
    widest = units.share(WIDEST_HALF_WIDTH, decimals=0)
    reason = f"control: the baseline against itself shows up to {units.share(floor)}, more than {widest}"
    return floor, [f"{reason}; quiet the machine"]


def _contended(runs: Sequence[Run], threads: int) -> list[str]:
    """Return a reason if several threads were contended: all wait for the slowest, so there is no result."""
    seen = {flag.name for run in runs for flag in run.flags} & _CONTENTION
    if threads == 1 or not seen:
        return []
    return [f"{' and '.join(sorted(seen))} while {threads} threads were measured; stop other work, or use --threads 1"]


def _judged(
    runs: Sequence[Run], controls: Sequence[Run], statistic: Statistic, threads: int, error: str, unit: Unit
) -> tuple[Estimate | None, float | None, list[str]]:
    """Return the estimate and the noise floor, where they exist, and every reason against a result."""
    if error and not runs and not controls:
        return None, None, [error]
    found, against = _estimated(runs, statistic, unit)
    floor, failing = _controlled(controls, statistic, unit)
    return (
        found,
        floor,
        [*([error] if error else []), *against, *failing, *(_contended(runs, threads) if unit == "pair" else [])],
    )


def no_result_reasons(latency: Latency) -> list[str]:
    """Return the reasons why there is no result; empty if there is one."""
    one = latency
    return _judged(one.runs, one.controls, one.statistic, one.threads, one.error, one.unit)[2]


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
    unit: Unit = "pair",
) -> Latency:
    """Summarise raw runs and controls as a `Latency` with all figures, flags and the verdict.

    There is no result if a run has fewer than 20 pairs, if the half-width exceeds 5 %, if several threads were measured
    under contention, or if the control fails: none was taken, one has fewer than 20 pairs, or its floor exceeds 5 %.
    Fields that can be computed are filled all the same: medians of both arms from the first ABBA block on, ratio and
    interval from 20 pairs on. `verdict_kind` says whether they may be quoted.

    Args:
        phase: of one call.
        method: of timing.
        statistic: the value that represents a sample.
        threads: CPU threads that the process used.
        mode: of both networks.
        runs: one per process.
        controls: baseline against a second baseline instance.
        target_half_width: the sampler's target; stored, not judged.
        error: the reason why nothing could be measured; it becomes the verdict's reason.
        unit: what the interval counts; of short runs a process is one sample, and three processes are needed.

    Raises:
        RecordError: a sample is not a positive time.
    """
    baseline_s = variant_s = difference = None
    if any(run.quads for run in runs):
        baseline_s, variant_s = sample_medians(runs, statistic)
    found, floor, against = _judged(runs, controls, statistic, threads, error, unit)
    if found is not None:
        difference = paired_difference_s(runs, statistic)
    if against or found is None or floor is None or difference is None:
        verdict = no_result(against)
    else:
        verdict = sentence(found, floor, change_s(found.baseline_s, found.ratio))
        if len(runs) == 1 and unit == "pair":
            verdict = Verdict(kind=verdict.kind, text=f"{verdict.text}; in one process")
        if unit == "process":
            verdict = Verdict(kind=verdict.kind, text=f"{verdict.text}; {found.processes} processes")
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
        noise_floor=floor,
        verdict=verdict.text,
        verdict_kind=verdict.kind,
        flags=merged_flags(runs, statistic),
        target_half_width=target_half_width,
        runs=tuple(runs),
        controls=tuple(controls),
        error=error,
        unit=unit,
    )


def change_s(baseline_s: float, ratio: float) -> float:
    """Return what a ratio adds to the baseline's time, in seconds: the difference that is shown beside it.

    Differences of samples would be weighed by how slow each process happened to be, and could contradict the ratio.
    """
    return baseline_s * (ratio - 1)


def recompute(latency: Latency) -> Latency:
    """Compute everything again from the raw runs."""
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
        unit=latency.unit,
    )


def check(latency: Latency) -> Latency:
    """Check a stored latency against its raw samples: figures to 1e-9, names of flags, and kind of verdict.

    Returns:
        The latency with its sentences recomputed: the wording may change between versions, the content may not.

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


def change_words(latency: Latency | None) -> str:
    """`+21.7 % [19.3, 23.4]`, or why there is none."""
    if latency is None or latency.ratio is None or latency.ratio_low is None or latency.ratio_high is None:
        return NONE
    left = not_excluded(latency)
    if left is None and latency.unit == "process":
        # Each process is a sample, so the interval is honest however wide it is.
        return f"{TOO_NOISY} [{100 * (latency.ratio_low - 1):.0f}, {100 * (latency.ratio_high - 1):.0f}]"
    if left is None:
        return TOO_NOISY
    decimals = units.decimals_for((latency.ratio_high - latency.ratio_low) / 2)
    low, high = (100 * bound for bound in left)
    change = units.percent(latency.ratio - 1, decimals=decimals)
    # Below the control floor the figure is the machine's own, so only what cannot be excluded is shown.
    shown = NOT_SIGNIFICANT if latency.verdict_kind == "undecided" else change
    return f"{shown} [{low:.{decimals}f}, {high:.{decimals}f}]"
