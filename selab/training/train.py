"""Training one network after a recipe: reproducible from its seed, and able to go on from wherever it was stopped.

What happens in a step follows from (seed, epoch, step) alone: which images, how they are augmented, what dropout drops,
the learning rate. So a training that was killed goes on from its last checkpoint to the numbers that it would have had,
to the bit on a CPU; and so two networks that are compared see the same images in the same order.
"""

import hashlib
import math
import signal
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from selab.errors import ModelError, OutOfMemoryError, SelabError
from selab.meta import first_line
from selab.models.build import build
from selab.models.spec import Variant
from selab.records.types import Frozen
from selab.training.augment import Augmentation, check_seed
from selab.training.data import Data
from selab.training.distributed import PATIENCE_S, Group, join, lost_another
from selab.training.evaluate import NotFiniteError, evaluate
from selab.training.optim import Average, draw_he, optimizer_of
from selab.training.problems import Problems
from selab.training.recipe import ImageRecipe, Recipe, lr_at, recipe_hash
from selab.training.record import Accuracy, Epoch, Options
from selab.training.run import (
    Asked,
    Checkpoint,
    DivergedError,
    RunFolder,
    Training,
    TrainingError,
    TrainingStoppedError,
    asked_of,
    opened,
    versions,
)

__all__ = [
    "DivergedError",
    "Epoch",
    "Options",
    "Progress",
    "Training",
    "TrainingError",
    "TrainingStoppedError",
    "train",
]
_AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# About as often a training is looked at: for that the host has to wait for the device.
_LOOK_S = 0.5
# Test images of a folder in one pass of one process.
_FOLDER_TEST_BATCH = 256
_NONE_KEPT = "no checkpoint was written yet"


class Progress(Frozen, frozen=True, kw_only=True):
    """How far a training is.

    Attributes:
        epoch: the one that goes on, from 1.
        step: of the epoch's `steps`, how many are done; all of them while the network is being tested.
        images_per_s: training images, since the last time it was told.
        eta_s: seconds until the end of the training; None while that cannot be told.
        loss: mean of the epoch's steps so far.
        last: the last epoch that is finished.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    images_per_s: float
    eta_s: float | None
    loss: float
    top1_pct: float
    last: Epoch | None


Report = Callable[[Progress], object]


def train(
    variant: Variant,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    options: Options,
    report: Report,
    say: Callable[[str], object] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = PATIENCE_S,
) -> Training:
    """Trains a variant, or goes on where an earlier call with the same arguments was stopped.

    The same call on the same machine with as many threads gives the same weights, to the bit on a CPU, however often it
    was interrupted. A variant and its baseline of one seed share the initial values of their common layers, and the
    order and the augmentation of the images. Started by `torchrun`, all processes train one network together, each on
    its part of every batch. Batch norm then takes its statistics of each process's part, as it does of each micro-batch
    where gradients are accumulated; the running statistics that are kept are those of rank 0.

    On SIGINT and SIGTERM the step that goes on is finished and everything is saved; a second SIGINT stops a process
    that trains alone at once. The caller's random state, threads and backend flags are left as they were.

    Args:
        variant: the facts; its classes and its input become those of the data.
        data: what to train and test on.
        recipe: how. The options may change its epochs and its batch.
        seed: of weights, order, augmentation and dropout; from 0 to 2^64 - 1.
        folder: of this training alone, see `selab.accuracy.run`.
        options: what may change between machines.
        report: told about twice a second, on rank 0.
        say: told in a few words, on rank 0, if there was something in the folder: where the training goes on.
        clock: seconds since some moment.
        patience_s: after so long without a sign of another process, this one gives up.

    Raises:
        TrainingStoppedError: it was interrupted; the message says whether everything is saved, or the last checkpoint.
        DivergedError: the loss, the weights or what the network says of the test images is not finite.
        TrainingError: the folder is another training's, or in use; the batch cannot be divided; another process is
            gone; the data ends early. The last checkpoint is intact, where there is one.
        SpecError, InsertionError, ModelError: the network cannot be built, or fails on these images.
        OutOfMemoryError, DeviceError: the machine.
        SelabError: the data cannot be read, or the folder not be written; the last checkpoint is intact.
    """
    asked = asked_of(variant, data, recipe, seed=seed, options=options)
    group = join(options.device, patience_s=patience_s)
    _check(asked, group)
    with ExitStack() as stack:
        held = group.on_first(lambda: stack.enter_context(opened(folder, asked)))
        finished = group.on_first(held.training)
        if finished is not None:
            if group.first:
                say(f"is finished already in {folder}")
            return finished
        stack.enter_context(_settings(options, group.device))
        engine = _Engine(variant, data, asked, group, held, report, clock)
        with engine.clear_errors():
            found = group.on_first(held.load)
            engine.restore(found)
            if found is not None and group.first:
                say(f"goes on from epoch {min(engine.epoch + 1, asked.recipe.epochs)} in {folder}")
            return engine.run()


def _check(asked: Asked, group: Group) -> None:
    recipe, options, data = asked.recipe, asked.options, asked.data
    if not data.train_size:
        raise TrainingError(f"{data.title}: holds no training images; put them into a folder train beside val")
    check_seed(asked.seed)
    parts = group.world * options.accumulate
    if options.accumulate < 1 or recipe.batch % parts:
        raise TrainingError(
            f"a batch of {recipe.batch} cannot be divided among {group.world} processes by {options.accumulate} "
            "micro-batches; choose another --batch or --accumulate"
        )
    if recipe.batch > data.train_size:
        raise TrainingError(
            f"{data.title}: holds {data.train_size:,} training images, less than a batch of {recipe.batch:,}; "
            "choose a smaller --batch"
        )


@contextmanager
def _settings(options: Options, device: torch.device) -> Iterator[None]:
    """Threads and backends for a training; gives them and the random state back at the end."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            torch.backends.cudnn.benchmark = True
            yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cudnn.benchmark = benchmark


