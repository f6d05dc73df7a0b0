"""The figures that other counters expect of themselves, each met or explained by the difference of the conventions.

Sources: pytorch `test/test_flop_counter.py` (067f1d9), fvcore `tests/test_flop_count.py` (1856b63), thop
`tests/test_conv2d.py` (572085f) and README (176c407), calflops README (086d419), ptflops `tests/common_test.py`
(2c85b93), and the `_ops` that torchvision publishes with its weights.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.cost.count import count
from selab.cost.crosscheck import fvcore_counter, thop_counter, torch_counter, torch_counter_backward
from selab.cost.rules import RULES
from selab.cost.tracer import OpTrace, op_trace
from selab.records.types import Counter


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


class Learned(nn.Module):
    """A function of an input and of tensors that need a gradient."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.tensors)


def zeros(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


@pytest.fixture
def their_network(foreign_model):
    """A network of torchvision without weights; skips where torchvision is not installed."""

    def make(name: str) -> nn.Module:
        # RegNet computes its widths with tensors, which needs values.
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            return foreign_model("torchvision", name)

    return make


# --------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.mm, [(4, 5), (5, 6)], 240),
        (torch.matmul, [(5, 6), (6, 7)], 420),
        (lambda a, b: torch.einsum("ab,bc->ac", a, b), [(6, 7), (7, 8)], 672),
        (torch.bmm, [(3, 4, 5), (3, 5, 6)], 720),
        (torch.addmm, [(4, 6), (4, 5), (5, 6)], 240),
        (torch.addmm, [(4, 1), (4, 5), (5, 6)], 240),
        (torch.addmm, [(6,), (4, 5), (5, 6)], 240),
        (torch.baddbmm, [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 720),
        (lambda x, w: F.conv2d(x, w, padding=1), [(2, 3, 6, 6), (6, 3, 4, 4)], 28800),
        (lambda x, w: F.conv1d(x, w, padding=1), [(2, 3, 6), (6, 3, 4)], 1440),
        (F.conv_transpose2d, [(1, 1, 2, 2), (1, 1, 2, 2)], 32),
        (F.conv2d, [(1, 1, 2, 2), (1, 1, 1, 1)], 8),
        (F.linear, [(8, 9), (10, 9), (10,)], 1440),
    ],
)
def test_torch_forward(function: Callable[..., Any], shapes: list[tuple[int, ...]], flops: int) -> None:
    model, example = Apply(function), zeros(*shapes)
    assert 2 * count(model, example).macs.conv_linear == flops
    counter = torch_counter(model, example, op_trace(model, example))
    assert (counter.total, counter.remainder) == (flops, 0)


