"""Unusual and unreadable images of a folder; imports no image library, so that results can hold them."""

from selab.records.types import Frozen

NAMED = 5
"""How many files of a kind are named."""


class Found(Frozen, frozen=True, kw_only=True):
    """How many files are of one kind, and the first of them by name, relative to the data's folder."""

    count: int = 0
    first: tuple[str, ...] = ()


class Problems(Frozen, frozen=True, kw_only=True):
    """Unusual images among those read so far; each file counts once.

    Attributes:
        corrupt: cannot be decoded. Evaluation leaves such an image out, training replaces it by another of its class.
        truncated: ends too early; treated like a corrupt one.
        grey: has one channel; converted.
        cmyk: has CMYK colours; converted.
        other: has a palette, an alpha channel or another colour space; converted.
    """

    corrupt: Found = Found()
    truncated: Found = Found()
    grey: Found = Found()
    cmyk: Found = Found()
    other: Found = Found()

    @property
    def unreadable(self) -> int:
        """Number of files that could not be used."""
        return self.corrupt.count + self.truncated.count

    @property
    def words(self) -> str:
        """`1 left out (val/cat/7.jpg), 4 grey, 0 CMYK`."""
        names = sorted((*self.corrupt.first, *self.truncated.first))[:NAMED]
        more = f" and {self.unreadable - len(names):,} more" if self.unreadable > len(names) else ""
        named = f" ({', '.join(names)}{more})" if names else ""
        others = f", {self.other.count:,} of other colours" if self.other.count else ""
        return f"{self.unreadable:,} left out{named}, {self.grey.count:,} grey, {self.cmyk.count:,} CMYK{others}"
