"""Records on disk: where they go, written whole or not at all, read back and held against their own samples."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from selab.errors import RecordError
from selab.records.acceptance import Acceptance, CountingTime, LiveAcceptance, LoadingTime, RoofDistances
from selab.records.types import Latency, Record, from_json, to_json
from selab.records.verdict import check

_NAME_BYTES = 120
_K = TypeVar("_K", bound=str)
_T = TypeVar("_T")


def record_path(out: Path, *, machine: str, arch: str, against: str | None, workload: str) -> Path:
    """`OUT/<machine>/<arch>[-vs-<baseline>].<workload>.json`; the baseline is named if it is not the variant's own."""
    other = "" if against is None else f"-vs-{against}"
    return out / machine / f"{file_name(arch + other)}.{workload}.json"


def file_name(arch: str) -> str:
    """An architecture's name as the name of a file: `timm:resnet50+sites=layer*.*.bn3` has no place in one.

    Of a long name, as of one with a site for each block, the beginning stays, and a hash of all of it; file systems
    take 255 bytes, and what follows the name needs its share.
    """
    name = re.sub(r"[^\w.+=,-]", "-", arch).lstrip("-.")
    if len(name.encode()) <= _NAME_BYTES:
        return name
    beginning = name.encode()[:_NAME_BYTES].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(arch.encode()).hexdigest()[:8]}"


def partial_path(path: Path) -> Path:
    """Where an interrupted profile is kept."""
    return path.with_suffix(".partial.json")


def failed_path(path: Path) -> Path:
    """Where it is kept that a record could not be made."""
    return path.with_suffix(".failed.json")


def check_writable(path: Path, *, replace: bool) -> None:
    """Finds out beforehand whether a file can be written; creates nothing.

    Raises:
        RecordError: it exists and may not be replaced, or its folder cannot be written.
    """
    if path.is_dir():
        raise RecordError(f"{path}: cannot be written: is a folder; name a file in it")
    if path.exists() and not replace:
        raise RecordError(f"{path}: exists; give --replace to write over it, or name another folder with --out")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecordError(f"{path.parent}: cannot be written: {error.strerror}; name a folder that can") from None


def save(record: Record, path: Path) -> None:
    """Writes a record; a complete one takes the place of what an interruption left.

    Raises:
        RecordError: the folder cannot be written.
    """
    write_atomically(path, to_json(record))
    if record.complete:
        with suppress(OSError):
            partial_path(path).unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one.

    Raises:
        RecordError: the folder cannot be written, or is full.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside the target to write to, which takes the target's place at the end.

    Raises:
        RecordError: the folder cannot be written, or is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix, delete=False
        ) as file:
            temporary = Path(file.name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror}; the file is as it was") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecordError(f"{path}: cannot be read: {reason}") from None


def read_records(folder: Path) -> list[Record]:
    """All records in a machine's folder, each checked as by `read_record`; interrupted and failed ones are left out.

    Raises:
        RecordError: no such folder, no record in it, or one that cannot be trusted.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder}: is no folder; name the folder of one machine's records")
    paths = [
        path for path in sorted(folder.glob("*.json")) if not path.name.endswith((".partial.json", ".failed.json"))
    ]
    if not paths:
        below = sorted({path.parent.name for path in folder.glob("*/*.json")})
        hint = f"; there are some in its folders {', '.join(below)}" if below else "; measure with `selab profile`"
        raise RecordError(f"{folder}: holds no records{hint}")
    return [read_record(path) for path in paths]


def read_record(path: Path) -> Record:
    """One record; its latencies are computed again from its raw samples, and their words written anew.

    Raises:
        RecordError: the file is no record, or its figures are not those of its samples; names the file and the field.
    """
    record = from_json(read_text(path).encode(), where=str(path))
    try:
        return msgspec.structs.replace(
            record,
            latency=_checked(record.latency),
            latency_all_cores=_checked(record.latency_all_cores),
            gpu_methods={phase: _checked_methods(methods) for phase, methods in record.gpu_methods.items()},
        )
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def read_acceptance(folder: Path) -> Acceptance:
    """What the nox sessions that time selab itself left in a machine's folder; nothing where they were not run.

    Raises:
        RecordError: a file is not what it should be.
    """

    def read(name: str, kind: type[_T]) -> _T | None:
        path = folder / "acceptance" / name
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(read_text(path), type=kind)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise RecordError(f"{path}: {error}; measure again") from None

    counting = [read(name, CountingTime) for name in ("counts.json", "tables.json")]
    return Acceptance(
        live=read("aa.json", LiveAcceptance),
        counting=tuple(one for one in counting if one is not None),
        loading=read("data.json", LoadingTime),
        roof=read("roofline.json", RoofDistances),
    )


def _checked(latencies: Mapping[_K, Latency]) -> dict[_K, Latency]:
    for phase, latency in latencies.items():
        if phase != latency.phase:
            raise RecordError(f"latency.{phase}: holds a latency of {latency.phase}; restore the file or measure again")
    return {phase: check(latency) for phase, latency in latencies.items()}


def _checked_methods(methods: Mapping[str, Latency]) -> dict[str, Latency]:
    return {method: check(latency) for method, latency in methods.items()}
