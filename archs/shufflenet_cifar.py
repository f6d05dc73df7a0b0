"""ShuffleNet V1 for 32x32 images: its stem keeps the resolution, and its stages halve it three times.

Source: Zhang et al. 2017, arXiv 1707.01083, Fig. 2 and Table 1, with 3 groups at scale 1x. The paper has no network for
CIFAR: the stem without stride and without pooling is this project's own adaptation.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU, initialise_he
from .shufflenet import ResidualUnit, stage

_GROUPS = 3
_STEM_CHANNELS = 24


class CIFARShuffleNetV1(nn.Module):
    """logits = head(stage4(stage3(stage2(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32x32 after the stem and 16, 8 and 4 pixels wide after
    stages 2, 3 and 4.

    Weights: as the ShuffleNet for ImageNet starts: convolutions from a normal distribution of variance 2/fan_out, BN at
    scale 1 and shift 0, the classifier's bias at 0 and its weights from PyTorch's own start.

    Args:
        num_classes: Width of the classifier.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, _STEM_CHANNELS, kernel_size=3)
        # Units and channels of arXiv 1707.01083, Table 1, g = 3. The stem has so few channels that the paper does not
        # group the convolution that reads them (Sec. 3.3).
        self.stage2 = stage(_STEM_CHANNELS, 240, units=4, groups=_GROUPS, first_groups=1)
        self.stage3 = stage(240, 480, units=8, groups=_GROUPS, first_groups=_GROUPS)
        self.stage4 = stage(480, 960, units=4, groups=_GROUPS, first_groups=_GROUPS)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(960, num_classes),
            )
        )
        initialise_he(self, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage4(self.stage3(self.stage2(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists the 13 stride-1 units, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, ResidualUnit)]}


def shufflenet_cifar(*, num_classes: int = 10) -> CIFARShuffleNetV1:
    """Build a ShuffleNet V1 for CIFAR, 1x with 3 groups: 914,338 parameters and 42,590,592 MACs at 32x32.

    Args:
        num_classes: Width of the classifier.

    Raises:
        ValueError: If num_classes is below 1.

    Source: arXiv 1707.01083, Table 1; the size for 32x32 images: this project's own.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    return CIFARShuffleNetV1(num_classes)
