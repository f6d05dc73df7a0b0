import math
import random

import pytest

from selab.records.types import Machine
from selab.training.recipe import recipes
from selab.training.record import Accuracy, AccuracyRecord, DataSpec, Options, Seed, SeedOutcome
from selab.training.verdict import compare_verdict, judge


def outcome(top1_correct, top5_correct=9900, loss=0.3):
    test = Accuracy(images=10_000, top1_correct=top1_correct, top5_correct=top5_correct, loss=loss)
    return SeedOutcome(test=test, seconds=45.0, images_per_s=2500.0, epochs=())


def record_of(baseline, variant, *, complete=True, **fields):
    """One seed for each pair of outcomes; None where one is not finished."""
    return AccuracyRecord(
        selab="0.1.0",
        arch="se_x",
        baseline="x",
        origin="",
        baseline_origin="",
        facts_hash="a",
        baseline_facts_hash="b",
        created="",
        command="",
        complete=complete,
        data=DataSpec(
            name="d",
            title="D",
            sha256="c",
            official=False,
            num_classes=10,
            input_chw=(3, 8, 8),
            train_size=50_000,
            test_size=10_000,
        ),
        recipe=next(iter(recipes().values())),
        options=Options(),
        machine=Machine(
            name="m",
            cpu="M",
            cores=2,
            memory_bytes=1,
            gpu=None,
            gpu_memory_bytes=None,
            driver=None,
            system="Linux",
            python="3.11",
            libraries={},
        ),
        seeds=tuple(
            Seed(seed=seed, baseline=left, variant=right)
            for seed, (left, right) in enumerate(zip(baseline, variant, strict=True))
        ),
    )


def test_levels_and_difference_by_hand():
    # Baseline 90.0, 90.2, 90.1 %; the variant is better by 1.0, 0.8, 0.9 points.
    record = record_of([outcome(n) for n in (9000, 9020, 9010)], [outcome(n) for n in (9100, 9100, 9100)])
    top1 = compare_verdict(record).score
    assert (top1.baseline.mean, top1.variant.mean) == (pytest.approx(90.1), 91.0)
    assert (top1.baseline.deviation, top1.variant.deviation) == (pytest.approx(0.1), 0.0)
    assert top1.baseline.text == "90.10 ± 0.10 % (3 seeds)"
    assert top1.variant.text == "91.00 ± 0.00 % (3 seeds)"
    assert top1.difference.mean == pytest.approx(0.9)
    # t = 4.302653 at two degrees of freedom, s = 0.1: 4.302653 * 0.1 / sqrt(3) = 0.2484.
    assert top1.difference.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert top1.difference.kind == "better"
    assert top1.difference.text == "se_x better by 0.90 ± 0.25 points (3 seeds)"
    assert top1.difference.seeds_needed is None


def test_what_both_networks_owe_to_the_seed_drops_out():
    # The levels spread by points, the differences by hundredths.
    before, after = (8500, 9000, 9500), (8509, 9010, 9511)
    record = record_of([outcome(n) for n in before], [outcome(n) for n in after])
    top1 = compare_verdict(record).score
    assert top1.baseline.deviation == pytest.approx(5.0)
    # 4.302653 * 0.01 / sqrt(3) = 0.0248.
    assert top1.difference.text == "se_x better by 0.100 ± 0.025 points (3 seeds)"


def test_the_other_way_round_it_is_worse_by_as_much():
    one, other = [outcome(n) for n in (9000, 9020, 9010)], [outcome(n) for n in (9100, 9100, 9100)]
    found = compare_verdict(record_of(other, one)).score.difference
    assert (found.kind, found.text) == ("worse", "se_x worse by 0.90 ± 0.25 points (3 seeds)")
    assert found.mean == pytest.approx(-0.9)


def test_less_loss_is_better():
    left = [outcome(9000, loss=loss) for loss in (0.300, 0.320, 0.310)]
    right = [outcome(9000, loss=loss) for loss in (0.280, 0.298, 0.289)]
    loss = compare_verdict(record_of(left, right)).loss
    # Differences -0.020, -0.022, -0.021: 4.302653 * 0.001 / sqrt(3) = 0.00248.
    assert loss.difference.text == "se_x better by 0.0210 ± 0.0025 in loss (3 seeds)"
    assert loss.difference.mean == pytest.approx(-0.021)
    assert loss.baseline.text == "0.310 ± 0.010 (3 seeds)"
    assert compare_verdict(record_of(right, left)).loss.difference.kind == "worse"


def test_top5_has_its_own_words_and_is_left_out_where_it_was_not_counted():
    left = [outcome(9000, top5_correct=n) for n in (9900, 9910, 9905)]
    right = [outcome(9000, top5_correct=n) for n in (9950, 9950, 9950)]
    found = compare_verdict(record_of(left, right))
    assert found.more.difference.text == "se_x better by 0.45 ± 0.12 points of top-5 (3 seeds)"
    few = [outcome(9000, top5_correct=None)] * 3
    assert compare_verdict(record_of(few, few)).more is None


