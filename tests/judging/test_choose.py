"""Blocks are chosen one after the other, and never for more than was allowed."""

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
    found = choose(candidates(*costs, e="SiLU stands before it"), summed(costs, asked), limit=0.08)
    assert {one.path: one.folded for one in found} == {"a": True, "b": True, "c": False, "d": False, "e": False}
    assert [one.path for one in found] == ["a", "b", "c", "d", "e"]
    assert asked == [("a",), ("b",), ("c",), ("d",), ("b", "a"), ("b", "a", "c")]
    by = {one.path: one for one in found}
    assert by["a"].where == "scale of a"
    assert by["c"].why_not == "it costs too much with the others"
    assert by["d"].why_not == "it costs too much alone"
    assert (by["e"].why_not, by["e"].alone) == ("SiLU stands before it", None)


def test_nothing_can_be_folded():
    def never(_sets):
        raise AssertionError("nothing was to be tried")

    (one,) = choose(candidates(a="it does not run"), never, limit=1)
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

    found = choose(candidates(*costs), cost, limit=limit)
    chosen = [one for one in found if one.folded]
    if chosen:
        assert min(cost([[one.path for one in chosen]])[0], limit) == pytest.approx(
            cost([[one.path for one in chosen]])[0], abs=1e-9
        )
    assert all(bool(one.why_not) != one.folded for one in found)
