"""Records of the SE overhead of several implementations: types, reading and writing.

A record keeps the raw samples and the values computed from them, which are checked on reading. The samples of the
control run are stored once, as those of the baseline against its second instance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from selab.bench.devices import copy_bandwidth
from selab.errors import RecordError
from selab.models.provenance import is_bare
from selab.records.consistency import (
    mistaken_insertions,
    mistaken_machine,
    mistaken_runs,
    mistaken_workload,
)
from selab.records.files import read_text, write_atomically
from selab.records.store import OnBroken, Store
from selab.records.types import Dtype, Frozen, Insertion, Latency, Machine, Phase, Run, Workload, decoded, lined_json
from selab.records.verdict import check

SCHEMA = "selab.tax/1"
FOLDER = "tax"
"""Folder of these records, next to a machine's profiles."""
BASELINE, AGAIN, PLAIN = "baseline", "again", "plain"
"""The network without SE, fused; its second instance, for the control run; the same network as built, not fused."""
# "fast" is the stored word; it is shown as "fused".
REFERENCE, FUSED = "reference", "fast"
IMPLEMENTATIONS = (REFERENCE, "torchvision", "timm", FUSED)
WITHOUT = {"squeeze": "without_squeeze", "excitation": "without_excitation", "scale": "without_scale"}
"""Stage → the reference without that stage."""
_WORDS = {
    AGAIN: "baseline again (control)",
    PLAIN: "baseline as it is built",
    FUSED: "fused",
    "late": "late blocks only",
    "as_it_is": "as it is",
    **{name: f"reference without {stage}" for stage, name in WITHOUT.items()},
}
_ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}
ALL = (*IMPLEMENTATIONS, *WITHOUT.values())
LATE, AS_IT_IS = "late", "as_it_is"
"""In another runtime: with the blocks on small maps only; an ONNX file as it is."""
BUILT_IN = (REFERENCE, FUSED)
"""Implementations for a network with built-in SE blocks: as its library wrote them, and fused."""


class TaxPair(Frozen, frozen=True, kw_only=True):
    """Two networks of one interleaved run, timed by one method.

    Attributes:
        latency: of the variant against the baseline; without its controls in a file.
    """

    baseline: str
    variant: str
    latency: Latency


class StageTimes(Frozen, frozen=True, kw_only=True):
    """Profiled times of one step of the reference, in seconds; the profiler adds time to each operator.

    Attributes:
        total_s: all operators.
        stages: each stage of the SE blocks, or whole blocks for a network with built-in ones.
    """

    total_s: float
    stages: dict[str, float]


class TaxRecord(Frozen, frozen=True, kw_only=True):
    """The overhead of several implementations of the same SE blocks, over one baseline, measured in one run.

    Attributes:
        arch: the value of `--arch`, as in a profile.
        phase: what is timed as one call.
        implementations: the requested ones, including those without a stage.
        blocks: the SE blocks; the bandwidth bound follows from their feature maps and weights.
        bandwidths: (bytes moved, bytes per second) of copies, measured in the same run.
        pairs: of every timing method.
        profiled: None if it was not requested, or under torch.compile.
        saved_for_backward_bytes: for each network, in training.
        remarks: how the networks were changed, and what was skipped.
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
        """Return whether the baseline is the same network without its built-in SE blocks."""
        return is_bare(self)

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the timing methods, the main one first."""
        return tuple(dict.fromkeys(pair.latency.method for pair in self.pairs))

    def latency(self, variant: str, *, over: str = BASELINE, method: str) -> Latency | None:
        """Return the latency of one pair; None if it was not measured."""
        return next(
            (
                pair.latency
                for pair in self.pairs
                if (pair.baseline, pair.variant, pair.latency.method) == (over, variant, method)
            ),
            None,
        )


def words_of(name: str) -> str:
    """Return the name of a network in tables and messages, for its name in a record: `reference without squeeze`."""
    return _WORDS.get(name, name)


def tax_path(out: Path, *, machine: str, arch: str, against: str | None, workload: str, phase: Phase) -> Path:
    """Return `OUT/<machine>/tax/<arch>[-vs-<baseline>].<workload>.<phase>.json`; as `Store.path`."""
    return TAXES.path(out, machine=machine, arch=arch, against=against, parts=[workload, phase])


