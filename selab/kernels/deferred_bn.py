"""A BatchNorm whose work is left, in inference, to the block, join or activation behind it, or done with its own.

A map that waits is handed on as it came, and names the BatchNorm that it waits for. Who reads it does both in one pass,
or has the BatchNorm done first (`settled`). Anybody else, who does not know of this, finds it normalised: until then it
is a `DeferredTensor`, which sees every operation coming. Parameters, buffers and their keys stay where they are, and
nothing is computed beforehand that could grow old.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.kernels import cpu
from selab.kernels.cpu import Norm
from selab.kernels.dispatch import CachedDispatch, cached_call, cached_deferral, has_hooks, needs_reference, norm_of


class DeferredTensor(Tensor):
    """The class of a map as long as it waits; the first to ask it for anything but `waiting` finds it normalised."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation, on maps that wait no longer."""
        _materialize_all(args, kwargs)
        return func(*args, **(kwargs or {}))


def _materialize_all(*values: object) -> None:
    """Normalises the maps among these for all who hold them."""
    for leaf in tree_leaves(values):
        if type(leaf) is DeferredTensor:
            leaf.__class__ = Tensor  # type: ignore[assignment]
            leaf.data = _normalised(leaf, leaf.__dict__.pop("_pending_norm"))


# As torch.compiler.disable does it, which would load the compiler for everybody.
_materialize_all._torchdynamo_disable = True  # type: ignore[attr-defined]


class DeferredNorm(CachedDispatch, nn.BatchNorm2d):
    """A BatchNorm2d that hands maps on to what stands behind it, where the native code is there to do its work.

    One with an activation of its own (timm's) has nothing behind it, or a block that does both. With nothing behind it
    both are one pass of its own.

    In training, with gradients, on a GPU, in a compiler, or where a hook looks at it, at what stands behind it or at
    what gives out the same map, it normalises as ever.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it is of otherwise.
        consumers: the modules that read what it hands on; a tuple, so that they are not its children.
        producers: the modules that return its input or its output.
        can_overwrite: of use with nothing behind it.
    """

    library: ClassVar[type[nn.BatchNorm2d]] = nn.BatchNorm2d
    consumers: tuple[nn.Module, ...] = ()
    can_overwrite = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), waiting or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(materialize(x))
        handed = self.replay(x)
        if handed is not None:
            return handed
        norm = self._native_norm(x)
        if norm is None:
            return self.normalised(materialize(x))
        if self.consumers:
            self.__dict__["_cached_call"] = cached_deferral(
                x, self, (self, *self.consumers, *self.producers), DeferredTensor
            )
            x._pending_norm = self  # type: ignore[attr-defined]
            x.__class__ = DeferredTensor
            return x
        self.__dict__["_cached_call"] = cached_call(
            x,
            None,
            norm.activation,
            (),
            watched=self.producers,
            norm=self,
            waiting=False,
            can_overwrite=self.can_overwrite,
        )
        return cpu.activated(x, None, norm._replace(activation=""), norm.activation, in_place=self.can_overwrite)

    def normalised(self, x: Tensor) -> Tensor:
        """What its class returns otherwise: (N, C, H, W) → (N, C, H, W)."""
        out: Tensor = self.library.forward(self, x)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and files, which know a library's class alone by its name."""
        if type(self) is DeferredNorm or not _is_ours(self):
            return super().__reduce_ex__(protocol)
        return _empty, (self.library,), self.__getstate__()

    def _check_input_dim(self, x: Any) -> None:
        # What stands for a map in a symbolic trace has no dimensions.
        if isinstance(x, Tensor):
            super()._check_input_dim(x)

    def _native_norm(self, x: Tensor) -> Norm | None:
        """What it computes, where the native code can do that for this feature map, here or in a consumer."""
        if not _is_ours(self) or torch.is_grad_enabled() or needs_reference(x):
            return None
        if has_hooks(self, *self.children(), *self.consumers, *self.producers):
            return None
        norm = norm_of(self)
        return None if norm is None or cpu.norm_refuses(x, norm) else norm


_DEFERRED: dict[type[nn.BatchNorm2d], type[DeferredNorm]] = {nn.BatchNorm2d: DeferredNorm}


def _deferred_class(base: type[nn.BatchNorm2d]) -> type[DeferredNorm]:
    if base not in _DEFERRED:
        body = {"library": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _DEFERRED[base] = type(base.__name__, (DeferredNorm, base), body)
    return _DEFERRED[base]


def _is_ours(norm: DeferredNorm) -> bool:
    """Whether nobody has made a subclass of it since (a parametrised one, say), which may compute anything."""
    return type(norm) is _DEFERRED.get(norm.library)


def _empty(base: type[nn.BatchNorm2d]) -> nn.Module:
    """A deferred BatchNorm without its state."""
    kind = _deferred_class(base)
    return kind.__new__(kind)


def defer(
    norm: nn.BatchNorm2d,
    consumers: tuple[nn.Module, ...],
    *,
    producers: tuple[nn.Module, ...] = (),
    can_overwrite: bool = False,
) -> None:
    """Makes a BatchNorm, in place, one that leaves its work to what stands behind it, or to a pass of its own.

    Args:
        norm: of exactly BatchNorm2d, or of a class that adds `drop` and `act` to it.
        consumers: the only modules that receive its output; the first must look at `pending_norm`. Without any, it
            computes itself.
        producers: as in `DeferredNorm`.
        can_overwrite: whether nobody else needs its input.
    """
    changed: Any = norm
    if not isinstance(norm, DeferredNorm):
        changed.__class__ = _deferred_class(type(norm))
    changed.consumers, changed.producers, changed.can_overwrite = consumers, producers, can_overwrite


def recall(norm: DeferredNorm) -> None:
    """Makes it, in place, what it was before `defer`."""
    changed: Any = norm
    for name in ("consumers", "producers", "can_overwrite", "_cached_call"):
        changed.__dict__.pop(name, None)
    if _is_ours(norm):
        changed.__class__ = norm.library


def pending_norm(x: Tensor) -> DeferredNorm | None:
    """The BatchNorm that a map waits for, or None; whoever asks sees to it that it is done (`settled`, `taken`)."""
    if torch.compiler.is_compiling():
        return None
    if type(x) is DeferredTensor:
        x.__class__ = Tensor  # type: ignore[assignment]
    found: DeferredNorm | None = x.__dict__.get("_pending_norm")
    return found


def materialize_unsupported(x: Tensor) -> Tensor:
    """A map that waits for nothing, or for what the native code can do; normalised otherwise."""
    norm = pending_norm(x)
    facts = None if norm is None else norm_of(norm)
    refused = norm is not None and (facts is None or cpu.norm_refuses(x, facts))
    return materialize(x) if refused else x


def consume(x: Tensor) -> Norm | None:
    """What a map waits for, which whoever asks does from now on; None if it does not wait."""
    norm = pending_norm(x)
    if norm is None:
        return None
    del x._pending_norm  # type: ignore[attr-defined]
    return norm_of(norm)


def materialize(x: Tensor) -> Tensor:
    """A map that waits for nothing: normalised if it did, into memory of its own."""
    norm = pending_norm(x)
    if norm is None:
        return x
    del x._pending_norm  # type: ignore[attr-defined]
    return _normalised(x, norm)


def _normalised(x: Tensor, norm: DeferredNorm) -> Tensor:
    """As it would have been when the map was handed on: without gradients and with the BatchNorm's own statistics."""
    with torch.no_grad():
        facts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        out = F.batch_norm(x, *facts, facts[0] is None, 0.0, norm.eps)
        act = norm._modules.get("act")
        return out if act is None else act(out)
