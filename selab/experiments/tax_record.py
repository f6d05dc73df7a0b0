"""The frozen types of a comparison of implementations of one block, and their way to and from a file.

Raw quads are the fact. What is computed from them stands beside them, and is held against them on reading, as in
`selab.record`; the control's quads stand once, as those of the baseline against its second instance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from selab.bench.devices import copy_bandwidth
from selab.errors import RecordError
from selab.models.provenance import is_bare
from selab.records.store import Store, read_text, write_atomically
from selab.records.types import Dtype, Frozen, Insertion, Latency, Machine, Phase, Run, Workload, decoded, lined_json
from selab.records.verdict import check

SCHEMA = "selab.tax/1"
FOLDER = "tax"
"""Where a machine's comparisons of implementations lie, beside its profiles."""
BASELINE, AGAIN, PLAIN = "baseline", "again", "plain"
"""The network without SE, fused, its second instance for the control, and the same as it was built, not fused."""
REFERENCE, FAST = "reference", "fast"
IMPLEMENTATIONS = (REFERENCE, "torchvision", "timm", FAST)
WITHOUT = {"squeeze": "without_squeeze", "excitation": "without_excitation", "scale": "without_scale"}
"""Stage → the reference with that stage left out."""
_WORDS = {
    AGAIN: "baseline again (control)",
    PLAIN: "baseline as it is built",
    **{name: f"reference without {stage}" for stage, name in WITHOUT.items()},
}
_ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
ALL = (*IMPLEMENTATIONS, *WITHOUT.values())
BUILT_IN = (REFERENCE, FAST)
"""Where the network brings blocks of its own along: as its library writes them, and fused."""


class TaxPair(Frozen, frozen=True, kw_only=True):
    """Two networks of one interleaved run, by one method.

    Attributes:
        latency: of the variant against the baseline; in a file its controls are left out.
    """

    baseline: str
    variant: str
    latency: Latency


class StageTimes(Frozen, frozen=True, kw_only=True):
    """What the profiler saw in a step of the reference; it costs time itself, more per operator than per byte.

    Attributes:
        total_s: of all operators.
        stages: of each stage of the blocks, or of whole blocks, where a network brings them along.
    """

    total_s: float
    stages: dict[str, float]


class TaxRecord(Frozen, frozen=True, kw_only=True):
    """Several implementations of the same SE blocks in one network, over the same baseline, measured in one run.

    Attributes:
        arch: what `--arch` finds again, as in a profile's record.
        phase: what one call is.
        implementations: those that were asked for, stages left out among them.
        blocks: where they stand; their maps and weights are what must move at least.
        bandwidths: (bytes moved, bytes per second) of copies that were measured in the same run.
        pairs: of every method.
        profiled: None where it was not asked for, or torch.compile has no stages.
        saved_for_backward_bytes: of each network, in training.
        remarks: what was done to the networks, and what was left out, in words.
    """

    schema: str = SCHEMA
    selab: str
    arch: str
    baseline: str
    origin: str
    baseline_origin: str
    facts_hash: str
    created: str
    command: str
    workload: Workload
    phase: Phase
    machine: Machine
    seed: int
    implementations: tuple[str, ...]
    blocks: tuple[Insertion, ...]
    bandwidths: tuple[tuple[int, float], ...]
    pairs: tuple[TaxPair, ...]
    profiled: StageTimes | None
    saved_for_backward_bytes: dict[str, int]
    remarks: tuple[str, ...]

    @property
    def bare(self) -> bool:
        """Whether the baseline is the same network without the blocks that it brings along."""
        return is_bare(self)

    @property
    def methods(self) -> tuple[str, ...]:
        """How it was timed, the headline's way first."""
        return tuple(dict.fromkeys(pair.latency.method for pair in self.pairs))

    def latency(self, variant: str, *, over: str = BASELINE, method: str) -> Latency | None:
        """Of a pair, or None where it was not measured."""
        return next(
            (
                pair.latency
                for pair in self.pairs
                if (pair.baseline, pair.variant, pair.latency.method) == (over, variant, method)
            ),
            None,
        )


