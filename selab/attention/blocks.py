"""Attention blocks to compare Squeeze-and-Excitation with.

Squeezes are plain reductions instead of adaptive pooling, which returned NaN in half precision with channels last
(pytorch issue 43992).

Each block with parameters can start as the identity, bit for bit, and still learn. The layer before a gate starts at
zero, and the gate is doubled, so that it is one there with a non-zero slope. The factor is a buffer, so that a
checkpoint without it does not load unnoticed. As with every layer that starts at zero, the first step changes that
layer only; the layers before it follow from the second step on.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.base import Gate, MapBlock, check_whole, initialise_layers, odd_kernel_size, reduced
from selab.attention.config import Init
from selab.errors import InsertionError


class ECA(MapBlock):
    """x * sigmoid(conv1d(mean(x))), the convolution going across neighbouring channels: Efficient Channel Attention.

    Shapes: input and output (N, C, H, W) or (C, H, W); the convolution runs on (N, 1, C).

    `he` draws the weights by He; the convolution has no bias.

    Args:
        channels: C.
        kernel_size: odd; None for the paper's adaptive size, the odd number nearest to (log2(C) + 1) / 2.
        init: `he` or `identity`.

    Raises:
        InsertionError: a kernel size that is even or below 1.

    Source: arXiv 1910.03151, eq. 9, eq. 12 (the size, with gamma 2 and b 1) and Fig. 3 (what is halfway goes up: 2048
    channels have 7). The 80 parameters of the paper's ResNet-50 would be 16 blocks of size 5; by this rule it has 86.
    The authors' release, BangguWu/ECANet, takes 3 where no size is given.
    """

    def __init__(self, channels: int, *, kernel_size: int | None = None, init: Init = "he") -> None:
        super().__init__(channels, init)
        size = int((math.log2(channels) + 1) / 2) | 1 if kernel_size is None else odd_kernel_size(kernel_size)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.gate = Gate(init)
        initialise_layers(init, last=(self.conv,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of squeeze, convolution, gate and scale."""
        return 2 * self.channels * height * width + (self.conv.kernel_size[0] + self.gate.macs) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.conv(x.mean((2, 3))[:, None]))
        return x * gate[:, 0, :, None, None]


