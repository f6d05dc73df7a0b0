"""Other counters run, and every difference to ours is explained to the unit."""

import warnings
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.config import BLOCKS
from selab.attention.insert import insert_se
from selab.attention.se import SqueezeExcitation
from selab.cost.crosscheck import compare, fvcore_counter, thop_counter, torch_counter_backward
from selab.cost.tracer import op_trace
from selab.errors import ModelError
from selab.models.build import build
from selab.models.catalog import find
from selab.records.types import Counter

IMAGE = (1, 3, 224, 224)


def variant(name: str) -> nn.Module:
    return build(find(name), device="meta").model


def amounts(counter: Counter) -> dict[str, int]:
    return {difference.cause: difference.amount for difference in counter.differences if difference.amount}


def assert_explained(counters: dict[str, Counter]) -> None:
    assert list(counters) == ["fvcore", "thop", "torch", "torch_backward"]
    for counter in counters.values():
        assert counter.error == ""
        assert counter.version
        assert counter.total == counter.ours + sum(d.amount for d in counter.differences) + (counter.remainder or 0)
        assert counter.remainder == 0, counter


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_0_25",
        "se_mobilenet_0_25",
        "se_shufflenet_0_25",
        "se_resnet18",
        "se_vgg16",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "ghostnet_100",
        "resnet18+squeeze=none",
        *(f"mobilenet_0_25+block={block}" for block in BLOCKS),
        "mobilenet_0_25+block=gather_excite,extent=2",
    ],
)
def test_nothing_remains_for_the_networks_of_the_project(name: str) -> None:
    assert_explained(compare(variant(name), IMAGE))


def test_the_totals_do_not_grow_with_memory() -> None:
    counters = compare(variant("se_mobilenet_0_25"), (4096, 3, 224, 224))
    assert_explained(counters)
    one = compare(variant("se_mobilenet_0_25"), IMAGE)
    assert all(counters[key].total == 4096 * (one[key].total or 0) for key in ("fvcore", "thop", "torch"))


