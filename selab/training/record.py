"""The frozen types of an accuracy comparison, and their way to and from a file.

Counts of right answers, seed by seed, are the fact. Means, deviations, paired differences and words are computed from
them by `selab.accuracy_verdict` and stand nowhere else, so that they cannot disagree. Units are in the names; shares
are percent (`_pct`).
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from selab.errors import RecordError
from selab.records import stats
from selab.records.store import Store, file_name, partial_path, read_text, write_atomically
from selab.records.types import Device, Frozen, Machine, decoded
from selab.training.recipe import Recipe

SCHEMA = "selab.accuracy/1"
FOLDER = "accuracy"
"""Where a machine's comparisons lie, beside its profiles."""
TOP5_CLASSES = 6
"""From so many classes on, the right one may be missing among five: below, top-5 says nothing."""
Amp = Literal["off", "bf16", "fp16"]


class Accuracy(Frozen, frozen=True, kw_only=True):
    """How often a network is right on a set of images.

    Attributes:
        images: those that were looked at.
        top5_correct: images whose class is among the five greatest logits; None below six classes.
        loss: mean cross entropy in nats, without label smoothing.
        skipped: the first of the images that could not be read, by name; they are in no other figure.
    """

    images: int
    top1_correct: int
    top5_correct: int | None
    loss: float
    skipped: tuple[str, ...] = ()

    @property
    def top1_pct(self) -> float:
        """100 top1_correct / images."""
        return 100 * self.top1_correct / self.images

    @property
    def top5_pct(self) -> float | None:
        """100 top5_correct / images; None below six classes."""
        return None if self.top5_correct is None else 100 * self.top5_correct / self.images

    @property
    def top1_interval_pct(self) -> tuple[float, float]:
        """What `top1_pct` may be on other images of the same kind, at 95 %. It knows nothing of other seeds."""
        low, high = stats.wilson(self.top1_correct, self.images)
        return 100 * low, 100 * high

    @property
    def top5_interval_pct(self) -> tuple[float, float] | None:
        """The same of `top5_pct`."""
        if self.top5_correct is None:
            return None
        low, high = stats.wilson(self.top5_correct, self.images)
        return 100 * low, 100 * high


class Epoch(Frozen, frozen=True, kw_only=True):
    """One pass over the training images and what the network was worth after it.

    Attributes:
        epoch: counted from 1.
        lr: the learning rate of its last step.
        train_loss: mean over its training images, as they were augmented and while the network was changing.
        test_top5_pct: None below six classes.
        seconds: of training, without the evaluation.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1_pct: float
    test_loss: float
    test_top1_pct: float
    test_top5_pct: float | None
    seconds: float
    images_per_s: float


class Options(Frozen, frozen=True, kw_only=True):
    """How a recipe was run: what may change the figures a little, or the recipe on purpose.

    Attributes:
        accumulate: micro-batches per step; the recipe's batch stays the same.
        epochs: instead of the recipe's.
        batch: instead of the recipe's.
        threads: of the CPU; None for torch's own choice.
        checkpoint_s: seconds between checkpoints within an epoch.
    """

    device: Device = "cpu"
    amp: Amp = "off"
    channels_last: bool = False
    compiled: bool = False
    accumulate: int = 1
    epochs: int | None = None
    batch: int | None = None
    threads: int | None = None
    checkpoint_s: float = 300.0


class DataSpec(Frozen, frozen=True, kw_only=True):
    """Which images: records of different ones never share a column.

    Attributes:
        title: for tables.
        sha256: over the files' bytes, or over the facts that images were generated from.
        official: whether these are the published files.
    """

    name: str
    title: str
    sha256: str
    official: bool
    num_classes: int
    input_chw: tuple[int, int, int]
    train_size: int
    test_size: int


class SeedOutcome(Frozen, frozen=True, kw_only=True):
    """One network trained once: what it was worth at the end, what it took, and how it got there.

    Attributes:
        test: of the weights that were kept, on all test images.
        seconds: of the whole training, evaluations included.
        images_per_s: training images over the time that they took, the median of the epochs.
        torch: its version at the end; empty where it was not noted.
    """

    test: Accuracy
    seconds: float
    images_per_s: float
    epochs: tuple[Epoch, ...]
    torch: str = ""


class Seed(Frozen, frozen=True, kw_only=True):
    """Both networks trained from the same seed: the same order of images, the same augmentation.

    Attributes:
        baseline: None while it is not finished, and where it has diverged.
        variant: the same.
        baseline_diverged: what was said when its training diverged, which is a result; empty where it did not.
        variant_diverged: the same.
    """

    seed: int
    baseline: SeedOutcome | None = None
    variant: SeedOutcome | None = None
    baseline_diverged: str = ""
    variant_diverged: str = ""

    @property
    def pair(self) -> tuple[SeedOutcome, SeedOutcome] | None:
        """Baseline and variant, if both came to their end: only such seeds are compared."""
        return None if self.baseline is None or self.variant is None else (self.baseline, self.variant)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to train: each network came to its end, or diverged."""
        return bool((self.baseline or self.baseline_diverged) and (self.variant or self.variant_diverged))


