"""small_cnn, MobileNet, ShuffleNet, VGG and ResNet: parameters, MACs and sites, from their sources or by arithmetic."""

import importlib
import tomllib
from importlib.resources import files
from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selab.archs.mobilenet import mobilenet_v1
from selab.archs.resnet import AddReLU, resnet
from selab.archs.shufflenet import ConcatReLU, shufflenet_v1
from selab.archs.small_cnn import small_cnn
from selab.archs.vgg import vgg16
from selab.models.catalog import installed

ARCHS = files("selab.archs")
FAMILIES: dict[str, dict[str, Any]] = {
    family: tomllib.loads(ARCHS.joinpath(f"{family}.toml").read_text(encoding="utf-8"))
    for family in ("mobilenet", "resnet", "shufflenet", "small_cnn", "vgg")
}
VARIANTS = [(family, name) for family, facts in FAMILIES.items() for name in facts["variants"]]
BASELINES = [(family, name) for family, name in VARIANTS if "se" not in FAMILIES[family]["variants"][name]]
SE_VARIANTS = [pair for pair in VARIANTS if pair not in BASELINES]


def build(family: str, name: str, device: str = "meta", **more: object) -> Any:
    """The network of a variant without its SE; on the meta device it costs no memory."""
    facts = FAMILIES[family]
    module, _, attribute = facts["builder"].partition(":")
    arguments = {"num_classes": facts["num_classes"], **facts["variants"][name].get("arguments", {}), **more}
    with torch.device(device):
        return getattr(importlib.import_module(module), attribute)(**arguments)


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, input_chw: list[int]) -> int:
    """Convolutions and dense layers; torch's counter takes a multiply-accumulate for two FLOPs."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, *input_chw, device="meta"))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return int(flops) // 2


def out_channels(site: nn.Module) -> int:
    """Channels that a gate at this site scales: those of the last convolution before it."""
    convs = [module for module in site.modules() if isinstance(module, nn.Conv2d)]
    branch = getattr(site, "branch", None)
    if branch is not None:
        convs = [module for module in branch.modules() if isinstance(module, nn.Conv2d)]
    return convs[-1].out_channels


def site_channels(family: str, name: str, group: str) -> list[int]:
    network = build(family, name)
    return [out_channels(network.get_submodule(path)) for path in network.site_groups()[group]]


# Expected counts by arithmetic, layer by layer.


def conv_bn(in_channels: int, out: int, kernel: int, groups: int = 1) -> int:
    """Weights of a convolution without bias, and scale and shift of its BN."""
    return in_channels // groups * out * kernel**2 + 2 * out


# (output channels, stride) of the 13 blocks: arXiv 1704.04861, Table 1, the last stride read as 1.
MOBILENET = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def mobilenet_counts(quarters: int) -> tuple[int, int]:
    """Parameters and MACs at 224x224 of the width `quarters` / 4."""
    c, side = 32 * quarters // 4, 112
    parameters, multiply_adds = conv_bn(3, c, 3), 3 * c * 9 * side**2
    for width, stride in MOBILENET:
        out = width * quarters // 4
        side //= stride
        parameters += conv_bn(c, c, 3, groups=c) + conv_bn(c, out, 1)
        multiply_adds += (c * 9 + c * out) * side**2
        c = out
    return parameters + c * 1000 + 1000, multiply_adds + c * 1000


# Output channels of stages 2 to 4: arXiv 1707.01083, Table 1.
SHUFFLENET = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}


def shufflenet_counts(groups: int, quarters: int = 4) -> tuple[int, int]:
    """Parameters and MACs at 224x224 of the scale `quarters` / 4."""
    c, side = 24 * quarters // 4, 56
    parameters, multiply_adds = conv_bn(3, c, 3), 3 * c * 9 * 112**2
    for stage, (units, width) in enumerate(zip((4, 8, 4), SHUFFLENET[groups], strict=True), start=2):
        out = width * quarters // 4
        middle = out // 4
        for unit in range(units):
            first = unit == 0
            first_groups = 1 if first and stage == 2 else groups
            last = out - c if first else out
            multiply_adds += c // first_groups * middle * side**2
            side //= 2 if first else 1
            multiply_adds += (middle * 9 + middle // groups * last) * side**2
            parameters += conv_bn(c, middle, 1, first_groups)
            parameters += conv_bn(middle, middle, 3, middle) + conv_bn(middle, last, 1, groups)
            c = out
    return parameters + c * 1000 + 1000, multiply_adds + c * 1000


VGG16 = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]

# (parameters, MACs). ResNets: counted from the authors' Caffe prototxts (github.com/hujie-frank/SENet, less the SE) for
# 50, 101 and 152; for 18, 34 and the MACs of v1.5 from the layer shapes, whose rounded values timm prints. VGG-16-BN:
# torchvision's parameters. MobileNets and ShuffleNets: parameters as in the tests of osmr/imgclsmob, MACs from the
# arithmetic above. The Keras example is spelled out.
BASE_TOTALS: dict[str, tuple[int, int]] = {
    "small_cnn": (
        (3 * 32 * 9 + 32) + (32 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (64 * 64 * 9 + 64) + (2304 * 512 + 512) + 5130,
        3 * 32 * 9 * 32**2 + 32 * 32 * 9 * 30**2 + 32 * 64 * 9 * 15**2 + 64 * 64 * 9 * 13**2 + 2304 * 512 + 512 * 10,
    ),
    "mobilenet": (4_231_976, 568_740_352),
    "mobilenet_0_75": (2_585_560, mobilenet_counts(3)[1]),
    "mobilenet_0_5": (1_331_592, mobilenet_counts(2)[1]),
    "mobilenet_0_25": (470_072, mobilenet_counts(1)[1]),
    "shufflenet": (1_865_728, shufflenet_counts(3)[1]),
    "shufflenet_g1": (1_531_936, shufflenet_counts(1)[1]),
    "shufflenet_g2": (1_733_848, shufflenet_counts(2)[1]),
    "shufflenet_g4": (1_968_344, shufflenet_counts(4)[1]),
    "shufflenet_g8": (2_434_768, shufflenet_counts(8)[1]),
    "shufflenet_0_5": (718_324, shufflenet_counts(3, 2)[1]),
    "shufflenet_0_25": (305_902, shufflenet_counts(3, 1)[1]),
    "vgg16": (138_365_992, 15_470_264_320),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 3_857_973_248),
    "resnet101": (44_549_160, 7_570_194_432),
    "resnet152": (60_192_808, 11_282_415_616),
    "resnet50_v1_5": (25_557_032, 4_089_184_256),
    "resnet101_v1_5": (44_549_160, 7_801_405_440),
    "resnet152_v1_5": (60_192_808, 11_513_626_624),
}


def resnet_channels(blocks: tuple[int, ...], first: int) -> list[int]:
    """Channels of the residual blocks' outputs: `first` in stage 2, doubled from stage to stage."""
    return [first * 2**stage for stage, count in enumerate(blocks) for _ in range(count)]


