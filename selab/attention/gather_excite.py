"""Gather-Excite with parameters."""

import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.base import Gate, MapBlock, check_whole, initialise_layers, reduced
from selab.attention.config import Init
from selab.errors import InsertionError


class GETheta(MapBlock):
    """x * upsample(sigmoid(gather(x))): Gather-Excite whose gather has parameters, the paper's GE-θ.

    The gather halves height and width log2(extent) times. Each time is a depth-wise 3x3 convolution with stride 2 and
    a batch normalisation; a ReLU stands between two times.

    Shapes: input and output (N, C, H, W) or (C, H, W); gathered (N, C, ceil(H / extent), ceil(W / extent)).

    `he` draws the convolutions by He; they have no biases. For `identity` the scale of the last batch normalisation
    starts at zero; what comes before it follows from the second step on.

    In training, a batch normalisation needs more than one value per channel: two images or more where only one
    position is gathered. Otherwise torch raises a ValueError.

    Args:
        channels: C.
        extent: a power of two, at least 2. The paper compares 2, 4, 8 and the whole feature map, which needs a
            convolution of the size of that map; a block does not know the size.
        init: `he` or `identity`.

    Raises:
        InsertionError: an extent that is not a power of two, at least 2.

    Source: arXiv 1810.12348, section 2 (resizing by nearest neighbour) and section 3.2 (depth-wise convolutions).
    Batch normalisation instead of biases is that of the authors' release, hujie-frank/GENet, models/RN50-GEP.prototxt,
    which gathers whole feature maps. The ReLU between two convolutions is that of timm, layers/gather_excite.py.
    Nearest neighbour only copies, so here the sigmoid goes first, over fewer positions.
    """

    def __init__(self, channels: int, *, extent: int = 8, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.extent = extent
        self.gather, last = _gather(channels, extent)
        self.gate = Gate(init)
        if init == "identity":
            nn.init.zeros_(last.weight)

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of convolutions, norms, activations, gate and scale."""
        gathering, positions = _gather_cost(self.gather, height, width)
        return (height * width + gathering + self.gate.macs * positions) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        return x * F.interpolate(self.gate(self.gather(x)), size=x.shape[2:], mode="nearest")

    def extra_repr(self) -> str:
        """Return channels and extent, for printing."""
        return f"{super().extra_repr()}, extent={self.extent}"


class GEThetaPlus(MapBlock):
    """x * upsample(sigmoid(fc2(relu(fc1(relu(gather(x))))))): GE-θ with the two layers of SE, the paper's GE-θ⁺.

    The gather is that of `GETheta`; the layers are 1x1 convolutions.

    Shapes: input and output (N, C, H, W) or (C, H, W); gathered (N, C, ceil(H / extent), ceil(W / extent)), between
    the layers with squeeze_channels instead of C.

    `he` draws the weights by He with zero biases.

    In training, a batch normalisation needs more than one value per channel: two images or more where only one
    position is gathered. Otherwise torch raises a ValueError.

    Args:
        channels: C.
        extent: a power of two, at least 2, as of `GETheta`.
        reduction: C / squeeze_channels, before rounding down.
        init: `he` or `identity`.

    Raises:
        InsertionError: an extent that is not a power of two, at least 2, or a reduction below 1 or larger than C.

    Source: arXiv 1810.12348, section 3.2. The ReLU behind the gather, the biases and the reduction of 16 are those of
    the authors' release, hujie-frank/GENet, models/RN50-GEPP.prototxt.
    """

    squeeze_channels: int

    def __init__(self, channels: int, *, extent: int = 8, reduction: int = 16, init: Init = "he") -> None:
        super().__init__(channels, init)
        self.squeeze_channels = reduced(channels, reduction)
        self.extent = extent
        self.gather, _ = _gather(channels, extent)
        self.fc1 = nn.Conv2d(channels, self.squeeze_channels, 1)
        self.fc2 = nn.Conv2d(self.squeeze_channels, channels, 1)
        self.gate = Gate(init)
        initialise_layers(init, self.fc1, last=(self.fc2,))

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of convolutions, norms, activations, two layers, gate and scale."""
        gathering, positions = _gather_cost(self.gather, height, width)
        layers = 2 * self.channels * self.squeeze_channels + self.squeeze_channels + self.channels
        return (height * width + gathering + self.gate.macs * positions) * self.channels + layers * positions

    def _gated(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(F.relu(self.gather(x))))
        return x * F.interpolate(self.gate(self.fc2(hidden)), size=x.shape[2:], mode="nearest")

    def extra_repr(self) -> str:
        """Return widths and extent, for printing."""
        return f"{super().extra_repr()}, extent={self.extent}"


def _gather(channels: int, extent: int) -> tuple[nn.Sequential, nn.BatchNorm2d]:
    """Return a gather with parameters and its last layer, (N, C, H, W) → (N, C, ceil(H / extent), ceil(W / extent)).

    Raises:
        InsertionError: an extent that is not a power of two, at least 2.
    """
    check_whole(extent=extent)
    if extent == 0:
        raise InsertionError(
            "extent 0: a convolution over the whole feature map needs its size, which a block does not know; use 2, 4 "
            "or 8, or gather_excite, without parameters"
        )
    if extent < 2 or extent & (extent - 1):
        raise InsertionError(f"extent {extent}: must be a power of two, at least 2")
    norms = [nn.BatchNorm2d(channels) for _ in range(int(extent).bit_length() - 1)]
    layers: list[nn.Module] = []
    for norm in norms:
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        initialise_layers("he", last=(conv,))
        layers += [nn.ReLU(), conv, norm] if layers else [conv, norm]
    return nn.Sequential(*layers), norms[-1]


def _gather_cost(gather: nn.Sequential, height: int, width: int) -> tuple[int, int]:
    """Return the MACs per channel of a gather, and how many positions it leaves."""
    macs = 0
    for layer in gather:
        if isinstance(layer, nn.Conv2d):
            height, width = -(-height // 2), -(-width // 2)
        macs += height * width * (9 if isinstance(layer, nn.Conv2d) else 1)
    return macs, height * width