class CBAM(MapBlock):
    """y = x * sigmoid(mlp(mean(x)) + mlp(max(x))), then y * sigmoid(bn(conv([max(y), mean(y)]))).

    The Convolutional Block Attention Module: a gate per channel from mean and maximum over the positions, then a
    gate per position from maximum and mean over the channels.

    Shapes: input and output (N, C, H, W) or (C, H, W); between the two layers of the mlp (N, squeeze_channels); the
    convolution takes (N, 2, H, W) to (N, 1, H, W).

    `he` draws the weights by He with zero biases. The scale of the batch normalisation starts at zero, as in the
    authors' release, so that all positions start alike and the convolution follows from the second step on.

    Args:
        channels: C.
        reduction: C / squeeze_channels, before rounding down.
        kernel_size: of the convolution, odd; the paper compares 3 and 7.
        init: `he` or `identity`.

    Raises:
        InsertionError: a reduction below 1 or larger than C, a kernel size that is even or below 1.

    Source: arXiv 1807.06521, eq. 1-3 and Fig. 2. Batch normalisation (momentum 0.01) instead of a bias, the order of
    maximum and mean, and the biases of the mlp are those of the release, Jongchan/attention-module, MODELS/cbam.py.
    """

    squeeze_channels: int

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.squeeze_channels = reduced(channels, reduction)
        self.fc1 = nn.Linear(channels, self.squeeze_channels)
        self.fc2 = nn.Linear(self.squeeze_channels, channels)
        self.conv = nn.Conv2d(2, 1, odd_kernel_size(kernel_size), padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)
        self.gate = Gate(init)
        initialise_layers(init, self.fc1, self.conv, last=(self.fc2,))
        nn.init.zeros_(self.bn.weight)

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of both gates: squeezes, mlp, gate, scale; squeezes, convolution, norm, gate, scale."""
        mlp = 2 * self.channels * self.squeeze_channels + self.squeeze_channels
        per_position = 6 * self.channels + self.conv.weight.numel() + 1 + self.gate.macs
        return 2 * mlp + (1 + self.gate.macs) * self.channels + per_position * height * width

    def _gated(self, x: Tensor) -> Tensor:
        from_mean = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        from_max = self.fc2(F.relu(self.fc1(x.amax((2, 3)))))
        x = x * self.gate(from_mean + from_max)[:, :, None, None]
        squeezed = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        positions: Tensor = self.gate(self.bn(self.conv(squeezed)))
        return x * positions


class CoordinateAttention(MapBlock):
    """x * sigmoid(conv_w(z's columns)) * sigmoid(conv_h(z's rows)), with z = hardswish(bn(conv1([rows, columns]))).

    For each channel a gate per row and a gate per column, all from the means of the rows and of the columns.

    Shapes: input and output (N, C, H, W) or (C, H, W); squeezed (N, C, H + W, 1); z (N, squeeze_channels, H + W, 1).

    `he` draws the weights by He with zero biases. The parameters have the names of the authors' release.

    Args:
        channels: C.
        reduction: C / squeeze_channels, before rounding down; squeeze_channels is at least 8.
        init: `he` or `identity`.

    Raises:
        InsertionError: a reduction below 1.

    Source: arXiv 2103.02907, eq. 4-9 and Fig. 2c. The least width of 8, the biases and the h-swish are those of the
    release, houqb/CoordAttention, coordatt.py.
    """

    squeeze_channels: int

    def __init__(self, channels: int, *, reduction: int = 32, init: Init = "he") -> None:
        super().__init__(channels, init)
        check_whole(reduction=reduction)
        if reduction < 1:
            raise InsertionError(f"reduction {reduction}: must be at least 1")
        self.squeeze_channels = max(8, channels // reduction)
        self.conv1 = nn.Conv2d(channels, self.squeeze_channels, 1)
        self.bn1 = nn.BatchNorm2d(self.squeeze_channels)
        self.conv_h = nn.Conv2d(self.squeeze_channels, channels, 1)
        self.conv_w = nn.Conv2d(self.squeeze_channels, channels, 1)
        self.gate = Gate(init)
        initialise_layers(init, self.conv1, last=(self.conv_h, self.conv_w))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of two squeezes and scales, and of layers, norm, activation and gate per row and column."""
        per_line = 2 * (self.channels + 1) * self.squeeze_channels + self.gate.macs * self.channels
        return 4 * self.channels * height * width + per_line * (height + width)

    def _gated(self, x: Tensor) -> Tensor:
        squeezed = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)), 2)
        z = F.hardswish(self.bn1(self.conv1(squeezed)))
        height = x.shape[2]
        columns: Tensor = self.gate(self.conv_w(z[:, :, height:].transpose(2, 3)))
        rows: Tensor = self.gate(self.conv_h(z[:, :, :height]))
        return x * columns * rows


