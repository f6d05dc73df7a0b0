"""ShuffleNet V2: units that split their channels, leave one half as it is, and shuffle both halves together again.

Source: Ma et al. 2018, arXiv 1807.11164, Fig. 3 and Table 5.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

# Output channels of stages 2, 3 and 4 and of the last 1x1 convolution at each level of complexity (arXiv 1807.11164,
# Table 5). The levels are no multiples of each other: 1x has 116 channels where 0.5x has 48.
_CHANNELS: dict[float, tuple[int, int, int, int]] = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
# Units in stages 2, 3 and 4; the first of each has stride 2.
_STAGE_UNITS = (4, 8, 4)
_STEM_CHANNELS = 24


class ConcatShuffle(nn.Module):
    """cat(shortcut, branch).reshape(N, 2, C/2, H, W).transpose(1, 2): the channels of both paths, alternating.

    Shapes: two times (N, C/2, H, W) to (N, C, H, W). No parameters.

    Source: arXiv 1807.11164, Sec. 3 and Fig. 3.
    """

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Interleave the channels of both paths, the shortcut's first."""
        n, c, h, w = branch.shape
        both = torch.cat((shortcut, branch), dim=1)
        return both.reshape(n, 2, c, h, w).transpose(1, 2).reshape(n, 2 * c, h, w)


def _branch(in_channels: int, width: int, stride: int) -> nn.Sequential:
    """Return relu3(bn3(conv3(bn2(conv2(relu1(bn1(conv1(x)))))))): 1x1, 3x3 depthwise without ReLU, 1x1."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=width, bias=False),
            bn2=nn.BatchNorm2d(width),
            conv3=nn.Conv2d(width, width, kernel_size=1, bias=False),
            bn3=nn.BatchNorm2d(width),
            relu3=nn.ReLU(inplace=True),
        )
    )


class Unit(nn.Module):
    """The stride-1 unit: join(branch(second half of x), first half of x), the join stacking and shuffling.

    Shapes: (N, C, H, W) to the same.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        channels: Channels of input and output; branch and shortcut have half of them each.

    Source: arXiv 1807.11164, Fig. 3c.
    """

    after_3x3: ClassVar[str] = "bn2"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)
        self.shortcut = nn.Identity()
        self.join: nn.Module = ConcatShuffle()

    def forward(self, x: Tensor) -> Tensor:
        """Split (N, C, H, W), work on one half, join it with the other."""
        kept, worked_on = x.chunk(2, dim=1)
        out: Tensor = self.join(self.branch(worked_on), self.shortcut(kept))
        return out


class DownsampleUnit(nn.Module):
    """The stride-2 unit: join(branch(x), shortcut(x)), both of the whole input and of stride 2.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/2, W/2).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; branch and shortcut make half of them each.

    Source: arXiv 1807.11164, Fig. 3d.
    """

    after_3x3: ClassVar[str] = "bn2"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels // 2
        self.branch = _branch(in_channels, width, stride=2)
        self.shortcut = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(
                    in_channels, in_channels, kernel_size=3, stride=2, padding=1, groups=in_channels, bias=False
                ),
                bn1=nn.BatchNorm2d(in_channels),
                conv2=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
            )
        )
        self.join: nn.Module = ConcatShuffle()

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, in_channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class ShuffleNetV2(nn.Module):
    """logits = head(stage4(stage3(stage2(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 28x28, 14x14 and 7x7 after
    stages 2, 3 and 4.

    Weights: the paper names none. As in the authors' release (megvii-model/ShuffleNet-Series), convolutions start from
    a normal distribution whose deviation is 1 / input channels of a group, 0.01 in the stem; the classifier from one of
    deviation 0.01 with bias 0; BN at scale 1 and shift 0.0001.

    Args:
        stage_channels: Output channels of stages 2, 3 and 4.
        last_channels: Channels of the head's 1x1 convolution.
        num_classes: Width of the classifier.
    """

    def __init__(self, stage_channels: tuple[int, int, int], last_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, _STEM_CHANNELS, kernel_size=3, stride=2, padding=1, bias=False),
                bn=nn.BatchNorm2d(_STEM_CHANNELS),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        out2, out3, out4 = stage_channels
        units2, units3, units4 = _STAGE_UNITS
        self.stage2 = _stage(_STEM_CHANNELS, out2, units2)
        self.stage3 = _stage(out2, out3, units3)
        self.stage4 = _stage(out3, out4, units4)
        self.head = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(out4, last_channels, kernel_size=1, bias=False),
                bn=nn.BatchNorm2d(last_channels),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(last_channels, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / module.weight.shape[1])
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.0001)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.stem.get_submodule("conv").get_parameter("weight"), std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage4(self.stage3(self.stage2(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists all 16 units, from input to output.

        The stride-2 units are among them, for their branch makes the same half of the channels as that of the others.
        """
        return {
            "residual": [name for name, module in self.named_modules() if isinstance(module, Unit | DownsampleUnit)]
        }


def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    """Return one stage: a stride-2 unit, then `units - 1` units of stride 1."""
    stage = nn.Sequential(DownsampleUnit(in_channels, out_channels))
    for _ in range(units - 1):
        stage.append(Unit(out_channels))
    return stage


def shufflenet_v2(*, num_classes: int = 1000, width_mult: float = 1.0) -> ShuffleNetV2:
    """Build a ShuffleNet V2: 2,278,604 parameters and 144,907,992 MACs at level 1x and 224x224.

    Args:
        num_classes: Width of the classifier. It has a bias, as in torchvision; the authors' release has none there, and
            drops a fifth of the classifier's input at level 2x, which torchvision does not.
        width_mult: The paper's level of complexity: 0.5, 1, 1.5 or 2. Its channels are the paper's, not multiples.

    Raises:
        ValueError: If num_classes is below 1 or width_mult is not in the paper's table.

    Source: arXiv 1807.11164, Table 5.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if width_mult not in _CHANNELS:
        allowed = ", ".join(f"{known:g}" for known in _CHANNELS)
        raise ValueError(f"width_mult is {width_mult!r}: it must be one of {allowed}")
    *stage_channels, last_channels = _CHANNELS[width_mult]
    out2, out3, out4 = stage_channels
    return ShuffleNetV2((out2, out3, out4), last_channels, num_classes)
