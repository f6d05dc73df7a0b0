"""Networks for CIFAR: totals, sites, shortcuts, pre-activation, and the random mixture of Shake-Shake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.mobilenet_cifar import mobilenet_cifar
from selab.archs.resnet_cifar import PreActivationBlock, ZeroPad, resnet_cifar
from selab.archs.shake_shake import shake_shake
from selab.archs.shufflenet_cifar import shufflenet_cifar
from selab.archs.vgg_cifar import vgg16_cifar
from selab.archs.wide_resnet import wide_resnet
from selab.attention.insert import insert_se
from selab.cost.count import count
from selab.models.catalog import installed

FAMILIES = (
    "resnet_cifar",
    "resnet_3x3",
    "resnext_cifar",
    "wide_resnet",
    "shake_shake",
    "vgg_cifar",
    "mobilenet_cifar",
    "shufflenet_cifar",
)
VARIANTS = [name for name, variant in installed().items() if variant.family in FAMILIES]

# Expected counts by arithmetic, layer by layer: (parameters, MACs).
Counts = tuple[int, int]


def add(*counts: Counts) -> Counts:
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def conv(in_channels: int, out: int, kernel: int, side: int, groups: int = 1) -> Counts:
    """A convolution without bias to a map of side x side."""
    weights = in_channels // groups * out * kernel**2
    return weights, weights * side**2


def bn(channels: int) -> Counts:
    """Scale and shift, whose multiplications are not counted."""
    return 2 * channels, 0


def linear(in_channels: int, out: int) -> Counts:
    return in_channels * out + out, in_channels * out


def se(channels: list[int], reduction: int = 16, *, bias: bool = True) -> Counts:
    """2 C^2 / r weights per site (arXiv 1709.01507, eq. 5), each met once; biases, where there are any: C / r and C."""
    weights = sum(2 * c * (c // reduction) for c in channels)
    return weights + (sum(c // reduction + c for c in channels) if bias else 0), weights


def sites(blocks: int, first: int) -> list[int]:
    """Channels of three stages that double."""
    return [first] * blocks + [2 * first] * blocks + [4 * first] * blocks


def resnet164_macs() -> int:
    """18 bottlenecks in each stage; the first 1x1 of stages 2 and 3 strides."""
    total, c, side = 3 * 16 * 9 * 32**2, 16, 32
    for stage, width in enumerate((16, 32, 64)):
        side //= 2 if stage else 1
        first = (c * width + width * width * 9 + width * 4 * width + c * 4 * width) * side**2
        total += first + 17 * (4 * width * width + width * width * 9 + width * 4 * width) * side**2
        c = 4 * width
    return total + 256 * 10


def wide_resnet_counts(blocks: int, width_mult: int) -> Counts:
    c, side = 16, 32
    total = conv(3, c, 3, side)
    for stage, base in enumerate((16, 32, 64)):
        out = base * width_mult
        side //= 2 if stage else 1
        for block in range(blocks):
            total = add(total, bn(c), conv(c, out, 3, side), bn(out), conv(out, out, 3, side))
            # No BN on the projection: it reads what the block's first BN and ReLU made.
            total = add(total, conv(c, out, 1, side)) if block == 0 else total
            c = out
    return add(total, bn(c), linear(c, 10))


def shake_shake_counts(width: int) -> Counts:
    """26 layers: four blocks of two paths of two 3x3 in each stage."""
    c, side = 16, 32
    total = add(conv(3, c, 3, side), bn(c))
    for stage in range(3):
        out = width * 2**stage
        side //= 2 if stage else 1
        for block in range(4):
            path = add(conv(c, out, 3, side), bn(out), conv(out, out, 3, side), bn(out))
            total = add(total, path, path)
            # Two 1x1 convolutions of half the channels each, and one BN.
            total = add(total, conv(c, out // 2, 1, side), conv(c, out // 2, 1, side), bn(out)) if not block else total
            c = out
    return add(total, linear(c, 10))


def resnext_counts(width: int, groups: int, paths: int) -> Counts:
    """29 layers: three blocks of paths of 1x1, grouped 3x3 and 1x1 in each stage; Shake-Shake has two paths."""
    c, side = 64, 32
    total = add(conv(3, c, 3, side), bn(c))
    for stage in range(3):
        inner, out = width * groups * 2**stage, 256 * 2**stage
        for block in range(3):
            before = side
            side //= 2 if stage and block == 0 else 1
            path = add(conv(c, inner, 1, before), bn(inner), conv(inner, inner, 3, side, groups), bn(inner))
            path = add(path, conv(inner, out, 1, side), bn(out))
            total = add(total, *[path] * paths)
            total = add(total, conv(c, out, 1, side), bn(out)) if block == 0 else total
            c = out
    return add(total, linear(c, 10))


RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet_3x3_counts(depth: int) -> Counts:
    """A stem of one 3x3; stages on 32, 16, 8 and 4 pixels; bottlenecks stride in their 3x3."""
    c, side, basic = 64, 32, depth < 50
    total = add(conv(3, c, 3, side), bn(c))
    for stage, blocks in enumerate(RESNET_BLOCKS[depth]):
        width = 64 * 2**stage
        out = width if basic else 4 * width
        for block in range(blocks):
            before = side
            side //= 2 if stage and block == 0 else 1
            if basic:
                total = add(total, conv(c, width, 3, side), bn(width), conv(width, width, 3, side), bn(width))
            else:
                total = add(total, conv(c, width, 1, before), bn(width), conv(width, width, 3, side), bn(width))
                total = add(total, conv(width, out, 1, side), bn(out))
            total = add(total, conv(c, out, 1, side), bn(out)) if c != out or before != side else total
            c = out
    return add(total, linear(c, 100))


def resnet_3x3_sites(depth: int) -> list[int]:
    wider = 1 if depth < 50 else 4
    return [64 * 2**stage * wider for stage, blocks in enumerate(RESNET_BLOCKS[depth]) for _ in range(blocks)]


VGG16 = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
VGG16_SIDES = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
MOBILENET = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
MOBILENET_SIDES = [32, 16, 16, 8, 8, *[4] * 6, 2, 2]
SHUFFLENET = [240] * 3 + [480] * 7 + [960] * 3


def vgg16_counts() -> Counts:
    """With the convolutions' biases, one per channel."""
    steps = zip([3, *VGG16], VGG16, VGG16_SIDES, strict=False)
    return add(*[add(conv(c, out, 3, side), bn(out), (out, 0)) for c, out, side in steps], linear(512, 10))


