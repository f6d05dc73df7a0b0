"""Read a folder of images as input for calibration and for comparison."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from selab.errors import DeviceError
from selab.records.files import shown
from selab.training.image_listing import SUFFIXES, FolderError
from selab.training.recipe import ImageRecipe

# Of each side that is cut off: the central 224 of 256 pixels.
_BLEED = 1 / 16
# Mean and deviation of each colour.
_PREPARED = ImageRecipe()


def read_images(folder: Path, image: tuple[int, int, int], most: int) -> list[Tensor]:
    """Return images of a folder and of the folders in it, evenly spaced over their sorted names.

    Each is cut to the central 7/8 of the wanted shape, resized (bilinear) and normalised by ImageNet's mean and
    deviation. One that cannot be decoded is skipped.

    Args:
        folder: of the images, at any depth.
        image: channels, height and width; three channels.
        most: as many at most.

    Returns:
        Tensors (1, 3, H, W) fp32.

    Raises:
        DeviceError: pillow is not installed.
        FolderError: no such folder, no image in it that can be decoded, or another number of channels.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise DeviceError("images: need the package pillow; run pip install 'selab[imagenet]'") from None
    channels, height, width = image
    if channels != 3:
        raise FolderError(f"{shown(folder)}: the network takes {channels} channels, images have 3; leave it out")
    if not folder.is_dir():
        raise FolderError(f"{shown(folder)}: is no folder; name one that holds images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    found = []
    for file in _spaced(files, most):
        try:
            with Image.open(file) as opened:
                fitted = ImageOps.fit(opened.convert("RGB"), (width, height), Image.Resampling.BILINEAR, bleed=_BLEED)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_PREPARED.mean, _PREPARED.std))
        found.append((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise FolderError(f"{shown(folder)}: holds no image that can be decoded ({kinds}); name a folder of images")
    return [one.contiguous() for one in found]


def _spaced(files: Sequence[Path], most: int) -> list[Path]:
    number = min(most, len(files))
    return [files[place * len(files) // number] for place in range(number)]


def batches(images: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Return batches (batch, C, H, W) of single images, the last one filled up from the beginning."""
    number = -(-len(images) // batch)
    return [
        torch.cat([images[(first * batch + place) % len(images)] for place in range(batch)]) for first in range(number)
    ]
