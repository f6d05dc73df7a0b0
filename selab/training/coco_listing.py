"""Images with boxes in the format of COCO: annotation files read strictly, what is broken in them counted and named.

    DIR/annotations/instances_train2017.json, instances_val2017.json
    DIR/train2017/000000000009.jpg, DIR/val2017/000000000139.jpg

Without a year the names are `train` and `val`. The classes of a detector are the numbers of the file's categories, as
torchvision's detectors have them: COCO's 80 categories have numbers up to 90.

Source: cocodataset.org, "Data format"; Lin et al., arXiv 1405.0312.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from selab.records.bounds import json_fault
from selab.training.image_listing import FolderError, digest_of_files
from selab.training.problems import NAMED

_FOLDER = "annotations"
# Where validation images are, and training images; `minival` is the part of val2014 that became val2017.
_VAL = {"val2017": "val2017", "minival2014": "val2014", "val2014": "val2014", "val": "val"}
_TRAIN = {"train2017": "train2017", "train2014": "train2014", "train": "train"}
# A head has an output for each number up to the largest; nobody numbers classes by millions.
_MOST_CLASSES = 10_000


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _Category(msgspec.Struct):
    id: int
    name: str


class _Annotation(msgspec.Struct):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int = 0


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


@dataclass(frozen=True, kw_only=True)
class BoxedImages:
    """Images and their boxes, in arrays: worker processes share those, where millions of objects would be copied.

    Attributes:
        root: folder of the images.
        below: prefix of file names in messages.
        files: paths below `root`, as the file system's bytes, (N,).
        ids: the numbers of the images in the annotation file, (N,).
        sizes: height and width, (N, 2).
        starts: image i has the boxes from `starts[i]` to `starts[i + 1]`, (N + 1,).
        boxes: x1, y1, x2, y2 in pixels within the image, (M, 4).
        labels: numbers of their categories, (M,).
        crowd: whether a box holds many objects; such boxes are not trained on, and detections in them are not judged.
        areas: of the objects, in square pixels, (M,).
    """

    root: Path
    below: str
    files: NDArray[np.bytes_]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.files)

    def select(self, indices: NDArray[np.int64]) -> "BoxedImages":
        """Return some of the images, in the given order, with their boxes."""
        where = [np.arange(self.starts[one], self.starts[one + 1]) for one in indices.tolist()]
        rows = np.concatenate(where) if where else np.zeros(0, dtype=np.int64)
        return replace(
            self,
            files=self.files[indices],
            ids=self.ids[indices],
            sizes=self.sizes[indices],
            starts=np.cumsum([0, *map(len, where)], dtype=np.int64),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
        )

    def of(self, index: int) -> slice:
        """Return where the boxes of an image are."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


@dataclass(frozen=True, kw_only=True)
class CocoListing:
    """The images, boxes and categories of a folder.

    Attributes:
        categories: name by number.
        assumed: sentences about how the folder was interpreted, and what was left out.
        sha256: over the annotation files, all paths and sizes, and the content of some images.
    """

    categories: dict[int, str]
    train: BoxedImages | None
    val: BoxedImages
    assumed: tuple[str, ...]
    sha256: str

    @property
    def num_classes(self) -> int:
        """The outputs of a detector's classifier: the largest number of a category, and one for the background."""
        return max(self.categories) + 1


@dataclass
class _Left:
    """What was left out or changed, by kind: how often, and the first of it."""

    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, kind: str, what: object) -> None:
        count, first = self.found.get(kind, (0, []))
        self.found[kind] = (count + 1, [*first, str(what)] if len(first) < NAMED else first)

    def sentences(self) -> Iterator[str]:
        for kind, (count, first) in self.found.items():
            named = ", ".join(first) + (", …" if count > len(first) else "")
            yield f"{kind}: {count:,} ({named})"


