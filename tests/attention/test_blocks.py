import math

import pytest
import torch
from torch import nn

from selab.attention.base import Attention
from selab.attention.blocks import CBAM, ECA, ESE, SCSE, SSE, CoordinateAttention, GatherExcite
from selab.attention.ela import ELA
from selab.attention.gather_excite import GETheta, GEThetaPlus
from selab.attention.global_context import GlobalContext
from selab.attention.grn import GRN
from selab.attention.selective_kernel import SelectiveKernel
from selab.attention.simam import SimAM
from selab.attention.triplet import TripletAttention
from selab.cost.count import count
from selab.errors import InsertionError

LEARNING = [
    *(ECA, CBAM, CoordinateAttention, SCSE, SSE, ESE),
    *(GRN, GlobalContext, TripletAttention, ELA, GETheta, GEThetaPlus),
]
C, H, W = 32, 7, 5


def drawn(block):
    """The block with every parameter and statistic drawn at random, so that none of them can hide; in float64."""
    block.double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in block.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return block


# The formulas once more, in plain arithmetic. `top` is what a gate can reach: 1, or 2 where it was doubled.


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def affine(x, layer):
    """A fully connected layer at every place of (N, C, …)."""
    weight = layer.weight.reshape(layer.weight.shape[0], -1)
    bias = layer.bias.reshape(-1, *(1,) * (x.dim() - 2))
    return torch.einsum("oc,nc...->no...", weight, x) + bias


