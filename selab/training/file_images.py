"""Images that are decoded from files while a network is trained: worker processes, and what is unusual about files."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from selab import units
from selab.training.batches import BatchPlan, check_share
from selab.training.distributed import number_of
from selab.training.image_decode import ImageFinding
from selab.training.image_listing import FolderError
from selab.training.problems import NAMED, Found, Problems

_MOST_WORKERS = 8  # by default
Asked = list[tuple[int, int | None]]
"""Images of a batch: which, and in training the seed of what is random about it."""


class _Loaded(Protocol):
    @property
    def findings(self) -> tuple[ImageFinding, ...]: ...
    @property
    def fault(self) -> str: ...


_Batch = TypeVar("_Batch", bound=_Loaded)


class InMemory(Protocol):
    """The augmentation of sets in memory; image files accept none, since their recipe has its own."""

    @property
    def crop_pad(self) -> int:
        """Pixels that are padded on each side."""
        ...

    @property
    def flip(self) -> bool:
        """Whether half of the images are mirrored."""
        ...

    @property
    def cutout(self) -> int:
        """Side of a square that is blanked, in pixels."""
        ...


class FileImages:
    """What all data sets of image files have in common.

    Args:
        name: what it was opened as.
        title: for tables.
        sha256: identity.
        sizes: training images, 0 where there are none; and test images, including those that cannot be decoded.
        wanted: where there are no training images, what to do about it.
        workers: processes that decode, at most one per core; 0 for none.
        report: called with a sentence for each of the first files that cannot be decoded.

    Attributes:
        official: False, since there is no published checksum.
        judged: what its test images are: `test` images, or `held-back` ones of the training images.
        keys: the table of a recipe that says how these images are prepared.
    """

    keys = "image"
    official = False
    judged = "test"

    def __init__(
        self,
        *,
        name: str,
        title: str,
        sha256: str,
        sizes: tuple[int, int],
        wanted: str,
        workers: int,
        report: Callable[[str], None] | None,
    ) -> None:
        self.name, self.title, self.sha256, self.wanted = name, title, sha256, wanted
        self.train_size, self.test_size = sizes
        self._workers = min(workers, cores())
        self._report = report
        self._found: dict[str, set[str]] = {kind: set() for kind in Problems.__struct_fields__}
        self._skipped: set[str] = set()

    @property
    def problems(self) -> Problems:
        """Unusual images among those that this process has read so far."""
        return Problems(
            **{kind: Found(count=len(files), first=tuple(sorted(files)[:NAMED])) for kind, files in self._found.items()}
        )

    def share_problems(self) -> Problems:
        """Share the problems between all processes of a training, each of which calls this; return all of them."""
        if dist.is_available() and dist.is_initialized():
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, self._found)
            for kind, files in self._found.items():
                files.update(*(each[kind] for each in told))
        return self.problems

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the test images that this process has left out so far."""
        return tuple(sorted(self._skipped))

    def _check_training(self, plan: BatchPlan, augmentation: InMemory) -> None:
        """Check that there are training images for a plan, and no augmentation for images in memory.

        Raises:
            FolderError: there are none, fewer than a batch, or the processes cannot share it.
        """
        if not self.train_size:
            raise FolderError(f"{self.title}: holds no training images; {self.wanted}")
        if augmentation.crop_pad or augmentation.flip or augmentation.cutout:
            raise FolderError(
                f"crop_pad, flip and cutout are for images in memory; for folders, use the recipe's [{self.keys}] keys"
            )
        check_share(plan.batch, plan.rank, plan.world, error=FolderError)
        if plan.batch > self.train_size:
            held = units.counted(self.train_size, "training image")
            raise FolderError(f"{self.title}: holds {held}, less than a batch of {plan.batch:,}")

    def _training(self, plan: BatchPlan, order: NDArray[np.int64]) -> Iterator[Asked]:
        """Yield the images of one rank's parts of an epoch's batches, in this order, and their seeds."""
        for number in range(plan.first, self.train_size // plan.batch):
            places = share(self.train_size, batch=plan.batch, number=number, rank=plan.rank, world=plan.world)
            yield [(int(order[place]), hashed("image", plan.seed, plan.epoch, place)) for place in places]

    def _testing(self, *, batch: int, rank: int, world: int) -> Iterator[Asked]:
        """Return the images of one rank's parts of the test images, in order.

        Raises:
            FolderError: the processes cannot share a batch.
        """
        check_share(batch, rank, world, error=FolderError)
        numbers = range(-(-self.test_size // batch))
        parts = (share(self.test_size, batch=batch, number=one, rank=rank, world=world) for one in numbers)
        return ([(place, None) for place in places] for places in parts if places)

    def _loaded(
        self,
        images: Dataset[Any],
        asked: Iterator[Asked],
        collate: Callable[[list[Any]], _Batch],
        device: torch.device,
        *,
        root: Path,
        training: bool,
    ) -> Iterator[_Batch]:
        """Yield the batches that are asked for, and note what is unusual about their files.

        Raises:
            FolderError: a worker fails, or a batch has a fault.
        """
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=asked,
            num_workers=self._workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            # By default it would draw its workers' seed from the training's generator.
            generator=torch.Generator(),
            worker_init_fn=_apart,
        )
        loaded = iter(loader)
        while True:
            try:
                batch: _Batch | None = next(loaded, None)
            except RuntimeError as error:
                told = str(error).partition("\n")[0]
                raise FolderError(f"{root}: loading failed: {told}; try a smaller --workers") from error
            if batch is None:
                return
            for finding in batch.findings:
                self._note(finding)
                if finding.reason and not training:
                    self._skipped.add(finding.file)
            if batch.fault:
                raise FolderError(batch.fault)
            yield batch

    def _note(self, finding: ImageFinding) -> None:
        files = self._found[finding.kind]
        if finding.reason and finding.file not in files and len(files) < NAMED and self._report is not None:
            self._report(f"{finding.file}: cannot {finding.cannot}: {finding.reason}")
        files.add(finding.file)


def _apart(_number: int) -> None:
    """Leave the group of processes: a signal to all of it must not end a worker before the training has saved."""
    os.setpgrp()


def hashed(*what: object) -> int:
    """Return a 63-bit seed for a generator, hashed from all arguments."""
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def share(total: int, *, batch: int, number: int, rank: int, world: int) -> range:
    """Return the positions in an epoch of one rank's part of global batch `number`; the last batch may be smaller."""
    part = batch // world
    first = number * batch + rank * part
    return range(min(first, total), min(first + part, total))


def usual_workers() -> int:
    """Return the default number of worker processes: this process's share of the machine's cores, at most 8."""
    return min(_MOST_WORKERS, max(1, cores() // number_of("LOCAL_WORLD_SIZE", 1, least=1)))


def workers_of(asked: int | None) -> int:
    """Return a number of worker processes: what was asked for, or `usual_workers()`.

    Raises:
        FolderError: it is negative.
    """
    if asked is not None and asked < 0:
        raise FolderError(f"workers: {asked}; must be 0 or more")
    return usual_workers() if asked is None else asked


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
