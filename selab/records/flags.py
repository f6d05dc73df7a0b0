"""Flags computed from raw samples: dispersion, outliers, drift, order effect."""

import math
from collections.abc import Sequence

from selab import units
from selab.records import stats
from selab.records.estimate import MIN_PAIRS, log_ratio, pairs, quad_pairs
from selab.records.types import ABBABlock, Flag, Run, Statistic

_DISPERSION = 0.05
_OUTLIER_SPREADS = 5.0
_OUTLIER_SHARE = 0.05
_LEAST_SPREAD = 0.001
_LEVEL_DRIFT = 0.05
_RATIO_DRIFT = 0.01
_ORDER_EFFECT = 0.01
_SURE = 4.0


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


def _baseline_first(quad: ABBABlock, statistic: Statistic) -> tuple[tuple[float, float], tuple[float, float]]:
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
