"""Efficient Local Attention."""

import math

import torch
from torch import Tensor, nn

from selab.attention.base import Gate, MapBlock, initialise_layers, odd_kernel_size
from selab.attention.config import Init

_GROUPS = 16


class ELA(MapBlock):
    """x * gate(rows) * gate(columns), where a gate is sigmoid(norm(conv1d(means))), one convolution for both.

    For each channel a gate per row and a gate per column, each from its neighbours of the same channel.

    Shapes: input and output (N, C, H, W) or (C, H, W); the means (N, C, H) and (N, C, W).

    `he` draws the convolution by He. For `identity` the scale of the group normalisation starts at zero; the
    convolution follows from the second step on.

    Args:
        channels: C; the normalisation has 16 groups, or the largest common divisor of 16 and C.
        kernel_size: of the convolution along rows and columns, odd; the paper's ELA-B has 7, ELA-T 5.
        init: `he` or `identity`.

    Raises:
        InsertionError: a kernel size that is even or below 1.

    Source: arXiv 2403.01123, Sec. 3: a convolution with one group per channel and without a bias, and group
    normalisation with 16 groups.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, init: Init = "he") -> None:
        super().__init__(channels, init)
        size = odd_kernel_size(kernel_size)
        self.conv = nn.Conv1d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
        self.gate = Gate(init)
        initialise_layers("he", last=(self.conv,))
        if init == "identity":
            nn.init.zeros_(self.norm.weight)

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of two squeezes and scales, and of convolution, norm and gate per row and column."""
        per_line = self.conv.kernel_size[0] + 3 + self.gate.macs
        return (4 * height * width + per_line * (height + width)) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        return x * self._lines(x.mean(3))[:, :, :, None] * self._lines(x.mean(2))[:, :, None]

    def _lines(self, means: Tensor) -> Tensor:
        norm = self.norm
        # As the module's own forward, which refuses a group of one value in training.
        normed = torch.group_norm(self.conv(means), norm.num_groups, norm.weight, norm.bias, norm.eps)
        gate: Tensor = self.gate(normed)
        return gate
