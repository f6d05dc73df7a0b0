"""Operators of every kind: each number is arithmetic on paper, or what the definition of the operator reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.cost.count import count
from selab.cost.rules import RULES
from selab.records.types import Cost


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def cost_of(function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Cost:
    return count(Apply(function), tuple(torch.empty(shape) for shape in shapes), **options)


def indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------- unbatched inputs


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.MaxPool1d(2), (3, 8), 3 * 4 * 2),
        (nn.AvgPool1d(3, 1), (3, 8), 3 * 6 * 3),
        (nn.MaxPool2d(2), (3, 8, 8), 3 * 16 * 4),
        (nn.MaxPool2d((3, 2), 2, (1, 0)), (3, 8, 8), 3 * 16 * 6),
        (nn.MaxPool2d(3, 1, dilation=2), (2, 9, 9), 2 * 25 * 9),
        (nn.MaxPool2d(2, 2, ceil_mode=True), (2, 5, 5), 2 * 9 * 4),
        (nn.AvgPool2d(3, 1, 1), (3, 8, 8), 3 * 64 * 9),
        (nn.MaxPool3d(2), (3, 4, 4, 4), 3 * 8 * 8),
        (nn.MaxPool3d((1, 2, 2)), (3, 4, 4, 4), 3 * 16 * 4),
        (nn.AvgPool3d(2), (3, 4, 4, 4), 3 * 8 * 8),
        (nn.AdaptiveAvgPool1d(2), (3, 8), 3 * 8),
        (nn.AdaptiveAvgPool2d(2), (3, 8, 8), 3 * 64),
        (nn.AdaptiveMaxPool2d(1), (3, 8, 8), 3 * 64),
        (nn.AdaptiveAvgPool3d(1), (3, 4, 4, 4), 3 * 64),
        (nn.AdaptiveMaxPool3d(2), (3, 4, 4, 4), 3 * 64),
        (nn.FractionalMaxPool2d(2, output_size=3), (3, 8, 8), 3 * 9 * 4),
        (nn.FractionalMaxPool3d(2, output_size=3), (3, 8, 8, 8), 3 * 27 * 8),
    ],
)
def test_one_image_costs_what_a_batch_of_one_costs(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count(module, torch.empty(1, *shape)).macs.all == count(module, torch.empty(shape)).macs.all
    cost = count(module, torch.empty(shape))
    # Fractional pooling draws one random number per channel and dimension.
    drawn = cost.by_operator["random"].macs if "random" in cost.by_operator else 0
    assert cost.macs.all - drawn == macs
    assert cost.unknown == {}


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(3, 4, 5), (3, 20), 3 * 4 * 5 * 16),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 8, 8), 3 * 8 * 9 * 64),
        (nn.Conv2d(8, 8, 3, padding="same", groups=8), (8, 7, 7), 8 * 9 * 49),
        (nn.Conv3d(3, 4, 3), (3, 5, 5, 5), 3 * 4 * 27 * 27),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), (6, 5, 5), 6 * 2 * 4 * 25),
    ],
)
def test_convolutions_of_one_image(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count(module, torch.empty(shape)).macs.all == macs


def test_norm_pooling_raises_averages_and_takes_the_root() -> None:
    # Per element a power; per window an average (one per element), sign, modulus, product, ReLU of it, scale, power.
    cost = cost_of(lambda x: F.lp_pool2d(x, 2.0, 2), (3, 8, 8))
    assert cost.by_operator["avg_pool"].macs == 3 * 16 * 4
    assert cost.unknown == {}


# ------------------------------------------------------------------------------------------------------- interpolation


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4, 4)])
def test_nearest_neighbours_move_data_only(mode: str, shape: tuple[int, ...]) -> None:
    grown = cost_of(lambda x: F.interpolate(x, scale_factor=2, mode=mode), shape)
    elements, dims = torch.Size(shape).numel(), len(shape) - 2
    assert (grown.macs.all, grown.unknown) == (0, {})
    assert grown.bytes == 4 * elements * (1 + 2**dims)
    shrunk = cost_of(lambda x: F.interpolate(x, scale_factor=0.5, mode=mode), shape)
    assert shrunk.bytes == 4 * 2 * elements // 2**dims


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "options",
    [
        {"size": (3, 5)},
        {"size": (13, 6)},
        {"scale_factor": 0.4},
        {"scale_factor": (1.5, 0.3)},
        {"size": (4, 1), "align_corners": True},
    ],
)
def test_an_antialiased_interpolation_reads_what_its_filter_reaches(mode: str, options: dict[str, Any]) -> None:
    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, mode=mode, antialias=True, **options)

    # An output is made of the inputs that are not zero times it; taps with a weight of exactly zero are read as well.
    x = torch.zeros(1, 1, 11, 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(resized, x)
    made_of = int((jacobian != 0).sum())
    found = cost_of(resized, (1, 1, 11, 12)).macs.all
    assert made_of <= found <= made_of * 1.6
    assert cost_of(resized, (2, 3, 11, 12)).macs.all == 6 * found


def test_the_windows_of_a_halved_map() -> None:
    # Step 2, half width 2 * 2: around 1, 3 and 5 of 6 inputs, cut off at the borders: 5, 6 and 5.
    halved = cost_of(lambda x: F.interpolate(x, 3, mode="bicubic", antialias=True), (8, 3, 6, 6))
    assert halved.macs.all == 8 * 3 * 16**2
    assert halved.unknown == {}


@pytest.mark.parametrize(("mode", "neighbours"), [("bilinear", 4), ("nearest", 0), ("bicubic", 16)])
def test_sampling_on_a_grid(mode: str, neighbours: int) -> None:
    cost = cost_of(lambda x, g: F.grid_sample(x, g, mode=mode, align_corners=False), (2, 3, 50, 50), (2, 4, 5, 2))
    assert cost.macs.all == neighbours * 2 * 3 * 20
    # Few places of a large map are read.
    assert cost.bytes == 4 * (max(1, neighbours) * 120 + 2 * 20 * 2 + 120)


def test_sampling_a_volume() -> None:
    cost = cost_of(lambda x, g: F.grid_sample(x, g, align_corners=False), (1, 3, 4, 4, 4), (1, 2, 2, 2, 3))
    assert cost.macs.all == 8 * 3 * 8
    assert cost.bytes == 4 * (3 * 64 + 8 * 3 + 24)


def test_a_grid_is_a_product_with_the_matrix() -> None:
    assert cost_of(lambda t: F.affine_grid(t, [2, 3, 4, 5], align_corners=False), (2, 2, 3)).macs.all == 2 * 20 * 2 * 3


# ---------------------------------------------------------------------------------------------------- gathers, scatters


TABLE, WIDTH = 5000, 64


@pytest.mark.parametrize(
    "function",
    [
        lambda t, i: F.embedding(i, t),
        lambda t, i: t[i],
        lambda t, i: t.index_select(0, i),
        lambda t, i: t.gather(0, i[:, None].expand(16, WIDTH)),
    ],
)
def test_a_gather_reads_the_rows_that_it_returns(function: Callable[..., Any]) -> None:
    cost = count(Apply(function), (torch.empty(TABLE, WIDTH), indices(16)))
    assert cost.bytes == 4 * 2 * 16 * WIDTH + 8 * 16
    assert (cost.macs.all, cost.unknown) == (0, {})


def test_no_more_rows_than_the_table_has() -> None:
    cost = count(nn.Embedding(10, WIDTH), indices(1000))
    assert cost.bytes == 4 * (10 * WIDTH + 1000 * WIDTH) + 8 * 1000


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_adds_the_rows_that_it_reads(mode: str) -> None:
    cost = count(nn.EmbeddingBag(TABLE, WIDTH, mode=mode), indices(4, 3))
    assert cost.by_operator["embedding_bag"].macs == 4 * 3 * WIDTH
    # Twelve rows, twelve indices, four offsets, four sums.
    assert cost.by_operator["embedding_bag"].bytes == 4 * 12 * WIDTH + 8 * (12 + 4) + 4 * 4 * WIDTH
    assert cost.unknown == {}


def test_a_scatter_writes_what_it_is_given() -> None:
    def added(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return x.index_add_(0, i, y)

    def put(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        x[i] = y
        return x

    example = (torch.empty(TABLE, WIDTH), indices(16), torch.empty(16, WIDTH))
    cost = count(Apply(added), example)
    assert cost.macs.all == 16 * WIDTH
    assert cost.bytes == 4 * 3 * 16 * WIDTH + 8 * 16
    cost = count(Apply(put), example)
    assert cost.macs.all == 0
    assert cost.bytes == 4 * 2 * 16 * WIDTH + 8 * 16


def test_a_copy_into_a_map_does_not_read_what_it_overwrites() -> None:
    def halves(x: Tensor, y: Tensor) -> Tensor:
        made = torch.empty_like(x)
        made[:, :2] = y
        made[:, 2:].zero_()
        return made

    assert cost_of(halves, (1, 4, 10, 10), (1, 2, 10, 10)).bytes == 4 * (200 + 200 + 200)
    assert cost_of(torch.zeros_like, (1, 4, 10, 10)).bytes == 4 * 400


def test_windows_that_overlap_are_added_when_they_are_folded() -> None:
    columns = 2 * 9 * 36
    assert cost_of(lambda x: F.unfold(x, 3), (1, 2, 8, 8)).macs.all == 0
    assert cost_of(lambda x: F.fold(x, 8, 3), (1, 2 * 9, 36)).macs.all == columns


def test_unpooling_moves_data() -> None:
    cost = cost_of(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (1, 8, 8, 8))
    assert (cost.macs.all, cost.unknown) == (8 * 64, {})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_view_in_place_is_free(layout: torch.memory_format) -> None:
    x = torch.zeros(1, 8, 4, 4).to(memory_format=layout)
    cost = count(nn.AdaptiveAvgPool2d(1), x)
    assert (cost.macs.all, cost.bytes, cost.unknown) == (128, 4 * (128 + 8), {})
    assert cost_of(lambda x: (x + 1).as_strided_((4, 2), (2, 1)).unsqueeze_(0).squeeze_(0).t_(), (8,)).unknown == {}


# ----------------------------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.addbmm, [(2, 4), (5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (torch.baddbmm, [(5, 2, 4), (5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (torch.addmv, [(2,), (2, 3), (3,)], 2 * 3),
        (torch.addmm, [(2, 4), (2, 3), (3, 4)], 2 * 3 * 4),
        (torch.addr, [(2, 3), (2,), (3,)], 2 * 3),
        (torch.dot, [(7,), (7,)], 7),
        (torch.vdot, [(7,), (7,)], 7),
        (torch.inner, [(2, 7), (3, 7)], 2 * 3 * 7),
        (lambda a, b: torch.tensordot(a, b, dims=2), [(5, 3, 4), (3, 4, 6)], 5 * 12 * 6),
        (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(2, 9), (9, 3), (3, 8)], 2 * 9 * 3 + 2 * 3 * 8),
        (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), [(2, 3, 5, 8), (2, 3, 6, 8)], 2 * 3 * 5 * 6 * 8),
        (lambda a, b: torch.conv_tbc(a, b, torch.empty(6), 1), [(10, 2, 4), (3, 4, 6)], 10 * 2 * 6 * 3 * 4),
        # x W costs a product per weight, and the second factor one per column.
        (F.bilinear, [(2, 8), (2, 7), (4, 8, 7)], 2 * 4 * 8 * 7 + 2 * 4 * 7),
        (F.bilinear, [(5, 2, 8), (5, 2, 7), (4, 8, 7)], 10 * 4 * 8 * 7 + 10 * 4 * 7),
        # Two columns more hold the squares.
        (torch.cdist, [(30, 4), (40, 4)], 30 * 40 * 6),
    ],
)
def test_products_of_every_form(function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int) -> None:
    cost = cost_of(function, *shapes)
    assert cost.macs.conv_linear == macs
    assert cost.unknown == {}


def test_distances_of_few_points_are_arithmetic() -> None:
    assert cost_of(lambda a, b: torch.cdist(a, b, p=1.0), (3, 4), (5, 4)).macs == (
        type(count(nn.Identity(), (1,)).macs)(conv_linear=0, paper=0, all=15 * (2 * 4 + 1))
    )


class Attend(nn.Module):
    """Scaled dot-product attention as one operator of a device, or in steps, of maps that need gradients."""

    def __init__(self, operator: str, *, learned: str = "") -> None:
        super().__init__()
        self.operator = operator
        self.scales = nn.ParameterDict({name: torch.ones(()) for name in learned})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        given = dict(zip("qkv", (q, k, v), strict=True))
        maps = [x * self.scales[name] if name in self.scales else x for name, x in given.items()]
        match self.operator:
            case "steps":
                return (maps[0] @ maps[1].mT).softmax(-1) @ maps[2]
            case "cpu":
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*maps)[0]
            case "flash":
                return torch.ops.aten._scaled_dot_product_flash_attention(*maps)[0]
            case "efficient":
                return torch.ops.aten._scaled_dot_product_efficient_attention(*maps, None, False)[0]
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*maps, None, False)[0]


SCORES = 2 * 3 * 16 * 24


@pytest.mark.parametrize("learned", ["", "q", "k", "v", "qk", "qkv"])
@pytest.mark.parametrize("operator", ["cpu", "flash", "efficient"])
def test_attention_has_one_price_on_every_device(operator: str, learned: str) -> None:
    example = (torch.empty(2, 3, 16, 8), torch.empty(2, 3, 24, 8), torch.empty(2, 3, 24, 8))
    fused, steps = (count(Attend(name, learned=learned), example) for name in (operator, "steps"))
    assert fused.macs.conv_linear == SCORES * 16
    assert fused.macs == steps.macs
    assert fused.macs_backward == steps.macs_backward
    assert fused.unknown == {}


def test_attention_with_groups_of_queries_and_wider_values() -> None:
    rule = RULES["aten::_scaled_dot_product_efficient_attention"]
    query, key, value = torch.empty(2, 6, 16, 8), torch.empty(2, 3, 24, 8), torch.empty(2, 3, 24, 10)
    assert rule.work((query, key, value, None, False), torch.empty(2, 6, 16, 10)) == (
        2 * 6 * 16 * 24 * 18,
        3 * 2 * 6 * 16 * 24,
        3 * 2 * 6 * 16 * 24,
    )
    rows_first = RULES["aten::_flash_attention_forward"]
    query, key = torch.empty(2, 16, 6, 8), torch.empty(2, 24, 3, 8)
    assert rows_first.work((query, key, key), query).macs == 2 * 6 * 16 * 24 * 16


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.zeros(16, 16)}])
def test_a_mask_skips_nothing(options: dict[str, Any]) -> None:
    def attend(x: Tensor) -> Tensor:
        mask = {name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in options.items()}
        return F.scaled_dot_product_attention(x, x, x, **mask)

    cost = cost_of(attend, (1, 2, 16, 8))
    assert cost.macs.conv_linear == 2 * 2 * 16 * 16 * 8
    assert cost.unknown == {}


def test_the_fast_path_of_an_encoder_costs_what_the_slow_one_does() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    slow = count(layer, (2, 5, 16))
    rule = RULES["aten::_transformer_encoder_layer_fwd"]
    attention, first, second = layer.self_attn, layer.linear1, layer.linear2
    x = torch.empty(2, 5, 16)
    args = [
        x,
        16,
        2,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
    ]
    args += [False, False, 1e-5, *layer.norm1.parameters(), *layer.norm2.parameters()]
    args += [*first.parameters(), *second.parameters()]
    work = rule.work(args, x)
    tokens, scores = 10, 2 * 2 * 5 * 5
    assert work.macs == slow.macs.conv_linear == tokens * (4 * 16 * 16 + 2 * 16 * 32) + 2 * scores * 8
    assert work.other == 3 * scores + tokens * (32 + 2 * 3 * 16 + 2 * 16)
    native = RULES["aten::_native_multi_head_attention"].work([x, x, x, 16, 2, *args[3:7]], x)
    assert native.macs == tokens * 4 * 16 * 16 + 2 * scores * 8


# ---------------------------------------------------------------------------------------------------- recurrent layers


@pytest.mark.parametrize(
    ("module", "gates", "cell"), [(nn.RNN, 1, 2), (nn.GRU, 3, 10), (nn.LSTM, 4, 13)], ids=["rnn", "gru", "lstm"]
)
def test_recurrent_layers_cost_their_gates_and_their_cell(module: type[nn.Module], gates: int, cell: int) -> None:
    cost = count(module(8, 16), (5, 2, 8))
    assert cost.macs.conv_linear == 5 * 2 * gates * 16 * (8 + 16)
    assert cost.macs.all - cost.macs.conv_linear == 5 * 2 * cell * 16
    # No gradient for the input and for the first state.
    weights, states = 5 * 2 * gates * 16 * (8 + 16), 4 * 2 * gates * 16 * 16
    assert cost.macs_backward.conv_linear == weights + states
    assert cost.unknown == {}


def test_the_same_layers_of_cudnn() -> None:
    x, hidden = torch.empty(5, 2, 8), torch.empty(2, 2, 16)
    layer = nn.LSTM(8, 16, bidirectional=True)
    weights = list(layer.parameters())
    args = (x, weights, 4, torch.empty(9), hidden, hidden, 2, 16, 0, 1, False, 0.0, False, True, [], None)
    rule, out = RULES["aten::_cudnn_rnn"], torch.empty(5, 2, 32)
    macs = 2 * 5 * 2 * 4 * 16 * (8 + 16)
    assert rule.work(args, out) == (macs, 2 * 5 * 2 * 13 * 16, 2 * 5 * 2 * 13 * 16)
    assert rule.traffic is not None
    moved = sum(elements for _, elements in rule.traffic(args, out))
    assert moved == x.numel() + sum(w.numel() for w in weights) + 2 * hidden.numel() + out.numel()
    stacked = (x, weights, 4, hidden, hidden, 2, 16, 1, False, 0.0, False, True, [], None)
    assert RULES["aten::miopen_rnn"].work(stacked, out).macs == macs


# -------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: x.topk(2).values, 512),
        (lambda x: x.kthvalue(3).values, 512),
        (lambda x: x.median(), 512),
        (lambda x: x.sort(1).values, 512 * 3),
        (lambda x: x.argsort(-1), 512 * 3),
        (lambda x: x.flatten().sort().values, 512 * 9),
        (lambda x: x.histc(10), 512),
        (lambda x: x.cumsum(1), 512),
        (lambda x: x.cumprod(1), 512),
        (lambda x: x.cummax(1).values, 512),
        (lambda x: x.logcumsumexp(1), 3 * 512),
        (lambda x: x // 2, 512),
        (lambda x: x.floor_divide_(2), 512),
        (lambda x: x.floor(), 512),
        (lambda x: x.tan(), 512),
        (lambda x: x.aminmax()[0], 2 * 512),
        (lambda x: torch.randn_like(x), 512),
        (lambda x: torch.randn(4, device=x.device), 4),
        (lambda x: torch.randint(3, (4,), device=x.device), 4),
        (lambda x: torch.arange(4, device=x.device), 0),
        (lambda x: torch.tril_indices(4, 4, device=x.device), 0),
        (lambda x: torch.eye(4, device=x.device), 0),
        (lambda x: torch.scalar_tensor(2.0, device=x.device), 0),
        (lambda x: F.mse_loss(x, x), 3 * 512),
        (lambda x: F.mse_loss(x, x, reduction="none"), 2 * 512),
        (lambda x: F.smooth_l1_loss(x, x), 4 * 512),
        (lambda x: F.binary_cross_entropy(x, x), 5 * 512),
        # A row of eight values: its log-softmax, then one element per row.
        (lambda x: F.nll_loss(x.flatten(0, 2), torch.zeros(64, dtype=torch.long, device=x.device)), 64),
        (lambda x: F.rms_norm(x, (8,)), (1 + 1 + 1) * 512 + 2 * 64),
    ],
)
def test_what_an_operator_costs(function: Callable[..., Any], macs: int) -> None:
    cost = cost_of(function, (1, 8, 8, 8))
    assert (cost.macs.conv_linear, cost.macs.all, cost.unknown) == (0, macs, {})


def test_a_search_halves_the_sequence() -> None:
    assert cost_of(torch.bucketize, (10,), (7,)).macs.all == 10 * 3
    assert cost_of(torch.searchsorted, (8,), (10,)).macs.all == 10 * 4


def test_classes_as_vectors() -> None:
    cost = count(Apply(lambda i: F.one_hot(i, 10)), indices(6))
    assert cost.unknown == {}


def test_alignment_of_a_sequence() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(x, y, (12, 12), (3, 4))

    cost = count(Apply(loss), (torch.empty(12, 2, 5), torch.zeros(2, 4, dtype=torch.long)))
    assert cost.by_operator["loss"].macs == 12 * (2 * (3 + 4) + 2) * 10
    assert cost.unknown == {}


def test_a_step_function_passes_no_gradient_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).floor()

    assert count(Net(), (1, 3, 4, 4)).macs_backward.all == 48


def test_a_tensor_without_dimensions() -> None:
    assert cost_of(lambda x: x.sum() + x.mean() + x.amax(), ()).macs.all == 5


def test_a_classifier_with_its_loss_in_one_operator() -> None:
    rule = RULES["torch_nn::_linear_cross_entropy_batch_chunked"]
    x, weight = torch.empty(6, 8), torch.empty(10, 8)
    assert rule.work((x, weight, indices(6)), torch.empty(())) == (6 * 8 * 10, 3 * 60 + 6, 3 * 60 + 6)


def test_a_gradient_that_the_forward_pass_takes() -> None:
    class Forces(nn.Module):
        """The gradient of an energy with respect to the positions."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 8, 1), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            energy = self.linear(self.conv(x).tanh().mT).sum()
            return torch.autograd.grad(energy, x)[0]

    cost = count(Forces(), (2, 3, 10))
    # Twenty positions: both layers, and the gradient of each with respect to what it reads.
    assert cost.macs.conv_linear == 20 * (3 * 8 + 8) * 2
    assert cost.unknown == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_layer_reads_one_byte_per_weight() -> None:
    network = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), dtype=torch.qint8)
    cost = count(network, (3, 8))
    assert (cost.macs.conv_linear, cost.unknown) == (3 * 8 * 4, {})
    assert cost.by_operator["linear"].bytes == 4 * (3 * 8 + 3 * 4) + 8 * 4


