import gc
import json
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest

from selab.bench import sampler
from selab.bench.sampler import LOOKS, Discarded, Plan, Sample, WallArm, measure, measure_together
from selab.errors import SelabError
from selab.records import estimate, verdict
from selab.records import flags as records_flags
from selab.records.types import Flag, Latency


class FakeClock:
    """A clock that only passes when something spends time on it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


class FakeArm:
    """An arm of constant calls, which writes down what was asked of it."""

    def __init__(self, clock, call_s, name, diary, methods=("wall",)):
        self.clock, self.call_s, self.name, self.diary, self.methods = clock, call_s, name, diary, methods

    def warm_call(self):
        self.diary.append((self.name, "settle"))
        self.clock.spend(self.call_s)
        return self.call_s

    def sample(self, calls):
        self.diary.append((self.name, calls))
        self.clock.spend(calls * self.call_s)
        return {method: Sample.of_window(calls * self.call_s, calls) for method in self.methods}


def fake_arms(call_s=0.004, ratio=1.02, methods=("wall",)):
    clock, diary = FakeClock(), []
    arms = [FakeArm(clock, seconds, name, diary, methods) for name, seconds in (("A", call_s), ("B", call_s * ratio))]
    return clock, diary, *arms


def noisy_arms(clock, call_s, ratio, *, seed, sigma=0.01):
    """Two arms, each with a noise of its own, so that swapping them swaps their noise."""
    draws = [random.Random(f"{seed} {name}") for name in "AB"]

    def call(draw, seconds):
        return lambda: clock.spend(seconds * math.exp(draw.gauss(0, sigma)))

    return [
        WallArm(call=call(draw, seconds), clock=clock)
        for draw, seconds in zip(draws, (call_s, call_s * ratio), strict=True)
    ]


def sampling(diary, warmup_calls):
    return diary[warmup_calls:]


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


def summarised(runs, controls, target=0.005):
    return verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=runs,
        controls=controls,
        target_half_width=target,
    )


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


# -------------------------------------------------------------------------------------------------- 2,000 fake machines


class Machine(FakeClock):
    """A noisy machine: each call takes its time times log-normal noise times the machine's state at that moment."""

    def __init__(self, weather, seed, sigma):
        super().__init__()
        self.draw = np.random.default_rng(seed)
        self.weather, self.sigma = weather, sigma
        self.phase = float(self.draw.uniform(0, 2 * math.pi))
        self.step_at = math.inf
        self.slow, self.until = False, 0.0
        self.noise = iter(())

    def more_noise(self):
        noise = np.exp(self.sigma * self.draw.standard_normal(512))
        if self.weather == "spikes":
            noise = np.where(self.draw.random(512) < 0.08, noise * (1 + self.draw.exponential(1.0, 512)), noise)
        if self.weather == "bimodal calls":
            noise = np.where(self.draw.random(512) < 0.3, noise * 1.15, noise)
        return iter(noise.tolist())

    def state(self):
        if self.weather == "drift":
            return 1 + 0.1 * math.sin(2 * math.pi * self.now / 30 + self.phase)
        if self.weather == "step":
            return 2.0 if self.now > self.step_at else 1.0
        if self.weather == "bimodal":
            if self.now > self.until:
                self.slow, self.until = not self.slow, self.now + float(self.draw.exponential(1.0))
            return 1.2 if self.slow else 1.0
        return 1.0

    def work(self, seconds):
        factor = next(self.noise, None)
        if factor is None:
            self.noise = self.more_noise()
            factor = next(self.noise)
        self.spend(seconds * factor * self.state())

    def arm(self, seconds):
        return WallArm(call=lambda: self.work(seconds), clock=self)


