"""The same SE block in other operators."""

import copy

import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.deploy.spelling import SPELLINGS, SpelledSE, Spelling, respelled, spelling_of
from selab.errors import UnknownNameError
from selab.models.build import build
from selab.models.catalog import find

KEPT = [name for name, spelling in SPELLINGS.items() if not spelling.gate]
X = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1))
BLOCKS = {
    "the paper's": {},
    "no biases": {"bias": False},
    "silu": {"activation": "silu"},
    "a hard gate": {"gate": "hardsigmoid"},
    "tanh": {"gate": "tanh"},
    "starts as the identity": {"init": "identity"},
    "starts as the identity, hard": {"init": "identity", "gate": "hardsigmoid"},
}


def block(**options):
    torch.manual_seed(0)
    made = SqueezeExcitation(16, 4, **options).eval()
    with torch.no_grad():
        # The second layer of an identity starts at zero.
        made.fc2.weight.normal_()
    return made


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_it_computes_the_same(name, options):
    net = nn.Sequential(block(**options))
    new, paths = respelled(net, spelling_of(name))
    assert paths == ("0",)
    assert isinstance(new[0], SpelledSE)
    torch.testing.assert_close(new(X), net(X))


@pytest.mark.parametrize("name", KEPT)
def test_the_relu_that_a_block_took_over(name):
    one = block()
    one.relu_in = True
    new, _ = respelled(nn.Sequential(one), spelling_of(name))
    torch.testing.assert_close(new(X), one(X.clone()))


def test_a_hard_gate_takes_the_place_of_a_sigmoid_only():
    hard = Spelling(gate="hardsigmoid")
    soft, tanh = (respelled(nn.Sequential(block(gate=gate)), hard)[0][0] for gate in ("sigmoid", "tanh"))
    assert isinstance(soft.gate, nn.Hardsigmoid)
    assert isinstance(tanh.gate, nn.Tanh)


def test_the_network_stays_as_it_was():
    net = nn.Sequential(block(), nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    new, _ = respelled(net, Spelling())
    with torch.no_grad():
        new[0].fc1.weight.zero_()
    assert type(net[0]) is SqueezeExcitation
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_a_block_that_is_used_twice_stays_one():
    one = block()
    new, paths = respelled(nn.Sequential(one, nn.ReLU(), one), Spelling())
    assert paths == ("0",)
    assert new[0] is new[2]


def hooked(one):
    one.fc1.register_forward_hook(lambda *_: None)


def replaced(one):
    one.fc1 = nn.Sequential(one.fc1)


def pruned(one):
    nn.utils.parametrizations.weight_norm(one.fc1)


@pytest.mark.parametrize("change", [hooked, replaced, pruned])
def test_layers_that_somebody_changed_are_called(change):
    one = block()
    change(one)
    new, paths = respelled(nn.Sequential(one), Spelling())
    assert paths == ()
    assert type(new[0]) is SqueezeExcitation


@pytest.mark.parametrize("squeeze", ["max", "none"])
def test_another_squeeze_stays(squeeze):
    assert respelled(nn.Sequential(block(squeeze=squeeze)), Spelling())[1] == ()


def test_blocks_that_were_inserted_into_a_residual_network():
    net = build(find("se_resnet20_cifar")).model.eval()
    new, paths = respelled(net, Spelling())
    assert len(paths) == 9
    assert not any(isinstance(one, SqueezeExcitation) for one in new.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(new(x), net(x))


def test_the_names():
    assert list(SPELLINGS) == [
        *("pool-conv", "pool-linear", "mean-conv", "mean-linear", "mean-sums"),
        *("pool-conv-enlarged", "pool-conv-hardsigmoid"),
    ]
    with pytest.raises(UnknownNameError, match=r"--spelling pool: there is no such spelling; allowed: pool-conv, "):
        spelling_of("pool")


# ------------------------------------------------------------------------------------------- exported without spelling
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_layers_themselves(strict):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), block())
    program = torch.export.export(net.eval(), (torch.randn(1, 3, 8, 8),), strict=strict)
    layers = [node for node in program.graph.nodes if node.target == torch.ops.aten.linear.default]
    stacks = [list(node.meta["nn_module_stack"].values())[-1][0] for node in layers]
    assert [stack.split("['")[-1].strip("']").split(".")[-1] for stack in stacks] == ["fc1", "fc2"]
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.sum.dim_IntList" not in targets
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), net(x))


def test_what_compiles_still_gets_the_compilers_form():
    seen = []

    def look(graph, _example):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op.startswith("call")})
        return graph

    torch.compiler.reset()
    torch.compile(block(), backend=look, fullgraph=True)(X)
    assert not any("linear" in name for name in seen[0])
