"""Order statistics and the few others that the verdicts need, exact and distribution-free where that is possible."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

MAD_TO_DEVIATION = 1.4826
"""Median absolute deviation times this is the standard deviation, if the values are normal."""
MOST_SEEDS = 1000
"""`seeds_needed` counts no further: this answer means so many or more."""


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the middle two.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("median of no values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def mean(values: Sequence[float]) -> float:
    """Return sum(x) / n, with exact summation.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean of no values")
    return math.fsum(values) / len(values)


def sample_deviation(values: Sequence[float]) -> float:
    """Return sqrt(sum((x - mean)^2) / (n - 1)), in the values' unit.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"the deviation of {len(values)} values; two are needed")
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def robust_spread(values: Sequence[float]) -> float:
    """Return 1.4826 median(|x - median(x)|), a deviation that is robust against up to half of the values.

    Source: Hampel, The influence curve and its role in robust estimation, JASA 69 (1974), section 5.

    Raises:
        ValueError: no values.
    """
    centre = median(values)
    return MAD_TO_DEVIATION * median([abs(value - centre) for value in values])


@cache
def median_rank(count: int, confidence: float = 0.95) -> int | None:
    """Return the largest l, from 1, for which [x_(l), x_(n+1-l)] covers the median with at least `confidence`.

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
    """Return two order statistics that cover the median of the values' distribution.

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
    """Return P(|T| <= t) for Student's T with a whole number of degrees of freedom, as a finite trigonometric sum.

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
    """Return the t with P(|T| <= t) = `central`: 12.706 for one degree of freedom, towards 1.960 for many.

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


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), the interval of a share of successes.

    Unlike p ± z sqrt(p (1 - p) / n) it stays within [0, 1] and has a width at no and at all successes.

    Args:
        successes: how many of the trials, each independent of the others.
        trials: how many there were, from 1.
        confidence: the coverage that it has on the average over p.

    Returns:
        (low, high), shares of one.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927); Brown, Cai and
    DasGupta, Interval estimation for a binomial proportion, Statistical Science 16 (2001), section 3.1.1.

    Raises:
        ValueError: no trials, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials; from 0 to all of at least one are possible")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # At the ends the two terms cancel exactly, but for rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def paired_t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return mean ± t s / sqrt(n) with n - 1 degrees of freedom, the interval of the mean of normal differences.

    Args:
        differences: one per pair, in any unit; pairs are independent of each other.
        confidence: the coverage.

    Returns:
        (mean, half_width) in the differences' unit, or None where there are fewer than two.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if len(differences) < 2:
        return None
    error = sample_deviation(differences) / math.sqrt(len(differences))
    return mean(differences), student_quantile(len(differences) - 1, confidence) * error


def seeds_needed(differences: Sequence[float], *, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Return the least n >= 2 with n >= ((t_confidence + t_power) s / mean)², both at n - 1 degrees of freedom.

    So many pairs let a two-sided t test show a difference of the observed mean, if the observed deviation is the true
    one. Both are estimates, and of a few pairs rough ones: the answer is an order of magnitude, not a promise.

    Args:
        differences: one per pair.
        confidence: of the interval that has to leave zero out.
        power: how often it would, above 0.5.

    Returns:
        At most `MOST_SEEDS`, which stands for so many or more. None where no number is enough, for the mean is 0, and
        where fewer than two differences leave the deviation unknown.

    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences (1988), section 2.4, with Student's quantiles.

    Raises:
        ValueError: a power that is not above 0.5 and below 1.
    """
    if not 0.5 < power < 1:
        raise ValueError(f"a power of {power}; it lies above 0.5 and below 1")
    if len(differences) < 2 or (centre := mean(differences)) == 0:
        return None
    relative = sample_deviation(differences) / abs(centre)

    def enough(pairs: int) -> bool:
        quantiles = student_quantile(pairs - 1, confidence) + student_quantile(pairs - 1, 2 * power - 1)
        return pairs >= (quantiles * relative) ** 2

    # The quantiles fall as the pairs grow, so that what is enough stays enough.
    low, high = 2, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