@pytest.mark.parametrize(
    ("model", "shape", "flops"),
    [
        # Only the first factor needs a gradient.
        (Learned(lambda b, a: (a @ b).expand(7, 4, 6) @ torch.ones(7, 6, 7, device=b.device), (4, 5)), (5, 6), 5184),
        # Both factors do; the same twice is 960.
        (Learned(lambda _, a: a.mm(a.t()), (4, 5)), (1,), 480),
        # Fifty passes of a transposed convolution are 1,536,000. The input needs no gradient.
        (nn.ConvTranspose2d(4, 8, (2, 2), stride=2), (1, 4, 30, 2), 1536000 // 50),
        (Learned(lambda _, a: a.mm(a), (10, 10)), (1,), 6000),
        (Learned(lambda _, a: (a.mm(a).relu_(),), (10, 10)), (1,), 6000),
        (Learned(lambda _, x, w: F.conv2d(x, w), (1, 3, 4, 4), (7, 3, 2, 2)), (1,), 3 * 2 * 3 * 7 * 4 * 9),
    ],
)
def test_torch_backward(model: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    cost = count(model, torch.zeros(shape))
    assert 2 * (cost.macs.conv_linear + cost.macs_backward.conv_linear) == flops
    counter = torch_counter_backward(model, torch.zeros(shape), op_trace(model, torch.zeros(shape)))
    assert (counter.total, counter.remainder) == (flops, 0)


def test_torch_forward_and_backward_of_resnet18(their_network) -> None:
    model = their_network("resnet18")
    cost = count(model, (1, 3, 224, 224))
    # Their image needs a gradient, which costs the first convolution once more.
    stem = 64 * 3 * 49 * 112 * 112
    assert 2 * (cost.macs.conv_linear + cost.macs_backward.conv_linear + stem) == 10884440064
    traced = op_trace(model, (1, 3, 224, 224))
    first = [o for o in traced.operations if o.path.startswith("layer1") and o.name == "convolution"]
    assert 2 * sum(o.macs for o in first) == 924844032
    assert 2 * sum(o.backward_macs for o in first) == 1849688064


@pytest.mark.parametrize(("keys", "flops"), [(128, 134217728), (256, 268435456)])
@pytest.mark.parametrize("backend", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_torch_attention(backend: str, keys: int, flops: int) -> None:
    query, key = torch.zeros(4, 8, 128, 64), torch.zeros(4, 8, keys, 64)
    rule = RULES[f"aten::_scaled_dot_product_{backend}"]
    work = rule.work((query, key, key), query)
    assert work is not None
    assert 2 * work.macs == flops
    assert rule.backward is not None
    backward = rule.backward((query, key, key), query, work, lambda _: True)
    # In steps it is three times the forward pass in all. Fused kernels compute the scores again: 3.5 times.
    assert 2 * (work.macs + backward.macs) == 3 * flops
    assert 2 * (work.macs + backward.macs) + flops // 2 == 7 * flops // 2


# -------------------------------------------------------------------------------------------------------------- fvcore


def fvcore_of(model: nn.Module, example: Any) -> Counter:
    pytest.importorskip("fvcore", reason="fvcore is not installed")
    return fvcore_counter(model, example, op_trace(model, example, details=True))


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(8, 4), (5, 8), 5 * 8 * 4),
        (nn.Linear(10, 20), (5, 10), 5 * 10 * 20),
        (nn.Linear(10, 20), (5, 5, 10), 5 * 5 * 10 * 20),
        (nn.Conv2d(10, 3, 3, 1, 1), (5, 10, 15, 15), 5 * 10 * 3 * 9 * 15**2),
        (nn.Conv2d(10, 6, 3, 2, 1), (2, 10, 20, 20), 2 * 10 * 6 * 9 * 10**2),
        (nn.Conv2d(16, 8, 5, 1, 2, groups=4), (5, 16, 15, 15), 5 * 16 * 8 * 25 * 15**2 // 4),
        (nn.Conv2d(16, 8, 3, 1, 1, groups=8), (5, 16, 15, 15), 5 * 16 * 8 * 9 * 15**2 // 8),
        (nn.Conv1d(10, 3, 3, 1, 1), (5, 10, 15), 5 * 10 * 3 * 3 * 15),
        (nn.Conv3d(10, 3, 3, 1, 1), (5, 10, 15, 15, 15), 5 * 10 * 3 * 27 * 15**3),
        (nn.ConvTranspose2d(10, 3, 3, 1, 1), (5, 10, 15, 15), 5 * 10 * 3 * 9 * 15**2),
        (nn.ConvTranspose2d(10, 3, 3, 2, 1), (5, 10, 15, 15), 5 * 10 * 3 * 9 * 15**2),
        (nn.ConvTranspose2d(10, 3, 3, 3, 1, 2), (5, 10, 15, 15), 5 * 10 * 3 * 9 * 15**2),
    ],
)
def test_fvcore_layers(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count(module, shape).macs.conv_linear == macs
    counter = fvcore_of(module, shape)
    assert (counter.total, counter.remainder) == (macs, 0)


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.matmul, [(20, 10), (10, 100)], 20 * 10 * 100),
        (torch.matmul, [(1, 20, 10), (1, 10, 100)], 20 * 10 * 100),
        (torch.matmul, [(2, 2, 20, 10), (2, 2, 10, 100)], 4 * 20 * 10 * 100),
        (torch.matmul, [(1, 20, 10), (10, 100)], 20 * 10 * 100),
        (torch.matmul, [(2, 20, 10), (10, 100)], 2 * 20 * 10 * 100),
        (torch.bmm, [(2, 5, 2), (2, 2, 12)], 2 * 5 * 2 * 12),
        (lambda x, y: torch.einsum("nct,ncp->ntp", x, y), [(1, 5, 2), (1, 5, 12)], 5 * 2 * 12),
        (lambda x, y: torch.einsum("ntg,ncg->nct", x, y), [(1, 2, 6), (1, 5, 6)], 5 * 2 * 6),
        (lambda x, y: torch.einsum("nc,nchw->hw", x, y), [(3, 4), (3, 4, 2, 3)], 72),
        (torch.mm, [(3, 4), (4, 5)], 60),
    ],
)
def test_fvcore_products(function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int) -> None:
    model, example = Apply(function), zeros(*shapes)
    assert count(model, example).macs.conv_linear == macs
    counter = fvcore_of(model, example)
    assert (counter.total, counter.remainder) == (macs, 0)


