"""One training on disk: the request, the progress, the result. Every file is written whole or not at all.

run.json             the request; a folder belongs to one request
checkpoint.pt        the state that a training resumes from
epochs.jsonl         one line per epoch
tensorboard/         the same as curves; both are rewritten from the checkpoint when a training resumes
weights.safetensors  the weights at the end
training.json        the result; written last, so its presence means that the training is finished
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from selab._version import __version__
from selab.errors import SelabError
from selab.models.checkpoint import read_state
from selab.models.spec import Variant
from selab.records.bounds import json_fault
from selab.records.files import read_text, write_atomically
from selab.records.types import Frozen
from selab.training.data import Data
from selab.training.problems import Problems
from selab.training.recipe import LATER, TELLING, Recipe, adapted
from selab.training.record import (
    Accuracy,
    DataSpec,
    Epoch,
    Options,
    mistaken_accuracy,
    mistaken_end,
    mistaken_epochs,
)

_CHECKPOINT_SCHEMA = "selab.checkpoint/1"
# These change how long a training takes and how sums are rounded, or are part of the adapted recipe: they do not make
# another request.
_NEUTRAL_OPTIONS = ("epochs", "batch", "threads", "fused", "checkpoint_s")
_T = TypeVar("_T")


class TrainingError(SelabError):
    """A training cannot start or continue; the message says how far it was and what is saved."""


class TrainingStoppedError(TrainingError):
    """A training was interrupted after saving; the same call resumes it."""


class DivergedError(TrainingError):
    """A training has diverged: a result of the recipe on this network, which the same call would repeat."""


class RunConfig(Frozen, frozen=True, kw_only=True):
    """Everything that decides a training's result.

    Attributes:
        facts_hash: of the variant as named; the data's classes and image size are set when it is built.
        recipe: as run, with the epochs and the batch of the options.
        start_sha256: of the weights that it starts from; empty for random ones.
    """

    arch: str
    facts_hash: str
    recipe: Recipe
    data: DataSpec
    seed: int
    options: Options
    start_sha256: str = ""


def run_config(
    variant: Variant, data: Data, recipe: Recipe, *, seed: int, options: Options, weights: Path | None = None
) -> RunConfig:
    """Return the request of a training, with the epochs and the batch of the options.

    Raises:
        WeightsError: the weights that it starts from cannot be read.
    """
    return RunConfig(
        arch=variant.name,
        facts_hash=variant.facts_hash,
        recipe=adapted(recipe, epochs=options.epochs, batch=options.batch),
        data=msgspec.convert(data, DataSpec, from_attributes=True),
        seed=seed,
        options=options,
        start_sha256="" if weights is None else start_of(weights),
    )


def start_of(weights: Path) -> str:
    """Return a hash over a file's tensors: another file with the same ones may differ, for headers have no fixed order.

    Raises:
        WeightsError: it cannot be read.
    """
    status = weights.stat() if weights.is_file() else None
    return _start_of(weights, None if status is None else (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _start_of(weights: Path, _version: tuple[int, int] | None) -> str:
    """Return `start_of`, read once: a comparison asks for it with every training."""
    state = read_state(weights)
    found = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        found.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Training(Frozen, frozen=True, kw_only=True):
    """A finished training.

    Attributes:
        arch: the variant's name.
        facts_hash: of the variant as named.
        recipe: as run, with the epochs and the batch of the options.
        data_title: for tables.
        data_sha256: which images.
        epochs: in order.
        test: of the saved weights, on all test images.
        seconds: of the whole training, with evaluations, without interruptions.
        weights: the path of the safetensors file.
        world: processes at the end.
        torch: its version at the end.
        problems: unusual images among those read since the training last resumed; None for images in memory.
        start_sha256: of the weights that it started from; empty for random ones.
    """

    arch: str
    facts_hash: str
    recipe: Recipe
    data: str
    data_title: str
    data_sha256: str
    seed: int
    options: Options
    epochs: tuple[Epoch, ...]
    test: Accuracy
    seconds: float
    weights: str
    world: int
    torch: str
    selab: str
    problems: Problems | None = None
    start_sha256: str = ""


class Checkpoint(Frozen, frozen=True, kw_only=True):
    """The progress of a training, without its tensors.

    Attributes:
        epoch: the running one, from 0.
        step: finished steps of that epoch.
        sums: of that epoch, by rank: its share of the losses, and its right answers.
        epoch_s: seconds of training in that epoch so far.
        seconds: of the whole training.
        epochs: the finished ones.
        test: the last evaluation.
    """

    epoch: int
    step: int
    sums: tuple[tuple[float, float], ...]
    epoch_s: float
    seconds: float
    epochs: tuple[Epoch, ...]
    test: Accuracy | None


class RunFolder:
    """A training's folder, held by one process at a time; see `opened`.

    Args:
        path: of the folder.
        config: the request that it belongs to.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.weights = path / "weights.safetensors"
        self.tensorboard = path / "tensorboard"
        self.checkpoint = path / "checkpoint.pt"
        self._training = path / "training.json"
        self._epochs = path / "epochs.jsonl"

    def training(self) -> Training | None:
        """Return the result if the training is finished, else None.

        Raises:
            TrainingError: the file is broken, impossible or of another request, or the weights are missing.
        """
        if not _is_there(self._training):
            return None
        training = _decoded(self._training, Training)
        for wrong in _mistaken_training(training, self.config):
            raise TrainingError(f"{self._training}: {wrong}; restore it, or delete it to train again")
        if not self.weights.exists():
            raise TrainingError(f"{self.weights}: is missing; restore it, or delete {self._training} to train again")
        return msgspec.structs.replace(training, weights=str(self.weights))

    def finish(self, training: Training, state: Mapping[str, Tensor], metadata: dict[str, str]) -> Training:
        """Write the weights, then the result.

        Raises:
            RecordError: the folder cannot be written.
        """
        tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
        write_atomically(self.weights, safetensors.torch.save(tensors, metadata))
        # The file name alone, since folders are moved; `training` prepends the folder.
        moved = msgspec.structs.replace(training, weights=self.weights.name)
        write_atomically(self._training, _json(moved))
        return training

    def discard(self) -> None:
        """Remove a folder in which nothing was trained yet."""
        with suppress(OSError):
            if not self.checkpoint.exists() and not self._training.exists():
                (self.path / "run.json").unlink(missing_ok=True)
                self.path.rmdir()

    def save(self, checkpoint: Checkpoint, tensors: dict[str, Any]) -> None:
        """Replace the last checkpoint.

        Args:
            checkpoint: the progress.
            tensors: its tensors, in dictionaries and lists.

        Raises:
            RecordError: the folder cannot be written, or is full; the last checkpoint is unchanged.
        """
        content = io.BytesIO()
        facts = msgspec.json.encode(checkpoint).decode()
        torch.save({"schema": _CHECKPOINT_SCHEMA, "facts": facts, "tensors": tensors}, content)
        write_atomically(self.checkpoint, content.getvalue())

    def load(self) -> tuple[Checkpoint, dict[str, Any]] | None:
        """Return the last checkpoint and its tensors, on the CPU; None if there is none. Only tensors are unpickled.

        Raises:
            TrainingError: the file is broken, or another version's.
        """
        if not _is_there(self.checkpoint):
            return None
        try:
            with warnings.catch_warnings():
                # About the file's age and kind; errors say what is wrong with it.
                warnings.simplefilter("ignore")
                loaded = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or set(loaded) != {"schema", "facts", "tensors"}:
                raise ValueError("it is not a dictionary of schema, facts and tensors")
            if loaded["schema"] != _CHECKPOINT_SCHEMA:
                raise ValueError(f"its schema is {loaded['schema']!r:.60}, this version reads {_CHECKPOINT_SCHEMA!r}")
            return msgspec.json.decode(loaded["facts"], type=Checkpoint), loaded["tensors"]
        except Exception as error:
            # The reader raises many kinds of errors for broken files.
            raise TrainingError(
                f"{self.checkpoint}: cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__}); "
                "restore it, or delete it to start over"
            ) from None

    def write_epochs(self, epochs: tuple[Epoch, ...]) -> None:
        """Write `epochs.jsonl`, one line per epoch.

        Raises:
            RecordError: the folder cannot be written.
        """
        write_atomically(self._epochs, b"".join(msgspec.json.encode(epoch) + b"\n" for epoch in epochs))


