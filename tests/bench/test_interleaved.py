"""Networks as arms of one interleaved run; the GPU's arms are in test_latency, with its fake device."""

import re

import pytest
import torch
from torch import nn

from selab.bench.interleaved import measure_networks
from selab.bench.sampler import Plan
from selab.errors import ModelError, OutOfMemoryError

PLAN = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.1)
PAIRS = [("baseline", "again"), ("baseline", "other")]


def silent(label, state):
    pass


def broken(message="the toy is broken"):
    def make():
        raise RuntimeError(message)

    return make


def three(net, **more):
    return {"baseline": net, "again": net, "other": net, **more}


@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
def test_every_pair_has_its_run(phase, net, workload):
    told = []
    found = measure_networks(
        three(net), PAIRS, workload(), phase, PLAN, lambda label, state: told.append((label, state))
    )
    assert list(found.runs) == ["wall"]
    assert list(found.runs["wall"]) == PAIRS
    assert all(run.quads for run in found.runs["wall"].values())
    assert found.failed == {}
    assert [label for label, state in told if state is None] == [f"preparing {name}" for name in three(net)]
    assert told[-1][1].budget_s == 2 * PLAN.budget_s


def test_bytes_saved_for_backward_are_counted_in_training_only(net, workload):
    found = measure_networks(three(net), PAIRS, workload(), "forward_backward", PLAN, silent)
    assert set(found.saved_for_backward) == {"baseline", "again", "other"}
    assert min(found.saved_for_backward.values()) > 0
    assert measure_networks(three(net), PAIRS, workload(), "forward", PLAN, silent).saved_for_backward == {}


def with_nan(net):
    model = net()
    nn.init.constant_(model[4].bias, float("nan"))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: broken(), "bad: .*the toy is broken|bad fails: the toy is broken"),
        (lambda net: broken("can't allocate memory: 9 bytes"), "out of memory"),
        (lambda net: lambda: with_nan(net), "bad: its output holds NaN"),
    ],
)
def test_a_network_that_fails_is_named_and_the_others_go_on(make, message, net, workload):
    networks = three(net, bad=make(net))
    found = measure_networks(networks, [*PAIRS, ("baseline", "bad")], workload(), "forward", PLAN, silent)
    assert list(found.runs["wall"]) == PAIRS
    assert list(found.failed) == [("wall", "bad")]
    assert re.search(message, found.failed["wall", "bad"])


class OnlyInference(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.training:
            raise RuntimeError("not in training")
        return self.inner(x)


def test_messages_call_a_network_by_its_words(net, workload):
    told = []
    networks = three(net, bad=lambda: with_nan(net), still=lambda: OnlyInference(net()))
    found = measure_networks(
        networks,
        [*PAIRS, ("baseline", "bad"), ("baseline", "still")],
        workload(),
        "forward_backward",
        PLAN,
        lambda label, state: told.append(label),
        words_of=lambda name: f"the {name} one",
    )
    assert "preparing the bad one" in told
    assert found.failed["wall", "bad"].startswith("the bad one: its output holds NaN")
    assert found.failed["wall", "still"].startswith("the still one: forward_backward in train mode")


def test_a_network_that_fails_in_training_is_named(net, workload):
    def frozen():
        return net().requires_grad_(False)

    networks = three(net, bad=frozen)
    found = measure_networks(networks, [*PAIRS, ("baseline", "bad")], workload(), "forward_backward", PLAN, silent)
    assert "no parameter needs a gradient" in found.failed["wall", "bad"]
    assert list(found.runs["wall"]) == PAIRS


def test_without_the_first_network_nothing_can_be_measured(net, workload):
    networks = {**three(net), "baseline": broken("can't allocate memory: 9 bytes")}
    with pytest.raises(OutOfMemoryError):
        measure_networks(networks, PAIRS, workload(), "forward", PLAN, silent)

    def frozen():
        return net().requires_grad_(False)

    with pytest.raises(ModelError, match="no parameter"):
        measure_networks({**three(net), "baseline": frozen}, PAIRS, workload(), "forward_backward", PLAN, silent)


def test_random_state_and_threads_come_back(net, workload):
    networks = three(net)
    torch.manual_seed(5)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    measure_networks(networks, PAIRS, workload(), "forward", PLAN, silent)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_every_compiled_network_is_compiled_and_none_runs_eagerly_for_there_being_too_many(net, workload, monkeypatch):
    from torch._dynamo import config

    monkeypatch.setattr(torch, "compile", lambda network: network)
    limits = []

    def make():
        limits.append((config.recompile_limit, config.fail_on_recompile_limit_hit))
        return net()

    before = config.recompile_limit
    measure_networks(three(make), PAIRS, workload(compiled=True), "forward", PLAN, silent)
    assert set(limits) == {(64, True)}
    assert config.recompile_limit == before


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_frozen_while_networks_are_measured(net, workload, monkeypatch, frozen):
    from torch._inductor import config

    monkeypatch.setattr(torch, "compile", lambda network: network)
    seen = []

    def make():
        seen.append(config.freezing)
        return net()

    measure_networks(three(make), PAIRS, workload(compiled=True, frozen=frozen), "forward", PLAN, silent)
    assert set(seen) == {frozen}
    assert not config.freezing
