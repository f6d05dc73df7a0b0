"""MobileNetV2 and V3, MnasNet-A1 and EfficientNet-B0: counts, SE sites and widths, stochastic depth, arguments."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.efficientnet import StochasticAdd, efficientnet_b0
from selab.archs.mnasnet import mnasnet_a1
from selab.archs.mobilenet_v2 import mobilenet_v2
from selab.archs.mobilenet_v3 import mobilenet_v3
from selab.models.build import build
from selab.models.catalog import installed

# Expected counts by arithmetic, layer by layer.


class Block(NamedTuple):
    """An inverted residual block: input, inner and output channels, kernel, stride, width of its SE (0: none)."""

    channels: int
    wide: int
    out: int
    kernel: int
    stride: int
    squeeze: int = 0


def conv_bn(in_channels: int, out: int, kernel: int, groups: int = 1) -> int:
    """Weights of a convolution without bias, and scale and shift of its BN."""
    return in_channels // groups * out * kernel**2 + 2 * out


def totals(blocks: list[Block], dense: list[int], *, se: bool) -> tuple[int, int]:
    """Parameters and MACs at 224x224; `dense` is the last convolution's width, then those of the layers behind it."""
    stem, side = blocks[0].channels, 112
    params, macs = conv_bn(3, stem, 3), 3 * stem * 9 * side**2
    for c, wide, out, kernel, stride, squeeze in blocks:
        if wide != c:
            params += conv_bn(c, wide, 1)
            macs += c * wide * side**2
        side //= stride
        params += conv_bn(wide, wide, kernel, groups=wide) + conv_bn(wide, out, 1)
        macs += (wide * kernel**2 + wide * out) * side**2
        if se and squeeze:
            params += 2 * wide * squeeze + wide + squeeze
            macs += 2 * wide * squeeze
    last = blocks[-1].out
    params += conv_bn(last, dense[0], 1)
    macs += last * dense[0] * side**2
    for c, out in pairwise(dense):
        params += (c + 1) * out
        macs += c * out
    return params, macs


