"""After `fuse`: blocks are removed without a trace, layers are read one by one, and derivatives are taken twice."""

import copy
import pickle

import pytest
import torch
from plain_networks import ReluJoin
from torch import nn

import selab
from selab.attention.insert import insert_se, remove_se
from selab.attention.se import SqueezeExcitation
from selab.fusion.fuse import fuse
from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredNorm
from selab.kernels.deferred_relu import DeferredReLU


def stage():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), stage(), nn.Conv2d(4, 2, 1)).eval()


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@torch.no_grad
def test_without_its_blocks_a_fused_network_is_the_baseline_to_the_bit(copied):
    model, x = network(), torch.randn(2, 3, 6, 6)
    expected, text, keys = model(x), str(model), list(model.state_dict())
    insert_se(model, "1", input_nchw=(1, 3, 6, 6), reduction=2)
    with_blocks = model(x)
    fusion = fuse(model, input_nchw=(1, 3, 6, 6))
    assert [one.absorbed for one in fusion.blocks] == [True]
    for _ in range(3):
        torch.testing.assert_close(model(x), with_blocks)
    model = copied(model)
    torch.testing.assert_close(model(x), with_blocks)
    assert remove_se(model) == 1
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert (str(model), list(model.state_dict())) == (text, keys)


class Residual(nn.Module):
    """x + act(bn(conv(x))), or with `late` act(x + bn(conv(x)))."""

    def __init__(self, act, late=False):
        super().__init__()
        self.conv, self.bn, self.act, self.late = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), act, late

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(x + y) if self.late else x + self.act(y)


