"""Find what the code of a network can reach outside of it: functions, their caches, containers and other objects.

A function reaches the globals that its code names, its closure, its default arguments and what it wraps.
"""

import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)
# Libraries whose classes and modules hold no caches of a network's tensors.
_LIBRARIES = {"torch", "numpy", "selab", *sys.stdlib_module_names} - {"__main__"}
# A network reaches some hundred objects; data sets and registries that it names are not searched to their end.
_MOST = 20_000
_MOST_ITEMS = 1_000


def is_foreign(module: object) -> bool:
    """Return whether a Python module, by its name, is none of a library that caches nothing."""
    return isinstance(module, str) and module.partition(".")[0] not in _LIBRARIES


def names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def reached(starts: Iterable[Any]) -> Iterator[Any]:
    """Yield each foreign function, cell, cached function, container, class and other object once, from these on."""
    found: dict[int, Any] = {}
    waiting = list(starts)
    while waiting and len(found) < _MOST:
        one = waiting.pop()
        if isinstance(one, (Tensor, str, bytes, int, float, complex, type(None), types.CodeType)) or id(one) in found:
            continue
        found[id(one)] = one
        following = _following(one)
        if following is not None:
            yield one
            waiting.extend(following)


def _following(one: Any) -> list[Any] | None:
    """Return what an object reaches; None if it is of a library, or nothing that could hold a tensor."""
    if isinstance(one, types.FunctionType):
        return _of_function(one) if is_foreign(one.__globals__.get("__name__", "")) else None
    if isinstance(one, types.CellType):
        try:
            return [one.cell_contents]
        except ValueError:
            return []
    if isinstance(one, functools._lru_cache_wrapper):
        return [one.__wrapped__] if is_foreign(one.__module__) else None
    if isinstance(one, (staticmethod, classmethod)):
        return [one.__func__]
    if isinstance(one, types.MethodType):
        return [one.__func__, one.__self__]
    if isinstance(one, property):
        return [one.fget, one.fset]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, dict):
        return list(one.values())[:_MOST_ITEMS]
    if isinstance(one, (*CONTAINERS, tuple)):
        return list(one)[:_MOST_ITEMS]
    if isinstance(one, type):
        return [*vars(one).values(), *one.__bases__] if is_foreign(one.__module__) else None
    if isinstance(one, types.ModuleType) or not isinstance(getattr(one, "__dict__", None), dict):
        return None
    held = [*vars(one).values(), type(one)]
    library = not is_foreign(type(one).__module__) and type(one).__module__ not in ("weakref", "types", "_thread")
    return None if library and not isinstance(one, nn.Module) else held


def _of_function(function: types.FunctionType) -> list[Any]:
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [*(function.__closure__ or ()), *vars(function).values()]
    own = function.__globals__
    names = set(names_in(function.__code__))
    for name in names & own.keys():
        value = own[name]
        if isinstance(value, types.ModuleType):
            # `caches.grid(8)` names both the Python module and its function.
            if is_foreign(value.__name__):
                held += [vars(value)[item] for item in names & vars(value).keys()]
        else:
            held.append(value)
    return held
