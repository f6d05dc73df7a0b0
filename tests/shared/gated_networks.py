"""A network of two residual blocks, with attention blocks and without."""

import torch
from torch import nn

from selab.attention.base import Attention
from selab.attention.insert import insert_se

CHW = (1, 3, 10, 10)


class Residual(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


def network():
    """Two residual blocks; the statistics are not those of a new network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(), Residual()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def gated(*sites, **options):
    model = network()
    torch.manual_seed(1)
    insert_se(model, list(sites or ("1.bn", "2")), input_nchw=CHW, **{"reduction": 4, **options})
    return model


def blocks(model):
    """Return the attention blocks of a network."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def example():
    """Return two images."""
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))