def find_coco(data_dir: Path) -> CocoListing:
    """List a folder in the format of COCO.

    An annotation that cannot be used is left out, counted and named: of an image that is not listed, without a number
    of the categories, without an area, outside its image, or malformed. A box that leaves its image is cut. An image
    whose file is missing is left out; one without boxes is kept for evaluation, and not trained on.

    Raises:
        FolderError: there is no annotation file, it is not such a file, or nothing in it can be used.
    """
    if not data_dir.is_dir():
        raise FolderError(f"{data_dir}: is no folder; name one that holds {_FOLDER}/instances_val2017.json and val2017")
    val_name, train_name = (_present(data_dir, names) for names in (_VAL, _TRAIN))
    if val_name is None:
        raise FolderError(
            f"{data_dir / _FOLDER}: has no annotation file of images to evaluate on; expected one of "
            f"{', '.join(f'instances_{name}.json' for name in _VAL)}"
        )
    digest = hashlib.sha256(b"selab.coco/1\0")
    assumed: list[str] = []
    val, categories = _read(data_dir, val_name, _VAL[val_name], digest, assumed, training=False)
    train = None
    if train_name is not None and (data_dir / _TRAIN[train_name]).is_dir():
        train, others = _read(data_dir, train_name, _TRAIN[train_name], digest, assumed, training=True)
        if others != categories:
            odd = sorted(set(others.items()) ^ set(categories.items()))[0]
            raise FolderError(
                f"{data_dir / _FOLDER}: the categories of {train_name} and {val_name} differ, first in number {odd[0]} "
                f"({odd[1]}); give both files the same"
            )
    else:
        assumed.append(f"{data_dir} has no training images with annotations and is used for evaluation alone")
    return CocoListing(categories=categories, train=train, val=val, assumed=tuple(assumed), sha256=digest.hexdigest())


def _present(data_dir: Path, names: dict[str, str]) -> str | None:
    return next((name for name in names if (data_dir / _FOLDER / f"instances_{name}.json").is_file()), None)


def _read(
    data_dir: Path, name: str, folder: str, digest: "hashlib._Hash", assumed: list[str], *, training: bool
) -> tuple[BoxedImages, dict[int, str]]:
    file, root = data_dir / _FOLDER / f"instances_{name}.json", data_dir / folder
    if not root.is_dir():
        raise FolderError(f"{root}: is no folder; {file.name} names images in it")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise FolderError(f"{file}: cannot be read: {error.strerror}") from None
    left = _Left()
    content = _decoded(raw, file, left)
    categories = _categories(content, file)
    content.images = _once(content.images, "images", left)
    content.annotations = _once(content.annotations, "annotations", left)
    listed = {one.id: one for one in content.images}
    there = _there(listed, root, left)
    boxes = _boxes(content, listed, categories, left)
    if training:
        for number in [one for one in there if not any(not crowd for _, _, crowd, _ in boxes.get(one, ()))]:
            left.add("images without boxes, not trained on", listed[number].file_name)
            del there[number]
    assumed.extend(f"{file.parent.name}/{file.name}: {sentence}" for sentence in left.sentences())
    if not there:
        why = "; ".join(left.sentences()) or "it lists none"
        raise FolderError(f"{file}: none of its images can be used: {why}")
    digest.update(hashlib.sha256(raw).digest())
    order = sorted(there, key=lambda number: os.fsencode(listed[number].file_name))
    digest_of_files(root, [(os.fsencode(listed[one].file_name), there[one]) for one in order], name, digest)
    rows = [boxes.get(one, []) for one in order]
    every = [row for group in rows for row in group]
    return (
        BoxedImages(
            root=root,
            below=f"{folder}/",
            files=np.array([os.fsencode(listed[one].file_name) for one in order]),
            ids=np.array(order, dtype=np.int64),
            sizes=np.array([(listed[one].height, listed[one].width) for one in order], dtype=np.int64),
            starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            boxes=np.array([box for box, _, _, _ in every], dtype=np.float32).reshape(-1, 4),
            labels=np.array([label for _, label, _, _ in every], dtype=np.int64),
            crowd=np.array([crowd for _, _, crowd, _ in every], dtype=np.bool_),
            areas=np.array([area for _, _, _, area in every], dtype=np.float32),
        ),
        categories,
    )


def _decoded(raw: bytes, file: Path, left: _Left) -> _File:
    """Return an annotation file's content; entries that are malformed are left out one by one."""
    try:
        return msgspec.json.decode(raw, type=_File)
    except msgspec.DecodeError as error:
        # Slower: each entry by itself. Python's reader takes the NaN that Python's writer writes.
        fault = json_fault(raw.decode("utf-8", "replace"), error)
    try:
        loose = json.loads(raw)
    except (ValueError, RecursionError):
        raise FolderError(f"{file}: {fault}; get it again") from None
    keys = ("images", "categories", "annotations")
    if not isinstance(loose, dict) or not all(isinstance(loose.get(key), list) for key in keys):
        raise FolderError(f"{file}: {fault}; expected lists named {', '.join(keys)}")
    try:
        categories = msgspec.convert(loose["categories"], list[_Category])
    except msgspec.ValidationError as error:
        raise FolderError(f"{file}: categories: {error}; each needs a number, id, and a name") from None
    return _File(
        images=_usable(loose["images"], _Image, "images", left),
        categories=categories,
        annotations=_usable(loose["annotations"], _Annotation, "annotations", left),
    )