def staged(rows: list[tuple[int, int, int, int, int, bool]], stem: int = 32) -> list[Block]:
    """Blocks from rows of (blocks, kernel, expansion, output channels, stride, SE of a quarter of the input)."""
    blocks, c = [], stem
    for n, kernel, expansion, out, stride, se in rows:
        for index in range(n):
            blocks.append(Block(c, c * expansion, out, kernel, stride if index == 0 else 1, c // 4 if se else 0))
            c = out
    return blocks


# arXiv 1801.04381, Table 2. The other widths' channels are written out, as the rounding to multiples of 8 gives them.
def mobilenet_v2_blocks(stem: int, widths: list[int]) -> list[Block]:
    repeats, strides = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)
    rows = zip(repeats, widths, strides, strict=True)
    return staged([(n, 3, 6 if i else 1, out, stride, False) for i, (n, out, stride) in enumerate(rows)], stem)


V2 = mobilenet_v2_blocks(32, [16, 24, 32, 64, 96, 160, 320])
V2_0_5 = mobilenet_v2_blocks(16, [8, 16, 16, 32, 48, 80, 160])
V2_0_75 = mobilenet_v2_blocks(24, [16, 24, 24, 48, 72, 120, 240])
V2_1_4 = mobilenet_v2_blocks(48, [24, 32, 48, 88, 136, 224, 448])

# arXiv 1905.02244, Tables 1 and 2. SE's widths are a quarter of the inner channels rounded to multiples of 8, as the
# printed torchvision networks show them.
V3_LARGE = [
    Block(16, 16, 16, 3, 1),
    Block(16, 64, 24, 3, 2),
    Block(24, 72, 24, 3, 1),
    Block(24, 72, 40, 5, 2, 24),
    Block(40, 120, 40, 5, 1, 32),
    Block(40, 120, 40, 5, 1, 32),
    Block(40, 240, 80, 3, 2),
    Block(80, 200, 80, 3, 1),
    Block(80, 184, 80, 3, 1),
    Block(80, 184, 80, 3, 1),
    Block(80, 480, 112, 3, 1, 120),
    Block(112, 672, 112, 3, 1, 168),
    Block(112, 672, 160, 5, 2, 168),
    Block(160, 960, 160, 5, 1, 240),
    Block(160, 960, 160, 5, 1, 240),
]
V3_SMALL = [
    Block(16, 16, 16, 3, 2, 8),
    Block(16, 72, 24, 3, 2),
    Block(24, 88, 24, 3, 1),
    Block(24, 96, 40, 5, 2, 24),
    Block(40, 240, 40, 5, 1, 64),
    Block(40, 240, 40, 5, 1, 64),
    Block(40, 120, 48, 5, 1, 32),
    Block(48, 144, 48, 5, 1, 40),
    Block(48, 288, 96, 5, 2, 72),
    Block(96, 576, 96, 5, 1, 144),
    Block(96, 576, 96, 5, 1, 144),
]
# arXiv 1807.11626, Fig. 7a.
A1 = staged(
    [
        (1, 3, 1, 16, 1, False),
        (2, 3, 6, 24, 2, False),
        (3, 5, 3, 40, 2, True),
        (4, 3, 6, 80, 2, False),
        (2, 3, 6, 112, 1, True),
        (3, 5, 6, 160, 2, True),
        (1, 3, 6, 320, 1, False),
    ]
)
# arXiv 1905.11946, Table 1.
B0 = staged(
    [
        (1, 3, 1, 16, 1, True),
        (2, 3, 6, 24, 2, True),
        (2, 5, 6, 40, 2, True),
        (3, 3, 6, 80, 2, True),
        (3, 5, 6, 112, 1, True),
        (4, 5, 6, 192, 2, True),
        (1, 3, 6, 320, 1, True),
    ]
)
# SE-MobileNetV2: weights of two layers without bias at the output of each of the 17 blocks, a sixteenth wide.
SE_V2 = sum(2 * block.out * (block.out // 16) for block in V2)

LARGE, SMALL, MNAS, EFF = [960, 1280, 1000], [576, 1024, 1000], [1280, 1000], [1280, 1000]

# (parameters, MACs). Parameters of the networks that others name: torchvision 0.27.1 (MobileNetV2 and V3,
# EfficientNet-B0) and timm 1.0.31 (all, MnasNet-A1 among them); everything else is the arithmetic above.
TOTALS: dict[str, tuple[int, int]] = {
    "mobilenet_v2": (3_504_872, totals(V2, [1280, 1000], se=False)[1]),
    "mobilenet_v2_0_5": (1_968_680, totals(V2_0_5, [1280, 1000], se=False)[1]),
    "mobilenet_v2_0_75": (2_636_424, totals(V2_0_75, [1280, 1000], se=False)[1]),
    "mobilenet_v2_1_4": (6_108_776, totals(V2_1_4, [1792, 1000], se=False)[1]),
    "se_mobilenet_v2": (3_504_872 + SE_V2, totals(V2, [1280, 1000], se=False)[1] + SE_V2),
    "mobilenet_v3_large_no_se": totals(V3_LARGE, LARGE, se=False),
    "mobilenet_v3_large": (5_483_032, totals(V3_LARGE, LARGE, se=True)[1]),
    "mobilenet_v3_small_no_se": totals(V3_SMALL, SMALL, se=False),
    "mobilenet_v3_small": (2_542_856, totals(V3_SMALL, SMALL, se=True)[1]),
    # Another epsilon in the BN changes no count.
    "mobilenetv3_large_100_no_se": totals(V3_LARGE, LARGE, se=False),
    "mobilenetv3_large_100": (5_483_032, totals(V3_LARGE, LARGE, se=True)[1]),
    "mobilenetv3_small_100_no_se": totals(V3_SMALL, SMALL, se=False),
    "mobilenetv3_small_100": (2_542_856, totals(V3_SMALL, SMALL, se=True)[1]),
    "mnasnet_a1_no_se": totals(A1, MNAS, se=False),
    "mnasnet_a1": (3_887_038, totals(A1, MNAS, se=True)[1]),
    "efficientnet_b0_no_se": totals(B0, EFF, se=False),
    "efficientnet_b0": (5_288_548, totals(B0, EFF, se=True)[1]),
}


def test_every_variant_has_its_totals() -> None:
    families = {"mobilenet_v2", "mobilenet_v3", "mnasnet", "efficientnet"}
    assert set(TOTALS) == {name for name, variant in installed().items() if variant.family in families}


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_macs_are_those_of_its_source(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]


def test_arithmetic_agrees_with_the_published_parameters() -> None:
    assert totals(V2, [1280, 1000], se=False)[0] == TOTALS["mobilenet_v2"][0]
    assert totals(V2_0_5, [1280, 1000], se=False)[0] == TOTALS["mobilenet_v2_0_5"][0]
    assert totals(V2_0_75, [1280, 1000], se=False)[0] == TOTALS["mobilenet_v2_0_75"][0]
    assert totals(V2_1_4, [1792, 1000], se=False)[0] == TOTALS["mobilenet_v2_1_4"][0]
    assert totals(V3_LARGE, LARGE, se=True)[0] == TOTALS["mobilenet_v3_large"][0]
    assert totals(V3_SMALL, SMALL, se=True)[0] == TOTALS["mobilenet_v3_small"][0]
    assert totals(A1, MNAS, se=True)[0] == TOTALS["mnasnet_a1"][0]
    assert totals(B0, EFF, se=True)[0] == TOTALS["efficientnet_b0"][0]


@pytest.mark.parametrize(
    ("name", "millions"),
    # MACs in the README of the authors' release, TensorFlow slim; it prints 300 for MobileNetV2 1.0, cut off.
    [("mobilenet_v2_0_5", 97), ("mobilenet_v2_0_75", 209), ("mobilenet_v2_1_4", 582), ("mobilenet_v3_large", 217)],
)
def test_macs_round_to_those_of_the_release(name: str, millions: int) -> None:
    assert round(TOTALS[name][1] / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mobilenet_v3_large", V3_LARGE), ("mobilenet_v3_small", V3_SMALL), ("mnasnet_a1", A1), ("efficientnet_b0", B0)],
)
def test_native_se_stands_behind_the_depthwise_convolutions_of_the_table(name: str, blocks: list[Block]) -> None:
    insertions = built(name).insertions
    assert [(i.channels, i.squeeze_channels) for i in insertions] == [(b.wide, b.squeeze) for b in blocks if b.squeeze]
    assert all(i.path.endswith(".branch.depthwise") for i in insertions)


def test_se_mobilenet_v2_gates_every_block_before_the_addition() -> None:
    insertions = built("se_mobilenet_v2").insertions
    assert [(i.channels, i.squeeze_channels) for i in insertions] == [(b.out, b.out // 16) for b in V2]
    assert all(i.path.endswith(".branch.project") for i in insertions)


BUILDERS: dict[str, tuple[Callable[..., Any], list[Block]]] = {
    "mobilenet_v2": (mobilenet_v2, V2),
    "mobilenet_v3_large": (lambda **more: mobilenet_v3(**{"size": "large", **more}), V3_LARGE),
    "mobilenet_v3_small": (lambda **more: mobilenet_v3(**{"size": "small", **more}), V3_SMALL),
    "mnasnet_a1": (mnasnet_a1, A1),
    "efficientnet_b0": (efficientnet_b0, B0),
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return BUILDERS[name][0]()


@pytest.mark.parametrize("name", BUILDERS)
def test_residual_blocks_are_those_that_keep_the_shape(name: str) -> None:
    blocks = BUILDERS[name][1]
    groups = on_meta(name).site_groups()
    keeps = [block.stride == 1 and block.channels == block.out for block in blocks]
    paths = [path.removesuffix(".branch.depthwise") for path in groups["depthwise"]]
    assert [path in groups["residual"] for path in paths] == keeps


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("mobilenet_v2", {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 7: 1}),
        ("mobilenet_v3_large", {1: 1, 2: 2, 3: 3, 4: 4, 5: 2, 6: 3}),
        ("mobilenet_v3_small", {1: 1, 2: 2, 3: 3, 4: 2, 5: 3}),
        ("mnasnet_a1", {1: 1, 2: 2, 3: 3, 4: 4, 5: 2, 6: 3, 7: 1}),
        # The paper's stage 1 is the stem.
        ("efficientnet_b0", {2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 1}),
    ],
)
def test_site_paths_are_numbered_by_stage(name: str, stages: dict[int, int]) -> None:
    expected = [f"stage{number}.{index}.branch.depthwise" for number, n in stages.items() for index in range(n)]
    assert on_meta(name).site_groups()["depthwise"] == expected


def test_mobilenet_v3_follows_torchvision_in_its_bn_and_can_follow_timm() -> None:
    def norms(network: nn.Module) -> set[tuple[float, float | None]]:
        return {(m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}

    assert norms(on_meta("mobilenet_v3_large")) == {(0.001, 0.01)}
    with torch.device("meta"):
        assert norms(mobilenet_v3(size="small", bn_eps=1e-5, bn_momentum=0.1)) == {(1e-5, 0.1)}
    for name in ("mobilenet_v2", "mnasnet_a1", "efficientnet_b0"):
        assert norms(on_meta(name)) == {(1e-5, 0.1)}


def test_stochastic_depth_grows_with_the_block() -> None:
    network = on_meta("efficientnet_b0")
    drops = [module.drop for module in network.modules() if isinstance(module, StochasticAdd)]
    residual = [index for index, block in enumerate(B0) if block.stride == 1 and block.channels == block.out]
    assert drops == pytest.approx([0.2 * index / 16 for index in residual])
    with torch.device("meta"):
        flat = efficientnet_b0(stochastic_depth=0)
    assert {module.drop for module in flat.modules() if isinstance(module, StochasticAdd)} == {0}


def test_stochastic_depth_drops_whole_images_in_training_only() -> None:
    torch.manual_seed(0)
    join = StochasticAdd(0.5)
    branch, shortcut = torch.ones(64, 2, 3, 3), torch.full((64, 2, 3, 3), 10.0)
    sums = join.train()(branch, shortcut).flatten(1)
    # A kept branch counts twice, for half of them are kept.
    assert set(sums[:, 0].tolist()) == {10.0, 12.0}
    assert torch.equal(sums, sums[:, :1].expand_as(sums))
    assert torch.equal(join.eval()(branch, shortcut), branch + shortcut)


@pytest.mark.parametrize("name", ["se_mobilenet_v2", "mobilenet_v3_small", "mnasnet_a1", "efficientnet_b0"])
def test_gradients_reach_every_parameter(name: str) -> None:
    # In eval mode nothing is dropped, and BN does not take the mean of its few values away.
    network = build(installed()[name]).model.eval()
    network(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    unreached = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@pytest.mark.parametrize("name", BUILDERS)
def test_bad_arguments_are_named(name: str) -> None:
    builder = BUILDERS[name][0]
    with pytest.raises(ValueError, match="num_classes is 0: it must be 1 or more"):
        builder(num_classes=0)
    with pytest.raises(ValueError, match=r"dropout is 1: it must be 0 or more and below 1"):
        builder(dropout=1)


def test_bad_arguments_of_one_family_are_named() -> None:
    with pytest.raises(ValueError, match="width_mult is 0: it must be above 0"):
        mobilenet_v2(width_mult=0)
    with pytest.raises(ValueError, match='size is \'medium\': it must be "large" or "small"'):
        mobilenet_v3(size="medium")
    with pytest.raises(ValueError, match="bn_eps is 0: it must be above 0"):
        mobilenet_v3(size="small", bn_eps=0)
    with pytest.raises(ValueError, match="bn_momentum is 2: it must be above 0 and at most 1"):
        mobilenet_v3(size="small", bn_momentum=2)
    with pytest.raises(ValueError, match="stochastic_depth is 1: it must be 0 or more and below 1"):
        efficientnet_b0(stochastic_depth=1)


def test_a_thin_mobilenet_v2_keeps_its_last_convolution() -> None:
    # arXiv 1801.04381, Sec. 4: multipliers below one leave the very last convolution as it is.
    with torch.device("meta"):
        assert mobilenet_v2(width_mult=0.35).head.fc.in_features == 1280
        assert mobilenet_v2(width_mult=1.4).head.fc.in_features == 1792
