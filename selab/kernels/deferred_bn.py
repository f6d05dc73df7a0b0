"""Deferred BatchNorm: at inference its affine is applied inside the operation that consumes its output.

A deferred BatchNorm returns its input as it is, marked with the BatchNorm. Its consumer, a fused block, join or
activation, does both in one pass, or lets the BatchNorm compute first (`materialize`). After `selab.fuse` a BatchNorm
is deferred only where the call proves that nothing else holds its input and that its output goes to the consumer and
nowhere else (`selab.kernels.ownership`); everywhere else it normalises. Until it is consumed, the feature map is a
`DeferredTensor`, which intercepts every operation. Parameters, buffers and their keys stay in place, and nothing is
precomputed that could become outdated.
"""

import sys
from sys import getrefcount
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.kernels import cpu
from selab.kernels.cpu import BlockParams, Norm
from selab.kernels.dispatch import (
    CachedDispatch,
    Impl,
    cached_call,
    cached_deferral,
    has_hooks,
    needs_reference,
    norm_of,
    run,
)
from selab.kernels.ownership import Arrival, is_exclusive, route
from selab.kernels.swap import Swapped, is_exact, restore, swap


class DeferredTensor(Tensor):
    """A feature map with a deferred BatchNorm; every operation but `pending_norm` normalises it first."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any operation, on normalised feature maps."""
        _materialize_in_place(args, kwargs)
        return func(*args, **(kwargs or {}))


def is_deferred(x: object) -> bool:
    """Return whether x is a feature map (N, C, H, W) with a deferred BatchNorm; any question to it normalises it."""
    return type(x) is DeferredTensor


def _materialize_in_place(*values: object) -> None:
    """Normalise the deferred tensors among these, for everyone who holds them."""
    for leaf in tree_leaves(values):
        if type(leaf) is DeferredTensor:
            leaf.__class__ = Tensor  # type: ignore[assignment]
            leaf.data = _computed(leaf)


# As torch.compiler.disable sets it; that function would import the compiler.
_materialize_in_place._torchdynamo_disable = True  # type: ignore[attr-defined]


class DeferredNorm(Swapped, CachedDispatch, nn.BatchNorm2d):
    """A BatchNorm2d that leaves its work to the consumers of its output, where the native code can do it.

    A BatchNorm with an activation of its own (timm's) has no consumer, or a block that does both. Without a consumer,
    BatchNorm and activation are one pass.

    It normalises as before in training, with gradients, on a GPU, under a compiler, and if a hook is registered on it
    or its consumers. If it is guarded, it does so too wherever something else could read its input or its output.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it had before.
        consumers: the modules that receive its output; a tuple, so that they are not its children.
        can_overwrite: whether the output may reuse the input's memory; used without consumers only.
    """

    library: ClassVar[type[nn.BatchNorm2d]]
    consumers: tuple[nn.Module, ...] = ()
    can_overwrite = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), deferred or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(materialize(x))
        references = getrefcount(x)
        replayed = self.replay(x, references=references)
        if replayed is not None:
            return replayed
        norm = self._native_norm(x)
        if norm is None:
            return self.normalised(materialize(x))
        arrival = Arrival(self, sys._getframe(1), references) if self.guarded else None
        if self.consumers and self._defers(x, arrival):
            return x
        if self.consumers and not norm.activation:
            return self.normalised(x)
        overwrite = self.can_overwrite or bool(self.consumers and arrival)
        if not self.consumers:
            call = cached_call(
                x,
                None,
                norm.activation,
                (),
                norm=self,
                deferred=False,
                can_overwrite=overwrite,
                arrival=arrival,
            )
            self.remember(call)
        overwrite = overwrite and (arrival is None or is_exclusive(x, references, arrival.claim()))
        return cpu.activated(x, None, norm._replace(activation=""), norm.activation, in_place=overwrite)

    def _defers(self, x: Tensor, arrival: Arrival | None) -> bool:
        """Mark x with this BatchNorm; return False if something else could read x or the normalised feature map."""
        claimed = routed = None
        if arrival is not None:
            claimed, routed = arrival.claim(), route(arrival.frame, self, self.consumers)
            if routed is None or has_hooks(*routed.passed) or not is_exclusive(x, arrival.references, claimed):
                return False
        watched = (self, *self.consumers)
        self.remember(
            cached_deferral(x, self, watched, DeferredTensor, mark="_pending_norm", claimed=claimed, route=routed)
        )
        x._pending_norm = self  # type: ignore[attr-defined]
        x.__class__ = DeferredTensor
        return True

    def normalised(self, x: Tensor) -> Tensor:
        """Return what its former class returns: (N, C, H, W) → (N, C, H, W)."""
        out: Tensor = self.library.forward(self, x)
        return out

    def _check_input_dim(self, x: Any) -> None:
        # The proxy of a symbolic trace has no dimensions.
        if isinstance(x, Tensor):
            super()._check_input_dim(x)

    def _native_norm(self, x: Tensor) -> Norm | None:
        """Return what it computes, if the native code can do that for x, here or in a consumer."""
        if not is_exact(self) or torch.is_grad_enabled() or needs_reference(x):
            return None
        if has_hooks(self, *self.children(), *self.consumers):
            return None
        norm = norm_of(self)
        return None if norm is None or cpu.norm_refuses(x, norm) else norm