def test_nothing_shown_says_how_many_seeds_would_show_it():
    # Mean -0.1, deviation 0.2: half an effect size of 1, so that 34 pairs are needed (G*Power, two-sided, power 0.8).
    step = 0.2 * math.sqrt(5 / 6)
    differences = [-0.1 + sign * step for sign in (1, -1, 1, -1, 1, -1)]
    found = judge("se_x", "top1", differences)
    # t = 2.570582 at five degrees of freedom: 2.570582 * 0.2 / sqrt(6) = 0.2099.
    assert found.text == (
        "no difference shown with 6 seeds (-0.10 ± 0.21 points); "
        "about 34 seeds would be needed to show one of this size in 4 of 5 comparisons"
    )
    assert (found.kind, found.seeds_needed) == ("not_shown", 34)
    assert judge("se_x", "loss", differences).text.startswith("no difference shown with 6 seeds (-0.10 ± 0.21 in loss)")


def test_two_seeds_say_nothing_of_how_many_are_needed():
    found = judge("se_x", "top1", [1.0, -0.5])
    assert found.seeds_needed is None
    assert judge("se_x", "top1", [1.0, 1.1]).text == "se_x better by 1.05 ± 0.64 points (2 seeds; run at least 3)"
    assert found.text == "no difference shown with 2 seeds; run at least 3 (+0.2 ± 9.5 points)"


def test_where_no_number_of_seeds_would_do():
    tiny = judge("se_x", "top1", [1.001, -1.0, 1.0, -1.0])
    assert tiny.text.endswith("; 1000 seeds or more would be needed to show one of this size in 4 of 5 comparisons")
    assert "(+0.0 ± 1.8 points)" in tiny.text
    none = judge("se_x", "top1", [0.5, -0.5])
    # tan(0.475 pi) sqrt(0.5) / sqrt(2) = 6.353.
    assert none.text == "no difference shown with 2 seeds; run at least 3 (+0.0 ± 6.4 points)"
    assert none.seeds_needed is None


def test_a_negative_difference_that_rounds_to_zero_has_no_minus():
    assert "(+0.0 ± 1.8 points)" in judge("se_x", "top1", [-1.001, 1.0, -1.0, 1.0]).text


def test_one_seed_shows_no_uncertainty():
    found = compare_verdict(record_of([outcome(9000)], [outcome(9100)])).score
    assert found.difference.text == "one seed shows no uncertainty; run at least 3"
    assert (found.difference.kind, found.difference.seeds, found.difference.half_width) == ("one_seed", 1, None)
    assert found.difference.mean == pytest.approx(1.0)
    assert (found.variant.text, found.variant.deviation) == ("91.00 % (1 seed)", None)


def test_the_same_difference_from_every_seed_is_no_certainty():
    # 0.12 points each time, though the percentages as floats differ by three different numbers.
    before, after = (1010, 9010, 4010), (1022, 9022, 4022)
    assert len({100 * right / 10_000 - 100 * left / 10_000 for left, right in zip(before, after, strict=True)}) == 3
    found = compare_verdict(record_of([outcome(n) for n in before], [outcome(n) for n in after])).score.difference
    assert found.kind == "no_spread"
    expected = "the same difference from every seed, +0.12 points (3 seeds), shows no uncertainty; run more seeds"
    assert (found.text, found.mean, found.half_width) == (expected, 0.12, None)
    same = [outcome(9000)] * 2
    assert "+0.00 points (2 seeds)" in compare_verdict(record_of(same, same)).score.difference.text


def test_only_seeds_that_both_have_finished_count():
    left = [outcome(9000), outcome(9020), outcome(9010), outcome(5000)]
    right = [outcome(9100), outcome(9100), outcome(9100), None]
    found = compare_verdict(record_of(left, right, complete=False)).score
    assert found.difference.text == "se_x better by 0.90 ± 0.25 points (3 seeds, unfinished)"
    assert found.baseline.text == "90.10 ± 0.10 % (3 seeds)"
    nothing = compare_verdict(record_of([outcome(9000)], [None], complete=False))
    assert (nothing.score.baseline, nothing.score.variant, nothing.more) == (None, None, None)
    assert nothing.score.difference.text == "no seed is finished for both networks"
    assert nothing.loss.difference.kind == "no_seeds"


@pytest.mark.parametrize("metric", ["top1", "top5", "loss"])
@pytest.mark.parametrize(
    "differences", [[], [0.3], [0.3, 0.3], [0.3, -0.2], [0.3, 0.31, 0.32], [-0.3, -0.31, -0.32], [0.1, -0.1]]
)
def test_no_figure_without_the_number_of_seeds(metric, differences):
    found = judge("se_x", metric, differences)
    assert found.seeds == len(differences)
    if any(letter.isdigit() for letter in found.text.removesuffix("; run at least 3")):
        assert f"{len(differences)} seeds" in found.text
    assert (found.kind in {"better", "worse"}) == (found.half_width is not None and abs(found.mean) > found.half_width)


def test_where_there_is_no_difference_one_is_claimed_once_in_twenty():
    draw = random.Random(1)
    kinds = [judge("se_x", "top1", [draw.gauss(0, 0.3) for _ in range(5)]).kind for _ in range(2000)]
    # Four standard errors: 4 sqrt(0.05 * 0.95 / 2000) = 0.0195.
    assert sum(kind != "not_shown" for kind in kinds) / 2000 == pytest.approx(0.05, abs=0.0195)
