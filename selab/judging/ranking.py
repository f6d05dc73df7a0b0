"""What each block is worth and what it costs, as a record."""

import math
from collections.abc import Iterator
from pathlib import Path

from selab._version import __version__
from selab.judging.loss import Loss
from selab.judging.record import read_as
from selab.records.frozen import Frozen
from selab.records.types import Latency, lined_json

SCHEMA = "selab.blocks/1"


class BlockWorth(Frozen, frozen=True, kw_only=True):
    """A block: what is lost without its gate, and what is saved without it.

    Attributes:
        path: of the block.
        channels: of its map.
        spread: of its gates over the images.
        loss_mean: accuracy that is lost when its gate is its mean; None without labels.
        loss_one: the same when its gate is one.
        error_mean: the largest change of an output when its gate is its mean, over the network's largest output.
        error_one: the same when its gate is one.
        params: of the block.
        macs: of the block, for one image.
        bytes: of memory traffic of the block, for one image.
        latency: time of the network without the block over the network with all, forward; None if not measured.
    """

    path: str
    channels: int
    spread: float
    loss_mean: Loss | None
    loss_one: Loss | None
    error_mean: float
    error_one: float
    params: int
    macs: int
    bytes: int
    latency: Latency | None = None

    @property
    def worth(self) -> float:
        """What is lost without its gate: points where there are labels, else the change of an output."""
        return self.error_mean if self.loss_mean is None else self.loss_mean.points

    @property
    def saved(self) -> float | None:
        """The share of the network's time that is saved without it; None where it was not measured."""
        return None if self.latency is None or self.latency.ratio is None else 1 - self.latency.ratio

    @property
    def is_hidden(self) -> bool:
        """Whether its time was measured, and noise hides it."""
        return self.latency is not None and self.latency.verdict_kind not in ("slower", "faster")


class Ranking(Frozen, frozen=True, kw_only=True):
    """The blocks of a network.

    Attributes:
        arch: the network.
        weights: as they were named; empty where they came with it.
        data: the images, in words.
        images: how many.
        blocks: in the order of the network.
        runtime: that timed them; empty if none did.
        machine: where they were timed.
        threads: that they were timed with.
        remarks: what must be known of the times.
    """

    schema: str = SCHEMA
    selab: str = __version__
    arch: str
    weights: str = ""
    data: str
    images: int
    blocks: tuple[BlockWorth, ...]
    runtime: str = ""
    machine: str = ""
    threads: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def front(self) -> frozenset[str]:
        """The Pareto front: of none is another one worth less, and costs more. By bytes where there are no times.

        A time that is hidden in noise is no price, and its block is not on the front.
        """
        prices = {one.path: one.saved if one.saved is not None else float(one.bytes) for one in self.blocks}
        return frozenset(
            one.path
            for one in self.blocks
            if not one.is_hidden
            and not any(
                other.worth <= one.worth
                and prices[other.path] >= prices[one.path]
                and (other.worth, prices[other.path]) != (one.worth, prices[one.path])
                for other in self.blocks
            )
        )


def ranking_json(ranking: Ranking) -> bytes:
    """Return a record as the content of a file."""
    return lined_json(ranking)


def read_ranking(path: Path) -> Ranking:
    """Read a record.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    return read_as(path, Ranking, schema=SCHEMA, again="judge again with `selab blocks`", mistaken=_mistaken)


def _mistaken(record: Ranking) -> Iterator[str]:
    if not record.blocks:
        yield "blocks: is empty"
    for place, one in enumerate(record.blocks):
        if not (0 <= one.error_mean < math.inf and 0 <= one.error_one < math.inf):
            yield f"blocks[{place}]: a change of an output is no number from 0 on"
