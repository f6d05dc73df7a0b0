"""Put back what a forward pass changes outside of the network's own tensors and attributes."""

import functools
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)
# Libraries whose classes and modules hold no caches of a network's tensors.
_LIBRARIES = ("torch", "builtins", "collections", "typing", "selab")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore random states, global switches of torch, and caches beside the network, at the end.

    Caches are attributes of the classes of its modules, containers of the Python modules that define these, and results
    of functions there that `functools.cache` keeps: a tensor without memory must not be found in one of them later.
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
        kinds = {base for module in model.modules() for base in type(module).__mro__ if _is_foreign(base.__module__)}
        for kind in kinds:
            _keep(stack, dict(vars(kind)), functools.partial(setattr, kind), functools.partial(delattr, kind), kind)
        for name in {kind.__module__ for kind in kinds}:
            place = sys.modules.get(name)
            if place is not None:
                own = {key: value for key, value in vars(place).items() if not key.startswith("__")}
                _keep(stack, own, functools.partial(setattr, place), functools.partial(delattr, place), place)
        yield


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in _LIBRARIES


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
        if isinstance(value, _CONTAINERS):
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