class AccuracyRecord(Frozen, frozen=True, kw_only=True):
    """A variant and its baseline, trained alike from several seeds on one machine.

    Attributes:
        arch: what `--arch` finds again.
        origin: the TOML that the variant stands in, if it is a user's own; empty for those that are installed.
        facts_hash: of the variant's facts; another one than today's means that the record is stale.
        command: the command line that asks for the same again.
        complete: whether every seed that was asked for is finished for both networks, or diverged.
        recipe: all of it, for recipes change.
        warnings: what a reader of these accuracies must know, as `warnings_of` finds it.
    """

    schema: str = SCHEMA
    selab: str
    kind: Literal["accuracy"] = "accuracy"
    arch: str
    baseline: str
    origin: str
    baseline_origin: str
    facts_hash: str
    baseline_facts_hash: str
    created: str
    command: str
    complete: bool
    data: DataSpec
    recipe: Recipe
    options: Options
    machine: Machine
    seeds: tuple[Seed, ...]
    warnings: tuple[str, ...] = ()


def warnings_of(seeds: Iterable[Seed], data: DataSpec) -> tuple[str, ...]:
    """What a reader of these accuracies must know: images that are in none of them, and trainings that were not alike.

    What has diverged stands with its seed.
    """
    done = [(seed.seed, outcome) for seed in seeds for outcome in (seed.baseline, seed.variant) if outcome]
    warnings = []
    for test in [outcome.test for _, outcome in done][:1]:  # all have looked at the same images
        if test.images < data.test_size:
            names = f" ({', '.join(test.skipped)})" if test.skipped else ""
            warnings.append(
                f"{data.test_size - test.images:,} of {data.test_size:,} test images could not be read{names}"
            )
    versions: dict[str, list[int]] = {}
    for number, outcome in done:
        if outcome.torch:
            versions.setdefault(outcome.torch, []).append(number)
    if len(versions) > 1:
        each = "; ".join(
            f"{version} (seed {', '.join(map(str, dict.fromkeys(numbers)))})" for version, numbers in versions.items()
        )
        warnings.append(f"not all were trained under the same version of torch: {each}")
    return tuple(warnings)


# ---------------------------------------------------------------------------------------------------------------- JSON
_FLAT = re.compile(rb'\{\s*("\w+": (?:null|-?[\d.eE+-]+)(?:,\s*"\w+": (?:null|-?[\d.eE+-]+))*)\s*\}')


def to_json(record: AccuracyRecord) -> bytes:
    """A record as indented UTF-8 JSON; an epoch stays on one line, so that a history can be read."""
    indented = msgspec.json.format(msgspec.json.encode(record), indent=1)
    return _FLAT.sub(lambda found: b"{" + b" ".join(found.group(1).split()) + b"}", indented) + b"\n"


def from_json(raw: bytes, *, where: str) -> AccuracyRecord:
    """Reads a record strictly, and holds it against itself.

    Args:
        raw: UTF-8 JSON.
        where: the file's name, for the message.

    Raises:
        RecordError: not JSON, another schema, an unknown or missing field, or counts that cannot be; names the file and
            the field.
    """
    record = decoded(raw, AccuracyRecord, schema=SCHEMA, where=where, again="compare again")
    for wrong in _impossible(record):
        raise RecordError(f"{where}: {wrong}; compare again or restore the file")
    return record


