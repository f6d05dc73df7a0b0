import math
import random
import statistics
from itertools import product

import pytest

from selab.records import stats


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


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson without continuity correction).
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_a_published_table(successes, trials, low, high):
    assert stats.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends_in_closed_form():
    z = statistics.NormalDist().inv_cdf(0.975)
    assert z == pytest.approx(1.959964, abs=1e-6)
    assert stats.wilson(0, 10) == (0.0, pytest.approx(z * z / (10 + z * z), rel=1e-12))
    assert stats.wilson(10, 10) == (pytest.approx(10 / (10 + z * z), rel=1e-12), 1.0)


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(3, 10, 0.95), (9876, 10_000, 0.95), (1, 3, 0.8)])
def test_wilson_ends_are_where_the_score_test_turns(successes, trials, confidence):
    # The interval is what a test of the share p0 with the error sqrt(p0 (1 - p0) / n) does not reject.
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    for end in stats.wilson(successes, trials, confidence):
        score = (successes / trials - end) / math.sqrt(end * (1 - end) / trials)
        assert abs(score) == pytest.approx(z, rel=1e-9)


def test_wilson_of_failures_is_mirrored():
    low, high = stats.wilson(7, 30)
    assert stats.wilson(23, 30) == (pytest.approx(1 - high), pytest.approx(1 - low))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 10), (11, 10)])
def test_wilson_of_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        stats.wilson(successes, trials)


def test_wilson_covers_by_adding_up_the_binomial():
    # Brown, Cai and DasGupta (2001), section 3.1: about the nominal coverage on the average over p, for any n.
    covered = []
    for step in range(1, 100):
        p = step / 100
        held = [k for k in range(41) if (ends := stats.wilson(k, 40))[0] <= p <= ends[1]]
        covered.append(math.fsum(math.comb(40, k) * p**k * (1 - p) ** (40 - k) for k in held))
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.01)


def test_paired_interval_of_the_first_published_t_test():
    # Student (1908), first illustration: extra sleep by one soporific over another, of ten patients.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    centre, half = stats.paired_t_interval(differences)
    assert centre == pytest.approx(1.58)
    # t = mean / (s / sqrt(n)) is 4.0621 in every textbook; 2.262157 is the quantile of 9 degrees of freedom.
    assert 2.262157 * centre / half == pytest.approx(4.0621, abs=5e-5)


def test_paired_interval_needs_two_pairs():
    assert stats.paired_t_interval([]) is None
    assert stats.paired_t_interval([1.0]) is None
    # The mean of -1 and 3 is 1, their deviation sqrt(8); t is tan(0.475 pi).
    assert stats.paired_t_interval([-1.0, 3.0]) == pytest.approx((1.0, 2 * math.tan(0.475 * math.pi)))
    assert stats.paired_t_interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_paired_interval_covers_as_often_as_it_says(count):
    draw = random.Random(count)
    held = 0
    for _ in range(4000):
        centre, half = stats.paired_t_interval([draw.gauss(0.7, 0.4) for _ in range(count)])
        held += abs(centre - 0.7) <= half
    # Four standard errors of 4000 draws: 4 sqrt(0.95 0.05 / 4000) = 0.0138.
    assert held / 4000 == pytest.approx(0.95, abs=0.0138)


def spread_out(mean, count=8):
    """Values whose mean is this and whose sample deviation is 1."""
    step = math.sqrt((count - 1) / count)
    return [mean + (step if index % 2 else -step) for index in range(count)]


# Cohen's d of 0.2, 0.5 and 0.8 are the textbook's small, medium and large effects; G*Power 3.1 gives these sizes for
# the two-sided test of the difference between two dependent means at 0.05 and a power of 0.8.
@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (-0.5, 34), (1.0, 10)])
def test_seeds_needed_against_published_sizes(effect, seeds):
    assert stats.seeds_needed(spread_out(effect)) == seeds


def test_seeds_needed_give_the_power_they_promise():
    draw = random.Random(7)

    def shown(count):
        centre, half = stats.paired_t_interval([draw.gauss(0.8, 1) for _ in range(count)])
        return abs(centre) > half

    # Four standard errors of 4000 draws are 0.025; one seed more or less is worth less than that.
    assert sum(shown(15) for _ in range(4000)) / 4000 == pytest.approx(0.8, abs=0.035)


def test_seeds_needed_has_an_end():
    assert stats.seeds_needed([1.0, -1.0]) is None
    assert stats.seeds_needed([0.5]) is None
    assert stats.seeds_needed([0.5, 0.5, 0.5]) == 2
    # (1.96 + 0.84)² / 0.08² is 1227.
    assert stats.seeds_needed(spread_out(0.08)) == stats.MOST_SEEDS == 1000
    with pytest.raises(ValueError, match=r"power of 0\.5"):
        stats.seeds_needed([1.0, 2.0], power=0.5)


def test_more_seeds_are_needed_wherever_nothing_is_shown():
    draw = random.Random(8)
    for _ in range(300):
        differences = [draw.gauss(0.2, 1) for _ in range(draw.randint(2, 9))]
        centre, half = stats.paired_t_interval(differences)
        if abs(centre) <= half:
            assert stats.seeds_needed(differences) > len(differences)
