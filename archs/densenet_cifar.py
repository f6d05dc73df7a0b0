"""DenseNet for 32x32 images: three dense blocks of equal depth behind a 3x3 convolution.

Source: Huang et al. 2017, arXiv 1608.06993, Sec. 3, "Implementation Details", and Table 2.
"""

from collections import OrderedDict

from torch import nn

from .densenet import DenseNet

_BLOCKS = 3
# The stem of a DenseNet without bottlenecks; with bottlenecks it has twice the growth rate.
_PLAIN_STEM_CHANNELS = 16


def densenet_cifar(depth: int, growth_rate: int, *, num_classes: int = 10, bottleneck: bool = True) -> DenseNet:
    """Build a DenseNet for CIFAR; the DenseNet-BC of depth 100 and growth rate 12 has 769,162 parameters.

    32x32 images are 32x32 after the stem and 16, 8 and 8 pixels wide after stages 1 to 3.

    Args:
        depth: 6n + 4 with bottlenecks (100, 190, 250), 3n + 4 without (40, 100).
        growth_rate: Channels that each layer adds, 1 or more.
        num_classes: Width of the classifier.
        bottleneck: True is the paper's DenseNet-BC: a 1x1 before each 3x3, and transitions that halve the channels.
            False is its first DenseNet, whose transitions keep them.

    Raises:
        ValueError: If depth does not fit the layers, or growth_rate or num_classes is below 1.

    Source: arXiv 1608.06993, Sec. 3.
    """
    per_layer = 2 * _BLOCKS if bottleneck else _BLOCKS
    if depth < per_layer + 4 or (depth - 4) % per_layer:
        words = "with" if bottleneck else "without"
        raise ValueError(f"depth is {depth!r}: {words} bottlenecks it must be {per_layer}n + 4")
    if growth_rate < 1:
        raise ValueError(f"growth_rate is {growth_rate!r}: it must be 1 or more")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    channels = 2 * growth_rate if bottleneck else _PLAIN_STEM_CHANNELS
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)))
    layers = (depth - 4) // per_layer
    return DenseNet(
        stem,
        channels,
        (layers,) * _BLOCKS,
        growth_rate,
        num_classes,
        bottleneck=bottleneck,
        compression=0.5 if bottleneck else 1.0,
    )
