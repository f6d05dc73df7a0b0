"""Deferred ReLU: an in-place ReLU right before a block is applied in the block's own passes.

It stays where it is and works as before. Where a call proves that nothing else holds its input and that its output
goes to the block and nowhere else (`selab.kernels.ownership`), it only marks the feature map.
"""

import sys
from sys import getrefcount
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredTensor, consume, materialize, pending_norm, supported
from selab.kernels.dispatch import CachedDispatch, cached_deferral, has_hooks, needs_reference, norm_of
from selab.kernels.ownership import claim, is_exclusive, route
from selab.kernels.swap import Swapped, restore, swap


class DeferredReLU(Swapped, CachedDispatch, nn.ReLU):
    """An in-place ReLU that leaves its work to the block after it; for `swap`, before nn.ReLU.

    Shapes: any; only feature maps (N, C, H, W) are deferred.

    Attributes:
        consumers: the block after it; a tuple, so that it is no child.
    """

    library: ClassVar[type[nn.ReLU]]
    consumers: tuple[nn.Module, ...] = ()
    can_overwrite = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), deferred or rectified."""
        if torch.compiler.is_compiling():
            compiled: Tensor = self.library.forward(self, x)
            return compiled
        references = getrefcount(x)
        replayed = self.replay(x, references=references)
        if replayed is not None:
            return replayed
        x = supported(x)
        norm = pending_norm(x)
        if not needs_reference(x) and x.dim() == 4 and not has_hooks(self, *self.consumers):
            frame = sys._getframe(1)
            claimed, routed = claim(frame, self), route(frame, self, self.consumers)
            if routed is not None and is_exclusive(x, references, claimed):
                if not torch.is_grad_enabled():
                    if not cpu.activated_refuses(x, None):
                        self.remember(
                            cached_deferral(
                                x,
                                self,
                                (self, *self.consumers),
                                DeferredTensor,
                                mark="_pending_relu",
                                norm=norm,
                                claimed=claimed,
                                route=routed,
                            )
                        )
                    x.__class__ = DeferredTensor
                x.__dict__["_pending_relu"] = self
                return x
        statistics = None if norm is None else norm_of(norm)
        if statistics is not None and not statistics.activation and not torch.is_grad_enabled():
            return cpu.activated(x, None, consume(x), "relu", in_place=True)
        out: Tensor = self.library.forward(self, materialize(x))
        return out


def defer_relu(relu: nn.ReLU, block: nn.Module) -> None:
    """Leave the work of an in-place ReLU to the block after it, in place."""
    swap(relu, DeferredReLU)
    changed: Any = relu
    changed.consumers = (block,)


def undefer_relu(relu: DeferredReLU) -> None:
    """Undo `defer_relu`, in place."""
    for name in ("consumers", "_cached_call"):
        relu.__dict__.pop(name, None)
    restore(relu)
