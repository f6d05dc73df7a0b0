"""ResNets for 32x32 images: three stages of 16, 32 and 64 channels, with the ReLU behind the addition or before.

Source: He et al. 2015, arXiv 1512.03385, Sec. 4.2; with pre-activation: He et al. 2016, arXiv 1603.05027.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Add, AddReLU, ConvBN, initialise_he

# Channels of the 3x3 convolutions in stages 1 to 3 (arXiv 1512.03385, Sec. 4.2).
_STAGE_WIDTHS = (16, 32, 64)
_STEM_CHANNELS = 16
# A bottleneck's output has four times the channels of its 3x3.
_EXPANSION = 4


class ZeroPad(nn.Module):
    """cat(x[:, :, ::stride, ::stride], 0): every stride-th pixel, and zeros for the channels that are new.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride). No parameters.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, not fewer.
        stride: Distance of the pixels that are kept.

    Source: arXiv 1512.03385, Sec. 3.3, option A. The zeros stand behind, as in fb.resnet.torch; others put half of them
    in front.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.added_channels))


def branch_convolutions(
    in_channels: int, width: int, stride: int, *, bottleneck: bool, stride_in: str
) -> list[nn.Conv2d]:
    """Return the convolutions of a branch: 3x3 and 3x3, or 1x1, 3x3 and 1x1."""
    if not bottleneck:
        return [
            nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
        ]
    stride1, stride2 = (stride, 1) if stride_in == "1x1" else (1, stride)
    return [
        nn.Conv2d(in_channels, width, kernel_size=1, stride=stride1, bias=False),
        nn.Conv2d(width, width, kernel_size=3, stride=stride2, padding=1, bias=False),
        nn.Conv2d(width, _EXPANSION * width, kernel_size=1, bias=False),
    ]


