"""A BatchNorm whose work is left, in inference, to the block, join or ReLU behind it.

The map is handed on as it came, and names the BatchNorm that it waits for. Who reads it does both in one pass, or has
the BatchNorm done first (`settled`). Parameters, buffers and their keys stay where they are, and nothing is computed
beforehand that could grow old.
"""

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.choice import Deciding, hand_on, hooked, norm_of, unusual
from selab.kernels.cpu import Norm


class DeferredNorm(Deciding, nn.BatchNorm2d):
    """A BatchNorm2d that hands maps on to what stands behind it, where the native code is there to do its work.

    In training, with gradients, on a GPU, in a compiler, or where a hook looks at it or at what stands behind it, it
    normalises as ever.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        behind: the modules that read what it hands on; a tuple, so that they are not its children.
    """

    behind: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), waiting or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(settled(x))
        decided = self.__dict__.get("_decided")
        if decided is not None:
            handed: Tensor | None = decided(x, None)
            if handed is not None:
                return handed
        if self._may_wait(x):
            self.__dict__["_decided"] = hand_on(x, self, (self, *self.behind))
            x._waits_for = self  # type: ignore[attr-defined]
            return x
        return self.normalised(settled(x))

    def normalised(self, x: Tensor) -> Tensor:
        """What a BatchNorm2d returns: (N, C, H, W) → (N, C, H, W)."""
        return nn.BatchNorm2d.forward(self, x)

    def _may_wait(self, x: Tensor) -> bool:
        if x.is_cuda or torch.is_grad_enabled():
            return False
        if unusual(x) or waiting(x) is not None or hooked(self, *self.behind):
            return False
        norm = norm_of(self)
        return norm is not None and not cpu.norm_refuses(x, norm)


def defer(norm: nn.BatchNorm2d, behind: tuple[nn.Module, ...]) -> None:
    """Makes a BatchNorm2d, in place, one that leaves its work to what stands behind it.

    Args:
        norm: of exactly this class.
        behind: the modules that its output is given to, and nobody else; the one that reads it must look at `waiting`.
    """
    norm.__class__ = DeferredNorm
    norm.behind = behind  # type: ignore[assignment]


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
