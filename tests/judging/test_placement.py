"""What placements cost, which of them no other one beats, and their records."""

import json

import msgspec
import pytest

from selab.errors import RecordError
from selab.judging.placement import (
    Arm,
    Limit,
    Placement,
    SeedTest,
    Site,
    cost_of,
    differences,
    fill,
    front,
    last_ones,
    placement_json,
    read_placement,
)

SITES = tuple(
    Site(path=f"s{place}", channels=8, height=4, width=4, params=10 * (place + 1), macs=100, ratio=ratio)
    for place, ratio in enumerate([1.01, 0.99, 1.03])
)


def arm(name, cost, pct, *, stopped=False, tests=(), kind="tried"):
    return Arm(name=name, kind=kind, params=1, macs=1, cost=cost, held_out_pct=pct, stopped=stopped, tests=tests)


def test_costs_add_up():
    assert cost_of(SITES, (0, 2), Limit(quantity="params", ratio=1.1), params=1000, macs=10_000) == 1.04
    assert cost_of(SITES, (0, 2), Limit(quantity="macs", ratio=1.1), params=1000, macs=10_000) == 1.02
    # A block that looks faster than none costs nothing, and pays for no other one.
    latency = Limit(quantity="latency", ratio=1.1)
    assert cost_of(SITES, (0, 1, 2), latency, params=1, macs=1) == pytest.approx(1.04)
    assert cost_of(SITES, (), latency, params=1, macs=1) == 1


def test_sites_are_filled_by_score_as_long_as_they_fit():
    costs = [1.01, 1.02, 1.03, 1.01]
    assert fill([0.9, 0.8, 0.7, 0.6], costs, 1.03) == (0, 1)
    # What does not fit is left out, and the next one is tried.
    assert fill([0.6, 0.8, 0.9, 0.7], costs, 1.04) == (2, 3)
    assert fill([0.4, 0.4, 0.9, 0.4], costs, 1.5) == (2,)
    assert fill([0.1, 0.2, 0.3, 0.4], costs, 1.5) == ()
    assert fill([1.0, 1.0, 1.0, 1.0], costs, 1.07) == (0, 1, 2, 3)


@pytest.mark.parametrize("limit", [1.005, 1.01, 1.02, 1.05, 1.2])
def test_no_filling_exceeds_the_limit(limit):
    import random

    draw = random.Random(0)
    for _ in range(200):
        costs = [1 + draw.random() / 50 for _ in range(8)]
        chosen = fill([draw.random() for _ in costs], costs, limit)
        assert sum(costs[one] - 1 for one in chosen) <= limit - 1 + 1e-5


def test_the_last_sites():
    costs = [1.05, 1.01, 1.01, 1.01, 1.01]
    assert last_ones(costs, 1.03) == [(4,), (3, 4), (2, 3, 4)]
    assert last_ones(costs, 1.1) == [(4,), (3, 4), (1, 2, 3, 4), (0, 1, 2, 3, 4)]
    assert last_ones([1.05], 1.01) == []


def test_the_front_has_what_nothing_beats():
    arms = [
        arm("base", 1.0, 50),
        arm("worse", 1.01, 49),
        arm("a", 1.01, 52),
        arm("b", 1.02, 52),
        arm("c", 1.02, 53),
        arm("early", 1.0, 99, stopped=True),
        arm("untrained", 1.0, None),
    ]
    assert [one.name for one in front(arms)] == ["base", "a", "c"]


def test_differences_are_of_common_seeds():
    one = arm("a", 1, 1, tests=(SeedTest(seed=0, correct=60, images=100), SeedTest(seed=1, correct=61, images=100)))
    other = arm("b", 1, 1, tests=(SeedTest(seed=1, correct=60, images=100),))
    assert differences(one, other) == [pytest.approx(1.0)]


RECORD = Placement(
    arch="net",
    block="se",
    data="images",
    data_sha256="0",
    recipe="r",
    epochs=2,
    search_epochs=1,
    held_back=0.1,
    limit=Limit(quantity="latency", ratio=1.02),
    runtime="torch",
    threads=1,
    machine="m",
    sites=SITES,
    arms=(arm("original", 1.0, 50.0, kind="original"), arm("sites_0", 1.01, 51.0)),
)


def test_it_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(placement_json(RECORD))
    assert read_placement(path) == RECORD


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": []}, "sites: is empty"),
        ({"limit": {"quantity": "latency", "ratio": 1.0}}, "limit.ratio: is 1.0, expected above 1"),
        ({"limit": {"quantity": "energy", "ratio": 2.0}}, "limit.quantity"),
        ({"schema": "selab.gates/1"}, "is a record of another kind"),
    ],
)
def test_what_is_impossible(tmp_path, changes, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**msgspec.to_builtins(RECORD), **changes}))
    with pytest.raises(RecordError) as caught:
        read_placement(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": (7,)}, "arms[1].sites: names a site that is not there"),
        ({"held_out_pct": 101.0}, "arms[1].held_out_pct: is 101.0"),
        ({"cost": 0.0}, "arms[1].cost: is 0.0"),
        ({"name": "original"}, "arms: two have the same name"),
        ({"tests": (SeedTest(seed=0, correct=2, images=1),)}, "more right answers than images"),
    ],
)
def test_arms_that_are_impossible(tmp_path, changes, said):
    broken = msgspec.structs.replace(RECORD, arms=(RECORD.arms[0], msgspec.structs.replace(RECORD.arms[1], **changes)))
    path = tmp_path / "a.json"
    path.write_bytes(placement_json(broken))
    with pytest.raises(RecordError) as caught:
        read_placement(path)
    assert said in str(caught.value)
