"""Prove at each call of a module that nothing but the call holds a feature map, so that its memory may be reused.

A feature map is exclusive if every reference to it is known: those of `nn.Module.__call__`, and one local variable of
the calling function that no path reads again (`selab.kernels.call_sites`). Hooks, lists, attributes, views, other
tensors over its memory and C++ code raise one of the counts. How many references a call holds is measured once in this
interpreter. Where the measurement does not show the expected pattern, nothing is exclusive.
"""

import sys
from collections.abc import Iterable
from functools import cache
from sys import getrefcount
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import getweakrefcount

import torch
from torch import Tensor, nn

from selab.kernels.call_sites import TEMPORARY, CallSite, Use, call_site

# The functions between the caller of a module and its `forward`, from the inside.
_MACHINERY = (nn.Module._call_impl.__code__, nn.Module.__call__.__code__)
_SEQUENTIAL = nn.Sequential.forward.__code__
# Functions that call modules by local variables.
_CONTAINERS: set[CodeType] = {_SEQUENTIAL}
# Calls through which an argument is followed outwards.
_DEPTH = 3


class Claim(NamedTuple):
    """The condition under which the argument of a call is exclusive.

    Attributes:
        frames: the calling functions, from the inside, with the byte offset of their current instruction (-1: any).
        references: `sys.getrefcount` of the argument, at the start of `forward`.
    """

    frames: tuple[tuple[CodeType, int], ...]
    references: int


class Route(NamedTuple):
    """The condition under which the output of a module goes to a consumer, and nowhere else.

    Attributes:
        frames: as in `Claim`.
        consumer: the module that receives it.
        children: (children of a module, their name, the module of that name).
        orders: nn.Sequentials whose children must stay the same.
        passed: nn.Identity modules on the way, which must have no hooks.
    """

    frames: tuple[tuple[CodeType, int], ...]
    consumer: nn.Module
    children: tuple[tuple[dict[str, Any], str, nn.Module], ...]
    orders: tuple[nn.Module, ...]
    passed: tuple[nn.Module, ...] = ()


class References(NamedTuple):
    """References that a call of a module holds to its argument, measured in this interpreter.

    Attributes:
        call: `sys.getrefcount` of a temporary argument at the start of `forward`.
        outer: further references of each call through which an argument came.
        tensor: torch's count of a tensor that nothing else holds.
        storage: torch's count of its memory.
        view: `sys.getrefcount` of the object of its memory.
    """

    call: int
    outer: int
    tensor: int
    storage: int
    view: int


class Arrival(NamedTuple):
    """A call of a module, as its `forward` finds it.

    Attributes:
        module: the module.
        frame: the one that called its `forward`.
        references: `sys.getrefcount` of its first argument, at the start of `forward`.
        depth: of that frame, seen from `CachedDispatch.replay`.
    """

    module: nn.Module
    frame: FrameType
    references: int
    depth: int = 2

    def claim(self) -> Claim | None:
        """Return when its first argument is exclusive; None if it never is at this place."""
        return claim(self.frame, self.module)


def claim(frame: FrameType, module: nn.Module) -> Claim | None:
    """Return when the first argument of a module's call is exclusive; None if it never is at this place.

    Args:
        frame: the one that called the module's `forward`.
        module: the module.
    """
    references = measured()
    if references is None or sys.gettrace() is not None:
        return None
    frames: list[tuple[CodeType, int]] = []
    known, position = references.call, 0
    for _ in range(_DEPTH):
        called = _call(frame, module)
        if called is None or position >= len(called[1].sources):
            return None
        site, call = called
        frames += _conditions(site)
        source = call.sources[position]
        if source is None or source in call.live:
            return None
        if source == TEMPORARY:
            return Claim(tuple(frames), known)
        known += 1
        outer = call.parameters.get(source, 0)
        if outer == 0:
            # Stored in this function: what the caller holds is something else, or counted.
            return Claim(tuple(frames), known)
        known, position = known + references.outer, outer - 1
        found = _outwards(site)
        if found is None:
            return None
        frame, module = found
    return None


