"""Expected numbers are arithmetic: what a formula on paper says, never what the program printed."""

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.cost.count import count
from selab.cost.rules import RULES, Rule, Work
from selab.cost.tracer import op_trace
from selab.errors import ModelError
from selab.models.build import build
from selab.models.catalog import find
from selab.records.types import Cost, Macs, StageCost


def variant(name: str, *, device: str = "meta") -> nn.Module:
    return build(find(name), device=device).model


IMAGE = (1, 3, 224, 224)


# --------------------------------------------------------------------------------------- convolutions, matrix products


@pytest.mark.parametrize(
    ("module", "input_shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 8, 8), 3 * 8 * 9 * 64),
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), (2, 3, 8, 8), 2 * 3 * 8 * 9 * 64),
        (nn.Conv2d(3, 8, 3, stride=2), (1, 3, 9, 9), 3 * 8 * 9 * 4 * 4),
        (nn.Conv2d(8, 12, (1, 5), groups=4), (1, 8, 6, 9), 12 * (8 // 4) * 5 * 6 * 5),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 7, 7), 8 * 9 * 49),
        (nn.Conv2d(3, 4, 3, dilation=2), (1, 3, 9, 9), 3 * 4 * 9 * 5 * 5),
        (nn.Conv2d(3, 4, 3, padding="same"), (1, 3, 9, 9), 3 * 4 * 9 * 81),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (1, 6, 5, 5), 6 * 4 * 9 * 25),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), (1, 6, 5, 5), 6 * 2 * 4 * 25),
        (nn.Conv1d(3, 4, 5), (2, 3, 20), 2 * 3 * 4 * 5 * 16),
        (nn.Conv3d(3, 4, 3), (1, 3, 5, 5, 5), 3 * 4 * 27 * 27),
        (nn.Linear(10, 7), (4, 10), 4 * 10 * 7),
        (nn.Linear(10, 7, bias=False), (4, 10), 4 * 10 * 7),
        (nn.Linear(10, 7), (2, 3, 10), 2 * 3 * 10 * 7),
    ],
)
def test_a_layer_costs_one_mac_per_multiplication(module: nn.Module, input_shape: tuple[int, ...], macs: int) -> None:
    cost = count(module, input_shape)
    assert cost.macs == Macs(conv_linear=macs, paper=macs, all=macs)
    assert cost.flops == 2 * macs
    assert cost.unknown == {}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.bmm, [(5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (torch.matmul, [(2, 5, 6, 3), (2, 5, 3, 4)], 2 * 5 * 6 * 3 * 4),
        (torch.baddbmm, [(5, 2, 4), (5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (torch.mm, [(2, 3), (3, 4)], 2 * 3 * 4),
        (torch.mv, [(2, 3), (3,)], 2 * 3),
        (F.scaled_dot_product_attention, [(1, 2, 5, 4)] * 3, 2 * (2 * 5 * 5 * 4)),
    ],
)
def test_matrix_products(function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int) -> None:
    assert count(Apply(function), tuple(torch.empty(s) for s in shapes)).macs.conv_linear == macs


# ------------------------------------------------------------------------------------------------------ all the others


@pytest.mark.parametrize(
    ("module", "macs", "flops"),
    [
        (nn.BatchNorm2d(4), 400, 800),
        (nn.BatchNorm2d(4, affine=False), 400, 800),
        (nn.GroupNorm(2, 4), 3 * 400, 4 * 400),
        (nn.LayerNorm(10), 3 * 400, 4 * 400),
        (nn.ReLU(), 400, 400),
        (nn.ReLU6(inplace=True), 400, 400),
        (nn.Hardswish(), 400, 400),
        (nn.Sigmoid(), 400, 400),
        (nn.PReLU(), 400, 400),
        (nn.Softmax(1), 3 * 400, 3 * 400),
        (nn.AdaptiveAvgPool2d(1), 400, 400),
        (nn.AdaptiveMaxPool2d(1), 400, 400),
        (nn.AdaptiveAvgPool2d(5), 400, 400),
        # Windows over 10 into 3: [0, 4), [3, 7), [6, 10).
        (nn.AdaptiveAvgPool2d(3), 4 * 12 * 12, 4 * 12 * 12),
        (nn.AvgPool2d(2), 400, 400),
        (nn.AvgPool2d(10), 400, 400),
        (nn.MaxPool2d(3, stride=2), 4 * 4 * 4 * 9, 4 * 4 * 4 * 9),
        (nn.Dropout(), 0, 0),
        (nn.Flatten(), 0, 0),
        (nn.ChannelShuffle(2), 0, 0),
        (nn.ZeroPad2d(1), 0, 0),
        (nn.Upsample(scale_factor=2), 0, 0),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4 * 1600, 4 * 1600),
        (Apply(lambda x: x + x), 400, 400),
        (Apply(lambda x: x * 2), 400, 400),
        (Apply(lambda x: torch.addcmul(x, x, x)), 400, 800),
        (Apply(lambda x: torch.cat([x, x], 1)), 0, 0),
        (Apply(lambda x: x.transpose(1, 2).contiguous()), 0, 0),
        (Apply(lambda x: x.mean((2, 3))), 400, 400),
        (Apply(lambda x: x.amax((2, 3))), 400, 400),
    ],
)
def test_other_operators_cost_what_their_rule_says(module: nn.Module, macs: int, flops: int) -> None:
    cost = count(module, (1, 4, 10, 10))
    assert (cost.macs.conv_linear, cost.macs.all, cost.flops) == (0, macs, flops)
    assert cost.unknown == {}


def test_batch_norm_computes_statistics_in_train_mode() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    assert count(network, (2, 4, 5, 5), training=True).macs.all == 3 * 200


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True),
        nn.MaxPool2d((3, 2), dilation=2),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveMaxPool2d(3),
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(0, 2), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2),
        Apply(lambda x: x.sum(1, keepdim=True) + x.mean(-1).unsqueeze(-1)),
        Apply(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2).view(2, 4, -1)),
        Apply(lambda x: x.permute(0, 2, 3, 1).add(1.0).transpose(2, 3).sigmoid().transpose(2, 3).view(2, -1, 4)),
        Apply(lambda x: torch.cat([x, x[:, :1]], dim=1).chunk(5, dim=1)[4]),
        Apply(lambda x: (x > 0).to(x.dtype).mul_(x).clamp_(max=1.0)),
        Apply(lambda x: x.max(dim=1).values),
        Apply(lambda x: x[..., torch.tensor([0, 2])]),
    ],
)
def test_shapes_are_those_of_the_real_pass(module: nn.Module) -> None:
    calls = op_trace(module, (2, 4, 11, 11), details=True).module_calls
    assert calls[-1].output_shape == tuple(module(torch.randn(2, 4, 11, 11)).shape)


