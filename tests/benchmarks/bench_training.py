"""How fast selab trains: whole steps against the same recipe in plain PyTorch with torchvision's loader, paired.

`python tests/benchmarks/bench_training.py --data DIR --out FILE` measures, on the same images, with the same optimizer
and batch, each way of training against plain PyTorch; prints how many times as fast it is and writes the raw samples.

plain      the loop of PyTorch's tutorials: torchvision's dataset and transforms in a DataLoader with two workers
selab      `selab train` as it is by default
jobs       `selab compare --jobs 2`: two trainings, each on half of the cores; images of both are counted
compiled   `selab train --compile`
bf16       `selab train --amp bf16`, where the processor computes in it
vmap       one batched step of two seeds, by torch.func.stack_module_state; images of both are counted

Each way is a process of its own that waits for the word to train on some images, so that none disturbs another. A
loader's workers start each time with nothing prefetched and end with nothing left to do. Threads are torch's own
choice, but for the two processes of `jobs`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.bench.machine import has_bf16, machine, read_cpu
from selab.bench.sampler import Plan, WallArm, measure
from selab.experiments.compare import fitted
from selab.models.build import build
from selab.models.catalog import find
from selab.records import verdict
from selab.records.files import write_atomically
from selab.records.types import Latency
from selab.training.augment import Augmentation
from selab.training.batches import BatchPlan
from selab.training.data import open_data
from selab.training.distributed import join
from selab.training.engine import Engine
from selab.training.optim import optimizer_of
from selab.training.recipe import find_recipe
from selab.training.record import Options
from selab.training.run import RunFolder, run_config
from selab.training.train import device_settings

ARCHES = {
    "small_cnn": "keras_cifar10_cnn",
    "resnet20_cifar": "cifar_resnet",
    "se_small_cnn": "keras_cifar10_cnn",
    "se_resnet20_cifar": "cifar_resnet",
}
"""Network → its recipe."""
IMAGES = 768
"""In a call of all processes together."""
WAYS: dict[str, int] = {"selab": 1, "jobs": 2, "compiled": 1, "vmap": 1}
"""Way → its processes."""
CPU = torch.device("cpu")

Trains = Callable[[int], None]
"""Trains on so many images."""


def plain(arch: str, data_dir: Path) -> Trains:
    """The loop of PyTorch's tutorials."""
    from bench_data import InMemory, first_images
    from torch.utils.data import DataLoader
    from torchvision import transforms

    recipe = find_recipe(ARCHES[arch])
    data = open_data("cifar10", data_dir=data_dir, download=False)
    change = [transforms.RandomCrop(32, padding=recipe.crop_pad), transforms.RandomHorizontalFlip()]
    loader = DataLoader(
        InMemory(first_images(data, IMAGES), transforms.Compose([*change, transforms.ToTensor()])),
        batch_size=recipe.batch,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    model = build(fitted(find(arch), data)).model.train()
    rate = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.RMSprop(model.parameters(), alpha=0.9, eps=1e-7, **rate)
        if recipe.optimizer == "rmsprop"
        else torch.optim.SGD(model.parameters(), **rate)
    )

    def train(_: int) -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return train


