"""Triton kernels of the SE block and its join; `selab.kernels.ops` calls them on CUDA.

A feature map is (N, C, H, W), contiguous or channels last; `area` is H * W. Each kernel processes tiles of `positions`
by `width` channels of one image; the long side of a tile is the one that is contiguous in memory. All arithmetic is in
fp32, and partial sums are added in a fixed order: equal inputs give equal bits.

Forward: `_sum` squeezes, `_excite` computes the gates of the whole batch, `_join` scales, adds and cuts. Backward:
`_sum` cuts and adds up the gate's gradient, `_excite_backward` takes it back to the mean, `_branch_gradient` finishes.
Nothing is tuned at run time and nothing waits for the device, so that everything can be captured in a CUDA graph.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from selab.kernels import memory_format
from selab.kernels.cpu import BlockParams

# Of a tile: what four warps keep in flight of two maps without running out of registers.
_ELEMENTS = 4096
_LEAST_ELEMENTS = 512
# Of a tile of weights; three of them in fp32 fit the shared memory of every device since compute capability 7.0.
_WEIGHTS = 4096
# Images that share one reading of the weights: the least rows of a product on tensor cores.
_IMAGES = 16
# More hidden units than these, multiplied in three products each, spill registers and want twice the shared memory.
_UNITS_BY_TF32 = 128
# Parts of a sum that the excitation adds up; more would keep it waiting longer than they save.
_MOST_SPLITS = 8


@triton.jit
def _offsets(channels, area, last: tl.constexpr, p, c):
    """Where positions p and channels c of an image are, counted from its first element."""
    if last:
        return p[:, None] * channels + c[None, :]
    return c[None, :] * area + p[:, None]


@triton.jit
def _cut(x, by):
    """Keeps x where `by` is above zero, as torch's gradient of a ReLU has it; a NaN in `by` cuts nothing."""
    return tl.where(by <= 0, 0.0, x)


