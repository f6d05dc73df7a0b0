"""Residual joins and activations in one pass, together with a deferred BatchNorm before them."""

import sys
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.deferred_bn import consume, materialize, pending_norm, supported
from selab.kernels.dispatch import (
    NORM_ACTIVATIONS,
    CachedDispatch,
    cached_call,
    has_hooks,
    needs_reference,
    records_gradients,
)
from selab.kernels.ownership import Arrival
from selab.kernels.swap import Swapped

ADD_RELU = "relu(branch + shortcut)"
FORMULAS = ("branch + shortcut", ADD_RELU)
"""Values of a join's attribute `formula` with which it can be computed together with the block before it."""
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.SiLU, nn.Hardswish)
"""Classes that `FusedActivation` can be put before."""


def formula_of(join: nn.Module) -> str:
    """Return what a join computes, one of `FORMULAS`; empty if it declares another, or its activation is no ReLU."""
    formula = getattr(join, "formula", "")
    plain = all(type(child) is nn.ReLU for child in join.children())
    return formula if formula in FORMULAS and plain else ""


class FusedJoin(CachedDispatch, nn.Module):
    """relu(branch + shortcut) in one pass; runs the wrapped join for anything but plain float tensors.

    Shapes: two inputs (N, C, H, W); output (N, C, H, W).

    Attributes:
        can_overwrite: whether no other module needs the branch, so that the output may reuse its memory at inference.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.can_overwrite = False

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        references = 0 if torch.compiler.is_compiling() else getrefcount(branch)
        replayed = self.replay(branch, shortcut, references=references)
        if replayed is not None:
            return replayed
        inner: Any = self._modules["inner"]
        branch = supported(branch)
        observed = torch.compiler.is_compiling() or has_hooks(inner, *inner.children()) or formula_of(inner) != ADD_RELU
        if observed or needs_reference(branch):
            out: Tensor = inner(materialize(branch), shortcut)
            return out
        if branch.is_cuda:
            return _join_on_gpu(inner, materialize(branch), shortcut)
        if records_gradients(branch, shortcut):
            joined: Tensor = cpu.AddReLU.apply(materialize(branch), shortcut)  # type: ignore[no-untyped-call]
            return joined
        arrival = Arrival(self, sys._getframe(1), references)
        if cpu.activated_refuses(branch, shortcut):
            overwrite = self.may_overwrite(branch, arrival, pending=pending_norm(branch) is not None)
            return cpu.add_relu(materialize(branch), shortcut, in_place=overwrite)
        return _activated(self, (self, inner), branch, shortcut, "relu", arrival)


class FusedActivation(Swapped, CachedDispatch):
    """An activation in one pass with the deferred BatchNorm of its input; without one, the activation alone.

    For `swap`, before one of `ACTIVATIONS`.

    Shapes: input and output (N, C, H, W).

    Attributes:
        can_overwrite: see `FusedJoin`.
    """

    can_overwrite = False

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        replayed: Tensor | None = self.replay(x)
        if replayed is not None:
            return replayed
        x = supported(x)
        if pending_norm(x) is None or cpu.activated_refuses(x, None):
            out: Tensor = self.library.forward(self, materialize(x))
            return out
        return _activated(self, (self,), x, None, NORM_ACTIVATIONS[self.library], None)


def _activated(
    module: FusedJoin | FusedActivation,
    owners: tuple[Any, ...],
    y: Tensor,
    shortcut: Tensor | None,
    activation: str,
    arrival: Arrival | None,
) -> Tensor:
    """Run activation(norm(y) + shortcut) natively, without gradients, and cache the call in the module."""
    this: Any = module
    norm = pending_norm(y)
    overwrite = module.may_overwrite(y, arrival, pending=norm is not None)
    if not torch.is_grad_enabled():
        module.remember(
            cached_call(
                y,
                shortcut,
                activation,
                owners,
                watched=(this,),
                norm=norm,
                can_overwrite=module.can_overwrite,
                arrival=arrival if module.guarded and norm is None else None,
            )
        )
    return cpu.activated(y, shortcut, consume(y), activation, in_place=overwrite)


def _join_on_gpu(inner: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    # Importing it registers the operator; only its users pay for that.
    from selab.kernels import ops

    refused = ops.refuses_join(branch, shortcut)
    out: Tensor = inner(branch, shortcut) if refused else torch.ops.selab.add_relu(branch, shortcut)
    return out
