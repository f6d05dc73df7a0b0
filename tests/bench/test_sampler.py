"""Samples, warm-up, quads and their order, when to stop, and what is thrown away."""

import gc
import json
import math
from collections import Counter

import msgspec
import pytest
from fake_arms import FakeArm, FakeClock, fake_arms, noisy_arms, sampling, summarised

from selab.bench import sampler
from selab.bench.sampler import LOOKS, Discarded, Plan, Sample, WallArm, measure
from selab.errors import SelabError
from selab.records import estimate, verdict
from selab.records import flags as records_flags
from selab.records.types import Flag, Latency

# ------------------------------------------------------------------------------------------------------------- samples


def test_wall_arm_times_each_call_with_its_synchronization():
    clock = FakeClock()
    durations = iter([0.005, 0.001, 0.003, 0.002])
    arm = WallArm(
        call=lambda: clock.spend(next(durations)),
        clock=clock,
        synchronize=lambda: clock.spend(0.010),
    )
    assert arm.warm_call() == pytest.approx(0.015)
    sample = arm.sample(3)["wall"]
    assert sample.min_s == pytest.approx(0.011)
    assert sample.median_s == pytest.approx(0.012)
    assert sample.mean_s == pytest.approx(0.012)
    assert clock.now == pytest.approx(4 * 0.010 + 0.011)


def test_a_window_has_one_figure_for_all_statistics():
    assert Sample.of_window(0.6, 3) == Sample(min_s=0.6 / 3, median_s=0.6 / 3, mean_s=0.6 / 3)


@pytest.mark.parametrize(
    ("call_s", "calls"),
    [
        (0.0001, 100),
        (0.001, 10),
        (0.003, 3),
        (0.010, 2),
        (0.049, 2),
        (0.050, 1),
        (3.0, 1),
    ],
)
def test_calls_per_sample(call_s, calls):
    assert sampler.calls_per_sample(call_s, Plan()) == calls


def test_gpu_samples_are_twice_as_long():
    assert sampler.calls_per_sample(0.001, Plan.for_gpu()) == 20


@pytest.mark.parametrize("call_s", [0.0, -1.0, math.nan, math.inf])
def test_a_call_without_time_is_refused(call_s):
    with pytest.raises(SelabError, match="finer clock"):
        sampler.calls_per_sample(call_s, Plan())


def test_a_clock_too_coarse_for_one_of_many_calls_is_refused():
    clock, diary, _, _ = fake_arms()

    class Coarse(FakeArm):
        def sample(self, calls):
            return {"wall": Sample.of_calls([self.call_s, 0.0])}

    with pytest.raises(SelabError, match="wall: a call took"):
        measure(Coarse(clock, 0.004, "A", diary), Coarse(clock, 0.004, "B", diary), Plan(), clock=clock)


# ------------------------------------------------------------------------------------------------------------- warm-up


