"""Modes of torch that do not load its compiler, which takes two seconds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A `TorchDispatchMode`; a subclass defines `__torch_dispatch__`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch 2.13 otherwise imports torch._dynamo at the first operator.
        return False


@contextmanager
def made_on(device: str | torch.device) -> Iterator[None]:
    """Make new tensors on a device; on `meta`, no values are drawn for them.

    A tensor on the meta device has no values to initialise, yet torch runs `normal_` there as Python code that loads
    the compiler.
    """
    if torch.device(device).type != "meta":
        with torch.device(device):
            yield
        return
    with torch.device(device), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Leaves tensors on the meta device as they are, where normally distributed values would be drawn."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, nn.init.normal_):
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))