@triton.jit
def _sum(
    y,
    dout,
    out,
    dz,
    sums,
    channels,
    area,
    splits,
    span,
    last: tl.constexpr,
    relu_in: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
):
    """Adds up m, or dz * m with dz = dout where out > 0, over a span of positions; writes dz where it is wanted.

    sums: (N, splits, C), one program for each image, split and block of channels. The last image goes first:
    the cache holds the end of what the operator before wrote, and the next kernel begins with what is read last here.
    """
    blocks = tl.cdiv(channels, width)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program // blocks
    c = program % blocks * width + tl.arange(0, width)
    begin = row % splits * span
    end = tl.minimum(begin + span, area)
    image = (row // splits).to(tl.int64) * channels * area
    total = tl.zeros((positions, width), tl.float32)
    for first in range(begin, end, positions):
        p = first + tl.arange(0, positions)
        inside = (p < end)[:, None] & (c < channels)[None, :]
        at = _offsets(channels, area, last, p, c)
        m = tl.load(y + image + at, inside, other=0.0).to(tl.float32)
        if relu_in:
            m = _cut(m, m)
        if dout is not None:
            d = tl.load(dout + image + at, inside, other=0.0).to(tl.float32)
            if out is not None:
                d = _cut(d, tl.load(out + image + at, inside, other=0.0).to(tl.float32))
            if dz is not None:
                tl.store(dz + image + at, d.to(dz.dtype.element_ty), inside)
            m *= d
        total += m
    tl.store(sums + row.to(tl.int64) * channels + c, tl.sum(total, 0), c < channels)


@triton.jit
def _added(sums, n, c, channels, inside, splits: tl.constexpr):
    """(images, channels): the parts of a sum, added up."""
    at = sums + n.to(tl.int64)[:, None] * splits * channels + c[None, :]
    total = tl.load(at, inside, other=0.0)
    for split in tl.static_range(1, splits):
        total += tl.load(at + split * channels, inside, other=0.0)
    return total


@triton.jit
def _gate(logits, gate: tl.constexpr):
    if gate == "sigmoid":
        return tl.sigmoid(logits)
    return tl.minimum(tl.maximum(logits + 3.0, 0.0), 6.0) / 6.0


@triton.jit
def _gate_slope(logits, gate: tl.constexpr):
    if gate == "sigmoid":
        rise = tl.sigmoid(logits)
        return rise * (1.0 - rise)
    return tl.where(tl.abs(logits) < 3.0, 1.0 / 6.0, 0.0)


@triton.jit
def _activation(hidden, activation: tl.constexpr):
    if activation == "relu":
        return _cut(hidden, hidden)
    return hidden * tl.sigmoid(hidden)


@triton.jit
def _activation_slope(hidden, activation: tl.constexpr):
    if activation == "relu":
        return tl.where(hidden > 0, 1.0, 0.0)
    rise = tl.sigmoid(hidden)
    return rise * (1.0 + hidden * (1.0 - rise))


@triton.jit
def _excite(
    sums,
    w1,
    b1,
    w2,
    b2,
    squeezed,
    hidden,
    logits,
    factors,
    images,
    channels,
    units,
    area,
    span,
    scale,
    offset,
    splits: tl.constexpr,
    activation: tl.constexpr,
    gate: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
):
    """From the sums of `rows` images to the gates of a span of channels: fc1, activation, fc2, gate.

    Every program computes all hidden units of its images, which saves a second launch, and those with the first span
    of channels write them.
    """
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, padded)
    begin = tl.program_id(1) * span
    h = tl.zeros((rows, padded), tl.float32)
    for first in range(0, channels, width):
        c = first + tl.arange(0, width)
        inside = (n < images)[:, None] & (c < channels)[None, :]
        mean = _added(sums, n, c, channels, inside, splits) / area
        if begin == 0:
            tl.store(squeezed + n[:, None] * channels + c[None, :], mean, inside)
        at = w1 + k[None, :] * channels + c[:, None]
        weights = tl.load(at, (c < channels)[:, None] & (k < units)[None, :], other=0.0).to(tl.float32)
        h += tl.dot(mean, weights, input_precision=precision)
    if b1 is not None:
        h += tl.load(b1 + k, k < units, other=0.0).to(tl.float32)[None, :]
    if begin == 0:
        tl.store(hidden + n[:, None] * units + k[None, :], h, (n < images)[:, None] & (k < units)[None, :])
    h = _activation(h, activation)
    for first in range(begin, tl.minimum(begin + span, channels), width):
        c = first + tl.arange(0, width)
        inside = (n < images)[:, None] & (c < channels)[None, :]
        at = w2 + c[None, :] * units + k[:, None]
        weights = tl.load(at, (c < channels)[None, :] & (k < units)[:, None], other=0.0).to(tl.float32)
        t = tl.dot(h, weights, input_precision=precision)
        if b2 is not None:
            t += tl.load(b2 + c, c < channels, other=0.0).to(tl.float32)[None, :]
        to = n[:, None] * channels + c[None, :]
        tl.store(logits + to, t, inside)
        tl.store(factors + to, _gate(t, gate) * scale + offset, inside)


@triton.jit
def _excite_backward(
    sums,
    w1,
    w2,
    hidden,
    logits,
    dhidden,
    dlogits,
    dmean,
    factors,
    images,
    channels,
    units,
    area,
    span,
    scale,
    offset,
    splits: tl.constexpr,
    activation: tl.constexpr,
    gate: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
):
    """From the gates' gradients of `rows` images to those of a span of means; the gates once more, as in `_excite`.

    dmean is already divided by the area: what every position of the channel gets.
    """
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, padded)
    begin = tl.program_id(1) * span
    dh = tl.zeros((rows, padded), tl.float32)
    for first in range(0, channels, width):
        c = first + tl.arange(0, width)
        inside = (n < images)[:, None] & (c < channels)[None, :]
        to = n[:, None] * channels + c[None, :]
        t = tl.load(logits + to, inside, other=0.0)
        dt = _added(sums, n, c, channels, inside, splits) * scale * _gate_slope(t, gate)
        if begin == 0:
            tl.store(dlogits + to, dt, inside)
        at = w2 + c[:, None] * units + k[None, :]
        weights = tl.load(at, (c < channels)[:, None] & (k < units)[None, :], other=0.0).to(tl.float32)
        dh += tl.dot(dt, weights, input_precision=precision)
    known = (n < images)[:, None] & (k < units)[None, :]
    at_hidden = n[:, None] * units + k[None, :]
    dh *= _activation_slope(tl.load(hidden + at_hidden, known, other=0.0), activation)
    if begin == 0:
        tl.store(dhidden + at_hidden, dh, known)
    for first in range(begin, tl.minimum(begin + span, channels), width):
        c = first + tl.arange(0, width)
        inside = (n < images)[:, None] & (c < channels)[None, :]
        to = n[:, None] * channels + c[None, :]
        at = w1 + k[:, None] * channels + c[None, :]
        weights = tl.load(at, (c < channels)[None, :] & (k < units)[:, None], other=0.0).to(tl.float32)
        tl.store(dmean + to, tl.dot(dh, weights, input_precision=precision) / area, inside)
        t = tl.load(logits + to, inside, other=0.0)
        tl.store(factors + to, _gate(t, gate) * scale + offset, inside)