_Entry = TypeVar("_Entry", _Image, _Annotation)


def _usable(entries: list[object], kind: type[_Entry], name: str, left: _Left) -> list[_Entry]:
    found = []
    for number, one in enumerate(entries):
        try:
            found.append(msgspec.convert(one, kind))
        except msgspec.ValidationError:
            left.add(f"malformed {name}, left out", f"{name}[{number}]")
    return found


def _once(entries: list[_Entry], name: str, left: _Left) -> list[_Entry]:
    """Return the entries without those whose number an earlier one has."""
    found: dict[int, _Entry] = {}
    for one in entries:
        if found.setdefault(one.id, one) is not one:
            left.add(f"{name} with the number of an earlier one, left out", f"id {one.id}")
    return list(found.values())


def _categories(content: _File, file: Path) -> dict[int, str]:
    found = {one.id: one.name for one in content.categories}
    if not found:
        raise FolderError(f"{file}: lists no categories")
    if len(found) < len(content.categories):
        numbers = [one.id for one in content.categories]
        twice = next(one for one in numbers if numbers.count(one) > 1)
        raise FolderError(f"{file}: gives the number {twice} to two categories")
    wrong = next((one for one in found if not 1 <= one <= _MOST_CLASSES), None)
    if wrong is not None:
        raise FolderError(
            f"{file}: the category {found[wrong]} has the number {wrong}; allowed: 1 to {_MOST_CLASSES:,}, 0 is the "
            "background; number them again"
        )
    return dict(sorted(found.items()))


def _there(listed: dict[int, _Image], root: Path, left: _Left) -> dict[int, int]:
    """Return the bytes of each listed image whose file is there, by number."""
    there = {}
    for number, one in listed.items():
        path = root / one.file_name
        if ".." in Path(one.file_name).parts or Path(one.file_name).is_absolute():
            left.add(f"images outside {root.name}, left out", one.file_name)
            continue
        if one.width < 1 or one.height < 1:
            left.add("images without a size, left out", one.file_name)
            continue
        try:
            status = path.stat()
        except (OSError, ValueError):
            left.add(f"images that are not in {root.name}, left out", one.file_name)
            continue
        if not stat.S_ISREG(status.st_mode):
            left.add(f"images that are no files in {root.name}, left out", one.file_name)
            continue
        there[number] = status.st_size
    return there


_Row = tuple[tuple[float, float, float, float], int, bool, float]


def _boxes(content: _File, listed: dict[int, _Image], categories: dict[int, str], left: _Left) -> dict[int, list[_Row]]:
    """Return box, label, crowd and area of each annotation that can be used, by the number of the image."""
    rows: dict[int, list[_Row]] = {}
    for one in content.annotations:
        image = listed.get(one.image_id)
        x, y, width, height = one.bbox
        if image is None:
            left.add("annotations of images that it does not list, left out", f"id {one.id}")
            continue
        if one.category_id not in categories:
            left.add("annotations of a category that it does not list, left out", f"id {one.id}: {one.category_id}")
            continue
        if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
            left.add("boxes without an area, left out", f"id {one.id}")
            continue
        box = (max(0.0, x), max(0.0, y), min(float(image.width), x + width), min(float(image.height), y + height))
        # As they will be stored: a side may be lost by rounding.
        x1, y1, x2, y2 = map(np.float32, box)
        if x1 >= x2 or y1 >= y2:
            left.add("boxes outside their image, left out", f"id {one.id}")
            continue
        # COCO's own boxes exceed their images by parts of a pixel.
        if min(x, y) < -1 or x + width > image.width + 1 or y + height > image.height + 1:
            left.add("boxes that leave their image, cut", f"id {one.id}")
        area = one.area if one.area is not None else width * height
        rows.setdefault(one.image_id, []).append((box, one.category_id, bool(one.iscrowd), area))
    return rows