def _impossible(record: AccuracyRecord) -> Iterator[str]:
    """What cannot be, each as the field and the reason."""
    numbers = [each.seed for each in record.seeds]
    if len(set(numbers)) < len(numbers):
        yield f"seeds: {numbers} name one twice"
    unfinished = [each.seed for each in record.seeds if not each.settled]
    if record.complete and unfinished:
        yield f"complete: is true, but seeds {unfinished} are unfinished"
    if record.complete and not numbers:
        yield "complete: is true without a seed"
    looked_at = {outcome.test.images for each in record.seeds for outcome in (each.baseline, each.variant) if outcome}
    if len(looked_at) > 1:
        yield f"seeds: tested on {sorted(looked_at)} images; all of a record share the same ones"
    for index, each in enumerate(record.seeds):
        for arm, outcome, diverged in (
            ("baseline", each.baseline, each.baseline_diverged),
            ("variant", each.variant, each.variant_diverged),
        ):
            if outcome is not None:
                where = f"seeds[{index}].{arm}"
                if diverged:
                    yield f"{where}_diverged: is {diverged!r}, but {arm} has an outcome"
                yield from (f"{where}.{wrong}" for wrong in _mistaken(outcome, record.data))


def _mistaken(outcome: SeedOutcome, data: DataSpec) -> Iterator[str]:
    for name, value in (("seconds", outcome.seconds), ("images_per_s", outcome.images_per_s)):
        if not 0 < value < math.inf:
            yield f"{name}: is {value!r}, no positive number"
    test = outcome.test
    if not 1 <= test.images <= data.test_size:
        yield f"test.images: is {test.images}, the data set has {data.test_size}"
    if (test.top5_correct is None) != (data.num_classes < TOP5_CLASSES):
        yield f"test.top5_correct: is {test.top5_correct} of {data.num_classes} classes; counted from {TOP5_CLASSES} on"
    top5_correct = test.images if test.top5_correct is None else test.top5_correct
    if not 0 <= test.top1_correct <= top5_correct <= test.images:
        yield f"test.top1_correct: is {test.top1_correct}, top-5 {test.top5_correct}, of {test.images} images"
    if not 0 <= test.loss < math.inf:
        yield f"test.loss: is {test.loss!r}; a mean cross entropy is finite and not negative"


# --------------------------------------------------------------------------------------------------------------- files
def accuracy_path(out: Path, *, machine: str, arch: str, against: str | None, data: str, recipe: str) -> Path:
    """Return `OUT/<machine>/accuracy/<arch>[-vs-<baseline>].<data>.<recipe>.json`; as `Store.path`."""
    return ACCURACIES.path(out, machine=machine, arch=arch, against=against, parts=[file_name(data), file_name(recipe)])


def save_accuracy_record(record: AccuracyRecord, path: Path) -> Path:
    """Writes a record whole or not at all: a complete one to `path`, a partial one beside it, as `partial_path` says.

    A complete record takes the place of what an interruption left; a partial one never that of a complete one.

    Returns:
        Where it was written.

    Raises:
        RecordError: the folder cannot be written, or the record could not be read again.
    """
    raw = to_json(record)
    from_json(raw, where=str(path))
    target = path if record.complete else partial_path(path)
    write_atomically(target, raw)
    if record.complete:
        with suppress(OSError):
            partial_path(path).unlink()
    return target


def read_accuracy_records(folder: Path) -> list[AccuracyRecord]:
    """Return every complete comparison in a machine's folder, in the order of their names; empty if there is none.

    Raises:
        RecordError: no such folder, the folder above those of machines, or as `read_accuracy_record`.
    """
    return ACCURACIES.read_folder(folder, required=False)


def read_accuracy_record(path: Path) -> AccuracyRecord:
    """Return one record, complete or partial.

    Raises:
        RecordError: the file cannot be read, is not such a record, or contains impossible counts; names file and field.
    """
    return from_json(read_text(path).encode(), where=str(path))


ACCURACIES = Store(folder=FOLDER, title="comparisons", command="selab compare", read=read_accuracy_record)
"""The comparisons of trained networks on disk."""
