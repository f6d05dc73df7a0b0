"""Weights that quantised layers have packed: torch lists them neither as parameters nor as buffers."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def parameter_sizes(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Return the number of elements of each parameter of some modules, packed weights and biases included.

    Args:
        modules: whose own parameters are looked at, not those of their children.

    Returns:
        Identity → elements; a shared parameter is there once, as are packed weights that modules share.
    """
    sizes: dict[int, int] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                sizes[id(parameter)] = parameter.numel()
        for value in vars(module).values():
            if isinstance(value, torch.ScriptObject):
                sizes[id(value)] = sum(x.numel() for x in _unpacked(value))
    return sizes


def _unpacked(packed: Any) -> Iterator[Tensor]:
    """Yield the weight and the bias of a packed layer, those of all its layers for a recurrent one."""
    try:
        # Real tensors: the fake ones of a count must not follow.
        with torch._C._DisableTorchDispatch():
            methods = packed._method_names()
            held = tree_leaves(packed.unpack() if "unpack" in methods else packed.__getstate__())
    except (AttributeError, RuntimeError, TypeError):
        return
    layers = [one for one in held if isinstance(one, torch.ScriptObject)]
    # A recurrent layer lists its biases once more beside the layers that it is made of.
    for one in layers:
        yield from _unpacked(one)
    if not layers:
        yield from (one for one in held if isinstance(one, Tensor))
