"""Four 3x3 convolutions and two dense layers for 32x32 images: the smallest network here.

Source: keras-team/keras, examples/cifar10_cnn.py (Keras 2).
"""

from collections import OrderedDict

from torch import Tensor, nn


class ConvReLU(nn.Sequential):
    """relu(conv3x3(x)), with a bias and no normalisation.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H, W) with padding 1, to (N, out_channels, H-2, W-2) with 0.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        padding: 1 for Keras's "same", 0 for its "valid".
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding),
                relu=nn.ReLU(inplace=True),
            )
        )


class SmallCNN(nn.Module):
    """logits = head(block2(block1(x))).

    Shapes: (N, 3, 32, 32) to (N, num_classes). Inside: (N, 32, 15, 15) after block1, (N, 64, 6, 6) after block2.

    Weights: Glorot-uniform with zero biases, the defaults of Keras's Conv2D and Dense, which the example keeps.

    Args:
        num_classes: Width of the last dense layer.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.block1 = nn.Sequential(
            OrderedDict(
                conv1=ConvReLU(3, 32, padding=1),
                conv2=ConvReLU(32, 32, padding=0),
                pool=nn.MaxPool2d(2),
                dropout=nn.Dropout(0.25),
            )
        )
        self.block2 = nn.Sequential(
            OrderedDict(
                conv1=ConvReLU(32, 64, padding=1),
                conv2=ConvReLU(64, 64, padding=0),
                pool=nn.MaxPool2d(2),
                dropout=nn.Dropout(0.25),
            )
        )
        self.head = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * 6 * 6, 512),
                relu=nn.ReLU(inplace=True),
                dropout=nn.Dropout(0.5),
                fc2=nn.Linear(512, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes); the example's softmax belongs to the loss here."""
        logits: Tensor = self.head(self.block2(self.block1(x)))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "conv" lists the four conv-relu pairs, from input to output."""
        return {"conv": [name for name, module in self.named_modules() if isinstance(module, ConvReLU)]}


def small_cnn(*, num_classes: int = 10) -> SmallCNN:
    """Build the Keras CIFAR-10 example network: 1,250,858 parameters for 10 classes.

    Args:
        num_classes: Width of the last dense layer.

    Raises:
        ValueError: If num_classes is below 1.

    Source: keras-team/keras, examples/cifar10_cnn.py (Keras 2).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    return SmallCNN(num_classes)
