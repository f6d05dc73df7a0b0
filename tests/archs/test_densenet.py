"""DenseNets for ImageNet and CIFAR: totals, sites, and how layers are connected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog_networks import built, cost
from torch import nn

from selab.archs.densenet import densenet
from selab.archs.densenet_cifar import densenet_cifar
from selab.attention.insert import insert_se
from selab.models.catalog import installed

FAMILIES = {"densenet", "densenet_cifar"}
LAYERS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}


def dense_counts(
    c: int, side: int, layers: tuple[int, ...], growth: int, classes: int, *, plain: bool = False
) -> tuple[int, int, list[int]]:
    """Parameters and MACs behind the stem, and the channels behind blocks and transitions."""
    params = macs = 0
    sites = []
    for number, count in enumerate(layers, start=1):
        for _ in range(count):
            # BN, then a convolution without bias: the 3x3 alone, or a 1x1 of 4k channels before it.
            convs = [(c, growth, 9)] if plain else [(c, 4 * growth, 1), (4 * growth, growth, 9)]
            params += sum(2 * a + a * b * area for a, b, area in convs)
            macs += sum(a * b * area for a, b, area in convs) * side**2
            c += growth
        sites.append(c)
        if number < len(layers):
            out = c if plain else c // 2
            params += 2 * c + c * out
            # The 1x1 of a transition stands before its pooling.
            macs += c * out * side**2
            c, side = out, side // 2
            sites.append(c)
    return params + 2 * c + c * classes + classes, macs + c * classes, sites


def imagenet_counts(depth: int) -> tuple[int, int, list[int]]:
    params, macs, sites = dense_counts(64, 56, LAYERS[depth], 32, 1000)
    return params + 3 * 64 * 49 + 2 * 64, macs + 3 * 64 * 49 * 112**2, sites


def cifar_counts(depth: int, growth: int, *, plain: bool) -> tuple[int, int, list[int]]:
    stem = 16 if plain else 2 * growth
    layers = (depth - 4) // (3 if plain else 6)
    params, macs, sites = dense_counts(stem, 32, (layers,) * 3, growth, 10, plain=plain)
    return params + 3 * stem * 9, macs + 3 * stem * 9 * 32**2, sites


COUNTS = {
    "densenet121": imagenet_counts(121),
    "densenet100_12_bc_cifar": cifar_counts(100, 12, plain=False),
    "densenet100_12_cifar": cifar_counts(100, 12, plain=True),
}


def plus_se(params: int, macs: int, sites: list[int]) -> tuple[int, int]:
    """Two layers without biases at each site, r = 16: arXiv 1709.01507, eq. (5)."""
    weights = sum(2 * c * (c // 16) for c in sites)
    return params + weights, macs + weights


TOTALS: dict[str, tuple[int, int]] = {
    **{name: (params, macs) for name, (params, macs, _) in COUNTS.items()},
    **{f"se_{name}": plus_se(*found) for name, found in COUNTS.items()},
}


def test_every_variant_has_its_totals() -> None:
    assert set(TOTALS) == {name for name, variant in installed().items() if variant.family in FAMILIES}


@pytest.mark.xdist_group("catalog")
@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_macs(name: str) -> None:
    assert (cost(name).params, cost(name).macs.conv_linear) == TOTALS[name]
    assert not cost(name).unknown


def test_arithmetic_agrees_with_published_integers() -> None:
    # osmr/imgclsmob, densenet.py and densenet_cifar.py; the first is torchvision's too.
    assert [imagenet_counts(depth)[0] for depth in LAYERS] == [7_978_856, 14_149_480, 20_013_928]
    assert cifar_counts(100, 12, plain=False)[0] == 769_162
    assert cifar_counts(190, 40, plain=False)[0] == 25_624_430
    assert cifar_counts(250, 24, plain=False)[0] == 15_324_406
    # github.com/liuzhuang13/DenseNet, README.md, in millions.
    plain = [cifar_counts(depth, growth, plain=True)[0] for depth, growth in ((40, 12), (100, 12), (100, 24))]
    assert [f"{params / 1e6:.1f}" for params in plain] == ["1.0", "7.0", "27.2"]


@pytest.mark.parametrize("depth", LAYERS)
def test_deeper_networks_are_those_of_the_paper(depth: int) -> None:
    with torch.device("meta"):
        network = densenet(depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == imagenet_counts(depth)[0]


@pytest.mark.parametrize("name", COUNTS)
def test_sites(name: str) -> None:
    blocks = 4 if name == "densenet121" else 3
    paths = [f"stages.stage{n}.{part}" for n in range(1, blocks + 1) for part in ("block", "transition")][:-1]
    groups = built(name).model.site_groups()  # type: ignore[operator]
    assert groups["block"] == paths
    layers = LAYERS[121] if name == "densenet121" else (16 if "bc" in name else 32,) * 3
    assert groups["residual"] == [
        f"stages.stage{n}.block.layer{layer}"
        for n, count in enumerate(layers, start=1)
        for layer in range(1, count + 1)
    ]
    found = built(f"se_{name}").insertions
    assert [(at.path, at.channels, at.squeeze_channels) for at in found] == [
        (path, c, c // 16) for path, c in zip(paths, COUNTS[name][2], strict=True)
    ]


Small = Callable[[], Any]
SMALL: dict[str, Small] = {
    "bottlenecks": lambda: densenet_cifar(16, 4, num_classes=3),
    "plain": lambda: densenet_cifar(10, 4, num_classes=3, bottleneck=False),
}


@pytest.mark.parametrize("small", SMALL)
def test_a_layer_passes_its_input_on_and_appends_to_it(small: str) -> None:
    torch.manual_seed(0)
    layer = SMALL[small]().eval().get_submodule("stages.stage1.block.layer1")
    x = torch.randn(2, 8 if small == "bottlenecks" else 16, 8, 8)
    before = x.clone()
    with torch.no_grad():
        out = layer(x)
        assert torch.equal(out[:, : x.shape[1]], before)
        assert torch.equal(out[:, x.shape[1] :], layer.branch(x))
    assert out.shape[1] == x.shape[1] + 4
    assert torch.equal(x, before)


def test_layers_and_transitions_are_those_of_the_paper() -> None:
    names = {small: SMALL[small]().get_submodule("stages.stage1.block.layer1.branch")._modules for small in SMALL}
    assert list(names["bottlenecks"]) == ["bn1", "relu1", "conv1", "bn2", "relu2", "conv2"]
    assert list(names["plain"]) == ["bn1", "relu1", "conv1"]
    # A transition halves the channels, or keeps them.
    for small, before, after in (("bottlenecks", 2 * 4 + 2 * 4, 8), ("plain", 16 + 2 * 4, 24)):
        transition: Any = SMALL[small]().get_submodule("stages.stage1.transition")
        assert list(transition._modules) == ["bn", "relu", "conv", "pool"]
        assert tuple(transition.conv.weight.shape) == (after, before, 1, 1)
        assert transition.pool(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten().tolist() == [1.5]


def test_resolutions() -> None:
    with torch.device("meta"):
        network: Any = densenet(121).eval()
        x = network.stem(torch.empty(2, 3, 224, 224))
        assert x.shape == (2, 64, 56, 56)
        for stage, shape in zip(network.stages, ((128, 28), (256, 14), (512, 7), (1024, 7)), strict=True):
            x = stage(x)
            assert x.shape == (2, shape[0], shape[1], shape[1])


@pytest.mark.parametrize("small", SMALL)
def test_every_parameter_gets_a_gradient(small: str) -> None:
    torch.manual_seed(0)
    network = SMALL[small]().train()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert bool(parameter.grad.isfinite().all()), path
    assert all(module.bias is None for module in network.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize(
    ("placement", "first"), [("standard", (4, 4)), ("3x3", (4, 4)), ("pre", (8, 16)), ("post", (12, 20))]
)
def test_layers_can_be_gated_at_every_placement(small: str, placement: Any, first: tuple[int, int]) -> None:
    """Standard: the channels that the layer adds; pre: its input; post: both."""
    torch.manual_seed(0)
    network = SMALL[small]().eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = network(x)
        found = insert_se(
            network, "residual", placement=placement, reduction=2, input_nchw=(1, 3, 32, 32), init="identity"
        )
        assert len(found) == 6
        assert found[0].channels == first[list(SMALL).index(small)]
        assert torch.equal(network(x), before)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (densenet, {"depth": 120}, "depth is 120: it must be one of 121, 169, 201"),
        (densenet, {"depth": 121, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
        (densenet_cifar, {"depth": 101, "growth_rate": 12}, r"depth is 101: with bottlenecks it must be 6n \+ 4"),
        (densenet_cifar, {"depth": 4, "growth_rate": 12}, r"depth is 4: with bottlenecks it must be 6n \+ 4"),
        (
            densenet_cifar,
            {"depth": 42, "growth_rate": 12, "bottleneck": False},
            r"depth is 42: without bottlenecks it must be 3n \+ 4",
        ),
        (densenet_cifar, {"depth": 100, "growth_rate": 0}, "growth_rate is 0: it must be 1 or more"),
        (densenet_cifar, {"depth": 100, "growth_rate": 12, "num_classes": 0}, "num_classes is 0: it must be 1 or more"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(builder: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        builder(**arguments)
    assert "\n" not in str(caught.value)
