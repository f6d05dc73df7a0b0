"""Undo `selab.fuse`: the modules of a network compute what they did before, to the bit."""

from typing import Any

from torch import nn

from selab.attention.gated_site import move_hooks, replace_modules
from selab.attention.se import SqueezeExcitation
from selab.kernels.dispatch import CachedDispatch
from selab.kernels.residual import FusedJoin
from selab.kernels.swap import Swapped, restore

# What `selab.fuse` notes on the modules that it changes.
_NOTES = ("consumers", "can_overwrite", "guarded", "_cached_call")


def unfuse(model: nn.Module) -> None:
    """Give every module of a network the class and the implementation that it had before `selab.fuse`, in place.

    Parameters, buffers, hooks and checkpoint keys stay what they are.
    """
    joins: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, FusedJoin):
            move_hooks(module, module.inner)
            joins.append((module, module.inner))
        elif isinstance(module, SqueezeExcitation):
            _unfuse_block(module)
        elif isinstance(module, Swapped):
            unswap(module)
    if joins:
        replace_modules(model, joins)


def unswap(module: nn.Module) -> None:
    """Give one module the class that it had before `selab.fuse`, in place."""
    if isinstance(module, CachedDispatch):
        _forget(module)
    restore(module)


def _forget(module: nn.Module) -> None:
    """Remove what `selab.fuse` noted on a module."""
    for name in _NOTES:
        module.__dict__.pop(name, None)


def _unfuse_block(block: SqueezeExcitation) -> None:
    _forget(block)
    block.can_overwrite = False
    before: Any = block.__dict__.pop("unfused_impl", "")
    # An implementation that was chosen since `fuse` stays.
    if before and block.impl == "auto":
        block.impl = before
