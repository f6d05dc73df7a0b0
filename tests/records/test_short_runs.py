"""Short runs, each in a process of its own: the process is the sample."""

import math

import msgspec
import pytest
from fake_runs import paired_run

from selab.errors import RecordError
from selab.records import estimate, verdict
from selab.records.types import Flag

RATIOS = (1.05, 1.10, 1.06, 1.08)
# Student's t of three degrees of freedom, 97.5 %.
T3 = 3.182446305284263


def runs(*ratios, **fields):
    return [paired_run(ratio, blocks=2, wobble=0.0, **fields) for ratio in ratios]


def summary(found, controls, **changes):
    given = {"phase": "forward", "method": "wall", "statistic": "floor", "threads": 1, "mode": "eval"}
    return verdict.summarise(**given | changes, runs=found, controls=controls, unit="process")


def test_the_interval_is_student_s_over_the_processes_medians():
    logs = [math.log(ratio) for ratio in RATIOS]
    centre = sum(logs) / 4
    half = T3 * math.sqrt(sum((one - centre) ** 2 for one in logs) / 3) / math.sqrt(4)
    found = estimate.estimate(runs(*RATIOS), "floor", unit="process")
    assert found.ratio == pytest.approx(math.exp(centre), rel=1e-12)
    assert (found.ratio_low, found.ratio_high) == pytest.approx((math.exp(centre - half), math.exp(centre + half)))
    assert (found.processes, found.pairs) == (4, 16)


def test_all_controls_are_one_estimate():
    """Their mean; that they differ is in the interval of the comparison already."""
    ratios = (0.95, 1.0, 1.02)
    floor = estimate.noise_floor(runs(*ratios), "floor", unit="process")
    assert floor == pytest.approx(1 - math.prod(ratios) ** (1 / 3))
    with pytest.raises(estimate.InsufficientPairsError, match="1 of 2 processes"):
        estimate.noise_floor(runs(1.0), "floor", unit="process")


def test_no_difference_below_what_the_controls_show_is_a_result():
    compared = runs(1.030, 1.031, 1.032)
    assert summary(compared, runs(1.0, 1.01)).verdict_kind == "slower"
    assert summary(compared, runs(1.03, 1.04)).verdict_kind == "undecided"
    failed = summary(compared, runs(1.05, 1.06))
    assert failed.verdict_kind == "no_result"
    assert "control: the baseline against itself shows up to 5.5 %" in failed.verdict


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_processes_have_no_interval(count):
    found = summary(runs(*RATIOS[:count]), runs(1.0, 1.0, 1.001))
    assert (found.verdict_kind, found.ratio_low) == ("no_result", None)
    assert f"{count} of 3 processes that an interval needs" in found.verdict


def test_a_process_without_a_pair_does_not_count():
    empty = msgspec.structs.replace(paired_run(9.0), quads=())
    with pytest.raises(estimate.InsufficientPairsError, match="2 of 3 processes"):
        estimate.estimate([*runs(1.1, 1.2), empty], "floor", unit="process")
    assert estimate.centre_of([*runs(1.1), empty], "floor") == pytest.approx(1.1)
    assert estimate.centre_of([empty], "floor") is None


def test_the_verdict_names_the_processes_and_survives_a_reader():
    found = summary(runs(*RATIOS), runs(1.0, 1.0, 1.001))
    assert found.verdict_kind == "slower"
    assert found.verdict.endswith("; 4 processes")
    assert verdict.check(found) == found
    with pytest.raises(RecordError, match="ratio is stored as"):
        verdict.check(msgspec.structs.replace(found, unit="pair"))


def test_a_wide_interval_is_shown_and_called_too_noisy():
    found = summary(runs(0.8, 1.3, 1.1), runs(1.0, 1.0, 1.001))
    assert found.verdict_kind == "no_result"
    low, high = (round(100 * (bound - 1)) for bound in (found.ratio_low, found.ratio_high))
    assert verdict.change_words(found) == f"too noisy [{low}, {high}]"


def test_other_work_widens_the_interval_and_forbids_no_result():
    """Of several threads in one long run it does: there, the interval knows nothing of the next run."""
    busy = runs(*RATIOS, flags=(Flag(name="contention", detail="others"),))
    quiet = runs(1.0, 1.0, 1.001)
    assert summary(busy, quiet, threads=2).verdict_kind == "slower"
    long = [paired_run(1.08, flags=(Flag(name="contention", detail="others"),))]
    given = {"phase": "forward", "method": "wall", "statistic": "floor", "mode": "eval"}
    alone = verdict.summarise(**given, threads=2, runs=long, controls=[paired_run(1.0), paired_run(1.0)])
    assert alone.verdict_kind == "no_result"
