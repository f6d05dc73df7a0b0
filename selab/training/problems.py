"""What was peculiar among the images that were read; needs no library of images, so that results can hold it."""

from selab.records.types import Frozen

NAMED = 5
"""Files of a kind that are named."""


class Found(Frozen, frozen=True, kw_only=True):
    """How many files have one peculiarity, and the first of them by name, below the data's folder."""

    count: int = 0
    first: tuple[str, ...] = ()


class Problems(Frozen, frozen=True, kw_only=True):
    """What was peculiar among the images that have been read so far; each file counts once.

    Attributes:
        corrupt: cannot be decoded. In evaluation such an image is left out, in training another one of its class
            stands in its place.
        truncated: ends too early; treated like a corrupt one.
        grey: has one channel; converted.
        cmyk: is in print colours; converted.
        other: has a palette, an alpha channel or another colour space; converted.
    """

    corrupt: Found = Found()
    truncated: Found = Found()
    grey: Found = Found()
    cmyk: Found = Found()
    other: Found = Found()

    @property
    def unreadable(self) -> int:
        """How many files could not be used."""
        return self.corrupt.count + self.truncated.count

    @property
    def words(self) -> str:
        """`1 left out (val/cat/7.jpg), 4 grey, 0 CMYK`."""
        names = sorted((*self.corrupt.first, *self.truncated.first))[:NAMED]
        more = f" and {self.unreadable - len(names):,} more" if self.unreadable > len(names) else ""
        named = f" ({', '.join(names)}{more})" if names else ""
        others = f", {self.other.count:,} of other colours" if self.other.count else ""
        return f"{self.unreadable:,} left out{named}, {self.grey.count:,} grey, {self.cmyk.count:,} CMYK{others}"
