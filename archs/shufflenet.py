"""ShuffleNet V1: residual units of grouped 1x1 convolutions, a channel shuffle and a depthwise 3x3 convolution.

Source: Zhang et al. 2017, arXiv 1707.01083, Fig. 2 and Table 1.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from .layers import AddReLU

# Output channels of stages 2, 3 and 4 for each number of groups at scale 1x (arXiv 1707.01083, Table 1): more groups
# are cheaper, so they get more channels at about the same cost.
_STAGE_CHANNELS: dict[int, tuple[int, int, int]] = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
# Units in stages 2, 3 and 4; the first of each has stride 2.
_STAGE_UNITS = (4, 8, 4)
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
    """Return bn3(conv3(bn2(conv2(shuffle(relu1(bn1(conv1(x)))))))): 1x1 grouped, 3x3 depthwise, 1x1 grouped.

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


class ShuffleNetV1(nn.Module):
    """logits = head(stage4(stage3(stage2(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 28x28, 14x14 and 7x7 after
    stages 2, 3 and 4.

    Weights: the paper names none and trains as ResNeXt does (its Sec. 4), whose code starts convolutions from a normal
    distribution of variance 2/fan_out, BN at scale 1 and shift 0, and the classifier's bias at 0.

    Args:
        stem_channels: Channels of the stem.
        stage_channels: Output channels of stages 2, 3 and 4.
        groups: Groups of the 1x1 convolutions.
        num_classes: Width of the classifier.
    """

    def __init__(self, stem_channels: int, stage_channels: tuple[int, int, int], groups: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, stem_channels, kernel_size=3, stride=2, padding=1, bias=False),
                bn=nn.BatchNorm2d(stem_channels),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        out2, out3, out4 = stage_channels
        units2, units3, units4 = _STAGE_UNITS
        # The stem has so few channels that the paper does not group the convolution that reads them (Sec. 3.3).
        self.stage2 = stage(stem_channels, out2, units2, groups, first_groups=1)
        self.stage3 = stage(out2, out3, units3, groups, first_groups=groups)
        self.stage4 = stage(out3, out4, units4, groups, first_groups=groups)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(out4, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0; the classifier's weights keep PyTorch's uniform start, which
        # is Torch7's too.
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


def stage(in_channels: int, out_channels: int, units: int, groups: int, first_groups: int) -> nn.Sequential:
    """Return one stage: a stride-2 unit, then `units - 1` units of stride 1."""
    stage = nn.Sequential(DownsampleUnit(in_channels, out_channels, groups, first_groups))
    for _ in range(units - 1):
        stage.append(ResidualUnit(out_channels, groups))
    return stage


def shufflenet_v1(*, num_classes: int = 1000, groups: int = 3, width_mult: float = 1.0) -> ShuffleNetV1:
    """Build a ShuffleNet V1: 1,865,728 parameters with 3 groups at scale 1x.

    Args:
        num_classes: Width of the classifier.
        groups: Groups of the 1x1 convolutions: 1, 2, 3, 4 or 8.
        width_mult: Factor on every channel count, the stem's too; the paper's "ShuffleNet s times".

    Raises:
        ValueError: If num_classes is below 1, groups is not in the paper's table, or width_mult gives channels that the
            groups do not divide.

    Source: arXiv 1707.01083, Table 1; width_mult: Sec. 3.3.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if groups not in _STAGE_CHANNELS:
        allowed = ", ".join(str(known) for known in _STAGE_CHANNELS)
        raise ValueError(f"groups is {groups!r}: it must be one of {allowed}")
    if not width_mult > 0:
        raise ValueError(f"width_mult is {width_mult!r}: it must be above 0 (the paper trains 1, 0.5 and 0.25)")
    stem = round(_STEM_CHANNELS * width_mult)
    out2, out3, out4 = (round(channels * width_mult) for channels in _STAGE_CHANNELS[groups])
    # conv3 of the first unit makes out2 - stem channels in `groups` groups; every bottleneck is out / 4 in `groups`.
    if stem < 1 or (out2 - stem) % groups or any(out % (4 * groups) for out in (out2, out3, out4)):
        raise ValueError(
            f"width_mult is {width_mult!r}: with {groups} groups it gives a stem of {stem} channels and stages of "
            f"{out2}, {out3}, {out4}; stages must be multiples of {4 * groups}, and {out2} - {stem} one of {groups}"
        )
    return ShuffleNetV1(stem, (out2, out3, out4), groups, num_classes)
