"""Order statistics and the few others that the verdicts need, exact and distribution-free where that is possible."""

import math
from collections.abc import Sequence
from functools import cache

MAD_TO_DEVIATION = 1.4826
"""Median absolute deviation times this is the standard deviation, if the values are normal."""


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("median of no values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def mean(values: Sequence[float]) -> float:
    """sum(x) / n, with exact summation.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean of no values")
    return math.fsum(values) / len(values)


def sample_deviation(values: Sequence[float]) -> float:
    """sqrt(sum((x - mean)^2) / (n - 1)), in the values' unit.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"the deviation of {len(values)} values; two are needed")
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def robust_spread(values: Sequence[float]) -> float:
    """1.4826 median(|x - median(x)|): a standard deviation that half of the values may be wrong without moving.

    Source: Hampel, The influence curve and its role in robust estimation, JASA 69 (1974), section 5.

    Raises:
        ValueError: no values.
    """
    centre = median(values)
    return MAD_TO_DEVIATION * median([abs(value - centre) for value in values])


@cache
def median_rank(count: int, confidence: float = 0.95) -> int | None:
    """The largest l for which [x_(l), x_(n+1-l)] holds the median with at least `confidence`, counted from 1.

    The interval misses on one side when fewer than l of n fair coins show heads; its coverage is therefore
    1 - 2 P(Binomial(n, 1/2) < l), whatever continuous distribution the values have.

    Returns:
        None where not even the extremes cover enough: below 6 values at 95 %.

    Source: Hahn and Meeker, Statistical Intervals (1991), section 5.2; David and Nagaraja, Order Statistics (2003),
    section 7.1.
    """
    missed = 0
    for rank in range(count // 2 + 1):
        # The sum of the binomial coefficients is an exact integer, so that no rank is off by rounding.
        missed += math.comb(count, rank)
        if 1 - 2 * missed / 2**count < confidence:
            return rank or None
    return None


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Two order statistics that hold the median of what the values were drawn from.

    Args:
        values: independent draws; their order plays no part.
        confidence: the least coverage; the true one is exact and at or above it.

    Returns:
        (low, high) in the values' unit, or None where there are too few (below 6 at 95 %).

    Source: as `median_rank`.
    """
    rank = median_rank(len(values), confidence)
    if rank is None:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def student_central(t: float, freedom: int) -> float:
    """P(|T| <= t) for Student's T with a whole number of degrees of freedom, as a finite trigonometric sum.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), equations 26.7.3 and 26.7.4.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom; at least one is needed")
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def student_quantile(freedom: int, central: float = 0.95) -> float:
    """The t with P(|T| <= t) = `central`: 12.706 for one degree of freedom, towards 1.960 for many.

    Args:
        freedom: degrees of freedom, a whole number from 1.
        central: the probability between -t and t; 0.95 makes it the 97.5 % quantile.
    """
    low, high = 0.0, 1.0
    while student_central(high, freedom) < central:
        high *= 2
    # Halving until neighbouring floats are reached: the sum is monotone, and this runs once per process count.
    while low < (middle := (low + high) / 2) < high:
        if student_central(middle, freedom) < central:
            low = middle
        else:
            high = middle
    return high