def route(frame: FrameType, module: nn.Module, consumers: tuple[nn.Module, ...]) -> Route | None:
    """Return how a module's output reaches one of some consumers as its input; None if it may go anywhere else.

    Args:
        frame: the one that called the module's `forward`.
        module: the module.
        consumers: modules that can take the output.
    """
    if measured() is None or sys.gettrace() is not None:
        return None
    frames: list[tuple[CodeType, int]] = []
    orders: list[nn.Module] = []
    for _ in range(_DEPTH):
        called = _call(frame, module)
        if called is None or called[1].destination is None:
            return None
        site, call = called
        frames += _conditions(site)
        if site.f_code is _SEQUENTIAL:
            holder = _local(site, "self")
            behind = _behind(holder, module)
            orders.append(holder)
            if behind is not None:
                return Route(tuple(frames), behind, (), tuple(orders)) if _is_in(behind, consumers) else None
        else:
            destination: Any = call.destination
            if destination.uses:
                reached = None if destination.returned else _reached(site, destination.uses, consumers)
                return None if reached is None else reached._replace(frames=tuple(frames), orders=tuple(orders))
            if not destination.returned:
                return None
        found = _outwards(site)
        if found is None:
            return None
        frame, module = found
    return None


def _reached(site: FrameType, uses: Iterable[Use], consumers: tuple[nn.Module, ...]) -> Route | None:
    """Return the route that ends in this function, without frames; an nn.Identity on it returns what it receives."""
    consumer: nn.Module | None = None
    children: list[tuple[dict[str, Any], str, nn.Module]] = []
    passed: list[nn.Module] = []
    waiting, seen = list(uses), set(uses)
    while waiting:
        use = waiting.pop()
        owner, found = _resolved(site, use.callee)
        if found is None and owner is not None and owner.__dict__.get(use.callee[-1], ...) is None:
            # Called nowhere while it is None, as an optional layer.
            continue
        if found is None or owner is None:
            return None
        name = use.callee[-1]
        if len(use.callee) == 1:
            name = next(key for key, one in owner._modules.items() if one is found)
        child = owner._modules, name, found
        if _is_in(found, consumers):
            if use.position != (1 if getattr(found, "edge", "") == "shortcut" else 0):
                return None
            consumer = found
            children.append(child)
        elif type(found) is nn.Identity:
            call = call_site(site.f_code, use.offset)
            if call is None or call.destination is None or call.destination.returned:
                return None
            passed.append(found)
            children.append(child)
            waiting += (one for one in call.destination.uses if one not in seen)
            seen.update(call.destination.uses)
        # Another module is on a path that does not lead to the consumer; it finds the feature map normalised.
    return None if consumer is None else Route((), consumer, tuple(children), (), tuple(passed))


def _behind(holder: nn.Module, module: nn.Module) -> nn.Module | None:
    """Return the child of an nn.Sequential after a module."""
    children = list(holder._modules.values())
    index = next(i for i, child in enumerate(children) if child is module)
    return children[index + 1] if index + 1 < len(children) else None


def _is_in(module: nn.Module, modules: Iterable[nn.Module]) -> bool:
    return any(module is one for one in modules)


def _call(frame: FrameType, module: nn.Module) -> tuple[FrameType, CallSite] | None:
    """Return the function that called this module in the ordinary way, and its call; None if there is none."""
    site: FrameType | None = frame
    for code in _MACHINERY:
        if site is None or site.f_code is not code:
            return None
        site = site.f_back
    call = None if site is None else call_site(site.f_code, site.f_lasti)
    if site is None or call is None:
        return None
    if site.f_code is _SEQUENTIAL:
        holder = _local(site, "self")
        once = isinstance(holder, nn.Sequential) and sum(one is module for one in holder._modules.values()) == 1
        return (site, call) if once and _local(site, call.callee[0]) is module else None
    return (site, call) if _resolved(site, call.callee)[1] is module else None


def trust_container(forward: Any) -> None:
    """Let a module's `forward`, which calls its children by local variables and keeps no feature map, be followed."""
    _CONTAINERS.add(forward.__code__)


