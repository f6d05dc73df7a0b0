"""Check what a caller of `insert_se`, `remove_se` and `check_inserted` gave."""

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from selab.errors import InsertionError, ModelError
from selab.meta import Example, On, is_shape


def check_network(model: object, where: str) -> None:
    """Refuse what is no network, or is one whose modules cannot be looked at.

    Args:
        model: what was given.
        where: the function, for the message.

    Raises:
        ModelError: no `torch.nn.Module`, or a TorchScript network.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__}: the modules of a TorchScript network cannot be exchanged or checked; call "
            f"{where} before torch.jit.script or torch.jit.trace"
        )
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        step = ""
        if kind == "ExportedProgram":
            step = "; give the network that was exported, before torch.export.export"
        elif isinstance(model, type) and issubclass(model, nn.Module):
            step = "; give an instance of it"
        elif isinstance(model, str):
            step = "; selab.build(name) makes a network"
        raise ModelError(f"{where}: expected a torch.nn.Module, got {kind}{step}")


def check_on(on: object, where: str) -> None:
    """Refuse a value of `on` that is none.

    Args:
        on: what was given.
        where: the function, for the message.

    Raises:
        ModelError: neither `fake` nor `cpu`.
    """
    if on not in get_args(On):
        raise ModelError(f"{where}: on {on!r}: allowed: {', '.join(get_args(On))}")


def example_given(input_nchw: Example, inputs: Example | None, where: str) -> Example:
    """Return the example input; `inputs` comes before `input_nchw`.

    Args:
        input_nchw: as in `insert_se`.
        inputs: as in `insert_se`.
        where: the function, for the message.

    Raises:
        ModelError: neither a shape nor a tensor nor arguments.
    """
    example, name = (input_nchw, "input_nchw") if inputs is None else (inputs, "inputs")
    if isinstance(example, (Tensor, Mapping)):
        return example
    if isinstance(example, Sequence) and not isinstance(example, str):
        numbers = len(example) > 0 and all(isinstance(size, int | float) for size in example)
        if is_shape(example) or not numbers:
            return example
    raise ModelError(
        f"{where}: {name} {example!r}: expected a shape such as (1, 3, 224, 224), a tensor, positional arguments in a "
        "tuple, or keyword arguments in a mapping"
    )


def patterns_given(patterns: object, what: str) -> list[str]:
    """Return paths or patterns as a list; a text is one of them.

    Args:
        patterns: what was given; each has to be a text, or has one as its attribute `path`.
        what: the function and its argument, for the message.

    Raises:
        InsertionError: neither a text nor several.
    """
    if isinstance(patterns, str):
        return [patterns]
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    texts: list[str] = []
    for one in found:
        text = getattr(one, "path", one)
        if not isinstance(text, str):
            raise InsertionError(f"{what}: {text!r}: expected the path of a module or a pattern such as 'layer*.*.bn3'")
        texts.append(text)
    return texts
