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
        alone: what its constants cost, the other gates as they are, on the images that rank; None where it cannot be
            folded.
        together: what they cost with all those that were chosen before it, on the images that decide; None if that was
            not tried.
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


# So many blocks that cost too much, one behind the other, end the search: those behind them cost more alone.
_PATIENCE = 3


def choose(candidates: Sequence[Candidate], ranking: Cost, deciding: Cost, *, limit: float) -> list[Choice]:
    """Choose blocks one after the other, the cheapest alone first, while all together cost no more than a limit.

    A block that would cost too much is left out, and the next one is tried; after three of them in a row none is.

    Args:
        candidates: all blocks, in the order of the network.
        ranking: costs of sets of blocks on the images that rank.
        deciding: the same on those that decide.
        limit: of the cost.

    Returns:
        What was decided, in the order of the candidates.
    """
    able = [one for one in candidates if not one.why_not]
    alone = dict(zip((one.path for one in able), ranking([(one.path,) for one in able]) if able else [], strict=True))
    chosen: list[str] = []
    together: dict[str, float] = {}
    refused = 0
    for one in sorted(able, key=lambda one: (alone[one.path], one.spread)):
        trial = together[one.path] = deciding([(*chosen, one.path)])[0]
        refused = 0 if trial <= limit else refused + 1
        if trial <= limit:
            chosen.append(one.path)
        elif refused == _PATIENCE:
            break
    decided = []
    for one in candidates:
        tried, folded, why_not = together.get(one.path), one.path in chosen, one.why_not
        if not folded and not why_not:
            why_not = "not tried: cheaper ones cost too much" if tried is None else "it costs too much"
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
