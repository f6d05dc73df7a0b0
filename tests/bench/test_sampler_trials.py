"""The sampler on 2,000 fake machines: how often its interval holds the truth."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
from fake_arms import FakeClock, summarised

from selab.bench.sampler import Plan, WallArm, measure
from selab.records import estimate, verdict
from selab.records.types import Latency

# Every test reads the same trials.
pytestmark = pytest.mark.xdist_group("trials")


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
@pytest.mark.xdist_group("trials")
def test_two_thousand_trials(trials):
    assert len(trials) == 2000
    assert Counter(each.weather for each in trials) == dict.fromkeys(WEATHERS, TRIALS)


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
def test_coverage_at_a_fixed_number_of_pairs(trials):
    assert 0.93 <= share(trials, "covers_at_first_look") <= 0.985


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
def test_coverage_after_stopping(trials):
    assert 0.93 <= share(trials, "covers") <= 0.985


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
@pytest.mark.parametrize("weather", WEATHERS)
def test_no_weather_breaks_the_coverage(trials, weather):
    # 400 trials have a standard error of 1.1 %; the bounds are two of them outside the ones for all.
    alike = [each for each in trials if each.weather == weather]
    assert share(alike, "covers") >= 0.908
    assert share(alike, "covers_at_first_look") >= 0.908


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
def test_two_percent_is_detected_where_the_interval_is_narrow_enough(trials):
    narrow = [each for each in trials if each.ratio > 1 and each.half_width <= 0.01]
    assert len(narrow) > 900
    assert sum(each.kind == "slower" for each in narrow) / len(narrow) >= 0.95


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
def test_false_verdicts_are_rare(trials):
    for ratio in (1.0, 1.02):
        alike = [each for each in trials if each.ratio == ratio]
        assert share(alike, "false") <= 0.05


@pytest.mark.slow
@pytest.mark.xdist_group("trials")
def test_every_trial_is_reproduced_from_its_raw_samples(trials):
    for each in trials[::40]:
        verdict.check(each.latency)


def test_a_stubborn_machine_gets_no_verdict():
    machine = Machine("spikes", 1, 0.3)
    arms = [machine.arm(0.060), machine.arm(0.060 * 1.02)]
    run = measure(*arms, replace(Plan(), budget_s=10.0), clock=machine)["wall"]
    assert run.status == "budget"
    assert summarised([run], [run]).verdict_kind == "no_result"
