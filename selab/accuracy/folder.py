"""A folder of images as data: ImageNet, or any other, through torchvision's transforms and torch's loader.

    DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG      for training and evaluation
    DIR/n01440764/*.JPEG                                      for evaluation alone

Nothing is drawn from a stream: which images stand in the global batch i of an epoch, and what is done to them, follows
from (seed, epoch, i) alone, so that workers, ranks and resumed runs see the same images to the bit.

Images are decoded as torchvision's loader does it and as the published ImageNet accuracies are computed: every mode is
converted to RGB, and the EXIF orientation is ignored. What libjpeg repairs on its own (a damaged stretch within the
stream) cannot be told from a good image.
"""

import hashlib
import importlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selab.accuracy.problems import NAMED, Found, Problems
from selab.errors import SelabError, nearest
from selab.recipe import ImageRecipe
from selab.store import read_text

Kind = Literal["corrupt", "truncated", "grey", "cmyk", "other"]

# What ILSVRC 2012 holds (arXiv 1409.0575, Table 2).
_IMAGENET_CLASSES, _IMAGENET_TRAIN, _IMAGENET_VAL = 1000, 1_281_167, 50_000
_WNID = re.compile(r"n\d{8}")
_CLASSES_FILES = ("imagenet_wnids.txt", "classes.txt")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"}
_SAMPLED = 64  # files of a split whose content enters its identity
_MOST_WORKERS = 8  # by default


class FolderError(SelabError):
    """A folder of images cannot be used, or changed while it was; the message names the file or folder."""


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one folder of class folders.

    Attributes:
        root: that folder.
        below: how messages call it: `val/`, or nothing where it is the data's folder itself.
        files: paths below `root`, sorted, as the file system's bytes: a million strings would be copied into each
            worker by and by, an array is shared.
        labels: their classes' numbers.
    """

    root: Path
    below: str
    files: NDArray[np.bytes_]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds.

    Attributes:
        classes: their names; a class's number is its place.
        assumed: what was concluded from what was found, in sentences.
        sha256: over the classes, all paths and sizes, and the content of 64 files per split, evenly spaced. (All of
            ImageNet's content would take an hour to read.) A file of unchanged size may differ unnoticed.
    """

    classes: tuple[str, ...]
    train: Split | None
    val: Split
    assumed: tuple[str, ...]
    sha256: str


