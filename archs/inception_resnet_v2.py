"""Inception-ResNet-v2: forty residual blocks whose branch is a small Inception module.

Source: Szegedy et al. 2016, arXiv 1602.07261, Fig. 15; widths and blocks as the authors released them (TensorFlow slim,
nets/inception_resnet_v2.py) and as in timm. The release differs from the paper's figures: another stem, 10, 20 and 10
blocks instead of 5, 10 and 5, and 320, 1088 and 2080 channels.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .layers import Branches, Concat, branched, chain

# As in the release; PyTorch's own is 1e-5.
_BN_EPS = 1e-3


class ConvBNReLU(nn.Sequential):
    """relu(bn(conv(x))), without a convolution bias, since the BN has one.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride) with padding, smaller without.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of a square kernel or (height, width), odd.
        stride: 1 or 2.
        padded: Whether the map is padded to keep its size at stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        *,
        padded: bool = True,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (height // 2, width // 2) if padded else (0, 0)
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False),
                bn=nn.BatchNorm2d(out_channels, eps=_BN_EPS),
                relu=nn.ReLU(inplace=True),
            )
        )


class ScaledAdd(nn.Module):
    """relu(shortcut + scale * branch), or the sum alone. No parameters.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Args:
        scale: The constant that keeps the training of so wide a network stable.
        relu: Whether the sum is rectified.

    Source: arXiv 1602.07261, Sec. 3.3 and Fig. 20.
    """

    def __init__(self, scale: float, *, relu: bool) -> None:
        super().__init__()
        self.scale = scale
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Add both paths (N, C, H, W), the branch scaled."""
        out: Tensor = self.relu(shortcut + self.scale * branch)
        return out

    def extra_repr(self) -> str:
        """Show the scale in the printed network."""
        return f"scale={self.scale}"


class InceptionResNetBlock(nn.Module):
    """relu(x + scale * conv1x1(concat(branches(x)))).

    The 1x1 has a bias and neither BN nor ReLU.

    Shapes: (N, channels, H, W) to the same.

    Attributes:
        after_3x3: The child of `branch` behind which a gate "after the 3x3" stands: the concatenation, which holds the
            spatial convolutions (3x3, 1x7 and 7x1, or 1x3 and 3x1) and is what the last 1x1 expands.

    Args:
        channels: Channels of input and output.
        branches: The parallel paths by name.
        concatenated: The sum of their channels.
        scale: Factor of the branch.
        relu: Whether the sum is rectified.

    Source: arXiv 1602.07261, Figs. 16, 17 and 19; widths as released.
    """

    after_3x3: ClassVar[str] = "concat"

    def __init__(
        self, channels: int, branches: dict[str, nn.Module], concatenated: int, scale: float, *, relu: bool = True
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            OrderedDict(
                branches=Branches(branches),
                concat=Concat(),
                conv=nn.Conv2d(concatenated, channels, kernel_size=1),
            )
        )
        self.shortcut = nn.Identity()
        self.join: nn.Module = ScaledAdd(scale, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Join branch and shortcut of (N, channels, H, W)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


def _mixed5b() -> nn.Sequential:
    """Return the module that makes 320 channels out of the stem's 192, at 35x35."""
    return branched(
        {
            "path1x1": ConvBNReLU(192, 96, 1),
            "path5x5": chain(ConvBNReLU(192, 48, 1), ConvBNReLU(48, 64, 5)),
            "path_double3x3": chain(ConvBNReLU(192, 64, 1), ConvBNReLU(64, 96, 3), ConvBNReLU(96, 96, 3)),
            "path_pool": nn.Sequential(
                OrderedDict(
                    # TensorFlow's average leaves the padding out.
                    pool=nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
                    projection=ConvBNReLU(192, 64, 1),
                )
            ),
        }
    )


