"""Counting rules from outside."""

import doctest

import pytest
import torch
from torch import nn

from selab.cost import RULES, Rule, Work, register_rule
from selab.cost import rules as module
from selab.cost.count import count
from selab.errors import SpecError


@torch.library.custom_op("selab_test::outer", mutates_args=())
def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[:, :, None] * b[:, None, :]


@outer.register_fake
def _(a, b):
    return a.new_empty(*a.shape, b.shape[1])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 5))

    def forward(self, x):
        return outer(x, self.weight)


@pytest.fixture(autouse=True)
def table():
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)
    module.FOUND.clear()


def register(work, **options):
    register_rule("selab_test::outer", work, **options)


def test_a_rule_is_counted_from_then_on():
    assert count(Net(), (1, 3)).unknown == {"selab_test.outer": 1}
    register(lambda _args, out: Work(macs=out.numel(), other=2, other_flops=3), operands=(0, 1), name="outer product")
    cost = count(Net(), (1, 3))
    assert cost.unknown == {}
    assert (cost.macs.conv_linear, cost.macs.all, cost.flops) == (15, 17, 33)
    assert "outer product" in cost.by_operator
    register(lambda _args, _out: Work(), replace=True)
    assert count(Net(), (1, 3)).macs.all == 0


def test_a_rule_of_selab_can_be_replaced_on_request():
    relu = nn.ReLU()
    with pytest.raises(SpecError, match="register_rule 'aten::relu': is counted already, as 'relu'; give replace=True"):
        register_rule("aten::relu", lambda _args, _out: Work())
    register_rule("aten::relu", lambda _args, _out: Work(), replace=True)
    assert count(relu, (1, 3)).macs.all == 0


@pytest.mark.parametrize("operator", ["relu", "aten.relu", "aten::add.Tensor", 3])
def test_a_name_that_is_no_operator(operator):
    with pytest.raises(SpecError, match=r"expected library::name without an overload, such as aten::relu"):
        register_rule(operator, lambda _args, _out: Work())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (3, r"the counting rule of selab_test::outer returned 3; expected selab.cost.Work\(macs, other, other_flops\)"),
        (Work(macs=1.5), "returned macs=1.5; expected a whole number, 0 or more"),
        (Work(other=-1), "returned other=-1"),
        (Work(other_flops=True), "returned other_flops=True"),
        (None, "returned None"),
    ],
)
def test_nonsense_is_one_clear_line(result, message):
    register(lambda _args, _out: result)
    with pytest.raises(SpecError, match=message) as caught:
        count(Net(), (1, 3))
    assert "\n" not in str(caught.value)


def test_a_rule_that_fails():
    register(lambda args, _out: Work(macs=args[7]))
    with pytest.raises(SpecError, match="the counting rule of selab_test::outer fails: IndexError: "):
        count(Net(), (1, 3))
    with pytest.raises(SpecError, match="the rule is a int; expected a function"):
        register(3, replace=True)


def test_the_example_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(register_rule, "register_rule")
    output = []
    failed = doctest.DocTestRunner().run(test, out=output.append).failed
    assert not failed, "".join(output)


def test_every_rule_is_one():
    assert all(isinstance(rule, Rule) and name.count("::") == 1 for name, rule in RULES.items())
