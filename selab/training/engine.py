"""One training while it runs: its steps, tests, checkpoints and reports."""

import hashlib
import math
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from selab import units
from selab.errors import ModelError, OutOfMemoryError, SelabError
from selab.fusion.fuse import fuse
from selab.meta import first_line
from selab.models.build import build
from selab.models.spec import Variant
from selab.training.augment import Augmentation
from selab.training.batches import BatchPlan
from selab.training.curves import EpochCurves
from selab.training.data import Data, scaled
from selab.training.distributed import ProcessGroup, lost_another
from selab.training.evaluate import AMP_TYPES, NotFiniteError, evaluate
from selab.training.interrupt import StopRequest, stoppable
from selab.training.objective import Forward, objective_of
from selab.training.optim import Average, draw_he, optimizer_of
from selab.training.pace import Means, Pace, per_second
from selab.training.problems import Problems
from selab.training.progress import Report, TrainingProgress
from selab.training.recipe import BoxRecipe, ImageRecipe, Recipe, lr_at, recipe_hash
from selab.training.record import Accuracy, Epoch, tested
from selab.training.resume import mistaken_progress, mistaken_tensors, optimizer_state
from selab.training.run import (
    Checkpoint,
    DivergedError,
    RunConfig,
    RunFolder,
    Training,
    TrainingError,
    TrainingStoppedError,
    versions,
)

# Seconds between two reports. Each makes the host wait for the device.
_LOOK_S = 0.5
# Test images of a folder in one pass of one process.
_FOLDER_TEST_BATCH = 256
_NONE_KEPT = "no checkpoint was written yet"


