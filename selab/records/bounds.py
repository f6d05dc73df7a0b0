"""Bounds on what texts may hold: how deep they are nested, and which numbers they may have."""

import math
import re
from collections.abc import Sequence
from typing import Any

MOST_LEVELS = 32
"""Tables within tables and lists within lists, in TOML and JSON."""

MOST_IMAGES, MOST_PIXELS, MOST_STAGE = 10**9, 10**6, 1000
"""Of a batch, of a side of an input or its channels, and of the number of a stage."""
MOST_THREADS, MOST_PROCESSES = 1024, 1000
MOST_SEED = 2**63 - 1
MOST_SECONDS = 7 * 24 * 3600.0
"""Of sampling; a week."""
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


_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def json_fault(text: str, error: Exception) -> str:
    """Return why a text is not JSON, given the decoder's error.

    The decoder calls a surrogate without its other half a truncated input.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    high, end = "", 0
    for found in _ESCAPED.finditer(text):
        code = int(found[1] or "0", 16)
        follows = high and found.start() == end
        if high and not (follows and 0xDC00 <= code < 0xE000):
            return _lone(high)
        if not high and 0xDC00 <= code < 0xE000:
            return _lone(found[0])
        high, end = (found[0] if 0xD800 <= code < 0xDC00 else ""), found.end()
    return _lone(high) if high else str(error)


def _lone(escape: str) -> str:
    return f"{escape} is half of a surrogate pair, which is no character"
