"""What two records may be said to differ in."""

import math

import msgspec
import pytest
from fake_runs import paired_run

from selab.errors import RecordError
from selab.experiments import diff
from selab.experiments.profiling import count_record
from selab.records import verdict
from selab.records.store import save
from selab.report import checks


@pytest.fixture
def profiled():
    counted = count_record("se_mobilenet_0_25", batch=1, counters=False)

    def make(ratio, *, control=1.0, wobble=1e-4, **changes):
        latency = verdict.summarise(
            phase="forward",
            method="wall",
            statistic="floor",
            threads=1,
            mode="eval",
            runs=[paired_run(ratio, wobble=wobble)],
            controls=[paired_run(control)],
        )
        return msgspec.structs.replace(counted, kind="profile", latency={"forward": latency}, **changes)

    return make


def test_a_shown_change_has_an_interval_around_the_ratio_of_ratios(profiled):
    (one,) = diff.ratio_changes(profiled(1.20), profiled(1.08))
    assert one.kind == "faster"
    assert one.change == pytest.approx(1.08 / 1.20 - 1)
    assert one.low < one.change < one.high < 0
    assert "forward: faster by 10." in one.text


def test_the_half_widths_add_in_quadrature(profiled):
    before, after = profiled(1.2, wobble=2e-3), profiled(1.5, wobble=3e-3)
    (one,) = diff.ratio_changes(before, after)
    halves = [
        math.log(latency.ratio_high / latency.ratio)
        for latency in (before.latency["forward"], after.latency["forward"])
    ]
    lows = [
        math.log(latency.ratio / latency.ratio_low) for latency in (before.latency["forward"], after.latency["forward"])
    ]
    centre = math.log(1.5 / 1.2)
    assert math.log1p(one.high) - math.log1p(one.change) == pytest.approx(math.hypot(halves[1], lows[0]), rel=1e-6)
    assert math.log1p(one.change) == pytest.approx(centre, abs=5e-3)


def test_the_same_again_shows_no_change(profiled):
    (one,) = diff.ratio_changes(profiled(1.1, wobble=2e-3), profiled(1.1, wobble=2e-3))
    assert one.kind == "not_shown"
    assert "no change shown; cannot exclude [" in one.text


def test_a_record_without_a_result_changes_nothing(profiled):
    noisy = profiled(1.1, control=1.3)
    assert noisy.latency["forward"].verdict_kind == "no_result"
    (one,) = diff.ratio_changes(noisy, profiled(1.1))
    assert one.kind == "no_result"
    assert "the first record has none" in one.text


def test_unequal_records_are_refused_by_field(profiled):
    record = profiled(1.1)
    work = msgspec.structs.replace(record.workload, batch=8, threads=2)
    place = msgspec.structs.replace(record.machine, name="other", cpu="Other")
    for change, words in (
        ({"workload": work}, ["workload.batch: 1 and 8", "workload.threads: 1 and 2"]),
        ({"machine": place}, ["machine.name: ", "machine.cpu: "]),
        ({"baseline": "resnet18"}, ["baseline: 'mobilenet_0_25' and 'resnet18'"]),
        ({"kind": "count"}, ["kind: 'profile' and 'count'"]),
    ):
        with pytest.raises(RecordError) as caught:
            diff.check_comparable(record, msgspec.structs.replace(record, **change), names=("a.json", "b.json"))
        assert str(caught.value).startswith("a.json and b.json: records differ in ")
        for word in words:
            assert word in str(caught.value)


def test_a_baseline_that_was_changed_is_another_one(profiled):
    before, after = profiled(1.1), profiled(1.1)
    cost = msgspec.structs.replace(after.baseline_cost, params=after.baseline_cost.params + 1)
    changed = msgspec.structs.replace(after, baseline_cost=cost)
    with pytest.raises(RecordError, match=f"records differ in baseline.params: {cost.params - 1} and {cost.params};"):
        diff.check_comparable(before, changed, names=("a", "b"))


def test_another_torch_is_told_and_not_refused(profiled):
    before, after = profiled(1.1), profiled(1.1)
    libraries = {**after.machine.libraries, "torch": "9.9"}
    after = msgspec.structs.replace(after, machine=msgspec.structs.replace(after.machine, libraries=libraries))
    diff.check_comparable(before, after, names=("a", "b"))
    assert any("9.9 after" in note for note in checks.diff_table(before, after).notes)


def test_what_grew_is_named(profiled):
    before, after = profiled(1.08), profiled(1.20)
    cost = msgspec.structs.replace(after.cost, params=after.cost.params + 1)
    assert diff.grew(before, msgspec.structs.replace(after, cost=cost)) == ["parameters", "forward"]
    assert diff.grew(after, before) == []


def test_the_shell_ends_with_one_where_it_should(selab, profiled, tmp_path):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    save(profiled(1.08), before)
    save(profiled(1.20), after)
    status, out, _ = selab("diff", before, after)
    assert status == 0
    assert "slower by 11." in out
    status, _, err = selab("diff", before, after, "--strict")
    assert status == 1
    assert "worse than" in err
    assert selab("diff", after, before, "--strict")[0] == 0
