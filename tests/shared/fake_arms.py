"""Clocks and arms without a machine, for tests of the sampler."""

import math
import random

from selab.bench.sampler import Sample, WallArm
from selab.records import verdict


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