def normalised(x, bn):
    mean, var, scale, shift = (v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def mean(x, *dims):
    return x.sum(dims) / math.prod(x.shape[d] for d in dims)


def eca(block, x, top):
    (taps,) = block.conv.weight[0].tolist()
    squeezed = mean(x, 2, 3)
    mixed = torch.zeros_like(squeezed)
    for channel in range(C):
        for tap, weight in enumerate(taps):
            neighbour = channel + tap - len(taps) // 2
            if 0 <= neighbour < C:
                mixed[:, channel] += weight * squeezed[:, neighbour]
    return x * top * sigmoid(mixed)[:, :, None, None]


def cbam(block, x, top):
    largest = x.flatten(2).sort(2).values[:, :, -1]
    mlp = [affine(affine(v, block.fc1).clamp(min=0), block.fc2) for v in (mean(x, 2, 3), largest)]
    y = x * top * sigmoid(mlp[0] + mlp[1])[:, :, None, None]
    planes = torch.stack((y.sort(1).values[:, -1], mean(y, 1)), 1)
    size = block.conv.weight.shape[-1]
    reach = size // 2
    padded = torch.zeros(x.shape[0], 2, H + 2 * reach, W + 2 * reach, dtype=x.dtype)
    padded[:, :, reach : reach + H, reach : reach + W] = planes
    mixed = sum(
        (padded[:, :, i : i + H, j : j + W] * block.conv.weight[0, :, i, j, None, None]).sum(1, keepdim=True)
        for i in range(size)
        for j in range(size)
    )
    return y * top * sigmoid(normalised(mixed, block.bn))


def coordinate(block, x, top):
    def hidden(lines):
        z = normalised(affine(lines, block.conv1), block.bn1)
        return z * (z + 3).clamp(0, 6) / 6

    rows = top * sigmoid(affine(hidden(mean(x, 3)[..., None]), block.conv_h))
    columns = top * sigmoid(affine(hidden(mean(x, 2)[:, :, None]), block.conv_w))
    assert rows.shape[2:] == (H, 1)
    assert columns.shape[2:] == (1, W)
    return x * rows * columns


def scse(block, x, _top):
    channel = sigmoid(affine(affine(mean(x, 2, 3), block.fc1).clamp(min=0), block.fc2))
    return x * channel[:, :, None, None] + x * sigmoid(affine(x, block.conv))


def sse(block, x, top):
    return x * top * sigmoid(affine(x, block.conv))


def ese(block, x, top):
    return x * top * ((affine(mean(x, 2, 3), block.fc) + 3).clamp(0, 6) / 6)[:, :, None, None]


def grn(block, x, _top):
    norms = (x**2).sum((2, 3), keepdim=True).sqrt()
    share = norms / (norms.sum(1, keepdim=True) / C + 1e-6)
    return block.weight[:, None, None] * (x * share) + block.bias[:, None, None] + x


def simam(block, x, _top):
    squares = (x - mean(x, 2, 3)[:, :, None, None]) ** 2
    variance = squares.sum((2, 3), keepdim=True) / (H * W - 1)
    return x * sigmoid(squares / (4 * (variance + block.e_lambda)) + 0.5)


def global_context(block, x, _top):
    logits = affine(x, block.conv).flatten(2)
    weights = torch.exp(logits - logits.amax())
    context = (x.flatten(2) * weights).sum(2) / weights.sum(2)
    hidden = affine(context, block.fc1)
    centred = hidden - mean(hidden, 1)[:, None]
    scaled = centred / (mean(centred**2, 1)[:, None] + 1e-5).sqrt()
    hidden = (scaled * block.norm.weight + block.norm.bias).clamp(min=0)
    return x + affine(hidden, block.fc2)[:, :, None, None]


def triplet(block, x, top):
    total = torch.zeros_like(x)
    for plane, place in ((block.over_height, 2), (block.over_width, 3), (block.over_channels, 1)):
        planes = torch.stack((x.sort(place).values.select(place, -1), mean(x, place)), 1)
        size = plane.conv.weight.shape[-1]
        reach = size // 2
        high, wide = planes.shape[2:]
        padded = torch.zeros(*planes.shape[:2], high + 2 * reach, wide + 2 * reach, dtype=x.dtype)
        padded[:, :, reach : reach + high, reach : reach + wide] = planes
        mixed = sum(
            (padded[:, :, i : i + high, j : j + wide] * plane.conv.weight[0, :, i, j, None, None]).sum(1)
            for i in range(size)
            for j in range(size)
        )
        gate = top * sigmoid(normalised(mixed[:, None], plane.bn))[:, 0]
        total += x * gate.unsqueeze(place)
    return total / 3


def ela(block, x, top):
    def gate(lines):
        size = block.conv.weight.shape[-1]
        reach, long = size // 2, lines.shape[2]
        padded = torch.zeros(*lines.shape[:2], long + 2 * reach, dtype=x.dtype)
        padded[:, :, reach : reach + long] = lines
        mixed = sum(padded[:, :, i : i + long] * block.conv.weight[:, 0, i, None] for i in range(size))
        grouped = mixed.reshape(len(x), 16, -1)
        centred = grouped - mean(grouped, 2)[..., None]
        scaled = (centred / (mean(centred**2, 2)[..., None] + 1e-5).sqrt()).reshape(mixed.shape)
        return top * sigmoid(scaled * block.norm.weight[:, None] + block.norm.bias[:, None])

    return x * gate(mean(x, 3))[:, :, :, None] * gate(mean(x, 2))[:, :, None]


def gathered(x, layers):
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            high, wide = x.shape[2:]
            padded = torch.zeros(*x.shape[:2], high + 2, wide + 2, dtype=x.dtype)
            padded[:, :, 1:-1, 1:-1] = x
            x = sum(
                padded[:, :, i : i + high : 2, j : j + wide : 2] * layer.weight[:, 0, i, j, None, None]
                for i in range(3)
                for j in range(3)
            )
        else:
            x = normalised(x, layer) if isinstance(layer, nn.BatchNorm2d) else x.clamp(min=0)
    return x


def nearest(gate):
    """A position takes the gate of the nearest gathered one."""
    rows, columns = gate.shape[2:]
    return gate[:, :, [i * rows // H for i in range(H)]][:, :, :, [j * columns // W for j in range(W)]]


def ge_theta(block, x, top):
    return x * nearest(top * sigmoid(gathered(x, block.gather)))


def ge_theta_plus(block, x, top):
    hidden = affine(gathered(x, block.gather).clamp(min=0), block.fc1).clamp(min=0)
    return x * nearest(top * sigmoid(affine(hidden, block.fc2)))


def selective_kernel(block, x):
    outputs = []
    for reach, branch in enumerate(block.branches, 1):
        conv, bn, _ = branch
        padded = torch.zeros(*x.shape[:2], H + 2 * reach, W + 2 * reach, dtype=x.dtype)
        padded[:, :, reach : reach + H, reach : reach + W] = x
        each = conv.weight.shape[1]
        mixed = torch.zeros_like(x)
        for channel in range(C):
            first = channel // each * each
            for i in range(3):
                for j in range(3):
                    seen = padded[:, first : first + each, i * reach : i * reach + H, j * reach : j * reach + W]
                    mixed[:, channel] += (seen * conv.weight[channel, :, i, j, None, None]).sum(1)
        outputs.append(normalised(mixed, bn).clamp(min=0))
    squeezed = mean(sum(outputs), 2, 3) @ block.fc1.weight.T
    scale, shift = block.bn.weight, block.bn.bias
    hidden = (squeezed - block.bn.running_mean) / (block.bn.running_var + 1e-5).sqrt() * scale + shift
    logits = hidden.clamp(min=0) @ block.fc2.weight.T
    exps = [torch.exp(logits[:, n * C : (n + 1) * C]) for n in range(len(outputs))]
    return sum(map_ * (exp / sum(exps))[:, :, None, None] for map_, exp in zip(outputs, exps, strict=True))


FORMULAS = [
    (ECA, {}, eca),
    (ECA, {"kernel_size": 9}, eca),
    (CBAM, {}, cbam),
    (CBAM, {"reduction": 4, "kernel_size": 3}, cbam),
    (CoordinateAttention, {}, coordinate),
    (CoordinateAttention, {"reduction": 2}, coordinate),
    (SCSE, {}, scse),
    (SCSE, {"reduction": 8}, scse),
    (SSE, {}, sse),
    (ESE, {}, ese),
    (GRN, {}, grn),
    (GlobalContext, {}, global_context),
    (GlobalContext, {"reduction": 4}, global_context),
    (TripletAttention, {}, triplet),
    (TripletAttention, {"kernel_size": 3}, triplet),
    (ELA, {}, ela),
    (ELA, {"kernel_size": 5}, ela),
    (GETheta, {}, ge_theta),
    (GETheta, {"extent": 2}, ge_theta),
    (GEThetaPlus, {}, ge_theta_plus),
    (GEThetaPlus, {"extent": 4, "reduction": 4}, ge_theta_plus),
]


@pytest.mark.parametrize(("init", "top"), [("he", 1), ("identity", 2)])
@pytest.mark.parametrize(("kind", "arguments", "formula"), FORMULAS)
def test_the_block_is_its_formula(kind, arguments, formula, init, top):
    torch.manual_seed(0)
    block = drawn(kind(C, **arguments, init=init))
    x = torch.randn(3, C, H, W, dtype=torch.float64)
    torch.testing.assert_close(block(x), formula(block, x, top), rtol=1e-12, atol=1e-12)


def test_gather_excite_gathers_the_whole_map():
    x = torch.randn(3, C, H, W, dtype=torch.float64)
    torch.testing.assert_close(GatherExcite(C)(x), x * sigmoid(mean(x, 2, 3))[:, :, None, None])


@pytest.mark.parametrize("extent", [1, 2, 4, 8])
def test_gather_excite_gathers_windows(extent):
    """Windows reach extent - 1 positions from every extent-th one; a position takes the nearest one's gate."""
    x = torch.randn(3, C, H, W, dtype=torch.float64)
    rows, columns = math.ceil(H / extent), math.ceil(W / extent)
    expected = torch.empty_like(x)
    for i in range(H):
        for j in range(W):
            top, left = (i * rows // H) * extent, (j * columns // W) * extent
            window = x[:, :, max(0, top - extent + 1) : top + extent, max(0, left - extent + 1) : left + extent]
            expected[:, :, i, j] = x[:, :, i, j] * sigmoid(mean(window, 2, 3))
    torch.testing.assert_close(GatherExcite(C, extent=extent)(x), expected)


# Eq. 12 of arXiv 1910.03151 with gamma 2, b 1: (log2(256) + 1) / 2 = 4.5, of which the odd number is 5.
@pytest.mark.parametrize(
    ("channels", "expected"), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7), (96, 3), (320, 5)]
)
def test_eca_adapts_its_size(channels, expected):
    assert [tuple(p.shape) for p in ECA(channels).parameters()] == [(1, 1, expected)]


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (ECA, {}, 5),
        (ECA, {"kernel_size": 3}, 3),
        # mlp 256 → 16 → 256 with biases; 2 planes under 7x7; scale and shift
        (CBAM, {}, 256 * 16 + 16 + 16 * 256 + 256 + 2 * 7 * 7 + 2),
        (CBAM, {"reduction": 8, "kernel_size": 3}, 256 * 32 + 32 + 32 * 256 + 256 + 2 * 3 * 3 + 2),
        # 256 / 32 = 8: one layer in, its norm, two layers out
        (CoordinateAttention, {}, 256 * 8 + 8 + 2 * 8 + 2 * (8 * 256 + 256)),
        (CoordinateAttention, {"reduction": 64}, 256 * 8 + 8 + 2 * 8 + 2 * (8 * 256 + 256)),
        (CoordinateAttention, {"reduction": 8}, 256 * 32 + 32 + 2 * 32 + 2 * (32 * 256 + 256)),
        (SCSE, {}, 256 * 128 + 128 + 128 * 256 + 256 + 256 + 1),
        (SSE, {}, 256 + 1),
        (GatherExcite, {}, 0),
        (GatherExcite, {"extent": 4}, 0),
        (ESE, {}, 256 * 256 + 256),
        (GRN, {}, 2 * 256),
        (SimAM, {}, 0),
        # a convolution to one channel, two layers, a norm between them
        (GlobalContext, {}, 256 + 1 + 256 * 16 + 16 + 2 * 16 + 16 * 256 + 256),
        # three times 2 planes under 7x7, scale and shift: the paper's 300 per block
        (TripletAttention, {}, 300),
        # 7 taps, scale and shift per channel
        (ELA, {}, 256 * (7 + 2)),
        # three times 9 taps, scale and shift per channel
        (GETheta, {}, 3 * 256 * (9 + 2)),
        (GETheta, {"extent": 2}, 256 * (9 + 2)),
        # and two layers with biases
        (GEThetaPlus, {}, 3 * 256 * (9 + 2) + 256 * 16 + 16 + 16 * 256 + 256),
        (GEThetaPlus, {"extent": 4, "reduction": 8}, 2 * 256 * (9 + 2) + 256 * 32 + 32 + 32 * 256 + 256),
        # two convolutions of 8 channels per group, their norms; 256 → 32 → 2 * 256 and the norm between
        (SelectiveKernel, {}, 2 * (9 * 8 * 256 + 2 * 256) + 256 * 32 + 2 * 32 + 32 * 2 * 256),
        # 256 / 4 = 64; gcd(24, 256) = 8 groups
        (
            SelectiveKernel,
            {"branches": 3, "groups": 24, "reduction": 4},
            3 * (9 * 32 * 256 + 2 * 256) + 256 * 64 + 2 * 64 + 64 * 3 * 256,
        ),
    ],
)
def test_parameters(kind, arguments, expected):
    with torch.device("meta"):
        block = kind(256, **arguments)
        assert block(torch.empty(2, 256, 6, 6)).shape == (2, 256, 6, 6)
    assert sum(p.numel() for p in block.parameters()) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ECA, None),
        (CBAM, 16),
        (CoordinateAttention, 8),
        (SCSE, 128),
        (SSE, None),
        (GatherExcite, None),
        (ESE, None),
        (GRN, None),
        (SimAM, None),
        (GlobalContext, 16),
        (TripletAttention, None),
        (ELA, None),
        (SelectiveKernel, 32),
        (GETheta, None),
        (GEThetaPlus, 16),
    ],
)
def test_the_interface(kind, expected):
    block = kind(256)
    assert isinstance(block, Attention)
    assert (block.channels, block.squeeze_channels, block.inserted) == (256, expected, False)
    assert "256" in repr(block)


