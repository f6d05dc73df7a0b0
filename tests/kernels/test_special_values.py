"""NaN, infinities, overflows, signed zeros and denormals come out as the separate torch operations return them."""

import pytest
import torch
import torch.nn.functional as F

from selab.kernels import cpu
from selab.kernels.cpu import BlockParams, Norm

INF, NAN = float("inf"), float("nan")
# Values of one channel; each stands in an image of its own, because a NaN in one channel reaches all gates.
SPECIAL = (INF, -INF, NAN, 3e38, -3e38, 1e38, 1e-38, 1e-40, -1e-45, 0.0, -0.0, 120.0, -120.0, 1e10, -1e10)
FORMATS = [torch.contiguous_format, torch.channels_last]
# Rows below and above the lengths at which the native loops change, with remainders.
SIZES = [(1, 1), (3, 5), (19, 15)]
needs_native = pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")
WAYS = [
    pytest.param((torch.float32, True), marks=needs_native, id="native"),
    pytest.param((torch.float32, False), id="torch"),
    pytest.param((torch.float64, False), id="double"),
]
CHANNELS, HIDDEN = 19, 6


def scaled_to(values, dtype):
    """The same values, those near float32's limits moved to those of the dtype."""
    limits = torch.finfo(dtype).max / torch.finfo(torch.float32).max
    large = values.abs() > 1e30
    return torch.where(large, values.to(dtype) * limits, values.to(dtype))