RESNET50 = resnet_channels((3, 4, 6, 3), 256)

# Channels at the sites of each SE variant, in the network's order.
SE_CHANNELS: dict[str, list[int]] = {
    "se_small_cnn": [32, 32, 64, 64],
    **{
        f"se_mobilenet{suffix}": [c * quarters // 4 for c, _ in MOBILENET]
        for suffix, quarters in (("", 4), ("_0_75", 3), ("_0_5", 2), ("_0_25", 1))
    },
    **{
        f"se_shufflenet{suffix}": [
            c * quarters // 4 for n, c in zip((3, 7, 3), SHUFFLENET[groups], strict=True) for _ in range(n)
        ]
        for suffix, groups, quarters in (
            ("", 3, 4),
            ("_g1", 1, 4),
            ("_g2", 2, 4),
            ("_g4", 4, 4),
            ("_g8", 8, 4),
            ("_0_5", 3, 2),
            ("_0_25", 3, 1),
        )
    },
    "se_vgg16": VGG16,
    "se_resnet18": resnet_channels((2, 2, 2, 2), 64),
    "se_resnet34": resnet_channels((3, 4, 6, 3), 64),
    **{
        f"se_resnet50{suffix}": RESNET50
        for suffix in ("", "_no_bias", "_v1_5", "_r2", "_r4", "_r8", "_r32", "_max", "_relu", "_tanh", "_post")
    },
    # On the shortcut as at the branch's end; in front of the branch the channels of the block's input; in its middle a
    # quarter of them.
    "se_resnet50_identity": RESNET50,
    "se_resnet50_nosqueeze": RESNET50,
    "se_resnet50_pre": [64, *RESNET50[:-1]],
    "se_resnet50_3x3": [c // 4 for c in RESNET50],
    "se_resnet50_stage2": [256] * 3,
    "se_resnet50_stage3": [512] * 4,
    "se_resnet50_stage4": [1024] * 6,
    "se_resnet50_stages2to4": RESNET50[:-3],
    **{f"se_resnet101{suffix}": resnet_channels((3, 4, 23, 3), 256) for suffix in ("", "_v1_5")},
    **{f"se_resnet152{suffix}": resnet_channels((3, 8, 36, 3), 256) for suffix in ("", "_v1_5")},
}

# Parameters with SE, r = 16: the authors' prototxts for se_resnet50, 101 and 152; timm's legacy_seresnet18 and 34;
# Table 3 of arXiv 1709.01507 prints 4.7M and 2.4M for the last two.
SE_PARAMS = {
    "se_resnet18": 11_778_592,
    "se_resnet34": 21_958_868,
    "se_resnet50": 28_088_024,
    "se_resnet50_no_bias": 28_071_976,
    # Table 16's network has the weights of the plain SE network.
    "se_resnet50_nosqueeze": 28_071_976,
    "se_resnet101": 49_326_872,
    "se_resnet152": 66_821_848,
    "se_mobilenet": 4_711_720,
    "se_shufflenet": 2_434_528,
}


def totals(family: str, name: str) -> tuple[int, int]:
    """Parameters and MACs of convolutions and layers with SE: arXiv 1709.01507, eq. (5), 2 C^2 / r weights a block."""
    variant = FAMILIES[family]["variants"][name]
    parameters, multiply_adds = BASE_TOTALS[variant["baseline"]]
    widths = [(c, c // variant["se"]["reduction"]) for c in SE_CHANNELS[name]]
    weights = sum(2 * c * width for c, width in widths)
    biases = sum(c + width for c, width in widths) if variant["se"]["bias"] else 0
    return parameters + weights + biases, multiply_adds + weights


TOTALS: dict[str, tuple[int, int]] = BASE_TOTALS | {name: totals(family, name) for family, name in SE_VARIANTS}
# A layer at every position: 2 C^2 / 16 MACs for each of the 56x56 down to 7x7.
TOTALS["se_resnet50_nosqueeze"] = (
    28_071_976,
    3_857_973_248
    + sum(n * 2 * c**2 // 16 * m**2 for n, c, m in ((3, 256, 56), (4, 512, 28), (6, 1024, 14), (3, 2048, 7))),
)


@pytest.mark.parametrize(("family", "name"), BASELINES)
def test_baseline_has_the_parameters_and_macs_of_its_source(family: str, name: str) -> None:
    network = build(family, name)
    assert (params(network), macs(network, FAMILIES[family]["input_chw"])) == BASE_TOTALS[name]


def test_every_baseline_has_its_totals() -> None:
    assert set(BASE_TOTALS) == {name for _, name in BASELINES}
    assert set(SE_CHANNELS) == {name for _, name in SE_VARIANTS}


def test_arithmetic_agrees_with_the_totals() -> None:
    assert BASE_TOTALS["small_cnn"][0] == 1_250_858
    for quarters, name in ((4, "mobilenet"), (3, "mobilenet_0_75"), (2, "mobilenet_0_5"), (1, "mobilenet_0_25")):
        assert mobilenet_counts(quarters) == BASE_TOTALS[name]
    for groups, name in ((1, "shufflenet_g1"), (2, "shufflenet_g2"), (3, "shufflenet"), (8, "shufflenet_g8")):
        assert shufflenet_counts(groups) == BASE_TOTALS[name]
    # VGG: thirteen convolutions with bias and BN, then 25088 to 4096 to 4096 to 1000.
    convs = [(a * 9 + 3) * b for a, b in zip([3, *VGG16], VGG16, strict=False)]
    assert BASE_TOTALS["vgg16"][0] == sum(convs) + 25_089 * 4096 + 4097 * 4096 + 4097 * 1000


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize(("family", "name"), SE_VARIANTS)
def test_se_stands_where_the_weights_say(family: str, name: str) -> None:
    assert [one.channels for one in built(name).insertions] == SE_CHANNELS[name]
    assert installed()[name].input_chw == tuple(FAMILIES[family]["input_chw"])
    counts = cost(name)
    assert (counts.params, counts.macs.conv_linear) == TOTALS[name]
    assert counts.params == SE_PARAMS.get(name, counts.params)


def test_ablations_are_the_paper_s() -> None:
    # The exact integers behind the printed 25.8M and 3.86 GFLOPs of Table 15, and 4.27 GFLOPs of Table 16.
    assert sum(c**2 for c in RESNET50) == 20_119_552
    assert TOTALS["se_resnet50_3x3"] == (25_714_216, 3_858_130_432)
    assert TOTALS["se_resnet50_nosqueeze"][1] == 4_269_015_040
    # Sec. 4: leaving the last stage out adds about 4 % instead of about 10 %.
    assert TOTALS["se_resnet50_stages2to4"][0] - TOTALS["resnet50"][0] == 942_080
    assert TOTALS["se_resnet50_pre"][0] - TOTALS["resnet50"][0] == 1_991_168


def test_se_weights_of_resnet50_and_vgg16() -> None:
    # "approximately 2.5 million": arXiv 1709.01507, Sec. 4.
    assert sum(2 * c * c // 16 for c in site_channels("resnet", "resnet50", "residual")) == 2_514_944
    assert sum(2 * c * c // 16 for c in site_channels("vgg", "vgg16", "conv")) == 226_304


def test_site_channels_in_order() -> None:
    assert site_channels("small_cnn", "small_cnn", "conv") == [32, 32, 64, 64]
    assert site_channels("mobilenet", "mobilenet", "pointwise") == [c for c, _ in MOBILENET]
    assert site_channels("shufflenet", "shufflenet", "residual") == [240] * 3 + [480] * 7 + [960] * 3
    assert site_channels("vgg", "vgg16", "conv") == VGG16
    assert site_channels("resnet", "resnet34", "residual") == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    assert site_channels("resnet", "resnet50", "residual") == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3


def test_site_paths() -> None:
    """Checkpoints and records carry these names, so that a change here breaks them."""
    mobilenet = build("mobilenet", "mobilenet").site_groups()
    assert mobilenet == {"pointwise": [f"blocks.{block}.pointwise" for block in range(13)]}
    shufflenet = build("shufflenet", "shufflenet").site_groups()["residual"]
    assert shufflenet == [
        f"stage{stage}.{unit}" for stage, units in ((2, 4), (3, 8), (4, 4)) for unit in range(1, units)
    ]
    resnet50 = build("resnet", "resnet50").site_groups()["residual"]
    assert resnet50 == [
        f"stage{s}.{block}" for s, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)) for block in range(blocks)
    ]
    small = build("small_cnn", "small_cnn").site_groups()
    assert small == {"conv": ["block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2"]}
    vgg = build("vgg", "vgg16").site_groups()["conv"]
    assert vgg[0] == "features.conv1_1"
    assert vgg[-1] == "features.conv5_3"


@pytest.mark.parametrize(
    ("family", "name", "channels"),
    [
        ("resnet", "resnet18", [64] * 2 + [128] * 2 + [256] * 2 + [512] * 2),
        ("resnet", "resnet50", [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3),
        ("shufflenet", "shufflenet", [60] * 3 + [120] * 7 + [240] * 3),
    ],
)
def test_after_3x3_follows_a_3x3(family: str, name: str, channels: list[int]) -> None:
    network = build(family, name)
    found = []
    for path in network.site_groups()["residual"]:
        site = network.get_submodule(path)
        convs: list[nn.Conv2d] = []
        for child, module in site.branch.named_children():
            convs += [module] if isinstance(module, nn.Conv2d) else []
            if child == site.after_3x3:
                break
        assert convs[-1].kernel_size == (3, 3)
        found.append(convs[-1].out_channels)
    assert found == channels


def test_stride_in_moves_the_stride_and_the_stem_pools_to_56() -> None:
    for stride_in, strides in (("1x1", ((2, 2), (1, 1))), ("3x3", ((1, 1), (2, 2)))):
        branch: Any = resnet(50, num_classes=2, stride_in=stride_in).stage3[0].get_submodule("branch")
        assert (branch.conv1.stride, branch.conv2.stride) == strides
    with torch.device("meta"):
        for stem_pool in ("caffe", "torch"):
            stem = resnet(18, stem_pool=stem_pool).stem.eval()
            assert stem(torch.empty(1, 3, 224, 224)).shape == (1, 64, 56, 56)


def test_joins_do_what_they_say() -> None:
    branch = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1)
    shortcut = torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1)
    assert AddReLU()(branch, shortcut).flatten().tolist() == [3.0, 0.0]
    assert ConcatReLU()(branch, shortcut).flatten().tolist() == [2.0, 1.0, 1.0, 0.0]


def test_channel_shuffle_transposes_groups_and_channels() -> None:
    unit: Any = shufflenet_v1(num_classes=2, width_mult=0.25).stage2[1]
    channels = torch.arange(6.0).reshape(1, 6, 1, 1)
    # Three groups (0 1) (2 3) (4 5): the first of each, then the second of each.
    assert unit.branch.shuffle(channels).flatten().tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


def test_residual_blocks_start_from_their_shortcut_when_the_branch_is_silent() -> None:
    for network in (resnet(18, num_classes=2), shufflenet_v1(num_classes=2, width_mult=0.25)):
        block: Any = network.eval().get_submodule("stage2.1")
        last_bn = [module for module in block.branch.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last_bn.weight)
        x = torch.rand(1, out_channels(block), 8, 8)
        before = x.clone()
        assert torch.equal(block(x), before)
        assert torch.equal(x, before)


def gradients(network: nn.Module, x: Tensor) -> list[Tensor | None]:
    network.train()(x).square().sum().backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("small_cnn", "small_cnn"),
        ("mobilenet", "mobilenet_0_25"),
        ("shufflenet", "shufflenet_0_25"),
        ("resnet", "resnet18"),
        ("resnet", "resnet50"),
    ],
)
def test_every_parameter_gets_a_gradient(family: str, name: str) -> None:
    torch.manual_seed(0)
    found = gradients(build(family, name, device="cpu", num_classes=10), torch.randn(2, 3, 32, 32))
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found)


def test_small_cnn_starts_as_keras_does() -> None:
    network = small_cnn()
    fc1: Any = network.head.get_submodule("fc1")
    limit = (6 / (2304 + 512)) ** 0.5
    assert 0.99 * limit < float(fc1.weight.detach().abs().max()) <= limit
    assert not fc1.bias.any()


def test_mobilenet_starts_truncated_at_two_deviations() -> None:
    torch.manual_seed(0)
    conv: Any = mobilenet_v1(num_classes=2).blocks.get_submodule("12.pointwise.conv")
    weight = conv.weight.detach()
    assert float(weight.abs().max()) <= 0.18
    # A normal truncated at two deviations keeps 0.880 of its deviation.
    assert float(weight.std()) == pytest.approx(0.09 * 0.8796, rel=0.01)


@pytest.mark.parametrize("builder", [small_cnn, mobilenet_v1, shufflenet_v1, vgg16])
def test_no_class_is_an_error(builder: Any) -> None:
    with pytest.raises(ValueError, match="num_classes is 0: it must be 1 or more"):
        builder(num_classes=0)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (resnet, {"depth": 50, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (resnet, {"depth": 20}, "depth is 20: it must be one of 18, 34, 50, 101, 152"),
        (resnet, {"depth": 50, "stride_in": "7x7"}, 'stride_in is \'7x7\': it must be "1x1" or "3x3"'),
        (resnet, {"depth": 50, "stem_pool": "tf"}, 'stem_pool is \'tf\': it must be "caffe" or "torch"'),
        (mobilenet_v1, {"width_mult": 0.0}, r"width_mult is 0\.0: it must be above 0"),
        (mobilenet_v1, {"width_mult": float("nan")}, "width_mult is nan: it must be above 0"),
        (mobilenet_v1, {"dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and below 1"),
        (vgg16, {"dropout": -0.1}, r"dropout is -0\.1: it must be 0 or more and below 1"),
        (shufflenet_v1, {"groups": 5}, "groups is 5: it must be one of 1, 2, 3, 4, 8"),
        (shufflenet_v1, {"width_mult": -1.0}, r"width_mult is -1\.0: it must be above 0"),
        (shufflenet_v1, {"width_mult": 0.1}, r"width_mult is 0\.1: .* a stem of 2 channels and stages of 24, 48, 96;"),
        (shufflenet_v1, {"groups": 8, "width_mult": 0.5}, r"must be multiples of 32, and 192 - 12 one of 8"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
