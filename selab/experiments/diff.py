"""Compare two records of equal workload and machine: costs, memory, and the ratio to the baseline.

Ratios are compared, never times. Each record has its own control and its own baseline, so that a change of the machine
between the two measurements cancels in each ratio. Two absolute times were not measured side by side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from selab import units
from selab.errors import RecordError
from selab.records import verdict
from selab.records.types import COST_ROWS, PHASE_NAMES, Latency, Phase, Record

ChangeKind = Literal["slower", "faster", "not_shown", "no_result"]
_PLACE = ("name", "cpu", "cores", "gpu")


@dataclass(frozen=True, kw_only=True)
class RatioChange:
    """The change of a phase's ratio (variant over baseline): after over before, minus one, with its 95 % interval.

    Attributes:
        change: 0.05 where the variant became 5 % slower than its baseline; None where a record has no result.
        text: one sentence.
    """

    phase: Phase
    kind: ChangeKind
    change: float | None
    low: float | None
    high: float | None
    text: str


def check_comparable(before: Record, after: Record, *, names: tuple[str, str]) -> None:
    """Check that two records can be compared.

    Args:
        before: the first.
        after: the second.
        names: of their files, for the message.

    Raises:
        RecordError: kind, workload, machine or baseline differ; names the fields and both values.
    """
    found = [*_differing(before, after)]
    if found:
        raise RecordError(
            f"{names[0]} and {names[1]}: records differ in {'; '.join(found)}; only records of equal workload, machine "
            "and baseline are compared: measure one of them again"
        )


def _differing(before: Record, after: Record) -> Iterator[str]:
    for label, one, other in (
        ("kind", before.kind, after.kind),
        ("baseline", before.baseline, after.baseline),
        *_baseline_costs(before, after),
        *(
            (f"workload.{name}", *_both(name, before.workload, after.workload))
            for name in before.workload.__struct_fields__
        ),
        *(
            (f"machine.{name}", *_both(name, before.machine, after.machine))
            for name in _PLACE
            if before.kind == "profile"
        ),
    ):
        if one != other:
            yield f"{label}: {one!r} and {other!r}"


def _baseline_costs(before: Record, after: Record) -> Iterator[tuple[str, int, int]]:
    """Compare the baselines' costs: a network that was changed keeps its name."""
    one, other = before.baseline_cost, after.baseline_cost
    if one is not None and other is not None and before.workload == after.workload:
        yield "baseline.params", one.params, other.params
        yield "baseline.macs", one.macs.all, other.macs.all


def _both(name: str, one: object, other: object) -> tuple[object, object]:
    return getattr(one, name), getattr(other, name)


def ratio_changes(before: Record, after: Record) -> list[RatioChange]:
    """Return the change of every phase that both records have."""
    return [
        _ratio_change(phase, before.latency[phase], after.latency[phase])
        for phase in before.latency
        if phase in after.latency
    ]


def _ratio_change(phase: Phase, before: Latency, after: Latency) -> RatioChange:
    """Combine the intervals of two independent runs: their half-widths add in quadrature, in logarithms.

    Each is taken with its control floor where that is what limits it, as in its own verdict.
    """
    both = [(one.ratio, verdict.not_excluded(one)) for one in (before, after)]
    (old, old_ends), (new, new_ends) = both
    label = PHASE_NAMES[phase]
    if old is None or new is None or old_ends is None or new_ends is None:
        which = " and ".join(
            name for name, (_, ends) in zip(("the first", "the second"), both, strict=True) if not ends
        )
        text = f"{label}: no result: {which} record has none"
        return RatioChange(phase=phase, kind="no_result", change=None, low=None, high=None, text=text)
    centre = math.log(new / old)
    below = math.hypot(math.log(new) - math.log1p(new_ends[0]), math.log1p(old_ends[1]) - math.log(old))
    above = math.hypot(math.log1p(new_ends[1]) - math.log(new), math.log(old) - math.log1p(old_ends[0]))
    change, low, high = (math.expm1(one) for one in (centre, centre - below, centre + above))
    kind: ChangeKind = "slower" if low > 0 else "faster" if high < 0 else "not_shown"
    places = units.decimals_for((high - low) / 2)
    ends = f"[{100 * low:.{places}f}, {100 * high:.{places}f}]"
    if kind == "not_shown":
        text = f"{label}: no change shown; cannot exclude {ends} %"
    else:
        amount = units.percent(abs(change), decimals=places).lstrip("+")
        text = f"{label}: {kind} by {amount} {ends} relative to its baseline"
    return RatioChange(phase=phase, kind=kind, change=change, low=low, high=high, text=text)


def grew(before: Record, after: Record) -> list[str]:
    """Return what is worse in the second record, by name: a larger cost, or a phase that is slower beyond doubt."""
    costs = [label for label, path, _ in COST_ROWS if attrgetter(path)(after.cost) > attrgetter(path)(before.cost)]
    return costs + [PHASE_NAMES[one.phase] for one in ratio_changes(before, after) if one.kind == "slower"]