def test_bytes_are_inputs_once_and_output_once() -> None:
    assert count(Apply(lambda x: x + x), (1, 4, 10, 10)).bytes == 4 * (400 + 400)
    assert count(Apply(lambda x: x + x.mean((2, 3), keepdim=True)), (1, 4, 10, 10)).bytes == 4 * (404 + 400 + 4 + 400)
    expanded = Apply(lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x))
    assert count(expanded, (1, 4, 10, 10)).bytes == 4 * (404 + 400 + 4 + 400)
    assert count(nn.ReLU(inplace=True), (1, 4, 10, 10)).bytes == 4 * (400 + 400)
    assert count(nn.Flatten(), (1, 4, 10, 10)).bytes == 0
    convolution = count(nn.Conv2d(4, 6, 1), (1, 4, 10, 10))
    assert convolution.bytes == 4 * (400 + 6 * 4 + 6 + 600)
    assert count(nn.Conv2d(4, 6, 1), (1, 4, 10, 10), dtype=torch.bfloat16).bytes == convolution.bytes // 2
    assert count(nn.Conv2d(4, 6, 1).half(), (1, 4, 10, 10)).bytes == convolution.bytes // 2


def test_activations_are_the_convolutions_outputs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    assert count(network, (1, 3, 8, 8)).activations == 8 * 36