def _mixed6a() -> nn.Sequential:
    """Return the reduction from 320 channels at 35x35 to 1088 at 17x17."""
    return branched(
        {
            "path3x3": ConvBNReLU(320, 384, 3, stride=2, padded=False),
            "path_double3x3": chain(
                ConvBNReLU(320, 256, 1), ConvBNReLU(256, 256, 3), ConvBNReLU(256, 384, 3, stride=2, padded=False)
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _mixed7a() -> nn.Sequential:
    """Return the reduction from 1088 channels at 17x17 to 2080 at 8x8."""
    return branched(
        {
            "path3x3_1": chain(ConvBNReLU(1088, 256, 1), ConvBNReLU(256, 384, 3, stride=2, padded=False)),
            "path3x3_2": chain(ConvBNReLU(1088, 256, 1), ConvBNReLU(256, 288, 3, stride=2, padded=False)),
            "path_double3x3": chain(
                ConvBNReLU(1088, 256, 1), ConvBNReLU(256, 288, 3), ConvBNReLU(288, 320, 3, stride=2, padded=False)
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _block35() -> InceptionResNetBlock:
    """Return a block at 35x35, the paper's Inception-ResNet-A."""
    branches: dict[str, nn.Module] = {
        "path1x1": ConvBNReLU(320, 32, 1),
        "path3x3": chain(ConvBNReLU(320, 32, 1), ConvBNReLU(32, 32, 3)),
        "path_double3x3": chain(ConvBNReLU(320, 32, 1), ConvBNReLU(32, 48, 3), ConvBNReLU(48, 64, 3)),
    }
    return InceptionResNetBlock(320, branches, concatenated=32 + 32 + 64, scale=0.17)


def _block17() -> InceptionResNetBlock:
    """Return a block at 17x17, the paper's Inception-ResNet-B."""
    branches: dict[str, nn.Module] = {
        "path1x1": ConvBNReLU(1088, 192, 1),
        "path7x7": chain(ConvBNReLU(1088, 128, 1), ConvBNReLU(128, 160, (1, 7)), ConvBNReLU(160, 192, (7, 1))),
    }
    return InceptionResNetBlock(1088, branches, concatenated=192 + 192, scale=0.1)


def _block8(*, last: bool) -> InceptionResNetBlock:
    """Return a block at 8x8, the paper's Inception-ResNet-C; the last one is neither scaled down nor rectified."""
    branches: dict[str, nn.Module] = {
        "path1x1": ConvBNReLU(2080, 192, 1),
        "path3x3": chain(ConvBNReLU(2080, 192, 1), ConvBNReLU(192, 224, (1, 3)), ConvBNReLU(224, 256, (3, 1))),
    }
    return InceptionResNetBlock(2080, branches, concatenated=192 + 256, scale=1.0 if last else 0.2, relu=not last)


def _stage(mixed: nn.Sequential, blocks: list[InceptionResNetBlock]) -> nn.Sequential:
    """Return the module that changes the channels, then the residual blocks, named block1, block2, ..."""
    stage = nn.Sequential(OrderedDict(mixed=mixed))
    for number, block in enumerate(blocks, start=1):
        stage.add_module(f"block{number}", block)
    return stage


class InceptionResNetV2(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes), H and W at least 75; 299x299 images are 35x35 after the stem and 35, 17
    and 8 pixels wide after stages 1 to 3.

    Weights: the paper does not say, and the release leaves TensorFlow slim's own start: uniform after Glorot for
    convolutions and classifier, biases 0, BN scale 1, shift 0. (The release's BN learns a shift alone; the ports, and
    this network, have a scale too.) BN epsilon 0.001 as released; momentum as PyTorch's, as in timm.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvBNReLU(3, 32, 3, stride=2, padded=False),
                conv2=ConvBNReLU(32, 32, 3, padded=False),
                conv3=ConvBNReLU(32, 64, 3),
                pool3=nn.MaxPool2d(kernel_size=3, stride=2),
                conv4=ConvBNReLU(64, 80, 1),
                conv5=ConvBNReLU(80, 192, 3, padded=False),
                pool5=nn.MaxPool2d(kernel_size=3, stride=2),
            )
        )
        self.stage1 = _stage(_mixed5b(), [_block35() for _ in range(10)])
        self.stage2 = _stage(_mixed6a(), [_block17() for _ in range(20)])
        self.stage3 = _stage(_mixed7a(), [_block8(last=number == 10) for number in range(1, 11)])
        self.head = nn.Sequential(
            OrderedDict(
                conv=ConvBNReLU(2080, 1536, 1),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(1536, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists the 40 residual blocks, from input to output."""
        return {"residual": [name for name, module in self.named_modules() if isinstance(module, InceptionResNetBlock)]}


def inception_resnet_v2(*, num_classes: int = 1000, dropout: float = 0.2) -> InceptionResNetV2:
    """Build an Inception-ResNet-v2 with 55,843,464 parameters, without the release's auxiliary classifier.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; the paper keeps 0.8 of the activations.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1602.07261, Fig. 15; exact shapes: TensorFlow slim, nets/inception_resnet_v2.py.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return InceptionResNetV2(num_classes, dropout)
