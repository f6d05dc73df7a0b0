"""Reimplementations of the SE block: as torchvision and timm write it, and without one of its stages."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from selab.attention.se import SqueezeExcitation
from selab.deploy.spelling import pointwise
from selab.errors import InsertionError, nearest


class TorchvisionSE(nn.Module):
    """scale * x, with scale = gate(fc2(act(fc1(avgpool(x))))): adaptive pooling and two 1x1 convolutions.

    Shapes: input and output (N, C, H, W); the scale (N, C, 1, 1).

    Args:
        block: the source of weights, activation and gate; not changed.

    Source: torchvision.ops.SqueezeExcitation: which modules, in which order, and which factor comes first.
    """

    def __init__(self, block: SqueezeExcitation) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = pointwise(block.fc1.weight, block.fc1.bias)
        self.fc2 = pointwise(block.fc2.weight, block.fc2.bias)
        self.activation = type(block.activation)()
        self.scale_activation = type(block.gate)()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        scale: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class TimmSE(nn.Module):
    """x * gate(fc2(act(fc1(mean(x))))): a mean over height and width and two 1x1 convolutions, the activation in place.

    Shapes: input and output (N, C, H, W); the gate (N, C, 1, 1).

    Args:
        block: the source of weights, activation and gate; not changed.

    Source: timm.layers.SEModule: which modules, in which order, and which factor comes first.
    """

    def __init__(self, block: SqueezeExcitation) -> None:
        super().__init__()
        self.fc1 = pointwise(block.fc1.weight, block.fc1.bias)
        self.act = type(block.activation)(inplace=True)
        self.fc2 = pointwise(block.fc2.weight, block.fc2.bias)
        self.gate = type(block.gate)()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        x_se = x.mean((2, 3), keepdim=True)
        gate: Tensor = self.gate(self.fc2(self.act(self.fc1(x_se))))
        return x * gate


class _Ablation(nn.Module):
    """A block without one of its stages; the others run the block's own code."""

    def __init__(self, block: SqueezeExcitation) -> None:
        super().__init__()
        self.block = block


class WithoutSqueeze(_Ablation):
    """x * excite(v): the factors come from a fixed vector instead of the feature map's mean.

    Shapes: input and output (N, C, H, W); v (C).
    """

    vector: Tensor

    def __init__(self, block: SqueezeExcitation) -> None:
        super().__init__(block)
        weight = block.fc1.weight
        vector = torch.linspace(0, 1, block.channels, device=weight.device, dtype=weight.dtype)
        self.register_buffer("vector", vector, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        factor = self.block.excite(self.vector.to(x.dtype).expand(x.shape[0], -1))
        return x * factor[:, :, None, None]


class WithoutExcitation(_Ablation):
    """x * gate(mean(x)): neither of the two layers, nor the activation between them.

    The gate stays. Without it every block would square the scale of the feature map, which would underflow or overflow
    within a few blocks; arithmetic on such numbers is slower.

    Shapes: input and output (N, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        factor: Tensor = self.block.gate(self.block.squeeze(x))
        return x * factor[:, :, None, None]


class WithoutScale(_Ablation):
    """x, after squeeze and excitation have run; the backward pass sends zero gradients through both.

    For eager mode only: a compiler removes unused results.

    Shapes: input and output (N, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        out: Tensor = _Beside.apply(x, self.block.excite(self.block.squeeze(x)))  # type: ignore[no-untyped-call]
        return out


class _Beside(torch.autograd.Function):
    """Return x; the factors take part only in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.like = (factor.shape, factor.dtype, factor.device)  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like  # type: ignore[attr-defined]
        return gradients[0], torch.zeros(shape, dtype=dtype, device=device)


REIMPLEMENTATIONS: dict[str, Callable[[SqueezeExcitation], nn.Module]] = {
    "torchvision": TorchvisionSE,
    "timm": TimmSE,
    "without_squeeze": WithoutSqueeze,
    "without_excitation": WithoutExcitation,
    "without_scale": WithoutScale,
}
"""Name → block class: as a library writes it, or without a stage."""


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is the paper's block: squeeze by the mean, no scaled gate, no absorbed ReLU."""
    if type(module) is not SqueezeExcitation:
        return False
    return module.squeeze.kind == "avg" and module.gate_affine is None and not module.relu_in


def reimplement(model: nn.Module, name: str) -> int:
    """Replace every plain SE block of a network, in place, by another implementation with the same weights.

    Those whose names begin with `without` leave out a stage, and compute something else.

    Args:
        model: a copy that the caller may change.
        name: one of `REIMPLEMENTATIONS`.

    Returns:
        The number of replaced blocks.

    Raises:
        InsertionError: there is no such implementation.
    """
    if name not in REIMPLEMENTATIONS:
        raise InsertionError(f"implementation {name!r}: there is no such one{nearest(name, REIMPLEMENTATIONS)}")
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, SqueezeExcitation) and is_plain(child):
                if child not in made:
                    made[child] = REIMPLEMENTATIONS[name](child).train(child.training)
                parent._modules[attribute] = made[child]
    return len(made)
