"""Decode the image files of a folder, in worker processes or in this one."""

import io
import os
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from selab import units
from selab.training.image_listing import ImageSplit, Kind, printable


def by_class(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Return the indices of each class."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))


# ------------------------------------------------------------------------------------------------------------- reading
class ImageFinding(NamedTuple):
    """An unusual file; `reason` says why it `cannot` be decoded or used, and is empty if it can."""

    kind: Kind
    file: str
    reason: str
    cannot: str = "be decoded"


class Loaded(NamedTuple):
    """One image, (3, H, W) uint8, None if it was left out. A `fault` ends the run."""

    image: Tensor | None
    label: int
    findings: tuple[ImageFinding, ...]
    fault: str


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    findings: tuple[ImageFinding, ...]
    fault: str


def decode(content: bytes) -> tuple[Image.Image | None, Kind | None, str]:
    """Decode an image to RGB.

    Returns:
        The image, None if it cannot be decoded; what is peculiar about it; why it cannot be decoded.
    """
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


class FileImage(NamedTuple):
    """A file that was read: its name in messages, and as `decode`; `gone` says that it cannot be read any more."""

    name: str
    image: Image.Image | None
    kind: Kind | None
    reason: str
    gone: str = ""


def read_image(root: Path, below: str, raw: bytes) -> FileImage:
    """Read and decode a file of a listing.

    Args:
        root: the folder that was listed.
        below: prefix of file names in messages.
        raw: the path below `root`, as the file system's bytes.
    """
    file = os.fsdecode(raw)
    name = below + printable(file)
    try:
        content = (root / file).read_bytes()
    except OSError as error:
        gone = f"{name}: cannot be read: {error.strerror}; it was there when {root} was listed"
        return FileImage(name, None, None, "", f"{gone}; bring it back, or open the folder again")
    return FileImage(name, *decode(content))


class ImageFiles(Dataset[Loaded]):
    """The images of a split; an item is an index and, in training, the seed of what is random in its transform.

    Args:
        split: the files.
        transform: called with an RGB image and the seed; returns (3, H, W) uint8.
        classes: their names, by number.
    """

    def __init__(
        self, split: ImageSplit, transform: Callable[[Image.Image, int | None], Tensor], classes: tuple[str, ...]
    ) -> None:
        self.split = split
        self.transform = transform
        self.classes = classes
        self.members = by_class(split.labels)

    def __getitem__(self, asked: tuple[int, int | None]) -> Loaded:
        index, seed = asked
        label = int(self.split.labels[index])
        findings: list[ImageFinding] = []
        for candidate in [index] if seed is None else self._candidates(index, label, seed):
            raw = bytes(self.split.files[candidate])
            name, image, kind, reason, gone = read_image(self.split.root, self.split.below, raw)
            if gone:
                return Loaded(None, label, tuple(findings), gone)
            if kind is not None:
                findings.append(ImageFinding(kind, name, reason))
            if image is not None:
                return Loaded(self.transform(image, seed), label, tuple(findings), "")
        count = units.counted(len(self.members[label]), "image")
        fault = f"{self.split.below}{printable(self.classes[label])}: none of its {count} can be decoded"
        return Loaded(None, label, tuple(findings), "" if seed is None else f"{fault}; get them again")

    def _candidates(self, index: int, label: int, seed: int) -> Iterable[int]:
        """Return the image, then those of its class that replace it, in turn."""
        others = self.members[label]
        start = seed % len(others)
        after = chain(others[start:].tolist(), others[:start].tolist())
        return chain([index], (other for other in after if other != index))


def collated(loaded: list[Loaded]) -> _Batch:
    """Collate the decoded images, with all findings and the first fault."""
    kept = [(one.image, one.label) for one in loaded if one.image is not None]
    return _Batch(
        images=torch.stack([image for image, _ in kept]) if kept else torch.empty(0, dtype=torch.uint8),
        labels=torch.tensor([label for _, label in kept], dtype=torch.int64),
        findings=tuple(finding for one in loaded for finding in one.findings),
        fault=next((one.fault for one in loaded if one.fault), ""),
    )