class SE(nn.Module):
    """The block as torchvision spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.relu, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), SE())


def test_the_rules_of_the_three() -> None:
    area, channels = 36, 8
    ours = 3 * channels * 9 * area + 2 * channels * 2
    model = small_network()
    traced = op_trace(model, (1, 3, 6, 6), se_blocks=["3"], details=True)
    counters = compare(model, (1, 3, 6, 6), traced=traced)
    assert_explained(counters)

    assert counters["fvcore"].unit == "macs"
    assert counters["fvcore"].ours == ours
    assert amounts(counters["fvcore"]) == {
        "BatchNorm, 2 per element": 2 * channels * area,
        "SE squeeze by adaptive_avg_pool2d, 1 per element": channels * area,
    }
    assert counters["fvcore"].uncounted == {"aten::sigmoid": 1, "aten::mul": 1}

    assert amounts(counters["thop"]) == {
        "BatchNorm2d, 4 per element": 4 * channels * area,
        "SE squeeze by AdaptiveAvgPool2d, 1 per element read and 1 per element written": channels * area + channels,
    }
    # nn.Sigmoid has no rule, and the product is a function.
    assert counters["thop"].uncounted == {"sigmoid": 1, "mul": 1}

    assert counters["torch"].unit == "flops"
    assert counters["torch"].total == 2 * ours
    # No gradient for the image; all else twice.
    assert counters["torch_backward"].total == 2 * (ours + 3 * channels * 9 * area + 2 * 2 * channels * 2)

    for counter in counters.values():
        silent = [difference.cause for difference in counter.differences if not difference.amount]
        assert "SE gate by sigmoid, not counted" in silent
        assert "SE scale, not counted" in silent
        assert any("squeeze" in cause for cause in silent) == (counter.name == "torch")


def test_a_squeeze_by_mean_is_nothing_to_them() -> None:
    counters = compare(variant("se_small_cnn"), (1, 3, 32, 32))
    assert_explained(counters)
    for counter in counters.values():
        assert "SE squeeze by mean, not counted" in [difference.cause for difference in counter.differences]


def test_the_meta_device_gives_their_documented_totals() -> None:
    fvcore_nn, thop = pytest.importorskip("fvcore.nn"), _thop()
    model, image = small_network().eval(), torch.randn(2, 3, 6, 6)
    counters = compare(model, (2, 3, 6, 6))
    analysis = fvcore_nn.FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    assert counters["fvcore"].total == analysis.total()
    assert counters["thop"].total == thop.profile(model, (image,), verbose=False)[0]


def _thop() -> Any:
    with warnings.catch_warnings():
        # thop 0.1.1 imports distutils, deprecated in Python 3.11.
        warnings.simplefilter("ignore", DeprecationWarning)
        import thop
    return thop


def test_torch_counts_the_weight_gradient_of_a_depthwise_layer_64_times() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64))
    stem, depthwise = 3 * 64 * 56 * 56, 64 * 9 * 56 * 56
    counter = compare(network, (1, 3, 56, 56))["torch_backward"]
    assert counter.ours == 2 * (2 * stem + 3 * depthwise)
    assert counter.total == 2 * (2 * stem + 2 * depthwise + 64 * depthwise)
    assert counter.remainder == 0
    assert amounts(counter) == {"weight gradients of grouped convolutions, counted `groups` times": 2 * 63 * depthwise}


def test_a_frozen_grouped_layer_needs_no_explanation() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8).requires_grad_(False))
    counter = compare(network, (1, 3, 8, 8))["torch_backward"]
    assert counter.remainder == 0
    assert amounts(counter) == {}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.weight = nn.Parameter(torch.zeros(4, 3, 3, 3)), nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(F.conv2d(x, self.kernel, padding="same"), 1).flatten(1), self.weight)


SHARED = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "input_shape", "key", "expected"),
    [
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2),
            (1, 4, 5, 5),
            "thop",
            {"ConvTranspose2d, priced over its output instead of its input": 4 * 6 * 9 * (11 * 11 - 5 * 5)},
        ),
        (
            Functional(),
            (1, 3, 8, 8),
            "thop",
            {"linear in Functional, a type without a rule": -(3 * 4 * 9 * 64 + 4 * 5)},
        ),
        (
            Functional(),
            (1, 3, 8, 8),
            "fvcore",
            {
                "convolution whose padding is given by name, not counted": -3 * 4 * 9 * 64,
                "adaptive_avg_pool2d, 1 per element": 4 * 64,
            },
        ),
        (
            # Two parents: hooked twice, and what the hooks found is added twice.
            nn.Sequential(nn.Sequential(SHARED), nn.Sequential(SHARED)),
            (2, 8),
            "thop",
            {"Linear shared by several modules, counted 4 times": 3 * 2 * (2 * 8 * 8)},
        ),
        (nn.BatchNorm2d(4, affine=False), (1, 4, 5, 5), "fvcore", {"BatchNorm, 1 per element": 100}),
        (nn.BatchNorm2d(4, affine=False), (1, 4, 5, 5), "thop", {"BatchNorm2d, 2 per element": 200}),
        (nn.LayerNorm(5), (1, 4, 5), "fvcore", {"LayerNorm, 5 per element": 100}),
        (nn.GroupNorm(2, 4), (1, 4, 5), "fvcore", {"GroupNorm, 5 per element": 100}),
        (nn.InstanceNorm2d(4), (1, 4, 5, 5), "fvcore", {"InstanceNorm, 4 per element": 400}),
        (nn.AvgPool2d(2), (1, 4, 6, 6), "thop", {"AvgPool2d, 1 per element written": 36}),
        (nn.PReLU(), (1, 4, 5, 5), "thop", {"PReLU, by a rule of its own": 100}),
        (nn.Softmax(1), (3, 5), "thop", {"Softmax, by a rule of its own": 3 * (5 + 4 + 5)}),
        (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            (1, 2, 3, 3),
            "fvcore",
            {"upsample_bilinear2d, 4 per element": 4 * 72},
        ),
        (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            (1, 2, 3, 3),
            "thop",
            {"Upsample, by a rule of its own": 11 * 72},
        ),
        (nn.LSTM(4, 6, bias=False), (5, 2, 4), "fvcore", {"lstm, not counted": -5 * 2 * 4 * 6 * (4 + 6)}),
    ],
)
def test_their_quirks(model: nn.Module, input_shape: tuple[int, ...], key: str, expected: dict[str, int]) -> None:
    counter = compare(model, input_shape)[key]
    assert amounts(counter) == expected
    assert counter.remainder == 0


def test_an_attention_layer() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    counters = compare(Attention(), (2, 9, 16))
    assert_explained(counters)
    assert amounts(counters["fvcore"]) == {"attention's products, not counted": -2 * 2 * 9 * 9 * 16}


def test_the_model_stays_as_it_was_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    model = small_network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    keys = list(model.state_dict())
    values = [tensor.clone() for tensor in model.state_dict().values()]
    compare(model, (1, 3, 6, 6))
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))
    assert [module.training for module in model.modules()] == modes
    assert not any("total_ops" in module._buffers for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert capfd.readouterr() == ("", "")


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_counter_that_fails_says_so_in_one_line() -> None:
    counters = compare(Keywords(), {"x": torch.zeros(2, 3)})
    for key in ("fvcore", "thop"):
        counter = counters[key]
        assert (counter.total, counter.remainder, counter.ours) == (None, None, 30)
        assert "positional inputs only" in counter.error
        assert "\n" not in counter.error
    for key in ("torch", "torch_backward"):
        assert counters[key].error == ""
        assert counters[key].remainder == 0


@pytest.mark.parametrize(("counter", "module"), [(fvcore_counter, "fvcore.nn"), (thop_counter, "thop")])
def test_a_counter_that_cannot_be_imported(counter: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    model = nn.Linear(3, 5)
    result = counter(model, (2, 3), op_trace(model, (2, 3), details=True))
    assert result.total is None
    assert module in result.error


def test_a_model_that_fails_is_an_error_of_ours() -> None:
    with pytest.raises(ModelError):
        compare(nn.Linear(3, 5), (2, 4))


class Attending(nn.Module):
    """Attention as one operator, of maps that all need a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.project(x).chunk(3, -1))