def _mistaken_training(found: Training, config: RunConfig) -> Iterator[str]:
    """Yield what is impossible in a finished training, or of another request: field and reason."""
    for name in ("arch", "facts_hash", "seed", "start_sha256"):
        if getattr(found, name) != getattr(config, name):
            yield f"{name}: is {getattr(found, name)!r}, not {getattr(config, name)!r}"
    if (found.data, found.data_sha256) != (config.data.name, config.data.sha256):
        yield f"data: is {found.data!r} of hash {found.data_sha256[:12]}, not {config.data.name!r}"
    if found.recipe.epochs != config.recipe.epochs:
        yield f"recipe.epochs: is {found.recipe.epochs}, not {config.recipe.epochs}"
    if not 0 <= found.seconds < math.inf:
        yield f"seconds: is {found.seconds!r}, expected a finite number, not negative"
    if len(found.epochs) != config.recipe.epochs:
        yield f"epochs: are {len(found.epochs)}, expected {config.recipe.epochs}"
    if found.world < 1:
        yield f"world: is {found.world}, expected at least 1"
    yield from mistaken_epochs(found.epochs, config.recipe, config.data)
    yield from (f"test.{wrong}" for wrong in mistaken_accuracy(found.test, config.data))
    yield from mistaken_end(found.epochs, found.test)


