"""GhostNet: inverted residual blocks whose 1x1 convolutions make half of their channels and derive the other half.

Source: Han et al. 2020, arXiv 1911.11907, Fig. 2, Fig. 3 and Table 1.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import Add, ConvBN, ConvBNReLU

_STEM_CHANNELS = 16
# The two 1x1 convolutions of the head: before and after the pooling (arXiv 1911.11907, Table 1).
_HEAD_CHANNELS = (960, 1280)


class _Shape(NamedTuple):
    """One row of the table: kernel of the depthwise convolutions, hidden and output channels, whether SE is native."""

    kernel_size: int
    hidden: int
    out: int
    se: bool


# The blocks by resolution (arXiv 1911.11907, Table 1). The first block of a stage has stride 2, but for stage 1.
_STAGES: tuple[tuple[_Shape, ...], ...] = (
    (_Shape(3, 16, 16, False),),
    (_Shape(3, 48, 24, False), _Shape(3, 72, 24, False)),
    (_Shape(5, 72, 40, True), _Shape(5, 120, 40, True)),
    (
        _Shape(3, 240, 80, False),
        _Shape(3, 200, 80, False),
        _Shape(3, 184, 80, False),
        _Shape(3, 184, 80, False),
        _Shape(3, 480, 112, True),
        _Shape(3, 672, 112, True),
    ),
    (
        _Shape(5, 672, 160, True),
        _Shape(5, 960, 160, False),
        _Shape(5, 960, 160, True),
        _Shape(5, 960, 160, False),
        _Shape(5, 960, 160, True),
    ),
)


def _conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1, relu: bool = False
) -> ConvBN:
    """Return bn(conv(x)) with "same" padding, rectified if `relu`."""
    layers = ConvBNReLU if relu else ConvBN
    return layers(in_channels, out_channels, kernel_size, stride, groups)


class AppendGhosts(nn.Module):
    """cat(x, ghosts(x)), one ghost of each channel from a depthwise 3x3.

    Shapes: (N, C, H, W) to (N, 2 * C, H, W).

    Args:
        channels: C.
        relu: Whether the ghosts are rectified.

    Source: arXiv 1911.11907, Fig. 2b and eq. 4.
    """

    def __init__(self, channels: int, *, relu: bool) -> None:
        super().__init__()
        self.ghosts = _conv_bn(channels, channels, 3, groups=channels, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Stack (N, C, H, W) and its ghosts."""
        return torch.cat((x, self.ghosts(x)), dim=1)


class GhostModule(nn.Sequential):
    """cheap(primary(x)): a 1x1 convolution makes half of the channels, cheap operations on those the others.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H, W).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, an even number.
        relu: Whether the output is rectified.

    Source: arXiv 1911.11907, Sec. 3.1, with the ratio s = 2 and the kernel d = 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, relu: bool) -> None:
        super().__init__(
            OrderedDict(
                primary=_conv_bn(in_channels, out_channels // 2, 1, relu=relu),
                cheap=AppendGhosts(out_channels // 2, relu=relu),
            )
        )


class GhostBottleneck(nn.Module):
    """project(depthwise(expand(x))) + shortcut(x), the depthwise convolution only where the stride is 2.

    Shapes: (N, in_channels, H, W) to (N, shape.out, H/stride, W/stride).

    Attributes:
        after_3x3: The last child of `branch` before the projection. At stride 1 it is `expand`, which ends in the 3x3
            that makes the ghosts; at stride 2 `depthwise`.

    Args:
        in_channels: Channels of the input.
        shape: The row of the paper's table.
        stride: 1 or 2.

    Source: arXiv 1911.11907, Fig. 3.
    """

    def __init__(self, in_channels: int, shape: _Shape, stride: int) -> None:
        super().__init__()
        kernel_size, hidden, out, self.native_se = shape
        self.branch = nn.Sequential(OrderedDict(expand=GhostModule(in_channels, hidden, relu=True)))
        if stride > 1:
            depthwise = _conv_bn(hidden, hidden, kernel_size, stride=stride, groups=hidden)
            self.branch.add_module("depthwise", depthwise)
        self.after_3x3 = "depthwise" if stride > 1 else "expand"
        self.branch.add_module("project", GhostModule(hidden, out, relu=False))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    depthwise=_conv_bn(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels),
                    pointwise=_conv_bn(in_channels, out, 1),
                )
            )
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, in_channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class GhostNet(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stage1(stem(x))))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and 112, 56, 28, 14 and 7 pixels
    wide after stages 1 to 5.

    Weights: the paper names none; all layers keep PyTorch's own start, as in timm.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = _conv_bn(3, _STEM_CHANNELS, 3, stride=2, relu=True)
        stage1, stage2, stage3, stage4, stage5 = _STAGES
        self.stage1 = _stage(_STEM_CHANNELS, stage1, stride=1)
        self.stage2 = _stage(stage1[-1].out, stage2, stride=2)
        self.stage3 = _stage(stage2[-1].out, stage3, stride=2)
        self.stage4 = _stage(stage3[-1].out, stage4, stride=2)
        self.stage5 = _stage(stage4[-1].out, stage5, stride=2)
        before, after = _HEAD_CHANNELS
        self.head = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(stage5[-1].out, before, kernel_size=1, bias=False),
                bn1=nn.BatchNorm2d(before),
                relu1=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                conv2=nn.Conv2d(before, after, kernel_size=1),
                relu2=nn.ReLU(inplace=True),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(after, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        features = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))
        logits: Tensor = self.head(features)
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, from input to output.

        "native" lists what the paper gates, in seven blocks the last features before the projection; "residual" lists
        all 16 blocks.
        """
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, GhostBottleneck)}
        return {
            "native": [f"{name}.branch.{block.after_3x3}" for name, block in blocks.items() if block.native_se],
            "residual": list(blocks),
        }


def _stage(in_channels: int, shapes: tuple[_Shape, ...], stride: int) -> nn.Sequential:
    """Return the blocks of one resolution, the first with this stride."""
    stage = nn.Sequential()
    for shape in shapes:
        stage.append(GhostBottleneck(in_channels, shape, stride))
        in_channels, stride = shape.out, 1
    return stage


def ghostnet(*, num_classes: int = 1000, dropout: float = 0.2) -> GhostNet:
    """Build a GhostNet of width 1: without SE 3,678,640 parameters and 139,651,568 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.2 in timm.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1911.11907, Table 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return GhostNet(num_classes, dropout)
