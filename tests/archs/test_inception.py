"""Inception-v3 and -v4: totals, sites, and the conventions of their releases."""

from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.inception_v3 import inception_v3
from selab.archs.inception_v4 import inception_v4
from selab.attention.insert import insert_se
from selab.models.catalog import installed

FAMILIES = ("inception_v3", "inception_v4")

# A convolution: channels in, channels out, area of the kernel, side of its output.
Conv = tuple[int, int, int, int]


def path(c: int, side: int, *steps: tuple[int, int]) -> list[Conv]:
    """Convolutions one after the other at one resolution, each (channels out, area)."""
    found = []
    for out, area in steps:
        found.append((c, out, area, side))
        c = out
    return found


def totals(convs: list[Conv], features: int) -> tuple[int, int]:
    """Parameters, with scale and shift of each BN, and MACs; both with the classifier."""
    params = sum(a * b * area + 2 * b for a, b, area, _ in convs) + features * 1000 + 1000
    return params, sum(a * b * area * side**2 for a, b, area, side in convs) + features * 1000


def v3_convs() -> list[Conv]:
    """Layer by layer: TensorFlow slim, nets/inception_v3.py."""
    convs = [(3, 32, 9, 149), (32, 32, 9, 147), (32, 64, 9, 147), (64, 80, 1, 73), (80, 192, 9, 71)]
    for c, pooled in ((192, 32), (256, 64), (288, 64)):
        convs += path(c, 35, (64, 1)) + path(c, 35, (48, 1), (64, 25)) + path(c, 35, (64, 1), (96, 9), (96, 9))
        convs += path(c, 35, (pooled, 1))
    convs += [(288, 384, 9, 17), *path(288, 35, (64, 1), (96, 9)), (96, 96, 9, 17)]
    for w in (128, 160, 160, 192):
        convs += path(768, 17, (192, 1)) + path(768, 17, (w, 1), (w, 7), (192, 7))
        convs += path(768, 17, (w, 1), (w, 7), (w, 7), (w, 7), (192, 7)) + path(768, 17, (192, 1))
    convs += [(768, 192, 1, 17), (192, 320, 9, 8), *path(768, 17, (192, 1), (192, 7), (192, 7)), (192, 192, 9, 8)]
    for c in (1280, 2048):
        convs += path(c, 8, (320, 1)) + path(c, 8, (384, 1)) + 2 * [(384, 384, 3, 8)]
        convs += path(c, 8, (448, 1), (384, 9)) + 2 * [(384, 384, 3, 8)] + path(c, 8, (192, 1))
    return convs


def v4_convs() -> list[Conv]:
    """Layer by layer: TensorFlow slim, nets/inception_v4.py."""
    convs = [(3, 32, 9, 149), (32, 32, 9, 147), (32, 64, 9, 147), (64, 96, 9, 73)]
    convs += [(160, 64, 1, 73), (64, 96, 9, 71), *path(160, 73, (64, 1), (64, 7), (64, 7)), (64, 96, 9, 71)]
    convs += [(192, 192, 9, 35)]
    convs += 4 * (
        path(384, 35, (96, 1))
        + path(384, 35, (64, 1), (96, 9))
        + path(384, 35, (64, 1), (96, 9), (96, 9))
        + path(384, 35, (96, 1))
    )
    convs += [(384, 384, 9, 17), *path(384, 35, (192, 1), (224, 9)), (224, 256, 9, 17)]
    convs += 7 * (
        path(1024, 17, (384, 1))
        + path(1024, 17, (192, 1), (224, 7), (256, 7))
        + path(1024, 17, (192, 1), (192, 7), (224, 7), (224, 7), (256, 7))
        + path(1024, 17, (128, 1))
    )
    convs += [(1024, 192, 1, 17), (192, 192, 9, 8), *path(1024, 17, (256, 1), (256, 7), (320, 7)), (320, 320, 9, 8)]
    convs += 3 * (
        path(1536, 8, (256, 1))
        + path(1536, 8, (384, 1))
        + 2 * [(384, 256, 3, 8)]
        + path(1536, 8, (384, 1), (448, 3), (512, 3))
        + 2 * [(512, 256, 3, 8)]
        + path(1536, 8, (256, 1))
    )
    return convs


