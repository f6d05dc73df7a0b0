"""What stands behind a BatchNorm: the join of a residual block, or an activation, in one pass with it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.deferred_bn import consume, materialize, materialize_unsupported, pending_norm
from selab.kernels.dispatch import (
    NORM_ACTIVATIONS,
    CachedDispatch,
    cached_call,
    has_hooks,
    needs_reference,
    records_gradients,
)

ADD_RELU = "relu(branch + shortcut)"
FORMULAS = ("branch + shortcut", ADD_RELU)
"""What a join may call itself, in an attribute `formula`, to be computed together with the block before it."""


def formula_of(join: nn.Module) -> str:
    """What a join computes, one of `FORMULAS`; empty if it is another, or has another activation by now."""
    formula = getattr(join, "formula", "")
    plain = all(type(child) is nn.ReLU for child in join.children())
    return formula if formula in FORMULAS and plain else ""


class FusedJoin(CachedDispatch, nn.Module):
    """relu(branch + shortcut) in one pass; anything but plain float maps goes through the join that it stands for.

    Shapes: two times (N, C, H, W) to (N, C, H, W).

    Attributes:
        can_overwrite: whether nobody else needs the branch, so that the output may take its place in inference.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.can_overwrite = False

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        repeated = self.replay(branch, shortcut)
        if repeated is not None:
            return repeated
        inner: Any = self._modules["inner"]
        branch = materialize_unsupported(branch)
        observed = torch.compiler.is_compiling() or has_hooks(inner, *inner.children()) or formula_of(inner) != ADD_RELU
        if observed or needs_reference(branch):
            out: Tensor = inner(materialize(branch), shortcut)
            return out
        if branch.is_cuda:
            return _join_on_gpu(inner, materialize(branch), shortcut)
        if records_gradients(branch, shortcut):
            joined: Tensor = cpu.AddReLU.apply(materialize(branch), shortcut)  # type: ignore[no-untyped-call]
            return joined
        if cpu.activated_refuses(branch, shortcut):
            return cpu.add_relu(materialize(branch), shortcut, in_place=self.may_overwrite())
        return _activated(self, (self, inner), branch, shortcut, "relu")


class FusedActivation(CachedDispatch):
    """Stands before an activation's class: one pass with the BatchNorm that its map waits for; without one, itself.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it is of otherwise.
        can_overwrite: as in `FusedJoin`.
    """

    library: ClassVar[type[nn.Module]]
    can_overwrite: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        repeated: Tensor | None = self.replay(x)
        if repeated is not None:
            return repeated
        x = materialize_unsupported(x)
        if pending_norm(x) is None or cpu.activated_refuses(x, None):
            out: Tensor = self.library.forward(self, materialize(x))
            return out
        return _activated(self, (self,), x, None, NORM_ACTIVATIONS[self.library])


class FusedReLU(FusedActivation, nn.ReLU):
    """See `FusedActivation`."""

    library = nn.ReLU


class FusedSiLU(FusedActivation, nn.SiLU):
    """See `FusedActivation`."""

    library = nn.SiLU


class FusedHardswish(FusedActivation, nn.Hardswish):
    """See `FusedActivation`."""

    library = nn.Hardswish


FUSED_ACTIVATIONS: dict[type[nn.Module], type[FusedActivation]] = {
    kind.library: kind for kind in (FusedReLU, FusedSiLU, FusedHardswish)
}


def _activated(
    module: FusedJoin | FusedActivation, owners: tuple[Any, ...], y: Tensor, shortcut: Tensor | None, activation: str
) -> Tensor:
    """activation(norm(y) + shortcut) natively and without gradients; keeps the decision in the module."""
    overwrite, norm = module.may_overwrite(), pending_norm(y)
    if not torch.is_grad_enabled():
        watched: tuple[Any, ...] = (module, *module.producers)
        module.__dict__["_cached_call"] = cached_call(
            y, shortcut, activation, owners, watched=watched, norm=norm, can_overwrite=overwrite
        )
    return cpu.activated(y, shortcut, consume(y), activation, in_place=overwrite)


def _join_on_gpu(inner: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import ops

    refused = ops.refuses_join(branch, shortcut)
    out: Tensor = inner(branch, shortcut) if refused else torch.ops.selab.add_relu(branch, shortcut)
    return out
