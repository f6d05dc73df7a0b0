"""MnasNet-A1: inverted residual blocks found by a search on a phone's latency, here without their SE.

Source: Tan et al. 2018, arXiv 1807.11626, Fig. 7a.
"""

from collections import OrderedDict
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from .layers import Add, ConvBN, ConvBNReLU


class _Stage(NamedTuple):
    """One row of the paper's figure: blocks, kernel, expansion, output channels, SE, stride of the first block."""

    blocks: int
    kernel: int
    expansion: int
    out: int
    se: bool
    stride: int


# The rows of arXiv 1807.11626, Fig. 7a. The first, a separable convolution, is a block that does not widen.
_STAGES: tuple[_Stage, ...] = (
    _Stage(1, 3, 1, 16, se=False, stride=1),
    _Stage(2, 3, 6, 24, se=False, stride=2),
    _Stage(3, 5, 3, 40, se=True, stride=2),
    _Stage(4, 3, 6, 80, se=False, stride=2),
    _Stage(2, 3, 6, 112, se=True, stride=1),
    _Stage(3, 5, 6, 160, se=True, stride=2),
    _Stage(1, 3, 6, 320, se=False, stride=1),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


class InvertedBottleneck(nn.Module):
    """project(depthwise(expand(x))): a 1x1 that widens, a depthwise 3x3 or 5x5, and a 1x1 with BN alone that narrows.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride). With expansion 1 there is no `expand`.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands, whatever the kernel's size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the depthwise kernel, 3 or 5.
        stride: Stride of the depthwise convolution, 1 or 2.
        expansion: The depthwise convolution has this many times the input's channels.

    Source: arXiv 1807.11626, Fig. 7, less the SE.
    """

    after_3x3: ClassVar[str] = "depthwise"

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.add_module("expand", ConvBNReLU(in_channels, wide, kernel_size=1))
        self.branch.add_module("depthwise", ConvBNReLU(wide, wide, kernel_size, stride=stride, groups=wide))
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
        kernel_size: Side of the depthwise kernel, 3 or 5.
        expansion: The depthwise convolution has this many times as many channels.

    Source: arXiv 1807.11626, Fig. 7, less the SE.
    """

    def __init__(self, channels: int, kernel_size: int, expansion: int) -> None:
        super().__init__(channels, channels, kernel_size, stride=1, expansion=expansion)
        self.shortcut = nn.Identity()
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, C, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class MnasNetA1(nn.Sequential):
    """logits = head(stage7(…stage1(stem(x)))), a stage for each row of blocks in the paper's figure.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and stage 1, then 56, 28, 14,
    14, 7 and 7 pixels wide after stages 2 to 7.

    Weights: as in the authors' release (TensorFlow TPU models, mnasnet), convolutions start from a normal distribution
    of variance 2/fan_out and the classifier from a uniform one within 1/sqrt(num_classes) of 0, with bias 0; BN at
    scale 1 and shift 0. The BN has PyTorch's own momentum and epsilon, as in timm; the release has 0.01 and 0.001.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        channels = _STEM_CHANNELS
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBNReLU(3, channels, kernel_size=3, stride=2))
        for number, row in enumerate(_STAGES, start=1):
            stage = nn.Sequential()
            for stride in (row.stride, *(1,) * (row.blocks - 1)):
                if stride == 1 and channels == row.out:
                    stage.append(InvertedResidual(channels, row.kernel, row.expansion))
                else:
                    stage.append(InvertedBottleneck(channels, row.out, row.kernel, stride, row.expansion))
                channels = row.out
            parts[f"stage{number}"] = stage
        parts["head"] = nn.Sequential(
            OrderedDict(
                conv=ConvBNReLU(channels, _HEAD_CHANNELS, kernel_size=1),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(_HEAD_CHANNELS, num_classes),
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
                bound = module.out_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, from input to output.

        "native" lists the depthwise conv-bn-relu behind which the paper has SE (stages 3, 5 and 6), "depthwise" those
        of every block, and "residual" the blocks with a shortcut.
        """
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, InvertedBottleneck)}
        with_se = tuple(f"stage{number}." for number, row in enumerate(_STAGES, start=1) if row.se)
        return {
            "native": [f"{name}.branch.depthwise" for name in blocks if name.startswith(with_se)],
            "depthwise": [f"{name}.branch.depthwise" for name in blocks],
            "residual": [name for name, block in blocks.items() if isinstance(block, InvertedResidual)],
        }


def mnasnet_a1(*, num_classes: int = 1000, dropout: float = 0.2) -> MnasNetA1:
    """Build a MnasNet-A1 without its SE: 3,629,072 parameters and 311,325,344 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.2 is the authors' release.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1807.11626, Fig. 7a.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return MnasNetA1(num_classes, dropout)
