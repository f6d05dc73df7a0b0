"""Global Response Normalisation of ConvNeXt V2."""

import torch
from torch import Tensor, nn

from selab.attention.base import MapBlock
from selab.attention.config import Init


class GRN(MapBlock):
    """x * (1 + weight * n) + bias, where n is each channel's norm over the positions by the mean of these norms.

    Shapes: input and output (N, C, H, W) or (C, H, W); the norms (N, C, 1, 1).

    Both parameters start at zero, as in the paper, so the block starts as the identity with either `init`.

    Args:
        channels: C.
        init: `he` or `identity`.

    Source: arXiv 2301.00808, Sec. 3, Global Response Normalization, and Algorithm 1 (1e-6 is added to the mean). There
    x itself is added to the normalised map; here both are one factor.
    """

    def __init__(self, channels: int, *, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of the norms, their mean and quotient, and the scale and shift of the map."""
        return (3 * height * width + 4) * self.channels + 1

    def _gated(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        share = norms / (norms.mean(1, keepdim=True) + 1e-6)
        factor = 1 + self.weight[:, None, None] * share
        # Under autocast the map may be of another type than the parameters.
        y: Tensor = x * factor.to(x.dtype) + self.bias[:, None, None].to(x.dtype)
        return y