@pytest.mark.parametrize("init", ["he", "identity"])
@pytest.mark.parametrize(("kind", "arguments"), [(kind, arguments) for kind, arguments, _ in FORMULAS])
def test_macs_are_those_of_the_counter(kind, arguments, init):
    block = kind(C, **arguments, init=init)
    cost = count(block, (1, C, H, W))
    assert not cost.unknown
    assert block.macs(H, W) == cost.macs.all
    assert block.macs(1, 1) == count(block, (1, C, 1, 1)).macs.all


@pytest.mark.parametrize("extent", [0, 1, 2, 4, 8])
def test_macs_of_gather_excite_are_those_of_the_counter(extent):
    block = GatherExcite(C, extent=extent)
    assert block.macs(H, W) == count(block, (1, C, H, W)).macs.all


def test_simam_is_its_formula():
    torch.manual_seed(0)
    block = SimAM(C, e_lambda=0.01)
    x = torch.randn(2, C, H, W, dtype=torch.float64)
    torch.testing.assert_close(block(x), simam(block, x, 1))
    assert block.macs(H, W) == count(block, (1, C, H, W)).macs.all
    # One position has no variance, and is no reason to divide by zero.
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        one = x[:, :, :1, :1].to(dtype)
        assert torch.equal(block(one), one * torch.tensor(0.5, dtype=dtype).sigmoid())