class Joined(nn.Module):
    """A residual block of three children, with a gate of its own class in the branch."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), Gate())
        self.shortcut, self.join = nn.Identity(), ReluJoin()

    def forward(self, x):
        return self.join(self.branch(x), self.shortcut(x))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


PARTS = {
    "SiLU": lambda: Residual(nn.SiLU()),
    "Hardswish": lambda: Residual(nn.Hardswish()),
    "ReLU": lambda: Residual(nn.ReLU()),
    "ReLU in place": lambda: Residual(nn.ReLU(inplace=True)),
    "ReLU6": lambda: Residual(nn.ReLU6()),
    "GELU": lambda: Residual(nn.GELU()),
    "SiLU after the addition": lambda: Residual(nn.SiLU(), late=True),
    "a join and a gate": Joined,
    "the network's own block": lambda: nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU(), SqueezeExcitation(16, 4)
    ),
    "the network's own reference": lambda: nn.Sequential(
        nn.BatchNorm2d(16), nn.ReLU(inplace=True), SqueezeExcitation(16, 4, impl="reference")
    ),
}


def three_parts(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), PARTS[name](), PARTS[name]()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def described(model):
    return [(path, type(module), sorted(vars(module))) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("options", [{}, {"in_place": False}, {"blocks": False}])
@torch.no_grad
def test_what_was_fused_away_from_the_blocks_is_undone_with_the_last_of_them(name, options):
    model, x = three_parts(name), torch.randn(2, 3, 18, 18)
    impls = [one.impl for one in model.modules() if isinstance(one, SqueezeExcitation)]
    expected, before = model(x), described(model)
    insert_se(model, ["0", "1"], input_nchw=(1, 3, 18, 18), reduction=4)
    fuse(model, input_nchw=(1, 3, 18, 18), **options)
    fuse(model, input_nchw=(1, 3, 18, 18), **options)
    gated = [model(x) for _ in range(2)][-1]
    assert remove_se(model, "1") == 1
    assert remove_se(model) == 1
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert not torch.equal(gated, expected)
    assert described(model) == before
    assert [one.impl for one in model.modules() if isinstance(one, SqueezeExcitation)] == impls
    assert all(not one.can_overwrite for one in model.modules() if isinstance(one, SqueezeExcitation))


@torch.no_grad
def test_a_baseline_that_was_fused_before_the_insertion_stays_fused():
    model, x = three_parts("SiLU"), torch.randn(2, 3, 18, 18)
    assert fuse(model, input_nchw=(1, 3, 18, 18)).norms == 2
    expected, before = model(x), [type(module) for module in model.modules()]
    insert_se(model, "0", input_nchw=(1, 3, 18, 18), reduction=4)
    assert remove_se(model) == 1
    assert torch.equal(model(x), expected)
    assert [type(module) for module in model.modules()] == before


@torch.no_grad
def test_a_block_that_was_inserted_after_fuse_is_removed_last():
    model, x = three_parts("Hardswish"), torch.randn(2, 3, 18, 18)
    expected, before = model(x), described(model)
    insert_se(model, "0", input_nchw=(1, 3, 18, 18), reduction=4)
    fuse(model, input_nchw=(1, 3, 18, 18))
    insert_se(model, "2", input_nchw=(1, 3, 18, 18), reduction=4)
    assert (remove_se(model, "0"), remove_se(model)) == (1, 1)
    assert torch.equal(model(x), expected)
    assert described(model) == before


@torch.no_grad
def test_a_hook_on_a_fused_join_survives_its_undoing():
    model, seen = three_parts("a join and a gate"), []
    insert_se(model, "0", input_nchw=(1, 3, 18, 18), reduction=4)
    fuse(model, input_nchw=(1, 3, 18, 18))
    handle = model[1].join.register_forward_hook(lambda _module, _args, out: seen.append(out.shape))
    remove_se(model)
    model(torch.randn(1, 3, 18, 18))
    assert type(model[1].join) is ReluJoin
    assert seen == [(1, 16, 16, 16)]
    handle.remove()
    model(torch.randn(1, 3, 18, 18))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["efficientnet_b0_no_se", "mobilenet_v3_large_no_se", "resnet18"])
@torch.no_grad
def test_networks_of_the_catalog_come_back_to_the_bit(name):
    model, x = selab.build(name).eval(), torch.randn(1, 3, 64, 64)
    expected, before = model(x), described(model)
    insert_se(model, "auto", input_nchw=(1, 3, 64, 64), reduction=4)
    fuse(model, input_nchw=(1, 3, 64, 64))
    model(x)
    remove_se(model)
    assert torch.equal(model(x), expected)
    assert described(model) == before


@torch.no_grad
def test_a_fused_sequential_can_be_read_layer_by_layer():
    model = nn.Sequential(*stage(), SqueezeExcitation(4, 2)).eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=(1, 4, 6, 6))
    x = torch.randn(2, 4, 6, 6)
    for _ in range(3):
        fused(x)
        y, z = x, x
        for one, other in zip(model, fused, strict=True):
            y, z = one(y), other(z)
            torch.testing.assert_close(z, y)
        torch.testing.assert_close(fused[:3](x), model[:3](x))


@torch.no_grad
def test_the_convolution_s_output_is_kept_by_a_second_way_through_the_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

        def taps(self, x):
            convolved = self.conv(x)
            normalised = self.norm(convolved)
            return convolved, normalised, self.act(normalised)

    model = Net().eval()
    model.norm.running_mean.normal_()
    fused = copy.deepcopy(model)
    assert fuse(fused, input_nchw=(1, 3, 9, 9)).norms == 1
    x = torch.randn(2, 3, 9, 9)
    for _ in range(3):
        torch.testing.assert_close(fused(x), model(x))
        for one, other in zip(fused.taps(x), model.taps(x), strict=True):
            assert type(one) is torch.Tensor
            torch.testing.assert_close(one, other)


def test_in_place_can_be_refused_and_taken_back():
    model = nn.Sequential(*stage(), SqueezeExcitation(4, 2)).eval()
    assert fuse(model, input_nchw=(1, 4, 6, 6)).norms == 1
    assert {DeferredNorm, DeferredReLU} <= {kind for one in model for kind in type(one).__mro__}
    fusion = fuse(model, input_nchw=(1, 4, 6, 6), in_place=False)
    assert (fusion.norms, fusion.in_place_reason) == (0, "")
    assert [(one.in_place, one.absorbed) for one in fusion.blocks] == [(False, False)]
    assert [type(one) for one in model[1:3]] == [nn.BatchNorm2d, nn.ReLU]
    assert not model[3].can_overwrite


@torch.no_grad
def test_a_block_around_a_batchnorm_does_its_work_where_nothing_else_holds_the_map():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.keeps = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), False

        def forward(self, x):
            x = self.conv(x)
            self.kept = x if self.keeps else None
            return self.bn(x)

    model = Net().eval()
    model.bn.running_mean.normal_()
    insert_se(model, "bn", input_nchw=(1, 3, 9, 9), reduction=2)
    fused, x = copy.deepcopy(model), torch.randn(2, 3, 9, 9)
    fusion = fuse(fused, input_nchw=(1, 3, 9, 9))
    assert [(one.normalising, one.in_place) for one in fusion.blocks] == [(True, True)]
    for keeps in (False, False, True, True, False):
        model.keeps = fused.keeps = keeps
        torch.testing.assert_close(fused(x), model(x))
        if keeps:
            torch.testing.assert_close(fused.kept, model.kept)
        elif not cpu.native_reason():
            assert "_cached_call" in fused.bn.inner.__dict__


def penalty(model, x):
    """Gradients of a gradient penalty."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_penalty_has_the_reference_s_gradients(fused):
    model = network().double()
    insert_se(model, "1", input_nchw=(1, 3, 6, 6), reduction=2)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, SqueezeExcitation):
            module.impl = "reference"
    if fused:
        fuse(model, input_nchw=(1, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for one, other in zip(penalty(model, x), penalty(reference, x), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transform", ["hessian", "jvp", "per-sample gradients"])
def test_transforms_of_torch_func_see_the_same_function(transform):
    model = network().double()
    insert_se(model, "1", input_nchw=(1, 3, 3, 3), reduction=2)
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=(1, 3, 3, 3))
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)

    def transformed(network):
        def loss(one):
            return network(one[None] if one.dim() == 3 else one).square().sum()

        if transform == "hessian":
            return torch.func.hessian(loss)(x)
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (x + 1,))
        return torch.func.vmap(torch.func.grad(loss))(x)

    torch.testing.assert_close(transformed(fused), transformed(model))
