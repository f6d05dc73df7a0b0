"""List the images of a folder and their classes."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selab.errors import SelabError, nearest
from selab.records.files import check_regular, read_text
from selab.training.problems import NAMED

Kind = Literal["corrupt", "truncated", "grey", "cmyk", "other"]

# What ILSVRC 2012 holds (arXiv 1409.0575, Table 2).
_IMAGENET_CLASSES, IMAGENET_TRAIN, IMAGENET_VAL = 1000, 1_281_167, 50_000
_WNID = re.compile(r"n\d{8}")
_CLASSES_FILES = ("imagenet_wnids.txt", "classes.txt")
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"}
_SAMPLED = 64  # files of a split whose content enters its identity


class FolderError(SelabError):
    """A folder of images cannot be used, or changed during use; the message names the file or folder."""


# --------------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """The images of one folder of class folders.

    Attributes:
        root: that folder.
        below: prefix of file names in messages: `val/`, or empty for the data's folder itself.
        files: sorted paths below `root`, as the file system's bytes. Workers share an array, where a million strings
            would be copied into each.
        labels: their classes' numbers.
    """

    root: Path
    below: str
    files: NDArray[np.bytes_]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images and classes of a folder.

    Attributes:
        classes: their names, by number.
        assumed: sentences about how the folder was interpreted.
        sha256: over the classes, all paths and sizes, and the content of 64 evenly spaced files per split: reading all
            of ImageNet takes an hour. A changed file of unchanged size may go unnoticed.
        wanted: where no training images are there, what to do about it.
    """

    classes: tuple[str, ...]
    train: ImageSplit | None
    val: ImageSplit
    assumed: tuple[str, ...]
    sha256: str
    wanted: str = "put them into a folder named train beside val"


def find_images(data_dir: Path, *, name: str, classes_file: Path | None = None) -> Listing:
    """List a folder of images and number its classes.

    Args:
        data_dir: holds `train` and `val`, `val` alone, or class folders.
        name: `imagenet` requires ImageNet's numbering.
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
    found: dict[str, ImageSplit] = {}
    for split in sorted(roots):
        below = "" if roots[split] == data_dir else f"{split}/"
        found[split] = _split(roots[split], folders[split], classes, split=split, below=below, digest=digest)
        filled = {classes[number] for number in np.unique(found[split].labels)}
        without = [name for name in folders[split] if name not in filled]
        if without:
            more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
            unfilled = ", ".join(map(printable, without[:NAMED])) + more
            assumed.append(f"{roots[split]}: {unfilled}: no image in it; it is numbered as a class all the same")
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
        images = sum(Path(name).suffix.lower() in SUFFIXES for name, _ in present)
        if images:
            raise FolderError(
                f"{root}: holds {images:,} images and no class folders; move each into its class's folder"
            )
        raise FolderError(f"{root}: holds no class folders; expected CLASS/IMAGE in it")
    return folders


def _classes_of(file: Path) -> tuple[str, ...]:
    """Return the classes that a file lists, one a line."""
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
        names = ", ".join(map(printable, unknown[:NAMED])) + more
        raise FolderError(f"{root}: {names}: no such class in {where}{nearest(unknown[0], classes)}")


def _split(
    root: Path, folders: list[str], classes: tuple[str, ...], *, split: str, below: str, digest: "hashlib._Hash"
) -> ImageSplit:
    number = {name: index for index, name in enumerate(classes)}
    listed = sorted(
        (file, size, number[folder])
        for folder in folders
        for file, size in _images_below(root / folder, os.fsencode(folder) + b"/")
    )
    if not listed:
        raise FolderError(f"{root}: its class folders hold no images; known are {', '.join(sorted(SUFFIXES))}")
    digest_of_files(root, [(file, size) for file, size, _ in listed], split, digest)
    return ImageSplit(
        root=root,
        below=below,
        files=np.array([file for file, _, _ in listed]),
        labels=np.array([label for _, _, label in listed], dtype=np.int64),
    )


def digest_of_files(root: Path, listed: Sequence[tuple[bytes, int]], split: str, digest: "hashlib._Hash") -> None:
    """Add paths and sizes of all images of a split to its identity, and the content of some.

    Raises:
        FolderError: one cannot be read.
    """
    digest.update(f"\0{split}\0{len(listed)}".encode())
    for file, size in listed:
        digest.update(b"\0%b\0%d" % (file, size))
    sampled = min(_SAMPLED, len(listed))
    for index in range(sampled):
        path = root / os.fsdecode(listed[index * len(listed) // sampled][0])
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise FolderError(f"{path}: cannot be read: {error.strerror}") from None


def _images_below(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield path and size of every image, however deep; links to folders are not followed: they may form a cycle."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(folder / entry.name, prefix + name + b"/")
            elif not entry.name.startswith(".") and Path(entry.name).suffix.lower() in SUFFIXES:
                try:
                    status = entry.stat()
                except OSError as error:
                    raise FolderError(f"{entry.path}: cannot be read: {error.strerror}") from None
                # A pipe would let a decoder wait for ever.
                check_regular(Path(entry.path))
                yield prefix + name, status.st_size


def printable(name: str) -> str:
    """Return a file name for messages and records, with bytes that are not UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
