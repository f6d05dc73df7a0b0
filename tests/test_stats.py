import math
import random
import statistics
from itertools import product

import pytest

from selab import stats


def test_median_of_odd_and_even_counts():
    assert stats.median([3.0, 1.0, 2.0]) == 2.0
    assert stats.median([4.0, 1.0, 3.0, 2.0]) == 2.5


@pytest.mark.parametrize("function", [stats.median, stats.mean, stats.robust_spread])
def test_no_values_have_no_summary(function):
    with pytest.raises(ValueError, match="no values"):
        function([])


def test_deviation_needs_two_values():
    with pytest.raises(ValueError, match="two are needed"):
        stats.sample_deviation([1.0])


def test_mean_and_deviation_agree_with_the_standard_library():
    draw = random.Random(1)
    values = [draw.gauss(5, 2) for _ in range(31)]
    assert stats.mean(values) == pytest.approx(statistics.fmean(values), rel=1e-15)
    assert stats.sample_deviation(values) == pytest.approx(statistics.stdev(values), rel=1e-12)


def test_robust_spread_of_normal_values_is_their_deviation_and_ignores_a_spike():
    draw = random.Random(2)
    values = [draw.gauss(0, 3) for _ in range(4001)]
    assert stats.robust_spread(values) == pytest.approx(3, rel=0.05)
    assert stats.robust_spread([*values, 1e9]) == pytest.approx(stats.robust_spread(values), rel=0.01)


# Two-sided 95 % ranks as printed in tables of the sign test (critical value plus one).
@pytest.mark.parametrize(
    ("count", "rank"),
    [(0, None), (1, None), (5, None), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10)],
)
def test_median_ranks_against_sign_test_tables(count, rank):
    assert stats.median_rank(count) == rank


@pytest.mark.parametrize("count", range(6, 13))
def test_coverage_by_counting_every_pattern_of_signs(count):
    rank = stats.median_rank(count)

    def coverage(rank):
        # x_(l) <= m <= x_(n+1-l) exactly if at least l of the values lie on each side.
        held = sum(rank <= sum(signs) <= count - rank for signs in product((0, 1), repeat=count))
        return held / 2**count

    assert coverage(rank) >= 0.95
    assert coverage(rank + 1) < 0.95


def test_interval_is_the_ranked_values_in_any_order():
    values = [float(value) for value in range(1, 21)]
    random.Random(3).shuffle(values)
    assert stats.median_interval(values) == (6.0, 15.0)
    assert stats.median_interval(values[:5]) is None


def test_interval_of_negated_values_is_the_negated_interval():
    draw = random.Random(4)
    values = [draw.gauss(0, 1) for _ in range(28)]
    low, high = stats.median_interval(values)
    assert stats.median_interval([-value for value in values]) == (-high, -low)


def test_interval_holds_the_median_of_a_skewed_distribution():
    draw = random.Random(5)
    held = 0
    for _ in range(2000):
        low, high = stats.median_interval([draw.expovariate(1) for _ in range(20)])
        held += low <= math.log(2) <= high
    # The exact coverage at 20 values is 1 - 2 * 21700 / 2^20.
    assert held / 2000 == pytest.approx(1 - 2 * 21700 / 2**20, abs=0.012)


# 97.5 % quantiles as printed in every table.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_student_quantiles_against_tables(freedom, quantile):
    assert stats.student_quantile(freedom) == pytest.approx(quantile, abs=0.0005)


def test_student_quantiles_in_closed_form():
    assert stats.student_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert stats.student_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_student_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="at least one"):
        stats.student_quantile(0)
