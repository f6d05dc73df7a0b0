"""One time for a whole profile, divided among its processes."""

import pytest

from selab.experiments.schedule import Schedule


def schedule(now, **changes):
    return Schedule(**{"end": 80.0, "runs": 6, "processes": 8, "clock": lambda: now[0]} | changes)


def test_the_first_process_takes_its_share_of_the_time():
    # (80 / 8 - 3 to start) / 6 runs, less 0.5 beside the sampling; every second process samples twice.
    assert schedule([0.0]).sampling_s() == pytest.approx(((80 / 8 - 3) / 6 - 0.5) / 1.5)


def test_what_a_process_showed_is_used_for_the_next():
    now = [12.0]
    plan = schedule(now)
    plan.ended(ready_s=2.0, elapsed_s=8.0, sampled_s=0.8)
    assert (plan.done, plan.left) == (1, 7)
    beside = 6.0 / 6 - 0.8
    assert plan.sampling_s() == pytest.approx(((68 / 7 - 2) / 6 - beside) / 1.5)


def test_a_time_that_is_over_leaves_the_least_sampling():
    now = [500.0]
    plan = schedule(now)
    assert plan.sampling_s() == 0.15
    assert plan.left == 8


def test_much_time_is_not_all_used():
    assert schedule([0.0], end=1e6).sampling_s() == 10.0
