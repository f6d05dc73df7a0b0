"""How unsteady a machine is, on a clock that only the repeated work advances."""

from random import Random

import pytest

from selab.bench.noise import expected_half_width, pair_deviation


class Work:
    def __init__(self, deviation):
        self.now, self.random, self.deviation = 0.0, Random(5), deviation
        self.speed, self.calls = 1.0, 0

    def __call__(self):
        # The machine's speed is another one for each sample of three calls.
        if self.calls % 3 == 0:
            self.speed = self.random.lognormvariate(0.0, self.deviation)
        self.calls += 1
        self.now += 0.003 * self.speed

    def clock(self):
        return self.now


def test_neighbouring_samples_are_compared():
    steady = Work(0.0)
    assert pair_deviation(steady, clock=steady.clock) == pytest.approx(0.0, abs=1e-12)
    noisy = Work(0.05)
    # The difference of two logarithms of deviation 0.05.
    assert pair_deviation(noisy, clock=noisy.clock) == pytest.approx(0.05 * 2**0.5, rel=0.4)


def test_more_processes_and_a_quieter_machine_have_narrower_intervals():
    # Student's t at eight degrees of freedom is 2.306: 2.306 * 0.015 / 3.
    assert expected_half_width(9, 0.0) == pytest.approx(0.01153, abs=1e-5)
    assert expected_half_width(9, 0.1) == pytest.approx(2.306 * (0.015**2 + 0.1**2 / 4) ** 0.5 / 3, rel=1e-3)
    assert expected_half_width(3, 0.0) > 2 * expected_half_width(6, 0.0)
    assert expected_half_width(9, 0.0, busy=0.5) == pytest.approx(2.306 * (0.015**2 + 0.06**2) ** 0.5 / 3, rel=1e-3)
    assert expected_half_width(9, 0.0, busy=1.2) == expected_half_width(9, 0.0, busy=1.0)


def test_the_work_of_this_machine():
    assert 0 <= pair_deviation() < 1
