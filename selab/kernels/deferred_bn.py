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
from selab.kernels.dispatch import Deciding, hand_on, hooked, norm_of, repeat, unusual


class DeferredTensor(Tensor):
    """The class of a map as long as it waits; the first to ask it for anything but `waiting` finds it normalised."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation, on maps that wait no longer."""
        _settle(args, kwargs)
        return func(*args, **(kwargs or {}))


def _settle(*values: object) -> None:
    """Normalises the maps among these for all who hold them."""
    for leaf in tree_leaves(values):
        if type(leaf) is DeferredTensor:
            leaf.__class__ = Tensor  # type: ignore[assignment]
            leaf.data = _normalised(leaf, leaf.__dict__.pop("_waits_for"))


# As torch.compiler.disable does it, which would load the compiler for everybody.
_settle._torchdynamo_disable = True  # type: ignore[attr-defined]


class DeferredNorm(Deciding, nn.BatchNorm2d):
    """A BatchNorm2d that hands maps on to what stands behind it, where the native code is there to do its work.

    One with an activation of its own (timm's) has nothing behind it, or a block that does both. With nothing behind it
    both are one pass of its own.

    In training, with gradients, on a GPU, in a compiler, or where a hook looks at it, at what stands behind it or at
    what gives out the same map, it normalises as ever.

    Shapes: (N, C, H, W) to (N, C, H, W).

    Attributes:
        library: the class that it is of otherwise.
        behind: the modules that read what it hands on; a tuple, so that they are not its children.
        givers: the modules that return its input or its output.
        owns_input: of use with nothing behind it.
    """

    library: ClassVar[type[nn.BatchNorm2d]] = nn.BatchNorm2d
    behind: tuple[nn.Module, ...] = ()
    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), waiting or normalised."""
        if self.training or torch.compiler.is_compiling():
            return self.normalised(settled(x))
        handed = self.again(x)
        if handed is not None:
            return handed
        norm = self._native_norm(x)
        if norm is None:
            return self.normalised(settled(x))
        if self.behind:
            self.__dict__["_decided"] = hand_on(x, self, (self, *self.behind, *self.givers), DeferredTensor)
            x._waits_for = self  # type: ignore[attr-defined]
            x.__class__ = DeferredTensor
            return x
        self.__dict__["_decided"] = repeat(
            x,
            None,
            norm.activation,
            (),
            watched=self.givers,
            norm=self,
            waiting=False,
            owns_input=self.owns_input,
        )
        return cpu.activated(x, None, norm._replace(activation=""), norm.activation, in_place=self.owns_input)

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
        """What it computes, where the native code can do that for this map, here or behind."""
        if not _is_ours(self) or torch.is_grad_enabled() or unusual(x):
            return None
        if hooked(self, *self.children(), *self.behind, *self.givers):
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
    behind: tuple[nn.Module, ...],
    *,
    givers: tuple[nn.Module, ...] = (),
    owns_input: bool = False,
) -> None:
    """Makes a BatchNorm, in place, one that leaves its work to what stands behind it, or to a pass of its own.

    Args:
        norm: of exactly BatchNorm2d, or of a class that adds `drop` and `act` to it.
        behind: the modules that its output is given to, and nobody else; the one that reads it must look at `waiting`.
            Without any, it computes itself.
        givers: as in `DeferredNorm`.
        owns_input: whether nobody else needs its input.
    """
    changed: Any = norm
    if not isinstance(norm, DeferredNorm):
        changed.__class__ = _deferred_class(type(norm))
    changed.behind, changed.givers, changed.owns_input = behind, givers, owns_input


def recall(norm: DeferredNorm) -> None:
    """Makes it, in place, what it was before `defer`."""
    changed: Any = norm
    for name in ("behind", "givers", "owns_input", "_decided"):
        changed.__dict__.pop(name, None)
    if _is_ours(norm):
        changed.__class__ = norm.library


def waiting(x: Tensor) -> DeferredNorm | None:
    """The BatchNorm that a map waits for, or None; whoever asks sees to it that it is done (`settled`, `taken`)."""
    if torch.compiler.is_compiling():
        return None
    if type(x) is DeferredTensor:
        x.__class__ = Tensor  # type: ignore[assignment]
    found: DeferredNorm | None = x.__dict__.get("_waits_for")
    return found


def manageable(x: Tensor) -> Tensor:
    """A map that waits for nothing, or for what the native code can do; normalised otherwise."""
    norm = waiting(x)
    facts = None if norm is None else norm_of(norm)
    refused = norm is not None and (facts is None or cpu.norm_refuses(x, facts))
    return settled(x) if refused else x


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
    return _normalised(x, norm)


def _normalised(x: Tensor, norm: DeferredNorm) -> Tensor:
    """As it would have been when the map was handed on: without gradients and with the BatchNorm's own statistics."""
    with torch.no_grad():
        facts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        out = F.batch_norm(x, *facts, facts[0] is None, 0.0, norm.eps)
        act = norm._modules.get("act")
        return out if act is None else act(out)
