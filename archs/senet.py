"""SENet-154 without its SE: a modified 64x4d ResNeXt-152.

Source: Hu et al. 2017, arXiv 1709.01507, Sec. 5.1 and Appendix; release: github.com/hujie-frank/SENet,
models/SENet-154.prototxt.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import AddReLU, identity_or_projection, initialise_he

# Groups of every 3x3 in a branch.
_GROUPS = 64


class SENetBlock(nn.Module):
    """relu(bn3(conv1x1(relu2(bn2(grouped3x3(relu1(bn1(conv1x1(x)))))))) + shortcut(x)).

    The first 1x1 has half as many channels as the 3x3, where a ResNeXt has as many: cheaper, at hardly any loss.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the 3x3 and of the output; the first 1x1 has half of them.
        stride: Stride of the 3x3 and of the projection.
        projection: Side of the projection's kernel, where the shape changes.

    Source: arXiv 1709.01507, Appendix.
    """

    after_3x3: ClassVar[str] = "relu2"

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, half, kernel_size=1, bias=False),
                bn1=nn.BatchNorm2d(half),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(
                    half, out_channels, kernel_size=3, stride=stride, padding=1, groups=_GROUPS, bias=False
                ),
                bn2=nn.BatchNorm2d(out_channels),
                relu2=nn.ReLU(inplace=True),
                conv3=nn.Conv2d(out_channels, out_channels, kernel_size=1, bias=False),
                bn3=nn.BatchNorm2d(out_channels),
            )
        )
        self.shortcut = identity_or_projection(in_channels, out_channels, stride, projection)
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


def _stem() -> nn.Sequential:
    """Return three 3x3 conv-bn-relu of 64, 64 and 128 channels, the first strided, and a max pooling of stride 2."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(64, 64, kernel_size=3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(64),
            relu2=nn.ReLU(inplace=True),
            conv3=nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=False),
            bn3=nn.BatchNorm2d(128),
            relu3=nn.ReLU(inplace=True),
            # Caffe rounds a pooling's output size up, so that it needs no padding to get from 112 to 56.
            pool=nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        )
    )


class SENet154(nn.Module):
    """logits = head(stage5(stage4(stage3(stage2(stem(x)))))), the stages numbered as conv2_x to conv5_x.

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 56x56 after the stem and 56, 28, 14 and 7 pixels wide
    after stages 2 to 5.

    Weights: convolutions normal with variance 2/fan_out, after arXiv 1502.01852 which the paper follows and as in timm;
    BN scale 1, shift 0; the classifier keeps PyTorch's uniform start.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = _stem()

        def stage(in_channels: int, out_channels: int, blocks: int, stride: int, projection: int) -> nn.Sequential:
            sequence = nn.Sequential()
            for _ in range(blocks):
                sequence.append(SENetBlock(in_channels, out_channels, stride, projection))
                in_channels, stride = out_channels, 1
            return sequence

        self.stage2 = stage(128, 256, blocks=3, stride=1, projection=1)
        self.stage3 = stage(256, 512, blocks=8, stride=2, projection=3)
        self.stage4 = stage(512, 1024, blocks=36, stride=2, projection=3)
        self.stage5 = stage(1024, 2048, blocks=3, stride=2, projection=3)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(2048, num_classes),
            )
        )
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage5(self.stage4(self.stage3(self.stage2(self.stem(x))))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists the 50 blocks, "native" those that the paper gates."""
        blocks = [name for name, module in self.named_modules() if isinstance(module, SENetBlock)]
        # The paper gates every block.
        return {"residual": blocks, "native": list(blocks)}


def senet154(*, num_classes: int = 1000, dropout: float = 0.2) -> SENet154:
    """Build a SENet-154 without its SE: 108,459,944 parameters and 20,681,785,344 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1709.01507, Appendix; exact shapes: github.com/hujie-frank/SENet, models/SENet-154.prototxt.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return SENet154(num_classes, dropout)
