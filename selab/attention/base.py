"""The base class of attention blocks."""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.config import Init
from selab.errors import InsertionError, ModelError


class Attention(nn.Module, ABC):
    """Base class of attention blocks, which gate a feature map: (N, C, H, W) → (N, C, H, W).

    A block of your own defines `forward` and `macs`; `selab.insert_se(block="path/to/file.py:Class")` inserts it.

    Attributes:
        channels: C.
        squeeze_channels: the width of the bottleneck; None if there is none.
        inserted: whether `insert_se` inserted the block, so that `remove_se` may remove it.

    Args:
        channels: C.
        init: `he` or `identity`.

    Raises:
        InsertionError: channels below 1, or an unknown `init`.
    """

    inserted: bool = False
    # torch.ao.quantization leaves a block and its layers in floating point.
    qconfig: ClassVar[None] = None
    # Whether `selab.fuse` has changed the network since the block was inserted.
    was_fused: bool = False
    # Whether `insert_se` made it the last child of an `nn.Sequential`.
    ends_sequence: bool = False
    # How many names the path of its site is shorter than its own path; 0 if that is not known.
    site_depth: int = 0
    # The path of the BatchNorm that read its output when it was inserted; a leading dot for each name to go up from
    # the block's own path.
    norm_behind: str = ""

    def __init__(self, channels: int, init: Init = "he") -> None:
        super().__init__()
        check_whole(channels=channels)
        if channels < 1:
            raise InsertionError(f"channels {channels}: must be at least 1")
        if init not in ("he", "identity"):
            raise InsertionError(f"init {init!r}: allowed: he, identity")
        self.channels = channels
        self.squeeze_channels: int | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""

    @abstractmethod
    def macs(self, height: int, width: int) -> int:
        """Return the MACs of one image in eval mode, by the convention `all` of `selab.cost.count`."""

    def extra_repr(self) -> str:
        """Return the widths, for printing."""
        return str(self.channels) + ("" if self.squeeze_channels is None else f" → {self.squeeze_channels}")


class MapBlock(Attention):
    """Base class of the blocks that also take one image without a batch dimension, as torch's convolutions do.

    Shapes: (N, C, H, W) → (N, C, H, W), or (C, H, W) → (C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) → the same shape.

        Raises:
            ModelError: any other shape.
        """
        # The proxy of a symbolic trace has no dimensions.
        quantised = isinstance(x, Tensor) and x.is_quantized
        y = x.dequantize() if quantised else x
        if isinstance(y, Tensor) and (y.dim() != 4 or has_other_width(y, self.channels)):
            gated = self._gated(batch_of_one(y, self.channels)).squeeze(0)
        else:
            gated = self._gated(y)
        return quantised_like(gated, x) if quantised else gated

    @abstractmethod
    def _gated(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""


def has_other_width(x: Tensor, channels: int) -> bool:
    """Return whether a feature map (N, C, H, W) has another number of channels.

    Without this, a block whose layers do not depend on the width would gate it.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return x.shape[1] != channels
    else:  # noqa: RET505 - the compiler skips this branch, not what follows the statement
        # A trace would warn that it cannot record the comparison.
        return torch._C._get_tracing_state() is None and x.shape[1] != channels


def quantised_like(y: Tensor, x: Tensor) -> Tensor:
    """Quantise the output of a block that gated a quantised feature map, by its own range.

    Args:
        y: floating point, any shape.
        x: the block's input, quantised.
    """
    return torch.quantize_per_tensor_dynamic(y, x.dtype, False)


def batch_of_one(x: Tensor, channels: int) -> Tensor:
    """Return the feature map of one image as a batch: (C, H, W) → (1, C, H, W).

    Means over the wrong dimensions of another tensor, such as (N, C, D, H, W), would gate it without an error.

    Args:
        x: not (N, C, H, W) with that many channels.
        channels: C.

    Raises:
        ModelError: x is not (C, H, W) with that many channels.
    """
    if x.dim() != 3 or x.shape[0] != channels:
        raise ModelError(
            f"attention block of width {channels}: expected a feature map (N, {channels}, H, W) or "
            f"({channels}, H, W), got the shape {list(x.shape)}; reshape it, or move the block to another place"
        )
    return x.unsqueeze(0)


class Gate(nn.Module):
    """sigmoid(x), or with `init="identity"` 2 * sigmoid(x), which is one at zero; `hard` is relu6(x + 3) / 6 instead.

    Shapes: any.
    """

    stretch: Tensor | None
    # torch.jit.script compiles properties as well.
    __jit_unused_properties__: ClassVar = ["macs"]

    def __init__(self, init: Init, *, hard: bool = False) -> None:
        super().__init__()
        self.hard = hard
        self.register_buffer("stretch", torch.tensor(2.0) if init == "identity" else None)

    @property
    def macs(self) -> int:
        """MACs per element."""
        return 1 if self.stretch is None else 2

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape."""
        gate = F.hardsigmoid(x) if self.hard else x.sigmoid()
        # torch.jit.script refines the type of a local name only.
        stretch = self.stretch
        return gate if stretch is None else gate * stretch


_Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def initialise_layers(init: Init, *layers: _Layer, last: tuple[_Layer, ...]) -> None:
    """Initialise layers by He with zero biases; for `identity`, the layers right before a gate with zeros."""
    for layer in (*layers, *last):
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if init == "identity":
        for layer in last:
            nn.init.zeros_(layer.weight)


def check_whole(**options: object) -> None:
    """Raise InsertionError if an option is not a whole number; `True` is none, although Python counts with it."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InsertionError(f"{name} {value!r}: must be a whole number, got {type(value).__name__}")


def reduced(channels: int, reduction: int) -> int:
    """Return the width between the two layers, `channels // reduction`, or raise InsertionError."""
    check_whole(reduction=reduction)
    if not 1 <= reduction <= channels:
        raise InsertionError(f"reduction {reduction}: must be from 1 to the number of channels, {channels}")
    return channels // reduction


def odd_kernel_size(kernel_size: int) -> int:
    """Return the kernel size, or raise InsertionError if it is even or below 1."""
    check_whole(kernel_size=kernel_size)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InsertionError(f"kernel_size {kernel_size}: must be odd and at least 1")
    return kernel_size
