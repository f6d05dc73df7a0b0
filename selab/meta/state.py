"""Put back what a forward pass changes outside of the network's own tensors and attributes."""

import functools
import random
import sys
import types
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from selab.meta.reach import CONTAINERS, is_foreign, names_in, reached


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore random states, global switches of torch, and caches beside the network, at the end.

    Caches are attributes of the classes of its modules, containers of the Python modules that define these, and
    whatever the functions of both reach: results that `functools.cache` keeps, containers in closures and default
    arguments, attributes of other objects. A tensor without memory must not be found in one of them later.
    """
    cuda: Any = torch.cuda
    devices = range(cuda.device_count()) if cuda.is_initialized() else []
    with ExitStack() as stack, torch.random.fork_rng(devices=devices):
        stack.callback(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and hasattr(numpy, "random"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for put_back in _switches():
            stack.callback(put_back)
        kinds = {base for module in model.modules() for base in type(module).__mro__ if is_foreign(base.__module__)}
        for kind in kinds:
            _keep(stack, dict(vars(kind)), functools.partial(setattr, kind), functools.partial(delattr, kind), kind)
        for name in {kind.__module__ for kind in kinds}:
            place = sys.modules.get(name)
            if place is not None:
                own = {key: value for key, value in vars(place).items() if not key.startswith("__")}
                _keep(stack, own, functools.partial(setattr, place), functools.partial(delattr, place), place)
        own_dicts = {id(vars(module)) for module in model.modules()}
        attributes = [value for module in model.modules() for value in _functions(module)]
        for one in reached([*kinds, *attributes]):
            if id(getattr(one, "__dict__", None)) not in own_dicts:
                _keep_reached(stack, one, kinds)
        yield


def _functions(module: nn.Module) -> Iterator[Any]:
    """Yield the functions among a module's attributes and its hooks."""
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, (nn.Module, torch.Tensor, type)):
            yield value
        elif name.endswith("_hooks") and isinstance(value, dict):
            yield from value.values()


def _keep_reached(stack: ExitStack, one: Any, kinds: set[type]) -> None:
    """Restore what an object outside of the network holds."""
    if isinstance(one, CONTAINERS):
        stack.callback(_refill, one, list(one.items()) if isinstance(one, dict) else list(one))
    elif isinstance(one, functools._lru_cache_wrapper):
        stack.callback(_forget_new, one, one.cache_info().misses)
    elif isinstance(one, types.CellType):
        stack.callback(_set_cell, one, _cell(one))
    elif isinstance(one, types.FunctionType):
        stack.callback(_put_back, vars(one), dict(vars(one)), None)
        own, names = one.__globals__, set(names_in(one.__code__))
        stack.callback(_put_back, own, {name: own[name] for name in names & own.keys()}, names)
    elif isinstance(one, type):
        if one not in kinds:
            _keep(stack, dict(vars(one)), functools.partial(setattr, one), functools.partial(delattr, one), one)
    elif isinstance(getattr(one, "__dict__", None), dict):
        stack.callback(_put_back, vars(one), dict(vars(one)), None)


_EMPTY = object()


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _set_cell(cell: types.CellType, content: Any) -> None:
    if _cell(cell) is content:
        return
    if content is _EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = content


def _put_back(place: MutableMapping[str, Any], before: dict[str, Any], names: Any) -> None:
    """Restore entries of a namespace; only those of these names, unless they are None."""
    for name in list(place) if names is None else [name for name in names if name in place]:
        if name not in before and not isinstance(place[name], types.ModuleType):
            del place[name]
    for name, value in before.items():
        if place.get(name, _EMPTY) is not value:
            place[name] = value


def _keep(
    stack: ExitStack,
    values: dict[str, Any],
    assign: Callable[[str, Any], object],
    remove: Callable[[str], object],
    place: Any,
) -> None:
    """Restore the attributes of a class or a Python module, the contents of its containers, and its cached results."""

    def put_back() -> None:
        for name, value in list(vars(place).items()):
            if name in values and values[name] is not value:
                assign(name, values[name])
            elif name not in values and not name.startswith("__") and not isinstance(value, types.ModuleType):
                remove(name)

    for value in values.values():
        function = getattr(value, "__func__", value)
        if isinstance(value, CONTAINERS):
            stack.callback(_refill, value, list(value.items()) if isinstance(value, dict) else list(value))
        elif isinstance(function, functools._lru_cache_wrapper):
            stack.callback(_forget_new, function, function.cache_info().misses)
    stack.callback(put_back)


def _refill(container: Any, items: list[Any]) -> None:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if len(now) == len(items) and all(_same(a, b) for a, b in zip(now, items, strict=True)):
        return
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(items)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def _forget_new(function: Any, misses: int) -> None:
    if function.cache_info().misses != misses:
        function.cache_clear()


def _switches() -> Iterator[Callable[[], object]]:
    """Yield functions that set torch's global switches to what they are now."""
    yield functools.partial(torch.set_default_dtype, torch.get_default_dtype())
    yield _setter(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1]),
    )
    yield _setter(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield _setter(torch.get_num_threads, torch.set_num_threads)
    for kind in ("cpu", "cuda"):
        yield functools.partial(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
        yield functools.partial(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind))
    cudnn: Any = torch.backends.cudnn
    for name in ("enabled", "benchmark", "deterministic"):
        yield functools.partial(_set, cudnn, name, getattr(cudnn, name))
    grad = torch.is_grad_enabled()
    yield lambda: torch._C._set_grad_enabled(grad)


def _setter(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], object]:
    """Return a function that restores a switch if it was changed: some import a compiler when they are set."""
    before = get()

    def put_back() -> None:
        if get() != before:
            put(before)

    return put_back


def _set(place: types.ModuleType, name: str, value: object) -> None:
    if getattr(place, name) != value:
        setattr(place, name, value)