def save_tax_record(record: TaxRecord, path: Path) -> None:
    """Write a record atomically.

    Raises:
        RecordError: the folder is not writable.
    """
    bare = tuple(
        msgspec.structs.replace(pair, latency=msgspec.structs.replace(pair.latency, controls=()))
        for pair in record.pairs
    )
    write_atomically(path, lined_json(msgspec.structs.replace(record, pairs=bare)))


def read_tax_record(path: Path) -> TaxRecord:
    """Read a record, and recompute its latencies from the raw samples.

    Raises:
        RecordError: the file is not such a record, or its values do not follow from its samples; the message names the
            file and the field.
    """
    record = decoded(
        read_text(path).encode(), TaxRecord, schema=SCHEMA, where=str(path), again="measure again with `selab tax`"
    )
    for wrong in _mistaken(record):
        raise RecordError(f"{path}: {wrong}; measure again with `selab tax`, or restore the file")
    try:
        return msgspec.structs.replace(record, pairs=tuple(_checked(record)))
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def read_tax_records(folder: Path, *, on_broken: OnBroken = None) -> list[TaxRecord]:
    """Return every record in a machine's folder, in the order of their names; empty if there is none.

    Args:
        folder: the machine's.
        on_broken: as in `Store.read_folder`.

    Raises:
        RecordError: no such folder, the folder above those of machines, or a record that fails its check.
    """
    return TAXES.read_folder(folder, required=False, on_broken=on_broken)


TAXES = Store(folder=FOLDER, title="records of `selab tax`", command="selab tax", read=read_tax_record)
"""The comparisons of implementations on disk."""


def controls_of(pairs: tuple[TaxPair, ...], method: str) -> tuple[Run, ...]:
    """Return the control runs: the baseline against its second instance."""
    return next((pair.latency.runs for pair in pairs if pair.variant == AGAIN and pair.latency.method == method), ())


def _mistaken(record: TaxRecord) -> Iterator[str]:
    """Yield what is impossible in a record, apart from its latencies' figures: field and reason."""
    yield from mistaken_workload(record.workload)
    yield from mistaken_machine(record.machine)
    yield from mistaken_insertions(record.blocks, "blocks")
    for index, (size, speed) in enumerate(record.bandwidths):
        if size < 1 or not 0 < speed < math.inf:
            yield f"bandwidths[{index}]: is ({size}, {speed!r}), expected bytes and bytes per second above 0"
    for index, pair in enumerate(record.pairs):
        yield from mistaken_runs(pair.latency, f"pairs[{index}].latency")
    for name, value in record.saved_for_backward_bytes.items():
        if value < 0:
            yield f"saved_for_backward_bytes.{name}: is {value}, expected 0 or more"
    if record.profiled is not None:
        times = {"total_s": record.profiled.total_s, **record.profiled.stages}
        for name, seconds in times.items():
            if not 0 <= seconds < math.inf:
                yield f"profiled.{name}: is {seconds!r}, expected 0 or more seconds"
        stages = math.fsum(record.profiled.stages.values())
        if stages > record.profiled.total_s * (1 + 1e-6):
            yield f"profiled: its stages take {stages!r} s together, all operators {record.profiled.total_s!r} s"


def _checked(record: TaxRecord) -> Iterator[TaxPair]:
    for index, pair in enumerate(record.pairs):
        latency = pair.latency
        if latency.phase != record.phase:
            raise RecordError(f"pairs[{index}]: phase {latency.phase} in a record of {record.phase}; restore the file")
        controls = () if latency.error else controls_of(record.pairs, latency.method)
        try:
            whole = check(msgspec.structs.replace(latency, controls=controls))
        except RecordError as error:
            raise RecordError(f"pairs[{index}] ({pair.variant} over {pair.baseline}): {error}") from None
        yield msgspec.structs.replace(pair, latency=whole)


# ----------------------------------------------------------------------------------------------------------- the least
@dataclass(frozen=True, kw_only=True)
class Least:
    """The bandwidth bound: bytes that SE must move in addition to the baseline, and their time in seconds."""

    bytes: int
    seconds: float


def least(record: TaxRecord) -> Least:
    """Return the bandwidth bound of each block's feature map y and weights, at the measured bandwidth of copies.

    Inference: y is read once more, since scaling needs its mean first (scaling itself is part of the pass that adds the
    shortcut), and the weights. Training: y once more in the forward pass. In the backward pass, in addition to the
    baseline's traffic, y and the gradient dz after the join are read and dy is written, since dy needs the gate's
    gradient first; the weights are read twice and their gradients written.
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
