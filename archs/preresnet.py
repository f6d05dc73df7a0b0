"""ResNet-18 to -152 for ImageNet with pre-activation: BN and ReLU before the convolutions, nothing behind the addition.

Source: He et al. 2016, arXiv 1603.05027; stages and widths: He et al. 2015, arXiv 1512.03385, Table 1.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import initialise_he
from .resnet_cifar import PreActivationBlock, branch_convolutions

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
_STAGE_WIDTHS = (64, 128, 256, 512)
_STEM_CHANNELS = 64


class PreResNet(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stem(x)))))), the stages numbered as conv2_x to conv5_x.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 56, 28, 14 and 7 pixels wide
    after stages 2 to 5. The stem has a BN and ReLU of its own; another pair stands before the last pooling.

    Weights: as in the authors' resnet-pre-act.lua (github.com/KaimingHe/resnet-1k-layers): convolutions normal with
    variance 2/fan_out, BN scale 1 and shift 0, the classifier's weights uniform (PyTorch's start too) and its bias 0.

    Args:
        depth: See preresnet.
        num_classes: Width of the classifier.
        stride_in: See preresnet.
    """

    def __init__(self, depth: int, num_classes: int, stride_in: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, _STEM_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False),
                bn=nn.BatchNorm2d(_STEM_CHANNELS),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        bottleneck = depth not in _BASIC_DEPTHS
        channels = _STEM_CHANNELS

        def stage(width: int, blocks: int, stride: int) -> nn.Sequential:
            nonlocal channels
            sequence = nn.Sequential()
            for _ in range(blocks):
                convs = branch_convolutions(channels, width, stride, bottleneck=bottleneck, stride_in=stride_in)
                sequence.append(PreActivationBlock(convs, stride, "projection"))
                channels, stride = convs[-1].out_channels, 1
            return sequence

        blocks2, blocks3, blocks4, blocks5 = _STAGE_BLOCKS[depth]
        width2, width3, width4, width5 = _STAGE_WIDTHS
        self.stage2 = stage(width2, blocks2, stride=1)
        self.stage3 = stage(width3, blocks3, stride=2)
        self.stage4 = stage(width4, blocks4, stride=2)
        self.stage5 = stage(width5, blocks5, stride=2)
        self.head = nn.Sequential(
            OrderedDict(
                bn=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels, num_classes),
            )
        )
        initialise_he(self, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage5(self.stage4(self.stage3(self.stage2(self.stem(x))))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, PreActivationBlock)]}


def preresnet(depth: int, *, num_classes: int = 1000, stride_in: str = "1x1") -> PreResNet:
    """Build a pre-activation ResNet; depth 50 has 25,549,480 parameters.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: Width of the classifier.
        stride_in: Which convolution of a bottleneck strides, "1x1" or "3x3". "1x1" is the paper of the ResNets and the
            authors' resnet-pre-act.lua; "3x3" is what fb.resnet.torch builds. The basic blocks of depths 18 and 34
            stride in their first 3x3 either way.

    Raises:
        ValueError: If depth or stride_in is none of these, or num_classes is below 1.

    Source: arXiv 1603.05027, Fig. 1b; arXiv 1512.03385, Table 1.
    """
    if depth not in _STAGE_BLOCKS:
        allowed = ", ".join(str(known) for known in _STAGE_BLOCKS)
        raise ValueError(f"depth is {depth!r}: it must be one of {allowed}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if stride_in not in ("1x1", "3x3"):
        raise ValueError(f'stride_in is {stride_in!r}: it must be "1x1" or "3x3"')
    return PreResNet(depth, num_classes, stride_in)
