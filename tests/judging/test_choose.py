"""Blocks are chosen one after the other, and never for more than was allowed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selab.judging.choose import Candidate, choose


def candidates(*paths, **why_not):
    found = [Candidate(path=path, spread=0.1, where=f"scale of {path}") for path in paths]
    return [*found, *(Candidate(path=path, spread=0.1, why_not=why) for path, why in why_not.items())]


def summed(costs, asked=None):
    def cost(sets):
        if asked is not None:
            asked.extend(sets)
        return [sum(costs[path] for path in paths) for paths in sets]

    return cost


def test_the_cheapest_first_and_one_that_does_not_fit_is_skipped():
    asked = []
    costs = {"a": 0.05, "b": -0.02, "c": 0.06, "d": 0.4}
    ranked = []
    found = choose(
        candidates(*costs, e="SiLU stands before it"), summed(costs, ranked), summed(costs, asked), limit=0.08
    )
    assert {one.path: one.folded for one in found} == {"a": True, "b": True, "c": False, "d": False, "e": False}
    assert [one.path for one in found] == ["a", "b", "c", "d", "e"]
    assert ranked == [("a",), ("b",), ("c",), ("d",)]
    # What decides has images of its own, and tries the first alone too.
    assert asked == [("b",), ("b", "a"), ("b", "a", "c"), ("b", "a", "d")]
    by = {one.path: one for one in found}
    assert by["a"].where == "scale of a"
    assert by["c"].why_not == by["d"].why_not == "it costs too much"
    assert (by["e"].why_not, by["e"].alone) == ("SiLU stands before it", None)


def test_nothing_can_be_folded():
    def never(_sets):
        raise AssertionError("nothing was to be tried")

    (one,) = choose(candidates(a="it does not run"), never, never, limit=1)
    assert not one.folded


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1, 1), min_size=1),
    st.floats(0, 1),
    st.floats(-0.5, 0.5),
)
def test_what_was_chosen_costs_no_more_than_the_limit(costs, limit, together):
    def cost(sets):
        # Blocks may cost more, or less, together than the sum of each.
        return [sum(costs[path] for path in paths) + together * (len(paths) - 1) for paths in sets]

    found = choose(candidates(*costs), cost, cost, limit=limit)
    chosen = [one for one in found if one.folded]
    if chosen:
        assert min(cost([[one.path for one in chosen]])[0], limit) == pytest.approx(
            cost([[one.path for one in chosen]])[0], abs=1e-9
        )
    assert all(bool(one.why_not) != one.folded for one in found)


def test_three_that_cost_too_much_end_the_search():
    costs = {"a": 0.0, "b": 0.5, "c": 0.6, "d": 0.7, "e": 0.8}
    asked = []
    found = choose(candidates(*costs), summed(costs), summed(costs, asked), limit=0.1)
    assert asked == [("a",), ("a", "b"), ("a", "c"), ("a", "d")]
    assert found[-1].why_not == "not tried: cheaper ones cost too much"
    assert found[-1].together is None


def test_the_luckiest_of_many_is_not_chosen_for_its_luck():
    """Twenty blocks that each cost 1: on every set of images some look free, but not the same ones on another set."""
    kept, halves = [], []
    for seed in range(200):
        draw = random.Random(seed)
        seen = [{f"b{place}": 1 + draw.gauss(0, 0.6) for place in range(20)} for _ in range(2)]
        ranking, deciding = (summed(one) for one in seen)
        names = candidates(*seen[0])
        kept.append(sum(one.folded for one in choose(names, ranking, deciding, limit=0.1)))
        halves.append(sum(one.folded for one in choose(names, ranking, ranking, limit=0.1)))
    assert sum(kept) < sum(halves) / 2
