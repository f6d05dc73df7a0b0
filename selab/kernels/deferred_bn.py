"""Deferred BatchNorm: at inference its affine is applied inside the operation that consumes its output.

A deferred BatchNorm returns its input as it is, marked with the BatchNorm. Its consumer, a fused block, join or
activation, does both in one pass, or lets the BatchNorm compute first (`materialize`). Other code finds the feature map
normalised: until it is consumed it is a `DeferredTensor`, which intercepts every operation. Parameters, buffers and
their keys stay in place, and nothing is precomputed that could become outdated.
"""

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


def _materialize_in_place(*values: object) -> None:
    """Normalise the deferred tensors among these, for everyone who holds them."""
    for leaf in tree_leaves(values):
        if type(leaf) is DeferredTensor:
            leaf.__class__ = Tensor  # type: ignore[assignment]
            leaf.data = _normalised(leaf, leaf.__dict__.pop("_pending_norm"))


# As torch.compiler.disable sets it; that function would import the compiler.
_materialize_in_place._torchdynamo_disable = True  # type: ignore[attr-defined]


class DeferredNorm(Swapped, CachedDispatch, nn.BatchNorm2d):
    """A BatchNorm2d that leaves its work to the consumers of its output, where the native code can do it.

    A BatchNorm with an activation of its own (timm's) has no consumer, or a block that does both. Without a consumer,
    BatchNorm and activation are one pass.

    It normalises as before in training, with gradients, on a GPU, under a compiler, and if a hook is registered on it,
    its consumers or its producers.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it had before.
        consumers: the modules that receive its output; a tuple, so that they are not its children.
        producers: the modules that return its input or its output.
        can_overwrite: whether the output may reuse the input's memory; used without consumers only.
    """

    library: ClassVar[type[nn.BatchNorm2d]]
    consumers: tuple[nn.Module, ...] = ()
    can_overwrite = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), deferred or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(materialize(x))
        replayed = self.replay(x)
        if replayed is not None:
            return replayed
        norm = self._native_norm(x)
        if norm is None:
            return self.normalised(materialize(x))
        if self.consumers:
            self.remember(cached_deferral(x, self, (self, *self.consumers, *self.producers), DeferredTensor))
            x._pending_norm = self  # type: ignore[attr-defined]
            x.__class__ = DeferredTensor
            return x
        overwrite = self.can_overwrite
        self.remember(
            cached_call(
                x,
                None,
                norm.activation,
                (),
                watched=self.producers,
                norm=self,
                deferred=False,
                can_overwrite=overwrite,
            )
        )
        return cpu.activated(x, None, norm._replace(activation=""), norm.activation, in_place=overwrite)

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
        if has_hooks(self, *self.children(), *self.consumers, *self.producers):
            return None
        norm = norm_of(self)
        return None if norm is None or cpu.norm_refuses(x, norm) else norm


def defer(
    norm: nn.BatchNorm2d,
    consumers: tuple[nn.Module, ...],
    *,
    producers: tuple[nn.Module, ...] = (),
    can_overwrite: bool = False,
) -> None:
    """Defer a BatchNorm, in place: its consumers do its work, or without any, a single pass of its own.

    Args:
        norm: an instance of exactly BatchNorm2d, or of a class that adds `drop` and `act` to it.
        consumers: the only modules that receive its output; the first of them must call `pending_norm`.
        producers: see `DeferredNorm`.
        can_overwrite: whether no other module needs its input.
    """
    swap(norm, DeferredNorm)
    changed: Any = norm
    changed.consumers, changed.producers, changed.can_overwrite = consumers, producers, can_overwrite


def undefer(norm: DeferredNorm) -> None:
    """Undo `defer`, in place."""
    for name in ("consumers", "producers", "can_overwrite", "_cached_call"):
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


def materialize(x: Tensor) -> Tensor:
    """Return x itself, or if its BatchNorm is deferred, the normalised feature map in new memory."""
    norm = pending_norm(x)
    if norm is None:
        return x
    del x._pending_norm  # type: ignore[attr-defined]
    return _normalised(x, norm)


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

    Returns:
        (N, C, H, W).
    """
    overwrite = module.may_overwrite()
    if impl != "native" or torch.is_grad_enabled():
        return run(impl, materialize(x), shortcut, params, can_overwrite=overwrite)
    this: Any = module
    owners, watched = (this,) if join is None else (this, join), (this, *module.producers)
    call = cached_call(
        x,
        shortcut,
        params,
        owners,
        layers=layers,
        watched=watched,
        norm=pending_norm(x),
        can_overwrite=overwrite,
    )
    module.remember(call, join=join)
    return run(impl, x, shortcut, params, can_overwrite=overwrite, norm=consume(x))
