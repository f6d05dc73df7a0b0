"""What stands behind a BatchNorm: the join of a residual block, or an activation, in one pass with it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.deferred_bn import manageable, settled, taken, waiting
from selab.kernels.dispatch import MAP_ACTIVATIONS, Deciding, hooked, records_gradients, repeat, unusual

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
        repeated = self.again(branch, shortcut)
        if repeated is not None:
            return repeated
        inner: Any = self._modules["inner"]
        branch = manageable(branch)
        observed = torch.compiler.is_compiling() or hooked(inner, *inner.children()) or formula_of(inner) != ADD_RELU
        if observed or unusual(branch):
            out: Tensor = inner(settled(branch), shortcut)
            return out
        if branch.is_cuda:
            return _join_on_gpu(inner, settled(branch), shortcut)
        if records_gradients(branch, shortcut):
            joined: Tensor = cpu.AddReLU.apply(settled(branch), shortcut)  # type: ignore[no-untyped-call]
            return joined
        if cpu.activated_refuses(branch, shortcut):
            return cpu.add_relu(settled(branch), shortcut, in_place=self.owns())
        return _activated(self, (self, inner), branch, shortcut, "relu")


class FastActivation(Deciding):
    """Stands before an activation's class: one pass with the BatchNorm that its map waits for; without one, itself.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it is of otherwise.
        owns_input: as in `FastJoin`.
    """

    library: ClassVar[type[nn.Module]]
    owns_input: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        repeated: Tensor | None = self.again(x)
        if repeated is not None:
            return repeated
        x = manageable(x)
        if waiting(x) is None or cpu.activated_refuses(x, None):
            out: Tensor = self.library.forward(self, settled(x))
            return out
        return _activated(self, (self,), x, None, MAP_ACTIVATIONS[self.library])


class FastReLU(FastActivation, nn.ReLU):
    """See `FastActivation`."""

    library = nn.ReLU


class FastSiLU(FastActivation, nn.SiLU):
    """See `FastActivation`."""

    library = nn.SiLU


class FastHardswish(FastActivation, nn.Hardswish):
    """See `FastActivation`."""

    library = nn.Hardswish


FAST_ACTIVATIONS: dict[type[nn.Module], type[FastActivation]] = {
    kind.library: kind for kind in (FastReLU, FastSiLU, FastHardswish)
}


def _activated(
    module: FastJoin | FastActivation, owners: tuple[Any, ...], y: Tensor, shortcut: Tensor | None, activation: str
) -> Tensor:
    """activation(norm(y) + shortcut) natively and without gradients; keeps the decision in the module."""
    owns, norm = module.owns(), waiting(y)
    if not torch.is_grad_enabled():
        watched: tuple[Any, ...] = (module, *module.givers)
        module.__dict__["_decided"] = repeat(
            y, shortcut, activation, owners, watched=watched, norm=norm, owns_input=owns
        )
    return cpu.activated(y, shortcut, taken(y), activation, in_place=owns)


def _join_on_gpu(inner: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import ops

    refused = ops.refuses_join(branch, shortcut)
    out: Tensor = inner(branch, shortcut) if refused else torch.ops.selab.add_relu(branch, shortcut)
    return out
