"""Measure what channel attention costs: insert SE blocks, count them, time them, and make them faster.

The names below are imported when they are first used; `import selab` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from selab._version import __version__

if TYPE_CHECKING:
    from selab.api import build, compare_records, count, load, measure, profile
    from selab.attention.base import Attention
    from selab.attention.blocks import CBAM, ECA, ESE, SCSE, SSE, CoordinateAttention, GatherExcite
    from selab.attention.gates import convert_gates
    from selab.attention.insert import insert_se, remove_se
    from selab.attention.inserted import check_inserted
    from selab.attention.se import SqueezeExcitation
    from selab.errors import (
        DeviceError,
        InsertionError,
        ModelError,
        OutOfMemoryError,
        RecordError,
        SelabError,
        SpecError,
        UnknownNameError,
    )
    from selab.experiments.fold_gates import fold_gates
    from selab.fusion.fuse import fuse
    from selab.judging.look import gates

_HOMES = {
    "selab.api": "build compare_records count load measure profile",
    "selab.attention.base": "Attention",
    "selab.attention.blocks": "CBAM ECA ESE SCSE SSE CoordinateAttention GatherExcite",
    "selab.attention.gates": "convert_gates",
    "selab.attention.insert": "insert_se remove_se",
    "selab.attention.inserted": "check_inserted",
    "selab.attention.se": "SqueezeExcitation",
    "selab.errors": "DeviceError InsertionError ModelError OutOfMemoryError RecordError SelabError SpecError "
    "UnknownNameError",
    "selab.fusion.fuse": "fuse",
    "selab.experiments.fold_gates": "fold_gates",
    "selab.judging.look": "gates",
}
# Packages that the documentation uses as attributes: `selab.cost.register_rule`.
_PACKAGES = ("attention", "cost", "errors", "models")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "CBAM",
    "ECA",
    "ESE",
    "SCSE",
    "SSE",
    "Attention",
    "CoordinateAttention",
    "DeviceError",
    "GatherExcite",
    "InsertionError",
    "ModelError",
    "OutOfMemoryError",
    "RecordError",
    "SelabError",
    "SpecError",
    "SqueezeExcitation",
    "UnknownNameError",
    "__version__",
    "build",
    "check_inserted",
    "compare_records",
    "convert_gates",
    "count",
    "fold_gates",
    "fuse",
    "gates",
    "insert_se",
    "load",
    "measure",
    "profile",
    "remove_se",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, without loading torch for those who do not use it."""
    if name in _HOME_OF:
        # rich draws a random number when it is imported; the first call of a function must not change what a user's
        # seed gives.
        import random

        state = random.getstate()
        try:
            found = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
        finally:
            random.setstate(state)
        return found
    if name in _PACKAGES:
        return import_module(f"selab.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
