"""ResNet-18, -34, -50, -101 and -152 for ImageNet.

Source: He et al. 2015, arXiv 1512.03385, Table 1.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import AddReLU, identity_or_projection, initialise_he

# Blocks in stages 2 to 5 (conv2_x to conv5_x) of each depth (arXiv 1512.03385, Table 1).
_STAGE_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# The depths whose blocks are two 3x3 convolutions; the others are 1x1, 3x3, 1x1.
_BASIC_DEPTHS = (18, 34)


class ResidualBlock(nn.Module):
    """join(branch(x), shortcut(x)), each of the three a module of its own.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        branch: The convolutions, ending in a BN without ReLU.
        shortcut: The identity, or a projection where the shape changes.
    """

    after_3x3: ClassVar[str]

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class BasicBlock(ResidualBlock):
    """relu(bn2(conv3x3(relu1(bn1(conv3x3(x))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) to (N, width, H/stride, W/stride).

    Args:
        in_channels: Channels of the input.
        width: Channels inside and at the output.
        stride: Stride of the first 3x3 and of the projection.

    Source: arXiv 1512.03385, Fig. 5 left.
    """

    after_3x3: ClassVar[str] = "relu1"

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                bn2=nn.BatchNorm2d(width),
            )
        )
        super().__init__(branch, identity_or_projection(in_channels, width, stride))


class Bottleneck(ResidualBlock):
    """relu(bn3(conv1x1(relu2(bn2(conv3x3(relu1(bn1(conv1x1(x)))))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) to (N, 4 * width, H/stride, W/stride).

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3; the output has four times as many.
        stride: Stride of the block, also of the projection.
        stride_in: "1x1": the first 1x1 strides, "3x3": the 3x3 does.

    Source: arXiv 1512.03385, Fig. 5 right.
    """

    after_3x3: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, width: int, stride: int, stride_in: str) -> None:
        out_channels = 4 * width
        stride1, stride2 = (stride, 1) if stride_in == "1x1" else (1, stride)
        branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, kernel_size=1, stride=stride1, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, kernel_size=3, stride=stride2, padding=1, bias=False),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv3=nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
                bn3=nn.BatchNorm2d(out_channels),
            )
        )
        super().__init__(branch, identity_or_projection(in_channels, out_channels, stride))


class ResNet(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stem(x)))))), the stages numbered as conv2_x to conv5_x.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 56, 28, 14 and 7 pixels wide
    after stages 2 to 5.

    Weights: convolutions normal with variance 2/fan_out, after arXiv 1502.01852 which the paper follows and as in
    fb.resnet.torch and torchvision; BN scale 1, shift 0; the classifier keeps PyTorch's uniform start, as torchvision.

    Args:
        depth: A depth of the paper's Table 1.
        num_classes: Width of the classifier.
        stride_in: "1x1" or "3x3", see Bottleneck.
        stem_pool: "caffe" or "torch", see resnet.
    """

    def __init__(self, depth: int, num_classes: int, stride_in: str, stem_pool: str) -> None:
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
        basic = depth in _BASIC_DEPTHS
        expansion = 1 if basic else 4

        def stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
            sequence = nn.Sequential()
            for _ in range(blocks):
                block = (
                    BasicBlock(in_channels, width, stride)
                    if basic
                    else Bottleneck(in_channels, width, stride, stride_in)
                )
                sequence.append(block)
                in_channels, stride = expansion * width, 1
            return sequence

        blocks2, blocks3, blocks4, blocks5 = _STAGE_BLOCKS[depth]
        self.stage2 = stage(64, 64, blocks2, stride=1)
        self.stage3 = stage(expansion * 64, 128, blocks3, stride=2)
        self.stage4 = stage(expansion * 128, 256, blocks4, stride=2)
        self.stage5 = stage(expansion * 256, 512, blocks5, stride=2)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(expansion * 512, num_classes),
            )
        )
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage5(self.stage4(self.stage3(self.stage2(self.stem(x))))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, ResidualBlock)]}


def resnet(depth: int, *, num_classes: int = 1000, stride_in: str = "1x1", stem_pool: str = "caffe") -> ResNet:
    """Build a ResNet; depth 50 has 25,557,032 parameters and 3,857,973,248 MACs at 224x224.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: Width of the classifier.
        stride_in: Which convolution of a bottleneck strides. "1x1" is the paper and the authors' Caffe models; "3x3" is
            what fb.resnet.torch and torchvision build, often called v1.5, with 231,211,008 MACs more at 224x224. The
            basic blocks of depths 18 and 34 have no 1x1 and stride in their first 3x3 either way.
        stem_pool: The stem's 3x3 max pooling of stride 2. "caffe": no padding, sizes rounded up; "torch": padding 1.
            Both take 112x112 to 56x56; they see other windows.

    Raises:
        ValueError: If depth, stride_in or stem_pool is none of these, or num_classes is below 1.

    Source: arXiv 1512.03385, Table 1.
    """
    if depth not in _STAGE_BLOCKS:
        allowed = ", ".join(str(known) for known in _STAGE_BLOCKS)
        raise ValueError(f"depth is {depth!r}: it must be one of {allowed}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if stride_in not in ("1x1", "3x3"):
        raise ValueError(f'stride_in is {stride_in!r}: it must be "1x1" or "3x3"')
    if stem_pool not in ("caffe", "torch"):
        raise ValueError(f'stem_pool is {stem_pool!r}: it must be "caffe" or "torch"')
    return ResNet(depth, num_classes, stride_in, stem_pool)
