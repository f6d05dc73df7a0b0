"""What channel attention costs and what it buys: insert SE blocks, count them, measure them, make them cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selab.fusion.fuse import fuse


__all__ = ["__version__", "fuse"]


def __getattr__(name: str) -> Any:
    """`selab.fuse`, without loading torch for those who do not use it."""
    if name == "fuse":
        from selab.fusion.fuse import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
