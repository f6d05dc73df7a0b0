"""ResNeXt-50 and -101 for ImageNet: ResNet's bottlenecks with a grouped 3x3 convolution.

Source: Xie et al. 2016, arXiv 1611.05431, Table 1.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import AddReLU, identity_or_projection, initialise_he

# Blocks in stages 2 to 5 (conv2_x to conv5_x) of each depth (arXiv 1611.05431, Table 1 and Sec. 5.1).
_STAGE_BLOCKS: dict[int, tuple[int, int, int, int]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNeXtBlock(nn.Module):
    """relu(bn3(conv1x1(relu2(bn2(grouped3x3(relu1(bn1(conv1x1(x)))))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3.
        out_channels: Channels of the output.
        groups: Groups of the 3x3, the paper's cardinality; must divide width.
        stride: Stride of the 3x3 and of the projection.

    Source: arXiv 1611.05431, Fig. 3c; the stride as in the authors' release (ResNeXt's Torch code) and in that of
    arXiv 1709.01507.
    """

    after_3x3: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, width: int, out_channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv3=nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
                bn3=nn.BatchNorm2d(out_channels),
            )
        )
        self.shortcut = identity_or_projection(in_channels, out_channels, stride)
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class ResNeXt(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stem(x)))))), the stages numbered as conv2_x to conv5_x.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 56, 28, 14 and 7 pixels wide
    after stages 2 to 5.

    Weights: convolutions normal with variance 2/fan_out, fan_out counting all channels of the output, as torchvision
    and the authors' release; BN scale 1, shift 0; the classifier keeps PyTorch's uniform start, as torchvision.

    Args:
        depth: A key of the table of blocks.
        num_classes: Width of the classifier.
        groups: Groups of the 3x3 convolutions.
        width_per_group: Channels of each group in stage 2; they double from stage to stage.
        stem_pool: "caffe" or "torch", see resnext.
    """

    def __init__(self, depth: int, num_classes: int, groups: int, width_per_group: int, stem_pool: str) -> None:
        super().__init__()
        # Caffe rounds a pooling's output size up, so that it needs no padding to get from 112 to 56.
        pool = nn.MaxPool2d(3, stride=2, ceil_mode=True) if stem_pool == "caffe" else nn.MaxPool2d(3, 2, padding=1)
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
                bn=nn.BatchNorm2d(64),
                relu=nn.ReLU(inplace=True),
                pool=pool,
            )
        )

        def stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
            width = groups * width_per_group * out_channels // 256
            sequence = nn.Sequential()
            for _ in range(blocks):
                sequence.append(ResNeXtBlock(in_channels, width, out_channels, groups, stride))
                in_channels, stride = out_channels, 1
            return sequence

        blocks2, blocks3, blocks4, blocks5 = _STAGE_BLOCKS[depth]
        self.stage2 = stage(64, 256, blocks2, stride=1)
        self.stage3 = stage(256, 512, blocks3, stride=2)
        self.stage4 = stage(512, 1024, blocks4, stride=2)
        self.stage5 = stage(1024, 2048, blocks5, stride=2)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(2048, num_classes),
            )
        )
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage5(self.stage4(self.stage3(self.stage2(self.stem(x))))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, ResNeXtBlock)]}


def resnext(
    depth: int, *, num_classes: int = 1000, groups: int = 32, width_per_group: int = 4, stem_pool: str = "caffe"
) -> ResNeXt:
    """Build a ResNeXt; depth 50 with 32x4d has 25,028,904 parameters and 4,230,479,872 MACs at 224x224.

    Args:
        depth: 50 or 101.
        num_classes: Width of the classifier.
        groups: Groups of the 3x3 convolutions, the paper's cardinality: the 32 of 32x4d.
        width_per_group: Channels of each group in stage 2: the 4 of 32x4d.
        stem_pool: The stem's 3x3 max pooling of stride 2. "caffe": no padding, sizes rounded up, as in the models that
            arXiv 1709.01507 released; "torch": padding 1, as in torchvision and timm. Both take 112x112 to 56x56; they
            see other windows.

    Raises:
        ValueError: If depth or stem_pool is none of these, or another argument is below 1.

    Source: arXiv 1611.05431, Table 1.
    """
    if depth not in _STAGE_BLOCKS:
        allowed = ", ".join(str(known) for known in _STAGE_BLOCKS)
        raise ValueError(f"depth is {depth!r}: it must be one of {allowed}")
    for name, value in (("num_classes", num_classes), ("groups", groups), ("width_per_group", width_per_group)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}: it must be 1 or more")
    if stem_pool not in ("caffe", "torch"):
        raise ValueError(f'stem_pool is {stem_pool!r}: it must be "caffe" or "torch"')
    return ResNeXt(depth, num_classes, groups, width_per_group, stem_pool)
