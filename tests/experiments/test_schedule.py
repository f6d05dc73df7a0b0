"""One time for a whole profile, divided among its processes."""

import pytest

from selab.experiments.job import Request
from selab.experiments.schedule import DEFAULT, QUICK, THOROUGH, Effort, Schedule, effort_of


def schedule(now, *, seconds=80.0, least=8, most=8, **changes):
    effort = Effort(seconds=seconds, least=least, most=most)
    return Schedule(**{"began": 0.0, "runs": 6, "effort": effort, "clock": lambda: now[0]} | changes)


def test_the_first_process_takes_its_share_of_the_time():
    # (80 / 8 - 3 to start) / 6 runs, less 0.5 beside the sampling; every second process samples twice.
    plan = schedule([0.0])
    assert plan.sampling_s() == pytest.approx(((80 / 8 - 3) / 6 - 0.5) / 1.5)
    assert plan.expected_s() == pytest.approx(80.0)


def test_what_a_process_showed_is_used_for_the_next():
    now = [12.0]
    plan = schedule(now)
    plan.ended(ready_s=2.0, elapsed_s=8.0, sampled_s=0.8)
    assert (plan.done, plan.left) == (1, 7)
    beside = 6.0 / 6 - 0.8
    assert plan.sampling_s() == pytest.approx(((68 / 7 - 2) / 6 - beside) / 1.5)


def test_a_time_that_is_over_leaves_the_least_processes_and_the_least_sampling():
    now = [500.0]
    assert (schedule(now, least=3, most=12).sampling_s(), schedule(now, least=3, most=12).left) == (0.4, 3)


@pytest.mark.parametrize(("of_one", "total"), [(10.0, 22), (40.0, 12), (60.0, 9), (200.0, 3), (600.0, 3)])
def test_the_fewest_processes_of_large_networks_fit_into_twice_the_time(of_one, total):
    now = [of_one]
    plan = schedule(now, seconds=300.0, least=12, most=24)
    plan.ended(ready_s=of_one / 2, elapsed_s=of_one, sampled_s=0.0)
    assert plan.total == total


def test_the_processes_that_were_asked_for_are_all_run():
    now = [5000.0]
    plan = schedule(now, seconds=30.0, least=9, most=9)
    plan.ended(ready_s=2000.0, elapsed_s=5000.0, sampled_s=0.4)
    assert plan.total == 9


def test_much_time_is_not_all_used():
    plan = schedule([0.0], seconds=1e6, most=20)
    assert (plan.sampling_s(), plan.total) == (2.0, 20)
    assert plan.expected_s() < 1e6


@pytest.mark.parametrize(("ready_s", "total"), [(1.0, 8), (6.0, 6), (8.0, 5), (30.0, 4)])
def test_as_many_processes_as_fit(ready_s, total):
    """After the first, 70 s are left; each takes its start and 6 runs of at least 0.55 + 0.6 s."""
    plan = schedule([10.0], least=4, most=8)
    plan.ended(ready_s=ready_s, elapsed_s=ready_s + 6.0, sampled_s=0.45)
    assert (plan.total, plan.left) == (total, total - 1)
    assert plan.total_words == f"about {total}"


def test_a_total_that_cannot_change_is_not_about():
    assert schedule([0.0], least=9, most=9).total_words == "9"
    late = schedule([500.0], least=3, most=12)
    assert late.total_words == "about 3"
    for _ in range(2):
        late.ended(ready_s=1.0, elapsed_s=8.0, sampled_s=0.4)
    assert late.total_words == "3"


@pytest.mark.parametrize(
    ("asked", "effort"),
    [
        ({}, DEFAULT),
        ({"quick": True}, QUICK),
        ({"thorough": True}, THOROUGH),
        ({"budget_s": 12.0}, Effort(seconds=12.0, least=3, most=THOROUGH.most)),
        ({"quick": True, "processes": 5}, Effort(seconds=QUICK.seconds, least=5, most=5)),
        ({"budget_s": 12.0, "processes": 9}, Effort(seconds=12.0, least=9, most=9)),
        ({"processes": 1}, Effort(seconds=DEFAULT.seconds, least=1, most=1)),
        ({"device": "cuda"}, Effort(seconds=DEFAULT.seconds, least=1, most=1)),
    ],
)
def test_a_budget_and_a_number_replace_those_of_the_degree(asked, effort):
    assert effort_of(Request(arch="se_small_cnn", **asked)) == effort