def test_shares_add_up() -> None:
    cost = count(variant("se_shufflenet"), IMAGE)
    for shares in (cost.by_operator, cost.by_module):
        assert sum(share.macs for share in shares.values()) == cost.macs.all
        assert sum(share.flops for share in shares.values()) == cost.flops
        assert sum(share.bytes for share in shares.values()) == cost.bytes
    assert cost.by_operator["convolution"].macs + cost.by_operator["linear"].macs == cost.macs.conv_linear


# ----------------------------------------------------------------------------------------------- squeeze-and-excitation


class TorchvisionStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class TimmStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class ExpandStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(32, 4), nn.ReLU(inplace=True), nn.Linear(4, 32), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        return x * self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)


class WholeMapStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 4), nn.Linear(4, 32)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.avg_pool2d(x, x.shape[2:]).flatten(1)
        return x.mul_(torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))[:, :, None, None])


SPELLINGS = [SqueezeExcitation(32, reduction=8), TorchvisionStyle(), TimmStyle(), ExpandStyle(), WholeMapStyle()]


class Gated(nn.Module):
    """A convolution and the block behind it, so that the block's input is nobody's input."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)
        self.se = se

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv(x))


@pytest.mark.parametrize("block", SPELLINGS, ids=lambda block: type(block).__name__)
def test_a_block_has_one_price_however_it_is_spelled(block: nn.Module) -> None:
    with_se, without = count(Gated(block), (2, 3, 7, 7), se_blocks=["se"]), count(Gated(nn.Identity()), (2, 3, 7, 7))
    images, channels, width, area = 2, 32, 4, 49
    weights = 2 * channels * width
    assert with_se.se.blocks == 1
    assert with_se.se.params == weights + channels + width
    assert with_se.se.squeeze == StageCost(
        macs=images * channels * area, bytes=4 * images * (channels * area + channels)
    )
    assert with_se.se.excitation == StageCost(
        macs=images * (weights + width + channels),
        # Two layers with their parameters, ReLU, sigmoid.
        bytes=4 * (with_se.se.params + images * (2 * (channels + width) + 2 * width + 2 * channels)),
    )
    assert with_se.se.scale == StageCost(
        macs=images * channels * area, bytes=4 * images * (2 * channels * area + channels)
    )
    assert with_se.macs.conv_linear - without.macs.conv_linear == images * weights
    assert with_se.macs.paper - without.macs.paper == images * (weights + channels * area)
    assert with_se.flops - without.flops == images * (2 * weights + width + channels + 2 * channels * area)
    assert_stages_are_the_difference(with_se, without)
    # Backward: each operand of the layers, ReLU and sigmoid once, the mean spread, the product by both its factors.
    backward = with_se.macs_backward.all - without.macs_backward.all
    assert backward == images * (2 * weights + width + channels + 3 * channels * area)
    assert with_se.macs_backward.paper - with_se.macs_backward.conv_linear == images * channels * area


def assert_stages_are_the_difference(with_se: Cost, without: Cost) -> None:
    stages = (with_se.se.squeeze, with_se.se.excitation, with_se.se.scale)
    assert sum(stage.macs for stage in stages) == with_se.macs.all - without.macs.all
    assert sum(stage.bytes for stage in stages) == with_se.bytes - without.bytes
    assert with_se.se.params == with_se.params - without.params


@pytest.mark.parametrize(
    ("with_se", "without"),
    [
        ("se_resnet50", "resnet50"),
        ("se_mobilenet", "mobilenet"),
        ("se_shufflenet", "shufflenet"),
        ("se_vgg16", "vgg16"),
    ],
)
def test_the_stages_are_what_se_adds_to_a_network(with_se: str, without: str) -> None:
    assert_stages_are_the_difference(count(variant(with_se), IMAGE), count(variant(without), IMAGE))


class AddJoin(nn.Module):
    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return F.relu(branch + shortcut)


class FusedJoin(GatedJoin):
    """The same in one pass: relu(shortcut + branch * gate)."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        gate = self.se.excite(self.se.squeeze(branch))[:, :, None, None]
        return torch.addcmul(shortcut, branch, gate).relu_()


