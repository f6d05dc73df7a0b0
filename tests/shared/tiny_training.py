"""A family of tiny networks, a recipe and images: trainings of a second."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file

from selab.training.data import ImageSet
from selab.training.recipe import Recipe
from selab.training.train import Options

FAMILY = """
family = "tiny"
source = "this test"
builder = "tiny_networks:build"
input_chw = [3, 8, 8]
num_classes = 7
[variants.plain]
title = "Without normalisation and dropout, so that a step is the mean of its images' steps"
[variants.se_plain]
title = "The same with SE"
baseline = "plain"
se = { sites = ["0", "3"], reduction = 2, bias = true }
[variants.lively]
title = "With batch norm and dropout"
arguments = { lively = true }
[variants.broken]
title = "That fails in its forward pass"
arguments = { broken = true }
"""

NETWORKS = """
from torch import nn

class Break(nn.Module):
    def forward(self, x):
        raise RuntimeError("the toy is broken")

def build(num_classes, lively=False, broken=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if lively else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.Dropout(0.3) if lively else nn.Identity(), nn.ReLU(),
        nn.Flatten(), Break() if broken else nn.Identity(), nn.Linear(8 * 4 * 4, num_classes),
    )
"""

RECIPE = Recipe(
    name="tiny",
    title="Tiny",
    source="this test",
    where="above",
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-3,
    batch=16,
    epochs=3,
    schedule="cosine",
    crop_pad=1,
    flip=True,
)
OPTIONS = Options(threads=1)
# 100 images make 6 steps of 16 in an epoch, and 4 that are left out.
TRAIN, TEST, STEPS = 100, 30, 6


def images(*, classes=4):
    draw = np.random.default_rng(0)
    return ImageSet(
        name="tiny",
        title="tiny",
        sha256="0" * 64,
        official=False,
        num_classes=classes,
        train_images=torch.from_numpy(draw.integers(0, 256, (TRAIN, 3, 8, 8), np.uint8)),
        train_labels=torch.from_numpy(draw.integers(0, classes, TRAIN)),
        test_images=torch.from_numpy(draw.integers(0, 256, (TEST, 3, 8, 8), np.uint8)),
        test_labels=torch.from_numpy(draw.integers(0, classes, TEST)),
        mean=(127.5,) * 3,
        std=(64.0,) * 3,
    )


def tensors(training):
    return load_file(training.weights)


def same(first, second):
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_times(epochs):
    return [msgspec.structs.replace(epoch, seconds=0.0, images_per_s=0.0) for epoch in epochs]


def lines_without_times(folder):
    lines = [json.loads(line) for line in (Path(folder) / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


@dataclass
class At:
    """A report that does something once, at one step."""

    epoch: int
    step: int
    do: object
    done: bool = False

    def __call__(self, progress):
        if (progress.epoch, progress.step) == (self.epoch, self.step) and not self.done:
            self.done = True
            self.do()


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def points(folder):
    """What TensorBoard shows of a training: by tag, (epoch, value) in the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "images_per_s"]
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags}