@pytest.mark.parametrize("arguments", [{}, {"branches": 3, "groups": 12, "reduction": 1}])
def test_selective_kernel_is_its_formula(arguments):
    torch.manual_seed(0)
    block = drawn(SelectiveKernel(C, **arguments))
    x = torch.randn(2, C, H, W, dtype=torch.float64)
    torch.testing.assert_close(block(x), selective_kernel(block, x), rtol=1e-12, atol=1e-12)
    for size in ((H, W), (1, 1)):
        cost = count(block, (1, C, *size))
        assert not cost.unknown
        assert block.macs(*size) == cost.macs.all


def test_selective_kernel_takes_the_groups_that_divide_its_channels():
    assert [SelectiveKernel(channels).groups for channels in (128, 24, 7)] == [32, 8, 1]
    assert SelectiveKernel(48, groups=6).branches[1][0].weight.shape == (48, 8, 3, 3)
    assert repr(SelectiveKernel(24)).startswith("SelectiveKernel(\n  24 → 32, groups=8")


def test_selective_kernel_learns():
    torch.manual_seed(0)
    block = SelectiveKernel(C)
    for layer in block.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            assert layer.weight.square().mean().item() == pytest.approx(2 / layer.weight[0].numel(), rel=0.3)
    block(torch.randn(8, C, H, W)).square().mean().backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


