"""Memory formats of feature maps (N, C, H, W): contiguous or channels last."""

import torch
from torch import Tensor


def is_channels_last(y: Tensor) -> bool:
    """Return whether a tensor is channels last and not also contiguous (as with C = 1 or H * W = 1)."""
    return not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)


def is_dense(y: Tensor) -> bool:
    """Return whether a tensor is contiguous or channels last."""
    return y.is_contiguous() or is_channels_last(y)


def laid_out(x: Tensor, y: Tensor) -> Tensor:
    """Return x in the memory format of y: channels last if y is, else contiguous."""
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(y) else torch.contiguous_format)


def empty_map(y: Tensor) -> Tensor:
    """Return an uninitialised tensor with the strides of y, contiguous if y is neither contiguous nor channels last."""
    return torch.empty_like(y) if is_dense(y) else torch.empty_like(y, memory_format=torch.contiguous_format)


def stored(x: Tensor, y: Tensor) -> Tensor:
    """Return x with the dtype and strides of a result for y; x itself if it has them."""
    like = empty_map(y)
    return x if x.dtype == like.dtype and x.stride() == like.stride() else like.copy_(x)
