"""Flags computed from raw samples: dispersion, outliers, drift, order effect."""

import math
from collections.abc import Sequence

from selab import units
from selab.records import stats
from selab.records.estimate import MIN_PAIRS, block_pairs, log_ratio, pairs
from selab.records.flag_texts import flag
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
    """Return median(one) - median(other) and its standard error: 1.2533 sd sqrt(1/n + 1/m), with sd pooled.

    The deviation is the ordinary one, although spikes inflate it: a robust one needs more values. A false flag does
    more harm than a missing one, and outliers have a flag of their own.

    Source: 1.2533 = sqrt(pi / 2) is the asymptotic standard error of a normal sample's median over that of its mean.
    """
    means = [(values, stats.mean(values)) for values in (one, other)]
    squares = [(value - centre) ** 2 for values, centre in means for value in values]
    deviation = math.sqrt(math.fsum(squares) / (len(squares) - 2))
    error = math.sqrt(math.pi / 2) * deviation * math.sqrt(1 / len(one) + 1 / len(other))
    return stats.median(one) - stats.median(other), error


def _shift(values: Sequence[float]) -> tuple[float, float]:
    """Compare the last third of the values with the first."""
    third = len(values) // 3
    return _contrast(values[-third:], values[:third])


def _dispersion(logs: dict[str, list[float]]) -> list[Flag]:
    spreads = {arm: stats.robust_spread(values) for arm, values in logs.items()}
    arm = max(spreads, key=lambda name: spreads[name])
    if spreads[arm] <= _DISPERSION:
        return []
    return [flag("dispersion", arm=arm, spread=units.share(spreads[arm]))]


def _outliers(logs: dict[str, list[float]]) -> list[Flag]:
    far = total = 0
    for values in logs.values():
        centre, spread = stats.median(values), max(stats.robust_spread(values), _LEAST_SPREAD)
        far += sum(abs(value - centre) > _OUTLIER_SPREADS * spread for value in values)
        total += len(values)
    if far <= _OUTLIER_SHARE * total:
        return []
    return [flag("outliers", far=far, total=total, limit=_OUTLIER_SPREADS)]


def _drift(logs: dict[str, list[float]], ratios: Sequence[float]) -> list[Flag]:
    level, level_error = _shift(logs["baseline"])
    # Over whole ABBA blocks, whose two pairs have opposite orders: an order effect is not a drift.
    ratio, ratio_error = _shift([(one + other) / 2 for one, other in zip(ratios[0::2], ratios[1::2], strict=True)])
    found = []
    if abs(level) > max(_LEVEL_DRIFT, _SURE * level_error):
        found.append(f"the baseline's time changed by {units.percent(math.expm1(level), decimals=1)}")
    if abs(ratio) > max(_RATIO_DRIFT, _SURE * ratio_error):
        found.append(f"the ratio changed by {units.percent(math.expm1(ratio), decimals=1)}")
    return [flag("drift", changes=" and ".join(found))] if found else []


def _order_effect(ratios: Sequence[float]) -> list[Flag]:
    # Of each ABBA block the caller passes the pair first whose baseline ran first.
    contrast, error = _contrast(ratios[0::2], ratios[1::2])
    effect = contrast / 2
    if abs(effect) <= max(_ORDER_EFFECT, _SURE * error / 2):
        return []
    size = units.share(abs(math.expm1(effect)))
    return [flag("order_effect", effect=size, direction="slower" if effect > 0 else "faster")]


def run_flags(run: Run, statistic: Statistic) -> tuple[Flag, ...]:
    """Return the flags of one run: from its samples, and those that its sampler noted.

    Flags mark samples and never remove them.
    """
    flags = [] if run.steady else [flag("no_steady_state", seconds=run.warmup_s, calls=run.warmup_calls)]
    if 2 * len(run.quads) >= MIN_PAIRS:
        both = pairs(run, statistic)
        logs = {
            "baseline": [math.log(baseline) for baseline, _ in both],
            "variant": [math.log(variant) for _, variant in both],
        }
        ratios = [log_ratio(*pair) for block in run.quads for pair in _baseline_first(block, statistic)]
        flags += [*_dispersion(logs), *_outliers(logs), *_drift(logs, ratios), *_order_effect(ratios)]
    return (*flags, *run.flags)


def _baseline_first(block: ABBABlock, statistic: Statistic) -> tuple[tuple[float, float], tuple[float, float]]:
    one, other = block_pairs(block, statistic)
    return (one, other) if block.order == "ABBA" else (other, one)


def merged_flags(runs: Sequence[Run], statistic: Statistic) -> tuple[Flag, ...]:
    """Return each flag once, with the detail of the first run that has it and the number of runs that do."""
    shown: dict[str, list[str]] = {}
    for run in runs:
        for name, detail in {one.name: one.detail for one in reversed(run_flags(run, statistic))}.items():
            shown.setdefault(name, []).append(detail)
    if len(runs) == 1:
        return tuple(Flag(name=name, detail=details[0]) for name, details in sorted(shown.items()))
    return tuple(
        Flag(name=name, detail=f"in {len(details)} of {units.counted(len(runs), 'process', 'processes')}: {details[0]}")
        for name, details in sorted(shown.items())
    )
