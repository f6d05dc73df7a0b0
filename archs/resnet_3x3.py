"""ResNet-18 to -152 with a stem for images of 32x32: one 3x3 convolution of stride 1, without pooling.

Source: He et al. 2015, arXiv 1512.03385, Table 1; the stem: weiaicunzai/pytorch-cifar100, models/resnet.py.
"""

from .layers import ConvBNReLU, initialise_he
from .resnet import ResNet, resnet

_STEM_CHANNELS = 64


def resnet_3x3(depth: int, *, num_classes: int = 100) -> ResNet:
    """Build a ResNet for 32x32 images; depth 18 has 11,220,132 parameters for 100 classes.

    Bottlenecks stride in their 3x3. 32x32 images are 32, 32, 16, 8 and 4 pixels wide after the stem and stages 2 to 5.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: Width of the classifier.

    Raises:
        ValueError: If depth is none of these, or num_classes is below 1.

    Source: arXiv 1512.03385, Table 1; the stem: weiaicunzai/pytorch-cifar100, models/resnet.py.
    """
    network = resnet(depth, num_classes=num_classes, stride_in="3x3", stem_pool="torch")
    network.stem = ConvBNReLU(3, _STEM_CHANNELS, kernel_size=3)
    initialise_he(network)
    return network
