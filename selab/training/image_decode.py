"""Decode images and transform them to tensors."""

import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from selab.training.image_listing import FolderError, Kind, Split, printable
from selab.training.recipe import ImageRecipe


def by_class(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Class → the indices where it stands."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))


# ------------------------------------------------------------------------------------------------------------- reading
class Finding(NamedTuple):
    """One file's peculiarity; `reason` is empty where it could be used all the same."""

    kind: Kind
    file: str
    reason: str


class Loaded(NamedTuple):
    """One image, (3, H, W) of bytes; None if it was left out. `fault` ends the run."""

    image: Tensor | None
    label: int
    findings: tuple[Finding, ...]
    fault: str


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    findings: tuple[Finding, ...]
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


class ImageFiles(Dataset[Loaded]):
    """What a worker does: reads, decodes and transforms; an item is asked for by index and, in training, seed."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], classes: tuple[str, ...]) -> None:
        self.split = split
        self.transform = transform
        self.classes = classes
        self.members = by_class(split.labels)

    def __getitem__(self, asked: tuple[int, int | None]) -> Loaded:
        index, seed = asked
        label = int(self.split.labels[index])
        findings: list[Finding] = []
        for candidate in [index] if seed is None else self._candidates(index, label, seed):
            file = os.fsdecode(bytes(self.split.files[candidate]))
            name = self.split.below + printable(file)
            try:
                content = (self.split.root / file).read_bytes()
            except OSError as error:
                gone = f"{name}: cannot be read: {error.strerror}; it was there when {self.split.root} was listed"
                return Loaded(None, label, tuple(findings), f"{gone}; bring it back, or open the folder again")
            image, kind, reason = decode(content)
            if kind is not None:
                findings.append(Finding(kind, name, reason))
            if image is not None:
                return Loaded(self._transformed(image, seed), label, tuple(findings), "")
        count = len(self.members[label])
        fault = f"{self.split.below}{printable(self.classes[label])}: none of its {count:,} images can be decoded"
        return Loaded(None, label, tuple(findings), "" if seed is None else f"{fault}; get them again")

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


def collated(loaded: list[Loaded]) -> _Batch:
    """Collate images that could be decoded; findings and the first fault travel beside them."""
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


def training_transform(v2: Any, recipe: ImageRecipe) -> Callable[[Image.Image], Tensor]:
    """Return the random transform of training."""
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


def test_transform(v2: Any, recipe: ImageRecipe) -> Callable[[Image.Image], Tensor]:
    """Return the deterministic transform of evaluation: resize and centre crop."""
    resize = v2.Resize(recipe.test_resize, interpolation=v2.InterpolationMode(recipe.interpolation))
    composed: Callable[[Image.Image], Tensor] = v2.Compose([resize, v2.CenterCrop(recipe.test_crop), v2.PILToTensor()])
    return composed


def torchvision_transforms() -> Any:
    """Import `torchvision.transforms.v2`."""
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
