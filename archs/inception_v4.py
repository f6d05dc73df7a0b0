"""Inception-v4: 14 Inception modules and two reductions behind a stem of branches.

Source: Szegedy et al. 2016, arXiv 1602.07261, Figs. 3 to 9; widths and the order of 1x7 and 7x1 as the authors released
them (TensorFlow slim, nets/inception_v4.py) and as in timm.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .bn_inception import Inception
from .inception_resnet_v2 import ConvBNReLU
from .inception_v3 import parallel_1x3_3x1, pooled_path
from .layers import branched, chain, initialise_he

# Modules of each stage, without the reductions (arXiv 1602.07261, Fig. 9).
_STAGE_MODULES = (4, 7, 3)


def _stem() -> nn.Sequential:
    """Return the stem, which makes 384 channels at 35x35 out of an image of 299x299 (arXiv 1602.07261, Fig. 3)."""
    return nn.Sequential(
        OrderedDict(
            conv1=ConvBNReLU(3, 32, 3, stride=2, padded=False),
            conv2=ConvBNReLU(32, 32, 3, padded=False),
            conv3=ConvBNReLU(32, 64, 3),
            mixed3a=branched(
                {
                    "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
                    "path3x3": ConvBNReLU(64, 96, 3, stride=2, padded=False),
                }
            ),
            mixed4a=branched(
                {
                    "path3x3": chain(ConvBNReLU(160, 64, 1), ConvBNReLU(64, 96, 3, padded=False)),
                    "path7x7": chain(
                        ConvBNReLU(160, 64, 1),
                        ConvBNReLU(64, 64, (1, 7)),
                        ConvBNReLU(64, 64, (7, 1)),
                        ConvBNReLU(64, 96, 3, padded=False),
                    ),
                }
            ),
            mixed5a=branched(
                {
                    "path3x3": ConvBNReLU(192, 192, 3, stride=2, padded=False),
                    "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
                }
            ),
        )
    )


def _inception_a() -> Inception:
    """Return a module of 384 channels at 35x35 (arXiv 1602.07261, Fig. 4)."""
    return Inception(
        {
            "path1x1": ConvBNReLU(384, 96, 1),
            "path3x3": chain(ConvBNReLU(384, 64, 1), ConvBNReLU(64, 96, 3)),
            "path_double3x3": chain(ConvBNReLU(384, 64, 1), ConvBNReLU(64, 96, 3), ConvBNReLU(96, 96, 3)),
            # TensorFlow's average leaves the padding out.
            "path_pool": pooled_path(384, 96, count_padding=False),
        }
    )


def _reduction_a() -> Inception:
    """Return the reduction from 384 channels at 35x35 to 1024 at 17x17 (arXiv 1602.07261, Fig. 7)."""
    return Inception(
        {
            "path3x3": ConvBNReLU(384, 384, 3, stride=2, padded=False),
            "path_double3x3": chain(
                ConvBNReLU(384, 192, 1), ConvBNReLU(192, 224, 3), ConvBNReLU(224, 256, 3, stride=2, padded=False)
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _inception_b() -> Inception:
    """Return a module of 1024 channels at 17x17 (arXiv 1602.07261, Fig. 5)."""
    return Inception(
        {
            "path1x1": ConvBNReLU(1024, 384, 1),
            "path7x7": chain(ConvBNReLU(1024, 192, 1), ConvBNReLU(192, 224, (1, 7)), ConvBNReLU(224, 256, (7, 1))),
            "path_double7x7": chain(
                ConvBNReLU(1024, 192, 1),
                ConvBNReLU(192, 192, (7, 1)),
                ConvBNReLU(192, 224, (1, 7)),
                ConvBNReLU(224, 224, (7, 1)),
                ConvBNReLU(224, 256, (1, 7)),
            ),
            "path_pool": pooled_path(1024, 128, count_padding=False),
        }
    )


def _reduction_b() -> Inception:
    """Return the reduction from 1024 channels at 17x17 to 1536 at 8x8 (arXiv 1602.07261, Fig. 8)."""
    return Inception(
        {
            "path3x3": chain(ConvBNReLU(1024, 192, 1), ConvBNReLU(192, 192, 3, stride=2, padded=False)),
            "path7x7": chain(
                ConvBNReLU(1024, 256, 1),
                ConvBNReLU(256, 256, (1, 7)),
                ConvBNReLU(256, 320, (7, 1)),
                ConvBNReLU(320, 320, 3, stride=2, padded=False),
            ),
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2),
        }
    )


def _inception_c() -> Inception:
    """Return a module of 1536 channels at 8x8 (arXiv 1602.07261, Fig. 6)."""
    path3x3 = chain(ConvBNReLU(1536, 384, 1))
    path3x3.add_module("split", parallel_1x3_3x1(384, 256))
    path_double3x3 = chain(ConvBNReLU(1536, 384, 1), ConvBNReLU(384, 448, (3, 1)), ConvBNReLU(448, 512, (1, 3)))
    path_double3x3.add_module("split", parallel_1x3_3x1(512, 256))
    return Inception(
        {
            "path1x1": ConvBNReLU(1536, 256, 1),
            "path3x3": path3x3,
            "path_double3x3": path_double3x3,
            "path_pool": pooled_path(1536, 256, count_padding=False),
        }
    )


class InceptionV4(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))); stages 2 and 3 begin with a reduction.

    Shapes: (N, 3, H, W) to (N, num_classes), H and W at least 75; 299x299 images are 35x35 after the stem and 35, 17
    and 8 pixels wide after stages 1 to 3.

    Weights: the paper does not say. Convolutions normal with variance 2/fan_in, which the release truncates (TensorFlow
    slim, nets/inception_utils.py); BN scale 1, shift 0; the classifier keeps PyTorch's uniform start. BN epsilon 0.001
    as released; momentum as PyTorch's, as in timm.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = _stem()
        self.stage1 = nn.Sequential()
        self.stage2 = nn.Sequential(OrderedDict(reduction=_reduction_a()))
        self.stage3 = nn.Sequential(OrderedDict(reduction=_reduction_b()))
        stages = (self.stage1, self.stage2, self.stage3)
        for stage, module, count in zip(
            stages, (_inception_a, _inception_b, _inception_c), _STAGE_MODULES, strict=True
        ):
            for number in range(1, count + 1):
                stage.add_module(f"inception{number}", module())
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(1536, num_classes),
            )
        )
        initialise_he(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "concat" lists the 14 modules and two reductions, input to output."""
        return {"concat": [name for name, module in self.named_modules() if isinstance(module, Inception)]}


def inception_v4(*, num_classes: int = 1000, dropout: float = 0.2) -> InceptionV4:
    """Build an Inception-v4 with 42,679,816 parameters, without the release's auxiliary classifier.

    Args:
        num_classes: Width of the classifier.
        dropout: Dropout before the classifier; the paper keeps 0.8 of the activations.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1602.07261, Fig. 9; exact shapes: TensorFlow slim, nets/inception_v4.py.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return InceptionV4(num_classes, dropout)
