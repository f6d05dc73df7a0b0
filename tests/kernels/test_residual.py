"""Joins and ReLUs in one pass, with the BatchNorm before them or without."""

import copy

import pytest
import torch
from torch import nn

from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredTensor, defer
from selab.kernels.residual import ACTIVATIONS, ADD_RELU, FORMULAS, FusedActivation, FusedJoin, formula_of
from selab.kernels.swap import swap

needs_native = pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")
FORMATS = [torch.contiguous_format, torch.channels_last]


class Join(nn.Module):
    def __init__(self, formula=ADD_RELU):
        super().__init__()
        self.formula = formula
        self.relu = nn.ReLU()

    def forward(self, branch, shortcut):
        return self.relu(branch + shortcut)


def fast(kind=nn.ReLU, **options):
    made = kind(**options)
    swap(made, FusedActivation)
    made.can_overwrite = True
    return made


def norm_before(reader, channels=8):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels).eval()
    for one in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(one)
    norm.running_var.uniform_(0.5, 2)
    exact = copy.deepcopy(norm).double()
    defer(norm, (reader,))
    return norm, exact


def assert_near(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=3e-6)


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("can_overwrite", [False, True])
@pytest.mark.parametrize("kind", ["join", *ACTIVATIONS])
@pytest.mark.parametrize("size", [(2, 8, 5, 7), (1, 8, 1, 1), (0, 8, 3, 3), (3, 8, 33, 31)])
@torch.no_grad
def test_a_batchnorm_is_done_in_the_same_pass(memory_format, can_overwrite, kind, size):
    joined = kind == "join"
    reader = FusedJoin(Join()) if joined else fast(kind)
    reader.can_overwrite = can_overwrite
    norm, exact = norm_before(reader)
    for _ in range(3):
        y, r = (torch.randn(size).contiguous(memory_format=memory_format) for _ in range(2))
        normalised = exact(y.double())
        expected = torch.relu(normalised + r.double()) if joined else kind()(normalised)
        kept, waits = y.clone(), norm(y)
        assert type(waits) is DeferredTensor
        out = reader(waits, r) if joined else reader(waits)
        assert type(waits) is torch.Tensor
        assert (out is waits) is can_overwrite
        assert can_overwrite or torch.equal(y, kept)
        assert out.stride() == kept.stride()
        assert_near(out, expected)


@needs_native
@torch.no_grad
def test_one_relu_behind_several_batchnorms_does_the_work_of_each():
    relu = fast()
    pairs = [norm_before(relu) for _ in range(3)]
    nn.init.zeros_(pairs[1][0].bias)
    nn.init.zeros_(pairs[1][1].bias)
    for _ in range(2):
        for norm, exact in pairs:
            y = torch.randn(1, 8, 4, 4)
            expected = exact(y.double()).relu()
            assert_near(relu(norm(y)), expected)
        plain = torch.randn(1, 8, 4, 4)
        assert torch.equal(relu(plain), nn.functional.relu(plain))


@needs_native
@torch.no_grad
def test_a_shortcut_that_waits_is_normalised_first():
    join = FusedJoin(Join())
    (one, exact_one), (two, exact_two) = norm_before(join), norm_before(join)
    for _ in range(2):
        y, r = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5)
        expected = torch.relu(exact_one(y.double()) + exact_two(r.double()))
        assert_near(join(one(y), two(r)), expected)


@needs_native
@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (1, 8, 4, 5), (8, 1, 1)])
@torch.no_grad
def test_a_shortcut_of_another_kind_is_added_by_torch(shape):
    join = FusedJoin(Join())
    norm, exact = norm_before(join)
    for memory_format in FORMATS:
        y, r = torch.randn(2, 8, 4, 5).contiguous(memory_format=memory_format), torch.randn(shape)
        expected = torch.relu(exact(y.double()) + r.double())
        assert_near(join(norm(y), r), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_before_which_nothing_waits_is_one(inplace):
    relu, x = fast(inplace=inplace), torch.randn(2, 3, 4, 4)
    expected = torch.relu(x)
    out = relu(x)
    assert torch.equal(out, expected)
    assert (out is x) is inplace
    maps = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(fast()(maps).sum(), maps)[0], (maps > 0).float())


def test_gradients_of_a_join_are_the_join_s():
    join = FusedJoin(Join())
    maps = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(join, tuple(maps))


def test_what_a_join_computes_it_says_unless_it_has_another_activation():
    assert [formula_of(Join(formula)) for formula in FORMULAS] == list(FORMULAS)
    assert formula_of(nn.Identity()) == formula_of(Join("relu(branch) + shortcut")) == ""
    changed = Join()
    changed.relu = nn.SiLU()
    assert formula_of(changed) == ""


@torch.no_grad
def test_a_join_with_another_activation_by_now_runs_itself():
    join, maps = FusedJoin(Join()), [torch.randn(2, 3, 4, 4) for _ in range(2)]
    assert torch.equal(join(*maps), torch.relu(maps[0] + maps[1]))
    join.inner.relu = nn.SiLU()
    assert torch.equal(join(*maps), nn.functional.silu(maps[0] + maps[1]))
