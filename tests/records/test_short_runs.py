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
    logs = [math.log(ratio) for ratio in (0.99, 1.0, 1.02)]
    centre = sum(logs) / 3
    half = 4.302652729911275 * math.sqrt(sum((one - centre) ** 2 for one in logs) / 2) / math.sqrt(3)
    floor = estimate.noise_floor(runs(0.99, 1.0, 1.02), "floor", unit="process")
    assert floor == pytest.approx(abs(math.exp(centre) - 1) + half)


def test_the_width_of_the_controls_is_that_of_all_processes():
    """Of three controls alone Student's t is 4.3; six processes tell more of how much they differ."""
    controls, compared = (0.99, 1.0, 1.02), (1.05, 1.10, 1.06, 1.08, 1.07, 1.09)
    squares = 0.0
    for ratios in (controls, compared):
        logs = [math.log(ratio) for ratio in ratios]
        squares += sum((one - sum(logs) / len(logs)) ** 2 for one in logs)
    # Of seven degrees of freedom, 97.5 %.
    half = 2.3646242510102993 * math.sqrt(squares / 7) / math.sqrt(3)
    centre = sum(math.log(ratio) for ratio in controls) / 3
    floor = estimate.noise_floor(runs(*controls), "floor", unit="process", runs=runs(*compared))
    assert floor == pytest.approx(abs(math.exp(centre) - 1) + half)


def test_a_difference_above_a_wide_floor_is_a_result():
    compared, controls = runs(1.14, 1.16, 1.15, 1.15), runs(0.94, 1.06, 1.0)
    found = summary(compared, controls)
    assert found.noise_floor > verdict.WIDEST_HALF_WIDTH
    assert found.verdict_kind == "slower"
    assert verdict.check(found) == found
    below = summary(runs(1.03, 1.05, 1.04, 1.04), controls)
    assert below.verdict_kind == "no_result"
    assert "control: the baseline against itself shows up to" in below.verdict


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