class Residual(nn.Module):
    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Conv2d(16, 16, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch(x), x)


def test_a_scale_fused_with_the_addition_costs_only_the_gate() -> None:
    se = SqueezeExcitation(16, reduction=4)
    without = count(Residual(AddJoin()), (1, 16, 6, 6))
    plain = count(Residual(GatedJoin(AddJoin(), se, "branch")), (1, 16, 6, 6))
    fused = count(Residual(FusedJoin(AddJoin(), se, "branch")), (1, 16, 6, 6))
    assert_stages_are_the_difference(plain, without)
    assert_stages_are_the_difference(fused, without)
    assert (fused.se.squeeze, fused.se.excitation) == (plain.se.squeeze, plain.se.excitation)
    assert fused.se.scale == StageCost(macs=0, bytes=4 * 16)
    assert fused.flops == plain.flops


def test_a_block_that_never_runs_is_none() -> None:
    network = Gated(nn.Identity())
    network.forgotten = SqueezeExcitation(32)
    cost = count(network, (1, 3, 7, 7))
    assert cost.se.blocks == 0
    assert cost.se.params > 0


# --------------------------------------------------------------------------------------------------- published networks


def test_resnet_50_with_and_without_se() -> None:
    baseline, se = count(variant("resnet50"), IMAGE), count(variant("se_resnet50"), IMAGE)
    # Channels and map of the four stages' blocks.
    stages = [(256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)]
    pooled = sum(blocks * channels * size**2 for channels, size, blocks in stages)
    squeezed = sum(blocks * channels for channels, _, blocks in stages)
    layers = sum(blocks * 2 * channels * (channels // 16) for channels, _, blocks in stages)
    assert pooled == 5_519_360
    assert baseline.macs.conv_linear == 3_857_973_248
    assert se.macs.conv_linear == 3_857_973_248 + layers == 3_860_488_192
    assert se.macs.paper == se.macs.conv_linear + pooled
    assert se.se.blocks == 16
    assert se.se.squeeze.bytes + se.se.scale.bytes == 4 * (3 * pooled + 2 * squeezed)
    # conv1's input, the image, needs no gradient.
    assert baseline.macs_backward.conv_linear == 2 * 3_857_973_248 - 64 * 3 * 49 * 112**2


@pytest.mark.parametrize(("name", "paper"), [("se_mobilenet", 571_929_600), ("se_vgg16", 15_484_038_144)])
def test_the_papers_convention(name: str, paper: int) -> None:
    assert count(variant(name), IMAGE).macs.paper == paper


# ------------------------------------------------------------------------------------------------------------- backward


def test_a_depthwise_layer_costs_its_macs_twice_backward() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64))
    stem, depthwise = 3 * 64 * 56 * 56, 64 * 9 * 56 * 56
    cost = count(network, (1, 3, 56, 56))
    assert cost.macs.conv_linear == stem + depthwise
    assert cost.macs_backward.conv_linear == stem + 2 * depthwise
    assert cost.flops_backward == 2 * (stem + 2 * depthwise)