def feature_map(size, dtype, memory_format, *, seed=0, everywhere=False):
    """One image for each special value, in channel 2: at one position, and in the next image at all of them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2 * len(SPECIAL) + 2, CHANNELS, *size, generator=generator)
    for image, value in enumerate(SPECIAL):
        made[2 * image, 2, -1, size[1] // 2] = value
        made[2 * image + 1, slice(None) if everywhere else 2] = value
    # Infinities of both signs in one channel, and in two.
    made[-1, 4, 0, 0], made[-1, 5, -1, -1] = INF, -INF
    made[-2, 6, 0, 0], made[-2, 6, -1, -1] = INF, -INF
    return scaled_to(made, dtype).contiguous(memory_format=memory_format)


def layers(dtype, special=None):
    generator = torch.Generator().manual_seed(1)
    shapes = (HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if special is not None:
        which, value = special
        made[which].view(-1)[3] = value
    return [scaled_to(one, dtype) for one in made]


def reference(y, shortcut, params, norm=None):
    """Every step as an operation of its own, as a network without `fuse` runs them."""
    if norm is not None:
        y = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
        y = {"": lambda x: x, "relu": F.relu, "hardswish": F.hardswish, "silu": F.silu}[norm.activation](y)
    m = F.relu(y) if params.relu_in else y
    h = getattr(F, params.activation)(F.linear(m.mean((2, 3)), params.w1, params.b1))
    gate = getattr(F, params.gate)(F.linear(h, params.w2, params.b2))
    if (params.scale, params.offset) != (1.0, 0.0):
        gate = torch.addcmul(gate.new_tensor(params.offset), gate, gate.new_tensor(params.scale))
    out = m * gate[:, :, None, None]
    out = out if shortcut is None else out + shortcut
    return F.relu(out) if params.relu_out else out


def assert_same(found, expected, *, zeros=True):
    """Equal up to rounding where finite; NaN, infinities and the signs of zeros exactly."""
    assert found.dtype == expected.dtype
    finite = expected.isfinite()
    special = torch.where(finite, 0, expected)
    assert torch.allclose(torch.where(found.isfinite(), 0, found), special, equal_nan=True), "NaN and infinities"
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-6
    assert torch.allclose(found[finite], expected[finite], rtol=tolerance, atol=tolerance)
    if zeros:
        none = (expected == 0) & (found == 0)
        assert torch.equal(found[none].signbit(), expected[none].signbit()), "signs of zeros"


def compared(way, y, shortcut, params, norm=None):
    """Compare output and gradients; the latter only without a BatchNorm, with which there are none."""
    dtype, native = way
    with torch.no_grad():
        assert_same(
            cpu.infer(y, shortcut, params, native=native, norm=norm),
            reference(y, shortcut, params, norm),
            # A fused sum starts from the shortcut: -0 plus the product of a zero is rounded once.
            zeros=native or shortcut is None,
        )
    if norm is not None:
        return
    ours = [None if one is None else one.clone().requires_grad_() for one in (y, shortcut, *params[:4])]
    theirs = [None if one is None else one.clone().requires_grad_() for one in (y, shortcut, *params[:4])]
    out = cpu.Gated.apply(*ours, params, native)
    expected = reference(theirs[0], theirs[1], BlockParams(*theirs[2:], *params[4:]))
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(y.shape, generator=generator)
    for image, value in enumerate(SPECIAL):
        cotangent[image::7, 1, 0, 0] = value if image < 3 else 1.0
    cotangent = cotangent.to(dtype)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert_same(out.detach(), expected.detach(), zeros=native or shortcut is None)
    # Sums over images mix infinities of both signs, in any order.
    for one, two in zip(ours[:2], theirs[:2], strict=True):
        if one is not None:
            assert_same(one.grad, two.grad, zeros=False)
    for one, two in zip(ours[2:], theirs[2:], strict=True):
        assert torch.equal(one.grad.isfinite(), two.grad.isfinite())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relu", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_in_the_feature_map(way, gate, activation, joined, relu, memory_format):
    for size, scale in zip(SIZES, (1.0, 1.0, 2.0), strict=True):
        y = feature_map(size, way[0], memory_format)
        shortcut = feature_map(size, way[0], memory_format, seed=3) if joined else None
        compared(way, y, shortcut, BlockParams(*layers(way[0]), activation, gate, scale, 0.0, *relu))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("which", range(4), ids=["w1", "b1", "w2", "b2"])
def test_in_the_weights(way, gate, activation, which):
    y = torch.randn(3, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(4)).to(way[0])
    for value in SPECIAL:
        compared(way, y, None, BlockParams(*layers(way[0], (which, value)), activation, gate))


@needs_native
@pytest.mark.parametrize("activation", ["", "relu", "hardswish"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relu_out", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_with_a_batchnorm_before_the_block(activation, joined, relu_out, memory_format):
    way = (torch.float32, True)
    for size in SIZES[1:]:
        y = feature_map(size, way[0], memory_format)
        shortcut = feature_map(size, way[0], memory_format, seed=3) if joined else None
        params = BlockParams(*layers(way[0]), relu_out=relu_out)
        for norm in norms(activation):
            compared(way, y, shortcut, params, norm)


def norms(activation):
    """Statistics with special values too: of mean, variance, weight and bias."""
    plain = [torch.linspace(one, one + 1, CHANNELS) for one in (0.5, -0.5, -1.0, 0.25)]
    yield Norm(*plain, 1e-5, activation)
    yield Norm(None, None, *plain[2:], 0.0, activation)
    for which in range(4):
        # No more than 1e35: a sum that overflows in both directions depends on the order of its terms.
        for value in (INF, NAN, 0.0, -0.0, 1e35, 1e-38, -1.0):
            changed = [one.clone() for one in plain]
            changed[which][2] = value
            yield Norm(*changed, 1e-5, activation)
    # The normalised map is finite, though its sum before the BatchNorm is not; and the other way round.
    yield Norm(plain[0], plain[1], plain[2], torch.full((CHANNELS,), 1e38), 1e-5, activation)
    yield Norm(torch.full((CHANNELS,), 1e30), plain[1], plain[2], torch.full((CHANNELS,), 1e-20), 0.0, activation)


@needs_native
@pytest.mark.parametrize("activation", cpu.POST_ACTIVATIONS)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@torch.no_grad
def test_in_a_pass_without_a_block(activation, joined, normalised, memory_format):
    for size in SIZES:
        y = feature_map(size, torch.float32, memory_format, everywhere=True)
        shortcut = feature_map(size, torch.float32, memory_format, seed=3) if joined else None
        for norm in norms("") if normalised else [None]:
            expected = y
            if norm is not None:
                expected = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
            expected = expected if shortcut is None else expected + shortcut
            expected = getattr(F, activation)(expected) if activation else expected
            assert_same(cpu.activated(y, shortcut, norm, activation), expected)


@needs_native
@pytest.mark.parametrize("activation", ["", "relu", "hardswish"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@torch.no_grad
def test_in_squeeze_and_scale_alone(activation, memory_format):
    for size in SIZES:
        y = feature_map(size, torch.float32, memory_format, everywhere=True)
        gates = torch.randn(y.shape[:2])
        gates[::3, ::2], gates[1::3, 1::2], gates[2::5, 3] = 0.0, INF, NAN
        assert_same(cpu.native_squeezed(y), y.mean((2, 3)))
        assert_same(cpu.native_scaled(y, gates), y * gates[:, :, None, None])
        for norm in norms(activation):
            normal = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
            normal = getattr(F, activation)(normal) if activation else normal
            assert_same(cpu.native_squeezed(y, norm), normal.mean((2, 3)), zeros=False)
            assert_same(cpu.native_scaled(y, gates, norm), normal * gates[:, :, None, None])


@needs_native
@torch.no_grad
def test_gates_and_activations_over_their_whole_range():
    """A map of one position and weights that pass it on show the native functions alone."""
    values = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor(SPECIAL)))
    y = values[:, None, None, None]
    one = torch.ones(1, 1)
    for activation, function in (("silu", F.silu), ("hardswish", F.hardswish), ("relu", F.relu)):
        assert_same(cpu.activated(y, None, None, activation), function(y))
    for gate in cpu.GATES:
        for activation in cpu.ACTIVATIONS:
            params = BlockParams(one, None, one, None, activation, gate)
            found = cpu.infer(y, None, params, native=True)
            logits = getattr(F, activation)(values)
            torch.testing.assert_close(
                found, y * getattr(F, gate)(logits)[:, None, None, None], rtol=1e-6, atol=1e-37, equal_nan=True
            )
    # Down to the smallest float: nothing is cut off before torch cuts it.
    for value in torch.linspace(-110, -80, 31):
        params = BlockParams(one * 0, None, one, value[None], "relu", "sigmoid")
        found = cpu.infer(torch.ones(1, 1, 1, 1), None, params, native=True)
        torch.testing.assert_close(found.view(1), torch.sigmoid(value)[None], rtol=1e-5, atol=2e-45)
