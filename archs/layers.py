"""Layers that several families share: convolutions with their BN, their start, and the joins of residual blocks.

A join's `formula` names what it computes. Code that fuses a join with the layers around it looks for these strings.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn


class ConvBN(nn.Sequential):
    """bn(conv(x)), padded to keep H and W at stride 1.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride), sizes rounded up.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, odd.
        stride: 1 or 2.
        groups: 1 for a dense convolution, in_channels for a depthwise one.
        bias: Give the convolution a bias, which the BN makes redundant.

    Source: BN, arXiv 1502.03167, Sec. 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias),
                bn=nn.BatchNorm2d(out_channels),
            )
        )


class ConvBNReLU(ConvBN):
    """relu(bn(conv(x))); arguments and shapes as in ConvBN."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups, bias=bias)
        self.add_module("relu", nn.ReLU(inplace=True))


def initialise_he(
    network: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_out", zero_bias: bool = False
) -> None:
    """Draw the weights of all convolutions by He. BN modules already start at scale 1 and shift 0.

    Args:
        network: with all its layers.
        mode: Which count of connections keeps its variance.
        zero_bias: Also set the biases of fully connected layers to 0; their weights keep PyTorch's start.

    Source: arXiv 1502.01852, Sec. 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif zero_bias and isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def chain(*convs: nn.Module) -> nn.Sequential:
    """Chain convolutions, named conv1, conv2, ..."""
    return nn.Sequential(OrderedDict((f"conv{number}", conv) for number, conv in enumerate(convs, start=1)))


def identity_or_projection(in_channels: int, out_channels: int, stride: int, kernel_size: int = 1) -> nn.Module:
    """Return the shortcut of a residual block: x, or bn(conv(x)) where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the block.
        kernel_size: Side of the projection's kernel.

    Source: arXiv 1512.03385, Sec. 3.3, option B.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ConvBN(in_channels, out_channels, kernel_size, stride)


class Add(nn.Module):
    """branch + shortcut. No parameters.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Source: arXiv 1603.05027, Fig. 1b; arXiv 1801.04381, Fig. 3b.
    """

    formula = "branch + shortcut"

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Add both paths (N, C, H, W)."""
        return branch + shortcut


class AddReLU(nn.Module):
    """relu(branch + shortcut). No parameters.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Source: arXiv 1512.03385, Fig. 2.
    """

    formula = "relu(branch + shortcut)"

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Add both paths (N, C, H, W) and rectify the sum."""
        out: Tensor = self.relu(branch + shortcut)
        return out


class Branches(nn.Module):
    """(branch1(x), branch2(x), ...): the same input through every child.

    Shapes: (N, C, H, W) to one (N, C_i, H', W') of each child, in their order.

    Args:
        branches: The children by name.
    """

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Apply every branch to the input (N, C, H, W)."""
        return tuple(branch(x) for branch in self.children())


class Concat(nn.Module):
    """cat(parts): the channels of all branches, in their order. No parameters.

    Shapes: some (N, C_i, H, W) to (N, sum of C_i, H, W).
    """

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Stack the channels of the parts."""
        return torch.cat(parts, dim=1)


def branched(branches: dict[str, nn.Module]) -> nn.Sequential:
    """Return concat(branches(x)), without a class of its own.

    Args:
        branches: The parallel paths by name.
    """
    return nn.Sequential(OrderedDict(branches=Branches(branches), concat=Concat()))
