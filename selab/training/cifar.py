"""CIFAR-10 and CIFAR-100 in the published binary layout: found or downloaded, and checked to the last label.

The Python layout is never read: it is pickled, and a pickle can run any code.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from selab.errors import SelabError
from selab.records.files import check_regular, write_atomically
from selab.training.download import DownloadError, DownloadProgress, alone, digest, fetch, unpack, whole_folder
from selab.units import size

Bytes = NDArray[np.uint8]
_CHANNELS, _SIDE = 3, 32
_PIXELS = _CHANNELS * _SIDE * _SIDE
_MARKER = "selab.json"
_REPORT_BYTES = 16 << 20


class DataError(SelabError):
    """A data set is missing or malformed; the message names the folder or the file."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The published layout of a set.

    Attributes:
        title: for tables.
        url: of the archive.
        md5: of the archive.
        folder: what the archive unpacks to.
        train: file of training images → how many it holds, in the official order.
        test: file of test images → how many it holds.
        texts: the other files of the archive.
        labels: classes of each byte before the pixels; the last one is the label.
        pickled: a file by which the layout for Python is known, below the data's folder.
        mean: of the training set, by colour, of 255.
        std: of the training set, by colour, of 255.
    """

    title: str
    url: str
    md5: str
    folder: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    pickled: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> dict[str, int]:
        """All image files, in the official order, with how many images each holds."""
        return {**self.train, **self.test}

    @property
    def row_bytes(self) -> int:
        """Bytes of one image with its labels."""
        return len(self.labels) + _PIXELS


# Layouts and checksums: cs.toronto.edu/~kriz/cifar.html. Means and deviations: datasets/cifar10.lua and cifar100.lua of
# github.com/facebook/fb.resnet.torch; those of nearly all recipes since.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "cifar10": Layout(
            title="CIFAR-10",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train={f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
            test={"test_batch.bin": 10_000},
            texts=("batches.meta.txt",),
            labels=(10,),
            pickled="cifar-10-batches-py/data_batch_1",
            mean=(125.3, 123.0, 113.9),
            std=(63.0, 62.1, 66.7),
        ),
        "cifar100": Layout(
            title="CIFAR-100",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train={"train.bin": 50_000},
            test={"test.bin": 10_000},
            texts=("coarse_label_names.txt", "fine_label_names.txt"),
            labels=(20, 100),
            pickled="cifar-100-python/train",
            mean=(129.3, 124.1, 112.4),
            std=(68.2, 65.4, 70.4),
        ),
    }
)

# Known sets other than the published ones: SHA-256 of the files → what they are.
_COPIES: Mapping[str, str] = MappingProxyType(
    {"08fb299e0e5391067909a4538e22e78002acad367066e87e777127d4237d9d00": "JPEG copy"}
)


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """A set in memory.

    Attributes:
        title: the layout's, and in brackets what it is if it is not the published set.
        sha256: over the bytes of its files, in the official order.
        official: whether it was unpacked from the published archive, and is as it was then.
        train_images: (N, 3, 32, 32).
        train_labels: (N,).
        test_images: (N, 3, 32, 32).
        test_labels: (N,).
        classes: their names, in the order of their numbers; empty where the files do not have them.
    """

    title: str
    sha256: str
    official: bool
    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    classes: tuple[str, ...] = ()


def open_cifar(
    layout: Layout, *, data_dir: Path, download: bool = True, report: Callable[[str], object] | None = None
) -> Cifar:
    """Read a set from `data_dir`, its official folder or its archive there; otherwise download it.

    A set is official if it was unpacked from the archive of the published checksum and is unchanged since. A marker
    file beside it holds both checksums.

    Args:
        layout: one of `LAYOUTS`.
        data_dir: the folder of the files, or the one that their official folder is or will be in.
        download: whether it may be downloaded.
        report: called with a sentence now and then while it is downloaded.

    Raises:
        DataError: the set is missing and cannot be downloaded, or a file is missing, has another size or an impossible
            label.
        DownloadError: the archive or its folder cannot be read, unpacked or written.
    """
    folder = _find(data_dir, layout)
    if folder is None:
        _check_can_be_had(data_dir, layout, download=download)
        with alone(data_dir):
            # Another process may have downloaded it meanwhile.
            folder = _find(data_dir, layout) or _bring(data_dir, layout, report)
    return _read(folder, layout)


def _find(data_dir: Path, layout: Layout) -> Path | None:
    try:
        for folder in (data_dir, data_dir / layout.folder):
            if any((folder / name).exists() for name in layout.files):
                return folder
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be read: {error.strerror}; choose a readable folder") from None
    return None


# ------------------------------------------------------------------------------------------------------------ unpacking
def _check_can_be_had(data_dir: Path, layout: Layout, *, download: bool) -> None:
    for name, other in LAYOUTS.items():
        for folder in (data_dir, data_dir / layout.folder):
            if other is not layout and all((folder / file).exists() for file in other.files):
                raise DataError(
                    f"{folder}: holds the files of {other.title}, not of {layout.title}; give --data {name}, or name "
                    "another folder"
                )
    folder_for_python, _, file = layout.pickled.partition("/")
    if (data_dir / file).is_file():
        raise DataError(
            f"{data_dir}: is {layout.title} for Python, which is pickled and never read; get the binary version: name "
            f"another folder, to download it or with {layout.archive} in it"
        )
    if not download and not (data_dir / layout.archive).exists():
        pickled = (data_dir / layout.pickled).exists()
        but = f" (but {folder_for_python}, which is pickled and never read)" if pickled else ""
        raise DataError(
            f"{data_dir}: holds no {layout.title} in the binary version{but}, and downloading is off; {_wanted(layout)}"
        )


def _wanted(layout: Layout) -> str:
    return (
        f"put {layout.archive} there ({layout.url}), and it is unpacked; unpacked by hand, the folder {layout.folder} "
        "works too, but is called an unverified copy"
    )


def _bring(data_dir: Path, layout: Layout, report: Callable[[str], object] | None) -> Path:
    """Unpack the archive in `data_dir`; download it first, and remove it afterwards, if it is missing."""
    archive, folder = data_dir / layout.archive, data_dir / layout.folder
    downloaded = not archive.exists()
    if downloaded:
        try:
            fetch(layout.url, archive, md5=layout.md5, progress=_reporting(report))
        except DownloadError as error:
            raise DataError(
                f"{data_dir}: holds no {layout.title}, and it cannot be downloaded: {error}; {_wanted(layout)}"
            ) from None
    elif digest(archive) != layout.md5:
        raise DataError(f"{archive}: is broken, or not the published one (MD5 {layout.md5}); get it again")
    sizes = {name: rows * layout.row_bytes for name, rows in layout.files.items()}
    members = {f"{layout.folder}/{name}": sizes.get(name) for name in (*sizes, *layout.texts)}
    with whole_folder(folder) as temporary:
        unpack(archive, temporary, members=members)
        marker = {"archive": layout.archive, "md5": layout.md5, "sha256": _sha256(temporary / layout.folder, layout)}
        write_atomically(temporary / layout.folder / _MARKER, (json.dumps(marker, indent=1) + "\n").encode())
    if downloaded:
        archive.unlink()
    return folder


def _reporting(report: Callable[[str], object] | None) -> Callable[[DownloadProgress], object] | None:
    """Return a function that reports every 16 MiB and the last byte; None without a report."""
    if report is None:
        return None
    told = -1

    def progress(now: DownloadProgress) -> None:
        nonlocal told
        if now.done_bytes // _REPORT_BYTES > told or now.done_bytes == now.total_bytes:
            told = now.done_bytes // _REPORT_BYTES
            total = "" if now.total_bytes is None else f" of {size(now.total_bytes, digits=3)}"
            report(f"{now.file}: {size(now.done_bytes, digits=3)}{total}")

    return progress


# ------------------------------------------------------------------------------------------------------------- reading
def _read(folder: Path, layout: Layout) -> Cifar:
    sha256 = hashlib.sha256()

    def split(files: Mapping[str, int]) -> tuple[Bytes, Bytes]:
        images = np.empty((sum(files.values()), _CHANNELS, _SIDE, _SIDE), dtype=np.uint8)
        labels = np.empty(len(images), dtype=np.uint8)
        at = 0
        for name, count in files.items():
            rows = _rows(folder / name, count, layout)
            sha256.update(rows.data)
            images[at : at + count].reshape(count, _PIXELS)[:] = rows[:, -_PIXELS:]
            labels[at : at + count] = rows[:, len(layout.labels) - 1]
            at += count
        return images, labels

    train_images, train_labels = split(layout.train)
    test_images, test_labels = split(layout.test)
    identity = sha256.hexdigest()
    official = _marked(folder) == (layout.md5, identity)
    what = "" if official else f" ({_COPIES.get(identity, 'unverified copy')})"
    return Cifar(
        title=f"{layout.title}{what}",
        sha256=identity,
        official=official,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=_class_names(folder / layout.texts[-1], layout.labels[-1]),
    )


def _class_names(path: Path, number: int) -> tuple[str, ...]:
    """Return the names of the classes, one a line; none where the file is missing, or is something else."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_NAMES:
            return ()
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return ()
    names = tuple(one.strip() for one in lines if one.strip())
    return names if len(set(names)) == number and all(one.isprintable() for one in names) else ()


