"""Places365 as it is distributed: class folders, or lists of files beside folders of images.

    DIR/train/airfield/*.jpg, DIR/val/airfield/*.jpg              `places365standard_easyformat`
    DIR/places365_train_standard.txt, DIR/places365_val.txt       the lists, and the images in
    DIR/data_256/a/airfield/*.jpg, DIR/val_256/*.jpg              `train_256_places365standard`, `val_256`

Classes are numbered by `categories_places365.txt`, where it is there, else by the sorted folders: the same numbers.

Source: Zhou et al., "Places: A 10 million Image Database for Scene Recognition", TPAMI 2017.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selab import units
from selab.records.files import check_regular, read_text
from selab.training.image_listing import FolderError, ImageSplit, Listing, digest_of_files, find_images, printable
from selab.training.problems import NAMED

CLASSES = 365
# Of Places365-Standard and Places365-Challenge (places2.csail.mit.edu/download.html).
TRAIN_SIZES = {"Standard": 1_803_460, "Challenge": 8_026_628}
VAL_SIZE = 36_500
_CATEGORIES = "categories_places365.txt"
_TRAIN_LISTS = ("places365_train_standard.txt", "places365_train_challenge.txt")
_VAL_LIST = "places365_val.txt"
# What the archives unpack to, and what torchvision calls it.
_TRAIN_FOLDERS = ("data_256", "data_256_standard", "data_256_challenge", "data_large", "data_large_standard")
_VAL_FOLDERS = ("val_256", "val_large")
_LINE = re.compile(r"(\S.*?)\s+(\d+)")


def find_places365(data_dir: Path) -> Listing:
    """List Places365 in either of its layouts.

    Images that a list names and that are not there are left out and told.

    Raises:
        FolderError: neither layout is there, a list is malformed, there are not 365 classes, or no image is there.
        RecordError: a list cannot be read.
    """
    if not data_dir.is_dir():
        raise FolderError(f"{data_dir}: is no folder; name one that holds Places365")
    if not (data_dir / _VAL_LIST).is_file():
        return _of_folders(data_dir)
    categories = data_dir / _CATEGORIES
    if not categories.is_file():
        raise FolderError(f"{categories}: is missing beside {_VAL_LIST}; it names the classes of the lists' numbers")
    classes = _classes_of(categories)
    assumed = [f"classes are numbered by {categories}"]
    digest = hashlib.sha256(b"selab.places365/1\0")
    digest.update(b"\0".join(map(os.fsencode, classes)))
    trains = [file for name in _TRAIN_LISTS if (file := data_dir / name).is_file()]
    if len(trains) > 1:
        raise FolderError(f"{data_dir}: holds {' and '.join(one.name for one in trains)}; leave one of them")
    train = None
    if trains and any((data_dir / name).is_dir() for name in _TRAIN_FOLDERS):
        train = _listed(trains[0], data_dir, _TRAIN_FOLDERS, "train", digest, assumed)
    else:
        assumed.append(
            f"{data_dir} has no {' or '.join(_TRAIN_LISTS)} with one of the folders {', '.join(_TRAIN_FOLDERS)} and is "
            "used for evaluation alone"
        )
    val = _listed(data_dir / _VAL_LIST, data_dir, _VAL_FOLDERS, "val", digest, assumed)
    wanted = f"put {_TRAIN_LISTS[0]} and {_TRAIN_FOLDERS[0]} beside {_VAL_LIST}"
    return Listing(
        classes=classes, train=train, val=val, assumed=tuple(assumed), sha256=digest.hexdigest(), wanted=wanted
    )


def title_of(train: int, val: int) -> str:
    """Return the title of a part of Places365, or of the whole, by its numbers of images."""
    whole = next((name for name, size in TRAIN_SIZES.items() if train == size), "")
    if val == VAL_SIZE and (whole or not train):
        return f"Places365-{whole}" if whole else "Places365"
    part = f"{train:,} training and " if train else ""
    return f"Places365, {part}{val:,} test images"


def _of_folders(data_dir: Path) -> Listing:
    unlisted = next((one for one in (*_VAL_FOLDERS, *_TRAIN_FOLDERS) if (data_dir / one).is_dir()), None)
    if unlisted is not None:
        raise FolderError(f"{data_dir / _VAL_LIST}: is missing; it lists the images of {_VAL_FOLDERS[0]}; put it there")
    if not any(one.is_dir() for one in data_dir.iterdir()):
        raise FolderError(
            f"{data_dir}: holds neither train and val with a folder per class, nor {_VAL_LIST} with {_VAL_FOLDERS[0]}"
        )
    categories = data_dir / _CATEGORIES
    listing = find_images(data_dir, name="places365", classes_file=None)
    named = _classes_of(categories) if categories.is_file() else listing.classes
    if listing.classes != named:
        found = set(listing.classes)
        odd = next((one for one in listing.classes if one not in named), None) or next(
            (one for one in named if one not in found), "their order"
        )
        raise FolderError(
            f"{data_dir}: its class folders are not the classes of {categories}: {printable(odd)} differs"
        )
    if len(listing.classes) != CLASSES:
        raise FolderError(
            f"{data_dir}: has {units.counted(len(listing.classes), 'class folder')}, and Places365 has {CLASSES}; for "
            "another set, use --data folder"
        )
    return listing


def _classes_of(file: Path) -> tuple[str, ...]:
    """Return the classes by number, as folders of the easy layout name them: `apartment_building-outdoor`."""
    names: dict[int, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        found = _LINE.fullmatch(line.strip())
        if found is None or not re.match(r"/\w/", found[1]):
            raise FolderError(
                f"{file}, line {number}: {line[:40]!r}: expected a category and its number: /a/airfield 0"
            )
        names[int(found[2])] = found[1][3:].replace("/", "-")
    if sorted(names) != list(range(CLASSES)):
        odd = min(set(range(CLASSES)) ^ set(names))
        if len(names) < CLASSES:
            raise FolderError(f"{file}: names {len(names)} of {CLASSES} categories; the first missing number is {odd}")
        which = f"gives {names[odd]} the number {odd}" if odd in names else f"has no category of the number {odd}"
        raise FolderError(f"{file}: {which}; expected 0 to {CLASSES - 1}")
    return tuple(names[number] for number in range(CLASSES))


def _listed(
    file: Path, data_dir: Path, folders: Sequence[str], split: str, digest: "hashlib._Hash", assumed: list[str]
) -> ImageSplit:
    """Return the images that a list names and that are there."""
    root = next((data_dir / name for name in folders if (data_dir / name).is_dir()), None)
    if root is None:
        raise FolderError(f"{data_dir}: has {file.name} and none of the folders {', '.join(folders)} with its images")
    found: list[tuple[bytes, int, int]] = []
    missing: list[str] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        entry = _LINE.fullmatch(line.strip())
        if entry is None or int(entry[2]) >= CLASSES:
            raise FolderError(
                f"{file}, line {number}: {line[:60]!r}: expected an image and a class from 0 to {CLASSES - 1}"
            )
        name = entry[1].lstrip("/")
        if ".." in Path(name).parts:
            raise FolderError(f"{file}, line {number}: {line[:60]!r}: leads out of {root.name}")
        try:
            size = (root / name).stat().st_size
        except OSError:
            missing.append(name)
            continue
        check_regular(root / name)
        found.append((os.fsencode(name), size, int(entry[2])))
    if not found:
        raise FolderError(f"{root}: holds none of the {len(missing):,} images of {file.name}")
    if missing:
        named = ", ".join(map(printable, missing[:NAMED])) + (", …" if len(missing) > NAMED else "")
        assumed.append(f"{root}: {units.counted(len(missing), 'image')} of {file.name} missing and left out: {named}")
    found.sort()
    digest_of_files(root, [(name, size) for name, size, _ in found], split, digest)
    return ImageSplit(
        root=root,
        below=f"{root.name}/",
        files=np.array([name for name, _, _ in found]),
        labels=np.array([label for _, _, label in found], dtype=np.int64),
    )