@triton.jit
def _tile(channels, area, last: tl.constexpr, positions: tl.constexpr, width: tl.constexpr):
    """This program's tile: where its image begins in an (N, C) matrix, channels, elements in the image, their mask.

    Where an image begins has 64 bits, for a batch may have more than 2^31 elements; an image has fewer.
    """
    blocks, steps = tl.cdiv(channels, width), tl.cdiv(area, positions)
    program = tl.program_id(0)
    image = (program // (blocks * steps)).to(tl.int64)
    c = program % blocks * width + tl.arange(0, width)
    p = program // blocks % steps * positions + tl.arange(0, positions)
    at = _offsets(channels, area, last, p, c)
    return image * channels, c, at, (p < area)[:, None] & (c < channels)[None, :]


@triton.jit
def _join(
    y,
    shortcut,
    factors,
    out,
    channels,
    area,
    last: tl.constexpr,
    relu_in: tl.constexpr,
    relu_out: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
):
    """Writes out = relu(shortcut + m * g), one tile a program; without factors g is one."""
    row, c, at, inside = _tile(channels, area, last, positions, width)
    image = row * area
    z = tl.load(y + image + at, inside, other=0.0).to(tl.float32)
    if relu_in:
        z = _cut(z, z)
    if factors is not None:
        z *= tl.load(factors + row + c, c < channels, other=0.0)[None, :]
    if shortcut is not None:
        z += tl.load(shortcut + image + at, inside, other=0.0).to(tl.float32)
    if relu_out:
        z = _cut(z, z)
    tl.store(out + image + at, z.to(out.dtype.element_ty), inside)


@triton.jit
def _branch_gradient(
    dz,
    out,
    y,
    factors,
    dmean,
    dy,
    channels,
    area,
    last: tl.constexpr,
    positions: tl.constexpr,
    width: tl.constexpr,
):
    """Writes dy = dz * g + dmean, one tile a program.

    If `out` is given, dz is first cut where that is not above zero; if y is given, so is dy where y is not.
    """
    row, c, at, inside = _tile(channels, area, last, positions, width)
    image = row * area
    d = tl.load(dz + image + at, inside, other=0.0).to(tl.float32)
    if out is not None:
        d = _cut(d, tl.load(out + image + at, inside, other=0.0).to(tl.float32))
    d *= tl.load(factors + row + c, c < channels, other=0.0)[None, :]
    d += tl.load(dmean + row + c, c < channels, other=0.0)[None, :]
    if y is not None:
        d = _cut(d, tl.load(y + image + at, inside, other=0.0).to(tl.float32))
    tl.store(dy + image + at, d.to(dy.dtype.element_ty), inside)


class Tiling(NamedTuple):
    """The tiles of a feature map.

    Attributes:
        positions: of a tile.
        width: channels of a tile.
        programs: tiles of the feature map.
        splits: programs that share the sum of one image's block of channels.
        span: positions for each of them.
    """

    positions: int
    width: int
    programs: int
    splits: int
    span: int


def tiling(images: int, channels: int, area: int, *, last: bool, processors: int) -> Tiling:
    """Return the tiles of a feature map: large ones, unless there would be fewer than two for each processor.

    Args:
        images: N.
        channels: C.
        area: H * W.
        last: whether it is channels last.
        processors: of the device.
    """
    elements = _ELEMENTS
    while elements > _LEAST_ELEMENTS and images * channels * area < 2 * processors * elements:
        elements //= 2
    if last:
        width = _side(channels, least=32, most=128)
        positions = min(triton.next_power_of_2(area), elements // width)
    else:
        positions = _side(area, least=64, most=256)
        width = min(triton.next_power_of_2(channels), max(1, elements // positions))
    blocks = triton.cdiv(channels, width)
    programs = images * blocks * triton.cdiv(area, positions)
    splits = min(triton.cdiv(2 * processors, images * blocks), triton.cdiv(area, positions), _MOST_SPLITS)
    span = triton.cdiv(area, positions * splits) * positions
    return Tiling(positions, width, programs, triton.cdiv(area, span), span)


def _side(length: int, *, least: int, most: int) -> int:
    """The power of two for a tile's long side: the largest that wastes at most an eighth, else the least wasteful."""
    whole: int = min(most, triton.next_power_of_2(length))
    sides = [whole >> halved for halved in range(whole.bit_length()) if whole >> halved >= min(least, whole)]
    padded = {side: triton.cdiv(length, side) * side for side in sides}
    return next((side for side in sides if 8 * padded[side] <= 9 * length), min(sides, key=padded.__getitem__))


class Excitation(NamedTuple):
    """The tiles of the excitation.

    Attributes:
        grid: programs, each with `rows` images and a `span` of channels.
        rows: images of a program.
        span: channels of a program.
        width: channels at a time.
        padded: hidden units, up to a power of two.
        precision: how fp32 is multiplied: in three products on tensor cores that know tf32, or as it is.
        warps: of a program.
        stages: readings of the weights under way at the same time.
    """

    grid: tuple[int, int]
    rows: int
    span: int
    width: int
    padded: int
    precision: str
    warps: int
    stages: int


def excitation(images: int, channels: int, units: int, *, processors: int, tf32: bool) -> Excitation:
    """About one program for each processor, for each of them reads the whole first layer.

    Args:
        images: N.
        channels: C.
        units: K, the squeeze width.
        processors: of the device.
        tf32: whether its tensor cores know it.
    """
    padded = max(16, triton.next_power_of_2(units))
    width = max(16, min(64, _WEIGHTS // padded, triton.next_power_of_2(channels)))
    tiles = triton.cdiv(images, _IMAGES)
    parts = max(1, min(processors // tiles, triton.cdiv(channels, width)))
    span = triton.cdiv(channels, width * parts) * width
    narrow = padded <= _UNITS_BY_TF32
    how = ("tf32x3" if narrow and tf32 else "ieee", 4 if narrow else 8, 3 if narrow else 2)
    return Excitation((tiles, triton.cdiv(channels, span)), _IMAGES, span, width, padded, *how)


@functools.cache
def _processors(device: torch.device) -> int:
    # A CPU has none: there the kernels are interpreted, and a few make the grids of small tests interesting.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _knows_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class _Map:
    """The sizes and tiles of a feature map, and the kernels on them."""

    def __init__(self, y: Tensor) -> None:
        self.images, self.channels, height, width = y.shape
        self.area = height * width
        self.last = memory_format.is_channels_last(y) or self.area == 1
        self.device = y.device
        self.processors = _processors(y.device)
        self.tiles = tiling(self.images, self.channels, self.area, last=self.last, processors=self.processors)

    def sums(
        self,
        y: Tensor,
        *,
        relu_in: bool,
        dout: Tensor | None = None,
        out: Tensor | None = None,
        dz: Tensor | None = None,
    ) -> Tensor:
        """(N, splits, C): the sums of m, or of dz * m, in parts; writes dz if it is given."""
        tiles = self.tiles
        sums = y.new_empty((self.images, tiles.splits, self.channels), dtype=torch.float32)
        grid = (self.images * tiles.splits * triton.cdiv(self.channels, tiles.width),)
        sizes = (self.channels, self.area, tiles.splits, tiles.span, self.last)
        _sum[grid](y, dout, out, dz, sums, *sizes, relu_in, tiles.positions, tiles.width)
        return sums

    def excite(self, kernel: Any, tensors: Sequence[Tensor | None], params: BlockParams) -> None:
        """Run `_excite` or `_excite_backward` on its tensors."""
        units = params.w1.shape[0]
        tf32 = _knows_tf32(self.device)
        plan = excitation(self.images, self.channels, units, processors=self.processors, tf32=tf32)
        sizes = (self.images, self.channels, units, self.area, plan.span, params.scale, params.offset)
        words = (self.tiles.splits, params.activation, params.gate, plan.precision)
        blocks = (plan.rows, plan.width, plan.padded)
        kernel[plan.grid](*tensors, *sizes, *words, *blocks, num_warps=plan.warps, num_stages=plan.stages)

    def join(
        self,
        y: Tensor,
        shortcut: Tensor | None,
        factors: Tensor | None,
        out: Tensor,
        *,
        relu_in: bool,
        relu_out: bool,
    ) -> None:
        """Fills `out`."""
        tiles, sizes = self.tiles, (self.channels, self.area, self.last)
        relus = (relu_in, relu_out)
        _join[(tiles.programs,)](y, shortcut, factors, out, *sizes, *relus, tiles.positions, tiles.width)

    def branch_gradient(self, dz: Tensor, out: Tensor | None, y: Tensor | None, *tensors: Tensor) -> None:
        """Fills dy, the last of `tensors`; the two before are the factors and the mean's gradient."""
        tiles, sizes = self.tiles, (self.channels, self.area, self.last)
        _branch_gradient[(tiles.programs,)](dz, out, y, *tensors, *sizes, tiles.positions, tiles.width)

    def matrix(self, columns: int) -> Tensor:
        """(N, columns), empty, fp32."""
        return torch.empty((self.images, columns), dtype=torch.float32, device=self.device)


def forward(y: Tensor, shortcut: Tensor | None, params: BlockParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block and its join: y is read twice, the shortcut once, and out is written.

    Args:
        y: (N, C, H, W).
        shortcut: of the same shape, or None.
        params: of the block.

    Returns:
        out (N, C, H, W), in y's memory format; squeezed (N, C), hidden before its activation (N, K) and logits (N, C).
    """
    with torch.cuda.device_of(y):
        out, y = memory_format.empty_map(y), memory_format.laid_out(y, y)
        shortcut = None if shortcut is None else memory_format.laid_out(shortcut, y)
        tiled = _Map(y)
        sums = tiled.sums(y, relu_in=params.relu_in)
        squeezed, logits, factors = (tiled.matrix(tiled.channels) for _ in range(3))
        hidden = tiled.matrix(params.w1.shape[0])
        weights = params.w1.contiguous(), params.b1, params.w2.contiguous(), params.b2
        tiled.excite(_excite, (sums, *weights, squeezed, hidden, logits, factors), params)
        tiled.join(y, shortcut, factors, out, relu_in=params.relu_in, relu_out=params.relu_out)
    return out, squeezed, hidden, logits


def add_relu(branch: Tensor, shortcut: Tensor) -> Tensor:
    """relu(branch + shortcut) in one pass: (N, C, H, W) twice → (N, C, H, W), in the branch's memory format."""
    with torch.cuda.device_of(branch):
        out, branch = memory_format.empty_map(branch), memory_format.laid_out(branch, branch)
        _Map(branch).join(branch, memory_format.laid_out(shortcut, branch), None, out, relu_in=False, relu_out=True)
    return out


def backward(
    dout: Tensor, out: Tensor | None, y: Tensor, params: BlockParams, kept: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of feature maps, logits and hidden values: dout, out and y are read, dz is written and read.

    Args:
        dout: of the output, (N, C, H, W).
        out: the output, where `relu_out` is set; None otherwise.
        y: as in `forward`.
        params: as in `forward`.
        kept: squeezed, hidden and logits, from `forward`.
        needs: whether those of y and of the shortcut are wanted; more is not looked at.

    Returns:
        Those of y, of the sum before the last ReLU, of logits (N, C) and of hidden (N, K); of the maps those that are
        not wanted are dout.
    """
    _, hidden, logits = kept
    with torch.cuda.device_of(y):
        y, dout = memory_format.laid_out(y, y), memory_format.laid_out(dout, y)
        out = None if out is None else memory_format.laid_out(out, y)
        tiled = _Map(y)
        dz = torch.empty_like(y) if needs[1] else None
        sums = tiled.sums(y, relu_in=params.relu_in, dout=dout, out=out, dz=dz)
        dhidden = torch.empty_like(hidden)
        dlogits, dmean, factors = (tiled.matrix(tiled.channels) for _ in range(3))
        known = sums, params.w1.contiguous(), params.w2.contiguous(), hidden, logits
        tiled.excite(_excite_backward, (*known, dhidden, dlogits, dmean, factors), params)
        dy = dout
        if needs[0]:
            dy = torch.empty_like(y)
            source, cut = (dout, out) if dz is None else (dz, None)
            tiled.branch_gradient(source, cut, y if params.relu_in else None, factors, dmean, dy)
    return dy, dout if dz is None else dz, dlogits, dhidden
