"""Wide ResNets for 32x32 images: pre-activated blocks of two 3x3 convolutions, few of them, with many channels.

Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146, Table 1.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import Add, initialise_he

# Channels of groups conv2 to conv4 at width_mult 1 (arXiv 1605.07146, Table 1).
_GROUP_CHANNELS = (16, 32, 64)
_STEM_CHANNELS = 16


class WideBlock(nn.Module):
    """conv3x3(dropout(relu(bn(conv3x3(h))))) + shortcut, with h = relu(bn(x)); the shortcut reads x, or h if projected.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels inside and at the output.
        stride: Stride of the first 3x3 and of the projection.
        dropout: Probability that an activation between the convolutions is dropped.

    Source: arXiv 1605.07146, Fig. 1d; the BN and ReLU that branch and projection have in common: the authors'
    wide-resnet.lua.
    """

    after_3x3: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.preact = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(in_channels), relu=nn.ReLU(inplace=True)))
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
                bn2=nn.BatchNorm2d(out_channels),
                relu2=nn.ReLU(inplace=True),
                dropout=nn.Dropout(dropout),
                conv2=nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            )
        )
        self.projects = stride != 1 or in_channels != out_channels
        self.shortcut: nn.Module = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            if self.projects
            else nn.Identity()
        )
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        h = self.preact(x)
        out: Tensor = self.join(self.branch(h), self.shortcut(h if self.projects else x))
        return out


class WideResNet(nn.Module):
    """logits = head(stage4(stage3(stage2(stem(x))))), the stages numbered as conv2 to conv4 in the paper.

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32, 16 and 8 pixels wide after stages 2 to 4.

    Weights: as in the authors' code (models/utils.lua): convolutions normal with variance 2/fan_out, BN scale 1 and
    shift 0, the classifier's weights uniform (which is PyTorch's start too) and its bias 0.

    Args:
        blocks: Blocks of each stage.
        width_mult: Factor on the stages' channels, the paper's k.
        num_classes: Width of the classifier.
        dropout: See WideBlock.
    """

    def __init__(self, blocks: int, width_mult: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        # The stem is not widened.
        self.stem = nn.Conv2d(3, _STEM_CHANNELS, kernel_size=3, padding=1, bias=False)

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            sequence = nn.Sequential(WideBlock(in_channels, out_channels, stride, dropout))
            for _ in range(blocks - 1):
                sequence.append(WideBlock(out_channels, out_channels, 1, dropout))
            return sequence

        out2, out3, out4 = (channels * width_mult for channels in _GROUP_CHANNELS)
        self.stage2 = stage(_STEM_CHANNELS, out2, stride=1)
        self.stage3 = stage(out2, out3, stride=2)
        self.stage4 = stage(out3, out4, stride=2)
        self.head = nn.Sequential(
            OrderedDict(
                bn=nn.BatchNorm2d(out4),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(out4, num_classes),
            )
        )
        initialise_he(self, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage4(self.stage3(self.stage2(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, WideBlock)]}


def wide_resnet(depth: int, *, width_mult: int, num_classes: int = 10, dropout: float = 0.0) -> WideResNet:
    """Build a Wide ResNet WRN-depth-width_mult; WRN-16-8 has 10,961,370 parameters.

    Args:
        depth: 6n + 4: n blocks in each of three stages, the stem and three projections.
        width_mult: Factor on the stages' channels, the paper's k.
        num_classes: Width of the classifier.
        dropout: Dropout between the two convolutions of a block. The paper's tables are without, but for Table 6.

    Raises:
        ValueError: If depth is not 6n + 4, width_mult or num_classes below 1, or dropout outside [0, 1).

    Source: arXiv 1605.07146, Table 1; dropout: Sec. 2.4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth is {depth!r}: it must be 6n + 4 (the paper trains 16, 22, 28 and 40)")
    if width_mult < 1:
        raise ValueError(f"width_mult is {width_mult!r}: it must be 1 or more")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return WideResNet((depth - 4) // 6, width_mult, num_classes, dropout)
