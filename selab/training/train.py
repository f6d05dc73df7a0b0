"""Train one network with a recipe: reproducible from its seed, resumable wherever it was stopped.

A step depends on (seed, epoch, step) alone: its images, their augmentation, dropout and the learning rate. A killed
training therefore resumes from its last checkpoint with the numbers it would have had, to the bit on a CPU. For the
same reason two networks that are compared see the same images in the same order.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from selab import units
from selab.errors import SelabError
from selab.models.spec import Variant
from selab.training.augment import check_seed
from selab.training.data import Data
from selab.training.distributed import PATIENCE_S, join
from selab.training.engine import Engine
from selab.training.progress import Report, TrainingProgress
from selab.training.recipe import Recipe
from selab.training.record import Epoch, Options, task_of
from selab.training.run import (
    DivergedError,
    Training,
    TrainingError,
    TrainingStoppedError,
    opened,
    run_config,
)

__all__ = [
    "DivergedError",
    "Epoch",
    "Options",
    "Training",
    "TrainingError",
    "TrainingProgress",
    "TrainingStoppedError",
    "train",
]


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
    weights: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = PATIENCE_S,
) -> Training:
    """Train a variant, or resume an earlier call with the same arguments.

    The same call on the same machine with the same number of threads gives the same weights, to the bit on a CPU,
    however often it was interrupted. A variant and its baseline of one seed share the initial values of their common
    layers, and the order and augmentation of the images.

    Under `torchrun` all processes train one network, each on its part of every batch. Batch norm then takes its
    statistics over each process's part, as over each micro-batch where gradients are accumulated. The running
    statistics that are kept are those of rank 0.

    On SIGINT and SIGTERM the running step is finished and everything is saved. A second SIGINT stops a process that
    trains alone at once. The caller's random state, threads and backend flags are restored.

    Args:
        variant: the network; its classes and input size become those of the data.
        data: what to train and test on.
        recipe: how. The options may change its epochs and its batch.
        seed: of weights, order, augmentation and dropout; from 0 to 2^64 - 1.
        folder: of this training alone, see `selab.training.run`.
        options: what may change between machines.
        report: called about twice a second, on rank 0.
        say: called on rank 0 with one sentence if the training resumes or was finished before.
        weights: a file that the training starts from; None for random weights. A classifier of another number of
            classes is left out.
        clock: seconds since some moment.
        patience_s: after so many seconds without a sign of another process, this one gives up.

    Raises:
        TrainingStoppedError: it was interrupted; the message says what is saved.
        DivergedError: the loss, the weights or the logits of test images are not finite.
        TrainingError: the folder is another training's, or in use; the batch cannot be divided; another process is
            gone; the data end early. The last checkpoint is intact, where there is one.
        SpecError, InsertionError, ModelError: the network cannot be built, or fails on these images.
        OutOfMemoryError, DeviceError: the machine.
        SelabError: the data cannot be read, or the folder not be written; the last checkpoint is intact.
    """
    config = run_config(variant, data, recipe, seed=seed, options=options, weights=weights)
    group = join(options.device, patience_s=patience_s)
    check_seed(config.seed)
    started = bool(config.start_sha256)
    check_request(variant.name, config.recipe, config.options, data, started=started, world=group.world)
    with ExitStack() as stack:
        held = group.on_first(lambda: stack.enter_context(opened(folder, config)))
        finished = group.on_first(held.training)
        if finished is not None:
            if group.first:
                say(f"already finished: {folder}")
            return finished
        stack.enter_context(device_settings(options, group.device))
        engine = Engine(variant, data, config, group, held, report, clock)
        with engine.clear_errors():
            found = group.on_first(held.load)
            if found is None and weights is not None:
                try:
                    dropped = engine.start_from(weights, variant)
                except SelabError:
                    group.on_first(held.discard)
                    raise
                if dropped and group.first:
                    classes = units.counted(data.num_classes, "class", "classes")
                    # Keys of its own are of layers with an output for each class, others of the backbone's classifier.
                    own = not engine.model.state_dict().keys().isdisjoint(dropped)
                    why = f"for {classes}" if own else "a detector has heads of its own"
                    say(f"{weights}: {', '.join(dropped)} left out, {why}")
            engine.restore(found)
            if found is not None and group.first:
                say(f"resuming at epoch {min(engine.epoch + 1, config.recipe.epochs)}: {folder}")
            return engine.run()


def check_request(name: str, recipe: Recipe, options: Options, data: Data, *, started: bool, world: int) -> None:
    """Check that a training is possible, before anything of it is done.

    Args:
        name: of the network.
        recipe: as run.
        options: where.
        data: what to train on.
        started: whether it starts from given weights.
        world: how many processes share it.

    Raises:
        TrainingError: there are too few images, or the options, the recipe and the data do not go together.
    """
    if not data.train_size:
        wanted = getattr(data, "wanted", "name a data set that does")
        raise TrainingError(f"{data.title}: holds no training images; {wanted}")
    detector = task_of(data) == "detection"
    if detector and (options.compiled or options.graphed):
        asked = "--compile" if options.compiled else "--cuda-graph"
        raise TrainingError(f"{asked}: detectors choose boxes by their scores and are not captured; leave it out")
    if options.graphed and (options.device != "cuda" or options.compiled or world > 1):
        raise TrainingError(
            "--cuda-graph: is for one process on --device cuda, without --compile; leave out one or the other"
        )
    if detector and recipe.boxes is not None and recipe.boxes.freezes and not started:
        raise TrainingError(
            f"{name}: {recipe.name} keeps parts of the backbone as they are, and random weights would stay random; "
            "give those of the backbone's classifier (train --weights FILE, compare --weights NAME=FILE for each "
            "network), or a recipe with frozen_stages = 0 and frozen_norms = false"
        )
    parts = world * options.accumulate
    if options.accumulate < 1 or recipe.batch % parts:
        raise TrainingError(
            f"a batch of {recipe.batch} cannot be divided among {units.counted(world, 'process', 'processes')} "
            f"by {units.counted(options.accumulate, 'micro-batch', 'micro-batches')}; "
            "choose another --batch or --accumulate"
        )
    if recipe.batch > data.train_size:
        raise TrainingError(
            f"{data.title}: holds {data.train_size:,} training images, less than a batch of {recipe.batch:,}; "
            "choose a smaller --batch"
        )


@contextmanager
def device_settings(options: Options, device: torch.device) -> Iterator[None]:
    """Set threads and backends for a training; restore them and the random state at the end."""
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
