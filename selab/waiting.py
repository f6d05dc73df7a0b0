"""A BatchNorm whose work is left, in inference, to the block, join or activation behind it, or done with its own.

A map that waits is handed on as it came, and names the BatchNorm that it waits for. Who reads it does both in one pass,
or has the BatchNorm done first (`settled`). Parameters, buffers and their keys stay where they are, and nothing is
computed beforehand that could grow old.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.choice import Deciding, hand_on, hooked, norm_of, repeat, unusual
from selab.kernels.cpu import Norm


class DeferredNorm(Deciding, nn.BatchNorm2d):
    """A BatchNorm2d that hands maps on to what stands behind it, where the native code is there to do its work.

    One with an activation of its own (timm's) has nothing behind it, or a block that does both. With nothing behind it
    both are one pass of its own.

    In training, with gradients, on a GPU, in a compiler, or where a hook looks at it or at what stands behind it, it
    normalises as ever.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it is of otherwise.
        behind: the modules that read what it hands on; a tuple, so that they are not its children.
        owns_input: with nothing behind it, whether its output may take its input's place.
    """

    library: ClassVar[type[nn.BatchNorm2d]] = nn.BatchNorm2d
    behind: tuple[nn.Module, ...] = ()
    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), waiting or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(settled(x))
        decided = self.__dict__.get("_decided")
        if decided is not None:
            handed: Tensor | None = decided(x, None)
            if handed is not None:
                return handed
        norm = self._native_norm(x)
        if norm is None:
            return self.normalised(settled(x))
        if self.behind:
            self.__dict__["_decided"] = hand_on(x, self, (self, *self.behind))
            x._waits_for = self  # type: ignore[attr-defined]
            return x
        self.__dict__["_decided"] = repeat(
            x, None, norm.activation, (self,), norm=self, waiting=False, owns_input=self.owns_input
        )
        return cpu.activated(x, None, norm._replace(activation=""), norm.activation, in_place=self.owns_input)

    def normalised(self, x: Tensor) -> Tensor:
        """What its class returns otherwise: (N, C, H, W) → (N, C, H, W)."""
        out: Tensor = self.library.forward(self, x)
        return out

    def _native_norm(self, x: Tensor) -> Norm | None:
        """What it computes, where the native code can do that for this map, here or behind."""
        if x.is_cuda or torch.is_grad_enabled():
            return None
        if unusual(x) or waiting(x) is not None or hooked(self, *self.children(), *self.behind):
            return None
        norm = norm_of(self)
        return None if norm is None or cpu.norm_refuses(x, norm) else norm


_DEFERRED: dict[type[nn.BatchNorm2d], type[DeferredNorm]] = {nn.BatchNorm2d: DeferredNorm}


def defer(norm: nn.BatchNorm2d, behind: tuple[nn.Module, ...], *, owns_input: bool = False) -> None:
    """Makes a BatchNorm, in place, one that leaves its work to what stands behind it, or to a pass of its own.

    Args:
        norm: of exactly BatchNorm2d, or of a class that adds `drop` and `act` to it.
        behind: the modules that its output is given to, and nobody else; the one that reads it must look at `waiting`.
            Without any, it computes itself.
        owns_input: whether nobody else needs its input.
    """
    changed: Any = norm
    if not isinstance(norm, DeferredNorm):
        base = type(norm)
        if base not in _DEFERRED:
            body = {"library": base, "__module__": base.__module__, "__doc__": base.__doc__}
            _DEFERRED[base] = type(base.__name__, (DeferredNorm, base), body)
        changed.__class__ = _DEFERRED[base]
    changed.behind, changed.owns_input = behind, owns_input


def waiting(x: Tensor) -> DeferredNorm | None:
    """The BatchNorm that a map waits for, or None."""
    return None if torch.compiler.is_compiling() else x.__dict__.get("_waits_for")


def taken(x: Tensor) -> Norm | None:
    """What a map waits for, which whoever asks does from now on; None if it does not wait."""
    norm = waiting(x)
    if norm is None:
        return None
    del x._waits_for  # type: ignore[attr-defined]
    return norm_of(norm)


def settled(x: Tensor) -> Tensor:
    """A map that waits for nothing: normalised if it did, into memory of its own."""
    norm = waiting(x)
    if norm is None:
        return x
    del x._waits_for  # type: ignore[attr-defined]
    return norm.normalised(x)
