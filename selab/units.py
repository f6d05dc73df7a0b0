"""Write seconds, bytes and counts as text; all rounding happens here.

Decimal prefixes throughout: 1 M = 10^6, 1 MB = 10^6 bytes. (Tables that use 2^20 for M circulate; they differ by 5 %.)
"""

import math
from collections.abc import Callable

Format = Callable[[float], str]
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _significant(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _scaled(value: float, digits: int, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{_significant(value / factor, digits)} {prefix}{unit}"
    return f"{value:g}{' ' + unit if unit else ''}"


def count(value: float, *, digits: int = 4) -> str:
    """Return a count with a decimal prefix: 4711720 → `4.712 M`."""
    return _scaled(value, digits, "")


def exact(value: int) -> str:
    """Return all digits: 4711720 → `4,711,720`."""
    return f"{value:,}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things: 1, `block` → `1 block`; 1200, `block` → `1,200 blocks`.

    Args:
        number: of the things.
        noun: for one.
        plural: for several; by default with an s.
    """
    return f"{number:,} {plural_of(number, noun, plural)}"


def plural_of(number: int, noun: str, plural: str = "") -> str:
    """Return a noun as it stands after a number; the arguments are those of `counted`."""
    return noun if number == 1 else plural or f"{noun}s"


def size(value: float, *, digits: int = 4) -> str:
    """Return bytes with a decimal prefix: 66232320 → `66.23 MB`."""
    return _scaled(value, digits, "B")


def seconds(value: float, *, digits: int = 4) -> str:
    """Return a time in s, ms, µs or ns: 0.02451 → `24.51 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            return f"{_significant(value / factor, digits)} {unit}"
    return f"{value / 1e-9:.3g} ns"


def joules(value: float, *, digits: int = 4) -> str:
    """Return an energy in J, mJ or µJ: 0.1234 → `123.4 mJ`."""
    for factor, unit in ((1.0, "J"), (1e3, "mJ")):
        if abs(value) * factor >= 1:
            return f"{_significant(value * factor, digits)} {unit}"
    return f"{_significant(value * 1e6, digits)} µJ"


def percent(fraction: float, *, decimals: int = 2) -> str:
    """Return a difference in percent, always with its sign: 0.1061 → `+10.61 %`."""
    return f"{fraction * 100:+.{decimals}f} %"


def share(fraction: float, *, decimals: int = 1) -> str:
    """Return a part or a width in percent, without a sign: 0.15 → `15.0 %`."""
    return f"{fraction * 100:.{decimals}f} %"


def decimals_for(half_width: float) -> int:
    """Return how many decimals to show of a percentage whose 95 % half-width is this fraction.

    One digit beyond the first digit of the half-width, at most three decimals.
    """
    if not half_width or not math.isfinite(half_width):
        return 1
    return min(3, max(0, 1 - math.floor(math.log10(half_width * 100))))


def change(ratio: float, low: float, high: float) -> str:
    """Return a ratio and its interval as differences in percent: 1.089, 1.074, 1.104 → `+8.9 % [7.4, 10.4]`."""
    places = decimals_for((math.log(high) - math.log(low)) / 2)
    bounds = ", ".join(f"{100 * (bound - 1):.{places}f}" for bound in (low, high))
    return f"{percent(ratio - 1, decimals=places)} [{bounds}]"


NONE = "–"