def _network(variant: Variant, data: Data, recipe: Recipe, seed: int) -> tuple[nn.Module, Variant]:
    """The network for this data as it begins, and its facts."""
    fitting = msgspec.structs.replace(variant, num_classes=data.num_classes, input_chw=data.input_chw)
    model = build(fitting, seed=seed).model
    if recipe.init == "he":
        bare = msgspec.structs.replace(fitting, se=None)
        # Attention blocks keep the initial values that their kind asks for.
        draw_he(model, seed=seed, only=build(bare, device="meta").model.state_dict().keys())
    return model, fitting


def _reseed(device: torch.device, seed: int, epoch: int, step: int, rank: int) -> None:
    """Seeds the generator that dropout draws from; other devices' generators stay out of it."""
    digest = hashlib.sha256(struct.pack("<Q3q", seed, epoch, step, rank)).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


class _Engine:
    """A training while it runs. Every rank has one, and they take the same decisions at the same steps."""

    def __init__(
        self,
        variant: Variant,
        data: Data,
        asked: Asked,
        group: Group,
        folder: RunFolder,
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self.data, self.asked, self.group, self.folder = data, asked, group, folder
        self.recipe, self.options = asked.recipe, asked.options
        self.report, self.clock = report, clock
        # An image folder says what is done to its images; a set in memory has no such thing.
        self.image: ImageRecipe | None = getattr(data, "image", None)
        model, self.facts = _network(variant, data, self.recipe, asked.seed)
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        self.model = model.to(group.device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = optimizer_of(self.model, self.recipe)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=self.options.amp == "fp16")
        self.average = None if self.recipe.ema is None else Average(self.model, self.recipe.ema)
        self.parallel: DistributedDataParallel | None = None
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.sums = torch.zeros(2, dtype=torch.float64, device=group.device)
        self.losses, self.right = self.sums.unbind()
        self.steps = data.train_size // self.recipe.batch
        self.epoch, self.step = 0, 0
        self.epochs: tuple[Epoch, ...] = ()
        self.test: Accuracy | None = None
        self.kept = False  # whether there is a checkpoint
        self.epoch_s, self.seconds_before, self.test_s = 0.0, 0.0, 0.0
        self.pace = _Pace(min(_LOOK_S, self.options.checkpoint_s))
        self.began = self.looked = self.saved = clock()

    def restore(self, found: tuple[Checkpoint, dict[str, Any]] | None) -> None:
        """Takes the state of a checkpoint, and makes one network of those of all ranks."""
        if found is not None:
            checkpoint, tensors = found
            self.kept = True
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(tensors["optimizer"])
            self.scaler.load_state_dict(tensors["scaler"])
            if self.average is not None:
                self.average.load(tensors["average"])
            self.epoch, self.step = checkpoint.epoch, checkpoint.step
            self.epochs, self.test = checkpoint.epochs, checkpoint.test
            self.epoch_s, self.seconds_before = checkpoint.epoch_s, checkpoint.seconds
            if len(checkpoint.sums) == self.group.world:
                self.sums.copy_(torch.tensor(checkpoint.sums[self.group.rank], dtype=torch.float64))
            elif self.group.first:
                # Another number of processes wrote it; what they counted goes on here.
                self.sums.copy_(torch.tensor(checkpoint.sums, dtype=torch.float64).sum(dim=0))
        if self.group.world > 1:
            devices = [self.group.device] if self.group.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
            self.forward = self.parallel
        if self.options.compiled:
            self.forward = torch.compile(self.forward, dynamic=False)

    def run(self) -> Training:
        """All epochs that are left, and the end."""
        curves: AbstractContextManager[_Curves | None] = nullcontext()
        if self.group.first:
            # A process that was killed may have written more epochs, or fewer, than the checkpoint knows.
            self.folder.write_epochs(self.epochs)
            curves = _Curves(self.folder.tensorboard, self.epochs)
        with curves as drawn, _stoppable(alone=self.group.world == 1) as stop:
            while self.epoch < self.recipe.epochs:
                self._end_epoch(self._train_epoch(stop), drawn)
                if stop.wanted and self.epoch < self.recipe.epochs:
                    raise self._stopped()
        share_problems: Any = getattr(self.data, "share_problems", None)
        problems = None if share_problems is None else share_problems()
        return self.group.on_first(lambda: self._finish(problems))

    def _finish(self, problems: Problems | None) -> Training:
        assert self.test is not None
        training = Training(
            arch=self.asked.arch,
            facts_hash=self.asked.facts_hash,
            recipe=self.recipe,
            data=self.data.name,
            data_title=self.data.title,
            data_sha256=self.data.sha256,
            seed=self.asked.seed,
            options=self.options,
            epochs=self.epochs,
            test=self.test,
            seconds=self._seconds(),
            weights=str(self.folder.weights),
            world=self.group.world,
            problems=problems,
            **versions(),
        )
        metadata = {
            "arch": self.facts.name,
            # Of the network that is in the file: with the data's classes and image size.
            "facts_hash": self.facts.facts_hash,
            "num_classes": str(self.facts.num_classes),
            "input_chw": "x".join(map(str, self.facts.input_chw)),
            "data": self.data.name,
            "data_sha256": self.data.sha256,
            "recipe": self.recipe.name,
            "recipe_hash": recipe_hash(self.recipe),
            "seed": str(self.asked.seed),
            **versions(),
        }
        if self.image is not None:
            metadata["image"] = msgspec.json.encode(self.image).decode()
        with self._averaged():
            return self.folder.finish(training, self.model.state_dict(), metadata)

    # --------------------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, stop: "_Stop") -> "_Means":
        """The steps of this epoch that are left."""
        recipe, group = self.recipe, self.group
        self.model.train()
        self.looked = self.clock()
        self.pace.begin(self.step)
        batches = self.data.train_batches(
            batch=recipe.batch,
            seed=self.asked.seed,
            epoch=self.epoch,
            device=group.device,
            augmentation=Augmentation(crop_pad=recipe.crop_pad, flip=recipe.flip, cutout=recipe.cutout),
            first=self.step,
            rank=group.rank,
            world=group.world,
        )
        # A loader may have processes of its own to end.
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for images, labels in batches:
                self._train_step(images, labels)
                self.step += 1
                if self.step == self.steps:
                    return self._look(stop)
                if self.pace.due(self.step):
                    self._look(stop)
        raise TrainingError(f"{self._where()}: {self.data.title} gave no more images; is it still what it was?")

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        recipe, options, device = self.recipe, self.options, self.group.device
        _reseed(device, self.asked.seed, self.epoch, self.step, self.group.rank)
        lr = self._lr(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        parts = options.accumulate
        for part, (some, theirs) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
            # Gradients travel between processes once, with those of the last part.
            waits = self.parallel is not None and part < parts
            with self.parallel.no_sync() if waits and self.parallel is not None else nullcontext():
                with torch.autocast(device.type, dtype=_AMP[options.amp], enabled=options.amp != "off"):
                    logits = self.forward(some)
                    loss = F.cross_entropy(logits, theirs, label_smoothing=recipe.label_smoothing)
                self.scaler.scale(loss if parts == 1 else loss / parts).backward()  # type: ignore[no-untyped-call]
            # Sums stay on the device, for nothing in a step may wait for it.
            self.losses.add_(loss.detach(), alpha=1 / (parts * self.group.world))
            self.right += (logits.detach().argmax(1) == theirs).sum()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()

    def _end_epoch(self, means: "_Means", curves: "_Curves | None") -> None:
        """Tests the network and writes down what the epoch was."""
        began = self.clock()
        with self._averaged():
            self.test = evaluate(
                self.model,
                self.data,
                batch=self._test_batch(),
                device=self.group.device,
                amp=self.options.amp,
                channels_last=self.options.channels_last,
            )
        self.test_s = self.clock() - began
        epoch = Epoch(
            epoch=self.epoch + 1,
            lr=self._lr(self.steps - 1),
            train_loss=means.loss,
            train_top1_pct=means.top1_pct,
            test_loss=self.test.loss,
            test_top1_pct=self.test.top1_pct,
            test_top5_pct=self.test.top5_pct,
            seconds=self.epoch_s,
            images_per_s=_per_second(self.steps * self.recipe.batch, self.epoch_s),
        )
        self.epochs += (epoch,)
        if curves is not None:
            curves.add(epoch)
        self.epoch, self.step, self.epoch_s = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self._save(((0.0, 0.0),) * self.group.world)
        if self.group.first:
            self.folder.write_epochs(self.epochs)
            told = Progress(
                epoch=epoch.epoch,
                epochs=self.recipe.epochs,
                step=self.steps,
                steps=self.steps,
                images_per_s=epoch.images_per_s,
                eta_s=self._eta_s(),
                loss=epoch.train_loss,
                top1_pct=epoch.train_top1_pct,
                last=epoch,
            )
            self.report(told)

    def _test_batch(self) -> int:
        """Images per pass of a test, over all ranks."""
        # Without gradients so many take no more memory than a training step.
        batch = 4 * self.recipe.batch // self.options.accumulate
        # One process decodes a folder's batch, and several batches wait in shared memory.
        return batch if self.image is None else min(batch, _FOLDER_TEST_BATCH * self.group.world)

    # ---------------------------------------------------------------------------------------------------------- looking

    def _look(self, stop: "_Stop") -> "_Means":
        """Waits for the device, sees with all ranks how far things are, and does what is due."""
        own = self.sums.tolist()
        now = self.clock()
        due = now - self.saved >= self.options.checkpoint_s
        distance = self.pace.next_distance(self.step, now - self.looked)
        rows = self.group.rows([*own, float(stop.wanted), float(due), float(distance)])
        stop.wanted = any(row[2] for row in rows)
        due, distance = bool(rows[0][3]), int(rows[0][4])
        sums = tuple((row[0], row[1]) for row in rows)
        means = _Means(
            loss=math.fsum(losses for losses, _ in sums) / self.step,
            top1_pct=100 * math.fsum(right for _, right in sums) / (self.step * self.recipe.batch),
        )
        if not math.isfinite(means.loss):
            raise self._diverged(f"the loss is {means.loss}")
        elapsed = now - self.looked
        self.epoch_s += elapsed
        done = self.pace.looked(self.step, elapsed, distance)
        if self.group.first:
            self.report(
                Progress(
                    epoch=self.epoch + 1,
                    epochs=self.recipe.epochs,
                    step=self.step,
                    steps=self.steps,
                    images_per_s=_per_second(done * self.recipe.batch, elapsed),
                    eta_s=self._eta_s(),
                    loss=means.loss,
                    top1_pct=means.top1_pct,
                    last=self.epochs[-1] if self.epochs else None,
                )
            )
        # At an epoch's end a checkpoint follows anyway, once the network has been tested.
        if self.step < self.steps and (due or stop.wanted):
            self._save(sums)
            if stop.wanted:
                raise self._stopped()
        self.looked = self.clock()
        return means

    def _save(self, sums: tuple[tuple[float, float], ...]) -> None:
        """Writes a checkpoint, unless the weights are worth none."""
        weights = [parameter.detach() for parameter in self.model.parameters()]
        if not get_total_norm(weights, math.inf).isfinite():
            raise self._diverged("weights are not finite")
        self.saved = self.clock()
        if not self.group.first:
            self.kept = True
            return
        checkpoint = Checkpoint(
            epoch=self.epoch,
            step=self.step,
            sums=sums,
            epoch_s=self.epoch_s,
            seconds=self._seconds(),
            epochs=self.epochs,
            test=self.test,
        )
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state,
        }
        self.folder.save(checkpoint, tensors)
        self.kept = True

    def _lr(self, step: int) -> float:
        return lr_at(self.recipe, self.epoch + step / self.steps)

    def _seconds(self) -> float:
        return self.seconds_before + self.clock() - self.began

    def _eta_s(self) -> float | None:
        step_s = self.pace.step_s
        if step_s is None:
            return None
        left = self.recipe.epochs - self.epoch
        return (left * self.steps - self.step) * step_s + left * self.test_s

    def _averaged(self) -> AbstractContextManager[None]:
        """The weights' average in their place, where the recipe has one."""
        return nullcontext() if self.average is None else self.average.in_place()

    # ----------------------------------------------------------------------------------------------------------- errors

    def _where(self) -> str:
        at = (
            f"epoch {min(self.epoch + 1, self.recipe.epochs)} of {self.recipe.epochs}, step {self.step} of {self.steps}"
        )
        rank = f", rank {self.group.rank} of {self.group.world}" if self.group.world > 1 else ""
        return f"{self.asked.arch}, {at}{rank}"

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{self._where()}: {what}: the training has diverged; take a recipe with a smaller learning rate or a "
            f"warm-up, or no mixed precision ({'the last checkpoint is intact' if self.kept else _NONE_KEPT})"
        )

    def _stopped(self) -> TrainingStoppedError:
        return TrainingStoppedError(
            f"{self._where()}: stopped; everything is saved in {self.folder.path}: the same command goes on from there"
        )

    def _next(self) -> str:
        """What the same command does after an error that leaves no new checkpoint."""
        if self.kept:
            return "the same command goes on from the last checkpoint"
        return f"{_NONE_KEPT}, so the same command begins anew"

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Says in one line what ended a training that is no fault of the program, and what is left of it."""
        try:
            yield
        except KeyboardInterrupt:
            raise TrainingStoppedError(f"{self._where()}: interrupted; {self._next()}") from None
        except NotFiniteError:
            # The loss was still finite before the last steps.
            raise self._diverged("logits of test images are not finite") from None
        except (SelabError, BrokenPipeError):
            # Whoever read the reports has gone: no fault of the training.
            raise
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or first_line(error)
            raise TrainingError(f"{self._where()}: {what}; put it right: {self._next()}") from error
        except (RuntimeError, MemoryError) as error:
            if lost_another(error):
                raise TrainingError(
                    f"{self._where()}: another process is gone or hangs ({first_line(error)}); start all of them "
                    f"again: {self._next()}"
                ) from error
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise OutOfMemoryError(
                    f"{self._where()}: out of memory with {self.recipe.batch} images per step; split it: "
                    f"--accumulate {2 * self.options.accumulate}"
                ) from error
            raise ModelError(f"{self._where()}: the network fails: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class _Means:
    """Of an epoch's steps so far."""

    loss: float
    top1_pct: float


