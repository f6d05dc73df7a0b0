"""ShuffleNet V1 for 32x32 images: its stem keeps the resolution, and its stages halve it three times.

Source: Zhang et al. 2017, arXiv 1707.01083, Fig. 2 and Table 1, with 3 groups at scale 1x. The paper has no network for
CIFAR: the stem without stride and without pooling is this project's own adaptation.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

_GROUPS = 3
_STEM_CHANNELS = 24


class ChannelShuffle(nn.Module):
    """x.reshape(N, groups, C/groups, H, W).transpose(1, 2): the next grouped convolution sees every group.

    Shapes: (N, C, H, W) to the same. No parameters.

    Args:
        groups: Groups of the convolution before it; must divide C.

    Source: arXiv 1707.01083, Sec. 3.1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Reorder the channels of (N, C, H, W)."""
        n, c, h, w = x.shape
        return x.reshape(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def extra_repr(self) -> str:
        """Show the number of groups in the printed network."""
        return f"groups={self.groups}"


class AddReLU(nn.Module):
    """relu(branch + shortcut). No parameters.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Source: arXiv 1707.01083, Fig. 2b.
    """

    formula = "relu(branch + shortcut)"

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Add both paths (N, C, H, W) and rectify the sum."""
        out: Tensor = self.relu(branch + shortcut)
        return out


class ConcatReLU(nn.Module):
    """relu(cat(shortcut, branch)). No parameters.

    Shapes: (N, B, H, W) and (N, S, H, W) to (N, S + B, H, W), the shortcut's channels first.

    Source: arXiv 1707.01083, Fig. 2c.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Stack the channels of both paths and rectify them."""
        out: Tensor = self.relu(torch.cat((shortcut, branch), dim=1))
        return out


def _branch(
    in_channels: int, bottleneck: int, out_channels: int, *, stride: int, groups: int, first_groups: int
) -> nn.Sequential:
    """Give bn3(conv3(bn2(conv2(shuffle(relu1(bn1(conv1(x)))))))): 1x1 grouped, 3x3 depthwise, 1x1 grouped.

    No ReLU follows the depthwise convolution: arXiv 1707.01083, Sec. 3.2.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, bottleneck, kernel_size=1, groups=first_groups, bias=False),
            bn1=nn.BatchNorm2d(bottleneck),
            relu1=nn.ReLU(inplace=True),
            shuffle=ChannelShuffle(groups),
            conv2=nn.Conv2d(
                bottleneck, bottleneck, kernel_size=3, stride=stride, padding=1, groups=bottleneck, bias=False
            ),
            bn2=nn.BatchNorm2d(bottleneck),
            conv3=nn.Conv2d(bottleneck, out_channels, kernel_size=1, groups=groups, bias=False),
            bn3=nn.BatchNorm2d(out_channels),
        )
    )


class ResidualUnit(nn.Module):
    """relu(branch(x) + x): the stride-1 unit.

    Shapes: (N, C, H, W) to the same.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        channels: Channels of input and output; the bottleneck has a quarter of them.
        groups: Groups of both 1x1 convolutions.

    Source: arXiv 1707.01083, Fig. 2b.
    """

    after_3x3: ClassVar[str] = "bn2"

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.branch = _branch(channels, channels // 4, channels, stride=1, groups=groups, first_groups=groups)
        self.shortcut = nn.Identity()
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, C, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class DownsampleUnit(nn.Module):
    """relu(cat(avgpool3x3(x), branch(x))): the stride-2 unit.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/2, W/2). Its branch makes out_channels - in_channels channels,
    so it is no residual block: a gate on its branch would leave the pooled channels as they are.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; the bottleneck has a quarter of them.
        groups: Groups of the 1x1 convolutions.
        first_groups: Groups of the first 1x1 convolution, where they differ.

    Source: arXiv 1707.01083, Fig. 2c.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, first_groups: int) -> None:
        super().__init__()
        self.branch = _branch(
            in_channels,
            out_channels // 4,
            out_channels - in_channels,
            stride=2,
            groups=groups,
            first_groups=first_groups,
        )
        self.shortcut = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
        self.join: nn.Module = ConcatReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, in_channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


def _stage(in_channels: int, out_channels: int, units: int, groups: int, first_groups: int) -> nn.Sequential:
    """Give one stage: a stride-2 unit, then `units - 1` units of stride 1."""
    stage = nn.Sequential(DownsampleUnit(in_channels, out_channels, groups, first_groups))
    for _ in range(units - 1):
        stage.append(ResidualUnit(out_channels, groups))
    return stage


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
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, _STEM_CHANNELS, kernel_size=3, padding=1, bias=False),
                bn=nn.BatchNorm2d(_STEM_CHANNELS),
                relu=nn.ReLU(inplace=True),
            )
        )
        # Units and channels of arXiv 1707.01083, Table 1, g = 3. The stem has so few channels that the paper does not
        # group the convolution that reads them (Sec. 3.3).
        self.stage2 = _stage(_STEM_CHANNELS, 240, units=4, groups=_GROUPS, first_groups=1)
        self.stage3 = _stage(240, 480, units=8, groups=_GROUPS, first_groups=_GROUPS)
        self.stage4 = _stage(480, 960, units=4, groups=_GROUPS, first_groups=_GROUPS)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(960, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

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