class Engine:
    """One training while it runs. Every rank has one, and all take the same decisions at the same steps.

    Args:
        variant: the network; its classes and input size become those of the data.
        data: what to train and test on.
        config: what was asked for.
        group: the processes of this training.
        folder: where it keeps its files.
        report: called about twice a second, on rank 0.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        variant: Variant,
        data: Data,
        config: RunConfig,
        group: ProcessGroup,
        folder: RunFolder,
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self.data, self.config, self.group, self.folder = scaled(data, config.recipe.scaling), config, group, folder
        self.recipe, self.options = config.recipe, config.options
        self.report, self.clock = report, clock
        self.judged: str = getattr(data, "judged", "test")
        # Only image folders, and images with boxes, state how their images are prepared.
        self.image: ImageRecipe | None = getattr(data, "image", None)
        self.boxes: BoxRecipe | None = getattr(data, "boxes", None)
        model, self.facts = _network(variant, data, self.recipe, config.seed)
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        self.objective = objective_of(data, self.recipe, name=config.arch, channels_last=self.options.channels_last)
        self.objective.prepare(model)
        self.model = model.to(group.device, memory_format=layout)  # type: ignore[call-overload]
        if self.options.fused:
            fuse(self.model, input_nchw=(self.recipe.batch // self.options.accumulate, *data.input_chw))
        self.optimizer = optimizer_of(self.model, self.recipe)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=self.options.amp == "fp16")
        self.average = None if self.recipe.ema is None else Average(self.model, self.recipe.ema)
        self.parallel: DistributedDataParallel | None = None
        self.forward: Forward = self.model
        self.sums = torch.zeros(2, dtype=torch.float64, device=group.device)
        self.losses, self.right = self.sums.unbind()
        self.steps = data.train_size // self.recipe.batch
        self.epoch, self.step = 0, 0
        self.epochs: tuple[Epoch, ...] = ()
        self.test: Accuracy | None = None
        self.kept = False  # whether there is a checkpoint
        self.tested = False  # by this process
        self.epoch_s, self.seconds_before, self.test_s = 0.0, 0.0, 0.0
        self.pace = Pace(min(_LOOK_S, self.options.checkpoint_s))
        self.began = self.looked = self.saved = clock()

    def start_from(self, weights: Path, variant: Variant) -> tuple[str, ...]:
        """Load the weights that a training starts from.

        Args:
            weights: a file.
            variant: as named.

        Returns:
            The keys that were left out: of a classifier of another number of classes, or of a detector's backbone.

        Raises:
            WeightsError: they do not fit.
        """
        dropped = self.objective.start_from(self.model, weights, variant, self.facts)
        if self.average is not None:
            self.average.load(self.model.state_dict())
        return dropped

    def restore(self, found: tuple[Checkpoint, dict[str, Any]] | None) -> None:
        """Load a checkpoint, if there is one, and join the networks of all ranks.

        Args:
            found: a checkpoint and its tensors, None to begin anew.

        Raises:
            TrainingError: the checkpoint is not of this training, or holds impossible values; nothing of it is used.
        """
        if found is not None:
            checkpoint, tensors = found
            self.kept = True
            self._check(checkpoint, tensors)
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(optimizer_state(tensors["optimizer"], self.optimizer))
            self.scaler.load_state_dict(tensors["scaler"])
            if self.average is not None:
                self.average.load(tensors["average"])
            self.epoch, self.step = checkpoint.epoch, checkpoint.step
            self.epochs, self.test = checkpoint.epochs, checkpoint.test
            self.epoch_s, self.seconds_before = checkpoint.epoch_s, checkpoint.seconds
            if len(checkpoint.sums) == self.group.world:
                self.sums.copy_(torch.tensor(checkpoint.sums[self.group.rank], dtype=torch.float64))
            elif self.group.first:
                # Another number of processes wrote it; their sums continue here.
                self.sums.copy_(torch.tensor(checkpoint.sums, dtype=torch.float64).sum(dim=0))
        if self.group.world > 1:
            devices = [self.group.device] if self.group.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
            self.forward = self.parallel
        if self.options.compiled:
            self.forward = torch.compile(self.forward, dynamic=False)
        if self.options.graphed:
            self._capture()

    def _capture(self) -> None:
        """Replace the network's passes in training mode by CUDA graphs, which start all kernels of a pass at once.

        Warming up runs the network on images of zeros, so its buffers are put back afterwards.

        Raises:
            ModelError: it cannot be captured, for example because it waits for a value on the host.
        """
        images = self.recipe.batch // self.options.accumulate
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        example = torch.zeros(images, *self.data.input_chw, device=self.group.device).contiguous(memory_format=layout)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.model.train()
        amp = self.options.amp
        try:
            # A cached cast of a weight would be kept in the graph, and later weights not be seen.
            with torch.autocast("cuda", dtype=AMP_TYPES[amp], enabled=amp != "off", cache_enabled=False):
                torch.cuda.make_graphed_callables(self.model, (example,))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{self.config.arch}: cannot be captured as a CUDA graph ({first_line(error)}); leave out --cuda-graph"
            ) from error
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _check(self, checkpoint: Checkpoint, tensors: object) -> None:
        average = None if self.average is None else self.average.state
        try:
            wrong = next(mistaken_progress(checkpoint, self.recipe, self.data), None) or next(
                mistaken_tensors(tensors, self.model, self.optimizer, self.scaler, average), None
            )
        except Exception as error:
            # The file is untrusted: values may fail a comparison in any way.
            wrong = f"is malformed ({type(error).__name__}: {first_line(error)})"
        if wrong is not None:
            raise TrainingError(f"{self.folder.checkpoint}: {wrong}; restore it, or delete it to start over")

    def run(self) -> Training:
        """Train the remaining epochs and write the result.

        Raises:
            TrainingStoppedError: it was asked to stop.
            DivergedError: the loss or the weights are not finite.
            TrainingError: the data ended early.
        """
        curves: AbstractContextManager[EpochCurves | None] = nullcontext()
        if self.group.first:
            # A process that was killed may have written more epochs, or fewer, than the checkpoint knows.
            self.folder.write_epochs(self.epochs)
            curves = EpochCurves(self.folder.tensorboard, self.epochs)
        with curves as drawn, stoppable(alone=self.group.world == 1) as stop:
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
            arch=self.config.arch,
            facts_hash=self.config.facts_hash,
            recipe=self.recipe,
            data=self.data.name,
            data_title=self.data.title,
            data_sha256=self.data.sha256,
            seed=self.config.seed,
            options=self.options,
            epochs=self.epochs,
            test=self.test,
            seconds=self._seconds(),
            weights=str(self.folder.weights),
            world=self.group.world,
            problems=problems,
            start_sha256=self.config.start_sha256,
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
            "seed": str(self.config.seed),
            **versions(),
        }
        if self.config.start_sha256:
            metadata["start_sha256"] = self.config.start_sha256
        if self.recipe.scaling != "channel":
            metadata["scaling"] = self.recipe.scaling
        if self.image is not None:
            metadata["image"] = msgspec.json.encode(self.image).decode()
        if self.boxes is not None:
            metadata["boxes"] = msgspec.json.encode(self.boxes).decode()
        with self._averaged():
            return self.folder.finish(training, self.model.state_dict(), metadata)

    # --------------------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, stop: StopRequest) -> Means:
        """Train the remaining steps of this epoch."""
        recipe, group = self.recipe, self.group
        self.model.train()
        self.looked = self.clock()
        self.pace.begin(self.step)
        plan = BatchPlan(
            batch=recipe.batch,
            seed=self.config.seed,
            epoch=self.epoch,
            first=self.step,
            rank=group.rank,
            world=group.world,
        )
        augmentation = Augmentation(crop_pad=recipe.crop_pad, fill=recipe.fill, flip=recipe.flip, cutout=recipe.cutout)
        batches = self.data.train_batches(plan, device=group.device, augmentation=augmentation)
        # Closing ends a loader's worker processes.
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for images, labels in batches:
                self._train_step(images, labels)
                self.step += 1
                if self.step == self.steps:
                    return self._look(stop)
                if self.pace.due(self.step):
                    self._look(stop)
        raise TrainingError(f"{self._where()}: {self.data.title} gave no more images; has the data changed?")

    def _train_step(self, images: Any, labels: Any) -> None:
        options, device = self.options, self.group.device
        _reseed(device, self.config.seed, self.epoch, self.step, self.group.rank)
        lr = self._lr(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts = options.accumulate
        for part, (some, theirs) in enumerate(self.objective.parts(images, labels, parts), start=1):
            # Processes exchange gradients once, with those of the last part.
            waits = self.parallel is not None and part < parts
            with self.parallel.no_sync() if waits and self.parallel is not None else nullcontext():
                with torch.autocast(device.type, dtype=AMP_TYPES[options.amp], enabled=options.amp != "off"):
                    loss, right = self.objective.loss(self.forward, some, theirs)
                self.scaler.scale(loss if parts == 1 else loss / parts).backward()  # type: ignore[no-untyped-call]
            # Sums stay on the device: a step must not wait for it.
            self.losses.add_(loss.detach(), alpha=1 / (parts * self.group.world))
            if right is not None:
                self.right += right
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()

    def _end_epoch(self, means: Means, curves: EpochCurves | None) -> None:
        """Test the network and record the epoch."""
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
        self.test_s, self.tested = self.clock() - began, True
        epoch = Epoch(
            epoch=self.epoch + 1,
            lr=self._lr(self.steps - 1),
            train_loss=means.loss,
            train_top1_pct=means.top1_pct,
            **tested(self.test),
            seconds=self.epoch_s,
            images_per_s=per_second(self.steps * self.recipe.batch, self.epoch_s),
        )
        self.epochs += (epoch,)
        if curves is not None:
            curves.add(epoch)
        self.epoch, self.step, self.epoch_s = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self._save(((0.0, 0.0),) * self.group.world)
        if self.group.first:
            self.folder.write_epochs(self.epochs)
            progress = TrainingProgress(
                epoch=epoch.epoch,
                epochs=self.recipe.epochs,
                step=self.steps,
                steps=self.steps,
                images_per_s=epoch.images_per_s,
                eta_s=self._eta_s(),
                epoch_s=self._epoch_s(),
                loss=epoch.train_loss,
                top1_pct=epoch.train_top1_pct,
                last=epoch,
                judged=self.judged,
            )
            self.report(progress)

    def _test_batch(self) -> int:
        """Return the images per test batch, over all ranks."""
        # Without gradients, this takes no more memory than a training step.
        batch = 4 * self.recipe.batch // self.options.accumulate
        if self.boxes is not None:
            # Images of many sizes are padded to the largest one.
            return self.recipe.batch // self.options.accumulate
        # One worker decodes a whole batch, and several batches wait in shared memory.
        return batch if self.image is None else min(batch, _FOLDER_TEST_BATCH * self.group.world)

    # ---------------------------------------------------------------------------------------------------------- looking

    def _look(self, stop: StopRequest) -> Means:
        """Wait for the device, agree with all ranks on the progress, report it, and save where that is due."""
        own = self.sums.tolist()
        now = self.clock()
        due = now - self.saved >= self.options.checkpoint_s
        distance = self.pace.next_distance(self.step, now - self.looked)
        rows = self.group.rows([*own, float(stop.wanted), float(due), float(distance)])
        stop.wanted = any(row[2] for row in rows)
        due, distance = bool(rows[0][3]), int(rows[0][4])
        sums = tuple((row[0], row[1]) for row in rows)
        right = math.fsum(right for _, right in sums)
        means = Means(
            loss=math.fsum(losses for losses, _ in sums) / self.step,
            top1_pct=100 * right / (self.step * self.recipe.batch) if self.objective.counts_right else None,
        )
        if not math.isfinite(means.loss):
            raise self._diverged(f"the loss is {means.loss}")
        elapsed = now - self.looked
        self.epoch_s += elapsed
        done = self.pace.looked(self.step, elapsed, distance)
        if self.group.first:
            self.report(
                TrainingProgress(
                    epoch=self.epoch + 1,
                    epochs=self.recipe.epochs,
                    step=self.step,
                    steps=self.steps,
                    images_per_s=per_second(done * self.recipe.batch, elapsed),
                    eta_s=self._eta_s(),
                    epoch_s=self._epoch_s(),
                    loss=means.loss,
                    top1_pct=means.top1_pct,
                    last=self.epochs[-1] if self.epochs else None,
                    judged=self.judged,
                )
            )
        # The end of an epoch is saved after its test.
        if self.step < self.steps and (due or stop.wanted):
            self._save(sums)
            if stop.wanted:
                raise self._stopped()
        self.looked = self.clock()
        return means

    def _save(self, sums: tuple[tuple[float, float], ...]) -> None:
        """Write a checkpoint, unless weights are not finite."""
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

    def _epoch_s(self) -> float | None:
        step_s = self.pace.step_s
        # Before the first test in this process, its time is unknown.
        return None if step_s is None or not self.tested else self.steps * step_s + self.test_s

    def _averaged(self) -> AbstractContextManager[None]:
        """Replace the weights by their moving average, where the recipe has one."""
        return nullcontext() if self.average is None else self.average.in_place()

    # ----------------------------------------------------------------------------------------------------------- errors

    def _where(self) -> str:
        at = (
            f"epoch {min(self.epoch + 1, self.recipe.epochs)} of {self.recipe.epochs}, step {self.step} of {self.steps}"
        )
        rank = f", rank {self.group.rank} of {self.group.world}" if self.group.world > 1 else ""
        return f"{self.config.arch}, {at}{rank}"

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{self._where()}: {what}: the training has diverged; use a recipe with a smaller learning rate or a "
            f"warm-up, or no mixed precision ({'the last checkpoint is intact' if self.kept else _NONE_KEPT})"
        )

    def _stopped(self) -> TrainingStoppedError:
        return TrainingStoppedError(
            f"{self._where()}: stopped; everything is saved in {self.folder.path}: the same command resumes there"
        )

    def _next(self) -> str:
        """Say what the same command does after an error that leaves no new checkpoint."""
        if self.kept:
            return "the same command resumes at the last checkpoint"
        return f"{_NONE_KEPT}, so the same command starts over"

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Turn what ends a training, short of a bug in this package, into an error of one line.

        Raises:
            TrainingStoppedError: on KeyboardInterrupt.
            DivergedError: logits of test images are not finite.
            TrainingError: a file cannot be read or written, or another process is gone.
            OutOfMemoryError: the device's memory is full.
            ModelError: the network fails.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise TrainingStoppedError(f"{self._where()}: interrupted; {self._next()}") from None
        except NotFiniteError:
            # The loss was still finite before the last steps.
            raise self._diverged("logits of test images are not finite") from None
        except (SelabError, BrokenPipeError):
            # A broken pipe: the reader of the reports has gone, which is no fault of the training.
            raise
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or first_line(error)
            raise TrainingError(f"{self._where()}: {what}; solve this, then {self._next()}") from error
        except (RuntimeError, MemoryError) as error:
            raise self._failure(error) from error

    def _failure(self, error: RuntimeError | MemoryError) -> SelabError:
        if lost_another(error):
            return TrainingError(
                f"{self._where()}: another process is gone or hangs ({first_line(error)}); start all of them "
                f"again: {self._next()}"
            )
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            return OutOfMemoryError(
                f"{self._where()}: out of memory with {units.counted(self.recipe.batch, 'image')} per step; split it: "
                f"--accumulate {2 * self.options.accumulate}"
            )
        return ModelError(f"{self._where()}: the network fails: {first_line(error)}")


def _network(variant: Variant, data: Data, recipe: Recipe, seed: int) -> tuple[nn.Module, Variant]:
    """Return the network for this data with its initial weights, and its facts."""
    fitting = msgspec.structs.replace(variant, num_classes=data.num_classes, input_chw=data.input_chw)
    model = build(fitting, seed=seed).model
    if recipe.init == "he":
        bare = msgspec.structs.replace(fitting, se=None)
        # Attention blocks keep the initial values that their kind asks for.
        draw_he(model, seed=seed, only=build(bare, device="meta").model.state_dict().keys())
    return model, fitting


def _reseed(device: torch.device, seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed the generator that dropout draws from, and no other device's."""
    digest = hashlib.sha256(struct.pack("<Q3q", seed, epoch, step, rank)).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)