def defer(
    norm: nn.BatchNorm2d,
    consumers: tuple[nn.Module, ...],
    *,
    can_overwrite: bool = False,
    guarded: bool = False,
) -> None:
    """Defer a BatchNorm, in place: its consumers do its work, or without any, a single pass of its own.

    Args:
        norm: an instance of exactly BatchNorm2d, or of a class that adds `drop` and `act` to it.
        consumers: the only modules that receive its output; the first of them must call `pending_norm`.
        can_overwrite: whether no other module needs its input.
        guarded: whether each call must prove that nothing else holds its input and reads its output; otherwise the
            caller of this function has.
    """
    swap(norm, DeferredNorm)
    changed: Any = norm
    changed.consumers, changed.can_overwrite, changed.guarded = consumers, can_overwrite, guarded


def undefer(norm: DeferredNorm) -> None:
    """Undo `defer`, in place."""
    for name in ("consumers", "can_overwrite", "guarded", "_cached_call"):
        norm.__dict__.pop(name, None)
    restore(norm)


# ------------------------------------------------------------------------------------------------ what a consumer does
def pending_norm(x: Tensor) -> DeferredNorm | None:
    """Return the deferred BatchNorm of a feature map, or None.

    The caller becomes responsible for it, and must call `materialize` or `consume`.
    """
    if torch.compiler.is_compiling():
        return None
    if type(x) is DeferredTensor:
        x.__class__ = Tensor  # type: ignore[assignment]
    found: DeferredNorm | None = x.__dict__.get("_pending_norm")
    return found


def supported(x: Tensor) -> Tensor:
    """Return x as a consumer can take it: normalised, unless the native code supports its deferred BatchNorm."""
    norm = pending_norm(x)
    statistics = None if norm is None else norm_of(norm)
    refused = norm is not None and (statistics is None or cpu.norm_refuses(x, statistics))
    return materialize(x) if refused else x


def consume(x: Tensor) -> Norm | None:
    """Take over the deferred BatchNorm of a feature map, which is then no longer deferred; None without one."""
    norm = pending_norm(x)
    if norm is None:
        return None
    del x._pending_norm  # type: ignore[attr-defined]
    return norm_of(norm)


def consume_relu(x: Tensor) -> nn.Module | None:
    """Take over the deferred ReLU of a feature map, which is then no longer deferred; None without one."""
    if torch.compiler.is_compiling():
        return None
    pending_norm(x)
    found: nn.Module | None = x.__dict__.pop("_pending_relu", None)
    return found


def materialize(x: Tensor) -> Tensor:
    """Return x itself, or if its BatchNorm is deferred, the normalised feature map in new memory."""
    if pending_norm(x) is None and (torch.compiler.is_compiling() or "_pending_relu" not in x.__dict__):
        return x
    return _computed(x)


def _computed(x: Tensor) -> Tensor:
    """Return what the deferred modules of x compute, in new memory; x is no longer marked."""
    norm, relu = x.__dict__.pop("_pending_norm", None), x.__dict__.pop("_pending_relu", None)
    x = x if norm is None else _normalised(x, norm)
    return x if relu is None else F.relu(x)


def _normalised(x: Tensor, norm: DeferredNorm) -> Tensor:
    """Normalise as at the time of deferring: without gradients, with the running statistics."""
    with torch.no_grad():
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        out = F.batch_norm(x, *statistics, statistics[0] is None, 0.0, norm.eps)
        act = norm._modules.get("act")
        return out if act is None else act(out)


def run_block(
    module: CachedDispatch,
    impl: Impl,
    x: Tensor,
    shortcut: Tensor | None,
    params: BlockParams,
    *,
    layers: tuple[nn.Module, nn.Module],
    join: nn.Module | None = None,
    arrival: Arrival | None = None,
    relu: nn.Module | None = None,
) -> Tensor:
    """Run a block by `impl`, with the deferred BatchNorm of its input, and cache the call where it can be replayed.

    Args:
        module: the block.
        impl: from `choose`, not the reference.
        x: (N, C, H, W).
        shortcut: (N, C, H, W) or None.
        params: of the block.
        layers: the two modules that hold its weights.
        join: the module whose residual addition is part of the call.
        arrival: the call of the module that received x.
        relu: the deferred ReLU of x, which `params` includes, or None.

    Returns:
        (N, C, H, W).
    """
    norm = pending_norm(x)
    pending = norm is not None or relu is not None
    overwrite = module.may_overwrite(x, arrival, pending=pending)
    if impl != "native" or torch.is_grad_enabled():
        return run(impl, materialize(x), shortcut, params, can_overwrite=overwrite)
    this: Any = module
    call = cached_call(
        x,
        shortcut,
        params,
        (this,) if join is None else (this, join),
        layers=layers,
        watched=(this,),
        norm=norm,
        relu=relu,
        can_overwrite=module.can_overwrite,
        arrival=arrival if module.guarded and not pending else None,
    )
    module.remember(call, join=join)
    return run(impl, x, shortcut, params, can_overwrite=overwrite, norm=consume(x))
