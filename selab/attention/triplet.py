"""Triplet Attention."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from selab.attention.base import Gate, MapBlock, initialise_layers, odd_kernel_size
from selab.attention.config import Init


class Plane(nn.Module):
    """sigmoid(bn(conv([largest, mean]))), one gate per place of a plane.

    Shapes: largest and mean (N, A, B), to (N, A, B).

    Args:
        kernel_size: of the convolution, odd.
        init: `he` or `identity`.
    """

    def __init__(self, kernel_size: int, init: Init) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        self.gate = Gate(init)
        initialise_layers("he", last=(self.conv,))
        if init == "identity":
            nn.init.zeros_(self.bn.weight)

    @property
    def macs(self) -> int:
        """MACs per place."""
        return self.conv.weight.numel() + 1 + self.gate.macs

    # torch.jit.script compiles properties as well.
    __jit_unused_properties__: ClassVar = ["macs"]

    def forward(self, largest: Tensor, mean: Tensor) -> Tensor:
        """Two times (N, A, B) to (N, A, B)."""
        gate: Tensor = self.gate(self.bn(self.conv(torch.stack((largest, mean), 1))))
        return gate[:, 0]


class TripletAttention(MapBlock):
    """x times the mean of three gates, each from maximum and mean over one of height, width and channels.

    A gate is sigmoid(bn(conv([max, mean]))) over the plane of the two other dimensions.

    Shapes: input and output (N, C, H, W) or (C, H, W); the planes (N, 2, C, W), (N, 2, C, H) and (N, 2, H, W).

    `he` draws the convolutions by He. For `identity` the scales of the batch normalisations start at zero; the
    convolutions follow from the second step on.

    Args:
        channels: C.
        kernel_size: of the convolutions, odd.
        init: `he` or `identity`.

    Raises:
        InsertionError: a kernel size that is even or below 1.

    Source: arXiv 2010.03045, Sec. 3. Batch normalisation (momentum 0.01) behind convolutions without bias is that of
    the release, landskape-ai/triplet-attention; there the three gated maps are averaged, here the gates.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, init: Init = "he") -> None:
        super().__init__(channels, init)
        size = odd_kernel_size(kernel_size)
        self.over_height = Plane(size, init)
        self.over_width = Plane(size, init)
        self.over_channels = Plane(size, init)

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of six squeezes; convolution, norm and gate of three planes; two sums, mean and scale."""
        places = self.channels * (height + width) + height * width
        return 10 * self.channels * height * width + places * self.over_height.macs

    def _gated(self, x: Tensor) -> Tensor:
        columns = self.over_height(x.amax(2), x.mean(2))[:, :, None]
        rows = self.over_width(x.amax(3), x.mean(3))[:, :, :, None]
        positions = self.over_channels(x.amax(1), x.mean(1))[:, None]
        gated: Tensor = x * ((columns + rows + positions) / 3)
        return gated
