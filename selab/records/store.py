"""Records on disk: their paths, and reading with a check against their own samples.

There are four families of records, each with a `Store`: profiles, comparisons of trained networks, comparisons of
implementations, and imported timings. All of a machine or device lie in its folder.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from selab.errors import RecordError
from selab.records.acceptance import (
    Acceptance,
    CountingTime,
    KernelBandwidth,
    LiveAcceptance,
    LoadingTime,
    RoofDistances,
    mistaken_acceptance,
)
from selab.records.bounds import json_fault
from selab.records.consistency import mistaken_record
from selab.records.files import files_ending, read_text, write_atomically
from selab.records.types import PHASES, Latency, Memory, Phase, Record, from_json, to_json
from selab.records.verdict import check

_NAME_BYTES = 120
NO_MACHINES = (
    *("accuracy", "tax", "acceptance", "timeline", "imported", "folding", "placements", "gates"),
    *("runs", "equal-time", "tuning"),
)
"""Names of folders that are no machine's: those of one machine's records, and those beside the machines'."""
_PARTIAL, _FAILED = ".partial.json", ".failed.json"
OnBroken = Callable[[RecordError], None] | None
"""What is done with the error of a broken file; None to raise it."""
_K = TypeVar("_K", bound=str)
_R = TypeVar("_R")
_T = TypeVar("_T")
_A = TypeVar("_A", LiveAcceptance, CountingTime, LoadingTime, RoofDistances, KernelBandwidth)


@dataclass(frozen=True, kw_only=True)
class Store(Generic[_R]):
    """One family of records on disk.

    Attributes:
        folder: below a machine's folder; empty for the machine's folder itself.
        title: the records in messages, as a plural: `comparisons`.
        command: makes a record.
        read: reads one file.
    """

    folder: str
    title: str
    command: str
    read: Callable[[Path], _R]

    def path(self, out: Path, *, machine: str, arch: str, against: str | None, parts: Sequence[str]) -> Path:
        """Return `OUT/<machine>/[<folder>/]<arch>[-vs-<baseline>].<part>.<part>.json`.

        Args:
            out: the folder of all machines.
            machine: its name.
            arch: the variant.
            against: the baseline; None if it is the variant's own.
            parts: what else distinguishes the record: the workload, the phase, the data, the recipe.
        """
        name = file_name(arch if against is None else f"{arch}-vs-{against}")
        return out / machine / self.folder / ".".join([name, *parts, "json"])

    def files(self, folder: Path, *, partial: bool = False) -> list[Path]:
        """Return the files of a machine's complete records in the order of their names.

        Args:
            folder: the machine's.
            partial: include what an interruption left, where there is no complete record of the same name.
        """
        found = files_ending(folder / self.folder, ".json")
        complete = [path for path in found if not path.name.endswith((_PARTIAL, _FAILED))]
        left = [path for path in found if path.name.endswith(_PARTIAL)] if partial else []
        return sorted([*complete, *(path for path in left if path not in map(partial_path, complete))])

    def read_folder(
        self, folder: Path, *, partial: bool = False, required: bool = True, on_broken: OnBroken = None
    ) -> list[_R]:
        """Return the records of one machine, in the order of their files' names.

        Args:
            folder: the machine's.
            partial: as in `files`.
            required: raise where there is none; otherwise only where the folders below hold some.
            on_broken: called with the error of each file that fails its check, which is then left out. By default the
                first such error is raised.

        Raises:
            RecordError: no such folder, no record in it, or one that fails its check; with `on_broken`, only if none of
                several required records can be read.
        """
        if not folder.is_dir():
            raise RecordError(f"{folder}: not a folder; name the folder of one machine's records")
        paths = self.files(folder, partial=partial)
        others = [each for each in folder.iterdir() if each.is_dir() and each.name not in NO_MACHINES]
        below = [] if paths else sorted(each.name for each in others if self.files(each))
        if below:
            raise RecordError(f"{folder}: contains no {self.title}; its subfolders do: {', '.join(below)}; name one")
        if required and not paths:
            raise RecordError(f"{folder}: contains no {self.title}; make some with `{self.command}`")
        if on_broken is None:
            return [self.read(path) for path in paths]
        records, broken = [], []
        for path in paths:
            try:
                records.append(self.read(path))
            except RecordError as error:
                broken.append(error)
        if required and not records:
            more = f"; {len(broken) - 1} more of {folder} cannot be read either" if broken[1:] else ""
            raise RecordError(f"{broken[0]}{more}") from None
        for one in broken:
            on_broken(one)
        return records

    def read_folders(self, folders: Iterable[Path], *, partial: bool = False, required: bool = True) -> list[_R]:
        """Return the records of several machines, folder by folder; a folder that is named twice is read once.

        Raises:
            RecordError: as `read_folder`.
        """
        chosen = {folder.resolve(): folder for folder in folders}
        return [
            record
            for folder in chosen.values()
            for record in self.read_folder(folder, partial=partial, required=required)
        ]


