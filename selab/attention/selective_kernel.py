"""The Selective Kernel block."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.base import MapBlock, check_whole, initialise_layers
from selab.attention.config import Init
from selab.errors import InsertionError

_LEAST_WIDTH = 32
# The last of so many branches has taps 16 positions apart; the paper has two or three.
_MOST_BRANCHES = 16


class SelectiveKernel(MapBlock):
    """The sum of branches relu(bn(conv(x))) of growing reach, weighted per channel by a softmax over the branches.

    The weights are softmax(fc2(relu(bn(fc1(mean(u)))))), where u is the plain sum of the branches. The convolutions
    are 3x3, that of the n-th branch with dilation n.

    Shapes: input and output (N, C, H, W) or (C, H, W); each branch (N, C, H, W); between the two layers
    (N, squeeze_channels); the weights (N, branches, C).

    `he` draws convolutions and layers by He; none has a bias. What comes behind a ReLU is never negative, so the
    block cannot start as the identity.

    In training, the batch normalisation between the layers needs two images or more, and torch says so.

    Args:
        channels: C.
        branches: their number, from 2 to 16.
        groups: of the convolutions; where it does not divide C, their largest common divisor.
        reduction: C / squeeze_channels, before rounding down; squeeze_channels is at least 32.
        init: `he` only.

    Raises:
        InsertionError: a number of branches outside that range, groups or a reduction below 1, or `init="identity"`.

    Source: arXiv 1903.06586, Sec. 3.1 (eq. 1-6; the least width is its L) and Sec. 3.2 (2 branches, 32 groups,
    reduction 16). Layers without biases are those of the release, implus/SKNet, models/sknet50.prototxt. There the
    block takes the place of a 3x3 convolution; here it is inserted, behind it with `placement="3x3"`.
    """

    squeeze_channels: int

    def __init__(
        self, channels: int, *, branches: int = 2, groups: int = 32, reduction: int = 16, init: Init = "he"
    ) -> None:
        super().__init__(channels, init)
        if init == "identity":
            raise InsertionError("init 'identity': sk ends in ReLUs and cannot start as the identity; use init 'he'")
        check_whole(branches=branches, groups=groups, reduction=reduction)
        if not 2 <= branches <= _MOST_BRANCHES:
            raise InsertionError(f"branches {branches}: must be from 2 to {_MOST_BRANCHES}")
        for name, value in (("groups", groups), ("reduction", reduction)):
            if value < 1:
                raise InsertionError(f"{name} {value}: must be at least 1")
        self.groups = math.gcd(groups, channels)
        self.squeeze_channels = max(_LEAST_WIDTH, channels // reduction)
        convs = [
            nn.Conv2d(channels, channels, 3, padding=reach, dilation=reach, groups=self.groups, bias=False)
            for reach in range(1, branches + 1)
        ]
        self.branches = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()) for conv in convs)
        self.fc1 = nn.Linear(channels, self.squeeze_channels, bias=False)
        self.bn = nn.BatchNorm1d(self.squeeze_channels)
        self.fc2 = nn.Linear(self.squeeze_channels, branches * channels, bias=False)
        initialise_layers("he", *convs, self.fc1, last=(self.fc2,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of branches, their sum, squeeze, two layers, norm, activation, softmax and weighted sum."""
        branches = len(self.branches)
        # Convolution, norm, activation and scale of each; two sums; the squeeze.
        per_value = branches * (9 * (self.channels // self.groups) + 3) + 2 * (branches - 1) + 1
        layers = ((1 + branches) * self.channels + 2) * self.squeeze_channels
        return per_value * self.channels * height * width + layers + 3 * branches * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for branch in self.branches:
            maps.append(branch(x))  # noqa: PERF401 - torch.jit.script compiles no comprehension over modules
        total = maps[0]
        for other in maps[1:]:
            total = total + other
        hidden = F.relu(self.bn(self.fc1(total.mean((2, 3)))))
        # Autocast may compute a softmax in another type.
        weights: Tensor = self.fc2(hidden).unflatten(1, (len(maps), self.channels)).softmax(1).to(x.dtype)
        y = maps[0] * weights[:, 0, :, None, None]
        for i in range(1, len(maps)):
            y = y + maps[i] * weights[:, i, :, None, None]
        return y

    def extra_repr(self) -> str:
        """Return widths and groups, for printing."""
        return f"{super().extra_repr()}, groups={self.groups}"
