"""MobileNetV3-Large and -Small: inverted residual blocks with h-swish and a cheap end, here without their SE.

Source: Howard et al. 2019, arXiv 1905.02244, Tables 1 and 2.
"""

from collections import OrderedDict
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from .layers import Add, ConvBN


class _Block(NamedTuple):
    """One row of the paper's tables: kernel size, expansion size, output channels, SE, h-swish, stride."""

    kernel: int
    wide: int
    out: int
    se: bool
    hard_swish: bool
    stride: int


# A stage is a run of rows with the same number of output channels; the paper does not number them.
_STAGES: dict[str, tuple[tuple[_Block, ...], ...]] = {
    # arXiv 1905.02244, Table 1.
    "large": (
        (_Block(3, 16, 16, se=False, hard_swish=False, stride=1),),
        (
            _Block(3, 64, 24, se=False, hard_swish=False, stride=2),
            _Block(3, 72, 24, se=False, hard_swish=False, stride=1),
        ),
        (
            _Block(5, 72, 40, se=True, hard_swish=False, stride=2),
            _Block(5, 120, 40, se=True, hard_swish=False, stride=1),
            _Block(5, 120, 40, se=True, hard_swish=False, stride=1),
        ),
        (
            _Block(3, 240, 80, se=False, hard_swish=True, stride=2),
            _Block(3, 200, 80, se=False, hard_swish=True, stride=1),
            _Block(3, 184, 80, se=False, hard_swish=True, stride=1),
            _Block(3, 184, 80, se=False, hard_swish=True, stride=1),
        ),
        (
            _Block(3, 480, 112, se=True, hard_swish=True, stride=1),
            _Block(3, 672, 112, se=True, hard_swish=True, stride=1),
        ),
        (
            _Block(5, 672, 160, se=True, hard_swish=True, stride=2),
            _Block(5, 960, 160, se=True, hard_swish=True, stride=1),
            _Block(5, 960, 160, se=True, hard_swish=True, stride=1),
        ),
    ),
    # arXiv 1905.02244, Table 2.
    "small": (
        (_Block(3, 16, 16, se=True, hard_swish=False, stride=2),),
        (
            _Block(3, 72, 24, se=False, hard_swish=False, stride=2),
            _Block(3, 88, 24, se=False, hard_swish=False, stride=1),
        ),
        (
            _Block(5, 96, 40, se=True, hard_swish=True, stride=2),
            _Block(5, 240, 40, se=True, hard_swish=True, stride=1),
            _Block(5, 240, 40, se=True, hard_swish=True, stride=1),
        ),
        (
            _Block(5, 120, 48, se=True, hard_swish=True, stride=1),
            _Block(5, 144, 48, se=True, hard_swish=True, stride=1),
        ),
        (
            _Block(5, 288, 96, se=True, hard_swish=True, stride=2),
            _Block(5, 576, 96, se=True, hard_swish=True, stride=1),
            _Block(5, 576, 96, se=True, hard_swish=True, stride=1),
        ),
    ),
}
_STEM_CHANNELS = 16
# Channels of the last 1x1 convolution before the pooling, and of the layer behind it.
_HEAD_CHANNELS = {"large": (960, 1280), "small": (576, 1024)}


class ConvBNAct(ConvBN):
    """act(bn(conv(x))); shapes and other arguments as in ConvBN.

    Args:
        hard_swish: x * relu6(x + 3) / 6 as the activation, else ReLU.

    Source: arXiv 1905.02244, Sec. 5.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        hard_swish: bool,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups)
        self.add_module("act", nn.Hardswish(inplace=True) if hard_swish else nn.ReLU(inplace=True))


class InvertedBottleneck(nn.Module):
    """project(depthwise(expand(x))): a 1x1 that widens, a depthwise 3x3 or 5x5, and a 1x1 with BN alone that narrows.

    Shapes: (N, in_channels, H, W) to (N, block.out, H/stride, W/stride). Where the row widens nothing there is no
    `expand`.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands, whatever the kernel's size.
        native: Whether the paper has SE behind `depthwise` here.

    Args:
        in_channels: Channels of the input.
        block: The paper's row.

    Source: arXiv 1905.02244, Fig. 4, less the SE.
    """

    after_3x3: ClassVar[str] = "depthwise"

    def __init__(self, in_channels: int, block: _Block) -> None:
        super().__init__()
        self.native = block.se
        self.branch = nn.Sequential()
        if block.wide != in_channels:
            expand = ConvBNAct(in_channels, block.wide, kernel_size=1, hard_swish=block.hard_swish)
            self.branch.add_module("expand", expand)
        depthwise = ConvBNAct(
            block.wide,
            block.wide,
            kernel_size=block.kernel,
            stride=block.stride,
            groups=block.wide,
            hard_swish=block.hard_swish,
        )
        self.branch.add_module("depthwise", depthwise)
        self.branch.add_module(
            "project",
            ConvBN(block.wide, block.out, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, block.out, H/stride, W/stride)."""
        out: Tensor = self.branch(x)
        return out


