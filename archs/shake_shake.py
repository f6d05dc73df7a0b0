"""Shake-Shake networks for 32x32 images: residual blocks of two branches that are mixed at random while training.

Source: Gastaldi 2017, arXiv 1705.07485, and the author's code (github.com/xgastaldi/shake-shake).
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Add, AddReLU, ConvBN, identity_or_projection, initialise_he

_STEM_CHANNELS = {"basic": 16, "resnext": 64}
# Convolutions of three stages of blocks; the depth counts two layers more, the stem and the classifier.
_LAYERS_PER_BLOCK = {"basic": 6, "resnext": 9}


class _Mix(torch.autograd.Function):
    """alpha * first + (1 - alpha) * second forwards; beta and 1 - beta times the gradient backwards."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return alpha * first + (1 - alpha) * second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        (beta,) = ctx.saved_tensors
        return beta * grad, (1 - beta) * grad, None, None


class Shake(nn.Module):
    """alpha * path1(x) + (1 - alpha) * path2(x), alpha drawn for each image; in eval mode alpha is 0.5.

    While training, the gradient sees another mixture: beta and 1 - beta, drawn independently. Both are drawn from the
    default generator of the input's device during the forward pass, so that a seed decides them.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride); alpha and beta (N, 1, 1, 1).

    Args:
        path1: The first branch.
        path2: The second one, of the same shapes.
        shake_forward: Draw alpha uniformly from [0, 1) ("Shake"); otherwise it is 0.5 ("Even").
        shake_backward: The same for beta.

    Source: arXiv 1705.07485, eq. (2), Fig. 1 and Sec. 2.1 (level "Image").
    """

    def __init__(self, path1: nn.Module, path2: nn.Module, *, shake_forward: bool, shake_backward: bool) -> None:
        super().__init__()
        self.path1 = path1
        self.path2 = path2
        self.shake_forward = shake_forward
        self.shake_backward = shake_backward

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        first, second = self.path1(x), self.path2(x)
        if not self.training:
            even: Tensor = 0.5 * (first + second)
            return even
        alpha = self._coefficients(first, self.shake_forward)
        beta = self._coefficients(first, self.shake_backward)
        mixed: Tensor = _Mix.apply(first, second, alpha, beta)  # type: ignore[no-untyped-call]
        return mixed

    @staticmethod
    def _coefficients(like: Tensor, shake: bool) -> Tensor:
        shape = (like.shape[0], 1, 1, 1)
        if shake:
            return torch.rand(shape, dtype=like.dtype, device=like.device)
        return torch.full(shape, 0.5, dtype=like.dtype, device=like.device)

    def extra_repr(self) -> str:
        """Both rules, as printed by the module."""
        return f"shake_forward={self.shake_forward}, shake_backward={self.shake_backward}"


class TwoPathShortcut(nn.Module):
    """bn(cat(conv1(h[::stride]), conv2(shifted h[::stride]))): two 1x1 convolutions that see different pixels.

    Each makes half of the channels; the second one's input is shifted right and down by one pixel.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, even.
        stride: Distance of the pixels that are read.

    Source: arXiv 1705.07485, Sec. 2.1; shakeshakeblock.lua, where it also widens the first stage, at stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        shifted = F.pad(h, (1, -1, 1, -1))
        step = self.stride
        halves = (self.conv1(h[:, :, ::step, ::step]), self.conv2(shifted[:, :, ::step, ::step]))
        out: Tensor = self.bn(torch.cat(halves, dim=1))
        return out


class ShakeBlock(nn.Module):
    """shake(bn(conv3x3(relu(bn(conv3x3(h)))))) + shortcut, with h = relu(x) and a shortcut of x, or of h if it changes.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride). A gate "after the 3x3" has no place here:
    inside `branch` there are two of everything.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels inside and at the output.
        stride: Stride of the first 3x3 and of the shortcut.
        rule: shake_forward and shake_backward, see Shake.

    Source: arXiv 1705.07485, Sec. 2.1; shakeshakeblock.lua, whose first ReLU stands in each path, which is the same.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, rule: dict[str, bool]) -> None:
        super().__init__()
        self.relu = nn.ReLU()

        def path() -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv1=nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
                    bn1=nn.BatchNorm2d(out_channels),
                    relu1=nn.ReLU(inplace=True),
                    conv2=nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                    bn2=nn.BatchNorm2d(out_channels),
                )
            )

        self.branch = nn.Sequential(OrderedDict(shake=Shake(path(), path(), **rule)))
        self.changes = stride != 1 or in_channels != out_channels
        self.shortcut: nn.Module = TwoPathShortcut(in_channels, out_channels, stride) if self.changes else nn.Identity()
        self.join: nn.Module = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        h = self.relu(x)
        out: Tensor = self.join(self.branch(h), self.shortcut(h if self.changes else x))
        return out


