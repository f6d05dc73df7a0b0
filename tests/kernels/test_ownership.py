"""Who holds a feature map: references that are known, code that reads a variable again, and where an output goes."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from selab.kernels import ownership
from selab.kernels.call_sites import call_site
from selab.kernels.ownership import claim, is_exclusive, measured, route

pytestmark = pytest.mark.skipif(measured() is None, reason="this interpreter's counts do not show who holds a map")


class Asked(nn.Module):
    """Record whether its argument is exclusive, and where its output goes."""

    def __init__(self):
        super().__init__()
        self.exclusive, self.routes, self.consumers = [], [], ()

    def forward(self, x):
        references = sys.getrefcount(x)
        frame = sys._getframe(1)
        self.exclusive.append(is_exclusive(x, references, claim(frame, self)))
        self.routes.append(route(frame, self, self.consumers))
        return x + 1


class Holder(nn.Module):
    """Call `asked` in one of the ways below, each of which becomes its forward."""

    def __init__(self):
        super().__init__()
        self.asked, self.act, self.kept = Asked(), nn.ReLU(), []


def temporary(self, x, flag):
    return self.asked(x * 2)


def dead_variable(self, x, flag):
    y = x * 2
    y = self.asked(y)
    return self.act(y)


def read_on_one_path(self, x, flag):
    y = x * 2
    z = self.asked(y)
    return (z, y) if flag else z


def read_in_a_loop(self, x, flag):
    y = x * 2
    for _ in range(2):
        z = self.asked(y)
    return z


def read_by_a_handler(self, x, flag):
    y = x * 2
    try:
        return self.asked(y)
    except ValueError:
        return y


def of_the_caller(self, x, flag):
    return self.asked(x)


def in_a_list(self, x, flag):
    self.kept.append(x * 2)
    return self.asked(self.kept[-1])


def a_view_is_kept(self, x, flag):
    y = x * 2
    self.kept.append(y.flatten())
    return self.asked(y)


def memory_is_kept(self, x, flag):
    y = x * 2
    self.kept.append(y.untyped_storage())
    return self.asked(y)


def of_numpy(self, x, flag):
    return self.asked(torch.from_numpy(np.ones((1, 2), dtype=np.float32)))


def by_keyword(self, x, flag):
    return self.asked(x=x * 2)


def by_map(self, x, flag):
    maps = [x * 2]
    out = list(map(self.asked, maps))
    return out, maps


def by_forward(self, x, flag):
    return self.asked.forward(x * 2)


def by_locals(self, x, flag):
    y = x * 2
    y = self.asked(y)
    return y, len(locals())


WAYS = {
    one.__name__: one
    for one in (
        temporary,
        dead_variable,
        read_on_one_path,
        read_in_a_loop,
        read_by_a_handler,
        of_the_caller,
        in_a_list,
        a_view_is_kept,
        memory_is_kept,
        of_numpy,
        by_keyword,
        by_map,
        by_forward,
        by_locals,
    )
}


def made(way):
    return type("Net", (Holder,), {"forward": WAYS[way]})()


EXCLUSIVE = {"temporary", "dead_variable"}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad
def test_only_what_nothing_else_holds_is_exclusive(way):
    holder, x = made(way), torch.randn(1, 2)
    for _ in range(3):
        holder(x, False)
    assert set(holder.asked.exclusive) == {way in EXCLUSIVE}


@torch.no_grad
def test_a_hook_that_keeps_the_argument_is_seen():
    holder = made("dead_variable")
    holder(torch.randn(1, 2), False)
    holder.asked.register_forward_pre_hook(lambda *_: None)
    holder(torch.randn(1, 2), False)
    assert holder.asked.exclusive == [True, False]


@torch.no_grad
def test_an_argument_is_followed_through_the_calls_that_hand_it_on():
    asked = Asked()

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.asked = asked

        def forward(self, x):
            return self.asked(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x, flag):
            y = x * 2
            if flag:
                return self.inner(y), y
            return self.inner(y)

    outer = Outer()
    for flag in (False, True, False):
        outer(torch.randn(1, 2), flag)
    assert asked.exclusive == [True, False, True]


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.asked, self.act, self.same, self.other, self.optional = Asked(), nn.ReLU(), nn.Identity(), nn.Tanh(), None
        self.asked.consumers = (self.act,)
        self.kept = []


def routed(body):
    space = {}
    text = "\n".join(f"    {line}" for line in body.splitlines())
    exec(f"def forward(self, x, flag=False):\n{text}", space)
    made = type("Net", (Routed,), {"forward": space["forward"]})()
    with torch.no_grad():
        made(torch.randn(1, 2))
    found = made.asked.routes[0]
    return found is not None and found.consumer is made.act


@pytest.mark.parametrize(
    ("body", "reaches"),
    [
        ("return self.act(self.asked(x))", True),
        ("x = self.asked(x)\nx = self.act(x)\nreturn x", True),
        ("y = self.asked(x)\nx = self.same(y)\ny = None\nreturn self.act(x)", True),
        ("x = self.asked(x)\nx = self.same(x)\nreturn self.act(x)", True),
        ("x = self.asked(x)\nif self.optional is not None:\n    x = self.optional(x)\nreturn self.act(x)", True),
        ("x = self.asked(x)\nif flag:\n    return x\nreturn self.act(x)", False),
        ("x = self.asked(x)\nif flag:\n    self.kept.append(x)\nreturn self.act(x)", False),
        ("x = self.asked(x)\nself.last = x\nreturn self.act(x)", False),
        ("y = self.asked(x)\nreturn self.act(y), y", False),
        ("y = z = self.asked(x)\nreturn self.act(y)", False),
        ("return self.other(self.asked(x))", False),
        ("return self.act(input=self.asked(x))", False),
        ("return [self.act(one) for one in (self.asked(x),)]", False),
    ],
)
def test_a_route_is_one_that_leads_nowhere_else(body, reaches):
    assert routed(body) is reaches


def test_code_that_is_not_understood_is_not_analysed():
    async def coroutine(self, x):
        return self.asked(x)

    def generator(self, x):
        yield self.asked(x)

    for function in (coroutine, generator):
        offsets = range(0, len(function.__code__.co_code), 2)
        assert all(call_site(function.__code__, offset) is None for offset in offsets)


def test_an_interpreter_that_counts_otherwise_has_no_exclusive_maps(monkeypatch):
    monkeypatch.setattr(ownership, "getrefcount", lambda _: 3)
    assert measured.__wrapped__() is None
