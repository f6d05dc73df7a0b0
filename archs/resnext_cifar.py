"""ResNeXt-29 for 32x32 images: three stages of bottlenecks with a grouped 3x3 convolution.

Source: Xie et al. 2016, arXiv 1611.05431, Sec. 5.3.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU
from .resnext import ResNeXtBlock

_STEM_CHANNELS = 64
# Channels at the end of stages 1 to 3; the width of a group is that of the first one, and doubles.
_STAGE_CHANNELS = (256, 512, 1024)


class CIFARResNeXt(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32, 16 and 8 pixels wide after stages 1 to 3.

    Weights: as ResNeXt's: convolutions normal with variance 2/fan_out, BN scale 1, shift 0; the classifier keeps
    PyTorch's uniform start.

    Args:
        blocks: Blocks of each stage.
        num_classes: Width of the classifier.
        groups: Groups of the 3x3 convolutions.
        width_per_group: Channels of each group in stage 1; they double from stage to stage.
    """

    def __init__(self, blocks: int, num_classes: int, groups: int, width_per_group: int) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, _STEM_CHANNELS, kernel_size=3)

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            width = groups * width_per_group * out_channels // _STAGE_CHANNELS[0]
            sequence = nn.Sequential()
            for _ in range(blocks):
                sequence.append(ResNeXtBlock(in_channels, width, out_channels, groups, stride))
                in_channels, stride = out_channels, 1
            return sequence

        out1, out2, out3 = _STAGE_CHANNELS
        self.stage1 = stage(_STEM_CHANNELS, out1, stride=1)
        self.stage2 = stage(out1, out2, stride=2)
        self.stage3 = stage(out2, out3, stride=2)
        self.head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(out3, num_classes))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, ResNeXtBlock)]}


def resnext_cifar(
    depth: int = 29, *, num_classes: int = 10, groups: int = 8, width_per_group: int = 64
) -> CIFARResNeXt:
    """Build a ResNeXt for CIFAR; ResNeXt-29 (16x64d) has 68,155,210 parameters.

    Args:
        depth: 9n + 2: n blocks of three convolutions in each of three stages.
        num_classes: Width of the classifier.
        groups: Groups of the 3x3 convolutions, the paper's cardinality: the 8 of 8x64d.
        width_per_group: Channels of each group in stage 1: the 64 of 8x64d.

    Raises:
        ValueError: If depth is not 9n + 2, or another argument is below 1.

    Source: arXiv 1611.05431, Sec. 5.3.
    """
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"depth is {depth!r}: it must be 9n + 2 (the paper trains 29)")
    for name, value in (("num_classes", num_classes), ("groups", groups), ("width_per_group", width_per_group)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}: it must be 1 or more")
    return CIFARResNeXt((depth - 2) // 9, num_classes, groups, width_per_group)
