"""MobileNetV1: a 3x3 stem, then 13 pairs of a depthwise 3x3 and a pointwise 1x1 convolution.

Source: Howard et al. 2017, arXiv 1704.04861, Table 1.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU

# Output channels and stride of the 13 depthwise-separable blocks at width_mult 1 (arXiv 1704.04861, Table 1).
# The table prints stride 2 for the last depthwise convolution although its output stays 7x7; its stride is 1.
_BLOCKS: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
_STEM_CHANNELS = 32

# Below 8 channels the authors' release (TensorFlow slim, `min_depth`) stops thinning.
_MIN_CHANNELS = 8


class DepthwiseSeparable(nn.Module):
    """pointwise(depthwise(x)): each channel is filtered alone, then a 1x1 convolution mixes the channels.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the depthwise convolution, 1 or 2.

    Source: arXiv 1704.04861, Sec. 3.1 and Fig. 3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvBNReLU(in_channels, in_channels, kernel_size=3, stride=stride, groups=in_channels)
        self.pointwise = ConvBNReLU(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class MobileNetV1(nn.Module):
    """logits = head(blocks(stem(x))).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 112x112 after the stem and 7x7 after the last block.

    Weights: the paper does not say. As in the authors' release (TensorFlow slim, mobilenet_v1.py), every convolution
    and the classifier start from a normal distribution of deviation 0.09, truncated at two deviations; biases start at
    0, BN at scale 1 and shift 0. The BN keeps PyTorch's own momentum and epsilon.

    Args:
        num_classes: Width of the classifier.
        width_mult: Factor on every channel count, the paper's alpha.
        dropout: Probability that the classifier's input is dropped.
    """

    def __init__(self, num_classes: int, width_mult: float, dropout: float) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(int(channels * width_mult), _MIN_CHANNELS)

        channels = scaled(_STEM_CHANNELS)
        self.stem = ConvBNReLU(3, channels, kernel_size=3, stride=2)
        self.blocks = nn.Sequential()
        for out_channels, stride in _BLOCKS:
            self.blocks.append(DepthwiseSeparable(channels, scaled(out_channels), stride))
            channels = scaled(out_channels)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(channels, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.09, a=-0.18, b=0.18)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.blocks(self.stem(x)))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "pointwise" lists the 13 pointwise conv-bn-relu, input to output."""
        return {
            "pointwise": [
                f"{name}.pointwise" for name, module in self.named_modules() if isinstance(module, DepthwiseSeparable)
            ]
        }


def mobilenet_v1(*, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.001) -> MobileNetV1:
    """Build a MobileNetV1: 4,231,976 parameters and 568,740,352 MACs at width 1 and 224x224.

    Args:
        num_classes: Width of the classifier.
        width_mult: Factor on every channel count; the paper trains 1, 0.75, 0.5 and 0.25. No layer gets fewer than 8
            channels.
        dropout: Dropout before the classifier. The paper has none; the authors' release keeps 0.999 of the activations.

    Raises:
        ValueError: If num_classes is below 1, width_mult not above 0 or dropout outside [0, 1).

    Source: arXiv 1704.04861, Table 1; width_mult: Sec. 3.3.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not width_mult > 0:
        raise ValueError(f"width_mult is {width_mult!r}: it must be above 0 (the paper trains 1, 0.75, 0.5 and 0.25)")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return MobileNetV1(num_classes, width_mult, dropout)
