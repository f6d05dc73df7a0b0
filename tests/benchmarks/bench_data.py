"""How long CIFAR-10's batches take: torchvision's usual pipeline against ours, by the project's own paired measurement.

`python tests/benchmarks/bench_data.py --data DIR --out FILE` measures, on the same images, each pipeline against ours:
batches alone, and whole training steps of ResNet-20; prints the ratios and writes them with their raw samples. Theirs
is datasets.CIFAR10 in a DataLoader with RandomCrop, RandomHorizontalFlip, ToTensor and Normalize, without workers and
with two.

One call is an epoch of some thousand images, so that workers start it with nothing prefetched and end it with nothing
left to do: they neither work ahead while the other is measured nor disturb it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from selab.bench.machine import contention_flags, machine, read_cpu, threads_and_affinity
from selab.bench.sampler import Plan, WallArm, measure
from selab.models.build import build
from selab.models.catalog import find
from selab.records import verdict
from selab.records.files import write_atomically
from selab.records.types import Latency
from selab.training.batches import BatchPlan
from selab.training.data import Augmentation, ImageSet, open_data

ARCH = "resnet20_cifar"
WORKERS = (0, 2)
CPU = torch.device("cpu")

Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class InMemory(torchvision.datasets.CIFAR10):
    """Theirs, with images that were read already: it would read pickles."""

    def __init__(self, data: ImageSet, transform: Callable[..., Tensor]) -> None:
        torchvision.datasets.VisionDataset.__init__(self, root="", transform=transform)
        self.data = data.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = data.train_labels.tolist()


def ours(data: ImageSet, batch: int) -> Epoch:
    augmentation = Augmentation(crop_pad=4, flip=True)
    numbers = count()
    return lambda: data.train_batches(
        BatchPlan(batch=batch, seed=0, epoch=next(numbers)), device=CPU, augmentation=augmentation
    )


def theirs(data: ImageSet, batch: int, workers: int) -> Epoch:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([one / 255 for one in data.mean], [one / 255 for one in data.std]),
        ]
    )
    loader = DataLoader(
        InMemory(data, transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)


def loading(epoch: Epoch) -> WallArm:
    def call() -> None:
        for _ in epoch():
            pass

    return WallArm(call=call)


def training(epoch: Epoch) -> WallArm:
    model = build(find(ARCH)).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def call() -> None:
        for images, labels in epoch():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return WallArm(call=call)


def first_images(data: ImageSet, size: int) -> ImageSet:
    return replace(data, train_images=data.train_images[:size], train_labels=data.train_labels[:size])


def told(found: Latency, images: int) -> str:
    """Ratio, interval and images per second, and why they mean nothing if they do not."""
    parts = []
    if found.ratio is not None:
        parts.append(f"{found.ratio:6.3f} [{found.ratio_low:.3f}, {found.ratio_high:.3f}]")
    if found.baseline_s is not None and found.variant_s is not None:
        parts.append(f"ours {images / found.baseline_s:9,.0f}, theirs {images / found.variant_s:9,.0f}")
    if found.verdict_kind == "no_result":
        parts.append(found.verdict)
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder that cifar-10-batches-bin is in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40, help="batches of an epoch that is only loaded")
    parser.add_argument("--steps", type=int, default=10, help="batches of an epoch that is trained on")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of sampling for each comparison")
    options = parser.parse_args()

    whole = open_data("cifar10", data_dir=options.data, download=False)
    assert isinstance(whole, ImageSet)
    plan = replace(Plan.for_cpu(), target_half_width=0.01, budget_s=options.budget)
    threads = torch.get_num_threads()
    before = read_cpu()
    found: dict[str, Latency] = {}
    images: dict[str, int] = {}
    for phase, arm, batches in (("loading", loading, options.batches), ("training", training, options.steps)):
        data = first_images(whole, options.batch * batches)
        others = {workers: theirs(data, options.batch, workers) for workers in WORKERS}
        for epoch in others.values():
            # Workers start here, before this process is bound to one core where it has one thread.
            for _ in epoch():
                pass
        with threads_and_affinity(threads):
            own, twin = (arm(ours(data, options.batch)) for _ in range(2))
            control = measure(own, twin, plan, seed=1)["wall"]
            for workers, epoch in others.items():
                run = measure(own, arm(epoch), plan)["wall"]
                name = f"{phase}, {workers} workers"
                images[name] = options.batch * batches
                found[name] = verdict.summarise(
                    phase="forward",
                    method="wall",
                    statistic="floor",
                    threads=threads,
                    mode="train",
                    runs=[run],
                    controls=[control],
                    target_half_width=plan.target_half_width,
                )
    flags = contention_flags(before, read_cpu(), threads=threads, cores=machine().cores)
    print(f"{whole.title}, batch {options.batch}, {threads} threads: torchvision's time over ours; images/s of both")
    for name, one in found.items():
        print(f"{name:20} {told(one, images[name])}")
    for flag in flags:
        print(f"flag {flag.name}: {flag.detail}")
    result = {
        "kind": "loading",
        "arch": ARCH,
        "batch": options.batch,
        "data": {"title": whole.title, "sha256": whole.sha256},
        "images_per_call": images,
        "machine": msgspec.to_builtins(machine()),
        "torchvision": torchvision.__version__,
        "flags": msgspec.to_builtins(flags),
        "comparisons": {name: msgspec.to_builtins(one) for name, one in found.items()},
    }
    write_atomically(options.out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
