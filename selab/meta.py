"""Run a network on the meta device: the shapes at its modules, and how often each module runs, without arithmetic."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selab.errors import ModelError, one_line


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a deep copy whose tensors are on the meta device: same structure, hooks and flags, no memory, no values.

    Shared tensors stay shared. Neither making the copy nor running it changes the model.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        # Parameters and buffers, and tensors that a module keeps as plain attributes.
        for tensor in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                twin = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(model, memo)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore the mode of every module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(kw_only=True)
class Passage:
    """The calls of a module in one forward pass, and the shapes of its first input and of its output.

    The shape of a value that is not a tensor is None; its kind is the name of its type.

    Attributes:
        calls: how often the module ran.
        input_shape: of the first positional argument of the last call.
        output_shape: of the last call.
        input_kind: type of that argument.
        output_kind: type of the output.
    """

    calls: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    input_kind: str = "not given by position"
    output_kind: str = ""


def passages(model: nn.Module, paths: Iterable[str], input_nchw: tuple[int, ...]) -> Mapping[str, Passage]:
    """Run the model once on the meta device; return the shapes and calls of the modules at these paths.

    Args:
        model: on any device; not changed.
        paths: module paths, as in `named_modules`.
        input_nchw: the shape of the example input, (N, C, H, W).

    Raises:
        ModelError: the forward pass fails with this input.
    """
    twin = meta_twin(model)
    seen = {path: Passage() for path in paths}
    for path, passage in seen.items():
        twin.get_submodule(path).register_forward_hook(_recorder(passage))
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    try:
        with evaluating(twin), torch.no_grad(), _ShapesOnly():
            twin(torch.empty(input_nchw, device="meta", dtype=dtype))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: forward fails with an input of shape {tuple(input_nchw)}: {first_line(error)}; "
            "give the shape that the network expects (input_nchw, --resolution)"
        ) from error
    return seen


class _ShapesOnly(TorchFunctionMode):
    """Let batch norm return an empty tensor of its input's shape: its meta kernel in torch 2.13 is slow Python."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _recorder(passage: Passage):  # type: ignore[no-untyped-def]
    def record(_module: nn.Module, args: tuple[object, ...], output: object) -> None:
        passage.calls += 1
        first = args[0] if args else None
        passage.input_shape = tuple(first.shape) if isinstance(first, Tensor) else None
        passage.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
        passage.input_kind = type(first).__name__ if args else "not given by position"
        passage.output_kind = type(output).__name__

    return record


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if it has none."""
    return one_line(error)