def test_frozen_parameters_cost_nothing_backward() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    first, last, norm = 3 * 8 * 25, 8 * 4 * 25, 8 * 25
    # BatchNorm: input, scale, shift; ReLU.
    assert count(network, (1, 3, 5, 5)).macs_backward.all == first + 2 * last + 3 * norm + norm
    network[0].requires_grad_(False)
    assert count(network, (1, 3, 5, 5)).macs_backward.all == 2 * last + 2 * norm + norm
    network[1].requires_grad_(False)
    assert count(network, (1, 3, 5, 5)).macs_backward.all == last
    network[3].requires_grad_(False)
    assert count(network, (1, 3, 5, 5)).macs_backward.all == 0


class Scale(torch.autograd.Function):
    """x * gate(x) by hand: gradients are switched off inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * F.linear(x.mean((2, 3)), weight)[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ByHand(nn.Module):
    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.zeros(8, 8))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.hidden:
            return Scale.apply(x, self.weight)
        return x * F.linear(x.mean((2, 3)), self.weight)[:, :, None, None]


def test_the_inside_of_an_autograd_function_has_a_backward_pass() -> None:
    hidden, open_ = count(ByHand(hidden=True), (1, 3, 5, 5)), count(ByHand(hidden=False), (1, 3, 5, 5))
    assert hidden.macs_backward == open_.macs_backward
    assert hidden.macs_backward.conv_linear == 3 * 8 * 25 + 2 * 64


def test_what_runs_without_gradients_has_no_backward_pass() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    assert count(Half(), (1, 3, 5, 5)).macs_backward.conv_linear == 8 * 4 * 25
    with torch.no_grad():
        assert count(Half(), (1, 3, 5, 5)).macs_backward.conv_linear == 8 * 4 * 25


# ------------------------------------------------------------------------------------------- the model stays as it was


def test_shared_modules_have_their_parameters_once_and_run_twice() -> None:
    layer = nn.Linear(8, 8)
    cost = count(nn.Sequential(layer, nn.ReLU(), layer), (3, 8))
    assert cost.params == 8 * 8 + 8
    assert cost.macs.conv_linear == 2 * 3 * 8 * 8
    assert cost.by_module["0"].calls == 2


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {
            name: (tensor.clone(), tensor.data_ptr(), tensor.device) for name, tensor in model.state_dict().items()
        },
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "buffers": {path: sorted(module._buffers) for path, module in model.named_modules()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "hooks": {
            path: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for path, module in model.named_modules()
        },
        "global hooks": (
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
        ),
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "random": (torch.get_rng_state(), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert_same(value, after[key])
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


class Restless(nn.Module):
    """Draws random numbers, has a mixed mode, and can fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True))
        self.body[1].eval()
        self.tensor = torch.zeros(4)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(1).item() + random.random()
        self.tensor.add_(1)
        if self.fails:
            raise ValueError("no luck\ntoday")
        return self.body(x) * noise + self.tensor[:, None, None]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_the_model_as_it_was(fails: bool, training: bool) -> None:
    model = Restless(fails=fails)
    model.body(torch.randn(2, 3, 8, 8)).sum().backward()
    model.body[0].register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    if fails:
        with pytest.raises(ModelError):
            count(model, (1, 3, 8, 8), training=training)
    else:
        count(model, (1, 3, 8, 8), training=training)
    assert_same(before, fingerprint(model))
    assert model.tensor.eq(0).all()


def test_batch_norm_in_train_mode_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    count(model, (4, 3, 8, 8), training=True)
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_model_on_the_meta_device_costs_the_same() -> None:
    assert count(variant("se_small_cnn", device="cpu"), (1, 3, 32, 32)) == count(
        variant("se_small_cnn"), (1, 3, 32, 32)
    )


@pytest.mark.filterwarnings(
    # torch 2.13 imports torch.jit's deprecated parts with its compiler.
    "ignore::DeprecationWarning"
)
def test_a_compiled_model_costs_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert count(torch.compile(model, backend="eager"), (1, 3, 8, 8)) == count(model, (1, 3, 8, 8))