@dataclass(frozen=True, kw_only=True)
class Trial:
    weather: str
    ratio: float
    latency: Latency

    @property
    def covers(self):
        return self.latency.ratio_low <= self.ratio <= self.latency.ratio_high

    @property
    def covers_at_first_look(self):
        run = self.latency.runs[0]
        found = estimate.estimate([msgspec.structs.replace(run, quads=run.quads[:10])], "floor")
        return found.ratio_low <= self.ratio <= found.ratio_high

    @property
    def half_width(self):
        return estimate.half_width(self.latency.runs[0].quads, "floor")

    @property
    def kind(self):
        return self.latency.verdict_kind

    @property
    def false(self):
        """A verdict that contradicts the truth: a difference that is not there, or none where there is one of 2 %."""
        return self.kind in ({"slower", "faster"} if self.ratio == 1 else {"faster", "equal"})


WEATHERS = ("quiet", "drift", "step", "spikes", "bimodal")
# Seconds a call and its noise: what reaches the control's width within the control's budget, most of the time.
NETWORKS = ((0.004, 0.03), (0.020, 0.02), (0.060, 0.01))
TRIALS = 400


def trial(weather, number):
    ratio = (1.0, 1.02)[number % 2]
    plan = Plan.for_cpu(quick=number % 4 >= 2)
    call_s, sigma = NETWORKS[number % 3]
    kind = "bimodal calls" if weather == "bimodal" and number % 8 >= 4 else weather
    seed = 1000 * WEATHERS.index(weather) + number
    machine = Machine(kind, seed, sigma)
    baseline, again, variant = (machine.arm(seconds) for seconds in (call_s, call_s, call_s * ratio))
    before = measure(baseline, again, plan.for_control(), clock=machine, seed=3 * seed)["wall"]
    machine.step_at = machine.now + machine.draw.uniform(0, 6)
    run = measure(baseline, variant, plan, clock=machine, seed=3 * seed + 1)["wall"]
    after = measure(baseline, again, plan.for_control(), clock=machine, seed=3 * seed + 2)["wall"]
    return Trial(weather=weather, ratio=ratio, latency=summarised([run], [before, after], plan.target_half_width))


@pytest.fixture(scope="module")
def trials():
    return [trial(weather, number) for weather in WEATHERS for number in range(TRIALS)]


def share(trials, name):
    assert len(trials) > 100
    return sum(getattr(each, name) for each in trials) / len(trials)


@pytest.mark.slow
def test_two_thousand_trials(trials):
    assert len(trials) == 2000
    assert Counter(each.weather for each in trials) == dict.fromkeys(WEATHERS, TRIALS)


@pytest.mark.slow
def test_coverage_at_a_fixed_number_of_pairs(trials):
    assert 0.93 <= share(trials, "covers_at_first_look") <= 0.985


@pytest.mark.slow
def test_coverage_after_stopping(trials):
    assert 0.93 <= share(trials, "covers") <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("weather", WEATHERS)
def test_no_weather_breaks_the_coverage(trials, weather):
    # 400 trials have a standard error of 1.1 %; the bounds are two of them outside the ones for all.
    alike = [each for each in trials if each.weather == weather]
    assert share(alike, "covers") >= 0.908
    assert share(alike, "covers_at_first_look") >= 0.908


@pytest.mark.slow
def test_two_percent_is_detected_where_the_interval_is_narrow_enough(trials):
    narrow = [each for each in trials if each.ratio > 1 and each.half_width <= 0.01]
    assert len(narrow) > 900
    assert sum(each.kind == "slower" for each in narrow) / len(narrow) >= 0.95


@pytest.mark.slow
def test_false_verdicts_are_rare(trials):
    for ratio in (1.0, 1.02):
        alike = [each for each in trials if each.ratio == ratio]
        assert share(alike, "false") <= 0.05


@pytest.mark.slow
def test_every_trial_is_reproduced_from_its_raw_samples(trials):
    for each in trials[::40]:
        verdict.check(each.latency)


def test_a_stubborn_machine_gets_no_verdict():
    machine = Machine("spikes", 1, 0.3)
    arms = [machine.arm(0.060), machine.arm(0.060 * 1.02)]
    run = measure(*arms, replace(Plan(), budget_s=10.0), clock=machine)["wall"]
    assert run.status == "budget"
    assert summarised([run], [run]).verdict_kind == "no_result"


# ------------------------------------------------------------------------------------------------------- many together


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