@pytest.mark.parametrize(
    ("module", "shape", "theirs", "ours"),
    [
        # One per element without scale and shift; two with them, which are one multiply-add.
        (nn.BatchNorm1d(10, affine=False), (10, 10), 100, 100),
        (nn.BatchNorm2d(2), (2, 2, 2, 2), 32, 16),
        # With statistics they count four or five per element: two for the statistics, and each operation by itself.
        (nn.BatchNorm2d(10, affine=False, track_running_stats=False), (10, 10, 5, 5), 4 * 2500, 3 * 2500),
        (nn.BatchNorm3d(10, affine=False, track_running_stats=False), (10, 10, 5, 5, 5), 4 * 12500, 3 * 12500),
        (nn.BatchNorm2d(2, track_running_stats=False), (2, 2, 2, 2), 80, 48),
        (nn.GroupNorm(2, 2), (2, 2, 2, 2), 80, 48),
        (nn.GroupNorm(2, 2, affine=False), (2, 2, 2, 2), 64, 48),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 2, 2, 2), 2**4 * 4 * 4, 2**4 * 4 * 4),
        (nn.AdaptiveAvgPool2d(1), (4, 5, 10, 10), 2000, 2000),
    ],
)
def test_fvcore_other_layers(module: nn.Module, shape: tuple[int, ...], theirs: int, ours: int) -> None:
    assert count(module, shape).macs.all == ours
    counter = fvcore_of(module, shape)
    assert (counter.total, counter.ours, counter.remainder) == (theirs, 0, 0)


def test_fvcore_three_layers() -> None:
    layers = (nn.Conv2d(2, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3), nn.Linear(3, 1))
    cost = count(nn.Sequential(*layers), (4, 2, 10, 10))
    assert cost.macs.all == 4 * 5 * 2 * 100 + 2000 + 4 * 5 * 3 + 4 * 3
    assert fvcore_of(nn.Sequential(*layers), (4, 2, 10, 10)).total == cost.macs.all


# ---------------------------------------------------------------------------------------------------------------- thop


def elements(traced: OpTrace, *names: str, read: bool = False) -> int:
    """Return the elements that operators of these names write, or those of their first input."""
    return sum(o.input_numel if read else o.output_numel for o in traced.operations if o.name in names)


def biased_elements(model: nn.Module, traced: OpTrace, kind: type[nn.Module]) -> int:
    """Return the output elements of layers with a bias."""
    biased = {path for path, layer in model.named_modules() if isinstance(layer, kind) and layer.bias is not None}
    return sum(o.output_numel for o in traced.operations if o.path in biased and o.macs)


@pytest.mark.parametrize("bias", [False, True])
def test_thop_convolution(bias: bool) -> None:
    module = nn.Conv2d(3, 12, 5, padding=1, bias=bias)
    assert count(module, (1, 3, 32, 32)).macs.conv_linear == 810000
    pytest.importorskip("thop", reason="thop is not installed")
    counter = thop_counter(module, (1, 3, 32, 32), op_trace(module, (1, 3, 32, 32), details=True))
    assert (counter.total, counter.remainder) == (810000, 0)


# Name, millions of parameters, billions of MACs. MNASNet 0.5 and 0.75 are left out: their stem was wider then.
THOP = [
    ("alexnet", 61.10, 0.77),
    ("vgg11", 132.86, 7.74),
    ("vgg16", 138.36, 15.61),
    ("vgg16_bn", 138.37, 15.66),
    ("resnet18", 11.69, 1.82),
    ("resnet50", 25.56, 4.14),
    ("resnet152", 60.19, 11.61),
    ("wide_resnet50_2", 68.88, 11.46),
    ("resnext50_32x4d", 25.03, 4.29),
    ("densenet121", 7.98, 2.90),
    ("densenet201", 20.01, 4.39),
    ("squeezenet1_0", 1.25, 0.82),
    ("squeezenet1_1", 1.24, 0.35),
    ("mnasnet1_0", 4.38, 0.34),
    ("mobilenet_v2", 3.50, 0.33),
    ("shufflenet_v2_x1_0", 2.28, 0.15),
    ("inception_v3", 27.16, 5.75),
]


