"""Types of an accuracy comparison, and how they are read and written.

Records hold the counts of right answers of each seed. Means, deviations, paired differences and sentences are computed
from them by `selab.training.verdict` and stored nowhere, so that they cannot disagree. Units are in the names; shares
are percent (`_pct`).
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from selab.errors import RecordError
from selab.records import stats
from selab.records.consistency import mistaken_machine
from selab.records.files import read_text, write_atomically
from selab.records.store import OnBroken, Store, file_name, partial_path
from selab.records.types import Device, Frozen, Machine, decoded
from selab.training.recipe import Recipe, Task

SCHEMA = "selab.accuracy/1"
FOLDER = "accuracy"
"""Folder of a machine's comparisons, beside its profiles."""
TOP5_CLASSES = 6
"""Fewest classes for which top-5 accuracy means anything."""
Amp = Literal["off", "bf16", "fp16"]


class Precision(Frozen, frozen=True, kw_only=True):
    """Average precision of a detector, in percent, as COCO's benchmark computes it.

    Attributes:
        ap_pct: mean over the categories and ten thresholds of the intersection over union, 0.50 to 0.95.
        ap50_pct: at 0.50 alone.
        ap75_pct: at 0.75 alone.
        small_pct: of objects below 32 x 32 pixels; None where there are none.
        medium_pct: up to 96 x 96.
        large_pct: above.

    Source: cocodataset.org, "Detection evaluation".
    """

    ap_pct: float
    ap50_pct: float
    ap75_pct: float
    small_pct: float | None
    medium_pct: float | None
    large_pct: float | None