def test_macs_by_hand():
    # squeeze, scale: one per element; 5 taps and a sigmoid per channel
    assert ECA(256).macs(14, 14) == 2 * 256 * 14 * 14 + 256 * 5 + 256
    # Gathered 4 x 3 and 2 x 2 positions: 9 taps and a norm each; activations between; sigmoids; scale
    assert GETheta(10, extent=4).macs(7, 5) == 10 * (12 * 10 + 12 + 4 * 10 + 4 + 7 * 5)
    # Activations behind the gather, and two layers 10 → 5 → 10 with activations between
    assert GEThetaPlus(10, extent=4, reduction=2).macs(7, 5) == (
        10 * (12 * 10 + 12 + 4 * 10 + 4 + 4 + 7 * 5) + 4 * (2 * 10 * 5 + 5)
    )
    # Two branches: 9 taps of 2 channels, norm, activation, scale; two sums, a mean. Layers 64 → 32 → 2 * 64 with norm
    # and activation. A softmax of 128 values: exponential, sum, quotient.
    assert SelectiveKernel(64).macs(7, 5) == (
        64 * 7 * 5 * (2 * (9 * 2 + 3) + 2 + 1) + 64 * 32 + 2 * 32 + 32 * 2 * 64 + 3 * 128
    )
    # 4 x 3 windows of 3 x 3 and as many sigmoids, scale
    assert GatherExcite(10, extent=2).macs(7, 5) == 10 * (4 * 3 * 9 + 4 * 3 + 7 * 5)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LEARNING)