def mobilenet_counts() -> Counts:
    total = add(conv(3, 32, 3, 32), bn(32))
    for c, out, side in zip([32, *MOBILENET], MOBILENET, MOBILENET_SIDES, strict=False):
        total = add(total, conv(c, c, 3, side, c), bn(c), conv(c, out, 1, side), bn(out))
    return add(total, linear(1024, 10))


def shufflenet_counts() -> Counts:
    """4, 8 and 4 units of 1x1, depthwise 3x3 and 1x1, in three groups; a bottleneck has a quarter of the output."""
    c, side = 24, 32
    total = add(conv(3, c, 3, side), bn(c))
    for units, out in ((4, 240), (8, 480), (4, 960)):
        inner = out // 4
        # The first unit's 1x1 runs before the stride, ungrouped behind the stem; c of its outputs are pooled inputs.
        total = add(total, conv(c, inner, 1, side, 1 if c == 24 else 3), bn(inner))
        side //= 2
        total = add(total, conv(inner, inner, 3, side, inner), bn(inner), conv(inner, out - c, 1, side, 3), bn(out - c))
        unit = add(conv(out, inner, 1, side, 3), bn(inner), conv(inner, inner, 3, side, inner), bn(inner))
        total = add(total, *[add(unit, conv(inner, out, 1, side, 3), bn(out))] * (units - 1))
        c = out
    return add(total, linear(960, 10))


