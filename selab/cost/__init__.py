"""Count what a network costs: parameters, MACs, FLOPs and bytes, from one pass, in which by default no kernel runs.

"FLOPs" is not a well-defined quantity. `selab.cost.count` states the conventions used here, and every total names its
convention. `RULES` holds one rule per operator; `register_rule` adds rules for operators of your own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selab.cost.rules import RULES, Rule, Work, register_rule

__all__ = ["RULES", "Rule", "Work", "register_rule"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in __all__:
        return getattr(import_module("selab.cost.rules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