def test_identity_returns_the_input(kind, dtype, mode):
    block = kind(C, init="identity").to(dtype).train(mode == "train")
    x = (torch.randn(2, C, H, W) * 100).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([torch.finfo(dtype).smallest_normal / 2, 0.0])
    assert torch.equal(block(x), x)


# By the scheme: what stands before a layer that starts at zero has no gradient until that layer has moved.
WAITING = {
    ECA: set(),
    CBAM: {"fc1.weight", "fc1.bias", "conv.weight"},
    CoordinateAttention: {"conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"},
    SCSE: {"fc1.weight", "fc1.bias"},
    SSE: set(),
    ESE: set(),
    GRN: set(),
    GlobalContext: {"conv.weight", "conv.bias", "fc1.weight", "fc1.bias", "norm.weight", "norm.bias"},
    TripletAttention: {"over_height.conv.weight", "over_width.conv.weight", "over_channels.conv.weight"},
    ELA: {"conv.weight"},
    # The gather is three times convolution and norm, with activations 2 and 5 between.
    GETheta: {
        *(f"gather.{layer}.weight" for layer in (0, 1, 3, 4, 6)),
        *(f"gather.{layer}.bias" for layer in (1, 4)),
    },
    GEThetaPlus: {
        *(f"gather.{layer}.weight" for layer in (0, 1, 3, 4, 6, 7)),
        *(f"gather.{layer}.bias" for layer in (1, 4, 7)),
        *("fc1.weight", "fc1.bias"),
    },
}
# The normalisation takes the mean away, and with it in training any bias before it; a softmax does not see one at all.
NEVER = {CoordinateAttention: {"conv1.bias"}, GlobalContext: {"conv.bias"}}
# A norm's scale passes ReLU and depth-wise convolution, and the next norm takes it away while its bias is still zero.
LATER = {GETheta: {"gather.1.weight"}}


@pytest.mark.parametrize("kind", LEARNING)
def test_identity_learns(kind):
    torch.manual_seed(0)
    block = kind(C, init="identity").double()
    x, target = torch.randn(2, 8, C, H, W, dtype=torch.float64)
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    without = []
    for _ in range(3):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        without.append({name for name, p in block.named_parameters() if p.grad.abs().max().item() < 1e-12})
        optimizer.step()
    never = NEVER.get(kind, set())
    assert without == [WAITING[kind], never | LATER.get(kind, set()), never]
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("kind", [kind for kind in LEARNING if kind not in (SCSE, GRN, GlobalContext)])
def test_identity_is_not_read_without_its_stretch(kind):
    identity = kind(C, init="identity")
    with pytest.raises(RuntimeError, match=r"gate\.stretch"):
        kind(C).load_state_dict(identity.state_dict())
    with pytest.raises(RuntimeError, match=r"gate\.stretch"):
        identity.load_state_dict(kind(C).state_dict())


@pytest.mark.parametrize("kind", [kind for kind in LEARNING if kind is not GlobalContext])
def test_he_draws_the_weights_and_zeroes_the_biases(kind):
    torch.manual_seed(0)
    block = kind(1024)
    for layer in block.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            assert layer.bias is None or not layer.bias.any()
            fan_in = layer.weight[0].numel()
            if layer.weight.numel() > 1000:
                assert layer.weight.square().mean().item() == pytest.approx(2 / fan_in, rel=0.2)
            assert layer.weight.any()


@pytest.mark.parametrize("kind", [GRN, GlobalContext])
@pytest.mark.parametrize("init", ["he", "identity"])
def test_what_is_added_starts_at_nothing(kind, init):
    x = torch.randn(2, C, H, W)
    assert torch.equal(kind(C, init=init)(x), x)


