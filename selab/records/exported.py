"""Networks as they were written for another runtime: sizes, what its compiler made of them, how close they are."""

import math
from collections.abc import Iterator

import msgspec

from selab.records.frozen import Frozen


class Partitions(Frozen, frozen=True, kw_only=True):
    """What a runtime's compiler made of a network.

    Attributes:
        subgraphs: parts that a delegate runs as a whole; one is best. None for a runtime without delegates.
        outside: operator → calls that no delegate runs.
        reorders: changes of the memory layout between operators. None where the runtime does not tell.
        operators: kind → calls of what runs, in the runtime's words.
    """

    subgraphs: int | None = None
    outside: dict[str, int] = msgspec.field(default_factory=dict)
    reorders: int | None = None
    operators: dict[str, int] = msgspec.field(default_factory=dict)


class ExportedFile(Frozen, frozen=True, kw_only=True):
    """One network in a runtime.

    Attributes:
        bytes: of the file, and of the weights beside it.
        partitions: what the runtime's compiler makes of it.
    """

    bytes: int
    partitions: Partitions


class Agreement(Frozen, frozen=True, kw_only=True):
    """How close the outputs of an exported network are to those of the network itself in fp32.

    Attributes:
        max_absolute: the largest difference of an output element.
        max_relative: the same over the largest element of that output of the network itself.
        same_top_1: share of the inputs whose largest class is the same; None where the output is no (N, classes).
        inputs: what both were run on, in words.
    """

    max_absolute: float
    max_relative: float
    same_top_1: float | None
    inputs: str


class Exported(Frozen, frozen=True, kw_only=True):
    """A network and its baseline as they were written.

    Attributes:
        spelling: of the SE blocks; empty for an ONNX network, whose blocks stay as they are.
        blocks: how many were written so; `left` of other kinds stay in the operators that they are written in.
        without_blocks: the baseline; None where there is none.
        agreement: of the network with blocks.
    """

    spelling: str
    blocks: int
    with_blocks: ExportedFile
    without_blocks: ExportedFile | None
    agreement: Agreement
    left: int = 0


def mistaken_exported(exported: Exported, where: str) -> Iterator[str]:
    """Yield what is impossible in what was written: field and reason."""
    for name in ("blocks", "left"):
        if getattr(exported, name) < 0:
            yield f"{where}.{name}: is {getattr(exported, name)}, expected 0 or more"
    for name in ("with_blocks", "without_blocks"):
        file: ExportedFile | None = getattr(exported, name)
        if file is None:
            continue
        if file.bytes < 1:
            yield f"{where}.{name}.bytes: is {file.bytes}, expected 1 or more"
        counts = {**file.partitions.outside, **file.partitions.operators}
        for operator, calls in counts.items():
            if calls < 0:
                yield f"{where}.{name}.partitions: has {calls} calls of {operator}, expected 0 or more"
        for field in ("subgraphs", "reorders"):
            value = getattr(file.partitions, field)
            if value is not None and value < 0:
                yield f"{where}.{name}.partitions.{field}: is {value}, expected 0 or more"
    found = exported.agreement
    for field in ("max_absolute", "max_relative"):
        value = getattr(found, field)
        if not 0 <= value < math.inf:
            yield f"{where}.agreement.{field}: is {value!r}, expected 0 or more"
    if found.same_top_1 is not None and not 0 <= found.same_top_1 <= 1:
        yield f"{where}.agreement.same_top_1: is {found.same_top_1!r}, expected a share from 0 to 1"
