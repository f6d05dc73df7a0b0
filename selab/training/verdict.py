"""Verdicts of a comparison: levels, paired differences with intervals, and one sentence each.

Everything here is a pure function of an `AccuracyRecord`. Differences are paired by seed: two networks of one seed see
the same images in the same order, so that the seed's common effect cancels. The interval is over seeds. It does not
cover the choice of the test set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from selab import units
from selab.records import stats
from selab.training.record import Accuracy, AccuracyRecord

Metric = Literal["top1", "top5", "loss", "ap", "ap50"]
DifferenceKind = Literal["better", "worse", "not_shown", "no_spread", "one_seed", "no_seeds"]
LEAST_SEEDS = 3
"""Fewest seeds to recommend: with two, the interval is 12.7 standard errors wide."""
METRIC_NAMES: dict[Metric, str] = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ap": "AP", "ap50": "AP at 0.50"}
"""What tables call them."""
_UNITS: dict[Metric, str] = {
    "top1": " points",
    "top5": " points of top-5",
    "loss": " in loss",
    "ap": " points",
    "ap50": " points of AP at 0.50",
}
_PLAIN_DECIMALS: dict[Metric, int] = {"top1": 2, "top5": 2, "loss": 4, "ap": 2, "ap50": 2}


@dataclass(frozen=True, kw_only=True)
class Level:
    """Mean and sample deviation of one network over seeds, in percent or, for the loss, in nats.

    Attributes:
        deviation: spread of single seeds, not the uncertainty of the mean; None for one seed.
        shown: `93.21 ± 0.15 %`, the mean and this deviation.
    """

    mean: float
    deviation: float | None
    seeds: int
    shown: str

    @property
    def text(self) -> str:
        """`93.21 ± 0.15 % (5 seeds)`."""
        return f"{self.shown} ({_seeds(self.seeds)})"


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """Variant minus baseline over the seeds, in percentage points or, for the loss, in nats.

    Attributes:
        kind: `better` and `worse` have an interval without zero; `no_spread`: every seed has the same difference.
        half_width: of Student's 95 % interval around the mean; None for fewer than two seeds.
        seeds_needed: where no difference is shown, roughly how many seeds would show one of this size in 80 % of
            comparisons; at most `stats.MOST_SEEDS`, which means that many or more; None where no number would, and
            below three seeds.
    """

    kind: DifferenceKind
    mean: float | None
    half_width: float | None
    seeds: int
    seeds_needed: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One metric of both networks over the seeds that both have finished; levels are None without such a seed."""

    metric: Metric
    baseline: Level | None
    variant: Level | None
    difference: AccuracyDifference


@dataclass(frozen=True, kw_only=True)
class AccuracyVerdict:
    """The verdict of a record.

    Attributes:
        score: the headline: top-1 accuracy, or a detector's AP.
        more: top-5 accuracy, from six classes on, or a detector's AP at 0.50; None where there is neither.
        loss: None for detectors.
        diverged: `1 of 5 seeds diverged (x, seed 0)`; the comparison is of the others. Empty if none did.
    """

    score: PairedDifference
    more: PairedDifference | None
    loss: PairedDifference | None
    diverged: str = ""

    def of(self, metric: str) -> PairedDifference | None:
        """Return what is found of a metric; None where the networks have no such figure."""
        return next((one for one in (self.score, self.more, self.loss) if one and one.metric == metric), None)

    @property
    def judged(self) -> tuple[PairedDifference, ...]:
        """The two that are judged in words: the score, and the loss or a detector's AP at 0.50."""
        second = self.more if self.loss is None else self.loss
        return (self.score,) if second is None else (self.score, second)


def compare_verdict(record: AccuracyRecord) -> AccuracyVerdict:
    """Compare the two networks of a record over the seeds that both have finished."""
    pairs = [(each.pair[0].test, each.pair[1].test) for each in record.seeds if each.pair]
    detected = record.data.task == "detection"
    has_top5 = bool(pairs) and all(test.top5_correct is not None for pair in pairs for test in pair)

    def compared(metric: Metric) -> PairedDifference:
        baseline = [_value(metric, left) for left, _ in pairs]
        variant = [_value(metric, right) for _, right in pairs]
        # As fractions: differences of equal counts are then exactly equal.
        differences = [float(right - left) for left, right in zip(baseline, variant, strict=True)]
        return PairedDifference(
            metric=metric,
            baseline=_level(metric, baseline),
            variant=_level(metric, variant),
            difference=judge(record.arch, metric, differences, complete=record.complete),
        )

    more: Metric | None = "ap50" if detected else "top5" if has_top5 else None
    return AccuracyVerdict(
        score=compared("ap" if detected else "top1"),
        more=None if more is None else compared(more),
        loss=None if detected else compared("loss"),
        diverged=_diverged(record),
    )


def nothing_compared(records: Sequence[AccuracyRecord]) -> str:
    """Return which networks diverged in every seed, so that nothing is compared, and what to do; empty if none did."""
    seeds = {name: count for record in records for name, count in _diverged_throughout(record).items()}
    if not seeds:
        return ""
    names = "; ".join(f"{name} in every one of {_seeds(count)}" for name, count in seeds.items())
    return (
        f"diverged: {names}; nothing is compared with {'it' if len(seeds) == 1 else 'them'}: use a recipe with a "
        "smaller learning rate or a warm-up, or let --tune search one"
    )


