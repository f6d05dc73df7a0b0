"""Empty outputs of frequent operators, made without their meta kernels, which are slow Python in torch 2.13."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from selab.cost.operators.base import META, each


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an empty meta tensor in the dimension order of another one, so that views of it are valid."""
    if like.is_contiguous() or like.dim() != len(shape):
        return torch.empty(shape, dtype=like.dtype, device=META)
    strides = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (like.stride(d), -d)):
        strides[dim] = step
        step *= max(1, shape[dim])
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=META)


def same(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return an output of the first input's shape."""
    x = args[0]
    return _empty(x.shape, x) if x.dtype.is_floating_point else None


def broadcast(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of an elementwise operator."""
    first = args[0]
    if not first.dtype.is_floating_point:
        return None
    shape = first.shape
    for other in args[1:]:
        if isinstance(other, Tensor) and other.shape != shape:
            if other.dtype != first.dtype:
                return None
            sizes = [
                b if a == 1 else a if b in (1, a) else -1
                for a, b in zip_longest(reversed(shape), reversed(other.shape), fillvalue=1)
            ]
            if -1 in sizes:
                return None
            shape = torch.Size(reversed(sizes))
        elif isinstance(other, Tensor) and other.dtype != first.dtype:
            return None
    return _empty(shape, first)


def convolved(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of a convolution."""
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    dims = x.dim() - 2
    inner, outer = (0, 1) if transposed else (1, 0)
    if weight.dim() != x.dim() or x.shape[1] != weight.shape[inner] * (1 if transposed else groups):
        return None
    if len(stride) != dims:
        stride, padding, dilation = each(stride, dims), each(padding, dims), each(dilation, dims)
        output_padding = each(output_padding, dims)
    shape = [x.shape[0], weight.shape[outer] * (groups if transposed else 1)]
    sizes, kernel = x.shape[2:], weight.shape[2:]
    for size, k, s, p, d, extra in zip(sizes, kernel, stride, padding, dilation, output_padding, strict=True):
        reach = d * (k - 1)
        length = (size - 1) * s - 2 * p + reach + extra + 1 if transposed else (size + 2 * p - reach - 1) // s + 1
        if length < 1:
            return None
        shape.append(length)
    return _empty(shape, x)


def normalised(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    """Return the outputs of a batch normalisation."""
    x, channels, training = args[0], args[0].shape[1], args[5]
    if any(t is not None and t.shape[0] != channels for t in args[1:5]):
        return None
    saved = torch.empty(channels if training else 0, dtype=x.dtype, device=META)
    return _empty(x.shape, x), saved, saved


def reduced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of a reduction over dimensions."""
    x = args[0]
    if kwargs or not x.dtype.is_floating_point or x.dim() == 0:
        return None
    dims = args[1] if len(args) > 1 else None
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(x.dim()))
    keep = len(args) > 2 and args[2]
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]
    return torch.empty(shape, dtype=x.dtype, device=META)


def multiplied(left: int) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor | None]:
    """Return what makes the output of a matrix product, whose left factor stands at this position."""

    def makes(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
        a, b = args[left], args[left + 1]
        if a.dim() != b.dim() or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
            return None
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=META)

    return makes


def pooled(ceil_at: int, dilation_at: int | None) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor | None]:
    """Return what makes the output of a 2-D pooling; the positions of `ceil_mode` and `dilation` differ."""

    def makes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        x = args[0]
        if x.dim() != 4 or kwargs:
            return None
        kernel = each(args[1], 2)
        stride = each(args[2], 2) if len(args) > 2 and args[2] else kernel
        padding = each(args[3], 2) if len(args) > 3 else (0, 0)
        dilation = each(args[dilation_at], 2) if dilation_at and len(args) > dilation_at else (1, 1)
        ceil = len(args) > ceil_at and args[ceil_at]
        shape = list(x.shape[:2])
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
            span = size + 2 * p - d * (k - 1) - 1
            length = (span + (s - 1 if ceil else 0)) // s + 1
            # With ceil_mode a last window that would start in the right padding is dropped.
            length -= bool(ceil and (length - 1) * s >= size + p)
            if length < 1:
                return None
            shape.append(length)
        return _empty(shape, x)

    return makes


def max_pooled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the outputs of a maximum pooling."""
    out = pooled(5, 4)(args, kwargs)
    return None if out is None else (out, torch.empty(out.shape, dtype=torch.int64, device=META))


def joined(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of a concatenation."""
    tensors = args[0]
    first = tensors[0]
    dim = (args[1] if len(args) > 1 else 0) % first.dim()
    if any(t.dim() != first.dim() or t.dtype != first.dtype for t in tensors):
        return None
    rest = [n for d, n in enumerate(first.shape) if d != dim]
    if any([n for d, n in enumerate(t.shape) if d != dim] != rest for t in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _empty(shape, first)


def copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of a copy."""
    x = args[0]
    if kwargs.get("memory_format") is torch.contiguous_format:
        return torch.empty(x.shape, dtype=x.dtype, device=META)
    return _empty(x.shape, x) if not kwargs else None


def converted(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the output of a conversion of the type or the device."""
    # A model that moves its input to the device of its weights must not make a real tensor of it.
    x = args[0]
    out = _empty(x.shape, x)
    return out if kwargs.get("dtype") in (None, x.dtype) else out.to(kwargs["dtype"])