def words_of(name: str) -> str:
    """What tables and messages call a network, by its name in a record: `reference without squeeze`."""
    return _WORDS.get(name, name)


def tax_path(out: Path, *, machine: str, arch: str, against: str | None, workload: str, phase: Phase) -> Path:
    """Return `OUT/<machine>/tax/<arch>[-vs-<baseline>].<workload>.<phase>.json`; as `Store.path`."""
    return TAXES.path(out, machine=machine, arch=arch, against=against, parts=[workload, phase])


def save_tax_record(record: TaxRecord, path: Path) -> None:
    """Writes a record whole or not at all.

    Raises:
        RecordError: the folder cannot be written.
    """
    bare = tuple(
        msgspec.structs.replace(pair, latency=msgspec.structs.replace(pair.latency, controls=()))
        for pair in record.pairs
    )
    write_atomically(path, lined_json(msgspec.structs.replace(record, pairs=bare)))


def read_tax_record(path: Path) -> TaxRecord:
    """One record; its latencies are computed again from its raw quads, and their words written anew.

    Raises:
        RecordError: the file is no such record, or its figures are not those of its quads; names the file and field.
    """
    record = decoded(
        read_text(path).encode(), TaxRecord, schema=SCHEMA, where=str(path), again="measure again with `selab tax`"
    )
    try:
        return msgspec.structs.replace(record, pairs=tuple(_checked(record)))
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def read_tax_records(folder: Path) -> list[TaxRecord]:
    """Return every record in a machine's folder, in the order of their names; empty if there is none.

    Raises:
        RecordError: no such folder, the folder above those of machines, or a record that fails its check.
    """
    return TAXES.read_folder(folder, required=False)


TAXES = Store(folder=FOLDER, title="records of `selab tax`", command="selab tax", read=read_tax_record)
"""The comparisons of implementations on disk."""


def controls_of(pairs: tuple[TaxPair, ...], method: str) -> tuple[Run, ...]:
    """The baseline against its second instance."""
    return next((pair.latency.runs for pair in pairs if pair.variant == AGAIN and pair.latency.method == method), ())


def _checked(record: TaxRecord) -> Iterator[TaxPair]:
    for index, pair in enumerate(record.pairs):
        latency = pair.latency
        if latency.phase != record.phase:
            raise RecordError(f"pairs[{index}]: is of {latency.phase}, the record of {record.phase}; restore the file")
        controls = () if latency.error else controls_of(record.pairs, latency.method)
        try:
            whole = check(msgspec.structs.replace(latency, controls=controls))
        except RecordError as error:
            raise RecordError(f"pairs[{index}] ({pair.variant} over {pair.baseline}): {error}") from None
        yield msgspec.structs.replace(pair, latency=whole)


# ----------------------------------------------------------------------------------------------------------- the least
@dataclass(frozen=True, kw_only=True)
class Least:
    """What SE must move beyond what the baseline moves anyway, and what that takes at the bandwidth of copies."""

    bytes: int
    seconds: float


def least(record: TaxRecord) -> Least:
    """Of each block's map y and its layers' weights, at the bandwidth of copies of the same size.

    Inference: y once more, since its mean must be known before it can be scaled (scaling is part of the pass that joins
    y with the shortcut), and the weights. Training: y once more in the forward pass; in the backward pass, beyond what
    the baseline's join moves, y and the gradient dz behind the join read and dy written, since the gate's gradient must
    be known before dy is; the weights read twice and their gradients written.
    """
    maps, weights = (1, 1) if record.phase == "forward" else (4, 3)
    moved, seconds = 0, 0.0
    for block in record.blocks:
        elements = record.workload.batch * block.channels * block.height * block.width
        for times, size in (
            (maps, elements * _ITEM_BYTES[record.workload.dtype]),
            (weights, block.params * _ITEM_BYTES["fp32"]),  # in mixed precision they are kept so
        ):
            moved += times * size
            seconds += times * size / copy_bandwidth(record.bandwidths, size)
    return Least(bytes=moved, seconds=seconds)
