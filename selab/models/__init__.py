"""The catalog of networks, building them, and using them as backbones."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selab.models.backbones import Backbone, backbone

__all__ = ["Backbone", "backbone"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in __all__:
        return getattr(import_module("selab.models.backbones"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