def record_path(out: Path, *, machine: str, arch: str, against: str | None, workload: str) -> Path:
    """Return `OUT/<machine>/<arch>[-vs-<baseline>].<workload>.json`, the path of a profile."""
    return PROFILES.path(out, machine=machine, arch=arch, against=against, parts=[workload])


def file_name(arch: str) -> str:
    """Return an architecture's name as a file name: `timm:resnet50+sites=layer*.*.bn3` contains reserved characters.

    A long name is cut and ends in a hash of the whole; file systems allow 255 bytes, and the suffix needs its share.
    """
    name = re.sub(r"[^\w.+=,-]", "-", arch).lstrip("-.")
    if len(name.encode()) <= _NAME_BYTES:
        return name
    beginning = name.encode()[:_NAME_BYTES].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(arch.encode()).hexdigest()[:8]}"


def partial_path(path: Path) -> Path:
    """Return the path of an interrupted record."""
    return path.with_suffix(_PARTIAL)


def failed_path(path: Path) -> Path:
    """Return the path of the note that a record could not be made."""
    return path.with_suffix(_FAILED)


def save(record: Record, path: Path) -> None:
    """Write a record; a complete one replaces what an interruption left.

    Raises:
        RecordError: the folder cannot be written.
    """
    write_atomically(path, to_json(record))
    if record.complete:
        with suppress(OSError):
            partial_path(path).unlink()


def read_records(folder: Path, *, partial: bool = False, on_broken: OnBroken = None) -> list[Record]:
    """Return all profiles in a machine's folder, each checked as by `read_record`.

    Profiles of single phases are joined: one network under one workload is one record, and each phase is the newest.

    Args:
        folder: the machine's.
        partial: include interrupted ones, where there is no complete profile of the same name.
        on_broken: as in `Store.read_folder`.

    Raises:
        RecordError: no such folder, no record in it, or one that fails its check.
    """
    return join_phases(PROFILES.read_folder(folder, partial=partial, on_broken=on_broken))