def _diverged_throughout(record: AccuracyRecord) -> dict[str, int]:
    arms = ((record.baseline, "baseline_diverged"), (record.arch, "variant_diverged"))
    every = len(record.seeds)
    return {name: every for name, key in arms if every and all(getattr(one, key) for one in record.seeds)}


def judge(arch: str, metric: Metric, differences: Sequence[float], *, complete: bool = True) -> AccuracyDifference:
    """Judge paired differences: better, worse, or not shown, with the interval and the number of seeds.

    Args:
        arch: the variant's name, for the words.
        metric: higher is better, except for the loss.
        differences: variant minus baseline, one per seed.
        complete: whether these are all the requested seeds; changes the words only.
    """
    seeds = len(differences)
    unfinished = "" if complete else ", unfinished"
    few = f"; run at least {LEAST_SEEDS}" if seeds < LEAST_SEEDS else ""
    counted = f"({_seeds(seeds)}{unfinished}{few})"
    found = stats.paired_t_interval(differences)
    mean = half = needed = None
    kind: DifferenceKind
    if found is None:
        mean = differences[0] if differences else None
        kind = "one_seed" if differences else "no_seeds"
        text = "no seed is finished for both networks"
        if differences:
            text = f"one seed shows no uncertainty; run at least {LEAST_SEEDS}"
    elif len(set(differences)) == 1:
        mean = differences[0]
        kind = "no_spread"
        shown = f"{mean:+z.{_PLAIN_DECIMALS[metric]}f}{_UNITS[metric]}"
        text = f"the same difference from every seed, {shown} ({_seeds(seeds)}{unfinished}), shows no uncertainty; "
        text += "run more seeds"
    else:
        mean, half = found
        places = _decimals(half)
        if abs(mean) > half:
            kind = "better" if (mean > 0) != (metric == "loss") else "worse"
            text = f"{arch} {kind} by {abs(mean):.{places}f} ± {half:.{places}f}{_UNITS[metric]} {counted}"
        else:
            kind = "not_shown"
            # The deviation of two differences says too little.
            needed = stats.seeds_needed(differences) if seeds >= LEAST_SEEDS else None
            text = f"no difference shown with {_seeds(seeds)}{unfinished}{few} "
            text += f"({mean:+z.{places}f} ± {half:.{places}f}{_UNITS[metric]}){_needed(needed)}"
    return AccuracyDifference(kind=kind, mean=mean, half_width=half, seeds=seeds, seeds_needed=needed, text=text)


def _value(metric: Metric, test: Accuracy) -> Fraction:
    """Return percent, or the loss in nats, exactly."""
    if test.precision is not None and metric in ("ap", "ap50"):
        return Fraction(test.precision.ap_pct if metric == "ap" else test.precision.ap50_pct)
    value = {"loss": test.loss, "top1": test.top1_correct, "top5": test.top5_correct}.get(metric)
    if value is None:
        raise ValueError(f"{METRIC_NAMES[metric]} was not found; top-5 says nothing below six classes")
    return Fraction(value) if metric == "loss" else Fraction(100 * int(value), test.images)


def _level(metric: Metric, values: Sequence[Fraction]) -> Level | None:
    if not values:
        return None
    plain = [float(value) for value in values]
    # The mean of equal floats may be off by its last bit; their deviation must be zero.
    mean = plain[0] if len(set(plain)) == 1 else stats.mean(plain)
    deviation = None if len(plain) == 1 else 0.0 if len(set(plain)) == 1 else stats.sample_deviation(plain)
    places = _decimals(deviation) if deviation else _PLAIN_DECIMALS[metric]
    shown = f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")
    unit = "" if metric == "loss" else " %"
    return Level(mean=mean, deviation=deviation, seeds=len(plain), shown=f"{shown}{unit}")


def _seeds(count: int) -> str:
    return units.counted(count, "seed")


def _diverged(record: AccuracyRecord) -> str:
    arms = (
        (record.baseline, [each.seed for each in record.seeds if each.baseline_diverged]),
        (record.arch, [each.seed for each in record.seeds if each.variant_diverged]),
    )
    either = {seed for _, seeds in arms for seed in seeds}
    if not either:
        return ""
    which = "; ".join(
        f"{name}, {units.plural_of(len(seeds), 'seed')} {', '.join(map(str, seeds))}" for name, seeds in arms if seeds
    )
    return f"{len(either)} of {_seeds(len(record.seeds))} diverged ({which})"


def _needed(seeds: int | None) -> str:
    if seeds is None:
        return ""
    many = f"{seeds} seeds or more" if seeds == stats.MOST_SEEDS else f"about {seeds} seeds"
    return f"; {many} would be needed to show one of this size in 4 of 5 comparisons"


def _decimals(width: float) -> int:
    """Return the decimals up to one digit after the width's first, as `units.decimals_for`; at most six."""
    return min(6, max(0, 1 - math.floor(math.log10(width))))
