"""BN-Inception: ten Inception modules, every convolution followed by a BN.

Source: Ioffe and Szegedy 2015, arXiv 1502.03167, Appendix and Fig. 5; widths, poolings and paddings as released with
SENet (arXiv 1709.01507): github.com/hujie-frank/SENet, models/SE-BN-Inception.prototxt.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import Branches, Concat, ConvBNReLU, initialise_he

# Channels of a module's 1x1; its 3x3 (reduced, out); its double 3x3 (reduced, out); the projection of its pooling.
_WIDTHS: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "inception3a": (64, (64, 64), (64, 96), 32),
    "inception3b": (64, (64, 96), (64, 96), 64),
    "inception4a": (224, (64, 96), (96, 128), 128),
    "inception4b": (192, (96, 128), (96, 128), 128),
    "inception4c": (160, (128, 160), (128, 160), 128),
    "inception4d": (96, (128, 192), (160, 192), 128),
    "inception5a": (352, (192, 320), (160, 224), 128),
    "inception5b": (352, (192, 320), (192, 224), 128),
}
# The same of the modules that halve the resolution: no 1x1, no projection.
_STRIDED_WIDTHS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "inception3c": ((128, 160), (64, 96)),
    "inception4e": ((128, 192), (192, 256)),
}
_STEM_CHANNELS = 192


class Inception(nn.Sequential):
    """concat(branches(x)): a module whose output is the concatenation, so that a gate can be one more child.

    Shapes: (N, in_channels, H, W) to (N, sum of the branches' channels, H', W').

    Args:
        branches: The parallel paths by name.

    Source: arXiv 1502.03167, Fig. 5.
    """

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__(OrderedDict(branches=Branches(branches), concat=Concat()))


def _path3x3(in_channels: int, reduced: int, out: int, stride: int = 1) -> nn.Sequential:
    """Return a 1x1 that reduces the channels, then a 3x3."""
    return nn.Sequential(
        OrderedDict(reduce=ConvBNReLU(in_channels, reduced, 1), conv=ConvBNReLU(reduced, out, 3, stride))
    )


def _path_double3x3(in_channels: int, reduced: int, out: int, stride: int = 1) -> nn.Sequential:
    """Return a 1x1 that reduces the channels, then two 3x3 in the place of a 5x5; the second one strides."""
    return nn.Sequential(
        OrderedDict(
            reduce=ConvBNReLU(in_channels, reduced, 1),
            conv1=ConvBNReLU(reduced, out, 3),
            conv2=ConvBNReLU(out, out, 3, stride),
        )
    )


def _inception(name: str, in_channels: int) -> tuple[Inception, int]:
    """Return the module of a name, and the channels of its output."""
    if name in _STRIDED_WIDTHS:
        path3x3, path_double = _STRIDED_WIDTHS[name]
        strided: dict[str, nn.Module] = {
            "path3x3": _path3x3(in_channels, *path3x3, stride=2),
            "path_double3x3": _path_double3x3(in_channels, *path_double, stride=2),
            # Caffe pools without padding and rounds sizes up; the channels pass unprojected.
            "path_pool": nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        }
        return Inception(strided), path3x3[1] + path_double[1] + in_channels
    path1x1, path3x3, path_double, projection = _WIDTHS[name]
    # Caffe's average takes the zeros of the padding into account, as PyTorch's does. The last module pools maxima.
    pool = nn.MaxPool2d(3, 1, padding=1) if name == "inception5b" else nn.AvgPool2d(3, 1, padding=1)
    branches: dict[str, nn.Module] = {
        "path1x1": ConvBNReLU(in_channels, path1x1, 1),
        "path3x3": _path3x3(in_channels, *path3x3),
        "path_double3x3": _path_double3x3(in_channels, *path_double),
        "path_pool": nn.Sequential(OrderedDict(pool=pool, projection=ConvBNReLU(in_channels, projection, 1))),
    }
    return Inception(branches), path1x1 + path3x3[1] + path_double[1] + projection


def _stage(names: tuple[str, ...], channels: int) -> tuple[nn.Sequential, int]:
    """Return the modules of these names one after the other, and the channels of the last one's output."""
    stage = nn.Sequential()
    for name in names:
        module, channels = _inception(name, channels)
        stage.add_module(name, module)
    return stage, channels


class BNInception(nn.Module):
    """logits = head(stage5(stage4(stage3(stem(x))))), the stages numbered as the paper's modules (3a) to (5b).

    Shapes: (N, 3, H, W) to (N, num_classes), H and W multiples of 32: in the modules that stride, convolutions round an
    odd size up and the pooling rounds it down. 224x224 images are 28x28 after the stem and 14, 7 and 7 pixels wide
    after stages 3 to 5.

    Weights: convolutions normal with variance 2/fan_out, after arXiv 1502.01852 as in arXiv 1709.01507 (the BN paper
    does not say); BN scale 1, shift 0; the classifier keeps PyTorch's uniform start.

    Args:
        num_classes: Width of the classifier.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvBNReLU(3, 64, kernel_size=7, stride=2),
                pool1=nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                conv2_reduce=ConvBNReLU(64, 64, kernel_size=1),
                conv2=ConvBNReLU(64, _STEM_CHANNELS, kernel_size=3),
                pool2=nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            )
        )
        self.stage3, channels = _stage(("inception3a", "inception3b", "inception3c"), _STEM_CHANNELS)
        self.stage4, channels = _stage(
            ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e"), channels
        )
        self.stage5, channels = _stage(("inception5a", "inception5b"), channels)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels, num_classes),
            )
        )
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage5(self.stage4(self.stage3(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "concat" lists the ten Inception modules, from input to output."""
        return {"concat": [name for name, module in self.named_modules() if isinstance(module, Inception)]}


def bn_inception(*, num_classes: int = 1000) -> BNInception:
    """Build a BN-Inception: 11,285,224 parameters and 2,032,600,064 MACs at 224x224.

    Args:
        num_classes: Width of the classifier.

    Raises:
        ValueError: If num_classes is below 1.

    Source: arXiv 1502.03167, Fig. 5; exact shapes: github.com/hujie-frank/SENet, models/SE-BN-Inception.prototxt.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    return BNInception(num_classes)
