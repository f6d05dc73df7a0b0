"""Networks with more channels, or with a block once more."""

import itertools

import pytest
import torch
from torch import nn

import selab
from selab.errors import ModelError, SpecError
from selab.models.build import build
from selab.models.catalog import find
from selab.models.resized import network, repeatable, repeated, resize, wider
from selab.models.spec import parse_family

NETWORKS = ["small_cnn", "mobilenet", "resnet20_cifar", "resnext50_32x4d", "mobilenet_v2", "bn_inception", "shufflenet"]


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


def test_each_layer_becomes_wider_and_what_follows_fits():
    model = tiny()
    sizes = wider(model, 1.5, (3, 8, 8), name="tiny")
    assert sizes["0"] == {"out_channels": 24, "in_channels": 3, "groups": 1}
    # Depthwise: as many groups as channels.
    assert sizes["3"] == {"out_channels": 24, "in_channels": 24, "groups": 24}
    assert sizes["4"] == {"num_features": 24}
    assert sizes["6"] == {"out_channels": 36, "in_channels": 24, "groups": 1}
    # Behind a map of 2x2 that was flattened; the classes stay.
    assert sizes["9"] == {"out_features": 10, "in_features": 144}
    resize(model, sizes)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_catalog_become_wider(name):
    chw = find(name).input_chw
    model = build(find(name), device="meta").model
    sizes = wider(model, 1.5, chw, name=name)
    before = sum(one.numel() for one in model.parameters())
    resize(model, sizes)
    assert sum(one.numel() for one in model.parameters()) > 1.5 * before
    out = model.eval()(torch.zeros(1, *chw, device="meta"))
    assert out.shape == (1, find(name).num_classes)


def test_it_is_a_variant_like_any_other():
    text = """
family = "mine"
source = "this test"
builder = "selab.models.resized:network"
input_chw = [3, 32, 32]
num_classes = 10
[variants.original]
title = "As it is"
arguments = { arch = "resnet20_cifar" }
[variants.wide]
title = "Wide"
arguments = { arch = "resnet20_cifar", width = 1.25 }
[variants.deep]
title = "Deep"
arguments = { arch = "resnet20_cifar", repeat = "stage3.2" }
"""
    family = parse_family(text, origin="mine.toml")
    same = build(family["original"], seed=3).model.state_dict()
    expected = build(find("resnet20_cifar"), seed=3).model.state_dict()
    assert all(torch.equal(same[key], expected[key]) for key in expected)
    wide, deep = (build(family[name], seed=3).model for name in ("wide", "deep"))
    assert wide.stem.conv.out_channels == 20
    assert len(deep.stage3) == 4
    for model in (wide, deep):
        again = build(family["wide" if model is wide else "deep"], seed=3).model
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        # Another seed has other weights, and without memory there are none.
    other = build(family["wide"], seed=4).model
    assert not torch.equal(other.stem.conv.weight, wide.stem.conv.weight)
    assert next(build(family["wide"], device="meta").model.parameters()).device.type == "meta"


def test_new_weights_have_the_distribution_of_the_old_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.LazyLinear(10)).eval()
    model(torch.randn(1, 64, 4, 4))
    before = model[0].weight.std()
    resize(model, {"0": {"out_channels": 128, "in_channels": 128, "groups": 1}, "1": {"num_features": 128}})
    # Twice the inputs: the variance of a sum stays.
    torch.testing.assert_close(model[0].weight.std(), before / 2**0.5, rtol=0.02, atol=0)
    assert torch.equal(model[1].weight, torch.ones(128))
    assert torch.equal(model[1].running_var, torch.ones(128))


def test_blocks_that_keep_the_shape_run_once_more():
    model = build(find("resnet20_cifar"), seed=0).model
    found = repeatable(model, (3, 32, 32), name="resnet20_cifar")
    assert {"stage1.0", "stage1.1", "stage2.1", "stage3.2"} <= set(found)
    # Not what changes the shape, and nothing within a block that is there.
    assert "stage2.0" not in found
    assert not any(path.startswith("stage1.0.") for path in found)
    again = repeated(model, "stage1.0")
    assert list(again.stage1._modules) == ["0", "0_again", "1", "2"]
    one, other = again.stage1[0].branch.conv1.weight, again.stage1[1].branch.conv1.weight
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.flatten().sort().values, other.flatten().sort().values)


def test_several_blocks_run_once_more():
    model = network(num_classes=10, arch="resnet20_cifar", repeat="stage1.1+stage2.2+stage1.1+stage1.1")
    assert list(model.stage1._modules) == ["0", "1", "1_again_3", "1_again_2", "1_again", "2"]
    assert list(model.stage2._modules) == ["0", "1", "2", "2_again"]
    weights = [block.branch.conv1.weight for block in model.stage1]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(weights, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"width": 0.5}, SpecError, "width: 0.5: allowed: 1 or more"),
        ({"repeat": "nowhere"}, ModelError, "repeat: nowhere: there is no such block"),
        ({"repeat": "stage1.0.branch"}, ModelError, "is no child of an nn.Sequential"),
        ({"arch": "se_resnet20_cifar", "width": 1.1}, SpecError, "has attention blocks; name a network without"),
    ],
)
def test_what_is_not_possible(arguments, error, said):
    with pytest.raises(error, match=said):
        network(**{"num_classes": 10, "arch": "resnet20_cifar", **arguments})


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)).view(-1, 16))


def test_a_network_that_cannot_become_wider_says_why():
    with pytest.raises(ModelError, match="net: cannot be made wider"):
        wider(Fixed(), 1.5, (3, 8, 8), name="net")
    other = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Flatten(), nn.Linear(576, 10))
    with pytest.raises(ModelError, match="1, a PReLU, has weights of its own"):
        wider(other, 1.5, (3, 8, 8), name="net")


def test_the_model_is_not_changed():
    model = selab.build("small_cnn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wider(model, 1.5, (3, 32, 32), name="small_cnn")
    repeatable(model, (3, 32, 32), name="small_cnn")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.training
