"""Inception-v3: eleven Inception modules with factorised convolutions, every convolution followed by a BN.

Source: Szegedy et al. 2015, arXiv 1512.00567, Table 1 and Figs. 5 to 7 and 10; widths as the authors released them
(TensorFlow slim, nets/inception_v3.py) and as in torchvision, whose average poolings count the padding.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .bn_inception import Inception
from .inception_resnet_v2 import ConvBNReLU
from .layers import branched, chain, initialise_he

_STEM_CHANNELS = 192
# Channels of the 1x7 and 7x1 convolutions in the modules mixed6b to mixed6e.
_WIDTHS_7X7 = {"mixed6b": 128, "mixed6c": 160, "mixed6d": 160, "mixed6e": 192}


def parallel_1x3_3x1(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return concat(conv1x3(x), conv3x1(x)), the end of a path at the lowest resolution.

    Shapes: (N, in_channels, H, W) to (N, 2 * out_channels, H, W).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of each of the two convolutions.

    Source: arXiv 1512.00567, Fig. 7.
    """
    branches: dict[str, nn.Module] = {
        "conv1x3": ConvBNReLU(in_channels, out_channels, (1, 3)),
        "conv3x1": ConvBNReLU(in_channels, out_channels, (3, 1)),
    }
    return branched(branches)


def pooled_path(in_channels: int, out_channels: int, *, count_padding: bool) -> nn.Sequential:
    """Return conv1x1(pool(x)); the pooling averages 3x3 at stride 1.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H, W).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the 1x1.
        count_padding: Whether the zeros of the padding are averaged too.

    Source: arXiv 1512.00567, Fig. 5.
    """
    pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=count_padding)
    return nn.Sequential(OrderedDict(pool=pool, projection=ConvBNReLU(in_channels, out_channels, 1)))


def _mixed5(in_channels: int, pooled: int) -> Inception:
    """Return a module at 35x35, the paper's Fig. 5 with a 5x5: 224 channels and those of the pooled path."""
    return Inception(
        {
            "path1x1": ConvBNReLU(in_channels, 64, 1),
            "path5x5": chain(ConvBNReLU(in_channels, 48, 1), ConvBNReLU(48, 64, 5)),
            "path_double3x3": chain(ConvBNReLU(in_channels, 64, 1), ConvBNReLU(64, 96, 3), ConvBNReLU(96, 96, 3)),
            "path_pool": pooled_path(in_channels, pooled, count_padding=True),
        }
    )


def _mixed6a() -> Inception:
    """Return the reduction from 288 channels at 35x35 to 768 at 17x17, the paper's Fig. 10."""
    return Inception(
        {
            "path3x3": ConvBNReLU(288, 384, 3, stride=2, padded=False),
            "path_double3x3": chain(
                ConvBNReLU(288, 64, 1), ConvBNReLU(64, 96, 3), ConvBNReLU(96, 96, 3, stride=2, padded=False)
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _mixed6(width: int) -> Inception:
    """Return a module of 768 channels at 17x17, the paper's Fig. 6; `width` is of the 7x7 paths but for their end."""
    return Inception(
        {
            "path1x1": ConvBNReLU(768, 192, 1),
            "path7x7": chain(
                ConvBNReLU(768, width, 1), ConvBNReLU(width, width, (1, 7)), ConvBNReLU(width, 192, (7, 1))
            ),
            "path_double7x7": chain(
                ConvBNReLU(768, width, 1),
                ConvBNReLU(width, width, (7, 1)),
                ConvBNReLU(width, width, (1, 7)),
                ConvBNReLU(width, width, (7, 1)),
                ConvBNReLU(width, 192, (1, 7)),
            ),
            "path_pool": pooled_path(768, 192, count_padding=True),
        }
    )


def _mixed7a() -> Inception:
    """Return the reduction from 768 channels at 17x17 to 1280 at 8x8."""
    return Inception(
        {
            "path3x3": chain(ConvBNReLU(768, 192, 1), ConvBNReLU(192, 320, 3, stride=2, padded=False)),
            "path7x7": chain(
                ConvBNReLU(768, 192, 1),
                ConvBNReLU(192, 192, (1, 7)),
                ConvBNReLU(192, 192, (7, 1)),
                ConvBNReLU(192, 192, 3, stride=2, padded=False),
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _mixed7(in_channels: int) -> Inception:
    """Return a module of 2048 channels at 8x8, the paper's Fig. 7."""
    path3x3 = chain(ConvBNReLU(in_channels, 384, 1))
    path3x3.add_module("split", parallel_1x3_3x1(384, 384))
    path_double3x3 = chain(ConvBNReLU(in_channels, 448, 1), ConvBNReLU(448, 384, 3))
    path_double3x3.add_module("split", parallel_1x3_3x1(384, 384))
    return Inception(
        {
            "path1x1": ConvBNReLU(in_channels, 320, 1),
            "path3x3": path3x3,
            "path_double3x3": path_double3x3,
            "path_pool": pooled_path(in_channels, 192, count_padding=True),
        }
    )


class InceptionV3(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))), the modules named as in the release, mixed5b to mixed7c.

    Shapes: (N, 3, H, W) to (N, num_classes), H and W at least 75; 299x299 images are 35x35 after the stem and 35, 17
    and 8 pixels wide after stages 1 to 3.

    Weights: the paper does not say. Convolutions normal with variance 2/fan_in, which the release truncates (TensorFlow
    slim, nets/inception_utils.py); BN scale 1, shift 0; the classifier keeps PyTorch's uniform start. BN epsilon 0.001
    as released; momentum as PyTorch's, as in torchvision.

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
                conv5=ConvBNReLU(80, _STEM_CHANNELS, 3, padded=False),
                pool5=nn.MaxPool2d(kernel_size=3, stride=2),
            )
        )
        self.stage1 = nn.Sequential(
            OrderedDict(mixed5b=_mixed5(_STEM_CHANNELS, 32), mixed5c=_mixed5(256, 64), mixed5d=_mixed5(288, 64))
        )
        self.stage2 = nn.Sequential(OrderedDict(mixed6a=_mixed6a()))
        for name, width in _WIDTHS_7X7.items():
            self.stage2.add_module(name, _mixed6(width))
        self.stage3 = nn.Sequential(OrderedDict(mixed7a=_mixed7a(), mixed7b=_mixed7(1280), mixed7c=_mixed7(2048)))
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(2048, num_classes),
            )
        )
        initialise_he(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "concat" lists the eleven Inception modules, from input to output."""
        return {"concat": [name for name, module in self.named_modules() if isinstance(module, Inception)]}


def inception_v3(*, num_classes: int = 1000, dropout: float = 0.5) -> InceptionV3:
    """Build an Inception-v3 with 23,834,568 parameters, without the auxiliary classifier.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; 0.5 is torchvision's, the release drops 0.2.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1512.00567, Table 1; exact shapes: TensorFlow slim, nets/inception_v3.py.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return InceptionV3(num_classes, dropout)