class _Pace:
    """When to look: at steps that all ranks know beforehand, as far apart as rank 0's clock says."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._distance, self._last, self._next = 1, 0, 1
        self._steps, self._seconds, self._warm = 0, 0.0, False

    @property
    def step_s(self) -> float | None:
        """Seconds per step, the first look of this process left out: it has waited for compilers and loaders."""
        return self._seconds / self._steps if self._steps else None

    def begin(self, step: int) -> None:
        """An epoch begins or goes on behind this step."""
        self._last, self._next = step, step + self._distance

    def due(self, step: int) -> bool:
        """Whether to look behind this step."""
        return step >= self._next

    def next_distance(self, step: int, elapsed_s: float) -> int:
        """Steps to the next look, if those since the last one took so long; at most twice as many as before."""
        wanted = (step - self._last) * self._every_s / elapsed_s if elapsed_s > 0 else math.inf
        return int(max(1, min(2 * self._distance, wanted)))

    def looked(self, step: int, elapsed_s: float, distance: int) -> int:
        """Notes a look; tells the steps since the last one."""
        done = step - self._last
        if self._warm:
            self._steps, self._seconds = self._steps + done, self._seconds + elapsed_s
        self._warm = True
        self._distance, self._last, self._next = distance, step, step + distance
        return done


def _per_second(images: int, seconds: float) -> float:
    return images / seconds if seconds > 0 else 0.0


class _Curves:
    """What TensorBoard shows, a point per epoch: drawn anew from those that are finished, whatever was there before."""

    def __init__(self, folder: Path, epochs: tuple[Epoch, ...]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, for it takes as long as a small training's epoch

        # Files of one second have no order, so that a killed process's points could come behind those of the next one.
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # The step tells a TensorBoard that is open to forget what it has read.
        self._writer = SummaryWriter(str(folder), purge_step=1)
        for epoch in epochs:
            self.add(epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where a full disk has ended the training, closing fails as well.
        with suppress(OSError) if kind is not None else nullcontext():
            self._writer.close()

    def add(self, epoch: Epoch) -> None:
        """Adds an epoch's points, onto the disk."""
        figures = msgspec.structs.asdict(epoch)
        del figures["epoch"], figures["seconds"]
        for name, value in figures.items():
            if value is not None:
                part, _, figure = name.partition("_")
                tag = f"{figure}/{part}" if part in ("train", "test") else name
                self._writer.add_scalar(tag, value, epoch.epoch)
        self._writer.flush()


class _Stop:
    """Whether somebody wants the training to stop."""

    wanted = False


@contextmanager
def _stoppable(*, alone: bool) -> Iterator[_Stop]:
    """Turns SIGINT and SIGTERM into a wish that is met between two steps.

    A second SIGINT is met at once, but for one process of several: there the terminal sends the first one and torchrun
    the second, which also ends those that take too long.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if alone and stop.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.wanted = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
