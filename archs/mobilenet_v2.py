"""MobileNetV2: inverted residual blocks, wide inside and thin between, without an activation at their thin ends.

Source: Sandler et al. 2018, arXiv 1801.04381, Table 2.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import Add, ConvBN

# Expansion, output channels, blocks and stride of the first block, for each row of bottlenecks at width_mult 1
# (arXiv 1801.04381, Table 2: columns t, c, n, s).
_STAGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


def _scaled(channels: int, width_mult: float) -> int:
    """Round channels * width_mult to the nearest multiple of 8, at least 8, and up where that loses over a tenth.

    Source: the authors' release (TensorFlow slim, `_make_divisible`), which torchvision and timm follow.
    """
    wanted = channels * width_mult
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class ConvBNReLU6(ConvBN):
    """relu6(bn(conv(x))); arguments and shapes as in ConvBN.

    Source: arXiv 1801.04381, Sec. 4.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups)
        self.add_module("relu", nn.ReLU6(inplace=True))


class InvertedBottleneck(nn.Module):
    """project(depthwise(expand(x))): a 1x1 that widens, a depthwise 3x3, and a 1x1 with BN alone that narrows.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride). With expansion 1 there is no `expand`.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the depthwise convolution, 1 or 2.
        expansion: The depthwise convolution has this many times the input's channels.

    Source: arXiv 1801.04381, Table 1 and Fig. 4d.
    """

    after_3x3: ClassVar[str] = "depthwise"

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.add_module("expand", ConvBNReLU6(in_channels, wide, kernel_size=1))
        self.branch.add_module("depthwise", ConvBNReLU6(wide, wide, kernel_size=3, stride=stride, groups=wide))
        self.branch.add_module(
            "project",
            ConvBN(wide, out_channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.branch(x)
        return out


class InvertedResidual(InvertedBottleneck):
    """project(depthwise(expand(x))) + x: the block where input and output have one shape.

    Shapes: (N, C, H, W) to the same.

    Args:
        channels: Channels of input and output.
        expansion: The depthwise convolution has this many times as many.

    Source: arXiv 1801.04381, Fig. 3b.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__(channels, channels, stride=1, expansion=expansion)
        self.shortcut = nn.Identity()
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, C, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class MobileNetV2(nn.Sequential):
    """logits = head(stage7(…stage1(stem(x)))), a stage for each row of bottlenecks in the paper's table.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and stage 1, then 56, 28, 14,
    14, 7 and 7 pixels wide after stages 2 to 7.

    Weights: the paper does not say. As in torchvision, convolutions start from a normal distribution of variance
    2/fan_out, the classifier from one of deviation 0.01 with bias 0, BN at scale 1 and shift 0 with PyTorch's own
    momentum and epsilon.

    Args:
        num_classes: Width of the classifier.
        width_mult: Factor on every channel count.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, width_mult: float, dropout: float) -> None:
        channels = _scaled(_STEM_CHANNELS, width_mult)
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBNReLU6(3, channels, kernel_size=3, stride=2))
        for number, (expansion, width, blocks, first_stride) in enumerate(_STAGES, start=1):
            stage = nn.Sequential()
            out_channels = _scaled(width, width_mult)
            for stride in (first_stride, *(1,) * (blocks - 1)):
                if stride == 1 and channels == out_channels:
                    stage.append(InvertedResidual(channels, expansion))
                else:
                    stage.append(InvertedBottleneck(channels, out_channels, stride, expansion))
                channels = out_channels
            parts[f"stage{number}"] = stage
        # A thinner network keeps the whole of its last layer (arXiv 1801.04381, Sec. 4).
        head_channels = _scaled(_HEAD_CHANNELS, max(1.0, width_mult))
        parts["head"] = nn.Sequential(
            OrderedDict(
                conv=ConvBNReLU6(channels, head_channels, kernel_size=1),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(head_channels, num_classes),
            )
        )
        super().__init__(parts)
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, from input to output.

        "residual" lists the blocks with a shortcut, "depthwise" the depthwise conv-bn-relu6 of every block, and
        "project" the narrow conv-bn that every block ends with.
        """
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, InvertedBottleneck)}
        return {
            "residual": [name for name, block in blocks.items() if isinstance(block, InvertedResidual)],
            "depthwise": [f"{name}.branch.depthwise" for name in blocks],
            "project": [f"{name}.branch.project" for name in blocks],
        }


def mobilenet_v2(*, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2) -> MobileNetV2:
    """Build a MobileNetV2: 3,504,872 parameters and 300,774,272 MACs at width 1 and 224x224.

    Args:
        num_classes: Width of the classifier.
        width_mult: Factor on every channel count, each rounded to a multiple of 8; the 1280 channels of the last
            convolution grow above width 1 and do not shrink below it.
        dropout: Dropout before the classifier; 0.2 is the authors' release and torchvision.

    Raises:
        ValueError: If num_classes is below 1, width_mult not above 0 or dropout outside [0, 1).

    Source: arXiv 1801.04381, Table 2; width_mult: Sec. 4.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not width_mult > 0:
        raise ValueError(f"width_mult is {width_mult!r}: it must be above 0 (the paper's are 0.35 to 1.4)")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return MobileNetV2(num_classes, width_mult, dropout)