class ShakeResNeXtBlock(nn.Module):
    """relu(shake(bn(conv1x1(relu(bn(grouped3x3(relu(bn(conv1x1(x))))))))) + shortcut(x)).

    Shapes: (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride). A gate "after the 3x3" has no place here:
    inside `branch` there are two of everything.

    Args:
        in_channels: Channels of the input.
        width: Channels of the grouped 3x3.
        out_channels: Channels of the output.
        groups: Groups of the 3x3.
        stride: Stride of the 3x3 and of the shortcut's projection.
        rule: shake_forward and shake_backward, see Shake.

    Source: arXiv 1705.07485, Sec. 2.2: ResNeXt's block without pre-activation, form C; shakeshake.lua.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, groups: int, stride: int, rule: dict[str, bool]
    ) -> None:
        super().__init__()

        def path() -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv1=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
                    bn1=nn.BatchNorm2d(width),
                    relu1=nn.ReLU(inplace=True),
                    conv2=nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False),
                    bn2=nn.BatchNorm2d(width),
                    relu2=nn.ReLU(inplace=True),
                    conv3=nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
                    bn3=nn.BatchNorm2d(out_channels),
                )
            )

        self.branch = nn.Sequential(OrderedDict(shake=Shake(path(), path(), **rule)))
        self.shortcut = identity_or_projection(in_channels, out_channels, stride)
        self.join: nn.Module = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out


class ShakeShake(nn.Module):
    """logits = head(stage3(stage2(stage1(stem(x))))).

    Shapes: (N, 3, H, W) to (N, num_classes); 32x32 images are 32, 16 and 8 pixels wide after stages 1 to 3.

    Weights: as in the author's code: convolutions normal with variance 2/fan_out, BN scale 1 and shift 0, the
    classifier's weights uniform (which is PyTorch's start too) and its bias 0.

    Args:
        block: "basic" or "resnext".
        blocks: Blocks of each stage.
        width: See shake_shake.
        groups: See shake_shake.
        num_classes: Width of the classifier.
        rule: shake_forward and shake_backward, see Shake.
    """

    def __init__(
        self, block: str, blocks: int, width: int, groups: int, num_classes: int, rule: dict[str, bool]
    ) -> None:
        super().__init__()
        channels = _STEM_CHANNELS[block]
        self.stem = ConvBN(3, channels, kernel_size=3)
        # The basic blocks begin with a ReLU, and the last of them is followed by one.
        if block == "resnext":
            self.stem.add_module("relu", nn.ReLU(inplace=True))

        # ResNeXt's stages have 256, 512 and 1024 channels whatever the width of a group.
        out1 = width if block == "basic" else 256

        def stage(in_channels: int, factor: int, stride: int) -> nn.Sequential:
            sequence = nn.Sequential()
            out_channels, inner = factor * out1, factor * width * groups
            for _ in range(blocks):
                sequence.append(
                    ShakeBlock(in_channels, out_channels, stride, rule)
                    if block == "basic"
                    else ShakeResNeXtBlock(in_channels, inner, out_channels, groups, stride, rule)
                )
                in_channels, stride = out_channels, 1
            return sequence

        self.stage1 = stage(channels, 1, stride=1)
        self.stage2 = stage(out1, 2, stride=2)
        self.stage3 = stage(2 * out1, 4, stride=2)
        self.head = nn.Sequential()
        if block == "basic":
            self.head.add_module("relu", nn.ReLU(inplace=True))
        self.head.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.head.add_module("flatten", nn.Flatten())
        self.head.add_module("fc", nn.Linear(4 * out1, num_classes))
        initialise_he(self, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return logits

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: "residual" lists every block; it gates the mixture of its two paths."""
        return {
            "residual": [
                name for name, module in self.named_modules() if isinstance(module, ShakeBlock | ShakeResNeXtBlock)
            ]
        }


def shake_shake(
    depth: int,
    *,
    block: str,
    width: int,
    groups: int = 1,
    num_classes: int = 10,
    shake_forward: bool = True,
    shake_backward: bool = True,
) -> ShakeShake:
    """Build a Shake-Shake network; 26 2x96d of basic blocks has 26,192,922 parameters.

    Args:
        depth: 6n + 2 with basic blocks (the paper: 26), 9n + 2 with ResNeXt blocks (29).
        block: "basic": two 3x3 behind a ReLU, for CIFAR-10; "resnext": 1x1, grouped 3x3, 1x1, for CIFAR-100.
        width: Channels of the first stage, the 96 of "26 2x96d"; with ResNeXt blocks those of one group of its 3x3, the
            64 of "29 2x4x64d".
        groups: Groups of the 3x3 of ResNeXt blocks, the 4 of "29 2x4x64d"; basic blocks have 1.
        num_classes: Width of the classifier.
        shake_forward: Mix the two paths at random in the forward pass of training; otherwise half and half.
        shake_backward: The same for their gradients; with shake_forward "Shake-Shake", without it "Shake-Even".

    Raises:
        ValueError: If block is neither of these, depth does not fit it, width is below 1 (odd, with basic blocks, whose
            shortcut is made of halves), groups below 1 (other than 1, with basic blocks) or num_classes below 1.

    Source: arXiv 1705.07485, Sec. 2.1 (CIFAR-10) and 2.2 (CIFAR-100); the author's shakeshake.lua.
    """
    if block not in _LAYERS_PER_BLOCK:
        raise ValueError(f'block is {block!r}: it must be "basic" or "resnext"')
    layers = _LAYERS_PER_BLOCK[block]
    if depth < layers + 2 or (depth - 2) % layers:
        raise ValueError(f"depth is {depth!r}: with block {block!r} it must be {layers}n + 2")
    if width < 1 or (block == "basic" and width % 2):
        raise ValueError(f"width is {width!r}: it must be 1 or more, and even with basic blocks")
    if groups < 1 or (block == "basic" and groups != 1):
        raise ValueError(f"groups is {groups!r}: it must be 1 or more, and 1 with basic blocks")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}: it must be 1 or more")
    rule = {"shake_forward": shake_forward, "shake_backward": shake_backward}
    return ShakeShake(block, (depth - 2) // layers, width, groups, num_classes, rule)
