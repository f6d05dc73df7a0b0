"""Several arms in one run: a ratio for each pair."""

import math
import random
from collections import Counter

import pytest
from fake_arms import FakeArm, FakeClock, sampling

from selab.bench.sampler import LOOKS, Discarded, Plan, WallArm, measure_together
from selab.records import estimate

TOGETHER = [("base", "again"), ("base", "one"), ("base", "two"), ("one", "two")]
TRUE = {"base": 1.0, "again": 1.0, "one": 1.04, "two": 1.25}


def many_arms(clock, *, call_s=0.060, drift=0.0, sigma=0.003, seed=0):
    """Arms of the true ratios on a machine that slows down by `drift` per second."""
    draws = {name: random.Random(f"{seed} {name}") for name in TRUE}

    def call(name):
        return lambda: clock.spend(
            call_s * TRUE[name] * math.exp(draws[name].gauss(0, sigma)) * (1 + drift * clock.now)
        )

    return {name: WallArm(call=call(name), clock=clock) for name in TRUE}


def estimates(found):
    return {pair: estimate.estimate([runs["wall"]], "floor") for pair, runs in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_ratios_of_several_arms_are_recovered_under_drift(seed):
    clock = FakeClock()
    found = measure_together(many_arms(clock, drift=0.01, seed=seed), TOGETHER, Plan(), clock=clock, seed=seed)
    assert list(found) == TOGETHER
    for (baseline, variant), one in estimates(found).items():
        assert one.ratio == pytest.approx(TRUE[variant] / TRUE[baseline], rel=0.005)
        assert one.ratio_low <= TRUE[variant] / TRUE[baseline] <= one.ratio_high


def test_pairs_swapped_give_reciprocals():
    def measured(pairs):
        clock = FakeClock()
        return estimates(measure_together(many_arms(clock), pairs, Plan(), clock=clock, seed=4))

    forth = measured(TOGETHER)
    back = measured([(variant, baseline) for baseline, variant in TOGETHER])
    for (baseline, variant), one in forth.items():
        assert one.ratio * back[variant, baseline].ratio == pytest.approx(1.0, abs=1e-9)


def test_a_spike_of_one_arm_touches_its_own_pairs_only():
    def quads(spiked):
        clock = FakeClock()
        arms = many_arms(clock, sigma=0.0)
        calls = []

        def call():
            calls.append(1)
            clock.spend(0.060 * 1.25 * (10 if spiked and len(calls) == 30 else 1))

        arms["two"] = WallArm(call=call, clock=clock)
        found = measure_together(arms, TOGETHER, Plan(), clock=clock, seed=2)
        return {pair: [block.floor for block in runs["wall"].quads] for pair, runs in found.items()}

    calm, disturbed = quads(False), quads(True)
    touched = [pair for pair in TOGETHER if calm[pair] != disturbed[pair]]
    assert len(touched) == 1
    assert "two" in touched[0]


def test_every_pair_has_one_blocks_in_each_round_in_an_order_of_the_seed():
    def rounds(seed):
        clock, diary = FakeClock(), []
        arms = {name: FakeArm(clock, 0.060, name, diary) for name in TRUE}
        found = measure_together(arms, TOGETHER, Plan(), clock=clock, seed=seed)
        assert {len(runs["wall"].quads) for runs in found.values()} == {10}
        taken = sampling(diary, found["base", "one"]["wall"].warmup_calls)
        names = [name for name, _ in taken]
        return [frozenset(names[at : at + 4]) for at in range(0, len(names), 4)]

    seen = rounds(3)
    expected = Counter(frozenset(pair) for pair in TOGETHER)
    each = [seen[at : at + 4] for at in range(0, len(seen), 4)]
    assert [Counter(one) for one in each] == [expected] * 10
    assert len(set(map(tuple, each))) > 1
    assert rounds(3) == seen
    assert rounds(4) != seen


def test_the_warm_up_goes_over_all_arms_in_turn_and_a_sample_fits_its_pair():
    clock, diary = FakeClock(), []
    arms = {
        name: FakeArm(clock, call_s, name, diary) for name, call_s in (("base", 0.001), ("fast", 0.001), ("slow", 0.1))
    }
    found = measure_together(arms, [("base", "fast"), ("base", "slow")], Plan(), clock=clock)
    warm = found["base", "fast"]["wall"].warmup_calls
    assert [name for name, _ in diary[:warm]] == ["base", "fast", "slow"] * (warm // 3)
    assert found["base", "fast"]["wall"].calls_per_sample == 10
    assert found["base", "slow"]["wall"].calls_per_sample == 1


def test_a_blocks_begins_with_a_settle_call_where_calls_are_short():
    clock, diary = FakeClock(), []
    arms = {name: FakeArm(clock, 0.004, name, diary) for name in TRUE}
    pairs = [("base", "again"), ("base", "one")]
    found = measure_together(arms, pairs, Plan(), clock=clock)
    after = sampling(diary, found["base", "one"]["wall"].warmup_calls)
    # Three changes of arm in ABBA or BAAB: settle, A, settle, B, B, settle, A.
    kinds = ["settle" if what == "settle" else "sample" for _, what in after]
    assert kinds == ["settle", "sample", "settle", "sample", "sample", "settle", "sample"] * (len(kinds) // 7)


def test_all_go_on_until_the_widest_is_narrow_enough():
    clock = FakeClock()
    arms = many_arms(clock, sigma=0.0)
    noise = random.Random(0)
    arms["two"] = WallArm(call=lambda: clock.spend(0.075 * math.exp(noise.gauss(0, 0.01))), clock=clock)
    found = {pair: runs["wall"] for pair, runs in measure_together(arms, TOGETHER, Plan(), clock=clock).items()}
    counts = {len(run.quads) for run in found.values()}
    assert len(counts) == 1
    assert counts <= LOOKS - {10}
    assert {run.status for run in found.values()} == {"converged"}


def test_the_budget_is_that_of_each_pair_and_its_status_says_which_was_too_wide():
    clock = FakeClock()
    arms = many_arms(clock, sigma=0.0, call_s=0.5)
    noise = random.Random(0)
    arms["two"] = WallArm(call=lambda: clock.spend(0.5 * math.exp(noise.gauss(0, 0.2))), clock=clock)
    seen = []
    found = measure_together(arms, TOGETHER, Plan(budget_s=30.0), clock=clock, progress=seen.append)
    assert {pair: runs["wall"].status for pair, runs in found.items()} == {
        ("base", "again"): "converged",
        ("base", "one"): "converged",
        ("base", "two"): "budget",
        ("one", "two"): "budget",
    }
    assert seen[-1].budget_s == 120.0
    assert seen[-2].elapsed_s < 120.0 <= seen[-1].elapsed_s
    assert seen[-1].half_width > 0.005
    total = sum(runs["wall"].elapsed_s for runs in found.values())
    assert total == pytest.approx(seen[-1].elapsed_s)


def test_a_void_blocks_of_several_pairs_is_run_again_within_its_round():
    clock, diary = FakeClock(), []
    arms = {name: FakeArm(clock, 0.060, name, diary) for name in TRUE}
    answers = iter([(), Discarded(reason="hot")] + [()] * 100)
    found = measure_together(arms, TOGETHER, Plan(), clock=clock, between_blocks=lambda: next(answers))
    assert {len(runs["wall"].quads) for runs in found.values()} == {10}
    flags = [flag.name for runs in found.values() for flag in runs["wall"].flags]
    assert flags == ["voided"]


def test_a_machine_that_voids_everything_ends_with_the_budget_of_all():
    clock, diary = FakeClock(), []
    arms = {name: FakeArm(clock, 0.5, name, diary) for name in TRUE}
    found = measure_together(
        arms, TOGETHER, Plan(budget_s=10.0), clock=clock, between_blocks=lambda: Discarded(reason="hot")
    )
    assert all(runs["wall"].quads == () for runs in found.values())


@pytest.mark.parametrize("pairs", [[], [("base", "nobody")]])
def test_pairs_of_unknown_arms_are_refused(pairs):
    clock = FakeClock()
    with pytest.raises(ValueError, match="the arms are"):
        measure_together(many_arms(clock), pairs, Plan(), clock=clock)