class ResidualBlock(nn.Module):
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands: the ReLU of the first 3x3.

    Args:
        convs: The convolutions of the branch, in order.
        stride: Stride of the block.
        shortcut: "projection" or "pad", used where the shape changes.

    Source: arXiv 1512.03385, Fig. 5.
    """

    def __init__(self, convs: list[nn.Conv2d], stride: int, shortcut: str) -> None:
        super().__init__()
        in_channels, out_channels = convs[0].in_channels, convs[-1].out_channels
        self.after_3x3 = f"relu{len(convs) - 1}"
        self.branch = nn.Sequential()
        for number, conv in enumerate(convs, start=1):
            self.branch.add_module(f"conv{number}", conv)
            self.branch.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
            if number < len(convs):
                self.branch.add_module(f"relu{number}", nn.ReLU(inplace=True))
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = ZeroPad(in_channels, out_channels, stride)
        else:
            self.shortcut = ConvBN(in_channels, out_channels, kernel_size=1, stride=stride)
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class PreActivationBlock(nn.Module):
    """conv(... relu(bn(conv(h)))) + shortcut, with h = relu(bn(x)) and a shortcut of x, or of h where it is projected.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands: the ReLU of the first 3x3.

    Args:
        convs: The convolutions of the branch, in order.
        stride: Stride of the block.
        shortcut: "projection" or "pad", used where the shape changes. A projection has no BN of its own: it reads h.

    Source: arXiv 1603.05027, Fig. 1b; the common BN and ReLU of branch and projection: the authors' resnet-pre-act.lua
    (github.com/KaimingHe/resnet-1k-layers).
    """

    def __init__(self, convs: list[nn.Conv2d], stride: int, shortcut: str) -> None:
        super().__init__()
        in_channels, out_channels = convs[0].in_channels, convs[-1].out_channels
        self.after_3x3 = f"relu{len(convs)}"
        self.preact = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(in_channels), relu=nn.ReLU(inplace=True)))
        self.branch = nn.Sequential(OrderedDict(conv1=convs[0]))
        for number, conv in enumerate(convs[1:], start=2):
            self.branch.add_module(f"bn{number}", nn.BatchNorm2d(conv.in_channels))
            self.branch.add_module(f"relu{number}", nn.ReLU(inplace=True))
            self.branch.add_module(f"conv{number}", conv)
        self.shortcut: nn.Module
        self.projects = False
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = ZeroPad(in_channels, out_channels, stride)
        else:
            self.projects = True
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        h = self.preact(x)
        out: Tensor = self.join(self.branch(h), self.shortcut(h if self.projects else x))
        return out


class CIFARResNet(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32, 16 and 8 pixels wide after stages 1 to 3. The stem is
    a 3x3 convolution; its BN and ReLU stand before the pooling where the network is pre-activated.

    Weights: as in fb.resnet.torch and the authors' resnet-pre-act.lua: convolutions normal with variance 2/fan_out, BN
    scale 1 and shift 0, the classifier's weights uniform (which is PyTorch's start too) and its bias 0.

    Args:
        blocks: Blocks of each stage.
        num_classes: Width of the classifier.
        preactivation: See resnet_cifar.
        bottleneck: See resnet_cifar.
        shortcut: See resnet_cifar.
        stride_in: See resnet_cifar.
    """

    def __init__(
        self, blocks: int, num_classes: int, preactivation: bool, bottleneck: bool, shortcut: str, stride_in: str
    ) -> None:
        super().__init__()
        block_type = PreActivationBlock if preactivation else ResidualBlock
        channels = _STEM_CHANNELS
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)),
        )
        if not preactivation:
            self.stem.add_module("bn", nn.BatchNorm2d(channels))
            self.stem.add_module("relu", nn.ReLU(inplace=True))

        def stage(in_channels: int, width: int, stride: int) -> nn.Sequential:
            sequence = nn.Sequential()
            for _ in range(blocks):
                convs = branch_convolutions(in_channels, width, stride, bottleneck=bottleneck, stride_in=stride_in)
                sequence.append(block_type(convs, stride, shortcut))
                in_channels, stride = convs[-1].out_channels, 1
            return sequence

        expansion = _EXPANSION if bottleneck else 1
        width1, width2, width3 = _STAGE_WIDTHS
        self.stage1 = stage(channels, width1, stride=1)
        self.stage2 = stage(expansion * width1, width2, stride=2)
        self.stage3 = stage(expansion * width2, width3, stride=2)
        channels = expansion * width3
        self.head = nn.Sequential()
        if preactivation:
            self.head.add_module("bn", nn.BatchNorm2d(channels))
            self.head.add_module("relu", nn.ReLU(inplace=True))
        self.head.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.head.add_module("flatten", nn.Flatten())
        self.head.add_module("fc", nn.Linear(channels, num_classes))
        initialise_he(self, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every residual block, from input to output."""
        return {
            "residual": [
                name for name, module in self.named_modules() if isinstance(module, ResidualBlock | PreActivationBlock)
            ]
        }


def resnet_cifar(
    depth: int,
    *,
    num_classes: int = 10,
    preactivation: bool = False,
    bottleneck: bool = False,
    shortcut: str = "projection",
    stride_in: str = "1x1",
) -> CIFARResNet:
    """Build a ResNet for CIFAR; depth 20 has 272,474 parameters and 40,813,184 MACs at 32x32.

    Args:
        depth: 6n + 2 with basic blocks (20, 32, 44, 56, 110, 1202), 9n + 2 with bottlenecks (164, 1001).
        num_classes: Width of the classifier.
        preactivation: BN and ReLU before the convolutions, nothing behind the addition.
        bottleneck: Blocks of 1x1, 3x3 and 1x1 instead of two 3x3, with stages of 64, 128 and 256 channels.
        shortcut: Where the shape changes. "projection": a strided 1x1 convolution (option B of arXiv 1512.03385, and
            what most ports build); "pad": zeros for the new channels (option A, the paper's choice for CIFAR).
        stride_in: Which convolution of a bottleneck strides. "1x1" is the papers and the authors' code; "3x3" is what
            fb.resnet.torch and its ports build. Basic blocks stride in their first 3x3 either way.

    Raises:
        ValueError: If depth does not fit the blocks, shortcut or stride_in is none of these, or num_classes is below 1.

    Source: arXiv 1512.03385, Sec. 4.2; bottlenecks and preactivation: arXiv 1603.05027, Table 3 and Appendix.
    """
    per_block = 9 if bottleneck else 6
    if depth < per_block + 2 or (depth - 2) % per_block:
        raise ValueError(
            f"depth is {depth!r}: with {'bottlenecks' if bottleneck else 'basic blocks'} it must be {per_block}n + 2"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if shortcut not in ("projection", "pad"):
        raise ValueError(f'shortcut is {shortcut!r}: it must be "projection" or "pad"')
    if stride_in not in ("1x1", "3x3"):
        raise ValueError(f'stride_in is {stride_in!r}: it must be "1x1" or "3x3"')
    return CIFARResNet((depth - 2) // per_block, num_classes, preactivation, bottleneck, shortcut, stride_in)
