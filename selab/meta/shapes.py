"""The empty outputs of common operators, where this is much cheaper than the operator's own meta kernel.

Each function takes an operator's arguments and returns plain meta tensors, with the strides that the real operator
gives. It returns None where it does not know them or where an argument is wrong: the operator's own meta kernel then
runs, and has the better error message.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from selab.meta.known import value_of

Makes = Callable[[Sequence[Any], Mapping[str, Any]], Any]


def is_contiguous(x: Tensor) -> bool:
    """Return whether a tensor has exactly the strides of a new one, so that no other memory format fits by chance."""
    step = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != step:
            return False
        step *= max(1, size)
    return True


def _contiguous(args: Sequence[Any]) -> bool:
    return all(is_contiguous(x) for x in args if isinstance(x, Tensor))


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _like(x: Tensor) -> Tensor | None:
    """Return an empty tensor of the same strides, as elementwise operators do for inputs without gaps and overlaps."""
    # Not empty_like: its meta kernel in torch 2.13 imports sympy.
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != step:
            return None
        step *= max(1, size)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _each(value: int | Sequence[int], dims: int) -> Sequence[int]:
    """Return one number per dimension; a single number holds for all."""
    values = [value] if isinstance(value, int) else value
    return values if len(values) == dims else [values[0]] * dims


def _same(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    return _like(args[0]) if args[0].dtype.is_floating_point else None


def _broadcast(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    first = args[0]
    if not isinstance(first, Tensor) or not first.dtype.is_floating_point:
        return None
    others = [x for x in args[1:] if isinstance(x, Tensor)]
    if any(x.dtype != first.dtype for x in others) or any(isinstance(x, complex) for x in args[1:]):
        return None
    if all(x.shape == first.shape and x.stride() == first.stride() for x in others):
        return _like(first)
    if not _contiguous(args):
        return None
    shape: Sequence[int] = first.shape
    for other in others:
        if other.shape != shape:
            sizes = [
                b if a == 1 else a if b in (1, a) else -1
                for a, b in zip_longest(reversed(shape), reversed(other.shape), fillvalue=1)
            ]
            if -1 in sizes:
                return None
            shape = sizes[::-1]
    return _empty(shape, first)


def _channels_last(x: Tensor) -> bool:
    """Return whether torch takes a tensor of four or five dimensions to be in a channels-last format."""
    strides, sizes = x.stride(), x.shape
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(1, sizes[dim])
    return strides[1] != 0


def _convolved(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    dims = x.dim() - 2
    inner, outer = (0, 1) if transposed else (1, 0)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return None
    if dims < 1 or weight.dim() != x.dim() or x.shape[1] != weight.shape[inner] * (1 if transposed else groups):
        return None
    stride, padding, dilation = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
    shape = [x.shape[0], weight.shape[outer] * (groups if transposed else 1)]
    for size, k, s, p, d, extra in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, _each(output_padding, dims), strict=True
    ):
        reach = d * (k - 1)
        length = (size - 1) * s - 2 * p + reach + extra + 1 if transposed else (size + 2 * p - reach - 1) // s + 1
        if length < 1:
            return None
        shape.append(length)
    made = _empty(shape, x)
    if dims > 1 and (_channels_last(x) or _channels_last(weight)):
        return made.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    return made


def _normalised(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    x, training = args[0], args[5]
    if x.dim() < 2 or any(one is not None and one.shape != x.shape[1:2] for one in args[1:5]):
        return None
    out = _like(x)
    saved, deviation = (torch.empty(x.shape[1] if training else 0, dtype=x.dtype, device="meta") for _ in range(2))
    return None if out is None else (out, saved, deviation)


def _reduced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0]
    if kwargs or not x.dtype.is_floating_point or not is_contiguous(x):
        return None
    dims = args[1] if len(args) > 1 else None
    asked = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    if any(not -x.dim() <= d < x.dim() for d in asked):
        return None
    gone = {d % x.dim() for d in asked}
    keep = len(args) > 2 and args[2]
    return _empty([1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone], x)


def _multiplied(left: int) -> Makes:
    def makes(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
        a, b = args[left], args[left + 1]
        if a.dtype != b.dtype or a.dim() != b.dim() or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
            return None
        return _empty((*a.shape[:-1], b.shape[-1]), a)

    return makes


def _pooled(args: Sequence[Any], kwargs: Mapping[str, Any], *, ceil_at: int, dilation_at: int | None) -> Tensor | None:
    x = args[0]
    if x.dim() != 4 or kwargs or not is_contiguous(x):
        return None
    kernel = _each(args[1], 2)
    stride = _each(args[2], 2) if len(args) > 2 and args[2] else kernel
    padding = _each(args[3], 2) if len(args) > 3 else (0, 0)
    dilation = _each(args[dilation_at], 2) if dilation_at and len(args) > dilation_at else (1, 1)
    ceil = len(args) > ceil_at and args[ceil_at]
    shape = list(x.shape[:2])
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        span = size + 2 * p - d * (k - 1) - 1
        length = (span + (s - 1 if ceil else 0)) // s + 1
        # With ceil_mode a last window that would start in the right padding is dropped.
        length -= bool(ceil and (length - 1) * s >= size + p)
        if length < 1 or p > k // 2:
            return None
        shape.append(length)
    return _empty(shape, x)


def _averaged(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return _pooled(args, kwargs, ceil_at=4, dilation_at=None)


def _max_pooled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    out = _pooled(args, kwargs, ceil_at=5, dilation_at=4)
    return None if out is None else (out, torch.empty(out.shape, dtype=torch.int64, device="meta"))


def _joined(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    tensors = args[0]
    first = tensors[0]
    dim = args[1] if len(args) > 1 else 0
    if any(t.dim() != first.dim() or t.dtype != first.dtype for t in tensors) or not _contiguous(tensors):
        return None
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    rest = [n for d, n in enumerate(first.shape) if d != dim]
    if any([n for d, n in enumerate(t.shape) if d != dim] != rest for t in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _empty(shape, first)


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    if kwargs.get("memory_format") is torch.contiguous_format:
        return _empty(args[0].shape, args[0])
    return None if kwargs else _like(args[0])


def _aligned(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    """Return the outputs of the CTC loss; the longest target, where it is known, gives the number of states."""
    scores, lengths = args[0], args[3]
    known = value_of(lengths) if isinstance(lengths, Tensor) else lengths
    if known is None or scores.dim() != 3 or not len(known):
        return None
    steps, batch, _ = scores.shape
    states = 2 * max(int(one) for one in known) + 1
    return _empty((batch,), scores), _empty((batch, steps, states), scores)


_UNARY = """
relu sigmoid hardsigmoid hardtanh silu hardswish tanh gelu elu celu selu mish leaky_relu softplus softsign threshold
clamp clamp_min clamp_max exp log sqrt rsqrt reciprocal neg abs erf square
"""
# An operator's full name, without its overload → the function that makes its output.
MAKES: dict[str, Makes] = {
    "aten::convolution": _convolved,
    "aten::addmm": _multiplied(1),
    "aten::mm": _multiplied(0),
    "aten::bmm": _multiplied(0),
    "aten::native_batch_norm": _normalised,
    "aten::max_pool2d_with_indices": _max_pooled,
    "aten::avg_pool2d": _averaged,
    "aten::cat": _joined,
    "aten::_ctc_loss": _aligned,
    "aten::clone": _copied,
    **{f"aten::{name}": _reduced for name in ("mean", "sum", "amax", "amin")},
    **{f"aten::{name}": _broadcast for name in ("add", "sub", "rsub", "mul", "addcmul", "div", "maximum", "minimum")},
    **{f"aten::{name}": _same for name in _UNARY.split()},
}
# In place, the output is the first argument, if the others fit into its shape.
FITS: dict[str, Makes] = {f"{name}_": makes for name, makes in MAKES.items() if makes in (_broadcast, _same)}
