"""What was folded and what it cost, as a record."""

import math
from collections.abc import Iterator
from pathlib import Path

from selab._version import __version__
from selab.judging.choose import Choice
from selab.judging.loss import Loss
from selab.judging.record import read_as
from selab.records.display import Displayed
from selab.records.frozen import Frozen
from selab.records.store import Store
from selab.records.types import Latency, lined_json
from selab.units import counted

SCHEMA = "selab.folding/1"


class Size(Frozen, frozen=True, kw_only=True):
    """The size of a network, or of a part of it.

    Attributes:
        params: their number.
        macs: of all operators, for one image.
        bytes: of memory traffic, for one image.
    """

    params: int
    macs: int
    bytes: int


class Dead(Frozen, frozen=True, kw_only=True):
    """Channels of a block whose factor is always about zero.

    Attributes:
        path: of the block.
        channels: their numbers.
        macs: of one image, with which the convolution before the block makes them; None where that is not known.
        pruned: whether they were taken out.
        why_not: why they were not; empty if they were, or if nobody asked.
    """

    path: str
    channels: tuple[int, ...]
    macs: int | None = None
    pruned: bool = False
    why_not: str = ""


class Finetuned(Frozen, frozen=True, kw_only=True):
    """A folded network that was trained further.

    Attributes:
        epochs: of training.
        recipe: that it was trained by.
        lr: the learning rate that it began with.
        loss: of accuracy, against the network as it was and trained likewise.
        alone: what that training does to the network as it was.
        seconds: of both trainings.
    """

    epochs: int
    recipe: str
    lr: float
    loss: Loss
    alone: Loss
    seconds: float


class Folding(Displayed, Frozen, frozen=True, kw_only=True):
    """Blocks that became constants in other weights.

    Attributes:
        arch: the network.
        weights: of the network, as they were named; empty where it came with them.
        data: the images, in words.
        chosen_on: images that decided which blocks; the others reported.
        reported_on: images that the figures below are of.
        limit: of the cost, in `unit`.
        unit: `points` of accuracy, or `of the largest output`.
        choices: what was decided about each block, in the order of the network.
        loss: of accuracy; None without labels.
        error: the largest difference of an output, over the network's largest output.
        before: size of the network as it was.
        after: size of the folded network.
        latency: of the folded network over the one before, forward; None if it was not measured.
        runtime: that ran both, one image on one thread; `machine` is where.
        gate: that the gates of the blocks that are left were converted to; empty for their own.
        gate_error: the largest difference of an output that this conversion alone makes, over the largest output.
        gate_loss: of accuracy, by this conversion alone; None without labels.
        finetuned: what training the folded network further did; None if it was not.
        files: what was written, in the same folder.
    """

    schema: str = SCHEMA
    selab: str = __version__
    arch: str
    weights: str = ""
    data: str
    chosen_on: int
    reported_on: int
    limit: float
    unit: str
    choices: tuple[Choice, ...]
    dead: tuple[Dead, ...] = ()
    loss: Loss | None = None
    error: float
    before: Size | None = None
    after: Size | None = None
    latency: Latency | None = None
    runtime: str = ""
    machine: str = ""
    gate: str = ""
    gate_error: float | None = None
    gate_loss: Loss | None = None
    finetuned: Finetuned | None = None
    files: tuple[str, ...] = ()

    @property
    def folded(self) -> tuple[str, ...]:
        """The paths of the blocks that became constants."""
        return tuple(one.path for one in self.choices if one.folded)

    @property
    def is_vague(self) -> bool:
        """Whether so few images reported that they cannot show that a limit of points is kept."""
        loss = self.loss
        return loss is not None and self.unit == POINTS and (loss.high - loss.low) / 2 > self.limit

    def summary(self) -> str:
        """Return one line."""
        return (
            f"{self.arch}: {len(self.folded)} of {counted(len(self.choices), 'block')} folded at {self.limit:g} "
            f"{self.unit}; {self.cost:.2g} on the {counted(self.reported_on, 'image')} that did not decide"
        )

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return ("block", "spread", "alone", "together", "folded", "where_or_why_not")

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [
            (one.path, one.spread, one.alone, one.together, one.folded, one.where or one.why_not)
            for one in self.choices
        ]

    @property
    def changes(self) -> bool:
        """Whether the network is another one: something was folded, converted or taken out."""
        return bool(self.folded or self.gate or any(one.pruned for one in self.dead))

    @property
    def cost(self) -> float:
        """What folding costs on the images that did not decide, in `unit`."""
        return self.error if self.loss is None or self.unit != POINTS else self.loss.points


POINTS, OF_OUTPUT = "points", "of the largest output"


FOLDER = "folding"


def folding_json(folding: Folding) -> bytes:
    """Return a record as the content of a file."""
    return lined_json(folding)


def read_folding(path: Path) -> Folding:
    """Read a record.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    return read_as(path, Folding, schema=SCHEMA, again="fold again with `selab fold`", mistaken=_mistaken)


def _mistaken(record: Folding) -> Iterator[str]:
    if not record.choices:
        yield "choices: is empty"
    if min(record.chosen_on, record.reported_on) < 1:
        yield "chosen_on, reported_on: expected 1 image or more"
    for place, one in enumerate(record.choices):
        if one.folded == bool(one.why_not):
            yield f"choices[{place}]: is {'folded, and has a reason against it' if one.folded else 'not folded'}"
    if not 0 <= record.error < math.inf:
        yield f"error: is {record.error!r}, expected 0 or more"


FOLDINGS: Store[Folding] = Store(folder=FOLDER, title="foldings", command="selab fold", read=read_folding)
