"""EfficientNet-B0: inverted residual blocks with SiLU and stochastic depth, here without their SE.

Source: Tan and Le 2019, arXiv 1905.11946, Table 1.
"""

from collections import OrderedDict
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvBN


class _Stage(NamedTuple):
    """One row of the paper's table: blocks, kernel, expansion, output channels, stride of the first block."""

    blocks: int
    kernel: int
    expansion: int
    out: int
    stride: int


# Stages 2 to 8 of arXiv 1905.11946, Table 1, which prints resolutions for strides: each stage's input.
_STAGES: tuple[_Stage, ...] = (
    _Stage(1, 3, 1, 16, stride=1),
    _Stage(2, 3, 6, 24, stride=2),
    _Stage(2, 5, 6, 40, stride=2),
    _Stage(3, 3, 6, 80, stride=2),
    _Stage(3, 5, 6, 112, stride=1),
    _Stage(4, 5, 6, 192, stride=2),
    _Stage(1, 3, 6, 320, stride=1),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


class ConvBNSiLU(ConvBN):
    """silu(bn(conv(x))); arguments and shapes as in ConvBN.

    Source: arXiv 1905.11946, Sec. 5.2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups)
        self.add_module("act", nn.SiLU(inplace=True))


class StochasticAdd(nn.Module):
    """branch * keep / (1 - drop) + shortcut, keep being 0 for an image with probability `drop` and else 1.

    That is stochastic depth, drawn for each image of a training batch; in eval mode it is branch + shortcut.
    No parameters.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Args:
        drop: Probability that an image goes by the shortcut alone.

    Source: arXiv 1603.09382, Sec. 3, with the scale of the authors' EfficientNet release.
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Add both paths (N, C, H, W)."""
        if self.training and self.drop:
            # Dropout of one number per image zeroes it or divides it by 1 - drop.
            branch = branch * F.dropout(branch.new_ones(len(branch), 1, 1, 1), self.drop)
        return branch + shortcut

    def extra_repr(self) -> str:
        """Show the probability in the printed network."""
        return f"drop={self.drop:g}"


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

    Source: arXiv 1905.11946, Table 1 (MBConv), less the SE.
    """

    after_3x3: ClassVar[str] = "depthwise"

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.add_module("expand", ConvBNSiLU(in_channels, wide, kernel_size=1))
        self.branch.add_module("depthwise", ConvBNSiLU(wide, wide, kernel_size, stride=stride, groups=wide))
        self.branch.add_module(
            "project",
            ConvBN(wide, out_channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.branch(x)
        return out


class InvertedResidual(InvertedBottleneck):
    """project(depthwise(expand(x))) + x, sometimes x alone: the block where input and output have one shape.

    Shapes: (N, C, H, W) to the same.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the depthwise kernel, 3 or 5.
        expansion: The depthwise convolution has this many times as many channels.
        drop: Probability that an image of a training batch goes by the shortcut alone.

    Source: arXiv 1905.11946, Table 1 (MBConv), less the SE.
    """

    def __init__(self, channels: int, kernel_size: int, expansion: int, drop: float) -> None:
        super().__init__(channels, channels, kernel_size, stride=1, expansion=expansion)
        self.shortcut = nn.Identity()
        self.join: nn.Module = StochasticAdd(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, C, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class EfficientNetB0(nn.Sequential):
    """logits = head(stage8(…stage2(stem(x)))), the stages numbered as in the paper, whose stage 1 is the stem.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and stage 2, then 56, 28, 14,
    14, 7 and 7 pixels wide after stages 3 to 8.

    Weights: as in the authors' release (TensorFlow TPU models, efficientnet) and torchvision, convolutions start from a
    normal distribution of variance 2/fan_out and the classifier from a uniform one within 1/sqrt(num_classes) of 0,
    with bias 0; BN at scale 1 and shift 0. The BN has PyTorch's own momentum and epsilon, as in torchvision and timm,
    where the release has 0.01 and 0.001.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
        stochastic_depth: Probability that grows linearly over the blocks, from 0 at the first towards this.
    """

    def __init__(self, num_classes: int, dropout: float, stochastic_depth: float) -> None:
        channels = _STEM_CHANNELS
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBNSiLU(3, channels, kernel_size=3, stride=2))
        total = sum(row.blocks for row in _STAGES)
        before = 0
        for number, row in enumerate(_STAGES, start=2):
            stage = nn.Sequential()
            for stride in (row.stride, *(1,) * (row.blocks - 1)):
                if stride == 1 and channels == row.out:
                    drop = stochastic_depth * before / total
                    stage.append(InvertedResidual(channels, row.kernel, row.expansion, drop))
                else:
                    stage.append(InvertedBottleneck(channels, row.out, row.kernel, stride, row.expansion))
                channels = row.out
                before += 1
            parts[f"stage{number}"] = stage
        parts["head"] = nn.Sequential(
            OrderedDict(
                conv=ConvBNSiLU(channels, _HEAD_CHANNELS, kernel_size=1),
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

        "native" and "depthwise" both list the depthwise conv-bn-silu of every block, for the paper has SE in all of
        them; "residual" lists the blocks with a shortcut.
        """
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, InvertedBottleneck)}
        return {
            "native": [f"{name}.branch.depthwise" for name in blocks],
            "depthwise": [f"{name}.branch.depthwise" for name in blocks],
            "residual": [name for name, block in blocks.items() if isinstance(block, InvertedResidual)],
        }


def efficientnet_b0(*, num_classes: int = 1000, dropout: float = 0.2, stochastic_depth: float = 0.2) -> EfficientNetB0:
    """Build an EfficientNet-B0 without its SE: 4,652,008 parameters and 385,187,552 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.2 is the paper and torchvision.
        stochastic_depth: Probability of dropping the branch of a residual block in training: block i of 16, counted
            from 0 and over all blocks, has i/16 of it. 0.2 is torchvision; the paper writes it as a survival
            probability of 0.8; timm has none unless asked (drop_path_rate).

    Raises:
        ValueError: If num_classes is below 1, or dropout or stochastic_depth is outside [0, 1).

    Source: arXiv 1905.11946, Table 1; dropout and stochastic_depth: Sec. 5.2.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    if not 0 <= stochastic_depth < 1:
        raise ValueError(f"stochastic_depth is {stochastic_depth!r}: it must be 0 or more and below 1")
    return EfficientNetB0(num_classes, dropout, stochastic_depth)
