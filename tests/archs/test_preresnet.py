"""Pre-activation ResNets for ImageNet: totals, sites, and where BN and ReLU stand."""

from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.preresnet import preresnet
from selab.attention.insert import insert_se
from selab.models.catalog import installed

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def channels(depth: int) -> list[int]:
    """Channels of the blocks."""
    wider = 1 if depth < 50 else 4
    return [64 * 2**stage * wider for stage, blocks in enumerate(BLOCKS[depth]) for _ in range(blocks)]


def counts(depth: int) -> tuple[int, int]:
    """Parameters and MACs at 224x224, layer by layer; the first convolution of stages 3 to 5 strides."""
    c, side = 64, 56
    params, macs = 3 * 64 * 49 + 2 * 64, 3 * 64 * 49 * 112**2
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        side = 56 >> stage
        out = width if depth < 50 else 4 * width
        for block in range(blocks):
            convs = (
                [(c, width, 9), (width, out, 9)] if depth < 50 else [(c, width, 1), (width, width, 9), (width, out, 1)]
            )
            # The BN stands before its convolution; a projection has none.
            params += sum(a * b * area + 2 * a for a, b, area in convs)
            projection = c * out if block == 0 and (c != out or stage) else 0
            params += projection
            macs += (sum(a * b * area for a, b, area in convs) + projection) * side**2
            c = out
    return params + 2 * c + c * 1000 + 1000, macs + c * 1000


def plus_se(total: tuple[int, int], sites: list[int]) -> tuple[int, int]:
    """Two layers with biases at each site, r = 16: arXiv 1709.01507, eq. (5)."""
    weights = sum(2 * c * (c // 16) for c in sites)
    return total[0] + weights + sum(c + c // 16 for c in sites), total[1] + weights


TOTALS: dict[str, tuple[int, int]] = {
    **{f"preresnet{depth}": counts(depth) for depth in BLOCKS},
    **{f"se_preresnet{depth}": plus_se(counts(depth), channels(depth)) for depth in BLOCKS},
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == {name for name, variant in installed().items() if variant.family == "preresnet"}


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_macs(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]
    assert not cost(name).unknown


def test_arithmetic_agrees_with_published_integers() -> None:
    # osmr/imgclsmob, preresnet.py and sepreresnet.py.
    assert {depth: TOTALS[f"preresnet{depth}"][0] for depth in BLOCKS} == {
        18: 11_687_848,
        34: 21_796_008,
        50: 25_549_480,
        101: 44_541_608,
        152: 60_185_256,
    }
    assert {depth: TOTALS[f"se_preresnet{depth}"][0] for depth in BLOCKS} == {
        18: 11_776_928,
        34: 21_957_204,
        50: 28_080_472,
        101: 49_319_320,
        152: 66_814_296,
    }


@pytest.mark.parametrize("depth", BLOCKS)
def test_sites(depth: int) -> None:
    paths = [f"stage{stage}.{block}" for stage, n in enumerate(BLOCKS[depth], start=2) for block in range(n)]
    assert built(f"preresnet{depth}").model.site_groups() == {"residual": paths}  # type: ignore[operator]
    found = built(f"se_preresnet{depth}").insertions
    assert [(at.path, at.channels, at.squeeze_channels) for at in found] == [
        (path, c, c // 16) for path, c in zip(paths, channels(depth), strict=True)
    ]


def test_resolutions() -> None:
    with torch.device("meta"):
        network: Any = preresnet(50).eval()
        x = network.stem(torch.empty(2, 3, 224, 224))
        assert x.shape == (2, 64, 56, 56)
        for stage, shape in ((2, (256, 56, 56)), (3, (512, 28, 28)), (4, (1024, 14, 14)), (5, (2048, 7, 7))):
            x = network.get_submodule(f"stage{stage}")(x)
            assert x.shape == (2, *shape)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_a_bottleneck_strides_in_one_convolution(stride_in: str) -> None:
    with torch.device("meta"):
        block = preresnet(50, stride_in=stride_in).get_submodule("stage3.0")
    strides = [block.branch.get_submodule(f"conv{number}").stride[0] for number in (1, 2, 3)]
    assert strides == ([2, 1, 1] if stride_in == "1x1" else [1, 2, 1])
    assert block.shortcut.stride == (2, 2)


def test_bn_and_relu_stand_before_the_convolutions_and_before_the_last_pooling() -> None:
    network: Any = built("preresnet18").model
    block = network.stage2[0]
    assert [name for name, _ in block.preact.named_children()] == ["bn", "relu"]
    assert [name for name, _ in block.branch.named_children()] == ["conv1", "bn2", "relu2", "conv2"]
    assert [name for name, _ in network.head.named_children()] == ["bn", "relu", "pool", "flatten", "fc"]
    assert isinstance(block.shortcut, nn.Identity)
    # The first block of stage 3 projects, by a convolution alone.
    assert isinstance(network.stage3[0].shortcut, nn.Conv2d)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = preresnet(18, num_classes=3).train()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert bool(parameter.grad.isfinite().all()), path


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
def test_every_placement_can_be_built(placement: Any) -> None:
    with torch.device("meta"):
        network = preresnet(50)
    assert len(insert_se(network, "residual", placement=placement, input_nchw=(1, 3, 64, 64))) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth is 20: it must be one of 18, 34, 50, 101, 152"),
        ({"depth": 50, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        ({"depth": 50, "stride_in": "2x2"}, 'stride_in is \'2x2\': it must be "1x1" or "3x3"'),
    ],
)
def test_bad_arguments_are_errors_of_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preresnet(**arguments)
    assert "\n" not in str(caught.value)
