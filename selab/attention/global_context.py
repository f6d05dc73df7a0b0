"""The Global Context block."""

import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.base import MapBlock, initialise_layers, reduced
from selab.attention.config import Init


class GlobalContext(MapBlock):
    """x + fc2(relu(norm(fc1(c)))), where c is the mean of the positions, weighted by softmax(conv(x)).

    Shapes: input and output (N, C, H, W) or (C, H, W); the weights (N, 1, H W); c (N, C); between the layers
    (N, squeeze_channels).

    `he` draws the other layers by He with zero biases. The last layer starts at zero, as in the authors' release, so
    the block starts as the identity with either `init`.

    Args:
        channels: C.
        reduction: C / squeeze_channels, before rounding down.
        init: `he` or `identity`.

    Raises:
        InsertionError: a reduction below 1 or larger than C.

    Source: arXiv 1904.11492, Sec. 3.3, Global Context Block. The start at zero is that of the release, xvjiarui/GCNet,
    whose layers are 1x1 convolutions.
    """

    squeeze_channels: int

    def __init__(self, channels: int, *, reduction: int = 16, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.squeeze_channels = reduced(channels, reduction)
        self.conv = nn.Conv2d(channels, 1, 1)
        self.fc1 = nn.Linear(channels, self.squeeze_channels)
        self.norm = nn.LayerNorm(self.squeeze_channels)
        self.fc2 = nn.Linear(self.squeeze_channels, channels)
        initialise_layers("identity", self.conv, self.fc1, last=(self.fc2,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of convolution, softmax, weighted mean, two layers, norm, activation and sum."""
        layers = (2 * self.channels + 4) * self.squeeze_channels
        return (3 * self.channels + 3) * height * width + layers

    def _gated(self, x: Tensor) -> Tensor:
        weights = self.conv(x).flatten(2).softmax(2)
        context = (x.flatten(2) @ weights.transpose(1, 2))[:, :, 0]
        added: Tensor = self.fc2(F.relu(self.norm(self.fc1(context))))
        return x + added[:, :, None, None]