# MACs of basic blocks: the stem; 6n convolutions of 3x3, each 16*16*9 * 32^2 whatever the stage, but for the two that
# double the channels, which make half; two projections, on maps of 16x16 and 8x8; the classifier.
RESNET_MACS = {
    depth: 3 * 16 * 9 * 32**2 + (depth - 2 - 1) * 16 * 16 * 9 * 32**2 + 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 10
    for depth in (20, 32, 56, 110)
}
# Parameters: the integers that osmr/imgclsmob asserts in its resnet_cifar.py and preresnet_cifar.py; option A has no
# projections and none of their BN.
RESNETS: dict[str, Counts] = {
    "resnet20_cifar": (272_474, RESNET_MACS[20]),
    # Two blocks more than 20 layers have in each stage.
    "resnet32_cifar": (272_474 + 2 * sum(2 * 9 * c * c + 4 * c for c in (16, 32, 64)), RESNET_MACS[32]),
    "resnet56_cifar": (855_770, RESNET_MACS[56]),
    "resnet110_cifar": (1_730_714, RESNET_MACS[110]),
    "resnet164_cifar": (1_704_154, resnet164_macs()),
    "resnet20_cifar_option_a": (
        272_474 - (16 * 32 + 2 * 32) - (32 * 64 + 2 * 64),
        RESNET_MACS[20] - 16 * 32 * 16**2 - 32 * 64 * 8**2,
    ),
    "preresnet20_cifar": (272_282, RESNET_MACS[20]),
    "preresnet56_cifar": (855_578, RESNET_MACS[56]),
    "preresnet110_cifar": (1_730_522, RESNET_MACS[110]),
    "preresnet164_cifar": (1_703_258, resnet164_macs()),
}
RESNET_SITES = {"20": sites(3, 16), "56": sites(9, 16), "110": sites(18, 16), "164": sites(18, 64)}