@pytest.mark.parametrize(("name", "params", "macs"), THOP)
def test_thop_networks(their_network, name: str, params: float, macs: float) -> None:
    model = their_network(name)
    shape = (1, 3, 299, 299) if name == "inception_v3" else (1, 3, 224, 224)
    cost, traced = count(model, shape), op_trace(model, shape)
    assert round(cost.params / 1e6, 2) == params
    # The version that made the table (`thop/count_hooks.py`, 0ce364b) priced a bias as one MAC, a linear layer as
    # its multiplications and its additions, BatchNorm as four per element and average pooling as one per element.
    linear = [o for o in traced.operations if o.name == "linear"]
    theirs = (
        cost.macs.conv_linear
        + biased_elements(model, traced, nn.Conv2d)
        + sum(o.macs - o.output_numel for o in linear)
        + 4 * elements(traced, "batch_norm")
        + elements(traced, "avg_pool", "adaptive_avg_pool", "mean", read=True)
    )
    assert theirs / 1e9 == pytest.approx(macs, abs=0.006)


# ------------------------------------------------------------------------------------------------------------ calflops


# Name, parameters, FLOPs and MACs of the table, which has six digits.
CALFLOPS = [
    ("vgg11", 132863000, 15239200000, 7609090000),
    ("vgg16", 138358000, 30973800000, 15470300000),
    ("vgg11_bn", 132869000, 15254000000, 7609090000),
    ("vgg16_bn", 138366000, 31000900000, 15470300000),
    ("resnet18", 11689500, 3636250000, 1814070000),
    ("resnet34", 21797700, 7339390000, 3663760000),
    ("resnet50", 25557000, 8211110000, 4089180000),
    ("resnet152", 60192800, 23094300000, 11513600000),
    ("squeezenet1_0", 1248420, 1648970000, 818925000),
    ("squeezenet1_1", 1235500, 705014000, 349152000),
    ("densenet121", 7978860, 5716880000, 2834160000),
    ("densenet201", 20013900, 8658520000, 4291370000),
    ("inception_v3", 27161300, 5692390000, 2837920000),
    # The table's 7,418,800,000 MACs of AlexNet have two digits exchanged; its FLOPs fit 714,188,480.
    ("alexnet", 61100840, 1429740000, 714188000),
]


def to_six_digits(value: int) -> float:
    return float(f"{value:.5e}")


@pytest.mark.parametrize(("name", "params", "flops", "macs"), CALFLOPS)
def test_calflops_networks(their_network, name: str, params: int, flops: int, macs: int) -> None:
    model = their_network(name)
    cost, traced = count(model, (1, 3, 224, 224)), op_trace(model, (1, 3, 224, 224))
    assert to_six_digits(cost.params) == to_six_digits(params)
    assert to_six_digits(cost.macs.conv_linear) == macs
    # Besides two per MAC: one per bias of a convolution, two per element of BatchNorm, one per ReLU and one per
    # element that a pooling layer reads.
    pooling = ("max_pool", "avg_pool", "adaptive_avg_pool", "mean")
    theirs = (
        2 * cost.macs.conv_linear
        + biased_elements(model, traced, nn.Conv2d)
        + 2 * elements(traced, "batch_norm")
        + elements(traced, "relu")
        + elements(traced, *pooling, read=True)
    )
    assert theirs == pytest.approx(flops, rel=6e-6)


# ------------------------------------------------------------------------------------------------------------- ptflops


@pytest.mark.parametrize(
    ("module", "shape", "theirs", "biases"),
    [
        (nn.Conv2d(3, 2, 3), (1, 3, 224, 224), 2759904, 2 * 222 * 222),
        (nn.Linear(3, 2), (1, 3), 8, 2),
        (nn.Linear(3, 2), (1, 4, 5, 3), 8 * 20, 2 * 20),
    ],
)
def test_ptflops_adds_a_mac_per_bias(module: nn.Module, shape: tuple[int, ...], theirs: int, biases: int) -> None:
    assert count(module, shape).macs.conv_linear + biases == theirs


# --------------------------------------------------------------------------------------------------------- torchvision


TORCHVISION = [
    *("alexnet", "convnext_tiny", "densenet161", "efficientnet_b0", "inception_v3", "mnasnet1_3"),
    *("mobilenet_v2", "mobilenet_v3_large", "regnet_y_400mf", "resnet101", "resnext101_32x8d", "shufflenet_v2_x2_0"),
    *("squeezenet1_1", "vgg19_bn", "wide_resnet101_2", "vit_b_16", "maxvit_t"),
    # Windows of attention; their relative positions are no products.
    *("swin_t", "swin_v2_t"),
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(their_network, name: str) -> None:
    model = their_network(name)
    published = pytest.importorskip("torchvision").models.get_model_weights(name).DEFAULT
    size = published.transforms().crop_size[0]
    cost = count(model, (1, 3, size, size))
    assert cost.unknown == {}
    assert cost.params == published.meta["num_params"]
    assert cost.macs.conv_linear / 1e9 == pytest.approx(published.meta["_ops"], abs=0.0011)