class SSE(MapBlock):
    """x * sigmoid(conv(x)), one factor per position from a 1x1 convolution to one channel: spatial SE.

    Shapes: input and output (N, C, H, W) or (C, H, W); the factors (N, 1, H, W).

    `he` draws the weights by He with zero bias.

    Args:
        channels: C.
        init: `he` or `identity`.

    Source: arXiv 1803.02579, section 2.2, sSE. The bias is that of the authors' release, ai-med/squeeze_and_excitation.
    """

    def __init__(self, channels: int, *, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.conv = nn.Conv2d(channels, 1, 1)
        self.gate = Gate(init)
        initialise_layers(init, last=(self.conv,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of convolution, gate and scale."""
        return (2 * self.channels + self.gate.macs) * height * width

    def _gated(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.conv(x))
        return x * gate


class SCSE(MapBlock):
    """x * (sigmoid(fc2(relu(fc1(mean(x))))) + sigmoid(conv(x))): concurrent spatial and channel SE.

    Shapes: input and output (N, C, H, W) or (C, H, W); between the two layers (N, squeeze_channels); the factors
    (N, C, 1, 1) and (N, 1, H, W).

    `he` draws the weights by He with zero biases. Two gates at one half add up to one, so `identity` stretches nothing.

    Args:
        channels: C.
        reduction: C / squeeze_channels, before rounding down.
        init: `he` or `identity`.

    Raises:
        InsertionError: a reduction below 1 or larger than C.

    Source: arXiv 1803.02579, section 2.3, scSE: the sum of the two gated maps. The authors' release,
    ai-med/squeeze_and_excitation, takes the larger of the two, an alternative of their later paper, arXiv 1808.08127;
    the biases are those of the release.
    """

    squeeze_channels: int

    def __init__(self, channels: int, *, reduction: int = 2, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.squeeze_channels = reduced(channels, reduction)
        self.fc1 = nn.Linear(channels, self.squeeze_channels)
        self.fc2 = nn.Linear(self.squeeze_channels, channels)
        self.conv = nn.Conv2d(channels, 1, 1)
        initialise_layers(init, self.fc1, last=(self.fc2, self.conv))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of squeeze, two layers, activation, gate; convolution, gate; sum of the gates, scale."""
        per_channel = 2 * self.channels * self.squeeze_channels + self.squeeze_channels + self.channels
        return per_channel + (4 * self.channels + 1) * height * width

    def _gated(self, x: Tensor) -> Tensor:
        channel = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        # Add the gates before scaling: half of the smallest number, twice, would be zero.
        gate: Tensor = channel + self.conv(x).sigmoid()
        return x * gate


class GatherExcite(MapBlock):
    """x * upsample(sigmoid(average pooling of x)): Gather-Excite without parameters, the paper's GE-θ⁻.

    With parameters it is `GETheta` and `GEThetaPlus`.

    Shapes: input and output (N, C, H, W) or (C, H, W); gathered (N, C, ceil(H / extent), ceil(W / extent)), or
    (N, C, 1, 1).

    There are no parameters, so the block cannot start as the identity.

    Args:
        channels: C.
        extent: windows of 2 * extent - 1 positions at every extent-th position, padding left out of the mean; 0 gathers
            the whole feature map.
        init: `he` only.

    Raises:
        InsertionError: an extent below 0, or `init="identity"`.

    Source: arXiv 1810.12348, section 2 (windows, resizing by nearest neighbour) and section 3.1 (the mean, and extents
    of 2, 4, 8 and global). Nearest neighbour only copies, so here the sigmoid goes first, over fewer positions.
    """

    def __init__(self, channels: int, *, extent: int = 0, init: Init = "he") -> None:
        super().__init__(channels, init)
        if init == "identity":
            raise InsertionError(
                "init 'identity': gather_excite without parameters cannot start as the identity; use init 'he'"
            )
        check_whole(extent=extent)
        if extent < 0:
            raise InsertionError(f"extent {extent}: must be at least 1, or 0 for the whole feature map")
        self.extent = extent

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of windows, gate and scale."""
        if self.extent == 0:
            return (2 * height * width + 1) * self.channels
        gathered = -(-height // self.extent) * -(-width // self.extent)
        return (((2 * self.extent - 1) ** 2 + 1) * gathered + height * width) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        if self.extent == 0:
            return x * x.mean((2, 3), keepdim=True).sigmoid()
        size, reach = 2 * self.extent - 1, self.extent - 1
        gathered = F.avg_pool2d(x, size, self.extent, reach, count_include_pad=False)
        return x * F.interpolate(gathered.sigmoid(), size=x.shape[2:], mode="nearest")

    def extra_repr(self) -> str:
        """Return channels and extent, for printing."""
        return f"{self.channels}, extent={self.extent}"


class ESE(MapBlock):
    """x * hardsigmoid(fc(mean(x))): effective SE, one layer from C to C, without a bottleneck.

    Shapes: input and output (N, C, H, W) or (C, H, W); squeezed (N, C).

    `he` draws the weights by He, as the authors' release does, with zero biases.

    Args:
        channels: C.
        init: `he` or `identity`.

    Source: arXiv 1911.06667, the eSE of its VoVNetV2. The bias and the hard sigmoid, relu6(x + 3) / 6, are those of the
    release, youngwanLEE/vovnet-detectron2, vovnet/vovnet.py; the paper writes a sigmoid.
    """

    def __init__(self, channels: int, *, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.fc = nn.Linear(channels, channels)
        self.gate = Gate(init, hard=True)
        initialise_layers(init, last=(self.fc,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of squeeze, layer, gate and scale."""
        return (self.channels + self.gate.macs + 2 * height * width) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.fc(x.mean((2, 3))))
        return x * gate[:, :, None, None]
