"""ResNeXt, SENet-154, BN-Inception and Inception-ResNet-v2: counts, sites and the conventions of their releases."""

from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.bn_inception import bn_inception
from selab.archs.inception_resnet_v2 import ScaledAdd, inception_resnet_v2
from selab.archs.resnext import resnext
from selab.archs.senet import AddReLU, senet154
from selab.attention.insert import insert_se
from selab.models.build import build
from selab.models.catalog import installed

FAMILIES = {"resnext", "senet", "bn_inception", "inception_resnet_v2"}


# Expected counts by arithmetic, layer by layer.


def conv_bn(in_channels: int, out: int, area: int, groups: int = 1) -> int:
    """Weights of a convolution without bias whose kernel has `area` positions, and scale and shift of its BN."""
    return in_channels // groups * out * area + 2 * out


def gates(channels: list[int]) -> tuple[int, int]:
    """Parameters and MACs of SE blocks with biases: arXiv 1709.01507, eq. (5), r = 16."""
    weights = sum(2 * c * (c // 16) for c in channels)
    return weights + sum(c // 16 + c for c in channels), weights


def plus(total: tuple[int, int], channels: list[int]) -> tuple[int, int]:
    params, macs = gates(channels)
    return total[0] + params, total[1] + macs


def stage_channels(blocks: tuple[int, ...]) -> list[int]:
    return [c for c, n in zip((256, 512, 1024, 2048), blocks, strict=True) for _ in range(n)]


RESNEXT_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
SENET_BLOCKS = (3, 8, 36, 3)


def bottleneck_counts(blocks: tuple[int, ...], *, groups: int, half: bool) -> tuple[int, int]:
    """Parameters and MACs of stages 2 to 5 and the classifier.

    Of a ResNeXt of 4 channels per group, whose stem ends in 64 channels; or, where `half`, of SENet-154: its stem ends
    in 128, the first 1x1 is half as wide as the 3x3, and the projections from stage 3 on are 3x3.
    """
    c, side_in, parameters, multiply_adds = 128 if half else 64, 56, 0, 0
    for stage, (n, out) in enumerate(zip(blocks, (256, 512, 1024, 2048), strict=True)):
        side = 56 >> stage
        width = out if half else groups * 4 * out // 256
        first = width // 2 if half else width
        kernel = 9 if half and stage else 1
        parameters += conv_bn(c, out, kernel)
        multiply_adds += c * out * kernel * side**2
        for _ in range(n):
            parameters += conv_bn(c, first, 1) + conv_bn(first, width, 9, groups) + conv_bn(width, out, 1)
            multiply_adds += c * first * side_in**2 + (first // groups * width * 9 + width * out) * side**2
            c, side_in = out, side
    return parameters + 2049 * 1000, multiply_adds + 2048 * 1000


def resnext_counts(depth: int, groups: int) -> tuple[int, int]:
    parameters, multiply_adds = bottleneck_counts(RESNEXT_BLOCKS[depth], groups=groups, half=False)
    return parameters + conv_bn(3, 64, 49), multiply_adds + 3 * 64 * 49 * 112**2


def senet_counts() -> tuple[int, int]:
    parameters, multiply_adds = bottleneck_counts(SENET_BLOCKS, groups=64, half=True)
    stem = ((3, 64), (64, 64), (64, 128))
    return (
        parameters + sum(conv_bn(a, b, 9) for a, b in stem),
        multiply_adds + sum(a * b * 9 * 112**2 for a, b in stem),
    )


# Channels of the ten concatenations and widths of their gates: github.com/hujie-frank/SENet,
# models/SE-BN-Inception.prototxt.
BN_INCEPTION = [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
BN_INCEPTION_SQUEEZED = [16, 20, 36, 36, 36, 38, 38, 66, 64, 64]

# Channels of the 40 residual blocks: TensorFlow slim, nets/inception_resnet_v2.py.
INCEPTION_RESNET = [320] * 10 + [1088] * 20 + [2080] * 10


def inception_resnet_macs() -> int:
    stem = 3 * 32 * 9 * 149**2 + (32 * 32 + 32 * 64) * 9 * 147**2 + 64 * 80 * 73**2 + 80 * 192 * 9 * 71**2
    mixed5b = (192 * (96 + 48 + 64 + 64) + 48 * 64 * 25 + (64 * 96 + 96 * 96) * 9) * 35**2
    block35 = (320 * 32 * 3 + (32 * 32 + 32 * 48 + 48 * 64) * 9 + 128 * 320) * 35**2
    mixed6a = (320 * 256 + 256 * 256 * 9) * 35**2 + (320 + 256) * 384 * 9 * 17**2
    block17 = (1088 * (192 + 128) + (128 * 160 + 160 * 192) * 7 + 384 * 1088) * 17**2
    mixed7a = (1088 * 256 * 3 + 256 * 288 * 9) * 17**2 + (256 * 384 + 256 * 288 + 288 * 320) * 9 * 8**2
    block8 = (2080 * (192 + 192) + (192 * 224 + 224 * 256) * 3 + 448 * 2080) * 8**2
    head = 2080 * 1536 * 8**2 + 1536 * 1000
    return stem + mixed5b + 10 * block35 + mixed6a + 20 * block17 + mixed7a + 10 * block8 + head


# (parameters, MACs of convolutions and fully connected layers). Parameters: ResNeXt-50 32x4d and -101 64x4d as
# torchvision 0.27.1, -101 32x4d and Inception-ResNet-v2 as timm 1.0.31; those of SE-ResNeXt 32x4d, SENet-154 and
# SE-BN-Inception counted from the prototxts of github.com/hujie-frank/SENet, and BN-Inception's from the same less its
# SE; so are BN-Inception's MACs. The others by the arithmetic above.
TOTALS: dict[str, tuple[int, int]] = {
    **{f"resnext50_32x4d{pool}": (25_028_904, resnext_counts(50, 32)[1]) for pool in ("", "_torch")},
    **{f"resnext101_32x4d{pool}": (44_177_704, resnext_counts(101, 32)[1]) for pool in ("", "_torch")},
    "resnext101_64x4d": (83_455_272, resnext_counts(101, 64)[1]),
    **{
        f"se_resnext50_32x4d{pool}": (
            27_559_896,
            resnext_counts(50, 32)[1] + gates(stage_channels(RESNEXT_BLOCKS[50]))[1],
        )
        for pool in ("", "_torch")
    },
    **{
        f"se_resnext101_32x4d{pool}": (
            48_955_416,
            resnext_counts(101, 32)[1] + gates(stage_channels(RESNEXT_BLOCKS[101]))[1],
        )
        for pool in ("", "_torch")
    },
    "se_resnext101_64x4d": (
        88_232_984,
        resnext_counts(101, 64)[1] + gates(stage_channels(RESNEXT_BLOCKS[101]))[1],
    ),
    "senet154_no_se": (108_459_944, senet_counts()[1]),
    "senet154": (115_088_984, senet_counts()[1] + gates(stage_channels(SENET_BLOCKS))[1]),
    "bn_inception": (11_285_224, 2_032_600_064),
    "se_bn_inception": (11_931_622, 2_033_239_424),
    "inception_resnet_v2": (55_843_464, inception_resnet_macs()),
    "se_inception_resnet_v2": plus((55_843_464, inception_resnet_macs()), INCEPTION_RESNET),
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == {name for name, variant in installed().items() if variant.family in FAMILIES}


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_macs(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]
    assert not cost(name).unknown


def test_arithmetic_agrees_with_the_totals() -> None:
    assert resnext_counts(50, 32) == TOTALS["resnext50_32x4d"]
    assert resnext_counts(101, 32) == TOTALS["resnext101_32x4d"]
    assert resnext_counts(101, 64) == TOTALS["resnext101_64x4d"]
    assert senet_counts() == TOTALS["senet154_no_se"]
    for base, channels in (
        ("resnext50_32x4d", stage_channels(RESNEXT_BLOCKS[50])),
        ("resnext101_32x4d", stage_channels(RESNEXT_BLOCKS[101])),
        ("resnext101_64x4d", stage_channels(RESNEXT_BLOCKS[101])),
        ("bn_inception", BN_INCEPTION),
    ):
        assert plus(TOTALS[base], channels) == TOTALS[f"se_{base}"]
    assert plus(TOTALS["senet154_no_se"], stage_channels(SENET_BLOCKS)) == TOTALS["senet154"]


@pytest.mark.parametrize(
    ("name", "paths", "channels"),
    [
        *(
            (
                name,
                [f"stage{s}.{block}" for s, n in enumerate(blocks, start=2) for block in range(n)],
                stage_channels(blocks),
            )
            for name, blocks in (
                ("se_resnext50_32x4d", RESNEXT_BLOCKS[50]),
                ("se_resnext101_64x4d", RESNEXT_BLOCKS[101]),
                ("senet154", SENET_BLOCKS),
            )
        ),
        (
            "se_bn_inception",
            [
                f"stage{s}.inception{s}{letter}"
                for s, letters in ((3, "abc"), (4, "abcde"), (5, "ab"))
                for letter in letters
            ],
            BN_INCEPTION,
        ),
        (
            "se_inception_resnet_v2",
            [f"stage{s}.block{block}" for s, n in ((1, 10), (2, 20), (3, 10)) for block in range(1, n + 1)],
            INCEPTION_RESNET,
        ),
    ],
)
def test_sites(name: str, paths: list[str], channels: list[int]) -> None:
    variant = installed()[name]
    assert variant.baseline is not None
    assert variant.se is not None
    groups = built(variant.baseline).model.site_groups()
    assert groups[variant.se.sites] == paths
    assert [(at.path, at.channels, at.squeeze_channels) for at in built(name).insertions] == [
        (path, c, c // 16) for path, c in zip(paths, channels, strict=True)
    ]


def test_bn_inception_is_squeezed_as_released() -> None:
    assert [at.squeeze_channels for at in built("se_bn_inception").insertions] == BN_INCEPTION_SQUEEZED


def test_senet154_is_gated_at_every_block() -> None:
    groups = built("senet154_no_se").model.site_groups()
    assert groups["native"] == groups["residual"]
    assert len(groups["native"]) == 50


# The smallest images of each family: 32 pixels become one; without padding, 75 do.
SMALL = {"se_resnext50_32x4d": 32, "senet154": 32, "se_bn_inception": 32, "se_inception_resnet_v2": 75}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    side = SMALL[name]
    network = build(installed()[name]).model.train()
    network(torch.randn(2, 3, side, side)).square().mean().backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert bool(parameter.grad.isfinite().all()), path


@pytest.mark.parametrize(
    ("network", "group", "side"), [(bn_inception, "concat", 32), (inception_resnet_v2, "residual", 75)]
)
@pytest.mark.parametrize("placement", ["standard", "post", "pre"])
def test_gates_that_are_one_change_nothing(network: Any, group: str, side: int, placement: Any) -> None:
    torch.manual_seed(0)
    model = network(num_classes=10).eval()
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before = model(x)
        inserted = insert_se(model, group, input_nchw=(1, 3, side, side), placement=placement, init="identity")
        assert len(inserted) == len(model.site_groups()[group])
        assert torch.equal(model(x), before)


def test_inception_resnet_takes_the_placement_after_the_3x3() -> None:
    with torch.device("meta"):
        model = inception_resnet_v2()
        inserted = insert_se(model, "residual", input_nchw=(1, 3, 299, 299), placement="3x3")
    # The channels of the concatenations.
    assert [at.channels for at in inserted] == [32 + 32 + 64] * 10 + [192 + 192] * 20 + [192 + 256] * 10
    assert list(model.get_submodule("stage1.block1.branch")._modules) == ["branches", "concat", "se", "conv"]


def test_stem_pools_see_their_windows() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Caffe: rows and columns 0 to 2, then 2 to 3. Torch: 0 to 1, then 1 to 3.
    for stem_pool, expected in (("caffe", [10.0, 11.0, 14.0, 15.0]), ("torch", [5.0, 7.0, 13.0, 15.0])):
        with torch.device("meta"):
            stem = resnext(50, stem_pool=stem_pool).stem
            assert stem.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 64, 56, 56)
        assert stem.get_submodule("pool")(x).flatten().tolist() == expected
    for network in (built("senet154_no_se").model, built("bn_inception").model):
        pools = [module for module in network.stem.modules() if isinstance(module, nn.MaxPool2d)]
        for pool in pools:
            assert pool(x).flatten().tolist() == [10.0, 11.0, 14.0, 15.0]


def test_resnext_and_senet_stride_in_the_grouped_3x3() -> None:
    for network, groups in ((built("resnext50_32x4d").model, 32), (built("senet154_no_se").model, 64)):
        for number, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
            block = network.get_submodule(f"stage{number}.0")
            strides = [block.branch.get_submodule(f"conv{conv}").stride for conv in (1, 2, 3)]
            assert strides == [(1, 1), (stride, stride), (1, 1)]
            assert block.branch.conv2.groups == groups
            assert block.shortcut.conv.stride == (stride, stride)


def test_senet154_projects_by_3x3_from_stage_3_on() -> None:
    network = built("senet154_no_se").model
    for number, in_channels, out, kernel in ((2, 128, 256, 1), (3, 256, 512, 3), (4, 512, 1024, 3), (5, 1024, 2048, 3)):
        block = network.get_submodule(f"stage{number}.0")
        assert tuple(block.shortcut.conv.weight.shape) == (out, in_channels, kernel, kernel)
        # The first 1x1 has half the channels of the 3x3.
        assert tuple(block.branch.conv1.weight.shape) == (out // 2, in_channels, 1, 1)
        assert isinstance(network.get_submodule(f"stage{number}.1").shortcut, nn.Identity)
    assert network.head.dropout.p == 0.2


def test_bn_inception_pools_as_caffe_does() -> None:
    network = built("bn_inception").model
    ones, ramp = torch.ones(1, 1, 3, 3), torch.arange(16.0).reshape(1, 1, 4, 4)
    for path in network.site_groups()["concat"]:
        pool = network.get_submodule(f"{path}.branches.path_pool")
        match path:
            case "stage3.inception3c" | "stage4.inception4e":
                assert pool(ramp).flatten().tolist() == [10.0, 11.0, 14.0, 15.0]
            case "stage5.inception5b":
                assert pool.pool(ramp).flatten().tolist() == [5, 6, 7, 7, 9, 10, 11, 11, 13, 14, 15, 15, 13, 14, 15, 15]
            case _:
                # A corner averages four ones over nine places.
                assert pool.pool(ones).flatten().tolist() == pytest.approx(
                    [4 / 9, 6 / 9, 4 / 9, 6 / 9, 1.0, 6 / 9, 4 / 9, 6 / 9, 4 / 9]
                )


def test_inception_modules_stack_their_branches_in_order() -> None:
    torch.manual_seed(0)
    network = bn_inception(num_classes=2).eval()
    module: Any = network.get_submodule("stage3.inception3c")
    x = torch.rand(1, 320, 4, 4)
    with torch.no_grad():
        out = module(x)
        assert out.shape == (1, 160 + 96 + 320, 2, 2)
        # The pooled channels pass as they are, behind the others.
        assert torch.equal(out[:, 160 + 96 :], nn.functional.max_pool2d(x, 3, 2, ceil_mode=True))
        assert torch.equal(out[:, :160], module.branches.path3x3(x))


def test_joins_do_what_they_say() -> None:
    branch = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1)
    shortcut = torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1)
    assert AddReLU()(branch, shortcut).flatten().tolist() == [3.0, 0.0]
    assert ScaledAdd(0.5, relu=True)(branch, shortcut).flatten().tolist() == [2.5, 0.0]
    assert ScaledAdd(0.5, relu=False)(branch, shortcut).flatten().tolist() == [2.5, -0.5]
    assert shortcut.flatten().tolist() == [2.0, 1.0]


def test_inception_resnet_scales_its_branches_as_released() -> None:
    network = built("inception_resnet_v2").model
    joins = [network.get_submodule(f"{path}.join") for path in network.site_groups()["residual"]]
    assert [join.scale for join in joins] == [0.17] * 10 + [0.1] * 20 + [0.2] * 9 + [1.0]
    assert [isinstance(join.relu, nn.ReLU) for join in joins] == [True] * 39 + [False]
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    # TensorFlow's average leaves the padding out.
    pool = network.get_submodule("stage1.mixed.branches.path_pool.pool")
    assert pool(torch.ones(1, 1, 3, 3)).flatten().tolist() == [1.0] * 9


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (resnext, {"depth": 50, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (resnext, {"depth": 50, "groups": 0}, "groups is 0: it must be 1 or more"),
        (resnext, {"depth": 50, "width_per_group": -4}, "width_per_group is -4: it must be 1 or more"),
        (resnext, {"depth": 152}, "depth is 152: it must be one of 50, 101"),
        (resnext, {"depth": 50, "stem_pool": "tf"}, 'stem_pool is \'tf\': it must be "caffe" or "torch"'),
        (senet154, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (senet154, {"dropout": 1.0}, r"dropout is 1\.0: it must be 0 or more and below 1"),
        (bn_inception, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (inception_resnet_v2, {"num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (inception_resnet_v2, {"dropout": -0.1}, r"dropout is -0\.1: it must be 0 or more and below 1"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
