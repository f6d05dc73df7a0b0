"""Attention blocks, their configuration, and inserting them into networks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selab.attention.base import Attention
    from selab.attention.gates import convert_gates
    from selab.attention.insert import insert_se, remove_se
    from selab.attention.insertions import insertion_remarks
    from selab.attention.registry import register_block

_HOMES = {
    "Attention": "base",
    "convert_gates": "gates",
    "insert_se": "insert",
    "insertion_remarks": "insertions",
    "register_block": "registry",
    "remove_se": "insert",
}

__all__ = ["Attention", "convert_gates", "insert_se", "insertion_remarks", "register_block", "remove_se"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `selab.attention.config` starts without torch."""
    if name in _HOMES:
        return getattr(import_module(f"selab.attention.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
