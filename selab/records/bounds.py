"""Bounds on the values that texts hold: how deep they are nested, and which numbers they may have."""

import math
from collections.abc import Sequence
from typing import Any

MOST_LEVELS = 32
"""Tables within tables and lists within lists, in TOML and JSON."""

_SHOWN_KEY = 80


def fault_of(data: object) -> str:
    """Return what is out of bounds in plain values, such as those of TOML or JSON, and where; empty if nothing is."""
    # Each table or list with the line of its parents; no recursion, since the depth is what is checked.
    left: list[tuple[Any, tuple[object, ...]]] = [([data], ())]
    while left:
        values, path = left.pop()
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, dict | list):
                if len(path) >= MOST_LEVELS:
                    return f"{_path(path[1:4])}…: nested too deeply; at most {MOST_LEVELS} levels"
                left.append((value, (*path, key)))
            elif isinstance(value, float):
                if not math.isfinite(value):
                    return f"{_path((*path, key)[1:])}: {value}; must be a finite number"
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                return f"{_path((*path, key)[1:])}: an integer of {value.bit_length()} bits; at most 64"
    return ""


def _path(keys: Sequence[object]) -> str:
    return ".".join(str(key)[:_SHOWN_KEY] for key in keys)
