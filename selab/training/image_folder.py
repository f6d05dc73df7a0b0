"""A folder of images as data, ImageNet or any other, read with pillow and torch's data loader.

    DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG      for training and evaluation
    DIR/n01440764/*.JPEG                                      for evaluation alone

The images of global batch i of an epoch, and their augmentation, depend on (seed, epoch, i) alone. Workers, ranks and
resumed runs therefore see the same images to the bit.

Images are decoded as torchvision's loader does, the way published ImageNet accuracies are computed: every mode is
converted to RGB, and the EXIF orientation is ignored. A damaged stretch that libjpeg repairs on its own cannot be
distinguished from a good image.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selab import units
from selab.training.batches import BatchPlan
from selab.training.file_images import Asked, FileImages, InMemory, hashed, workers_of
from selab.training.holdout import identity_of, split
from selab.training.image_decode import ImageFiles, by_class, collated
from selab.training.image_listing import IMAGENET_TRAIN, IMAGENET_VAL, FolderError, Listing, find_images, printable
from selab.training.image_transforms import EvaluationTransform, TrainingTransform
from selab.training.places365 import find_places365, title_of
from selab.training.recipe import ImageRecipe


# --------------------------------------------------------------------------------------------------------------- order
def epoch_order(labels: NDArray[np.int64], *, seed: int, epoch: int, balanced: bool) -> NDArray[np.int64]:
    """Return the order of an epoch's images: each once, or, balanced, each class equally often.

    Balanced sampling cycles through a shuffled list of the classes, and through a shuffled list of each class's images.
    A used-up list is shuffled again. The length of an epoch is the same.

    Source: arXiv 1512.05830, "class-aware sampling".
    """
    generator = torch.Generator().manual_seed(hashed("order", seed, epoch))

    def shuffled(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        rounds = -(-most // len(values))
        turns = [values[torch.randperm(len(values), generator=generator).numpy()] for _ in range(rounds)]
        return np.concatenate(turns)[:most] if turns else values[:0]

    if not balanced:
        return shuffled(np.arange(len(labels)), len(labels))
    classes = np.unique(labels)
    drawn = shuffled(classes, len(labels))
    order = np.empty_like(drawn)
    images, places = by_class(labels), by_class(drawn)
    for label in classes.tolist():
        where = places.get(label, drawn[:0])
        order[where] = shuffled(images[label], len(where))
    return order


# ---------------------------------------------------------------------------------------------------------------- data
class ImageFolder(FileImages):
    """A folder of images, ready for training and evaluation; made by `open_folder`.

    Attributes:
        name: what it was opened as.
        title: for tables.
        sha256: identity, see `Listing`.
        official: False, since there is no published checksum.
        num_classes: numbered classes, with images or without.
        input_chw: shape of a training image, or of a test image without a training set.
        train_size: images in `train`; 0 where there is none.
        test_size: images in `val`, including those that cannot be decoded.
        image: how images are prepared.
        classes: their names, by number.
        judged: what its test images are: `test` images, or `held-back` ones of the training images.
        wanted: where there are no training images, what to do about it.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        name: str,
        title: str,
        image: ImageRecipe,
        workers: int,
        report: Callable[[str], None] | None,
    ) -> None:
        super().__init__(
            name=name,
            title=title,
            sha256=listing.sha256,
            sizes=(0 if listing.train is None else len(listing.train.files), len(listing.val.files)),
            wanted=listing.wanted,
            workers=workers,
            report=report,
        )
        self.classes = listing.classes
        self.num_classes = len(listing.classes)
        side = image.test_crop if listing.train is None else image.train_size
        self.input_chw = (3, side, side)
        self.image = image
        self._listing = listing
        self._test = ImageFiles(listing.val, EvaluationTransform(image), listing.classes)
        self._train = None
        if listing.train is not None:
            self._train = ImageFiles(listing.train, TrainingTransform(image), listing.classes)

    def train_batches(
        self, plan: BatchPlan, *, device: torch.device, augmentation: InMemory
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one rank's parts of an epoch's global batches, without the last incomplete one.

        An image that cannot be decoded is replaced by another of its class.

        Args:
            plan: which batches, and which part of each.
            device: where the batches are wanted.
            augmentation: must be empty: `image` describes it.

        Yields:
            Images (N, 3, H, W), float32, normalised; labels (N,), int64.

        Raises:
            FolderError: no training images, fewer than `batch`, or an impossible share; while running: a file is
                missing, or a class has no image that can be decoded.
        """
        self._check_training(plan, augmentation)
        assert self._train is not None
        labels = self._train.split.labels
        order = epoch_order(labels, seed=plan.seed, epoch=plan.epoch, balanced=self.image.balanced)
        return self._batches(self._train, self._training(plan, order), device)

    def test_batches(
        self, *, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return one rank's parts of the test images, in order; each image is in one part of one rank.

        Images that cannot be decoded are left out and named by `skipped`; so are batches without any image left.

        Yields:
            Images (N, 3, H, W), float32, normalised; labels (N,), int64.

        Raises:
            FolderError: an impossible share; while running: a file is missing.
        """
        return self._batches(self._test, self._testing(batch=batch, rank=rank, world=world), device)

    def held_out(self, share: float) -> "ImageFolder":
        """Return the training images as a data set of their own, a share of each class as its test images.

        Raises:
            FolderError: there are no training images.
            SelabError: no class has two of them.
        """
        train = self._listing.train
        if train is None:
            raise FolderError(f"{self._test.split.root}: there is no folder train beside it to hold images back from")
        parts = [
            replace(train, files=train.files[places], labels=train.labels[places])
            for places in split(train.labels, share, title=self.title)
        ]
        listing = replace(
            self._listing, train=parts[0], val=parts[1], sha256=identity_of(self.sha256, share), assumed=()
        )
        held = ImageFolder(
            listing,
            name=self.name,
            title=f"{self.title}, training images",
            image=self.image,
            workers=self._workers,
            report=self._report,
        )
        held.judged = "held-back"
        return held

    def _batches(
        self, images: ImageFiles, asked: Iterator[Asked], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        training = images is not self._test
        for batch in self._loaded(images, asked, collated, device, root=images.split.root, training=training):
            if len(batch.labels):
                yield self._normalised(batch.images, device), batch.labels.to(device, non_blocking=True)

    def _normalised(self, images: Tensor, device: torch.device) -> Tensor:
        """Return (x / 255 - mean) / std, computed on the device: bytes are a quarter of the transfer."""
        x = images.to(device, non_blocking=True).to(torch.float32)
        # The divisor is a tensor: CUDA multiplies by the reciprocal of a Python number, which rounds differently.
        x.div_(torch.tensor(255.0, device=device))
        for values, apply in ((self.image.mean, x.sub_), (self.image.std, x.div_)):
            apply(torch.tensor(values, device=device).view(3, 1, 1))
        return x


def open_folder(
    data_dir: Path,
    *,
    name: str,
    image: ImageRecipe | None = None,
    workers: int | None = None,
    classes_file: Path | None = None,
    report: Callable[[str], None] | None = None,
) -> ImageFolder:
    """Open a folder of images; report in sentences how it was interpreted.

    Args:
        data_dir: holds `train` and `val`, `val` alone, or class folders; see `find_images`.
        name: `imagenet` for ImageNet or a part of it, with its numbering; `places365` for Places365 in one of its
            layouts; any other for any other folder.
        image: how images are prepared; by default `ImageRecipe()`.
        workers: processes that decode, at most one per core; 0 for none; None for `usual_workers()`. They change
            the speed only.
        classes_file: names of all classes, one a line, in the order of their numbers.
        report: called with each sentence.

    Raises:
        FolderError: as `find_images`.
        RecordError: the file of classes cannot be read.
    """
    workers = workers_of(workers)
    if name == "places365":
        if classes_file is not None:
            raise FolderError(f"--classes-file {classes_file}: Places365 names its classes itself; leave it out")
        listing = find_places365(data_dir)
    else:
        listing = find_images(data_dir, name=name, classes_file=classes_file)
    sizes = [("training", listing.train)] if listing.train is not None else []
    counted = ", ".join(
        units.counted(len(split.files), f"{what} image") for what, split in [*sizes, ("test", listing.val)]
    )
    for sentence in (*listing.assumed, f"{counted}, {units.counted(len(listing.classes), 'class', 'classes')}"):
        if report is not None:
            report(sentence)
    return ImageFolder(
        listing,
        name=name,
        title=_title(listing, data_dir, name),
        image=image or ImageRecipe(),
        workers=workers,
        report=report,
    )


def _title(listing: Listing, data_dir: Path, name: str) -> str:
    train, val = 0 if listing.train is None else len(listing.train.files), len(listing.val.files)
    if name == "places365":
        return title_of(train, val)
    if name != "imagenet":
        return f"{printable(data_dir.resolve().name)}, {val:,} test images"
    if val == IMAGENET_VAL and train in (0, IMAGENET_TRAIN):
        return "ImageNet"
    part = f"{train:,} training and " if train else ""
    return f"ImageNet, {part}{val:,} test images"