TOTALS: dict[str, tuple[int, int]] = {
    **RESNETS,
    "se_resnet20_cifar": add(RESNETS["resnet20_cifar"], se(RESNET_SITES["20"])),
    "se_resnet32_cifar": add(RESNETS["resnet32_cifar"], se(sites(5, 16))),
    "se_resnet56_cifar": add(RESNETS["resnet56_cifar"], se(RESNET_SITES["56"])),
    "se_resnet110_cifar": add(RESNETS["resnet110_cifar"], se(RESNET_SITES["110"])),
    "se_resnet164_cifar": add(RESNETS["resnet164_cifar"], se(RESNET_SITES["164"])),
    "se_resnet20_cifar_option_a": add(RESNETS["resnet20_cifar_option_a"], se(RESNET_SITES["20"])),
    **{
        f"se_resnet20_cifar_r{r}_no_bias": add(RESNETS["resnet20_cifar"], se(RESNET_SITES["20"], r, bias=False))
        for r in (16, 8, 4)
    },
    "se_preresnet20_cifar": add(RESNETS["preresnet20_cifar"], se(RESNET_SITES["20"])),
    "se_preresnet56_cifar": add(RESNETS["preresnet56_cifar"], se(RESNET_SITES["56"])),
    "se_preresnet110_cifar": add(RESNETS["preresnet110_cifar"], se(RESNET_SITES["110"])),
    "se_preresnet164_cifar": add(RESNETS["preresnet164_cifar"], se(RESNET_SITES["164"])),
    "wrn_16_8": wide_resnet_counts(2, 8),
    "se_wrn_16_8": add(wide_resnet_counts(2, 8), se(sites(2, 128))),
    "wrn_28_10": wide_resnet_counts(4, 10),
    "se_wrn_28_10": add(wide_resnet_counts(4, 10), se(sites(4, 160))),
    **{f"resnext29_{groups}x64d": resnext_counts(64, groups, 1) for groups in (4, 8, 16)},
    **{f"se_resnext29_{g}x64d": add(resnext_counts(64, g, 1), se(sites(3, 256))) for g in (4, 8, 16)},
    **{f"resnet{depth}_cifar": resnet_3x3_counts(depth) for depth in RESNET_BLOCKS},
    **{f"se_resnet{d}_cifar": add(resnet_3x3_counts(d), se(resnet_3x3_sites(d))) for d in RESNET_BLOCKS},
    "shake_shake_26_2x96d": shake_shake_counts(96),
    "se_shake_shake_26_2x96d": add(shake_shake_counts(96), se(sites(4, 96))),
    "shake_even_29_2x4x64d": resnext_counts(64, 4, 2),
    "se_shake_even_29_2x4x64d": add(resnext_counts(64, 4, 2), se(sites(3, 256))),
    "vgg16_cifar": vgg16_counts(),
    "se_vgg16_cifar": add(vgg16_counts(), se(VGG16, bias=False)),
    "mobilenet_cifar": mobilenet_counts(),
    "se_mobilenet_cifar": add(mobilenet_counts(), se(MOBILENET, bias=False)),
    "shufflenet_cifar": shufflenet_counts(),
    "se_shufflenet_cifar": add(shufflenet_counts(), se(SHUFFLENET, bias=False)),
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == set(VARIANTS)


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_the_parameters_and_macs_of_its_source(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]


def test_arithmetic_agrees_with_published_integers() -> None:
    # osmr/imgclsmob, seresnet_cifar.py.
    assert TOTALS["se_resnet20_cifar"][0] == 274_847
    assert TOTALS["se_resnet56_cifar"][0] == 862_889
    assert TOTALS["se_resnet110_cifar"][0] == 1_744_952
    assert TOTALS["se_resnet164_cifar"][0] == 1_906_258
    # The same formula gives osmr/imgclsmob's wrn16_10_cifar10, wrn28_10_cifar10 and wrn40_8_cifar10.
    assert wide_resnet_counts(2, 10)[0] == 17_116_634
    assert wide_resnet_counts(4, 10)[0] == 36_479_194
    assert wide_resnet_counts(6, 8)[0] == 35_748_314
    # osmr/imgclsmob, resnext_cifar.py.
    assert TOTALS["resnext29_16x64d"][0] == 68_155_210
    # As counted from moskomule/senet.pytorch (SE without bias) and kuangliu/pytorch-cifar.
    assert [TOTALS[f"se_resnet20_cifar_r{r}_no_bias"][0] for r in (4, 8, 16)] == [280_538, 276_506, 274_490]
    assert TOTALS["vgg16_cifar"][0] == 14_728_266
    assert TOTALS["mobilenet_cifar"][0] == 3_217_226
    # The networks for ImageNet less 990 rows of their classifier: their stem and pooling differ in no parameter.
    assert TOTALS["shufflenet_cifar"][0] == 1_865_728 - 990 * (960 + 1)
    assert TOTALS["se_shufflenet_cifar"][0] == 2_434_528 - 990 * (960 + 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_parameters_are_met(name: str) -> None:
    for entry in installed()[name].published:
        if entry.metric == "params":
            printed = entry.printed
            params = TOTALS[name][0]
            digits = len(printed.removesuffix("M").partition(".")[2])
            assert printed == (f"{params / 1e6:.{digits}f}M" if printed.endswith("M") else f"{params:,}")


RESIDUAL_SITES = {
    "resnet20_cifar": (1, 3, sites(3, 16)),
    "preresnet164_cifar": (1, 18, sites(18, 64)),
    "wrn_16_8": (2, 2, sites(2, 128)),
    "shake_shake_26_2x96d": (1, 4, sites(4, 96)),
    "shake_even_29_2x4x64d": (1, 3, sites(3, 256)),
}


@pytest.mark.parametrize("name", RESIDUAL_SITES)
def test_residual_sites(name: str) -> None:
    first, blocks, channels = RESIDUAL_SITES[name]
    paths = [f"stage{stage}.{block}" for stage in range(first, first + 3) for block in range(blocks)]
    assert built(name).model.site_groups() == {"residual": paths}  # type: ignore[operator]
    found = built(f"se_{name}").insertions
    assert [insertion.path for insertion in found] == paths
    assert [insertion.channels for insertion in found] == channels


@pytest.mark.parametrize(
    ("name", "group", "channels"), [("vgg16_cifar", "conv", VGG16), ("mobilenet_cifar", "pointwise", MOBILENET)]
)
def test_plain_sites(name: str, group: str, channels: list[int]) -> None:
    found = built(f"se_{name}").insertions
    assert [insertion.channels for insertion in found] == channels
    convs = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    blocks = {1: 1, 2: 2, 3: 2, 4: 6, 5: 2}
    expected = (
        [f"stage{stage}.conv{conv + 1}" for stage in convs for conv in range(convs[stage])]
        if group == "conv"
        else [f"stage{stage}.{block}.pointwise" for stage in blocks for block in range(blocks[stage])]
    )
    assert [insertion.path for insertion in found] == expected


def test_shufflenet_gates_the_13_units_of_stride_1() -> None:
    paths = [f"stage{stage}.{unit}" for stage, units in ((2, 4), (3, 8), (4, 4)) for unit in range(1, units)]
    assert built("shufflenet_cifar").model.site_groups() == {"residual": paths}  # type: ignore[operator]
    found = built("se_shufflenet_cifar").insertions
    assert [insertion.path for insertion in found] == paths
    assert [insertion.channels for insertion in found] == SHUFFLENET


Small = Callable[[], Any]
SMALL: dict[str, Small] = {
    "resnet": lambda: resnet_cifar(8, num_classes=3),
    "resnet_pad": lambda: resnet_cifar(8, num_classes=3, shortcut="pad"),
    "resnet_bottleneck": lambda: resnet_cifar(11, num_classes=3, bottleneck=True),
    "preresnet": lambda: resnet_cifar(8, num_classes=3, preactivation=True),
    "preresnet_pad": lambda: resnet_cifar(8, num_classes=3, preactivation=True, shortcut="pad"),
    "preresnet_bottleneck": lambda: resnet_cifar(11, num_classes=3, preactivation=True, bottleneck=True),
    "wide_resnet": lambda: wide_resnet(10, width_mult=1, num_classes=3, dropout=0.3),
    "shake_shake": lambda: shake_shake(8, block="basic", width=4, num_classes=3),
    "shake_even": lambda: shake_shake(11, block="resnext", width=2, groups=2, num_classes=3, shake_backward=False),
    "vgg": lambda: vgg16_cifar(num_classes=3),
    "mobilenet": lambda: mobilenet_cifar(num_classes=3),
    "shufflenet": lambda: shufflenet_cifar(num_classes=3),
}


@pytest.mark.parametrize("small", SMALL)
def test_every_parameter_gets_a_gradient(small: str) -> None:
    torch.manual_seed(0)
    network = SMALL[small]().train()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("small", SMALL)
def test_convolutions_that_a_bn_follows_have_no_bias_but_in_vgg(small: str) -> None:
    with torch.device("meta"):
        network = SMALL[small]()
    biases = [module.bias is not None for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert biases == [small == "vgg"] * len(biases)


# ---------------------------------------------------------------------------------------------------- residual blocks


@pytest.mark.parametrize("small", ["resnet", "resnet_bottleneck", "preresnet", "preresnet_bottleneck", "wide_resnet"])
def test_after_3x3_follows_the_relu_of_the_first_3x3(small: str) -> None:
    network = SMALL[small]()
    for path in network.site_groups()["residual"]:
        block = network.get_submodule(path)
        names = [name for name, _ in block.branch.named_children()]
        until = names[: names.index(block.after_3x3) + 1]
        kernels = [block.branch.get_submodule(name).kernel_size for name in until if name.startswith("conv")]
        assert kernels[-1] == (3, 3)
        assert kernels.count((3, 3)) == 1
        assert isinstance(block.branch.get_submodule(block.after_3x3), nn.ReLU)


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("small", ["resnet_pad", "resnet_bottleneck", "preresnet", "wide_resnet"])
def test_every_placement_can_be_built(small: str, placement: Any) -> None:
    with torch.device("meta"):
        network = SMALL[small]()
    found = insert_se(network, "residual", placement=placement, reduction=2, input_nchw=(1, 3, 32, 32))
    assert len(found) == 3


def test_a_silent_branch_leaves_the_shortcut() -> None:
    for small in ("preresnet", "wide_resnet"):
        block = SMALL[small]().eval().get_submodule("stage1.0" if small == "preresnet" else "stage2.0")
        assert isinstance(block.shortcut, nn.Identity)
        nn.init.zeros_(block.branch.conv2.weight)
        x = torch.randn(2, 16, 8, 8)
        before = x.clone()
        # Nothing stands behind the addition: negative values pass.
        assert torch.equal(block(x), before)
        assert torch.equal(x, before)


def test_projection_reads_the_preactivation() -> None:
    block: Any = resnet_cifar(8, preactivation=True).eval().get_submodule("stage2.0")
    nn.init.zeros_(block.branch.conv2.weight)
    # All negative: nothing is left behind the ReLU, so nothing of it is projected.
    assert not block(-torch.rand(1, 16, 8, 8) - 0.1).any()
    assert block(torch.rand(1, 16, 8, 8) + 0.1).any()


def test_padded_shortcut_reads_the_block_input() -> None:
    block: Any = resnet_cifar(8, preactivation=True, shortcut="pad").eval().get_submodule("stage2.0")
    assert isinstance(block, PreActivationBlock)
    nn.init.zeros_(block.branch.conv2.weight)
    x = -torch.rand(1, 16, 8, 8)
    assert torch.equal(block(x)[:, :16], x[:, :, ::2, ::2])


def test_zero_pad_subsamples_and_appends_zeros() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = ZeroPad(1, 3, 2)(x)
    assert out.shape == (1, 3, 2, 2)
    assert out.flatten().tolist() == [0.0, 2.0, 8.0, 10.0] + 8 * [0.0]


def test_stride_in_moves_macs_but_no_parameters() -> None:
    with torch.device("meta"):
        one, three = (resnet_cifar(164, bottleneck=True, stride_in=stride_in) for stride_in in ("1x1", "3x3"))
    costs = [count(network, (1, 3, 32, 32)) for network in (one, three)]
    assert costs[0].params == costs[1].params
    # Two of the first 1x1 convolutions then run on maps of four times the size.
    extra = 64 * 32 * (32**2 - 16**2) + 128 * 64 * (16**2 - 8**2)
    assert costs[1].macs.conv_linear - costs[0].macs.conv_linear == extra


def test_dropout_stands_between_the_convolutions_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    block: Any = wide_resnet(10, width_mult=1, dropout=0.9).get_submodule("stage2.0")
    assert [name for name, _ in block.branch.named_children()] == ["conv1", "bn2", "relu2", "dropout", "conv2"]
    x = torch.randn(2, 16, 8, 8)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


# --------------------------------------------------------------------------------------------------------- ShuffleNet


def test_shufflenet_keeps_the_resolution_in_its_stem_and_halves_it_in_each_stage() -> None:
    with torch.device("meta"):
        network: Any = shufflenet_cifar().eval()
        x = network.stem(torch.empty(2, 3, 32, 32))
        assert x.shape == (2, 24, 32, 32)
        for stage, shape in (("stage2", (240, 16, 16)), ("stage3", (480, 8, 8)), ("stage4", (960, 4, 4))):
            x = network.get_submodule(stage)(x)
            assert x.shape == (2, *shape)


def test_shufflenet_shuffles_three_groups_and_pools_what_it_concatenates() -> None:
    network: Any = shufflenet_cifar().eval()
    # Three groups of 20 channels: the first of each, then the second of each.
    shuffled = network.stage2[1].branch.shuffle(torch.arange(60.0).reshape(1, 60, 1, 1)).flatten().tolist()
    assert shuffled == [20.0 * group + channel for channel in range(20) for group in range(3)]
    x = torch.rand(1, 24, 4, 4)
    out = network.stage2[0](x)
    # Means over 3x3 windows two apart, the first of which has five zeros around its four pixels.
    assert torch.allclose(out[0, :24, 0, 0], x[0, :, :2, :2].sum((1, 2)) / 9)
    assert torch.allclose(out[0, :24, 1, 1], x[0, :, 1:, 1:].mean((1, 2)))


@pytest.mark.parametrize(("placement", "quarter"), [("standard", 1), ("pre", 1), ("post", 1), ("3x3", 4)])
def test_shufflenet_can_be_gated_at_every_placement(placement: Any, quarter: int) -> None:
    with torch.device("meta"):
        network = shufflenet_cifar()
    found = insert_se(network, "residual", placement=placement, reduction=4, input_nchw=(1, 3, 32, 32))
    # The depthwise 3x3 has a quarter of the unit's channels.
    assert [insertion.channels for insertion in found] == [channels // quarter for channels in SHUFFLENET]


def test_a_silent_unit_of_shufflenet_leaves_its_input() -> None:
    unit: Any = shufflenet_cifar().eval().get_submodule("stage2.1")
    nn.init.zeros_(unit.branch.bn3.weight)
    x = torch.randn(1, 240, 4, 4)
    before = x.clone()
    # A ReLU stands behind the addition.
    assert torch.equal(unit(x), before.relu())
    assert torch.equal(x, before)


# -------------------------------------------------------------------------------------------------- shapes and errors


@pytest.mark.parametrize("builder", [vgg16_cifar, mobilenet_cifar, shufflenet_cifar])
def test_larger_images_are_averaged(builder: Any) -> None:
    with torch.device("meta"):
        assert builder(num_classes=7).eval()(torch.empty(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (resnet_cifar, {"depth": 21}, r"depth is 21: with basic blocks it must be 6n \+ 2"),
        (resnet_cifar, {"depth": 2}, r"depth is 2: with basic blocks it must be 6n \+ 2"),
        (resnet_cifar, {"depth": 110, "bottleneck": True}, None),
        (resnet_cifar, {"depth": 112, "bottleneck": True}, r"depth is 112: with bottlenecks it must be 9n \+ 2"),
        (resnet_cifar, {"depth": 20, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (resnet_cifar, {"depth": 20, "shortcut": "C"}, 'shortcut is \'C\': it must be "projection" or "pad"'),
        (resnet_cifar, {"depth": 20, "stride_in": "2x2"}, 'stride_in is \'2x2\': it must be "1x1" or "3x3"'),
        (wide_resnet, {"depth": 18, "width_mult": 8}, r"depth is 18: it must be 6n \+ 4"),
        (wide_resnet, {"depth": 4, "width_mult": 8}, r"depth is 4: it must be 6n \+ 4"),
        (wide_resnet, {"depth": 16, "width_mult": 0}, "width_mult is 0: it must be 1 or more"),
        (wide_resnet, {"depth": 16, "width_mult": 8, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (wide_resnet, {"depth": 16, "width_mult": 8, "dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and"),
        (
            shake_shake,
            {"depth": 26, "block": "wide", "width": 96},
            'block is \'wide\': it must be "basic" or "resnext"',
        ),
        (shake_shake, {"depth": 29, "block": "basic", "width": 96}, r"depth is 29: with block 'basic' it must be 6n"),
        (shake_shake, {"depth": 26, "block": "resnext", "width": 64}, r"with block 'resnext' it must be 9n \+ 2"),
        (shake_shake, {"depth": 26, "block": "basic", "width": 95}, "width is 95: it must be 1 or more, and even"),
        (shake_shake, {"depth": 29, "block": "resnext", "width": 0}, "width is 0: it must be 1 or more"),
        (shake_shake, {"depth": 26, "block": "basic", "width": 96, "groups": 4}, "groups is 4: .* and 1 with basic"),
        (shake_shake, {"depth": 29, "block": "resnext", "width": 64, "groups": 0}, "groups is 0: it must be 1 or"),
        (shake_shake, {"depth": 26, "block": "basic", "width": 96, "num_classes": 0}, "num_classes is 0: it must be"),
        (vgg16_cifar, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (mobilenet_cifar, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (shufflenet_cifar, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        # 110 = 9 * 12 + 2 as well.
        with torch.device("meta"):
            assert len(builder(**arguments).site_groups()["residual"]) == 3 * 12
        return
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