def _resolved(site: FrameType, callee: tuple[str, ...]) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the module that holds what an expression like `self.layer1.se` names, and that module or None."""
    if len(callee) == 1 and site.f_code in _CONTAINERS:
        found = _local(site, callee[0])
        holder = _local(site, "self")
        inside = isinstance(holder, nn.Module) and _is_in(found, holder.children())
        return (holder, found) if inside else (None, None)
    if len(callee) < 2:
        return None, None
    owner, found = None, _local(site, callee[0])
    for name in callee[1:]:
        if not isinstance(found, nn.Module):
            return None, None
        owner, found = found, found._modules.get(name)
    return owner, found if isinstance(found, nn.Module) else None


def _outwards(site: FrameType) -> tuple[FrameType, nn.Module] | None:
    """Return the module whose forward this function is, and the frame that called it."""
    names = site.f_code.co_varnames
    module = _local(site, names[0]) if site.f_code.co_argcount else None
    if site.f_back is None or not isinstance(module, nn.Module):
        return None
    return site.f_back, module


def _local(frame: FrameType, name: str) -> Any:
    """Return the value of a local variable, without leaving references to others behind."""
    values = frame.f_locals
    found = values.get(name)
    if type(values) is dict:
        # Before Python 3.13, a copy that the frame keeps.
        values.clear()
    return found


def _conditions(site: FrameType) -> tuple[tuple[CodeType, int], ...]:
    return (*((code, -1) for code in _MACHINERY), (site.f_code, site.f_lasti))


# ------------------------------------------------------------------------------------------------------------ counting
def is_exclusive(x: Tensor, references: int, claimed: Claim | None) -> bool:
    """Return whether nothing but a call holds its first argument; its frames must be those of `claimed`.

    Args:
        x: the argument.
        references: `sys.getrefcount(x)` at the start of `forward`.
        claimed: from `claim`.
    """
    expected = measured()
    if claimed is None or expected is None or references != claimed.references or getweakrefcount(x):
        return False
    storage: Any = x.untyped_storage()
    # Memory that torch cannot resize belongs to somebody else, such as numpy.
    return (
        x._use_count() == expected.tensor  # type: ignore[attr-defined]
        and getrefcount(storage) == expected.view
        and _uses(storage._cdata) == expected.storage
        and storage.resizable()
    )


_uses: Any = torch._C._storage_Use_Count


def native_owner(claimed: Claim | None, depth: int) -> tuple[Any, ...] | None:
    """Return the entries of `owner` in native_call.h; None if the argument is never exclusive.

    Args:
        claimed: from `claim`, or the frames of a longer route with it.
        depth: of the frame that called `forward`, seen from the native call.
    """
    expected = measured()
    if claimed is None or expected is None:
        return None
    counts = claimed.references, expected.tensor, expected.storage
    return sys._getframe, depth, claimed.frames, *counts, _uses, expected.view - 1


@cache
def measured() -> References | None:
    """Return the references that a call holds; None if they cannot be told from others in this interpreter."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        ways = ("temporary", "local", "through", "twice", "second", "live", "listed")
        counts = [_Probe().count(way) for way in ways]
        fresh = torch.empty(1)
        tensor, view = fresh._use_count(), fresh.untyped_storage()  # type: ignore[attr-defined]
        storage, held = _uses(view._cdata), getrefcount(view)
        alias = fresh.detach()
        shared = _uses(view._cdata), alias._use_count()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    temporary, local, through, twice, second, live, listed = counts
    outer = through - temporary - 1
    regular = (local, second, live, listed) == (temporary + 1, temporary, temporary + 1, temporary + 1)
    if not regular or outer < 1 or twice != temporary + 2 * (outer + 1) or shared != (storage + 1, tensor):
        return None
    return References(call=temporary, outer=outer, tensor=tensor, storage=storage, view=held)


class _Seen(nn.Module):
    """Count the references to its first argument."""

    def forward(self, x: object, _other: object = None) -> int:
        return getrefcount(x)


class _Handed(nn.Module):
    """Hand its argument on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: object) -> int:
        found: int = self.inner(x)
        return found


class _Probe(nn.Module):
    """Call a module with arguments that are held in ways that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = _Seen()
        self.handed = _Handed(self.seen)
        self.twice = _Handed(self.handed)

    def count(self, way: str) -> int:
        found: int = getattr(self, f"_{way}")()
        return found

    def _temporary(self) -> int:
        return self.seen(object())  # type: ignore[no-any-return]

    def _second(self) -> int:
        return self.seen(object(), object())  # type: ignore[no-any-return]

    def _local(self) -> int:
        x = object()
        return self.seen(x)  # type: ignore[no-any-return]

    def _live(self) -> int:
        x = object()
        found: int = self.seen(x)
        del x
        return found

    def _listed(self) -> int:
        kept = [object()]
        return self.seen(kept[0]) if kept else 0

    def _through(self) -> int:
        return self.handed(object())  # type: ignore[no-any-return]

    def _twice(self) -> int:
        return self.twice(object())  # type: ignore[no-any-return]