def plus_se(total: tuple[int, int], sites: list[int]) -> tuple[int, int]:
    """Two layers with biases at each site, r = 16: arXiv 1709.01507, eq. (5)."""
    weights = sum(2 * c * (c // 16) for c in sites)
    return total[0] + weights + sum(c + c // 16 for c in sites), total[1] + weights


# Channels of the concatenations.
V3 = [256, 288, 288, *[768] * 5, 1280, 2048, 2048]
V4 = [*[384] * 4, *[1024] * 8, *[1536] * 4]

TOTALS: dict[str, tuple[int, int]] = {
    "inception_v3": totals(v3_convs(), 2048),
    "se_inception_v3": plus_se(totals(v3_convs(), 2048), V3),
    "inception_v4": totals(v4_convs(), 1536),
    "se_inception_v4": plus_se(totals(v4_convs(), 1536), V4),
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == {name for name, variant in installed().items() if variant.family in FAMILIES}


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_macs(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]
    assert not cost(name).unknown


def test_arithmetic_agrees_with_published_integers() -> None:
    # torchvision 0.29.1 without the auxiliary classifier, and timm 1.0.31.
    assert TOTALS["inception_v3"][0] == 23_834_568
    assert TOTALS["inception_v4"][0] == 42_679_816


@pytest.mark.parametrize(
    ("name", "paths", "channels"),
    [
        (
            "inception_v3",
            [
                f"stage{s}.mixed{s + 4}{letter}"
                for s, letters in ((1, "bcd"), (2, "abcde"), (3, "abc"))
                for letter in letters
            ],
            V3,
        ),
        (
            "inception_v4",
            [
                f"stage{s}.{name}"
                for s, count in ((1, 4), (2, 7), (3, 3))
                for name in [*["reduction"] * (s > 1), *(f"inception{n}" for n in range(1, count + 1))]
            ],
            V4,
        ),
    ],
)
def test_sites(name: str, paths: list[str], channels: list[int]) -> None:
    assert built(name).model.site_groups() == {"concat": paths}  # type: ignore[operator]
    found = built(f"se_{name}").insertions
    assert [(at.path, at.channels, at.squeeze_channels) for at in found] == [
        (at, c, c // 16) for at, c in zip(paths, channels, strict=True)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_resolutions(name: str) -> None:
    network: Any = built(name).model
    with torch.device("meta"):
        x = network.eval().stem(torch.empty(2, 3, 299, 299))
        assert x.shape[2:] == (35, 35)
        for stage, side in ((1, 35), (2, 17), (3, 8)):
            x = network.get_submodule(f"stage{stage}")(x)
            assert x.shape[2:] == (side, side)


@pytest.mark.parametrize("network", [inception_v3, inception_v4])
@pytest.mark.parametrize("placement", ["standard", "pre"])
def test_gates_that_are_one_change_nothing(network: Any, placement: Any) -> None:
    torch.manual_seed(0)
    model = network(num_classes=10).eval()
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        before = model(x)
        inserted = insert_se(model, "concat", input_nchw=(1, 3, 75, 75), placement=placement, init="identity")
        assert len(inserted) == len(model.site_groups()["concat"])
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("network", [inception_v3, inception_v4])
def test_every_parameter_gets_a_gradient(network: Any) -> None:
    torch.manual_seed(0)
    model = network(num_classes=3).train()
    model(torch.randn(2, 3, 75, 75)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize(("name", "corner"), [("inception_v3", 4 / 9), ("inception_v4", 1.0)])
def test_averages_count_the_padding_in_v3_alone(name: str, corner: float) -> None:
    """As in torchvision and timm: a corner averages four ones over nine places, or over four."""
    network: Any = built(name).model
    pools = [module for module in network.modules() if isinstance(module, nn.AvgPool2d)]
    assert len(pools) == (9 if name == "inception_v3" else 14)
    for pool in pools:
        assert pool(torch.ones(1, 1, 3, 3)).flatten().tolist()[0] == pytest.approx(corner)
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


def test_dropouts_are_those_of_the_ports() -> None:
    with torch.device("meta"):
        networks: list[Any] = [inception_v3(), inception_v4()]
    assert [network.head.dropout.p for network in networks] == [0.5, 0.2]


@pytest.mark.parametrize("builder", [inception_v3, inception_v4])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        ({"dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and below 1"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
