"""The Triton kernels against float64: compiled where there is a GPU, else interpreted on a CPU."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from selab.kernels.cpu import BlockParams

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("selab.kernels.triton")
if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before its interpreter was chosen", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AREAS = [(1, 1), (5, 5), (7, 7), (14, 9)]
CHANNELS = [1, 3, 17, 64]
WORDS = list(itertools.product(("relu", "silu"), ("sigmoid", "hardsigmoid")))
SWITCHES = list(itertools.product((False, True), repeat=4))  # biases, shortcut, relu_in, relu_out
# Of the largest value. fp32: sums of some thousand terms in another order. Halves: arithmetic is in fp32 and the result
# is rounded once, by half of epsilon at most; Triton's interpreter cuts bfloat16 off instead, by up to all of it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def params(channels, units, activation, gate, biases, relu_in, relu_out, dtype=torch.float32, device=DEVICE):
    shapes = (units, channels), (units,), (channels, units), (channels,)
    w1, b1, w2, b2 = ((torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes)
    settings = activation, gate, 2.0, -0.25, relu_in, relu_out
    return BlockParams(w1, b1 if biases else None, w2, b2 if biases else None, *settings)


def a_map(shape, dtype, memory_format, device=DEVICE):
    # Not around zero: the mean of what cancels is all rounding.
    return (torch.randn(shape) + 0.5).to(device, dtype).contiguous(memory_format=memory_format)


def doubles(*tensors):
    return [None if one is None else one.detach().double().requires_grad_() for one in tensors]


def by_torch(y, shortcut, w1, b1, w2, b2, activation, gate, scale, offset, relu_in, relu_out):
    """The block, written down once more."""
    m = F.relu(y) if relu_in else y
    squeezed = m.mean((2, 3))
    hidden = F.linear(squeezed, w1, b1)
    logits = F.linear(getattr(F, activation)(hidden), w2, b2)
    g = scale * getattr(F, gate)(logits) + offset
    out = m * g[:, :, None, None]
    out = out if shortcut is None else shortcut + out
    return (F.relu(out) if relu_out else out), squeezed, hidden, logits


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max().clamp_min(1e-3))
    assert float((found.detach().double() - expected.detach()).abs().max()) <= tolerance * scale


def check(y, shortcut, made, weights_tolerance=1e-5):
    """Forward and backward on these against autograd in float64."""
    maps = doubles(y, shortcut)
    weights = doubles(*made[:4])
    expected = by_torch(*maps, *weights, *made[4:])
    found = kernels.forward(y, shortcut, made)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, TOLERANCES[one.dtype])
    assert found[0].dtype == y.dtype
    assert found[0].stride() == y.stride()

    dout = torch.randn(y.shape).to(y)
    expected[0].backward(dout.double())
    out = found[0] if made.relu_out else None
    needs = [True, shortcut is not None and made.relu_out]
    dy, dz, dlogits, dhidden = kernels.backward(dout, out, y, made, found[1:], needs)
    assert_near(dy, maps[0].grad, TOLERANCES[y.dtype])
    if shortcut is not None:
        assert_near(dz, maps[1].grad, TOLERANCES[y.dtype])
    # The layers' gradients are products of these with what is known.
    activated = getattr(F, made.activation)(found[2])
    assert_near(dlogits.t() @ activated, weights[2].grad, 2e-5)
    assert_near(dhidden.t() @ found[1], weights[0].grad, 2e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_forward_and_backward_at_odd_sizes(channels, dtype, memory_format):
    torch.manual_seed(channels)
    cases = itertools.cycle(itertools.product(WORDS, SWITCHES))
    for area, images in zip(AREAS, (17, 3, 1, 3), strict=True):
        words, (biases, joined, relu_in, relu_out) = next(itertools.islice(cases, 4, None))
        made = params(channels, max(1, channels // 4), *words, biases, relu_in, relu_out)
        shape = (images, channels, *area)
        y, shortcut = (a_map(shape, dtype, memory_format) for _ in range(2))
        check(y, shortcut if joined else None, made)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_kind_of_block(words, switches):
    torch.manual_seed(0)
    biases, joined, relu_in, relu_out = switches
    made = params(17, 5, *words, biases, relu_in, relu_out)
    y, shortcut = (a_map((3, 17, 5, 7), torch.float32, torch.channels_last) for _ in range(2))
    check(y, shortcut if joined else None, made)


@pytest.mark.parametrize("images", [1, 17])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_small_batch_is_summed_in_parts(images, memory_format, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: 40)
    y, shortcut = (a_map((images, 40, 31, 33), torch.float32, memory_format) for _ in range(2))
    last = memory_format == torch.channels_last
    tiles = kernels.tiling(images, 40, 31 * 33, last=last, processors=40)
    assert tiles.splits > 1
    check(y, shortcut, params(40, 9, "relu", "sigmoid", True, False, True))


@pytest.mark.parametrize("units", [1, 33, 512])
def test_every_squeeze_width(units):
    check(
        a_map((2, 70, 3, 3), torch.float32, torch.channels_last), None, params(70, units, *WORDS[0], True, True, False)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_halves(dtype):
    made = params(17, 5, "silu", "sigmoid", True, False, True, dtype=dtype)
    y, shortcut = (a_map((3, 17, 5, 7), dtype, torch.channels_last) for _ in range(2))
    check(y, shortcut, made)


def test_maps_that_lie_otherwise():
    y = a_map((3, 9, 6, 10), torch.float32, torch.contiguous_format)[:, :, ::2, 1::3]
    made = params(9, 3, "relu", "sigmoid", True, True, True)
    shortcut = a_map(y.shape, torch.float32, torch.channels_last)
    found = kernels.forward(y, shortcut, made)
    assert found[0].is_contiguous()
    assert torch.equal(found[0], kernels.forward(y.contiguous(), shortcut.contiguous(), made)[0])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_join_without_a_block(dtype, memory_format):
    for shape in ((1, 17, 5, 5), (3, 64, 14, 9), (2, 3, 1, 1)):
        branch, shortcut = (a_map(shape, dtype, memory_format) - 0.5 for _ in range(2))
        out = kernels.add_relu(branch, shortcut)
        assert out.stride() == branch.stride()
        assert_near(out, torch.relu(branch.double() + shortcut.double()), TOLERANCES[dtype])


def test_a_nan_stays_one():
    y = a_map((1, 3, 4, 4), torch.float32, torch.contiguous_format)
    y[0, 1, 0, 0] = torch.nan
    made = params(3, 2, "relu", "sigmoid", True, True, True)._replace(w1=torch.zeros(2, 3, device=DEVICE))
    made.w1[:, 0] = 1
    out = kernels.forward(y, None, made)[0]
    assert out[0, 1].isnan().any()


def test_equal_inputs_give_equal_bits():
    torch.manual_seed(0)
    y, shortcut, dout = (a_map((3, 40, 31, 33), torch.bfloat16, torch.channels_last) for _ in range(3))
    made = params(40, 9, "relu", "sigmoid", True, False, True)

    def once():
        out, *kept = kernels.forward(y, shortcut, made)
        return out, *kept, *kernels.backward(dout, out, y, made, kept, [True, True])

    assert all(torch.equal(one, other) for one, other in zip(once(), once(), strict=True))


@pytest.fixture
def launches(monkeypatch):
    """The kernels that are launched: their names, and which of the arguments are maps."""
    seen = []

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append((self.name, [isinstance(one, torch.Tensor) and one.dim() == 4 for one in arguments]))
                return self.kernel[grid](*arguments, **options)

            return launch

    for name in ("_sum", "_excite", "_join", "_excite_backward", "_branch_gradient"):
        monkeypatch.setattr(kernels, name, Recorded(name, getattr(kernels, name)))
    return seen


def maps_by_kernel(seen):
    return [(name, sum(maps)) for name, maps in seen]


def test_passes_over_the_maps_are_as_few_as_said(launches):
    y, shortcut, dout = (a_map((2, 8, 5, 5), torch.float32, torch.channels_last) for _ in range(3))
    made = params(8, 2, "relu", "sigmoid", True, False, True)
    out, *kept = kernels.forward(y, shortcut, made)
    # y; y, shortcut, out.
    assert maps_by_kernel(launches) == [("_sum", 1), ("_excite", 0), ("_join", 3)]
    launches.clear()
    kernels.backward(dout, out, y, made, kept, [True, True])
    # dout, out, y, dz; dz, dy.
    assert maps_by_kernel(launches) == [("_sum", 4), ("_excite_backward", 0), ("_branch_gradient", 2)]
    launches.clear()
    kernels.backward(dout, out, y, made, kept, [True, False])
    # dout, out, y; dout, out, dy: as many, and no map for dz.
    assert maps_by_kernel(launches) == [("_sum", 3), ("_excite_backward", 0), ("_branch_gradient", 3)]
    launches.clear()
    kernels.backward(dout, out, y, made, kept, [False, True])
    assert maps_by_kernel(launches) == [("_sum", 4), ("_excite_backward", 0)]


H200 = 132
NETWORKS = [(256, 56), (512, 28), (1024, 14), (2048, 7), (64, 112), (128, 56), (1024, 7), (72, 28), (17, 5), (1, 1)]


@pytest.mark.parametrize("images", [1, 3, 32, 256])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "side"), NETWORKS)
def test_tiles_cover_the_map(channels, side, last, images):
    area = side * side
    positions, width, programs, splits, span = kernels.tiling(images, channels, area, last=last, processors=H200)
    assert all(size & (size - 1) == 0 for size in (positions, width))
    assert positions * width <= 4096
    assert programs == images * -(-channels // width) * -(-area // positions)
    assert span % positions == 0
    assert (splits - 1) * span < area <= splits * span
    assert splits <= 8


def test_a_large_map_has_large_tiles_and_a_small_one_many():
    large = kernels.tiling(256, 256, 56 * 56, last=True, processors=H200)
    small = kernels.tiling(1, 2048, 49, last=True, processors=H200)
    assert large.positions * large.width == 4096
    assert large.splits == 1
    assert small.programs >= H200


@pytest.mark.parametrize(("length", "side"), [(2048, 128), (96, 32), (40, 64), (17, 32), (3, 4), (1, 1)])
def test_tiles_waste_little_of_their_long_side(length, side):
    assert kernels._side(length, least=32, most=128) == side


@pytest.mark.parametrize("images", [1, 3, 256])
@pytest.mark.parametrize(("channels", "units"), [(2048, 128), (256, 16), (64, 4), (2048, 512), (17, 1)])
def test_the_excitation_is_about_one_program_a_processor(channels, units, images):
    plan = kernels.excitation(images, channels, units, processors=H200, tf32=True)
    assert plan.precision == ("tf32x3" if units <= 128 else "ieee")
    assert plan.padded >= max(units, 16)
    assert plan.width >= 16
    assert plan.padded * plan.width <= 2 * 4096
    assert plan.span % plan.width == 0
    assert plan.grid[1] * plan.span >= channels
    assert plan.grid[0] * plan.rows >= images
    assert plan.grid[0] * plan.grid[1] <= H200


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them")
@pytest.mark.parametrize(("capability", "shared"), [(75, 64 * 1024), (90, 227 * 1024)])
def test_the_kernels_compile(capability, shared, tmp_path):
    script = Path(__file__).parent / "compile_kernels.py"
    # Compiled, not interpreted; and as Triton 3.9 did before it warned that this will change.
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(used) == 5 * 4 + 5 * 2
    assert max(used) <= shared
