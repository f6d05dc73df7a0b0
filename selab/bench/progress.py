"""Progress of a measurement: its state after an ABBA block, and where it is reported to."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a measurement after an ABBA block.

    Attributes:
        blocks: number of ABBA blocks that count.
        half_width: of the headline at the last look; None before the first.
        elapsed_s: since sampling began.
        budget_s: the plan's.
    """

    blocks: int
    half_width: float | None
    elapsed_s: float
    budget_s: float


Report = Callable[[str, Progress | None], object]
"""Receives a label and the state of what it names; None where there is nothing to count yet."""


def prefixed(report: Report, prefix: str) -> Report:
    """Return a report of one part of a measurement: its labels begin with `prefix: `."""
    return lambda label, state: report(f"{prefix}: {label}", state)
