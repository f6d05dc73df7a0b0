"""MobileNetV1 for 32x32 images: its first convolution and its first blocks keep the resolution.

Source: Howard et al. 2017, arXiv 1704.04861, Table 1, in the size that
kuangliu/pytorch-cifar (mobilenet.py) gave it for CIFAR.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU
from .mobilenet import DepthwiseSeparable


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return `blocks` blocks of one resolution, the first of which strides and changes the channels."""
    stage = nn.Sequential(DepthwiseSeparable(in_channels, channels, stride))
    for _ in range(blocks - 1):
        stage.append(DepthwiseSeparable(channels, channels, stride=1))
    return stage


class CIFARMobileNetV1(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stage1(stem(x))))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32x32 after the stem and 32, 16, 8, 4 and 2 pixels wide
    after stages 1 to 5.

    Weights: PyTorch's own start, as in the port.

    Args:
        num_classes: Width of the classifier.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # The blocks of arXiv 1704.04861, Table 1; the port's stem does not stride.
        self.stem = ConvBNReLU(3, 32, kernel_size=3)
        self.stage1 = _stage(32, 64, blocks=1, stride=1)
        self.stage2 = _stage(64, 128, blocks=2, stride=2)
        self.stage3 = _stage(128, 256, blocks=2, stride=2)
        self.stage4 = _stage(256, 512, blocks=6, stride=2)
        self.stage5 = _stage(512, 1024, blocks=2, stride=2)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(1024, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        features = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))
        logits: Tensor = self.head(features)
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "pointwise" lists the 13 pointwise conv-bn-relu, input to output."""
        return {
            "pointwise": [
                f"{name}.pointwise" for name, module in self.named_modules() if isinstance(module, DepthwiseSeparable)
            ]
        }


def mobilenet_cifar(*, num_classes: int = 10) -> CIFARMobileNetV1:
    """Build a MobileNetV1 for CIFAR: 3,217,226 parameters and 46,354,432 MACs at 32x32.

    Args:
        num_classes: Width of the classifier.

    Raises:
        ValueError: If num_classes is below 1.

    Source: arXiv 1704.04861, Table 1; kuangliu/pytorch-cifar, mobilenet.py.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    return CIFARMobileNetV1(num_classes)
