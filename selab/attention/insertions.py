"""The result of an insertion, and remarks on it; starts without torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Self

from selab import units
from selab.records.display import Displayed
from selab.records.types import Insertion

# Narrower than this a bottleneck carries little, and kernels do not get faster with it.
_NARROW = 8
_SHOWN = 4


class Insertions(Displayed, tuple[Insertion, ...]):
    """The blocks that `insert_se` inserted, in the order of the network: a tuple that prints well.

    Attributes:
        skipped: sites that were left out, each with the reason; of `auto`, also the ends of blocks that are none.
    """

    skipped: tuple[str, ...]

    def __new__(cls, blocks: Iterable[Insertion] = (), *, skipped: Iterable[str] = ()) -> Self:
        """Return the blocks; `skipped` names sites that were left out."""
        made = super().__new__(cls, blocks)
        made.skipped = tuple(skipped)
        return made

    def summary(self) -> str:
        """Return one line: how many blocks, their parameters and MACs."""
        if not self:
            return "no blocks inserted"
        kinds = ", ".join(f"{units.counted(count, f'{kind} block')}" for kind, count in self._kinds().items())
        params, macs = sum(one.params for one in self), sum(one.macs for one in self)
        left = f"; {_left_out(self.skipped)}" if self.skipped else ""
        return f"{kinds} inserted: +{units.exact(params)} parameters, +{units.exact(macs)} MACs per image{left}"

    def _kinds(self) -> Counter[str]:
        return Counter("SE" if one.block == "se" else one.block for one in self)

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return Insertion.__struct_fields__

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [tuple(getattr(one, name) for name in Insertion.__struct_fields__) for one in self]


def _left_out(skipped: Sequence[str]) -> str:
    more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return f"left out {units.counted(len(skipped), 'site')}: {'; '.join(skipped[:_SHOWN])}{more}"


def insertion_remarks(insertions: Iterable[Insertion]) -> tuple[str, ...]:
    """Return remarks on insertions that are allowed but seldom intended: sites left out, a squeeze width below 8.

    Args:
        insertions: as `insert_se` returns them, or as a record holds them.

    Returns:
        At most two lines, with the sites and what to do.
    """
    left = (_left_out(insertions.skipped),) if isinstance(insertions, Insertions) and insertions.skipped else ()
    narrow = [one for one in insertions if one.squeeze_channels is not None and one.squeeze_channels < _NARROW]
    if not narrow:
        return left
    shown = ", ".join(f"{one.path} ({one.channels} → {one.squeeze_channels})" for one in narrow[:_SHOWN])
    more = f" and {len(narrow) - _SHOWN} more" if len(narrow) > _SHOWN else ""
    return (
        *left,
        f"squeeze width below {_NARROW} at {len(narrow)} of the sites: {shown}{more}; "
        f"use a smaller reduction, or divisor={_NARROW}",
    )