def join_phases(records: Sequence[Record]) -> list[Record]:
    """Join the records of single phases of one network, workload, machine and torch.

    Returns:
        One record for each, in the order of the first of them. It is the one with the most phases, with every phase
        from the newest record that has it, and complete only if all of them are.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for one in records:
        place = (one.machine.name, one.machine.libraries.get("torch"))
        networks = (one.arch, one.origin, one.baseline, one.baseline_origin, one.facts_hash)
        groups.setdefault((one.kind, *place, *networks, one.workload), []).append(one)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(records: Sequence[Record]) -> Record:
    newest_last = sorted(records, key=lambda one: one.created)
    largest = max(newest_last, key=lambda one: len(one.latency))
    memories = [[getattr(one, name) for one in newest_last] for name in ("memory", "baseline_memory")]
    return msgspec.structs.replace(
        largest,
        latency=_in_order([one.latency for one in newest_last]),
        latency_all_cores=_in_order([one.latency_all_cores for one in newest_last]),
        gpu_methods=_in_order([one.gpu_methods for one in newest_last]),
        energy=_in_order([one.energy for one in newest_last]),
        memory=_filled(largest.memory, memories[0]),
        baseline_memory=_filled(largest.baseline_memory, memories[1]),
        complete=all(one.complete for one in records),
    )


def _in_order(phases: Sequence[Mapping[Phase, _T]]) -> dict[Phase, _T]:
    every = {phase: value for one in phases for phase, value in one.items()}
    return {phase: every[phase] for phase in PHASES if phase in every}


def _filled(memory: Memory | None, others: Sequence[Memory | None]) -> Memory | None:
    """Memory with what it lacks from others, the newest first."""
    for other in reversed(others):
        if memory is None:
            memory = other
        elif other is not None:
            missing = {name for name in Memory.__struct_fields__ if getattr(memory, name) is None}
            memory = msgspec.structs.replace(memory, **{name: getattr(other, name) for name in missing})
    return memory


def read_record(path: Path) -> Record:
    """Return one profile, complete or partial; its latencies and their words are computed again from its raw samples.

    Raises:
        RecordError: the file is not a record, or its figures disagree with its samples; names the file and the field.
    """
    record = from_json(read_text(path).encode(), where=str(path))
    for wrong in mistaken_record(record):
        raise RecordError(f"{path}: {wrong}; measure again or restore the file")
    try:
        return msgspec.structs.replace(
            record,
            latency=_checked(record.latency),
            latency_all_cores=_checked(record.latency_all_cores),
            gpu_methods={phase: _checked_methods(methods) for phase, methods in record.gpu_methods.items()},
        )
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def read_acceptance(folder: Path, *, on_broken: OnBroken = None) -> Acceptance:
    """Return the results of the nox sessions that time selab itself; empty where they were not run.

    Args:
        folder: the machine's.
        on_broken: as in `Store.read_folder`.

    Raises:
        RecordError: a file is malformed.
    """

    def read(name: str, kind: type[_A]) -> _A | None:
        path = folder / "acceptance" / name
        try:
            return _acceptance_of(path, kind) if path.exists() else None
        except RecordError as error:
            if on_broken is None:
                raise
            on_broken(error)
            return None

    counting = [read(name, CountingTime) for name in ("counts.json", "tables.json")]
    return Acceptance(
        live=read("aa.json", LiveAcceptance),
        counting=tuple(one for one in counting if one is not None),
        loading=read("data.json", LoadingTime),
        roof=read("roofline.json", RoofDistances),
        kernels=read("kernels.json", KernelBandwidth),
    )


def _acceptance_of(path: Path, kind: type[_A]) -> _A:
    text = read_text(path)
    try:
        found = msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise RecordError(f"{path}: {json_fault(text, error)}; measure again") from None
    for wrong in mistaken_acceptance(found):
        raise RecordError(f"{path}: {wrong}; measure again, or restore the file")
    return found


def _checked(latencies: Mapping[_K, Latency]) -> dict[_K, Latency]:
    for phase, latency in latencies.items():
        if phase != latency.phase:
            raise RecordError(f"latency.{phase}: holds a latency of {latency.phase}; restore the file or measure again")
    return {phase: check(latency) for phase, latency in latencies.items()}


def _checked_methods(methods: Mapping[str, Latency]) -> dict[str, Latency]:
    return {method: check(latency) for method, latency in methods.items()}


PROFILES = Store(folder="", title="profiles", command="selab profile", read=read_record)
"""What `selab profile` writes; the other stores are `selab.training.record.ACCURACIES`,
`selab.experiments.tax_record.TAXES` and `selab.records.imported.IMPORTED`."""