def looks_finished(path: Path) -> bool:
    """Return whether a folder has a training's result; what is in it is checked when the training is asked for."""
    return _is_there(path / "training.json")


@contextmanager
def opened(path: Path, config: RunConfig) -> Iterator[RunFolder]:
    """Create or reopen the folder of a request, and lock it against other processes.

    Raises:
        TrainingError: the folder holds another request's training, or another process is using it.
        RecordError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be created: {error.strerror}; name another folder") from None
    with _held(path):
        _claim(path, config)
        for left in path.glob(".*.*"):
            # A process killed while writing leaves the temporary files of `write_atomically`.
            if left.name.startswith((".checkpoint.pt.", ".epochs.jsonl.", ".weights.safetensors.", ".training.json.")):
                left.unlink(missing_ok=True)
        yield RunFolder(path, config)


def _claim(path: Path, config: RunConfig) -> None:
    file = path / "run.json"
    if _is_there(file):
        for field, there, here in differences(_decoded(file, RunConfig), config):
            raise TrainingError(
                f"{path}: holds the training of another request: its {field} is {there}, not {here}; "
                "name another folder, or delete this one"
            )
        return
    if (path / "checkpoint.pt").exists() or (path / "training.json").exists():
        raise TrainingError(f"{file}: is missing, so the request of this training is unknown; name another folder")
    write_atomically(file, _json(config))


def differences(there: Frozen, here: Frozen) -> Iterator[tuple[str, object, object]]:
    """Yield the result-deciding fields in which two requests or records differ: (path, there, here)."""
    theirs, ours = _deciding(there), _deciding(here)
    for key in sorted(theirs | ours):
        if theirs.get(key) != ours.get(key):
            yield key, theirs.get(key), ours.get(key)


def request_key(config: RunConfig) -> str:
    """Return eight hex digits over the result-deciding fields, so that another request has another folder."""
    return hashlib.sha256(msgspec.json.encode(_deciding(config), order="sorted")).hexdigest()[:8]


def _deciding(value: Frozen) -> dict[str, object]:
    """Return the result-deciding fields by path, without names, titles and options that only change the speed."""
    skipped = {f"recipe.{key}" for key in TELLING} | {f"options.{key}" for key in _NEUTRAL_OPTIONS} | {"data.title"}
    found = {key: inner for key, inner in _flat(msgspec.to_builtins(value)).items() if key not in skipped}
    # Where they are not asked for, folders keep the names that they had before there were these options.
    later = {
        "options.graphed": False,
        "start_sha256": "",
        **{f"recipe.{key}": value for key, value in LATER.items()},
    }
    return {key: inner for key, inner in found.items() if key not in later or later[key] != inner}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            # JSON turns tuples into lists.
            flat[prefix + key] = list(inner) if isinstance(inner, tuple) else inner
    return flat


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock a folder; the kernel releases the lock however the process ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{path}: another process is training here; wait for it, or name another folder"
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        with suppress(OSError):
            os.close(folder)


def _is_there(path: Path) -> bool:
    """Return whether a file exists.

    Raises:
        TrainingError: it is not a regular file; reading a pipe would never end.
    """
    if path.exists() and not path.is_file():
        raise TrainingError(f"{path}: is not a regular file; delete it, or name another folder")
    return path.exists()


def _decoded(path: Path, kind: type[_T]) -> _T:
    text = read_text(path)
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise TrainingError(f"{path}: {json_fault(text, error)}; restore it, or name another folder") from None


def _json(value: Frozen) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def versions() -> dict[str, str]:
    """Return the versions of torch and this package."""
    return {"torch": str(torch.__version__), "selab": __version__}