def test_cbam_starts_with_all_positions_alike():
    """As the authors' release, whose spatial normalisation starts at a scale of zero."""
    block = CBAM(C).double()
    x = torch.randn(2, C, H, W, dtype=torch.float64)
    factor = block(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ECA(64, kernel_size=4), "kernel_size 4: must be odd and at least 1"),
        (lambda: CBAM(64, kernel_size=0), "kernel_size 0: must be odd and at least 1"),
        (lambda: CBAM(64, reduction=65), "reduction 65: must be from 1 to the number of channels, 64"),
        (lambda: CBAM(64, reduction=0), "reduction 0: must be from 1"),
        (lambda: SCSE(1), "reduction 2: must be from 1 to the number of channels, 1"),
        (lambda: CoordinateAttention(64, reduction=0), "reduction 0: must be at least 1"),
        (lambda: GatherExcite(64, extent=-1), "extent -1: must be at least 1, or 0 for the whole feature map"),
        (lambda: GatherExcite(64, init="identity"), "cannot start as the identity; use init 'he'"),
        (lambda: SimAM(64, init="identity"), "simam has no parameters and cannot start as the identity; use 'he'"),
        (lambda: SimAM(64, e_lambda=0), "e_lambda 0: must be a number above 0"),
        (lambda: GlobalContext(64, reduction=65), "reduction 65: must be from 1 to the number of channels, 64"),
        (lambda: TripletAttention(64, kernel_size=2), "kernel_size 2: must be odd and at least 1"),
        (lambda: ELA(64, kernel_size=0), "kernel_size 0: must be odd and at least 1"),
        (lambda: GETheta(64, extent=0), "extent 0: a convolution over the whole feature map needs its size"),
        (lambda: GETheta(64, extent=1), "extent 1: must be a power of two, at least 2"),
        (lambda: GETheta(64, extent=6), "extent 6: must be a power of two, at least 2"),
        (lambda: GEThetaPlus(64, extent=-2), "extent -2: must be a power of two, at least 2"),
        (lambda: GEThetaPlus(64, reduction=65), "reduction 65: must be from 1 to the number of channels, 64"),
        (lambda: SelectiveKernel(64, init="identity"), "sk ends in ReLUs and cannot start as the identity; use init"),
        (lambda: SelectiveKernel(64, branches=1), "branches 1: must be from 2 to 16"),
        (lambda: SelectiveKernel(64, branches=17), "branches 17: must be from 2 to 16"),
        (lambda: SelectiveKernel(64, groups=0), "groups 0: must be at least 1"),
        (lambda: SelectiveKernel(64, reduction=0), "reduction 0: must be at least 1"),
        (lambda: SSE(0), "channels 0: must be at least 1"),
        (lambda: ESE(64, init="zeros"), "init 'zeros': allowed: he, identity"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InsertionError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_the_interface_is_no_block():
    with pytest.raises(TypeError, match="abstract"):
        Attention(8)


ALL = [
    *((kind, {}) for kind in LEARNING),
    (GatherExcite, {}),
    (GatherExcite, {"extent": 2}),
    (SimAM, {}),
    (SelectiveKernel, {}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kind", "arguments"), ALL)
def test_half_precision_and_memory_format(kind, arguments, memory_format, dtype):
    torch.manual_seed(0)
    block = kind(C, **arguments).eval()
    x = torch.randn(2, C, 20, 20).to(dtype).contiguous(memory_format=memory_format)
    expected = block(x.float())
    y = block.to(dtype)(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.01)
    # 400 times 200 is more than half precision holds.
    assert block(torch.full_like(x, 200.0)).isfinite().all()


@pytest.mark.parametrize(("kind", "arguments"), [*ALL, *((kind, {"init": "identity"}) for kind in LEARNING)])
def test_bf16_autocast_keeps_the_type_of_the_map(kind, arguments):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind(C, **arguments)(torch.randn(2, C, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "arguments"), ALL)
def test_compiles_whole(kind, arguments):
    torch._dynamo.reset()
    block = drawn(kind(C, **arguments))
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for size in ((2, C, H, W), (3, C, 9, 4)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), block(x))
