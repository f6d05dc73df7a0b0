"""The block as others write it computes the same; with a stage left out it runs all the others."""

import copy

import pytest
import torch
from torch import nn

from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.errors import InsertionError
from selab.experiments import tax_implementations
from selab.experiments.tax_implementations import reimplement
from selab.models.build import build
from selab.models.catalog import find

NETWORKS = {"se_small_cnn": 32, "se_resnet18": 32, "se_mobilenet": 32, "mobilenet_v3_small": 64}
AS_OTHERS = ("torchvision", "timm")
ABLATIONS = tuple(name for name in tax_implementations.REIMPLEMENTATIONS if name not in AS_OTHERS)


def network(arch):
    return build(find(arch), input_chw=(3, NETWORKS[arch], NETWORKS[arch])).model.eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.parametrize("style", AS_OTHERS)
def test_a_network_as_others_write_it_computes_the_same(arch, style):
    reference = network(arch)
    other = copy.deepcopy(reference)
    assert reimplement(other, style) == len(blocks(reference)) > 0
    assert not blocks(other)
    assert parameters(other) == parameters(reference)
    x = torch.randn(2, 3, NETWORKS[arch], NETWORKS[arch])
    with torch.inference_mode():
        expected, found = reference(x), other(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


@pytest.mark.parametrize("style", AS_OTHERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("gate", "activation"), [("sigmoid", "relu"), ("hardsigmoid", "silu")])
def test_gradients_are_those_of_the_reference(style, bias, gate, activation):
    block = SqueezeExcitation(12, 4, bias=bias, gate=gate, activation=activation).double()
    other = nn.Sequential(copy.deepcopy(block))
    reimplement(other, style)
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    found = torch.autograd.grad(other(x).square().sum(), [x, *other.parameters()])
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one.reshape(reference.shape), reference)


def test_random_numbers_are_not_used_up():
    model = nn.Sequential(SqueezeExcitation(8, 2))
    state = torch.random.get_rng_state()
    reimplement(model, "torchvision")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_residual_join_keeps_its_place():
    model = network("se_resnet18")
    reimplement(model, "timm")
    joins = [module for module in model.modules() if isinstance(module, GatedJoin)]
    assert joins
    assert all(isinstance(join.se, tax_implementations.TimmSE) for join in joins)


def test_a_shared_block_stays_shared():
    block = SqueezeExcitation(8, 2)
    model = nn.Sequential(block, nn.ReLU(), block)
    assert reimplement(model, "timm") == 1
    assert model[0] is model[2]


@pytest.mark.parametrize("options", [{"squeeze": "max"}, {"squeeze": "none"}, {"init": "identity"}])
def test_blocks_that_others_do_not_write_stay(options):
    model = nn.Sequential(SqueezeExcitation(8, 2, **options))
    assert reimplement(model, "torchvision") == 0
    assert blocks(model)


def test_the_mode_of_the_block_is_kept():
    model = nn.Sequential(SqueezeExcitation(8, 2)).eval()
    reimplement(model, "torchvision")
    assert not any(module.training for module in model.modules())


def test_an_unknown_style_is_refused():
    with pytest.raises(InsertionError, match="implementation 'torchvisio': there is no such one"):
        reimplement(nn.Sequential(), "torchvisio")


# ----------------------------------------------------------------------------------------------------- stages left out


def ablated(style):
    block = SqueezeExcitation(8, 2).double()
    model = nn.Sequential(copy.deepcopy(block))
    assert reimplement(model, style) == 1
    return block, model


@pytest.mark.parametrize("style", ABLATIONS)
def test_what_is_left_has_the_same_parameters_and_the_same_shape(style):
    block, model = ablated(style)
    assert parameters(model) == parameters(block)
    assert model(torch.randn(2, 8, 3, 5, dtype=torch.float64)).shape == (2, 8, 3, 5)


def test_without_squeeze_the_factors_do_not_depend_on_the_map():
    block, model = ablated("without_squeeze")
    one, other = torch.randn(2, 2, 8, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(model(one) / one, model(other) / other)
    factor = block.excite(torch.linspace(0, 1, 8, dtype=torch.float64)[None])
    torch.testing.assert_close(model(one), one * factor[:, :, None, None])


def test_without_excitation_the_mean_is_the_gate():
    _, model = ablated("without_excitation")
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), x * x.mean((2, 3), keepdim=True).sigmoid())


def test_without_scale_the_map_is_returned_and_both_other_stages_run_both_ways():
    _, model = ablated("without_scale")
    block, ran = model[0].block, []

    def followed(name):
        def hook(module, inputs, output):
            ran.append(name)
            output.grad_fn.register_hook(lambda *_: ran.append(f"{name} backward"))

        return hook

    block.squeeze.register_forward_hook(followed("squeeze"))
    block.fc2.register_forward_hook(followed("excitation"))
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    out = model(x)
    torch.testing.assert_close(out, x)
    gradient = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(gradient, 2 * x)
    assert ran == ["squeeze", "excitation", "excitation backward", "squeeze backward"]