class InvertedResidual(InvertedBottleneck):
    """project(depthwise(expand(x))) + x: the block where input and output have one shape.

    Shapes: (N, block.out, H, W) to the same.

    Args:
        block: The paper's row, of stride 1.

    Source: arXiv 1905.02244, Fig. 4, less the SE.
    """

    def __init__(self, block: _Block) -> None:
        super().__init__(block.out, block)
        self.shortcut = nn.Identity()
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, block.out, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class MobileNetV3(nn.Sequential):
    """logits = head(stageN(…stage1(stem(x)))), a stage being a run of blocks with equal output channels.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem. Large: 112, 56, 28, 14, 14 and
    7 pixels wide after stages 1 to 6. Small: 56, 28, 14, 14 and 7 after stages 1 to 5.

    Weights: the paper does not say. As in torchvision, convolutions start from a normal distribution of variance
    2/fan_out, both layers behind the pooling from one of deviation 0.01 with bias 0, BN at scale 1 and shift 0.

    Args:
        size: "large" or "small".
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
        bn_eps: Epsilon of every BN.
        bn_momentum: Momentum of every BN.
    """

    def __init__(self, size: str, num_classes: int, dropout: float, bn_eps: float, bn_momentum: float) -> None:
        channels = _STEM_CHANNELS
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            stem=ConvBNAct(3, channels, kernel_size=3, stride=2, hard_swish=True)
        )
        for number, blocks in enumerate(_STAGES[size], start=1):
            stage = nn.Sequential()
            for block in blocks:
                residual = block.stride == 1 and block.out == channels
                stage.append(InvertedResidual(block) if residual else InvertedBottleneck(channels, block))
                channels = block.out
            parts[f"stage{number}"] = stage
        pooled, hidden = _HEAD_CHANNELS[size]
        parts["head"] = nn.Sequential(
            OrderedDict(
                conv=ConvBNAct(channels, pooled, kernel_size=1, hard_swish=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                hidden=nn.Linear(pooled, hidden),
                act=nn.Hardswish(inplace=True),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(hidden, num_classes),
            )
        )
        super().__init__(parts)
        self._initialise(bn_eps, bn_momentum)

    def _initialise(self, bn_eps: float, bn_momentum: float) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = bn_eps, bn_momentum

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, from input to output.

        "native" lists the depthwise conv-bn-act behind which the paper has SE, "depthwise" those of every block, and
        "residual" the blocks with a shortcut.
        """
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, InvertedBottleneck)}
        return {
            "native": [f"{name}.branch.depthwise" for name, block in blocks.items() if block.native],
            "depthwise": [f"{name}.branch.depthwise" for name in blocks],
            "residual": [name for name, block in blocks.items() if isinstance(block, InvertedResidual)],
        }


def mobilenet_v3(
    *, size: str, num_classes: int = 1000, dropout: float = 0.2, bn_eps: float = 0.001, bn_momentum: float = 0.01
) -> MobileNetV3:
    """Build a MobileNetV3 without its SE; the large one has 3,970,752 parameters and 215,082,560 MACs at 224x224.

    Args:
        size: "large" or "small".
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.2 is the paper (which says 0.8, of what is kept) and torchvision.
        bn_eps: Epsilon of every BN: 0.001 in torchvision, 0.00001 in timm's mobilenetv3_large_100.
        bn_momentum: Momentum of every BN: 0.01 is the paper (an average decay of 0.99) and torchvision, 0.1 timm.

    Raises:
        ValueError: If size is neither, num_classes is below 1, dropout outside [0, 1), bn_eps not above 0 or
            bn_momentum outside (0, 1].

    Source: arXiv 1905.02244, Tables 1 and 2; dropout and momentum: Sec. 6.1.
    """
    if size not in _STAGES:
        raise ValueError(f'size is {size!r}: it must be "large" or "small"')
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    if not bn_eps > 0:
        raise ValueError(f"bn_eps is {bn_eps!r}: it must be above 0 (torchvision's is 0.001)")
    if not 0 < bn_momentum <= 1:
        raise ValueError(f"bn_momentum is {bn_momentum!r}: it must be above 0 and at most 1 (torchvision's is 0.01)")
    return MobileNetV3(size, num_classes, dropout, bn_eps, bn_momentum)
