"""Images with boxes in COCO's format as data for detectors: batches that depend on (seed, epoch, number) alone.

Images keep their sizes: a detector resizes them itself, on its device. Those of a training batch are all tall or all
wide, so that little is padded.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selab import units
from selab.training.batches import BatchPlan
from selab.training.coco_listing import BoxedImages, CocoListing, find_coco
from selab.training.file_images import FileImages, InMemory, hashed, workers_of
from selab.training.holdout import identity_of, split
from selab.training.image_decode import ImageFinding, read_image
from selab.training.image_listing import FolderError, printable
from selab.training.image_transforms import to_tensor
from selab.training.recipe import BoxRecipe, Task

# Of COCO 2017: Lin et al., arXiv 1405.0312; 117,266 of the 118,287 training images have boxes.
_COCO_TRAIN, _COCO_VAL = 117_266, 5000
_TRIES = 10
"""Images that replace one that cannot be decoded, until training gives up."""

Boxes = dict[str, Tensor]


class _Loaded(NamedTuple):
    """One image, (3, H, W) uint8, None if it was left out; its boxes in training. A `fault` ends the run."""

    number: int
    image: Tensor | None
    boxes: Boxes | None
    findings: tuple[ImageFinding, ...]
    fault: str


class _Batch(NamedTuple):
    images: list[Tensor]
    boxes: list[Boxes]
    indices: Tensor
    findings: tuple[ImageFinding, ...]
    fault: str


class _BoxFiles(Dataset[_Loaded]):
    """The images of a split; an item is an index and, in training, a seed.

    Args:
        split: the files and their boxes.
        flip: whether half of the training images are mirrored.
    """

    def __init__(self, split: BoxedImages, *, flip: bool) -> None:
        self.split = split
        self.flip = flip

    def __getitem__(self, asked: tuple[int, int | None]) -> _Loaded:
        index, seed = asked
        findings: list[ImageFinding] = []
        for number in range(1 if seed is None else _TRIES):
            chosen = index if not number else hashed("instead", seed, number) % len(self.split)
            raw = bytes(self.split.files[chosen])
            name, image, kind, reason, gone = read_image(self.split.root, self.split.below, raw)
            if gone:
                return _Loaded(index, None, None, tuple(findings), gone)
            cannot = "be decoded"
            if image is not None and image.size[::-1] != tuple(self.split.sizes[chosen]):
                # Its boxes are somewhere else.
                height, width = self.split.sizes[chosen]
                kind, cannot, reason = (
                    "corrupt",
                    "be used",
                    f"has {image.width} x {image.height} pixels, its annotations {width} x {height}",
                )
                image = None
            if kind is not None:
                findings.append(ImageFinding(kind, name, reason, cannot))
            if image is not None:
                return self._item(chosen, image, seed, tuple(findings))
        fault = "" if seed is None else f"{self.split.root}: {_TRIES} images in turn cannot be used; get them again"
        return _Loaded(index, None, None, tuple(findings), fault)

    def _item(self, index: int, image: Image.Image, seed: int | None, findings: tuple[ImageFinding, ...]) -> _Loaded:
        pixels = to_tensor(image)
        if seed is None:
            return _Loaded(index, pixels, None, findings, "")
        where = self.split.of(index)
        kept = ~self.split.crowd[where]
        boxes = self.split.boxes[where][kept].copy()
        if self.flip and hashed("flip", seed) % 2:
            pixels = pixels.flip(2)
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        labels = self.split.labels[where][kept]
        found = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        return _Loaded(index, pixels, found, findings, "")


def _collated(loaded: list[_Loaded]) -> _Batch:
    kept = [one for one in loaded if one.image is not None]
    return _Batch(
        images=[one.image for one in kept if one.image is not None],
        boxes=[one.boxes for one in kept if one.boxes is not None],
        indices=torch.tensor([one.number for one in kept], dtype=torch.int64),
        findings=tuple(finding for one in loaded for finding in one.findings),
        fault=next((one.fault for one in loaded if one.fault), ""),
    )


def grouped_order(sizes: NDArray[np.int64], *, batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's images, each once, in which batches are of tall or of wide images.

    What is left of the two groups shares the remaining batches. The order of the batches is random too.

    Args:
        sizes: height and width of each image, (N, 2).
        batch: images of all processes together.
        seed: of the order, with `epoch`.
        epoch: from 0.

    Returns:
        Indices, (N,); those after the last full batch are not trained on in this epoch.
    """
    generator = torch.Generator().manual_seed(hashed("order", seed, epoch))
    order = torch.randperm(len(sizes), generator=generator).numpy()
    tall = sizes[order, 0] > sizes[order, 1]
    groups = [order[~tall], order[tall]]
    ends = [len(one) // batch * batch for one in groups]
    rest = np.concatenate([one[end:] for one, end in zip(groups, ends, strict=True)])
    full = np.concatenate([*(one[:end] for one, end in zip(groups, ends, strict=True)), rest])
    count = len(full) // batch
    turns = torch.randperm(count, generator=generator).numpy()
    batches = full[: count * batch].reshape(count, batch)[turns]
    return np.concatenate([batches.reshape(-1), full[count * batch :]])


class CocoImages(FileImages):
    """Images with boxes, ready for training and evaluation; made by `open_coco`.

    Attributes:
        name: what it was opened as.
        title: for tables.
        sha256: identity, see `CocoListing`.
        official: False, since there is no published checksum.
        task: `detection`.
        categories: name by number.
        num_classes: the largest number of a category, and one for the background.
        input_chw: nominal shape of an image in the network, from the recipe's sizes.
        train_size: training images with boxes; 0 where there are none.
        test_size: images to evaluate on, including those that cannot be decoded.
        boxes: how images are prepared.
        truth: the images to evaluate on, with their boxes.
        judged: what its test images are: `test` images, or `held-back` ones of the training images.
        wanted: where there are no training images, what to do about it.
    """

    task: Task = "detection"
    keys = "boxes"

    def __init__(
        self,
        listing: CocoListing,
        *,
        name: str,
        title: str,
        boxes: BoxRecipe,
        workers: int,
        report: Callable[[str], None] | None,
    ) -> None:
        train, val = listing.train, listing.val
        super().__init__(
            name=name,
            title=title,
            sha256=listing.sha256,
            sizes=(0 if train is None else len(train), len(val)),
            wanted="put annotations/instances_train2017.json and train2017 beside those of val2017",
            workers=workers,
            report=report,
        )
        self.categories = listing.categories
        self.num_classes = listing.num_classes
        self.input_chw = (3, boxes.min_size, boxes.max_size)
        self.boxes = boxes
        self.truth = val
        self._listing = listing

    def train_batches(
        self, plan: BatchPlan, *, device: torch.device, augmentation: InMemory
    ) -> Iterator[tuple[list[Tensor], list[Boxes]]]:
        """Return one rank's parts of an epoch's global batches, without the last incomplete one.

        An image that cannot be decoded is replaced by another one.

        Args:
            plan: which batches, and which part of each.
            device: where the batches are wanted.
            augmentation: must be empty: `boxes` describes it.

        Yields:
            Images, each (3, H, W) float32 from 0 to 1; for each a dictionary of `boxes` (n, 4), x1, y1, x2, y2 in
            pixels, and `labels` (n,) int64, as torchvision's detectors take them.

        Raises:
            FolderError: no training images, fewer than `batch`, or an impossible share; while running: a file is
                missing, or too many cannot be decoded.
        """
        self._check_training(plan, augmentation)
        train = self._listing.train
        assert train is not None
        order = grouped_order(train.sizes, batch=plan.batch, seed=plan.seed, epoch=plan.epoch)
        asked = self._training(plan, order)
        files = _BoxFiles(train, flip=self.boxes.flip)
        for loaded in self._loaded(files, asked, _collated, device, root=train.root, training=True):
            boxes = [{key: one.to(device, non_blocking=True) for key, one in each.items()} for each in loaded.boxes]
            yield _moved(loaded.images, device), boxes

    def test_batches(
        self, *, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Return one rank's parts of the images to evaluate on, in order; each is in one part of one rank.

        Images that cannot be decoded are left out and named by `skipped`.

        Yields:
            Images, each (3, H, W) float32 from 0 to 1; their numbers in `truth`, (N,) int64 on the CPU.

        Raises:
            FolderError: an impossible share; while running: a file is missing.
        """
        asked = self._testing(batch=batch, rank=rank, world=world)
        files = _BoxFiles(self.truth, flip=False)
        for loaded in self._loaded(files, asked, _collated, device, root=self.truth.root, training=False):
            if loaded.images:
                yield _moved(loaded.images, device), loaded.indices

    def held_out(self, share: float) -> "CocoImages":
        """Return the training images as a data set of their own, a share of them as its test images.

        Raises:
            FolderError: there are no training images.
            SelabError: there are too few.
        """
        train = self._listing.train
        if train is None:
            raise FolderError(f"{self.title}: has no training images with annotations to hold some back from")
        trains, held = split(np.zeros(len(train), dtype=np.int64), share, title=self.title)
        listing = replace(
            self._listing,
            train=train.select(trains),
            val=train.select(held),
            sha256=identity_of(self.sha256, share),
            assumed=(),
        )
        kept = CocoImages(
            listing,
            name=self.name,
            title=f"{self.title}, training images",
            boxes=self.boxes,
            workers=self._workers,
            report=self._report,
        )
        kept.judged = "held-back"
        return kept


def _moved(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return images on a device as float32 from 0 to 1; bytes are a quarter of the transfer."""
    return [one.to(device, non_blocking=True).to(torch.float32).div_(255) for one in images]


def open_coco(
    data_dir: Path,
    *,
    name: str,
    boxes: BoxRecipe | None = None,
    workers: int | None = None,
    report: Callable[[str], None] | None = None,
) -> CocoImages:
    """Open a folder in COCO's layout; report in sentences how it was interpreted, and what was left out.

    Args:
        data_dir: holds `annotations` and the folders of images; see `selab.training.coco_listing`.
        name: `coco`, or `shapes`, whose images are made where they are missing: see `selab.training.shapes`.
        boxes: how images are prepared; by default `BoxRecipe()`.
        workers: as in `selab.training.image_folder.open_folder`.
        report: called with each sentence.

    Raises:
        FolderError: as `find_coco`.
        RecordError: the shapes cannot be written.
    """
    workers = workers_of(workers)
    if name == "shapes":
        from selab.training.shapes import write_shapes

        data_dir = data_dir / name
        if not (data_dir / "annotations").is_dir():
            write_shapes(data_dir)
            if report is not None:
                report(f"{data_dir}: written")
    listing = find_coco(data_dir)
    train, val = 0 if listing.train is None else len(listing.train), len(listing.val)
    sizes = ", ".join(
        units.counted(size, f"{what} image") for what, size in (("training", train), ("test", val)) if size
    )
    categories = units.counted(len(listing.categories), "category", "categories")
    for sentence in (*listing.assumed, f"{sizes}, {categories}"):
        if report is not None:
            report(sentence)
    return CocoImages(
        listing,
        name=name,
        title=_title(data_dir, name, train, val),
        boxes=boxes or BoxRecipe(),
        workers=workers,
        report=report,
    )


def _title(data_dir: Path, name: str, train: int, val: int) -> str:
    if name == "shapes":
        return "shapes"
    if val == _COCO_VAL and train in (0, _COCO_TRAIN):
        return "COCO 2017"
    part = f"{train:,} training and " if train else ""
    return f"{printable(data_dir.resolve().name)}, {part}{val:,} test images"
