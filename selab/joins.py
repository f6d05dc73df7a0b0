"""What stands behind a branch: the join of a residual block, or a ReLU, in one pass with the BatchNorm before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.choice import Deciding, hooked, records_gradients, repeat, unusual
from selab.waiting import settled, taken, waiting

ADD_RELU = "relu(branch + shortcut)"
FORMULAS = ("branch + shortcut", ADD_RELU)
"""What a join may call itself, in an attribute `formula`, to be computed together with the block before it."""


def formula_of(join: nn.Module) -> str:
    """What a join computes, one of `FORMULAS`; empty if it is another, or has another activation by now."""
    formula = getattr(join, "formula", "")
    plain = all(type(child) is nn.ReLU for child in join.children())
    return formula if formula in FORMULAS and plain else ""


class FastJoin(Deciding, nn.Module):
    """relu(branch + shortcut) in one pass; anything but plain float maps goes through the join that it stands for.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Attributes:
        owns_input: whether nobody else needs the branch, so that the output may take its place in inference.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.owns_input = False

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        # As in `SqueezeExcitation.forward`.
        decided = self.__dict__.get("_decided")
        if decided is not None and not torch.compiler.is_compiling():
            repeated: Tensor | None = decided(branch, shortcut)
            if repeated is not None:
                return repeated
        inner: Any = self._modules["inner"]
        observed = torch.compiler.is_compiling() or hooked(inner, *inner.children()) or formula_of(inner) != ADD_RELU
        if observed or unusual(branch):
            out: Tensor = inner(settled(branch), shortcut)
            return out
        if branch.is_cuda:
            return _join_on_gpu(inner, settled(branch), shortcut)
        if records_gradients(branch, shortcut):
            joined: Tensor = cpu.AddReLU.apply(settled(branch), shortcut)  # type: ignore[no-untyped-call]
            return joined
        return _rectified(self, (self, inner), branch, shortcut, owns_input=self.owns_input)


class FastReLU(Deciding, nn.ReLU):
    """A ReLU in one pass with the BatchNorm that its map waits for; without one, a ReLU.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        owns_input: as in `FastJoin`.
    """

    owns_input: bool

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        decided = self.__dict__.get("_decided")
        if decided is not None and not torch.compiler.is_compiling():
            repeated: Tensor | None = decided(x, None)
            if repeated is not None:
                return repeated
        if waiting(x) is None:
            return super().forward(x)
        return _rectified(self, (self,), x, None, owns_input=self.owns_input)


def _rectified(
    module: nn.Module, owners: tuple[nn.Module, ...], y: Tensor, shortcut: Tensor | None, *, owns_input: bool
) -> Tensor:
    """relu(norm(y) + shortcut) without gradients; keeps the decision in the module."""
    norm = waiting(y)
    if cpu.rectified_refuses(y, shortcut):
        x = settled(y)
        if shortcut is None:
            return F.relu(x, inplace=owns_input or norm is not None)
        return cpu.add_relu(x, shortcut, in_place=owns_input or norm is not None)
    if not torch.is_grad_enabled():
        module.__dict__["_decided"] = repeat(y, shortcut, None, owners, norm=norm, owns_input=owns_input)
    return cpu.rectified(y, shortcut, taken(y), in_place=owns_input)


def _join_on_gpu(inner: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import operators

    refused = operators.refuses_join(branch, shortcut)
    out: Tensor = inner(branch, shortcut) if refused else torch.ops.selab.add_relu(branch, shortcut)
    return out
