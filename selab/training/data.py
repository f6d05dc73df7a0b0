"""Data sets: batches that depend on (seed, epoch, number) alone.

A set in memory is moved to the device once, as bytes. Crops, flips and cutout are applied there to whole batches.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from selab.errors import SelabError, UnknownNameError, nearest
from selab.training import synthetic
from selab.training.augment import Augmentation, augment, decide, normalise, order
from selab.training.batches import BatchPlan, check_share
from selab.training.cifar import LAYOUTS, open_cifar
from selab.training.holdout import identity_of, split
from selab.training.recipe import BoxRecipe, ImageRecipe, Scaling

__all__ = ["NAMES", "Augmentation", "BatchPlan", "Data", "ImageSet", "open_data", "scaled", "synthetic_set"]
NAMES = (*LAYOUTS, "synthetic", "folder", "imagenet", "places365", "coco", "shapes")
BOXED = ("coco", "shapes")
"""Data sets of images with boxes, for detectors."""


class Data(Protocol):
    """A training set and a test set."""

    @property
    def name(self) -> str:
        """Name it was opened by."""
        ...

    @property
    def title(self) -> str:
        """Title for tables."""
        ...

    @property
    def sha256(self) -> str:
        """Identity: hash over the files or the generated images."""
        ...

    @property
    def official(self) -> bool:
        """Whether they are the published files."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def input_chw(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training images."""
        ...

    @property
    def test_size(self) -> int:
        """Number of test images."""
        ...

    def train_batches(
        self, plan: BatchPlan, *, device: torch.device, augmentation: Augmentation
    ) -> Iterator[tuple[Any, Any]]:
        """Return one rank's parts of an epoch's global batches, without the last incomplete one.

        Order and augmentation of global batch i depend on (seed, epoch, i) alone, so that a run resumes anywhere, with
        any number of ranks.

        Args:
            plan: which batches, and which part of each.
            device: where the batches are wanted.
            augmentation: applied to the images.

        Yields:
            Images (N, C, H, W) float32, normalised; labels (N,) int64. For detectors lists, see
            `selab.training.coco.CocoImages`.

        Raises:
            SelabError: the ranks cannot share a batch equally, or a batch has more images than the set.
        """
        ...

    def test_batches(
        self, *, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Any, Any]]:
        """Return one rank's parts of the test images, in order; each image is in one part of one rank.

        The last batch may be smaller, and may have no part for a rank.

        Yields:
            Images (N, C, H, W) float32, normalised; labels (N,) int64.

        Raises:
            SelabError: the ranks cannot share a batch equally.
        """
        ...

    def held_out(self, share: float) -> "Data":
        """Return the training images as a data set of their own, a share of each class as its test images.

        Raises:
            SelabError: there are no training images, or too few.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Part:
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class _Moved:
    """The tensors of a set on one device."""

    train: _Part
    test: _Part
    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """A set in memory; see `Data`.

    Attributes:
        name: what it was opened as.
        title: for tables.
        sha256: identity.
        official: whether it is the published set.
        num_classes: labels are below it.
        train_images: (N, C, H, W) uint8.
        train_labels: (N,).
        test_images: (M, C, H, W) uint8.
        test_labels: (M,).
        mean: by channel, in units of 1/255; subtracted.
        std: by channel, in units of 1/255; divided by.
        classes: their names, in the order of their numbers; empty if they have none.
        judged: what its test images are: `test` images, or `held-back` ones of the training images.
    """

    name: str
    title: str
    sha256: str
    official: bool
    num_classes: int
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    judged: str = "test"
    _moved: dict[torch.device, _Moved] = field(default_factory=dict, init=False, repr=False)

    @property
    def input_chw(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    @property
    def test_size(self) -> int:
        """Number of test images."""
        return len(self.test_images)

    def train_batches(
        self, plan: BatchPlan, *, device: torch.device, augmentation: Augmentation
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.train_batches`."""
        batch, rank, world = plan.batch, plan.rank, plan.world
        check_share(batch, rank, world)
        if batch > self.train_size:
            raise SelabError(f"{self.title}: has {self.train_size:,} training images; a batch of {batch:,} needs more")
        part = slice(rank * batch // world, (rank + 1) * batch // world)
        moved = self._on(device)
        places = order(self.train_size, seed=plan.seed, epoch=plan.epoch).to(device)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(plan.first, self.train_size // batch):
                chosen = places[number * batch : (number + 1) * batch][part]
                # Drawn on the CPU, so that all devices agree.
                decided = decide(
                    augmentation,
                    size=batch,
                    input_hw=self.input_chw[1:],
                    seed=plan.seed,
                    epoch=plan.epoch,
                    number=number,
                )[part]
                if device.type == "cuda":  # a copy from pinned memory does not block the host
                    decided = decided.pin_memory()
                decided = decided.to(device, non_blocking=True)
                images = moved.train.images.index_select(0, chosen)
                yield (
                    augment(images, decided, augmentation, mean=moved.mean, std=moved.std),
                    moved.train.labels.index_select(0, chosen),
                )

        return batches()

    def test_batches(
        self, *, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.test_batches`."""
        check_share(batch, rank, world)
        moved = self._on(device)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, self.test_size, batch):
                size = min(batch, self.test_size - start)
                part = slice(start + rank * size // world, start + (rank + 1) * size // world)
                if part.start < part.stop:
                    yield normalise(moved.test.images[part], moved.mean, moved.std), moved.test.labels[part].clone()

        return batches()

    def held_out(self, share: float) -> "ImageSet":
        """See `Data.held_out`."""
        labels = self.train_labels.to(torch.int64).cpu().numpy()
        trains, held = (torch.from_numpy(one) for one in split(labels, share, title=self.title))
        return replace(
            self,
            title=f"{self.title}, training images",
            sha256=identity_of(self.sha256, share),
            official=False,
            train_images=self.train_images[trains],
            train_labels=self.train_labels[trains],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
            judged="held-back",
        )

    def _on(self, device: torch.device) -> _Moved:
        """Return the set on a device; its bytes are moved once."""
        # `cuda` stands for the current GPU.
        place = torch.empty(0, device=device).device
        if place not in self._moved:
            self._moved[place] = _Moved(
                train=_Part(images=self.train_images.to(place), labels=self.train_labels.to(place, torch.int64)),
                test=_Part(images=self.test_images.to(place), labels=self.test_labels.to(place, torch.int64)),
                mean=torch.tensor(self.mean, dtype=torch.float32, device=place).view(-1, 1, 1),
                std=torch.tensor(self.std, dtype=torch.float32, device=place).view(-1, 1, 1),
            )
        return self._moved[place]


def scaled(data: Data, scaling: Scaling) -> Data:
    """Return a data set whose images are scaled as a recipe says.

    Args:
        data: a set in memory; one of a folder says itself how its images are prepared, and is returned as it is.
        scaling: see `selab.training.recipe.Recipe`.
    """
    if scaling == "channel" or not isinstance(data, ImageSet):
        return data
    channels = data.input_chw[0]
    return replace(data, mean=(0.0,) * channels, std=(255.0,) * channels)


def open_data(
    name: str,
    *,
    data_dir: Path,
    download: bool = True,
    image: ImageRecipe | None = None,
    boxes: BoxRecipe | None = None,
    workers: int | None = None,
    classes_file: Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Data:
    """Open a data set; download it if it is missing.

    Args:
        name: one of `NAMES`. `folder` is any folder of images, `imagenet` one with ImageNet's classes,
            `places365` Places365 as it is distributed; `coco` any folder in COCO's layout, `shapes` a small one that
            is made.
        data_dir: its folder, or where to download it to; not used for `synthetic`.
        download: whether it may be downloaded; image folders never are.
        image: how a recipe prepares the images of a folder.
        boxes: how a recipe prepares images with boxes.
        workers: processes that decode the images of a folder; None for the default number.
        classes_file: names of a folder's classes, one a line, in the order of their numbers.
        report: called with sentences: progress of the download, what was found.

    Raises:
        UnknownNameError: no such name.
        SelabError: it is missing and cannot be downloaded, or is damaged.
    """
    if classes_file is not None and name in (*LAYOUTS, "synthetic", *BOXED):
        raise SelabError(f"--classes-file {classes_file}: is for image folders; {name} numbers its classes itself")
    if name in LAYOUTS:
        return _cifar_set(name, data_dir, download=download, report=report)
    if name == "synthetic":
        return synthetic_set()
    if name in NAMES:
        try:
            from selab.training.coco import open_coco
            from selab.training.image_folder import open_folder
        except ModuleNotFoundError as error:
            missing = "pillow" if error.name == "PIL" else error.name
            raise SelabError(f"{name}: {missing} is not installed; pip install 'selab[imagenet]'") from None
        if name in BOXED:
            return open_coco(data_dir, name=name, boxes=boxes, workers=workers, report=report)
        return open_folder(data_dir, name=name, image=image, workers=workers, classes_file=classes_file, report=report)
    raise UnknownNameError(f"{name}: no such data set{nearest(name, NAMES)}")


def synthetic_set(*, train_size: int = 10_000, test_size: int = 2_000, seed: int = 0) -> ImageSet:
    """Return a generated set of ten classes of 32 x 32 pixels; see `synthetic.make`.

    Args:
        train_size: training images.
        test_size: test images.
        seed: another one makes other images of other patterns.
    """
    train, test = synthetic.make(train_size=train_size, test_size=test_size, seed=seed)
    sha256 = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        sha256.update(array.data)
    return ImageSet(
        name="synthetic",
        title="synthetic",
        sha256=sha256.hexdigest(),
        official=False,
        num_classes=synthetic.CLASSES,
        train_images=torch.from_numpy(train.images),
        train_labels=torch.from_numpy(train.labels),
        test_images=torch.from_numpy(test.images),
        test_labels=torch.from_numpy(test.labels),
        mean=(127.5,) * 3,
        std=(40.0,) * 3,
    )


def _cifar_set(name: str, data_dir: Path, *, download: bool, report: Callable[[str], None] | None) -> ImageSet:
    layout = LAYOUTS[name]
    found = open_cifar(layout, data_dir=data_dir, download=download, report=report)
    return ImageSet(
        name=name,
        title=found.title,
        sha256=found.sha256,
        official=found.official,
        num_classes=layout.labels[-1],
        train_images=torch.from_numpy(found.train_images),
        train_labels=torch.from_numpy(found.train_labels),
        test_images=torch.from_numpy(found.test_images),
        test_labels=torch.from_numpy(found.test_labels),
        mean=layout.mean,
        std=layout.std,
        classes=found.classes,
    )
