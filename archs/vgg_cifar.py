"""VGG-16 with batch normalisation for 32x32 images: 13 convolutions of 3x3 in five stages, then one dense layer.

Source: Simonyan and Zisserman 2014, arXiv 1409.1556, Table 1, column D, in the size that
kuangliu/pytorch-cifar (vgg.py) gave it for CIFAR.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU


def _stage(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    """Return `convs` convolutions of 3x3, the first of which changes the channels, and a 2x2 max pooling."""
    # The BN makes the bias redundant. The port has it: parameters and costs compare one to one.
    stage = nn.Sequential()
    for number in range(1, convs + 1):
        stage.add_module(f"conv{number}", ConvBNReLU(in_channels, channels, 3, bias=True))
        in_channels = channels
    stage.add_module("pool", nn.MaxPool2d(2))
    return stage


class CIFARVGG16(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stage1(x)))))), each stage ending in a 2x2 max pooling.

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are one pixel wide after stage 5, so that the pooling of the
    head leaves them as they are. It averages over larger ones.

    Weights: PyTorch's own start, as in the port.

    Args:
        num_classes: Width of the dense layer.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = _stage(3, 64, convs=2)
        self.stage2 = _stage(64, 128, convs=2)
        self.stage3 = _stage(128, 256, convs=3)
        self.stage4 = _stage(256, 512, convs=3)
        self.stage5 = _stage(512, 512, convs=3)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(512, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        features = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(x)))))
        logits: Tensor = self.head(features)
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "conv" lists the 13 conv-bn-relu, from input to output."""
        return {"conv": [name for name, module in self.named_modules() if isinstance(module, ConvBNReLU)]}


def vgg16_cifar(*, num_classes: int = 10) -> CIFARVGG16:
    """Build a VGG-16 with BN for CIFAR: 14,728,266 parameters and 313,201,664 MACs at 32x32.

    Args:
        num_classes: Width of the dense layer.

    Raises:
        ValueError: If num_classes is below 1.

    Source: arXiv 1409.1556, Table 1, column D; kuangliu/pytorch-cifar, vgg.py.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    return CIFARVGG16(num_classes)
