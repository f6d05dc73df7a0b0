"""PP-LCNet: MobileNetV1's blocks with h-swish, 5x5 kernels late, and a wide layer behind the pooling, here without SE.

Source: Cui et al. 2021, arXiv 2109.15099, Table 1 and Sec. 3.
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import nn

from .mobilenet_v3 import ConvBNAct


class _Block(NamedTuple):
    """A row of the paper's table: kernel size, output channels at scale 1, stride."""

    kernel: int
    out: int
    stride: int


# arXiv 2109.15099, Table 1. A stage is a run of rows with the same number of output channels.
_STAGES = (
    (_Block(3, 32, 1),),
    (_Block(3, 64, 2), _Block(3, 64, 1)),
    (_Block(3, 128, 2), _Block(3, 128, 1)),
    (_Block(3, 256, 2), *(_Block(5, 256, 1),) * 5),
    (_Block(5, 512, 2), _Block(5, 512, 1)),
)
_STEM_CHANNELS = 16
_HEAD_CHANNELS = 1280
_DIVISOR = 8


def _scaled(channels: int, scale: float) -> int:
    """Round scale * channels to a multiple of 8, up where that would lose more than a tenth."""
    wanted = channels * scale
    rounded = max(_DIVISOR, int(wanted + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * wanted else rounded


class DepthwiseSeparable(nn.Sequential):
    """pointwise(depthwise(x)): a depthwise 3x3 or 5x5 and a 1x1, each with BN and h-swish.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Source: arXiv 2109.15099, Fig. 2, less the SE.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                depthwise=ConvBNAct(
                    in_channels, in_channels, kernel, stride=stride, groups=in_channels, hard_swish=True
                ),
                pointwise=ConvBNAct(in_channels, out_channels, 1, hard_swish=True),
            )
        )


class PPLCNet(nn.Sequential):
    """logits = head(stage5(…stage1(stem(x)))), a stage being a run of blocks with equal output channels.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and stage 1, then 56, 28, 14 and
    7 pixels wide.

    Weights: convolutions start from a normal distribution of variance 2/fan_out, the classifier from PyTorch's own.

    Args:
        scale: Factor of all channels but those of the head.
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, scale: float, num_classes: int, dropout: float) -> None:
        channels = _scaled(_STEM_CHANNELS, scale)
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBNAct(3, channels, 3, stride=2, hard_swish=True))
        for number, rows in enumerate(_STAGES, start=1):
            stage = nn.Sequential()
            for row in rows:
                out = _scaled(row.out, scale)
                stage.append(DepthwiseSeparable(channels, out, row.kernel, row.stride))
                channels = out
            parts[f"stage{number}"] = stage
        parts["head"] = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                hidden=nn.Conv2d(channels, _HEAD_CHANNELS, 1, bias=False),
                act=nn.Hardswish(inplace=True),
                dropout=nn.Dropout(dropout),
                flatten=nn.Flatten(),
                fc=nn.Linear(_HEAD_CHANNELS, num_classes),
            )
        )
        super().__init__(parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, from input to output.

        "native" lists the depthwise conv-bn-act of the two blocks that have SE, "depthwise" those of every block,
        "early" and "middle" those of two blocks that the authors tried instead: the first, the seventh and eighth.
        """
        every = [f"{name}.depthwise" for name, module in self.named_modules() if isinstance(module, DepthwiseSeparable)]
        return {"native": every[-2:], "depthwise": every, "early": every[:2], "middle": every[6:8]}


def pp_lcnet(*, scale: float, num_classes: int = 1000, dropout: float = 0.2) -> PPLCNet:
    """Build a PP-LCNet without its SE.

    Args:
        scale: Factor of the channels: 0.25, 0.35, 0.5, 0.75, 1, 1.5, 2 or 2.5 in the paper.
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.2 in the authors' code.

    Raises:
        ValueError: If scale is not above 0, num_classes below 1, or dropout outside [0, 1).

    Source: arXiv 2109.15099, Table 1; SE: Sec. 3.2.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale!r}: it must be above 0")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return PPLCNet(scale, num_classes, dropout)