def test_attention_and_recurrent_layers_in_one_operator_are_explained() -> None:
    assert_explained(compare(Attending(), (2, 4, 16, 8)))
    for layer in (nn.Bilinear(8, 7, 4), nn.Embedding(10, 4), nn.LSTM(8, 6)):
        example = {
            nn.Bilinear: (torch.zeros(3, 8), torch.zeros(3, 7)),
            nn.Embedding: (torch.zeros(3, dtype=torch.long),),
            nn.LSTM: (torch.zeros(5, 2, 8),),
        }[type(layer)]
        counters = compare(layer, example)
        for key in ("fvcore", "torch", "torch_backward"):
            assert (counters[key].error, counters[key].remainder) == ("", 0), (layer, key)


def test_a_view_in_place_leaves_no_remainder() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_explained(compare(network, (torch.zeros(1, 3, 4, 4).to(memory_format=layout),)))


def test_fused_attention_of_a_gpu_computes_its_scores_twice() -> None:
    traced = op_trace(Attending(), (2, 4, 16, 8), details=True)
    scores = 2 * 4 * 16 * 16
    (attention,) = (o for o in traced.operations if o.name == "attention")
    assert (attention.macs, attention.backward_macs) == (scores * 16, scores * 32)
    operator = "aten::_scaled_dot_product_efficient_attention"
    fused = msgspec.structs.replace(attention, operator=operator)
    on_gpu = replace(traced, operations=tuple(fused if o is attention else o for o in traced.operations))
    causes = amounts(torch_counter_backward(Attending(), (2, 4, 16, 8), on_gpu))
    assert causes == {"fused attention, whose backward pass computes the scores again": 2 * scores * 8}


class Positioned(nn.Module):
    """Attention with a learned bias: a fused operator takes it only where it needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias)


def test_attention_with_a_learned_bias_leaves_no_remainder() -> None:
    assert_explained(compare(Positioned(), (2, 4, 16, 8)))


class Steered(nn.Module):
    """Takes another way for inputs with a large mean; a pass without values cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4))
        self.se, self.head = SqueezeExcitation(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.features(x))
        out: Tensor = self.head(y.mean((2, 3)))
        return out if y.mean() < 5 else out @ out.t()


def test_nothing_remains_on_real_tensors() -> None:
    counters = compare(Steered(), (2, 3, 8, 8), on="cpu")
    assert_explained(counters)
    # Of two images: 36 and 16 positions with 8 filters of 27 and 18 weights, SE's and the head's layers.
    assert counters["torch"].ours == 4 * (36 * 8 * 27 + 16 * 8 * 18 + 2 * 8 * 4 + 8 * 2)
    with pytest.raises(ModelError, match="--on cpu"):
        compare(Steered(), (2, 3, 8, 8))


def test_real_and_fake_tensors_give_the_same() -> None:
    net = build(find("se_mobilenet_0_25")).model
    assert compare(net, (1, 3, 64, 64), on="cpu") == compare(net, (1, 3, 64, 64))


@pytest.mark.parametrize("on", ["fake", "cpu"])
def test_nothing_remains_for_a_layer_with_an_inserted_block(on: Any) -> None:
    net = Steered() if on == "cpu" else nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
    insert_se(net, "features.2" if on == "cpu" else "0", input_nchw=(2, 3, 8, 8), reduction=4, on=on)
    assert_explained(compare(net, (2, 3, 8, 8), on=on))
