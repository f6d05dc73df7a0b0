"""What was seen of the gates of a network, as a record."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean as mean
from typing import TypeVar

import msgspec

from selab._version import __version__
from selab.errors import RecordError
from selab.judging.statistics import BlockGates
from selab.records.display import Displayed
from selab.records.files import read_text
from selab.records.frozen import Frozen
from selab.records.types import decoded, lined_json
from selab.units import counted

SCHEMA = "selab.gates/1"
_R = TypeVar("_R")


class Gates(Displayed, Frozen, frozen=True, kw_only=True):
    """The gates of a network over a set of images.

    Attributes:
        arch: the network.
        weights: of the network, as they were named; empty where it came with them.
        data: the images, in words.
        images: how many.
        classes: the names of the classes, in the order of their numbers; empty without labels.
        blocks: in the order of the network.
        class_means: name → for each block, the mean gate of the class's images; of the classes that were chosen.
    """

    schema: str = SCHEMA
    selab: str = __version__
    arch: str
    weights: str = ""
    data: str
    images: int
    classes: tuple[str, ...] = ()
    blocks: tuple[BlockGates, ...]
    class_means: dict[str, tuple[tuple[float, ...], ...]] = msgspec.field(default_factory=dict)

    def summary(self) -> str:
        """Return one line."""
        blocks = counted(len(self.blocks), "block")
        return f"gates of {self.arch}: {blocks}, over {counted(self.images, 'image')} of {self.data}"

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return ("block", "channels", "mean", "spread", "between_classes", "low", "high", "constant", "dead")

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [
            (
                one.path,
                one.channels,
                mean(one.mean),
                one.spread,
                one.specificity,
                mean(one.low),
                mean(one.high),
                len(one.constant),
                len(one.dead),
            )
            for one in self.blocks
        ]

    def block(self, path: str) -> BlockGates:
        """Return a block by its path.

        Raises:
            RecordError: there is none.
        """
        for one in self.blocks:
            if one.path == path:
                return one
        known = ", ".join(one.path for one in self.blocks)
        raise RecordError(f"{self.arch}: has no gates of {path}; blocks: {known}")


def gates_json(gates: Gates) -> bytes:
    """Return a record as the content of a file."""
    return lined_json(gates)


def read_gates(path: Path) -> Gates:
    """Read a record.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    return read_as(path, Gates, schema=SCHEMA, again="look again with `selab gates`", mistaken=_mistaken)


def read_as(path: Path, kind: type[_R], *, schema: str, again: str, mistaken: Callable[[_R], Iterator[str]]) -> _R:
    """Read a record of trained gates.

    Args:
        path: of the file.
        kind: of the record.
        schema: that it must have.
        again: how to make it anew, for messages.
        mistaken: yields what is impossible in it: field and reason.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    record = decoded(read_text(path).encode(), kind, schema=schema, where=str(path), again=again)
    for wrong in mistaken(record):
        raise RecordError(f"{path}: {wrong}; {again}, or restore the file")
    return record


def _mistaken(record: Gates) -> Iterator[str]:
    if not record.blocks:
        yield "blocks: is empty"
    for place, block in enumerate(record.blocks):
        lists = [block.deviation, block.lowest, block.highest, block.low, block.high]
        lists += [] if block.between is None else [block.between]
        if not block.mean or any(len(one) != block.channels for one in lists):
            yield f"blocks[{place}]: its lists differ in length"
        elif any(low > high for low, high in zip(block.lowest, block.highest, strict=True)):
            yield f"blocks[{place}].lowest: is above highest"
    for name, means in record.class_means.items():
        if [len(one) for one in means] != [one.channels for one in record.blocks]:
            yield f"class_means.{name}: does not fit the blocks"
