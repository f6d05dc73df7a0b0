"""How long a training will take, from a few steps of its network."""

import time
from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F

from selab.experiments.compare import Comparison, fitted
from selab.fusion.fuse import fuse
from selab.models.build import build
from selab.models.spec import Variant
from selab.training.data import Data
from selab.training.evaluate import AMP_TYPES
from selab.training.optim import optimizer_of
from selab.training.recipe import Recipe
from selab.training.record import Options, task_of
from selab.training.train import device_settings

_STEPS = 3


def training_s(variant: Variant, comparison: Comparison, *, threads: int | None = None) -> float | None:
    """Return about how many seconds one training of a comparison's network takes.

    Args:
        variant: one of the comparison's two networks.
        comparison: its data, recipe and options.
        threads: instead of those of the options.

    Returns:
        As `seconds_of`; None under `torchrun` too.
    """
    options = msgspec.structs.replace(comparison.plan.options, threads=threads or comparison.plan.options.threads)
    return None if comparison.group.world > 1 else seconds_of(variant, comparison.data, comparison.recipe, options)


def seconds_of(variant: Variant, data: Data, recipe: Recipe, options: Options) -> float | None:
    """Return about how many seconds a training takes: the fastest of three steps, for all.

    Random images are used, and neither augmentation nor checkpoints are in it.

    Args:
        variant: the network; one of its own is built.
        data: numbers and sizes of images.
        recipe: how it is trained, with the epochs that are meant.
        options: where.

    Returns:
        None where the images lie in a folder, whose decoding may take longer.
    """
    if getattr(data, "image", None) is not None or task_of(data) == "detection":
        return None
    device = torch.device(options.device)
    parts = options.accumulate
    with device_settings(options, device):
        model = build(fitted(variant, data)).model.to(device)
        optimizer = optimizer_of(model, recipe)
        images = torch.randn(max(1, recipe.batch // parts), *data.input_chw, device=device)
        labels = torch.zeros(len(images), dtype=torch.int64, device=device)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.contiguous(memory_format=torch.channels_last)
        if options.fused:
            fuse(model, input_nchw=(len(images), *data.input_chw))

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            for _ in range(parts):
                with torch.autocast(device.type, dtype=AMP_TYPES[options.amp], enabled=options.amp != "off"):
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        def look() -> None:
            with torch.no_grad():
                model(images)

        model.train()
        step_s = _fastest(step, device)
        model.eval()
        look_s = _fastest(look, device)
    steps, tests = data.train_size // recipe.batch, data.test_size / len(images)
    return recipe.epochs * (steps * step_s + tests * look_s)


def _fastest(call: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of the fastest of some calls, after one that warms up."""
    taken = []
    for _ in range(_STEPS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
