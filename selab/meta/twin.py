"""Copy a network with every tensor replaced: no memory is copied, and nothing that forward assigns reaches the network.

`copy.deepcopy` cannot do this: it copies the memory of tensors outside of parameters and buffers, refuses non-leaf
tensors, locks, generators and files, and takes functions with closures as they are.
"""

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selab.meta.reach import is_foreign, names_in

# Larger arrays are shared with the copy.
ARRAY_BYTES = 2**24

_ATOMIC: set[type] = {
    *(type(None), bool, int, float, complex, str, bytes, type, range, slice, type(Ellipsis), type(NotImplemented)),
    *(types.BuiltinFunctionType, types.ModuleType, types.CodeType, property, weakref.ProxyType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
}

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_HOOKS = [name for name, value in vars(nn.Module()).items() if type(value) is OrderedDict]


class Copier:
    """Copy an object graph; what cannot be copied is shared.

    Attributes:
        memo: original's id → its copy, as for `copy.deepcopy`.
    """

    def __init__(self, replace: Callable[[Tensor], Tensor], *, as_written: bool = True) -> None:
        """Take the function that returns the replacement of a tensor.

        Args:
            replace: called with each tensor once.
            as_written: run compiled modules as they are written and distributed ones in this process, and share
                scripted ones; otherwise the copies are compiled, distributed and scripted.
        """
        self.memo: dict[int, Any] = {}
        self._replace = replace
        self._as_written = as_written
        # Objects whose id is a key must live.
        self._alive: list[object] = []

    def __call__(self, value: Any) -> Any:
        """Return the copy of an object; the same one each time."""
        kind = type(value)
        if kind in _ATOMIC or isinstance(value, type):
            return value
        key = id(value)
        found = self.memo.get(key, self)
        if found is not self:
            return found
        self._alive.append(value)
        made = self.memo[key] = self._copied(value, kind)
        return made

    def _items(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return a copied dict; most values are numbers, None and empty dicts, for which this is the short way."""
        atomic = _ATOMIC
        return {
            key if type(key) is str else self(key): value if type(value) in atomic else self(value)
            for key, value in values.items()
        }

    def _copied(self, value: Any, kind: type) -> Any:
        made: Any
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            made = kind() if kind is not defaultdict else defaultdict(value.default_factory)
            self.memo[id(value)] = made
            if value:
                made.update(self._items(value))
            if kind is OrderedDict and vars(value):
                vars(made).update(self._items(vars(value)))
            return made
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if kind is list:
            self.memo[id(value)] = made = []
            made.extend(self(item) for item in value)
            return made
        if kind in (tuple, set, frozenset):
            items = [self(item) for item in value]
            return value if kind is tuple and all(a is b for a, b in zip(items, value, strict=True)) else kind(items)
        if kind is deque:
            return deque((self(item) for item in value), value.maxlen)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(self(value.__func__), self(value.__self__))
        if kind is functools.partial:
            return functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        if kind is functools._lru_cache_wrapper:
            return functools.lru_cache(**value.cache_parameters())(self(value.__wrapped__))
        if kind is weakref.ref:
            referent = value()
            return value if referent is None else weakref.ref(self(referent))
        return self._object(value, kind)

    def _tensor(self, value: Tensor) -> Tensor:
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            uninitialized: Tensor = copy.deepcopy(value)
            return uninitialized
        made = self._replace(value)
        if vars(value) and made is not value:
            self.memo[id(value)] = made
            for name, item in vars(value).items():
                if not hasattr(made, name):
                    setattr(made, name, self(item))
        return made

    def _module(self, value: nn.Module) -> nn.Module:
        kind = type(value)
        if isinstance(value, torch.jit.ScriptModule):
            return value if self._as_written else copy.deepcopy(value)
        compiled = "_orig_mod" in value._modules and kind.__name__ == "OptimizedModule"
        if compiled and not self._as_written:
            # A wrapper is made anew, around the copy, with the compiler's options.
            wrapped: Any = value
            return kind(self(wrapped._orig_mod), wrapped.dynamo_ctx)
        if compiled:
            made: nn.Module = _Passing.__new__(_Passing)
        else:
            made = object.__new__(kind)
        self.memo[id(value)] = made
        own = dict(vars(value))
        # Of weights that the copy does not have.
        for name in ("_compiled_call_impl", "_cached_call"):
            own.pop(name, None)
        # Every module has these to itself, mostly empty.
        hooks = {name: own.pop(name) for name in _HOOKS if name in own and not own[name]}
        made.__dict__.update(self._items(own))
        made.__dict__.update({name: OrderedDict() for name in hooks})
        if isinstance(made, _Passing):
            # torch.compile's wrapper asks the module inside.
            made.__dict__.setdefault("training", value.training)
        slots: list[str] = _slots(kind)  # type: ignore[arg-type]
        for slot in slots:
            if hasattr(value, slot):
                setattr(made, slot, self(getattr(value, slot)))
        if self._as_written and isinstance(value, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            # Their threads and processes know nothing of the modes of this one.
            made.__dict__["forward"] = made._modules["module"]
        return made

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """Copy a function with its closure, default arguments and the modules and tensors that it finds as globals.

        A closure may hold a list that a hook appends to; each of them may hold a module of the network.
        """
        held = self._held(value) if is_foreign(value.__globals__.get("__name__")) else {}
        defaults, keywords = self(value.__defaults__), self._items(value.__kwdefaults__ or {})
        changed = defaults is not value.__defaults__ or any(
            one is not keywords[key] for key, one in (value.__kwdefaults__ or {}).items()
        )
        # What is the same stays the same, for a network may ask `self.act is F.relu`.
        if not (held or changed or value.__closure__ or value.__dict__):
            self.memo[id(value)] = value
            return value
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        own = {**value.__globals__} if held else value.__globals__
        made = types.FunctionType(value.__code__, own, value.__name__, None, cells or None)
        made.__qualname__, made.__module__, made.__doc__ = value.__qualname__, value.__module__, value.__doc__
        self.memo[id(value)] = made
        own.update({name: self(one) for name, one in held.items()})
        for cell, of_copy in zip(value.__closure__ or (), cells, strict=True):
            try:
                of_copy.cell_contents = self(cell.cell_contents)
            except ValueError:
                continue  # an empty cell
        made.__defaults__, made.__kwdefaults__ = defaults, keywords or None
        made.__dict__.update(self._items(value.__dict__))
        return made

    def _held(self, value: types.FunctionType) -> dict[str, Any]:
        """Return the modules, tensors and functions that a function finds as globals, unless a copy is the same."""
        own = value.__globals__
        found = {}
        # It may call itself.
        self.memo[id(value)] = value
        for name in set(names_in(value.__code__)) & own.keys():
            one = own[name]
            holds = isinstance(one, (nn.Module, Tensor, weakref.ref))
            if holds or (type(one) in _FUNCTIONS and self(one) is not one):
                found[name] = one
        return found

    def _object(self, value: Any, kind: type) -> Any:
        """Copy any other object by its own protocol, or share it."""
        if kind.__module__.startswith("torch.fx."):
            return value
        try:
            if isinstance(value, torch.Generator):
                return torch.Generator(value.device).set_state(value.get_state())
            if hasattr(value, "nbytes") and hasattr(value, "__array__"):
                return value.copy() if value.nbytes <= ARRAY_BYTES else value
            if hasattr(kind, "__deepcopy__"):
                # It finds the copies of its attributes in the memo.
                for item in getattr(value, "__dict__", {}).values():
                    self(item)
                return value.__deepcopy__(self.memo)
            return self._rebuilt(value)
        except Exception:
            # A lock, a generator, a file, a connection: nothing that a copy of the network can have of its own.
            return value

    def _rebuilt(self, value: Any) -> Any:
        reduced: Any = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return value
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        made = make(*self(tuple(args)))
        self.memo[id(value)] = made
        self._alive.append((args, state))
        if state is not None:
            state = self(state)
            if hasattr(made, "__setstate__"):
                made.__setstate__(state)
            else:
                slots: Any = None
                if isinstance(state, tuple) and len(state) == 2:
                    state, slots = state
                if state:
                    made.__dict__.update(state)
                for name, item in (slots or {}).items():
                    setattr(made, name, item)
        for item in items or ():
            made.append(self(item))
        for key, item in pairs or ():
            made[self(key)] = self(item)
        return made


class _Passing(nn.Module):
    """Stand in for the wrapper of torch.compile: run the module inside of it as written."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _slots(kind: Any) -> list[str]:
    found = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += (
            [slots] if isinstance(slots, str) else [name for name in slots if name not in ("__dict__", "__weakref__")]
        )
    return found
