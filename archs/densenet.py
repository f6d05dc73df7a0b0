"""DenseNet for ImageNet: in a dense block, each layer reads the concatenated outputs of all layers before it.

Source: Huang et al. 2017, arXiv 1608.06993, Table 1; details as the authors released them
(github.com/liuzhuang13/DenseNet, models/densenet.lua) and as in torchvision.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import initialise_he

# Layers in the four dense blocks of each depth, all with a growth rate of 32 (arXiv 1608.06993, Table 1).
_BLOCK_LAYERS: dict[int, tuple[int, int, int, int]] = {
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
}
_GROWTH_RATE = 32
# A bottleneck's 1x1 has four times the channels that its layer adds (arXiv 1608.06993, Sec. 3, "Bottleneck layers").
_BOTTLENECK_FACTOR = 4


class ConcatBehind(nn.Module):
    """cat(shortcut, branch). No parameters.

    Shapes: (N, B, H, W) and (N, S, H, W) to (N, S + B, H, W), the shortcut's channels first.

    Source: arXiv 1608.06993, eq. (2).
    """

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Stack the channels of both paths."""
        return torch.cat((shortcut, branch), dim=1)


class DenseLayer(nn.Module):
    """cat(x, branch(x)), with branch = conv3x3(relu(bn(conv1x1(relu(bn(x)))))), or conv3x3(relu(bn(x))).

    Shapes: (N, in_channels, H, W) to (N, in_channels + growth_rate, H, W).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands: the 3x3, the last convolution.

    Args:
        in_channels: Channels of the input.
        growth_rate: Channels that are added.
        bottleneck: Whether a 1x1 stands before the 3x3.

    Source: arXiv 1608.06993, Sec. 3, "Composite function" and "Bottleneck layers".
    """

    def __init__(self, in_channels: int, growth_rate: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(in_channels), relu1=nn.ReLU(inplace=True)))
        channels, number = in_channels, 1
        if bottleneck:
            channels, number = _BOTTLENECK_FACTOR * growth_rate, 2
            self.branch.add_module("conv1", nn.Conv2d(in_channels, channels, kernel_size=1, bias=False))
            self.branch.add_module("bn2", nn.BatchNorm2d(channels))
            self.branch.add_module("relu2", nn.ReLU(inplace=True))
        self.after_3x3 = f"conv{number}"
        self.branch.add_module(self.after_3x3, nn.Conv2d(channels, growth_rate, kernel_size=3, padding=1, bias=False))
        self.shortcut = nn.Identity()
        self.join: nn.Module = ConcatBehind()

    def forward(self, x: Tensor) -> Tensor:
        """Append growth_rate channels to (N, in_channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class DenseBlock(nn.Sequential):
    """layerL(... layer2(layer1(x))): dense layers one after the other.

    Shapes: (N, in_channels, H, W) to (N, in_channels + layers * growth_rate, H, W).

    Args:
        in_channels: Channels of the input.
        layers: Number of layers.
        growth_rate: Channels that each layer adds.
        bottleneck: See DenseLayer.

    Source: arXiv 1608.06993, Fig. 1.
    """

    def __init__(self, in_channels: int, layers: int, growth_rate: int, *, bottleneck: bool) -> None:
        super().__init__()
        for number in range(layers):
            layer = DenseLayer(in_channels + number * growth_rate, growth_rate, bottleneck=bottleneck)
            self.add_module(f"layer{number + 1}", layer)


class Transition(nn.Sequential):
    """pool(conv1x1(relu(bn(x)))), between two dense blocks; the pooling averages 2x2.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/2, W/2), sizes rounded down.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    Source: arXiv 1608.06993, Sec. 3, "Pooling layers".
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            OrderedDict(
                bn=nn.BatchNorm2d(in_channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )


class DenseNet(nn.Module):
    """logits = head(stages(stem(x))); a stage is a dense block and, unless it is the last, a transition.

    Shapes: (N, 3, H, W) to (N, num_classes).

    Weights: as released: convolutions normal with variance 2/fan_out, BN scale 1 and shift 0, the classifier's bias 0;
    its weights keep PyTorch's uniform start, which is Torch's.

    Args:
        stem: The layers before the first dense block.
        stem_channels: Channels of the stem's output.
        block_layers: Layers of each dense block.
        growth_rate: Channels that each layer adds.
        num_classes: Width of the classifier.
        bottleneck: See DenseLayer.
        compression: Channels behind a transition, as a part of those before it.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stem_channels: int,
        block_layers: tuple[int, ...],
        growth_rate: int,
        num_classes: int,
        *,
        bottleneck: bool,
        compression: float,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential()
        channels = stem_channels
        for number, layers in enumerate(block_layers, start=1):
            stage = nn.Sequential(OrderedDict(block=DenseBlock(channels, layers, growth_rate, bottleneck=bottleneck)))
            channels += layers * growth_rate
            if number < len(block_layers):
                compressed = int(channels * compression)
                stage.add_module("transition", Transition(channels, compressed))
                channels = compressed
            self.stages.add_module(f"stage{number}", stage)
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
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, each list from input to output.

        "block" lists the dense blocks and the transitions between them. "residual" lists the dense layers, where the
        standard placement gates the channels that a layer adds.
        """
        modules = list(self.named_modules())
        return {
            "block": [name for name, module in modules if isinstance(module, DenseBlock | Transition)],
            "residual": [name for name, module in modules if isinstance(module, DenseLayer)],
        }


def densenet(depth: int, *, num_classes: int = 1000) -> DenseNet:
    """Build a DenseNet-BC for ImageNet; depth 121 has 7,978,856 parameters.

    224x224 images are 56x56 after the stem and 28, 14, 7 and 7 pixels wide after stages 1 to 4.

    Args:
        depth: 121, 169 or 201.
        num_classes: Width of the classifier.

    Raises:
        ValueError: If depth is none of these, or num_classes is below 1.

    Source: arXiv 1608.06993, Table 1.
    """
    if depth not in _BLOCK_LAYERS:
        allowed = ", ".join(str(known) for known in _BLOCK_LAYERS)
        raise ValueError(f"depth is {depth!r}: it must be one of {allowed}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    channels = 2 * _GROWTH_RATE
    stem = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False),
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
    )
    return DenseNet(stem, channels, _BLOCK_LAYERS[depth], _GROWTH_RATE, num_classes, bottleneck=True, compression=0.5)
