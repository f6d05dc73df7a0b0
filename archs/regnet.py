"""RegNet: residual bottlenecks of one shape, their widths given by a rule of four numbers and a group width.

Source: Radosavovic et al. 2020, arXiv 2003.13678, Sec. 3.3.
"""

import math
from collections import OrderedDict
from itertools import groupby
from typing import ClassVar

from torch import Tensor, nn

from .layers import AddReLU, ConvBNReLU, identity_or_projection

_STEM_CHANNELS = 32
# Widths are multiples of 8, before the group width is looked at (arXiv 2003.13678, Sec. 3.2).
_QUANTUM = 8
# The design space has no other networks (arXiv 2003.13678, Sec. 3.2).
_STAGES = 4


class XBlock(nn.Module):
    """relu(bn3(conv1x1(relu2(bn2(conv3x3(relu1(bn1(conv1x1(x)))))))) + shortcut(x)), the 3x3 grouped.

    All three convolutions have the block's width: the bottleneck ratio that the paper finds best is 1. With SE behind
    `relu2` it is the paper's Y block.

    Shapes: (N, in_channels, H, W) to (N, width, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        width: Channels inside and at the output.
        stride: Stride of the 3x3 and of the projection.
        group_width: Channels in each group of the 3x3; must divide width.

    Source: arXiv 2003.13678, Fig. 4.
    """

    after_3x3: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, width: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(
                    width, width, kernel_size=3, stride=stride, padding=1, groups=width // group_width, bias=False
                ),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv3=nn.Conv2d(width, width, kernel_size=1, bias=False),
                bn3=nn.BatchNorm2d(width),
            )
        )
        self.shortcut = identity_or_projection(in_channels, width, stride)
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, in_channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class RegNet(nn.Module):
    """logits = head(stage4(stage3(stage2(stage1(stem(x)))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and 56, 28, 14 and 7 pixels wide
    after stages 1 to 4.

    Weights: as in the authors' release (pycls), convolutions start from a normal distribution of variance 2/fan_out, BN
    at scale 1 and shift 0, the classifier from a normal distribution of deviation 0.01 with bias 0.

    Args:
        stages: Width, number of blocks and group width of each of the four stages.
        num_classes: Width of the classifier.

    Source: arXiv 2003.13678, Fig. 3.
    """

    def __init__(self, stages: list[tuple[int, int, int]], num_classes: int) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, _STEM_CHANNELS, kernel_size=3, stride=2)
        one, two, three, four = stages
        self.stage1 = _stage(_STEM_CHANNELS, *one)
        self.stage2 = _stage(one[0], *two)
        self.stage3 = _stage(two[0], *three)
        self.stage4 = _stage(three[0], *four)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(four[0], num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, XBlock)]}


def _stage(in_channels: int, width: int, blocks: int, group_width: int) -> nn.Sequential:
    """Return one stage: a stride-2 block, then `blocks - 1` blocks of stride 1."""
    stage = nn.Sequential(XBlock(in_channels, width, 2, group_width))
    for _ in range(blocks - 1):
        stage.append(XBlock(width, width, 1, group_width))
    return stage


def stage_shapes(
    depth: int, w_0: int, w_a: float, w_m: float, group_width: int, rounding: str
) -> list[tuple[int, int, int]]:
    """Return width, number of blocks and group width of each stage, by the paper's rule.

    Block j of `depth` is to have the width u_j = w_0 + w_a * j. So that blocks share widths, s_j with
    u_j = w_0 * w_m ** s_j is rounded to an integer, and w_j = w_0 * w_m ** round(s_j) to a multiple of 8. Blocks of one
    width are a stage. At last its width is rounded to a multiple of the group width, or is the group's if it is less.

    Args:
        depth: Blocks of the network, the paper's d.
        w_0: Width of the first block, a multiple of 8.
        w_a: Slope of the linear widths.
        w_m: Factor between the widths of neighbouring stages.
        group_width: The paper's g.
        rounding: "pycls" or "torchvision", see regnet.

    Source: arXiv 2003.13678, equations (2) to (4).
    """
    widths = []
    for j in range(depth):
        s_j = math.log((w_0 + w_a * j) / w_0) / math.log(w_m)
        widths.append(_QUANTUM * round(w_0 * w_m ** round(s_j) / _QUANTUM))
    stages = []
    for width, blocks in groupby(widths):
        group = min(group_width, width)
        stages.append((_multiple(width, group, rounding), len(list(blocks)), group))
    return stages


def _multiple(width: int, group: int, rounding: str) -> int:
    """Round a width to a multiple of its group width."""
    if rounding == "pycls":
        return group * round(width / group)
    rounded = int(width + group / 2) // group * group
    return rounded + group if rounded < 0.9 * width else rounded


def regnet(
    *,
    num_classes: int = 1000,
    depth: int = 16,
    w_0: int = 56,
    w_a: float = 35.73,
    w_m: float = 2.28,
    group_width: int = 16,
    rounding: str = "pycls",
) -> RegNet:
    """Build a RegNet; as it stands RegNetX-800MF, with 7,259,656 parameters and 799,699,712 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.
        depth: Blocks of the network, the paper's d.
        w_0: Width of the first block, a multiple of 8.
        w_a: Slope of the linear widths, 0 or more.
        w_m: Factor between the widths of neighbouring stages, above 1.
        group_width: Channels in each group of the 3x3 convolutions, the paper's g.
        rounding: How a width becomes a multiple of the group width. "pycls" (the authors' release, and timm): the
            nearest, of two equally near the even multiple, so that 776 becomes 768 in groups of 16. "torchvision": of
            two equally near the larger, 784, and the next one where rounding down would lose over a tenth.

    Raises:
        ValueError: If an argument is none of these, or the rule does not give four stages.

    Source: arXiv 2003.13678, equations (2) to (4).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if depth < _STAGES:
        raise ValueError(f"depth is {depth!r}: it must be {_STAGES} or more, for {_STAGES} stages")
    if w_0 < 1 or w_0 % _QUANTUM:
        raise ValueError(f"w_0 is {w_0!r}: it must be a positive multiple of {_QUANTUM}")
    if not 0 <= w_a < math.inf:
        raise ValueError(f"w_a is {w_a!r}: it must be 0 or more, and finite")
    if not 1 < w_m < math.inf:
        raise ValueError(f"w_m is {w_m!r}: it must be above 1, and finite")
    if group_width < 1:
        raise ValueError(f"group_width is {group_width!r}: it must be 1 or more")
    if rounding not in ("pycls", "torchvision"):
        raise ValueError(f'rounding is {rounding!r}: it must be "pycls" or "torchvision"')
    stages = stage_shapes(depth, w_0, w_a, w_m, group_width, rounding)
    if len(stages) != _STAGES:
        raise ValueError(
            f"depth {depth}, w_0 {w_0}, w_a {w_a:g} and w_m {w_m:g} give {len(stages)} stages instead of {_STAGES}: "
            "a larger w_m or a smaller w_a gives fewer"
        )
    return RegNet(stages, num_classes)