def find_images(data_dir: Path, *, name: str, classes_file: Path | None = None) -> Listing:
    """Lists a folder of images and numbers its classes.

    Args:
        data_dir: holds `train` and `val`, `val` alone, or class folders.
        name: `imagenet` insists on ImageNet's numbering.
        classes_file: names of classes, one a line, in the order of their numbers. Without it the numbers are those of
            the sorted folders; where all of these have names of ImageNet's classes, `imagenet_wnids.txt` or
            `classes.txt` in `data_dir` is taken.

    Raises:
        FolderError: there are no images in class folders, or a class has no known number.
        RecordError: the file of classes cannot be read.
    """
    if not data_dir.is_dir():
        raise FolderError(f"{data_dir}: is no folder; name one that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    assumed = []
    train_root, val_root = data_dir / "train", data_dir / "val"
    if train_root.is_dir() and not val_root.is_dir():
        raise FolderError(f"{data_dir}: has the folder train and no val; put the images to evaluate with into val")
    if not val_root.is_dir():
        assumed.append(f"{data_dir} holds class folders and is used for evaluation alone")
        val_root = data_dir
    elif not train_root.is_dir():
        assumed.append(f"{data_dir} has no folder train and is used for evaluation alone")
    roots = {"val": val_root} | ({"train": train_root} if train_root.is_dir() else {})
    folders = {split: _class_folders(root) for split, root in roots.items()}
    every = sorted(set(chain(*folders.values())))
    if classes_file is None and all(map(_WNID.fullmatch, every)):
        beside = (data_dir / file for file in _CLASSES_FILES)
        classes_file = next((file for file in beside if file.is_file()), None)
    classes = tuple(folders.get("train", folders["val"])) if classes_file is None else _classes_of(classes_file)
    assumed.append(_numbering(data_dir, name, classes, every, classes_file))
    for split, names in folders.items():
        _check_known(roots[split], names, classes, classes_file)
    digest = hashlib.sha256(b"selab.folder/1\0")
    digest.update(b"\0".join(map(os.fsencode, classes)))
    found: dict[str, Split] = {}
    for split in sorted(roots):
        below = "" if roots[split] == data_dir else f"{split}/"
        found[split] = _split(roots[split], folders[split], classes, split=split, below=below, digest=digest)
    return Listing(
        classes=classes,
        train=found.get("train"),
        val=found["val"],
        assumed=tuple(assumed),
        sha256=digest.hexdigest(),
    )


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        present = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    folders = sorted(name for name, is_folder in present if is_folder)
    if not folders:
        images = sum(Path(name).suffix.lower() in _SUFFIXES for name, _ in present)
        if images:
            raise FolderError(
                f"{root}: holds {images:,} images and no class folders; move each into its class's folder"
            )
        raise FolderError(f"{root}: holds no class folders; expected CLASS/IMAGE in it")
    return folders


def _classes_of(file: Path) -> tuple[str, ...]:
    """The classes that a file numbers, one a line."""
    classes = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    if not classes:
        raise FolderError(f"{file}: names no classes; expected one a line, in the order of their numbers")
    if len(set(classes)) < len(classes):
        twice = next(name for index, name in enumerate(classes) if name in classes[:index])
        raise FolderError(f"{file}: names {twice} twice")
    if _is_imagenet(classes) and list(classes) != sorted(classes):
        # There is such a list: the development kit's, in the order of its own identifiers.
        raise FolderError(f"{file}: ImageNet's classes out of order; published weights number the sorted ones; sort it")
    return classes


def _is_imagenet(classes: tuple[str, ...]) -> bool:
    return len(classes) == _IMAGENET_CLASSES and all(map(_WNID.fullmatch, classes))


def _numbering(data_dir: Path, name: str, classes: tuple[str, ...], folders: list[str], file: Path | None) -> str:
    if name == "imagenet" and not _is_imagenet(classes):
        there = f"{file} names" if file is not None else f"{data_dir} has the folders of"
        ask = "give a file of all their wnids, one a line, as --classes-file"
        raise FolderError(
            f"{there} {len(classes):,} classes, not ImageNet's 1,000; {ask}, or as {data_dir / _CLASSES_FILES[0]}"
        )
    if file is not None:
        return f"classes are numbered by the {len(classes):,} lines of {file}; {len(folders):,} of them have folders"
    if all(map(_WNID.fullmatch, folders)) and not _is_imagenet(classes):
        of_own = "not ImageNet's numbers; a file of those, as --classes-file, gives them"
        return f"classes are numbered by their sorted folders, 0 to {len(classes) - 1}: {of_own}"
    return f"classes are numbered by their sorted folders, 0 to {len(classes) - 1}"


def _check_known(root: Path, folders: list[str], classes: tuple[str, ...], file: Path | None) -> None:
    known = set(classes)
    unknown = [name for name in folders if name not in known]
    if unknown:
        where = "the folder train" if file is None else str(file)
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        names = ", ".join(map(_printable, unknown[:NAMED])) + more
        raise FolderError(f"{root}: {names}: no such class in {where}{nearest(unknown[0], classes)}")


def _split(
    root: Path, folders: list[str], classes: tuple[str, ...], *, split: str, below: str, digest: "hashlib._Hash"
) -> Split:
    number = {name: index for index, name in enumerate(classes)}
    listed = sorted(
        (file, size, number[folder])
        for folder in folders
        for file, size in _images_below(root / folder, os.fsencode(folder) + b"/")
    )
    if not listed:
        raise FolderError(f"{root}: its class folders hold no images; known are {', '.join(sorted(_SUFFIXES))}")
    digest.update(f"\0{split}\0{len(listed)}".encode())
    for file, size, _ in listed:
        digest.update(b"\0%b\0%d" % (file, size))
    sampled = min(_SAMPLED, len(listed))
    for index in range(sampled):
        path = root / os.fsdecode(listed[index * len(listed) // sampled][0])
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise FolderError(f"{path}: cannot be read: {error.strerror}") from None
    return Split(
        root=root,
        below=below,
        files=np.array([file for file, _, _ in listed]),
        labels=np.array([label for _, _, label in listed], dtype=np.int64),
    )


def _images_below(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Path and size of every image, however deep; links to folders are not followed, for they may lead in a circle."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(folder / entry.name, prefix + name + b"/")
            elif not entry.name.startswith(".") and Path(entry.name).suffix.lower() in _SUFFIXES:
                try:
                    yield prefix + name, entry.stat().st_size
                except OSError as error:
                    raise FolderError(f"{entry.path}: cannot be read: {error.strerror}") from None


def _printable(name: str) -> str:
    """A file's name for messages and records: bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------------------------------------------- order


def epoch_order(labels: NDArray[np.int64], *, seed: int, epoch: int, balanced: bool) -> NDArray[np.int64]:
    """The indices of an epoch's images in order: each once, or, balanced, each class equally often.

    Balanced sampling keeps two kinds of lists, of the classes and of each class's images: it takes the next class, and
    that class's next image; a list that is used up is shuffled and begun again. An epoch is as long as otherwise.

    Source: arXiv 1512.05830, "class-aware sampling".
    """
    generator = torch.Generator().manual_seed(_hashed("order", seed, epoch))

    def shuffled(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        rounds = -(-most // len(values))
        turns = [values[torch.randperm(len(values), generator=generator).numpy()] for _ in range(rounds)]
        return np.concatenate(turns)[:most] if turns else values[:0]

    if not balanced:
        return shuffled(np.arange(len(labels)), len(labels))
    classes = np.unique(labels)
    drawn = shuffled(classes, len(labels))
    order = np.empty_like(drawn)
    images, places = _by_class(labels), _by_class(drawn)
    for label in classes.tolist():
        where = places.get(label, drawn[:0])
        order[where] = shuffled(images[label], len(where))
    return order


def _by_class(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Class → the indices where it stands."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))


def share(total: int, *, batch: int, number: int, rank: int, world: int) -> range:
    """The places within an epoch of one rank's part of the global batch `number`; the last batch may lack some."""
    part = batch // world
    first = number * batch + rank * part
    return range(min(first, total), min(first + part, total))


def _hashed(*what: object) -> int:
    """A generator's seed, 63 bits, that depends on all of what is given and looks like no other's."""
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ------------------------------------------------------------------------------------------------------------- reading


class _Finding(NamedTuple):
    """One file's peculiarity; `reason` is empty where it could be used all the same."""

    kind: Kind
    file: str
    reason: str


class _Loaded(NamedTuple):
    """One image, (3, H, W) of bytes; None if it was left out. `fault` ends the run."""

    image: Tensor | None
    label: int
    findings: tuple[_Finding, ...]
    fault: str


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    findings: tuple[_Finding, ...]
    fault: str


def decode(content: bytes) -> tuple[Image.Image | None, Kind | None, str]:
    """An image in RGB, what is peculiar about it, and, where it cannot be decoded, why."""
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF data and of large images; both are decoded.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
            mode = image.mode
            converted = image.convert("RGB")
        except MemoryError:
            raise
        except UnidentifiedImageError:
            return None, "corrupt", "is of no known image format"
        except Exception as error:  # decoders raise whatever malformed bytes lead them to
            reason = str(error).partition("\n")[0] or type(error).__name__
            return None, "truncated" if "truncated" in reason.lower() else "corrupt", reason
    kinds: dict[str, Kind | None] = {"RGB": None, "L": "grey", "1": "grey", "I": "grey", "I;16": "grey", "CMYK": "cmyk"}
    return converted, kinds.get(mode, "other"), ""


class _Images(Dataset[_Loaded]):
    """What a worker does: reads, decodes and transforms; an item is asked for by index and, in training, seed."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], classes: tuple[str, ...]) -> None:
        self.split = split
        self.transform = transform
        self.classes = classes
        self.members = _by_class(split.labels)

    def __getitem__(self, asked: tuple[int, int | None]) -> _Loaded:
        index, seed = asked
        label = int(self.split.labels[index])
        findings: list[_Finding] = []
        for candidate in [index] if seed is None else self._candidates(index, label, seed):
            file = os.fsdecode(bytes(self.split.files[candidate]))
            name = self.split.below + _printable(file)
            try:
                content = (self.split.root / file).read_bytes()
            except OSError as error:
                gone = f"{name}: cannot be read: {error.strerror}; it was there when {self.split.root} was listed"
                return _Loaded(None, label, tuple(findings), f"{gone}; bring it back, or open the folder again")
            image, kind, reason = decode(content)
            if kind is not None:
                findings.append(_Finding(kind, name, reason))
            if image is not None:
                return _Loaded(self._transformed(image, seed), label, tuple(findings), "")
        count = len(self.members[label])
        fault = f"{self.split.below}{_printable(self.classes[label])}: none of its {count:,} images can be decoded"
        return _Loaded(None, label, tuple(findings), "" if seed is None else f"{fault}; get them again")

    def _candidates(self, index: int, label: int, seed: int) -> Iterable[int]:
        """The image, and those that take its place one after the other."""
        others = self.members[label]
        start = seed % len(others)
        after = chain(others[start:].tolist(), others[:start].tolist())
        return chain([index], (other for other in after if other != index))

    def _transformed(self, image: Image.Image, seed: int | None) -> Tensor:
        if seed is None:
            return self.transform(image)
        # The transforms draw from torch's own generator. Only the CPU's is set and put back: torch.manual_seed would
        # also set the GPUs', which belong to the network in training.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image)


def _collated(loaded: list[_Loaded]) -> _Batch:
    kept = [(one.image, one.label) for one in loaded if one.image is not None]
    return _Batch(
        images=torch.stack([image for image, _ in kept]) if kept else torch.empty(0, dtype=torch.uint8),
        labels=torch.tensor([label for _, label in kept], dtype=torch.int64),
        findings=tuple(finding for one in loaded for finding in one.findings),
        fault=next((one.fault for one in loaded if one.fault), ""),
    )


@dataclass(frozen=True)
class _PixelJitter:
    """x + a whole number of [-most, most] for each value of each pixel, kept within 0 and 255."""

    most: int

    def __call__(self, image: Tensor) -> Tensor:
        noise = torch.randint(-self.most, self.most + 1, image.shape, dtype=torch.int16)
        return (image + noise).clamp_(0, 255).to(torch.uint8)


def _training_transform(v2: Any, recipe: ImageRecipe) -> Callable[[Image.Image], Tensor]:
    how = v2.InterpolationMode(recipe.interpolation)
    steps = [v2.RandomResizedCrop(recipe.train_size, scale=recipe.scale, ratio=recipe.ratio, interpolation=how)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.rotation_deg:
        steps.append(v2.RandomRotation(recipe.rotation_deg, interpolation=how))
    steps.append(v2.PILToTensor())
    if recipe.pixel_jitter:
        steps.append(_PixelJitter(recipe.pixel_jitter))
    composed: Callable[[Image.Image], Tensor] = v2.Compose(steps)
    return composed


def _test_transform(v2: Any, recipe: ImageRecipe) -> Callable[[Image.Image], Tensor]:
    resize = v2.Resize(recipe.test_resize, interpolation=v2.InterpolationMode(recipe.interpolation))
    composed: Callable[[Image.Image], Tensor] = v2.Compose([resize, v2.CenterCrop(recipe.test_crop), v2.PILToTensor()])
    return composed


def _transforms() -> Any:
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except ModuleNotFoundError as error:
        if error.name in ("torchvision", "torchvision.transforms"):
            raise FolderError("folders of images need torchvision; pip install 'selab[imagenet]'") from None
        raise FolderError(f"importing torchvision fails: {error}; pip install 'selab[imagenet]'") from error
    except Exception as error:
        # One made for another torch fails in many ways.
        told, made_for = str(error).partition("\n")[0], torch.__version__
        raise FolderError(f"importing torchvision fails: {told}; install the one made for torch {made_for}") from error


# ---------------------------------------------------------------------------------------------------------------- data


class _InMemory(Protocol):
    """The augmentation that sets in memory know, of which a folder, having a recipe of its own, takes none."""

    @property
    def crop_pad(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def cutout(self) -> int: ...


class ImageFolder:
    """A folder of images, ready for training and evaluation; made by `open_folder`.

    Attributes:
        name: what it was opened as.
        title: for tables.
        sha256: identity, see `Listing`.
        official: False: nothing is published that the files could be held against.
        num_classes: how many classes are numbered, with images or without.
        input_chw: of a training image; of a test image where there is no training set.
        train_size: images in `train`; 0 where there is none.
        test_size: images in `val`, with those that cannot be decoded.
        image: what is done to the images.
        classes: their names, by number.
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
        v2 = _transforms()
        self.name = name
        self.title = title
        self.sha256 = listing.sha256
        self.official = False
        self.classes = listing.classes
        self.num_classes = len(listing.classes)
        side = image.test_crop if listing.train is None else image.train_size
        self.input_chw = (3, side, side)
        self.train_size = 0 if listing.train is None else len(listing.train.files)
        self.test_size = len(listing.val.files)
        self.image = image
        self._workers = min(workers, _cores())
        self._report = report
        self._test = _Images(listing.val, _test_transform(v2, image), listing.classes)
        self._train = None
        if listing.train is not None:
            self._train = _Images(listing.train, _training_transform(v2, image), listing.classes)
        self._found: dict[str, set[str]] = {kind: set() for kind in Problems.__struct_fields__}
        self._skipped: set[str] = set()

    @property
    def problems(self) -> Problems:
        """What was peculiar among the images that this process has taken so far."""
        return Problems(
            **{kind: Found(count=len(files), first=tuple(sorted(files)[:NAMED])) for kind, files in self._found.items()}
        )

    def share_problems(self) -> Problems:
        """Tells all processes of a training what each of them has found; every one calls it."""
        if dist.is_available() and dist.is_initialized():
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, self._found)
            for kind, files in self._found.items():
                files.update(*(each[kind] for each in told))
        return self.problems

    @property
    def skipped(self) -> tuple[str, ...]:
        """The test images that this process had to leave out so far, by name."""
        return tuple(sorted(self._skipped))

    def train_batches(
        self,
        *,
        batch: int,
        seed: int,
        epoch: int,
        device: torch.device,
        augmentation: _InMemory,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One rank's parts of an epoch's global batches, the last incomplete one left out.

        An image that cannot be decoded is replaced by another of its class.

        Args:
            batch: images of all ranks together.
            seed: of order and augmentation, with `epoch`.
            epoch: from 0.
            device: where the batches are wanted.
            augmentation: must ask for nothing: `image` says what is done.
            first: so many global batches are skipped, without reading them.
            rank: of this process.
            world: how many processes share a batch.

        Yields:
            Images (N, 3, H, W), float32, normalised; labels (N,), int64.

        Raises:
            FolderError: no training images, fewer than `batch`, or an impossible share; while running: a file is gone,
                or a class has no image that can be decoded.
        """
        if self._train is None:
            raise FolderError(f"{self._test.split.root}: there is no folder train beside it; evaluate, or add train")
        if augmentation.crop_pad or augmentation.flip or augmentation.cutout:
            raise FolderError(
                "crop_pad, flip and cutout are for images in memory; what is done to a folder's is ImageRecipe's to say"
            )
        _check_share(batch, rank, world)
        if batch > self.train_size:
            raise FolderError(
                f"{self._train.split.root}: holds {self.train_size:,} images, less than a batch of {batch:,}"
            )
        order = epoch_order(self._train.split.labels, seed=seed, epoch=epoch, balanced=self.image.balanced)

        def asked() -> Iterator[list[tuple[int, int | None]]]:
            for number in range(first, self.train_size // batch):
                places = share(self.train_size, batch=batch, number=number, rank=rank, world=world)
                yield [(int(order[place]), _hashed("image", seed, epoch, place)) for place in places]

        return self._batches(self._train, asked(), device)

    def test_batches(
        self, *, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One rank's parts of the test images in order, each image in one part of one rank.

        Images that cannot be decoded are left out, and named by `skipped`; a batch of which nothing is left is, too.

        Yields:
            Images (N, 3, H, W), float32, normalised; labels (N,), int64.

        Raises:
            FolderError: an impossible share; while running: a file is gone.
        """
        _check_share(batch, rank, world)

        def asked() -> Iterator[list[tuple[int, int | None]]]:
            for number in range(-(-self.test_size // batch)):
                places = share(self.test_size, batch=batch, number=number, rank=rank, world=world)
                if places:
                    yield [(place, None) for place in places]

        return self._batches(self._test, asked(), device)

    def _batches(
        self, images: _Images, asked: Iterator[list[tuple[int, int | None]]], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[_Loaded] = DataLoader(
            images,
            batch_sampler=asked,
            num_workers=self._workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            # Otherwise it draws a seed for its workers from the generator that the training has.
            generator=torch.Generator(),
        )
        loaded = iter(loader)
        while True:
            try:
                batch = next(loaded, None)
            except RuntimeError as error:
                told = str(error).partition("\n")[0]
                raise FolderError(f"{images.split.root}: loading failed: {told}; try a smaller --workers") from error
            if batch is None:
                return
            for finding in batch.findings:
                self._note(finding)
                if finding.reason and images is self._test:
                    self._skipped.add(finding.file)
            if batch.fault:
                raise FolderError(batch.fault)
            if len(batch.labels):
                yield self._normalised(batch.images, device), batch.labels.to(device, non_blocking=True)

    def _note(self, finding: _Finding) -> None:
        files = self._found[finding.kind]
        if finding.reason and finding.file not in files and len(files) < NAMED and self._report is not None:
            self._report(f"{finding.file}: cannot be decoded: {finding.reason}")
        files.add(finding.file)

    def _normalised(self, images: Tensor, device: torch.device) -> Tensor:
        """(x / 255 - mean) / std, on the device, for bytes travel four times as fast."""
        x = images.to(device, non_blocking=True).to(torch.float32)
        # A divisor on the device, for CUDA multiplies by the reciprocal of a Python number, which rounds differently.
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
    """Opens a folder of images; what was concluded from what it holds is reported in sentences.

    Args:
        data_dir: holds `train` and `val`, `val` alone, or class folders; see `find_images`.
        name: `imagenet` for ImageNet or a part of it, with its numbering; any other for any other folder.
        image: what is done to the images; by default `ImageRecipe()`.
        workers: processes that decode, at most one per core; 0 for none; None for `usual_workers()`. They change
            nothing but the speed.
        classes_file: names of all classes, one a line, in the order of their numbers.
        report: is given each sentence.

    Raises:
        FolderError: torchvision is not installed, or as `find_images`.
        RecordError: the file of classes cannot be read.
    """
    if workers is None:
        workers = usual_workers()
    if workers < 0:
        raise FolderError(f"workers: {workers}; must be 0 or more")
    _transforms()
    listing = find_images(data_dir, name=name, classes_file=classes_file)
    sizes = [("training", listing.train)] if listing.train is not None else []
    counted = ", ".join(f"{len(split.files):,} {what} images" for what, split in [*sizes, ("test", listing.val)])
    for sentence in (*listing.assumed, f"{counted}, {len(listing.classes):,} classes"):
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
    if name != "imagenet":
        return f"{_printable(data_dir.resolve().name)}, {val:,} test images"
    if val == _IMAGENET_VAL and train in (0, _IMAGENET_TRAIN):
        return "ImageNet"
    part = f"{train:,} training and " if train else ""
    return f"ImageNet, {part}{val:,} test images"


def usual_workers() -> int:
    """Processes that decode for this one: its share of the cores among those that torchrun started here, at most 8."""
    return min(_MOST_WORKERS, max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_share(batch: int, rank: int, world: int) -> None:
    if batch < 1 or world < 1 or batch % world:
        raise FolderError(f"batch {batch}: cannot be shared by {world} processes; give a multiple of their number")
    if not 0 <= rank < world:
        raise FolderError(f"rank {rank}: must be 0 to {world - 1}")
