"""Memory formats of maps: (N, C, H, W), contiguous or channels last."""

import torch
from torch import Tensor


def is_channels_last(y: Tensor) -> bool:
    """Whether a map's channels lie next to each other; of those that lie both ways (C or H * W is 1), no."""
    return not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)


def is_dense(y: Tensor) -> bool:
    """Whether a map is contiguous or channels last."""
    return y.is_contiguous() or is_channels_last(y)


def laid_out(x: Tensor, y: Tensor) -> Tensor:
    """A map in the memory format of y: channels last if y has it, else contiguous."""
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(y) else torch.contiguous_format)


def empty_map(y: Tensor) -> Tensor:
    """An empty map with y's strides, or a contiguous one if y is neither contiguous nor channels last."""
    return torch.empty_like(y) if is_dense(y) else torch.empty_like(y, memory_format=torch.contiguous_format)


def stored(x: Tensor, y: Tensor) -> Tensor:
    """A computed map in the type and the strides that a result for y has: x itself if it has them."""
    like = empty_map(y)
    return x if x.dtype == like.dtype and x.stride() == like.stride() else like.copy_(x)
