"""ShuffleNet V2, RegNet and GhostNet: totals, sites, the RegNet rule, and what each unit does."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.ghostnet import GhostModule, ghostnet
from selab.archs.regnet import regnet, stage_shapes
from selab.archs.shufflenet_v2 import ConcatShuffle, shufflenet_v2
from selab.attention.se import SqueezeExcitation
from selab.models.build import build
from selab.models.catalog import installed

FAMILIES = ("shufflenet_v2", "regnet", "ghostnet")
VARIANTS = [name for name, variant in installed().items() if variant.family in FAMILIES]

# Expected counts by arithmetic, layer by layer: (parameters, MACs).
Counts = tuple[int, int]


def add(*counts: Counts) -> Counts:
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def conv_bn(in_channels: int, out: int, kernel: int, side: int, groups: int = 1) -> Counts:
    """A convolution without bias to a map of side x side, and scale and shift of its BN."""
    weights = in_channels // groups * out * kernel**2
    return weights + 2 * out, weights * side**2


def linear(in_channels: int, out: int) -> Counts:
    return in_channels * out + out, in_channels * out


def se(channels: int, squeezed: int) -> Counts:
    """Two fully connected layers with biases."""
    return add(linear(channels, squeezed), linear(squeezed, channels))


# Channels of stages 2 to 4 and of the last 1x1: arXiv 1807.11164, Table 5.
SHUFFLENET_V2 = {
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}


def shufflenet_v2_counts(level: str, *, with_se: bool = False) -> Counts:
    *stages, last = SHUFFLENET_V2[level]
    c, side = 24, 56
    total = conv_bn(3, c, 3, 112)
    for out, units in zip(stages, (4, 8, 4), strict=True):
        half = out // 2
        side //= 2
        # The first 1x1 of a stride-2 unit runs before the stride.
        total = add(total, conv_bn(c, half, 1, 2 * side), conv_bn(half, half, 3, side, half))
        total = add(total, conv_bn(half, half, 1, side), conv_bn(c, c, 3, side, c), conv_bn(c, half, 1, side))
        for _ in range(units - 1):
            total = add(total, conv_bn(half, half, 1, side), conv_bn(half, half, 3, side, half))
            total = add(total, conv_bn(half, half, 1, side))
        if with_se:
            total = add(total, *[se(half, half // 16)] * units)
        c = out
    return add(total, conv_bn(c, last, 1, side), linear(last, 1000))


# (width, blocks) of the stages in pycls and timm; RegNetX-800MF and RegNetY-400MF are torchvision's too.
X_400MF, X_800MF = ((32, 1), (64, 2), (160, 7), (384, 12)), ((64, 1), (128, 3), (288, 7), (672, 5))
Y_400MF, Y_800MF = ((48, 1), (104, 3), (208, 6), (440, 6)), ((64, 1), (128, 3), (320, 8), (768, 2))
# torchvision rounds 392 to 400, 136 to 144 and 776 to 784 where pycls rounds to 384, 128 and 768.
X_400MF_TV, Y_800MF_TV = ((32, 1), (64, 2), (160, 7), (400, 12)), ((64, 1), (144, 3), (320, 8), (784, 2))


def regnet_counts(stages: tuple[tuple[int, int], ...], group_width: int, *, with_se: bool = False) -> Counts:
    c, side = 32, 112
    total = conv_bn(3, c, 3, side)
    for width, blocks in stages:
        side //= 2
        for block in range(blocks):
            first = block == 0
            # The 3x3 strides, so that the first 1x1 of a stage still sees the larger map.
            total = add(total, conv_bn(c, width, 1, 2 * side if first else side))
            total = add(total, conv_bn(width, width, 3, side, width // group_width), conv_bn(width, width, 1, side))
            total = add(total, conv_bn(c, width, 1, side)) if first else total
            total = add(total, se(width, c // 4)) if with_se else total
            c = width
    return add(total, linear(c, 1000))


# Kernel, hidden channels, output channels, SE's squeeze width or 0; by resolution: arXiv 1911.11907, Table 1.
GHOSTNET = (
    ((3, 16, 16, 0),),
    ((3, 48, 24, 0), (3, 72, 24, 0)),
    # A quarter of 72 is 18 and of 120 is 30: to multiples of 4 that is 20 and 32.
    ((5, 72, 40, 20), (5, 120, 40, 32)),
    ((3, 240, 80, 0), (3, 200, 80, 0), (3, 184, 80, 0), (3, 184, 80, 0), (3, 480, 112, 120), (3, 672, 112, 168)),
    ((5, 672, 160, 168), (5, 960, 160, 0), (5, 960, 160, 240), (5, 960, 160, 0), (5, 960, 160, 240)),
)


def ghost_counts(in_channels: int, out: int, side: int) -> Counts:
    return add(conv_bn(in_channels, out // 2, 1, side), conv_bn(out // 2, out // 2, 3, side, out // 2))


def ghostnet_counts(*, with_se: bool = False) -> Counts:
    c, side = 16, 112
    total = conv_bn(3, c, 3, side)
    for stage, blocks in enumerate(GHOSTNET):
        for block, (kernel, hidden, out, squeezed) in enumerate(blocks):
            down = stage > 0 and block == 0
            total = add(total, ghost_counts(c, hidden, side))
            if down:
                side //= 2
                total = add(total, conv_bn(hidden, hidden, kernel, side, hidden))
            if down or c != out:
                total = add(total, conv_bn(c, c, kernel, side, c), conv_bn(c, out, 1, side))
            total = add(total, ghost_counts(hidden, out, side))
            total = add(total, se(hidden, squeezed)) if with_se and squeezed else total
            c = out
    return add(total, conv_bn(c, 960, 1, side), linear(960, 1280), linear(1280, 1000))


# Parameters: integers of torchvision 0.27.1 and timm 1.0.31 where they have the network. MACs of RegNets: "flops" of
# pycls (dev/model_complexity.json) less the biases, which it adds. The rest is the arithmetic above.
TOTALS: dict[str, tuple[int, int]] = {
    "shufflenet_v2_x0_5": (1_366_792, shufflenet_v2_counts("x0_5")[1]),
    "shufflenet_v2_x1_0": (2_278_604, shufflenet_v2_counts("x1_0")[1]),
    "shufflenet_v2_x1_5": (3_503_624, shufflenet_v2_counts("x1_5")[1]),
    "shufflenet_v2_x2_0": (7_393_996, shufflenet_v2_counts("x2_0")[1]),
    "se_shufflenet_v2_x0_5": shufflenet_v2_counts("x0_5", with_se=True),
    "se_shufflenet_v2_x1_0": shufflenet_v2_counts("x1_0", with_se=True),
    "se_shufflenet_v2_x1_5": shufflenet_v2_counts("x1_5", with_se=True),
    "se_shufflenet_v2_x2_0": shufflenet_v2_counts("x2_0", with_se=True),
    "regnet_x_400mf": (5_495_976, regnet_counts(X_400MF_TV, 16)[1]),
    "regnetx_004": (5_157_512, 397_678_568 - 1000),
    "regnet_x_800mf": (7_259_656, 799_700_712 - 1000),
    "se_regnet_x_400mf": regnet_counts(X_400MF_TV, 16, with_se=True),
    "se_regnetx_004": regnet_counts(X_400MF, 16, with_se=True),
    "se_regnet_x_800mf": regnet_counts(X_800MF, 16, with_se=True),
    "regnet_y_400mf_no_se": regnet_counts(Y_400MF, 8),
    "regnet_y_800mf_no_se": regnet_counts(Y_800MF_TV, 16),
    "regnety_008_no_se": regnet_counts(Y_800MF, 16),
    # SE's biases: the squeeze widths, a quarter of the channels that enter each block, and the blocks' widths.
    "regnet_y_400mf": (
        4_344_144,
        401_849_056 - 1000 - (32 + 48 + 3 * 104 + 6 * 208 + 5 * 440) // 4 - (48 + 3 * 104 + 6 * 208 + 6 * 440),
    ),
    "regnet_y_800mf": (6_432_512, regnet_counts(Y_800MF_TV, 16, with_se=True)[1]),
    "regnety_008": (
        6_263_168,
        797_183_328 - 1000 - (32 + 64 + 3 * 128 + 8 * 320 + 768) // 4 - (64 + 3 * 128 + 8 * 320 + 2 * 768),
    ),
    "ghostnet_100": (5_182_508, ghostnet_counts(with_se=True)[1]),
    "ghostnet_100_no_se": ghostnet_counts(),
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == set(VARIANTS)


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", VARIANTS)
def test_totals(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]


def test_arithmetic_agrees_with_the_published_totals() -> None:
    for level in SHUFFLENET_V2:
        assert shufflenet_v2_counts(level) == TOTALS[f"shufflenet_v2_{level}"]
    assert regnet_counts(X_400MF_TV, 16) == TOTALS["regnet_x_400mf"]
    assert regnet_counts(X_400MF, 16) == TOTALS["regnetx_004"]
    assert regnet_counts(X_800MF, 16) == TOTALS["regnet_x_800mf"]
    assert regnet_counts(Y_400MF, 8, with_se=True) == TOTALS["regnet_y_400mf"]
    assert regnet_counts(Y_800MF_TV, 16, with_se=True) == TOTALS["regnet_y_800mf"]
    assert regnet_counts(Y_800MF, 16, with_se=True) == TOTALS["regnety_008"]
    assert ghostnet_counts(with_se=True) == TOTALS["ghostnet_100"]


# The paths below are in checkpoints and records, so that a change here breaks them.


def test_se_of_shufflenet_v2_stands_in_all_units_on_their_own_half() -> None:
    insertions = built("se_shufflenet_v2_x1_0").insertions
    stages = ((2, 4, 58, 3), (3, 8, 116, 7), (4, 4, 232, 14))
    expected = [(f"stage{stage}.{unit}", c, s) for stage, units, c, s in stages for unit in range(units)]
    assert [(i.path, i.channels, i.squeeze_channels) for i in insertions] == expected
    assert {i.placement for i in insertions} == {"standard"}


def test_se_of_regnet_is_a_quarter_of_what_enters_the_block() -> None:
    insertions = built("regnet_y_400mf").insertions
    assert [i.path for i in insertions] == [
        f"stage{stage}.{block}" for stage, (_, blocks) in enumerate(Y_400MF, start=1) for block in range(blocks)
    ]
    widths = [32, *[width for width, blocks in Y_400MF for _ in range(blocks)]]
    assert [(i.channels, i.squeeze_channels) for i in insertions] == [(out, c // 4) for c, out in pairwise(widths)]


@pytest.mark.parametrize("name", ["regnet_y_400mf", "se_regnet_x_400mf"])
def test_se_of_regnet_follows_the_relu_of_the_3x3(name: str) -> None:
    model = built(name).model
    for path in model.site_groups()["residual"]:  # type: ignore[operator]
        children = [child for child, _ in model.get_submodule(f"{path}.branch").named_children()]
        assert children == ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "se", "conv3", "bn3"]


def test_se_of_ghostnet_stands_before_the_projection() -> None:
    built_ = built("ghostnet_100")
    assert [(i.path, i.channels, i.squeeze_channels) for i in built_.insertions] == [
        ("stage3.0.branch.depthwise", 72, 20),
        ("stage3.1.branch.expand", 120, 32),
        ("stage4.4.branch.expand", 480, 120),
        ("stage4.5.branch.expand", 672, 168),
        ("stage5.0.branch.depthwise", 672, 168),
        ("stage5.2.branch.expand", 960, 240),
        ("stage5.4.branch.expand", 960, 240),
    ]
    gated = [name for name, module in built_.model.named_modules() if isinstance(module, SqueezeExcitation)]
    assert gated == [f"{i.path}.se" for i in built_.insertions]


@pytest.mark.parametrize(
    ("name", "sites"),
    [("shufflenet_v2_x0_5", 16), ("regnetx_004", 22), ("regnety_008_no_se", 14), ("ghostnet_100_no_se", 16)],
)
def test_residual_sites_keep_their_contract(name: str, sites: int) -> None:
    network = built(name).model
    paths = network.site_groups()["residual"]  # type: ignore[operator]
    assert len(paths) == sites
    for path in paths:
        block: Any = network.get_submodule(path)
        assert isinstance(block.branch, nn.Sequential)
        assert not any(child.isdigit() for child, _ in block.branch.named_children())
        assert block.after_3x3 in dict(block.branch.named_children())
        assert not list(block.join.parameters())


def test_regnet_rule_gives_the_widths_of_its_release() -> None:
    x_400mf: Any = {"depth": 22, "w_0": 24, "w_a": 24.48, "w_m": 2.54, "group_width": 16}
    assert stage_shapes(**x_400mf, rounding="pycls") == [(width, blocks, 16) for width, blocks in X_400MF]
    assert stage_shapes(**x_400mf, rounding="torchvision") == [(width, blocks, 16) for width, blocks in X_400MF_TV]
    y_800mf: Any = {"depth": 14, "w_0": 56, "w_a": 38.84, "w_m": 2.4, "group_width": 16}
    assert stage_shapes(**y_800mf, rounding="pycls") == [(width, blocks, 16) for width, blocks in Y_800MF]
    assert stage_shapes(**y_800mf, rounding="torchvision") == [(width, blocks, 16) for width, blocks in Y_800MF_TV]


@pytest.mark.parametrize("rounding", ["pycls", "torchvision"])
def test_rounding_makes_no_difference_without_ties(rounding: str) -> None:
    x_800mf = stage_shapes(16, 56, 35.73, 2.28, 16, rounding)
    assert x_800mf == [(width, blocks, 16) for width, blocks in X_800MF]
    y_400mf = stage_shapes(16, 48, 27.89, 2.09, 8, rounding)
    assert y_400mf == [(width, blocks, 8) for width, blocks in Y_400MF]


def test_regnet_rule_by_hand() -> None:
    # u = 8, 16, ..., 64, so s = log2(1, 2, ..., 8) = 0, 1, 1.58, 2, 2.32, 2.58, 2.81, 3, rounded 0 1 2 2 2 3 3 3:
    # widths 8, 16, 32, 64. The first is narrower than a group and becomes its own; the others are multiples of 16.
    assert stage_shapes(8, 8, 8.0, 2.0, 16, "pycls") == [(8, 1, 8), (16, 1, 16), (32, 3, 16), (64, 3, 16)]
    # In groups of 24, 32 is nearest to 24, which is a quarter less than 32: torchvision takes 48.
    assert [width for width, _, _ in stage_shapes(8, 8, 8.0, 2.0, 24, "pycls")] == [8, 16, 24, 72]
    assert [width for width, _, _ in stage_shapes(8, 8, 8.0, 2.0, 24, "torchvision")] == [8, 16, 48, 72]


def test_concat_shuffle_alternates_the_paths() -> None:
    branch = torch.tensor([10.0, 11.0, 12.0]).reshape(1, 3, 1, 1)
    shortcut = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
    assert ConcatShuffle()(branch, shortcut).flatten().tolist() == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]


def test_shufflenet_v2_unit_keeps_the_first_half() -> None:
    unit = shufflenet_v2(num_classes=2, width_mult=0.5).eval().stage2[1]
    x = torch.rand(2, 48, 5, 5)
    before = x.clone()
    out = unit(x)
    # The kept half lies on the even channels now.
    assert torch.equal(out[:, ::2], before[:, :24])
    assert torch.equal(x, before)


def test_ghost_module_appends_a_filtered_copy() -> None:
    module = GhostModule(3, 8, relu=True).eval()
    ghost: Any = module.get_submodule("cheap.ghosts.conv")
    # A 3x3 kernel that passes its middle makes every ghost equal to its original, but for the BN's epsilon.
    nn.init.dirac_(ghost.weight, groups=4)
    out = module(torch.randn(2, 3, 5, 5))
    assert out.shape == (2, 8, 5, 5)
    torch.testing.assert_close(out[:, 4:], out[:, :4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["se_shufflenet_v2_x0_5", "regnet_y_400mf", "ghostnet_100"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = build(installed()[name]).model
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert bool(parameter.grad.isfinite().all()), path


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (shufflenet_v2, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (shufflenet_v2, {"width_mult": 0.75}, r"width_mult is 0\.75: it must be one of 0\.5, 1, 1\.5, 2"),
        (regnet, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (regnet, {"depth": 3}, "depth is 3: it must be 4 or more, for 4 stages"),
        (regnet, {"w_0": 20}, "w_0 is 20: it must be a positive multiple of 8"),
        (regnet, {"w_0": 0}, "w_0 is 0: it must be a positive multiple of 8"),
        (regnet, {"w_a": -1.0}, r"w_a is -1\.0: it must be 0 or more"),
        (regnet, {"w_a": float("nan")}, "w_a is nan: it must be 0 or more"),
        (regnet, {"w_m": 1.0}, r"w_m is 1\.0: it must be above 1"),
        (regnet, {"group_width": 0}, "group_width is 0: it must be 1 or more"),
        (regnet, {"rounding": "timm"}, 'rounding is \'timm\': it must be "pycls" or "torchvision"'),
        (regnet, {"w_a": 0.0}, r"depth 16, w_0 56, w_a 0 and w_m 2\.28 give 1 stages instead of 4: a larger w_m"),
        (ghostnet, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (ghostnet, {"dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and below 1"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