def test_steady_arms_warm_up_for_the_least_time_and_alternate():
    clock, diary, a, b = fake_arms(0.004, 1.0)
    warm = sampler.warm_up((a, b), Plan(), clock)
    assert warm.steady
    assert 1.0 <= warm.elapsed_s < 1.0 + 3 * 0.008
    assert warm.calls_s == pytest.approx((0.004, 0.004))
    assert warm.calls == len(diary)
    assert diary == [("A", "settle"), ("B", "settle")] * (warm.calls // 2)


def test_slow_arms_warm_up_for_the_least_number_of_calls():
    clock, _, a, b = fake_arms(0.5, 1.0)
    warm = sampler.warm_up((a, b), Plan(), clock)
    assert warm.steady
    assert warm.calls == 12


def test_very_slow_arms_stop_at_the_cap():
    clock, _, a, b = fake_arms(8.0, 1.0)
    warm = sampler.warm_up((a, b), Plan(), clock)
    assert not warm.steady
    assert warm.calls == 4


def test_gpu_warms_up_longer():
    clock, _, a, b = fake_arms(0.004, 1.0)
    assert sampler.warm_up((a, b), Plan.for_gpu(), clock).elapsed_s >= 3.0


def test_warm_up_waits_for_a_machine_that_speeds_up():
    clock = FakeClock()
    arms = [WallArm(call=lambda: clock.spend(0.004 * (1 + 0.5 * math.exp(-clock.now))), clock=clock) for _ in range(2)]
    warm = sampler.warm_up(arms, Plan(), clock)
    assert warm.steady
    assert 3.0 < warm.elapsed_s < 10.0


def test_warm_up_without_a_steady_state_ends_at_the_cap_and_is_flagged():
    clock = FakeClock()
    arms = [WallArm(call=lambda: clock.spend(0.004 * (1 + 0.1 * clock.now)), clock=clock) for _ in range(2)]
    run = measure(*arms, Plan(target_half_width=0.5), clock=clock)["wall"]
    assert not run.steady
    assert 10.0 <= run.warmup_s < 10.1
    assert "no_steady_state" in {flag.name for flag in records_flags.run_flags(run, "floor")}


# ----------------------------------------------------------------------------------------------- quads, settling, looks


def test_order_of_the_blocks_is_the_coin_of_the_seed():
    def order_of(seed):
        clock, _, a, b = fake_arms()
        return [block.order for block in measure(a, b, Plan(), clock=clock, seed=seed)["wall"].quads]

    assert order_of(7) == order_of(7)
    assert order_of(7) != order_of(8)
    many = sampler.orders(3)
    counts = Counter(next(many) for _ in range(2000))
    assert set(counts) == {"ABBA", "BAAB"}
    assert 900 < counts["ABBA"] < 1100


def test_samples_stand_in_the_order_in_which_they_were_taken():
    clock, diary, a, b = fake_arms(0.004, 2.0)
    run = measure(a, b, Plan(), clock=clock)["wall"]
    seen = [name for name, what in sampling(diary, run.warmup_calls) if what != "settle"]
    assert "".join(seen) == "".join(block.order for block in run.quads)
    for block in run.quads:
        assert block.floor == pytest.approx([{"A": 0.004, "B": 0.008}[letter] for letter in block.order])


@pytest.mark.parametrize("seed", range(5))
def test_one_settle_call_after_each_change_of_arm(seed):
    clock, diary, a, b = fake_arms(0.004)
    run = measure(a, b, Plan(), clock=clock, seed=seed)["wall"]
    expected, last = [], ""
    for letter in "".join(block.order for block in run.quads):
        expected += [(letter, "settle")] if letter != last else []
        expected += [(letter, run.calls_per_sample)]
        last = letter
    assert sampling(diary, run.warmup_calls) == expected


def test_no_settle_calls_where_a_call_is_long():
    clock, diary, a, b = fake_arms(0.060)
    run = measure(a, b, Plan(), clock=clock)["wall"]
    assert sampling(diary, run.warmup_calls) == [(letter, 1) for block in run.quads for letter in block.order]


def test_looks_are_the_listed_ones():
    assert sorted(LOOKS)[:11] == [10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320]


def test_the_width_is_computed_at_the_listed_blocks_only(monkeypatch):
    looked = []

    def spy(quads, statistic):
        looked.append((len(quads), statistic))
        return 1.0

    monkeypatch.setattr(estimate, "half_width", spy)
    clock, _, a, b = fake_arms(0.060)
    run = measure(a, b, Plan(), clock=clock)["wall"]
    assert looked == [(count, "floor") for count in sorted(LOOKS) if count <= len(run.quads)]
    assert len(looked) > 6


def test_width_alone_stops():
    # A large, plain difference; nothing but the width may end the measurement.
    clock = FakeClock()
    arms = noisy_arms(clock, 0.060, 2.0, seed=1, sigma=0.02)
    run = measure(*arms, Plan(), clock=clock)["wall"]
    assert len(run.quads) > 20
    found = estimate.estimate([run], "floor")
    assert found.ratio_low > 1.5


def test_no_noise_stops_at_the_first_look():
    clock, _, a, b = fake_arms()
    run = measure(a, b, Plan(), clock=clock)["wall"]
    assert (run.status, len(run.quads)) == ("converged", 10)


def test_convergence_happens_at_a_look():
    for seed in range(20):
        clock = FakeClock()
        run = measure(*noisy_arms(clock, 0.060, 1.02, seed=seed), Plan(), clock=clock, seed=seed)["wall"]
        assert run.status == "converged"
        assert len(run.quads) in LOOKS
        assert estimate.half_width(run.quads, "floor") <= 0.005


def test_budget_stops_at_the_end_of_the_blocks():
    clock, _, a, b = fake_arms(0.5, 1.0)
    run = measure(a, b, Plan(budget_s=35.0, target_half_width=-1.0), clock=clock)["wall"]
    assert run.status == "budget"
    # Quads of 2 s: the eighteenth is the first to end at or after 35 s.
    assert len(run.quads) == 18
    assert run.elapsed_s == pytest.approx(36.0)


def test_a_run_that_spent_its_budget_says_so_though_a_part_went_between_the_blocks():
    clock, _, a, b = fake_arms(0.5, 1.0)
    plan = Plan(budget_s=60.0, target_half_width=-1.0)
    run = measure(a, b, plan, clock=clock, progress=lambda _: clock.spend(1.0))["wall"]
    assert len(run.quads) < 30
    # Whoever asks whether a record is long enough compares this with the budget.
    assert run.elapsed_s >= plan.budget_s


def test_a_slow_network_overruns_the_budget_until_it_has_an_interval():
    clock, _, a, b = fake_arms(1.0, 1.0)
    run = measure(a, b, Plan(budget_s=15.0, target_half_width=-1.0), clock=clock)["wall"]
    assert (run.status, len(run.quads), run.elapsed_s) == ("budget", 10, pytest.approx(40.0))


def test_a_budget_too_small_for_twenty_pairs_gives_no_result():
    clock, _, a, b = fake_arms(1.0, 1.0)
    run = measure(a, b, Plan(budget_s=5.0), clock=clock)["wall"]
    assert summarised([run], [run]).verdict.startswith("no result: 14 pairs in 28 s, 20 are needed")


def test_progress_reports_every_blocks():
    clock, _, a, b = fake_arms(0.5, 1.0)
    seen = []
    run = measure(a, b, Plan(), clock=clock, progress=seen.append)["wall"]
    assert [each.blocks for each in seen] == list(range(1, 11))
    assert [each.half_width for each in seen] == [None] * 9 + [pytest.approx(0.0, abs=1e-12)]
    assert seen[-1].elapsed_s == run.elapsed_s
    assert {each.budget_s for each in seen} == {60.0}


def test_plans():
    assert Plan.for_cpu() == Plan()
    assert (Plan().target_half_width, Plan().budget_s) == (0.005, 60.0)
    quick = Plan.for_gpu(method="graph", quick=True)
    assert (quick.target_half_width, quick.budget_s, quick.method) == (0.01, 15.0, "graph")
    assert (quick.warmup_least_s, quick.sample_s, quick.statistic) == (3.0, 0.020, "typical")
    control = quick.for_control()
    assert (control.target_half_width, control.budget_s, control.method) == (0.005, 7.5, "graph")


# -------------------------------------------------------------------------------------------------------- many methods


def test_two_methods_come_from_the_same_calls():
    clock, diary, a, b = fake_arms(methods=("eager_wall", "eager_event"))
    runs = measure(a, b, Plan.for_gpu(), clock=clock)
    assert set(runs) == {"eager_wall", "eager_event"}
    assert runs["eager_wall"] == runs["eager_event"]
    samples = [entry for entry in sampling(diary, runs["eager_wall"].warmup_calls) if entry[1] != "settle"]
    assert len(samples) == 40


def test_the_headline_method_decides_when_to_stop():
    class TwoClocks(WallArm):
        def sample(self, calls):
            wall = super().sample(calls)["wall"]
            return {"wall": wall, "event": Sample.of_window(0.004 * calls, calls)}

    def quads_by(method):
        clock = FakeClock()
        arms = [TwoClocks(call=arm.call, clock=clock) for arm in noisy_arms(clock, 0.060, 1.0, seed=1, sigma=0.02)]
        return {name: len(run.quads) for name, run in measure(*arms, Plan(method=method), clock=clock).items()}

    assert quads_by("event") == {"wall": 10, "event": 10}
    wall = quads_by("wall")
    assert wall["wall"] == wall["event"] > 20


def test_a_headline_that_no_arm_has_is_refused():
    clock, _, a, b = fake_arms()
    with pytest.raises(ValueError, match="headline is 'graph'"):
        measure(a, b, Plan(method="graph"), clock=clock)


def test_arms_with_different_methods_are_refused():
    clock, diary, a, _ = fake_arms()
    with pytest.raises(ValueError, match="another sample has"):
        measure(a, FakeArm(clock, 0.004, "B", diary, ("graph",)), Plan(), clock=clock)


# ------------------------------------------------------------------------------------------ flags, voids, interruptions


def test_flags_between_blocks_are_kept_once_and_counted():
    clock, _, a, b = fake_arms()
    answers = iter([[], [Flag(name="throttled", detail="84 °C")], [Flag(name="throttled", detail="85 °C")]] + [[]] * 7)
    run = measure(a, b, Plan(), clock=clock, between_blocks=lambda: next(answers))["wall"]
    assert run.flags == (Flag(name="throttled", detail="84 °C (at 2 of 10 ABBA blocks)"),)
    assert len(run.quads) == 10


def test_a_void_blocks_is_discarded_whole_and_run_again_in_the_same_order():
    clock, diary, a, b = fake_arms()
    answers = iter([[], Discarded(reason="hardware slowdown"), Discarded(reason="hardware slowdown")] + [[]] * 9)
    run = measure(a, b, Plan(), clock=clock, seed=5, between_blocks=lambda: next(answers))["wall"]
    coin = sampler.orders(5)
    order = [next(coin) for _ in range(10)]
    assert [block.order for block in run.quads] == order
    taken = "".join(name for name, what in sampling(diary, run.warmup_calls) if what != "settle")
    assert taken == order[0] + order[1] * 3 + "".join(order[2:])
    assert [flag.name for flag in run.flags] == ["voided"]
    assert run.flags[0].detail.startswith("hardware slowdown; ")
    assert run.flags[0].detail.endswith(" (at 2 of 12 ABBA blocks)")


def test_a_machine_that_voids_every_blocks_ends_with_the_budget():
    clock, _, a, b = fake_arms(0.5, 1.0)
    run = measure(a, b, Plan(budget_s=10.0), clock=clock, between_blocks=lambda: Discarded(reason="hot"))["wall"]
    assert (run.status, run.quads) == ("budget", ())
    assert summarised([run], [run]).verdict_kind == "no_result"


@pytest.fixture
def collector():
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_while_sampling_and_restored(collector, was_on):
    (gc.enable if was_on else gc.disable)()
    clock, states = FakeClock(), []

    def call():
        states.append(gc.isenabled())
        clock.spend(0.060)

    arm = WallArm(call=call, clock=clock)
    measure(arm, arm, Plan(), clock=clock)
    assert states
    assert not any(states)
    assert gc.isenabled() == was_on


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after_s", [0.3, 2.0])
def test_interruptions_pass_through_and_restore_the_collector(collector, stop, after_s):
    gc.enable()
    clock = FakeClock()

    def call():
        clock.spend(0.060)
        if clock.now > after_s:
            raise stop

    arm = WallArm(call=call, clock=clock)
    with pytest.raises(stop):
        measure(arm, arm, Plan(), clock=clock)
    assert gc.isenabled()


def test_an_exception_between_blocks_restores_the_collector(collector):
    gc.enable()
    clock, _, a, b = fake_arms()
    with pytest.raises(KeyError):
        measure(a, b, Plan(), clock=clock, between_blocks=lambda: {}["nothing"])
    assert gc.isenabled()


# --------------------------------------------------------------------------------- reproducible, and the same both ways


@pytest.mark.parametrize("call_s", [0.003, 0.060])
@pytest.mark.parametrize("seed", range(5))
def test_swapped_arms_give_the_reciprocal(call_s, seed):
    class EvenlySettling(WallArm):
        # A block's outer arm settles twice and its inner arm once: settling must not use up an arm's own noise.
        def warm_call(self):
            self.clock.spend(call_s)
            return call_s

        def sample(self, calls):
            return {"wall": Sample.of_calls([super(EvenlySettling, self).warm_call() for _ in range(calls)])}

    def estimated(swapped):
        clock = FakeClock()
        arms = [EvenlySettling(call=arm.call, clock=clock) for arm in noisy_arms(clock, call_s, 1.02, seed=seed)]
        run = measure(*(reversed(arms) if swapped else arms), Plan(), clock=clock, seed=seed)["wall"]
        return len(run.quads), estimate.estimate([run], "floor")

    (count, forth), (count_back, back) = estimated(False), estimated(True)
    assert count == count_back
    # The fake clock adds the same durations in another order, which costs the last digits.
    assert back.ratio * forth.ratio == pytest.approx(1, abs=1e-9)
    assert back.ratio_low * forth.ratio_high == pytest.approx(1, abs=1e-9)
    assert back.ratio_high * forth.ratio_low == pytest.approx(1, abs=1e-9)


def test_a_verdict_is_reproduced_from_the_raw_record():
    clock = FakeClock()
    runs = [measure(*noisy_arms(clock, 0.060, 1.02, seed=seed), Plan(), clock=clock)["wall"] for seed in range(3)]
    latency = summarised(runs[:1], runs[1:])
    raw = json.loads(msgspec.json.encode(latency))
    computed = {*verdict.FIGURES, "verdict", "verdict_kind", "flags"}
    stripped = msgspec.convert({name: value for name, value in raw.items() if name not in computed}, Latency)
    assert stripped.ratio is None
    assert verdict.recompute(stripped) == latency