class Accuracy(Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """How good a network is on a set of images: a classifier's right answers, or a detector's average precision.

    Attributes:
        images: how many were evaluated.
        top1_correct: images whose class has the greatest logit; None for a detector.
        top5_correct: images whose class is among the five greatest logits; None below six classes.
        loss: mean cross entropy in nats, without label smoothing; None for a detector.
        precision: of a detector; None for a classifier.
        skipped: names of the first images that could not be read; they enter no other figure.
    """

    images: int
    top1_correct: int | None
    top5_correct: int | None
    loss: float | None
    precision: Precision | None = None
    skipped: tuple[str, ...] = ()

    @property
    def score_pct(self) -> float:
        """The figure that networks are compared by: `top1_pct`, or a detector's AP."""
        return self.top1_pct if self.precision is None else self.precision.ap_pct

    @property
    def right(self) -> int:
        """`top1_correct` of a classifier; a TypeError for a detector, which has no right answers to count."""
        if self.top1_correct is None:
            raise TypeError("a detector has an average precision, and no number of right answers")
        return self.top1_correct

    @property
    def top1_pct(self) -> float:
        """100 top1_correct / images, of a classifier."""
        return 100 * self.right / self.images

    @property
    def top5_pct(self) -> float | None:
        """100 top5_correct / images; None below six classes."""
        return None if self.top5_correct is None else 100 * self.top5_correct / self.images

    @property
    def top1_interval_pct(self) -> tuple[float, float]:
        """95 % interval of `top1_pct` over images of the same kind (Wilson); does not cover other seeds."""
        low, high = stats.wilson(self.right, self.images)
        return 100 * low, 100 * high

    @property
    def top5_interval_pct(self) -> tuple[float, float] | None:
        """95 % interval of `top5_pct`; None below six classes."""
        if self.top5_correct is None:
            return None
        low, high = stats.wilson(self.top5_correct, self.images)
        return 100 * low, 100 * high


class Epoch(Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """One pass over the training images, and the test after it.

    Attributes:
        epoch: counted from 1.
        lr: the learning rate of its last step.
        train_loss: mean over the augmented training images, while the network was changing.
        train_top1_pct: the same; None for a detector.
        test_loss: None for a detector.
        test_top1_pct: None for a detector.
        test_top5_pct: None below six classes.
        test_ap_pct: a detector's average precision; None for a classifier.
        test_ap50_pct: the same at an intersection over union of 0.50.
        seconds: of training, without the evaluation.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1_pct: float | None
    test_loss: float | None
    test_top1_pct: float | None
    test_top5_pct: float | None
    test_ap_pct: float | None = None
    test_ap50_pct: float | None = None
    seconds: float
    images_per_s: float

    @property
    def score_pct(self) -> float:
        """The figure that networks are compared by: `test_top1_pct`, or a detector's AP."""
        score = self.test_top1_pct if self.test_ap_pct is None else self.test_ap_pct
        if score is None:
            raise TypeError("an epoch has a top-1 accuracy or an average precision")
        return score

    @property
    def score_words(self) -> str:
        """`top-1 65.56 %` or `AP 37.04 %`."""
        return f"{'top-1' if self.test_ap_pct is None else 'AP'} {self.score_pct:.2f} %"


def tested(test: Accuracy) -> dict[str, float | None]:
    """Return what an `Epoch` says of the test after it."""
    found = test.precision
    return {
        "test_loss": test.loss,
        "test_top1_pct": None if found is not None else test.top1_pct,
        "test_top5_pct": test.top5_pct,
        "test_ap_pct": None if found is None else found.ap_pct,
        "test_ap50_pct": None if found is None else found.ap50_pct,
    }


class Options(Frozen, frozen=True, kw_only=True):
    """Options of a training: changes of the recipe, and what may change the figures slightly.

    Attributes:
        fused: the network runs through `selab.fuse`.
        graphed: forward and backward are CUDA graphs, captured once: for small networks on a fast GPU, whose kernels
            end sooner than the host can start them. Decisions in Python code of the network are then made once.
        accumulate: micro-batches per step; the recipe's batch stays the same.
        epochs: instead of the recipe's.
        batch: instead of the recipe's.
        threads: of the CPU; None for torch's own choice.
        checkpoint_s: seconds between checkpoints within an epoch.
    """

    device: Device = "cpu"
    amp: Amp = "off"
    channels_last: bool = False
    fused: bool = False
    compiled: bool = False
    graphed: bool = False
    accumulate: int = 1
    epochs: int | None = None
    batch: int | None = None
    threads: int | None = None
    checkpoint_s: float = 300.0


class DataSpec(Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """A data set; records of different ones never share a column.

    Attributes:
        title: for tables.
        sha256: over the bytes of the files or of the generated images.
        official: whether these are the published files.
        num_classes: for detection, with the background.
    """

    name: str
    title: str
    sha256: str
    official: bool
    num_classes: int
    input_chw: tuple[int, int, int]
    train_size: int
    test_size: int
    task: Task = "classification"


class Tested(Protocol):
    """What a result is checked against: a data set, or its `DataSpec`."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def test_size(self) -> int:
        """Number of test images."""
        ...


def task_of(data: object) -> Task:
    """Return what a data set's networks are trained for; one that does not say so is for classification."""
    task: Task = getattr(data, "task", "classification")
    return task


class SeedOutcome(Frozen, frozen=True, kw_only=True):
    """The result of training one network once.

    Attributes:
        test: of the saved weights, on all test images.
        seconds: of the whole training, evaluations included.
        images_per_s: training images per second, the median over epochs.
        torch: its version at the end; empty if unknown.
        at_once: trainings that ran at the same time, each on its share of the cores or on a GPU of its own.
    """

    test: Accuracy
    seconds: float
    images_per_s: float
    epochs: tuple[Epoch, ...]
    torch: str = ""
    at_once: int = 1


class Seed(Frozen, frozen=True, kw_only=True):
    """Both networks trained from one seed: the same order of images, the same augmentation.

    Attributes:
        baseline: None while unfinished, and if it diverged.
        variant: the same.
        baseline_diverged: the message if its training diverged, else empty.
        variant_diverged: the same.
    """

    seed: int
    baseline: SeedOutcome | None = None
    variant: SeedOutcome | None = None
    baseline_diverged: str = ""
    variant_diverged: str = ""

    @property
    def pair(self) -> tuple[SeedOutcome, SeedOutcome] | None:
        """Baseline and variant if both are finished, else None; only such seeds are compared."""
        return None if self.baseline is None or self.variant is None else (self.baseline, self.variant)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to train: each network is finished or diverged."""
        return bool((self.baseline or self.baseline_diverged) and (self.variant or self.variant_diverged))


class AccuracyRecord(Frozen, frozen=True, kw_only=True):
    """A variant and its baseline, trained in the same way from several seeds on one machine.

    Attributes:
        arch: what `--arch` finds again.
        origin: the TOML of the variant, if it is a user's own; empty for installed ones.
        facts_hash: of the variant; the record is stale if today's differs.
        command: the command line that asks for the same again.
        complete: whether both networks of every requested seed are finished or diverged.
        recipe: in full, since recipes change.
        variant_recipe: of the variant, where each network has values of its own; None where both have `recipe`.
        warnings: remarks of the comparison, and see `warnings_of`.
        start_sha256: of the weights that the variant's trainings start from; empty for random ones.
        baseline_start_sha256: of the baseline's.
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
    variant_recipe: Recipe | None = None
    start_sha256: str = ""
    baseline_start_sha256: str = ""


def warnings_of(seeds: Iterable[Seed], data: DataSpec) -> tuple[str, ...]:
    """Return what a reader must know: unread test images, and trainings under different versions of torch."""
    done = [(seed.seed, outcome) for seed in seeds for outcome in (seed.baseline, seed.variant) if outcome]
    warnings = []
    for test in [outcome.test for _, outcome in done][:1]:  # all were tested on the same images
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
    """Return a record as indented UTF-8 JSON, with one line per epoch."""
    indented = msgspec.json.format(msgspec.json.encode(record), indent=1)
    return _FLAT.sub(lambda found: b"{" + b" ".join(found.group(1).split()) + b"}", indented) + b"\n"


def from_json(raw: bytes, *, where: str) -> AccuracyRecord:
    """Read a record strictly, and check that it is consistent.

    Args:
        raw: UTF-8 JSON.
        where: the file's name, for the message.

    Raises:
        RecordError: not JSON, another schema, an unknown or missing field, or impossible counts; names the file and the
            field.
    """
    record = decoded(raw, AccuracyRecord, schema=SCHEMA, where=where, again="compare again")
    for wrong in _impossible(record):
        raise RecordError(f"{where}: {wrong}; compare again or restore the file")
    return record


def _impossible(record: AccuracyRecord) -> Iterator[str]:
    """Yield what is inconsistent: field and reason."""
    yield from mistaken_machine(record.machine)
    data = record.data
    for name, value in (
        ("num_classes", data.num_classes),
        ("train_size", data.train_size),
        ("test_size", data.test_size),
    ):
        if value < 1:
            yield f"data.{name}: is {value}, expected at least 1"
    if min(data.input_chw) < 1:
        yield f"data.input_chw: is {data.input_chw}, expected sizes of at least 1"
    if record.options.accumulate < 1:
        yield f"options.accumulate: is {record.options.accumulate}, expected at least 1"
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
                yield from (f"{where}.{wrong}" for wrong in _mistaken(outcome, record.data, record.recipe))


def _mistaken(outcome: SeedOutcome, data: DataSpec, recipe: Recipe) -> Iterator[str]:
    for name, value in (("seconds", outcome.seconds), ("images_per_s", outcome.images_per_s)):
        if not 0 < value < math.inf:
            yield f"{name}: is {value!r}, no positive number"
    yield from (f"test.{wrong}" for wrong in mistaken_accuracy(outcome.test, data))
    if len(outcome.epochs) != recipe.epochs:
        yield f"epochs: holds {len(outcome.epochs)}, the recipe has {recipe.epochs}"
    yield from mistaken_epochs(outcome.epochs, recipe, data)
    yield from mistaken_end(outcome.epochs, outcome.test)


def mistaken_accuracy(test: Accuracy, data: Tested) -> Iterator[str]:
    """Yield what no evaluation gives: field and reason.

    Args:
        test: the evaluation.
        data: what it was on.
    """
    if not 1 <= test.images <= data.test_size:
        yield f"images: is {test.images}, the data set has {data.test_size}"
    if (test.precision is not None) != (task_of(data) == "detection"):
        yield f"precision: is {test.precision}, for {task_of(data)}"
        return
    if test.precision is not None:
        yield from _mistaken_precision(test, test.precision)
        return
    if (test.top5_correct is None) != (data.num_classes < TOP5_CLASSES):
        yield f"top5_correct: is {test.top5_correct} of {data.num_classes} classes; counted from {TOP5_CLASSES} on"
    top5_correct = test.images if test.top5_correct is None else test.top5_correct
    if test.top1_correct is None or not 0 <= test.top1_correct <= top5_correct <= test.images:
        yield f"top1_correct: is {test.top1_correct}, top-5 {test.top5_correct}, of {test.images} images"
    if test.loss is None or not 0 <= test.loss < math.inf:
        yield f"loss: is {test.loss!r}; a mean cross entropy is finite and not negative"


def _mistaken_precision(test: Accuracy, found: Precision) -> Iterator[str]:
    for name in ("top1_correct", "top5_correct", "loss"):
        if getattr(test, name) is not None:
            yield f"{name}: is {getattr(test, name)!r}, and a detector has none"
    for name, value in msgspec.structs.asdict(found).items():
        if value is not None and not 0 <= value <= 100:
            yield f"precision.{name}: is {value!r}, expected 0 to 100"


def mistaken_epochs(epochs: Sequence[Epoch], recipe: Recipe, data: Tested) -> Iterator[str]:
    """Yield what no training's epochs are: field and reason.

    Args:
        epochs: from the first one on.
        recipe: as run.
        data: what was trained and tested on.
    """
    detected = task_of(data) == "detection"
    of_detector = ("test_ap_pct", "test_ap50_pct")
    of_classifier = ("train_top1_pct", "test_top1_pct", "test_loss")
    given, absent = (of_detector, (*of_classifier, "test_top5_pct")) if detected else (of_classifier, of_detector)
    for index, epoch in enumerate(epochs):
        where = f"epochs[{index}]"
        if epoch.epoch != index + 1 or epoch.epoch > recipe.epochs:
            yield f"{where}.epoch: is {epoch.epoch}, expected {index + 1} of {recipe.epochs}"
        for name in ("lr", "train_loss", "test_loss", "seconds", "images_per_s"):
            value = getattr(epoch, name)
            if value is not None and not 0 <= value < math.inf:
                yield f"{where}.{name}: is {value!r}, expected a finite number, not negative"
        for name in given:
            value = getattr(epoch, name)
            if value is None or (name != "test_loss" and not 0 <= value <= 100):
                yield f"{where}.{name}: is {value!r}, expected {'a number' if name == 'test_loss' else '0 to 100'}"
        for name in absent:
            if getattr(epoch, name) is not None:
                yield f"{where}.{name}: is {getattr(epoch, name)!r}, for {task_of(data)}"
        if not detected:
            yield from _mistaken_top5(epoch, where, data.num_classes)


def _mistaken_top5(epoch: Epoch, where: str, num_classes: int) -> Iterator[str]:
    """Yield a top-5 accuracy that is there below six classes, is missing, or is lower than the top-1 accuracy."""
    top1, top5 = epoch.test_top1_pct or 0.0, epoch.test_top5_pct
    if (top5 is None) != (num_classes < TOP5_CLASSES):
        yield f"{where}.test_top5_pct: is {top5} of {num_classes} classes"
    if top5 is not None and not top1 <= top5 <= 100:
        yield f"{where}.test_top5_pct: is {top5!r}, with a top-1 of {top1!r}"


def mistaken_end(epochs: Sequence[Epoch], test: Accuracy) -> Iterator[str]:
    """Yield where the last epoch's test is not the last evaluation."""
    if not epochs or not test.images:
        return
    for name, own in tested(test).items():
        last = getattr(epochs[-1], name)
        if (last is None) != (own is None) or not math.isclose(last or 0.0, own or 0.0, rel_tol=1e-9, abs_tol=1e-9):
            yield f"epochs[{len(epochs) - 1}].{name}: is {last!r}, the last test gave {own!r}"


# --------------------------------------------------------------------------------------------------------------- files
def accuracy_path(out: Path, *, machine: str, arch: str, against: str | None, data: str, recipe: str) -> Path:
    """Return `OUT/<machine>/accuracy/<arch>[-vs-<baseline>].<data>.<recipe>.json`; as `Store.path`."""
    return ACCURACIES.path(out, machine=machine, arch=arch, against=against, parts=[file_name(data), file_name(recipe)])


def save_accuracy_record(record: AccuracyRecord, path: Path) -> Path:
    """Write a record whole or not at all: a complete one to `path`, a partial one to `partial_path(path)`.

    A complete record replaces a partial one, never the other way round.

    Returns:
        Path of the file.

    Raises:
        RecordError: the folder cannot be written, or the record is inconsistent.
    """
    raw = to_json(record)
    from_json(raw, where=str(path))
    target = path if record.complete else partial_path(path)
    write_atomically(target, raw)
    if record.complete:
        with suppress(OSError):
            partial_path(path).unlink()
    return target


def read_accuracy_records(folder: Path, *, on_broken: OnBroken = None) -> list[AccuracyRecord]:
    """Return every complete comparison in a machine's folder, in the order of their names; empty if there is none.

    Args:
        folder: the machine's.
        on_broken: as in `Store.read_folder`.

    Raises:
        RecordError: no such folder, the folder above those of machines, or as `read_accuracy_record`.
    """
    return ACCURACIES.read_folder(folder, required=False, on_broken=on_broken)


def read_accuracy_record(path: Path) -> AccuracyRecord:
    """Return one record, complete or partial.

    Raises:
        RecordError: the file cannot be read, is not such a record, or contains impossible counts; names file and field.
    """
    return from_json(read_text(path).encode(), where=str(path))


ACCURACIES = Store(folder=FOLDER, title="comparisons", command="selab compare", read=read_accuracy_record)
"""The comparisons of trained networks on disk."""