@pytest.mark.parametrize("masked", [False, True])
def test_a_deformable_convolution_samples_and_multiplies(masked: bool) -> None:
    rule = RULES["torchvision::deform_conv2d"]
    x, weight, out = torch.empty(2, 8, 9, 9), torch.empty(6, 4, 3, 3), torch.empty(2, 6, 7, 7)
    offset, mask = torch.empty(2, 18, 7, 7), torch.empty(2, 9, 7, 7)
    args = [x, weight, offset, mask, torch.empty(6), 1, 1, 0, 0, 1, 1, 2, 1, masked]
    macs, sampled = 2 * 49 * 6 * 4 * 9, 2 * 49 * 8 * 9 * (5 if masked else 4)
    work = rule.work(args, out)
    assert work == (macs, sampled, sampled)
    assert rule.backward is not None
    needs_all = rule.backward(args, out, work, lambda _: True)
    assert needs_all == (2 * macs, (3 if masked else 2) * sampled, (3 if masked else 2) * sampled)
    assert rule.backward(args, out, work, lambda one: one is weight) == (macs, 0, 0)


def test_regions_without_a_sampling_ratio_are_unknown() -> None:
    rule, x, out = RULES["torchvision::roi_align"], torch.empty(1, 4, 9, 9), torch.empty(3, 4, 7, 7)
    assert rule.work([x, torch.empty(3, 5), 1.0, 7, 7, 2, True], out) == (0, 16 * out.numel(), 16 * out.numel())
    assert rule.work([x, torch.empty(3, 5), 1.0, 7, 7, -1, True], out) is None
