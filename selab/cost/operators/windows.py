"""Pooling, interpolation and sampling: what each output element is made of."""

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor

from selab.cost.operators.base import (
    Arguments,
    Arithmetic,
    Needs,
    Rule,
    Traffic,
    Work,
    argument,
    each,
    elements,
    nothing,
    per_input,
    per_output,
    table,
)


# -------------------------------------------------------------------------------------------------------------- pooling
def _window_work(dims: int) -> Arithmetic:
    """One per element of every window; leading dimensions are whatever the map has."""
    return lambda args, out: elements(out.numel() * prod(each(args[1], dims)))


def _adaptive_work(args: Arguments, out: Tensor) -> Work:
    """One per element of every window: window i of n over a length L spans floor(i L / n) to ceil((i + 1) L / n)."""
    x = args[0]
    dims = len(args[1])
    read = prod(x.shape[:-dims])
    for length, windows in zip(x.shape[-dims:], out.shape[-dims:], strict=True):
        read *= sum(-(-(i + 1) * length // windows) - i * length // windows for i in range(windows))
    return elements(read)


# -------------------------------------------------------------------------------------------------------- interpolation
def _factor(args: Arguments, dim: int) -> float | None:
    """Return the scale factor that an interpolation of a map was called with: one number, or a list, per dimension."""
    given = argument(args, 3)
    if isinstance(given, (list, tuple)):
        return float(given[dim])
    value = argument(args, 3 + dim)
    return None if value is None else float(value)


def _taps(size: int, length: int, reach: float, corners: bool, factor: float | None) -> int:
    """Return the inputs that all outputs of an antialiased interpolation along one dimension are made of.

    The filter is as much wider as the map shrinks, and is cut off at the borders.

    Args:
        size: of the input.
        length: of the output.
        reach: half the width of the filter where the map does not shrink.
        corners: whether the corner pixels stay where they are (`align_corners`).
        factor: the scale factor that was given; None if only the size was.
    """
    step = 1 / factor if factor else size / length
    if corners:
        step = (size - 1) / (length - 1) if length > 1 else 0.0
    support = reach * max(1.0, step)
    count = 0
    for i in range(length):
        center = step * (i + 0.5)
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), size)
        count += max(last - first, 0)
    return count


def _antialiased(reach: float) -> Arithmetic:
    def work(args: Arguments, out: Tensor) -> Work:
        x, corners = args[0], bool(args[2])
        read = prod(out.shape[:-2])
        for dim in (0, 1):
            read *= _taps(x.shape[dim - 2], out.shape[dim - 2], reach, corners, _factor(args, dim))
        return elements(read)

    return work


def _picked(args: Arguments, out: Tensor) -> Sequence[tuple[Tensor, int]]:
    """At most one input element is read per output element."""
    return [(args[0], min(args[0].numel(), out.numel())), (out, out.numel())]


def _interpolated(neighbours: int, names: str) -> dict[str, Rule]:
    return table(Rule(name="upsample", work=per_output(neighbours)), names)


# ------------------------------------------------------------------------------------------------------------- sampling
def _neighbours(dims: int, mode: int) -> int:
    """Return the neighbours of a place between pixels: bilinear, nearest and bicubic are 0, 1 and 2."""
    return (2**dims, 0, 4**dims)[mode]


def _sampled_work(dims: int) -> Arithmetic:
    def work(args: Arguments, out: Tensor) -> Work:
        return elements(_neighbours(dims, argument(args, 2, 0)) * out.numel())

    return work


def _sampled_traffic(dims: int) -> Traffic:
    def traffic(args: Arguments, out: Tensor) -> Sequence[tuple[Tensor, int]]:
        x, grid = args[0], args[1]
        read = max(1, _neighbours(dims, argument(args, 2, 0))) * out.numel()
        return [(x, min(x.numel(), read)), (grid, grid.numel()), (out, out.numel())]

    return traffic


def _sampled(dims: int) -> Rule:
    return Rule(name="grid_sample", work=_sampled_work(dims), traffic=_sampled_traffic(dims))


