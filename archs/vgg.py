"""VGG-16 with batch normalisation: 13 convolutions of 3x3 in five blocks, then three dense layers.

Source: Simonyan and Zisserman 2014, arXiv 1409.1556, Table 1, column D; with BN as in SENet, arXiv 1709.01507, Table 2.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvBNReLU

# Channels and number of convolutions of the five blocks (arXiv 1409.1556, Table 1, column D).
_BLOCKS: tuple[tuple[int, int], ...] = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """logits = head(features(x)).

    Shapes: (N, 3, H, W) to (N, num_classes); 224x224 images are 7x7 after the features. Other sizes from 32x32 up are
    brought to 7x7 by average pooling, which leaves 7x7 untouched.

    Weights: as torchvision's vgg16_bn, not the paper's (which has no BN and starts deep nets from shallow ones):
    convolutions normal with variance 2/fan_out, dense layers normal with deviation 0.01, biases 0, BN scale 1, shift 0.

    Args:
        num_classes: Width of the last dense layer.
        dropout: Probability that an activation of the two hidden dense layers is dropped.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        # The BN makes the bias redundant. torchvision's vgg16_bn has it: parameters and costs compare one to one.
        self.features = nn.Sequential()
        channels = 3
        for block, (out_channels, convs) in enumerate(_BLOCKS, start=1):
            for conv in range(1, convs + 1):
                self.features.add_module(f"conv{block}_{conv}", ConvBNReLU(channels, out_channels, 3, bias=True))
                channels = out_channels
            self.features.add_module(f"pool{block}", nn.MaxPool2d(2))
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(7),
                flatten=nn.Flatten(),
                fc6=nn.Linear(channels * 7 * 7, 4096),
                relu6=nn.ReLU(inplace=True),
                dropout6=nn.Dropout(dropout),
                fc7=nn.Linear(4096, 4096),
                relu7=nn.ReLU(inplace=True),
                dropout7=nn.Dropout(dropout),
                fc8=nn.Linear(4096, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        # BN modules already start at scale 1 and shift 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "conv" lists the 13 conv-bn-relu, from input to output."""
        return {"conv": [name for name, module in self.named_modules() if isinstance(module, ConvBNReLU)]}


def vgg16(*, num_classes: int = 1000, dropout: float = 0.5) -> VGG16:
    """Build a VGG-16 with BN: 138,365,992 parameters and 15,470,264,320 MACs at 224x224.

    Args:
        num_classes: Width of the last dense layer.
        dropout: Dropout in both hidden dense layers.

    Raises:
        ValueError: If num_classes is below 1 or dropout outside [0, 1).

    Source: arXiv 1409.1556, Table 1, column D; dropout: Sec. 3.1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: it must be 0 or more and below 1")
    return VGG16(num_classes, dropout)