def test_recurrent_layers() -> None:
    model = nn.LSTM(8, 16, batch_first=True, bias=False)
    assert count(model, (2, 5, 8)).macs.conv_linear == 2 * 5 * 4 * 16 * (8 + 16)


# ----------------------------------------------------------------------------------------------- inputs, sizes, errors


def test_examples_in_every_form() -> None:
    model = Apply(lambda x, y: x @ y)
    a, b = torch.empty(2, 3), torch.empty(3, 4)
    assert count(model, (a, b)).macs.conv_linear == 24

    class Named(nn.Module):
        def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"product": left @ right}

    assert count(Named(), {"left": a, "right": b}).macs.conv_linear == 24
    assert count(nn.Linear(3, 5), a).macs.conv_linear == 30
    assert count(nn.Linear(3, 5), (2, 3)).macs.conv_linear == 30


def test_the_cost_is_linear_in_the_batch() -> None:
    model = variant("se_mobilenet_0_25")
    one, many = count(model, IMAGE), count(model, (32, 3, 224, 224))
    assert many.params == one.params
    assert many.macs == Macs(conv_linear=32 * one.macs.conv_linear, paper=32 * one.macs.paper, all=32 * one.macs.all)
    assert many.flops_backward == 32 * one.flops_backward


def test_nothing_is_allocated() -> None:
    # The input alone would be 48 GiB, and one pass some petaflops.
    one, huge = count(variant("se_vgg16"), IMAGE), count(nn.Conv2d(3, 64, 3, padding=1), (4096, 3, 1024, 1024))
    assert huge.macs.conv_linear == 4096 * 3 * 64 * 9 * 1024**2
    assert huge.macs.conv_linear > one.macs.conv_linear


def test_the_forward_pass_may_make_constants() -> None:
    def forward(x: Tensor) -> Tensor:
        steps = torch.linspace(0, 1, x.shape[-1])
        steps[0] = torch.tensor([1.0, 2.0]).sum().item()
        grid = torch.zeros(x.shape[-1]).fill_(2.0)
        assert steps[0] == 3.0
        assert grid.sum() == 2.0 * x.shape[-1]
        return x * steps * grid

    assert count(Apply(forward), (1, 3, 8, 8)).unknown == {}


@torch.library.custom_op("selab_tests::triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    return x * 3


@triple.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operators_without_a_rule_are_listed() -> None:
    cost = count(Apply(lambda x: torch.fft.fft2(triple(triple(x))).real), (1, 3, 8, 8))
    assert cost.unknown["selab_tests.triple"] == 2
    assert any("fft" in name for name in cost.unknown)
    assert "selab_tests.triple" not in cost.by_operator


def test_a_rule_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selab.cost.rules.FOUND", {})
    tripling = Rule(name="triple", work=lambda _args, out: Work(0, out.numel(), out.numel()))
    monkeypatch.setitem(RULES, "selab_tests::triple", tripling)
    assert count(Apply(triple), (1, 3, 8, 8)).macs.all == 192


def test_a_failing_model_is_named_with_the_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3)))
    with pytest.raises(ModelError, match=r"1\.1 \(Conv2d\).*\(1, 3, 8, 8\).*channel") as caught:
        count(network, (1, 3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [10**17, 10**20])
def test_an_input_that_no_tensor_can_hold_is_told_in_one_line(batch: int) -> None:
    with pytest.raises(ModelError, match=rf"^no input of shape \({batch}, 3, 8, 8\): too large; pass"):
        op_trace(nn.Conv2d(3, 4, 1), (batch, 3, 8, 8))


def test_values_cannot_steer_the_forward_pass() -> None:
    with pytest.raises(ModelError, match="depends on the values of a tensor"):
        count(Apply(lambda x: x if x.sum().item() > 0 else -x), (1, 3))


def test_an_se_path_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"no module 'sse'.*did you mean se\?"):
        count(Gated(TimmStyle()), (1, 3, 7, 7), se_blocks=["sse"])


