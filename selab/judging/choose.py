"""Choose which gates may become constants; free of torch, so that it serves networks of any runtime."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selab.records.frozen import Frozen

Cost = Callable[[Sequence[Sequence[str]]], list[float]]
"""Takes sets of blocks whose gates are constants; returns what each set costs, on the images for choosing."""


class Choice(Frozen, frozen=True, kw_only=True):
    """What was decided about a block.

    Attributes:
        path: of the block.
        spread: of its gates over the images.
        alone: what its constants cost, the other gates as they are; None where it cannot be folded.
        together: what they cost with all those that were chosen before; None if that was not tried.
        folded: whether it was chosen.
        where: into which weights it goes; empty if it is not folded.
        why_not: why it stays; empty if it is folded.
    """

    path: str
    spread: float
    alone: float | None = None
    together: float | None = None
    folded: bool = False
    where: str = ""
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A block that may be folded.

    Attributes:
        path: of the block.
        spread: of its gates over the images.
        where: into which weights it would go; empty if it cannot.
        why_not: why it cannot; empty if it can.
    """

    path: str
    spread: float
    where: str = ""
    why_not: str = ""


def choose(candidates: Sequence[Candidate], cost: Cost, *, limit: float) -> list[Choice]:
    """Choose blocks one after the other, the cheapest alone first, while all together cost no more than a limit.

    A block that would cost too much is left out, and the next one is tried.

    Args:
        candidates: all blocks, in the order of the network.
        cost: of sets of blocks.
        limit: of the cost.

    Returns:
        What was decided, in the order of the candidates.
    """
    able = [one for one in candidates if not one.why_not]
    alone = dict(zip((one.path for one in able), cost([(one.path,) for one in able]) if able else [], strict=True))
    chosen: list[str] = []
    together: dict[str, float] = {}
    for one in sorted(able, key=lambda one: (alone[one.path], one.spread)):
        if alone[one.path] > limit:
            break
        # The first was tried alone already.
        trial = cost([(*chosen, one.path)])[0] if chosen else alone[one.path]
        together[one.path] = trial
        if trial <= limit:
            chosen.append(one.path)
    decided = []
    for one in candidates:
        tried, folded, why_not = together.get(one.path), one.path in chosen, one.why_not
        if not folded and not why_not:
            why_not = "it costs too much alone" if tried is None else "it costs too much with the others"
        decided.append(
            Choice(
                path=one.path,
                spread=one.spread,
                alone=alone.get(one.path),
                together=tried,
                folded=folded,
                where=one.where if folded else "",
                why_not=why_not,
            )
        )
    return decided