# Bytes of a file of names.
_MOST_NAMES = 1 << 16


def _rows(path: Path, count: int, layout: Layout) -> Bytes:
    """Return a file's images, each after its labels: (count, row_bytes)."""
    check_regular(path)
    try:
        found = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {_again(path, layout)}") from None
    expected = count * layout.row_bytes
    if found.size != expected:
        kinds = [one.title for one in LAYOUTS.values() if one is not layout and found.size == count * one.row_bytes]
        whose = f", as many as images of {kinds[0]} have" if kinds else ""
        raise DataError(f"{path}: has {found.size:,} bytes{whose}, expected {expected:,}; {_again(path, layout)}")
    rows = found.reshape(count, layout.row_bytes)
    for column, classes in enumerate(layout.labels):
        wrong = np.flatnonzero(rows[:, column] >= classes)
        if wrong.size:
            raise DataError(
                f"{path}: image {wrong[0]:,} has the label {rows[wrong[0], column]}, allowed are 0 to {classes - 1}; "
                f"{_again(path, layout)}"
            )
    return rows


def _again(path: Path, layout: Layout) -> str:
    folder = path.parent
    if (folder.parent / layout.archive).is_file():
        return f"take {folder.name} away: it is unpacked anew from {layout.archive} beside it"
    return f"take {folder.name} away, and put {layout.archive} in its place or let it be downloaded"


def _marked(folder: Path) -> tuple[str, str] | None:
    """Return the checksum of the archive a folder was unpacked from, and the SHA-256 of its files at that time."""
    try:
        if not (folder / _MARKER).is_file():
            return None
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return str(marker["md5"]), str(marker["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not unpacked by this package


def _sha256(folder: Path, layout: Layout) -> str:
    whole = hashlib.sha256()
    for name in layout.files:
        check_regular(folder / name)
        whole.update((folder / name).read_bytes())
    return whole.hexdigest()