def test_counting_imports_no_other_counter_and_no_compiler() -> None:
    program = (
        "import sys, torch; from torch import nn; from selab.cost.count import count;"
        "count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 8, 8));"
        "print(sorted({'fvcore', 'thop', 'torch._dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_exported_and_traced_networks_cost_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.zeros(1, 3, 8, 8)
    cost = count(network, x)
    exported = torch.export.export(network, (x,)).module()
    for made in (torch.jit.trace(network, x), exported):
        found = count(made, x)
        assert (found.macs, found.params, found.unknown) == (cost.macs, cost.params, {})


def test_recurrent_layers_of_packed_sequences_are_counted_on_real_tensors() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(10, 12)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
            out: Tensor = self.rnn(packed)[1]
            return out

    example = (torch.randn(7, 3, 10), torch.tensor([7, 5, 2]))
    cost = count(Packed(), example, on="cpu")
    assert cost.macs.conv_linear == (7 + 5 + 2) * 3 * (12 * 10 + 12 * 12)


def test_a_first_state_may_be_made_in_forward() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(10, 12)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(1, x.shape[1], 12), torch.zeros(1, x.shape[1], 12)
            out: Tensor = self.rnn(x, state)[0]
            return out

    assert count(Given(), (torch.randn(7, 3, 10),)).macs.conv_linear == 7 * 3 * 4 * (12 * 10 + 12 * 12)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{"padding": "valid", "stride": 2}, {"padding": "same", "dilation": 2}])
def test_padding_by_word(dims: int, options: dict[str, Any]) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, 3, **options)
    shape = (2, 4, 9, 8, 7)[: dims + 2]
    assert count(layer, shape).macs.conv_linear == layer(torch.zeros(shape)).numel() * 4 * 3**dims


@pytest.mark.parametrize("transposed", [False, True])
def test_one_number_of_padding_for_two_dimensions(transposed: bool) -> None:
    weight = torch.zeros(4, 4, 3, 3)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    cost = count(Apply(lambda x: convolve(x, weight, None, (2, 2), [1])), (1, 4, 9, 9))
    assert cost.macs.conv_linear == (81 if transposed else 25) * 4 * 4 * 9


class Asks(nn.Module):
    """Asks for the device, enters autocast and inference mode, and makes constants, inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.device == self.conv.weight.device
        assert x.device.type == "cpu"
        with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.inference_mode():
            y = self.conv(x)
        assert y.dtype == torch.bfloat16
        table = torch.tensor([1.0] * 8).view(8, 1, 1)
        return y.permute(0, 2, 3, 1).contiguous().view(-1) * table.sum() + torch.arange(y.numel())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_pass_may_ask_for_its_device(device: str) -> None:
    assert count(Asks().to(device), (2, 3, 6, 6)).macs.conv_linear == 2 * 36 * 8 * 27


def test_the_input_is_blamed_only_where_it_may_be_the_cause() -> None:
    def breaks(_x: Tensor) -> Tensor:
        raise KeyError("missing entry")

    with pytest.raises(ModelError, match=r"KeyError: 'missing entry'$"):
        count(Apply(breaks), (1, 3, 8, 8))
    with pytest.raises(ModelError, match="pass the input that the network expects"):
        count(nn.Conv2d(4, 4, 3), (1, 3, 8, 8))


@pytest.mark.parametrize("made", ["scripted", "traced"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_networks(made: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(1, 3, 6, 6)
    script = torch.jit.script(net) if made == "scripted" else torch.jit.trace(net, x)
    before = script(x)
    for training in (False, True):
        assert count(script, (1, 3, 6, 6), training=training).macs.conv_linear == 36 * (27 * 8 + 64)
        assert not script.training
    assert torch.equal(script(x), before)