def ours(arch: str, data_dir: Path, options: Options) -> Trains:
    """The steps of selab's engine."""
    recipe = find_recipe(ARCHES[arch])
    data = open_data("cifar10", data_dir=data_dir, download=False)
    variant = find(arch)
    config = run_config(variant, data, recipe, seed=0, options=options)
    folder = RunFolder(Path(tempfile.mkdtemp()), config)
    engine = Engine(variant, data, config, join("cpu"), folder, lambda _: None, time.monotonic)
    engine.restore(None)
    engine.model.train()
    augmentation = Augmentation(crop_pad=recipe.crop_pad, fill=recipe.fill, flip=recipe.flip, cutout=recipe.cutout)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            plan = BatchPlan(batch=recipe.batch, seed=0, epoch=epoch)
            yield from engine.data.train_batches(plan, device=CPU, augmentation=augmentation)
            epoch += 1

    batches = endless()

    def train(images: int) -> None:
        for _ in range(images // recipe.batch):
            engine._train_step(*next(batches))

    return train


def batched(arch: str, data_dir: Path, seeds: int = 2) -> Trains:
    """One step of several networks at once; each has its own images, and all of them are counted."""
    from torch.func import functional_call, grad, stack_module_state, vmap

    recipe = find_recipe(ARCHES[arch])
    data = open_data("cifar10", data_dir=data_dir, download=False)
    models = [build(fitted(find(arch), data), seed=seed).model.train() for seed in range(seeds)]
    parameters, buffers = stack_module_state(models)
    common = models[0]
    augmentation = Augmentation(crop_pad=recipe.crop_pad, fill=recipe.fill, flip=recipe.flip, cutout=recipe.cutout)
    holder = nn.ParameterList(list(parameters.values()))
    optimizer = optimizer_of(holder, recipe)

    def loss(own: dict[str, Tensor], state: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(common, (own, state), (images,)), labels)

    gradients = vmap(grad(loss), randomness="different")

    def endless(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            plan = BatchPlan(batch=recipe.batch, seed=seed, epoch=epoch)
            yield from data.train_batches(plan, device=CPU, augmentation=augmentation)
            epoch += 1

    batches = [endless(seed) for seed in range(seeds)]

    def step() -> None:
        some = [next(one) for one in batches]
        images, labels = (torch.stack(part) for part in zip(*some, strict=True))
        detached = {key: value.detach() for key, value in parameters.items()}
        found = gradients(detached, buffers, images, labels)
        for key, value in parameters.items():
            value.grad = found[key]
        optimizer.step()

    def train(images: int) -> None:
        for _ in range(images // recipe.batch // seeds):
            step()

    return train


def serve(way: str, arch: str, data_dir: Path) -> None:
    """Train on as many images as each number says that comes in, and answer when it is done."""
    cores = torch.get_num_threads()
    threads = max(1, cores // WAYS["jobs"]) if way == "jobs" else cores
    options = Options(
        channels_last=True,
        fused=way in ("selab", "jobs"),
        compiled=way == "compiled",
        amp="bf16" if way == "bf16" else "off",
        threads=threads,
    )
    with device_settings(options, CPU):
        if way == "plain":
            train = plain(arch, data_dir)
        elif way == "vmap":
            train = batched(arch, data_dir)
        else:
            from selab.bench.heap import keep_freed

            keep_freed("cpu")
            train = ours(arch, data_dir, options)
        for line in sys.stdin:
            train(int(line))
            print("done", flush=True)


class Processes:
    """The processes of a way."""

    def __init__(self, way: str, arch: str, data_dir: Path) -> None:
        command = [sys.executable, __file__, "--serve", way, "--arch", arch, "--data", str(data_dir)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._each = [subprocess.Popen(command, **pipes) for _ in range(WAYS.get(way, 1))]

    def __call__(self) -> None:
        """Train on `IMAGES` images, all processes together."""
        for one in self._each:
            one.stdin.write(f"{IMAGES // len(self._each)}\n")
            one.stdin.flush()
        for one in self._each:
            if one.stdout.readline() != "done\n":
                raise SystemExit("a process has ended early; see its message above")

    def end(self) -> None:
        """End the processes."""
        for one in self._each:
            one.stdin.close()
            one.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that cifar-10-batches-bin is in")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds of sampling for each ratio")
    parser.add_argument("--arch", choices=[*ARCHES], action="append")
    parser.add_argument("--way", choices=[*WAYS, "bf16"], action="append")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.arch[0], options.data)
    here = machine()
    ways = options.way or [*WAYS, *(["bf16"] if has_bf16() else [])]
    plan = replace(Plan.for_cpu(), statistic="typical", target_half_width=0.02, budget_s=options.budget)
    before = read_cpu()
    found: dict[str, Latency] = {}
    for arch in options.arch or ARCHES:
        base, again = (Processes("plain", arch, options.data) for _ in range(2))
        control = measure(WallArm(call=base), WallArm(call=again), plan, seed=1)["wall"]
        again.end()
        for way in ways:
            other = Processes(way, arch, options.data)
            run = measure(WallArm(call=base), WallArm(call=other), plan)["wall"]
            other.end()
            found[f"{arch}, {way}"] = one = verdict.summarise(
                phase="forward_backward",
                method="wall",
                statistic="typical",
                threads=torch.get_num_threads(),
                mode="train",
                runs=[run],
                controls=[control],
                target_half_width=plan.target_half_width,
            )
            print(f"{arch:16} {way:10} {told(one)}", flush=True)
        base.end()
    # What they do is the measured work; only time that the machine's host took is a disturbance.
    after = read_cpu()
    stolen = None if before is None or after is None else after.stolen_s - before.stolen_s
    print(f"stolen by the host: {stolen} s")
    if options.out is not None:
        result = {
            "kind": "training speed",
            "arch": ", ".join(options.arch or ARCHES),
            "images_per_call": IMAGES,
            "machine": msgspec.to_builtins(here),
            "torchvision": torchvision_version(),
            "comparisons": {name: msgspec.to_builtins(one) for name, one in found.items()},
        }
        write_atomically(options.out, (json.dumps(result) + "\n").encode())
    return None


def told(found: Latency) -> str:
    """How many times as fast it is, with the interval, and images per second of both."""
    if found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        return found.verdict
    times = f"{1 / found.ratio:.2f} times as fast [{1 / found.ratio_high:.2f}, {1 / found.ratio_low:.2f}]"
    both = ", ".join(f"{IMAGES / seconds:,.0f}" for seconds in (found.variant_s, found.baseline_s) if seconds)
    return f"{times}, images/s {both}" + (f"; {found.verdict}" if found.verdict_kind == "no_result" else "")


def torchvision_version() -> str:
    from importlib.metadata import version

    return version("torchvision")


if __name__ == "__main__":
    main()