def _deformable_work(args: Arguments, out: Tensor) -> Work:
    """The products of the convolution, and four neighbours (one factor more with a mask) of every sampled element.

    Each place of the window is sampled at each output position in every input channel.
    """
    x, weight, masked = args[0], args[1], bool(argument(args, 13, False))
    places = out.numel() // out.shape[1] if out.shape[1] else 0
    sampled = places * x.shape[1] * prod(weight.shape[2:])
    return Work(places * weight.numel(), (4 + masked) * sampled, (4 + masked) * sampled)


def _deformable_backward(args: Arguments, _out: Tensor, work: Work, needs: Needs) -> Work:
    """The samples' gradient is one product, the weight's another; each of map, offset and mask is sampled once more."""
    sampled_by = [args[0], args[2], *([args[3]] if argument(args, 13, False) else [])]
    through = sum(needs(x) for x in sampled_by)
    return Work(work.macs * ((through > 0) + needs(args[1])), through * work.other, through * work.other_flops)


def _region_work(pooled_at: Callable[[Arguments], int]) -> Callable[[Arguments, Tensor], Work | None]:
    """`roi_align`: four neighbours per sample; without a ratio, the regions' values say how many samples there are."""

    def work(args: Arguments, out: Tensor) -> Work | None:
        ratio = pooled_at(args)
        return elements(4 * ratio * ratio * out.numel()) if ratio > 0 else None

    return work


# ------------------------------------------------------------------------------------------------------------ the table
def _pooling(work: Arithmetic, name: str, names: str) -> dict[str, Rule]:
    return table(Rule(name=name, work=work, role="reduction"), names)


WINDOWS: dict[str, Rule] = {
    **_pooling(_window_work(2), "max_pool", "max_pool2d_with_indices"),
    **_pooling(_window_work(1), "max_pool", "max_pool1d"),
    **_pooling(_window_work(2), "max_pool", "max_pool2d mkldnn_max_pool2d quantized_max_pool2d fractional_max_pool2d"),
    **_pooling(
        _window_work(3), "max_pool", "max_pool3d max_pool3d_with_indices mkldnn_max_pool3d fractional_max_pool3d"
    ),
    **_pooling(_window_work(1), "avg_pool", "avg_pool1d"),
    **_pooling(_window_work(2), "avg_pool", "avg_pool2d"),
    **_pooling(_window_work(3), "avg_pool", "avg_pool3d"),
    **_pooling(
        _adaptive_work,
        "adaptive_avg_pool",
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "mkldnn_adaptive_avg_pool2d",
    ),
    **_pooling(_adaptive_work, "adaptive_max_pool", "adaptive_max_pool2d adaptive_max_pool3d"),
    **table(Rule(name="unpool", work=nothing, linear=True), "max_unpool2d max_unpool3d"),
    # Overlapping windows are added up.
    **table(Rule(name="fold", work=per_input(1), linear=True), "col2im"),
    **_interpolated(2, "upsample_linear1d"),
    **_interpolated(4, "upsample_bilinear2d"),
    **_interpolated(8, "upsample_trilinear3d"),
    **_interpolated(16, "upsample_bicubic2d"),
    **table(Rule(name="upsample", work=_antialiased(1.0)), "_upsample_bilinear2d_aa"),
    **table(Rule(name="upsample", work=_antialiased(2.0)), "_upsample_bicubic2d_aa"),
    **table(Rule(name="upsample", work=_antialiased(3.0)), "_upsample_lanczos2d_aa"),
    **table(
        Rule(name="upsample", work=nothing, linear=True, traffic=_picked),
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
    ),
    **table(_sampled(2), "grid_sampler_2d cudnn_grid_sampler _grid_sampler_2d_cpu_fallback"),
    **table(_sampled(3), "grid_sampler_3d"),
    "torchvision::deform_conv2d": Rule(
        name="deform_conv", work=_deformable_work, operands=(0, 1), backward=_deformable_backward
    ),
    "torchvision::roi_align": Rule(name="roi_align", work=_region_work(lambda args: args[5])),
    "torchvision::ps_roi_align": Rule(name="roi_align", work=_region_work(lambda args: args[5])),
}
