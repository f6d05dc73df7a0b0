"""A small set of images with boxes in the format of COCO: squares, discs and triangles on a background of noise.

It is for a first try of a detector and for tests. Its arithmetic is in integers, so that images and boxes are the same
on every machine.
"""

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selab.records.files import write_atomically
from selab.training.augment import below, words

CLASSES = {1: "square", 2: "disc", 3: "triangle"}
_SIDE = 128
_LEAST, _MOST = 20, 56  # pixels of a shape's side
_MOST_SHAPES = 4
_TRIES = 8  # places that are tried for a shape that does not touch another
_NOISE = 64
_TRAIN, _VAL = 6, 7  # purposes of the random words
_PER_SHAPE = 7

Bytes = NDArray[np.uint8]


def write_shapes(folder: Path, *, train_size: int = 256, val_size: int = 64, seed: int = 0) -> Path:
    """Write the set into a folder, in COCO's layout: `train`, `val` and `annotations`.

    Files are BMP, 128 x 128 pixels: they have the same bytes on every machine, which compressed ones have not.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        train_size: training images.
        val_size: images to evaluate on.
        seed: another one makes other images.

    Returns:
        The folder.

    Raises:
        RecordError: it cannot be written.
        SelabError: pillow is not installed.
    """
    for name, size, purpose in (("train", train_size, _TRAIN), ("val", val_size, _VAL)):
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for number in range(size):
            pixels, shapes = _image(number, seed=seed, purpose=purpose)
            file = f"{number:06d}.bmp"
            write_atomically(folder / name / file, _bmp(pixels))
            images.append({"id": number + 1, "file_name": file, "width": _SIDE, "height": _SIDE})
            for label, left, top, side in shapes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": label,
                        "bbox": [left, top, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": one, "name": called} for one, called in CLASSES.items()]
        content = {"images": images, "categories": categories, "annotations": annotations}
        write_atomically(folder / "annotations" / f"instances_{name}.json", json.dumps(content).encode())
    return folder


def _image(number: int, *, seed: int, purpose: int) -> tuple[Bytes, list[tuple[int, int, int, int]]]:
    """Return an image (H, W, 3) and its shapes: class, left, top, side."""
    noise = words(3 * _SIDE * _SIDE // 8, purpose=purpose, seed=seed, epoch=number, number=1)
    pixels = noise.astype("<u8").view(np.uint8).reshape(_SIDE, _SIDE, 3) % _NOISE
    drawn = words(1 + _MOST_SHAPES * _TRIES * _PER_SHAPE, purpose=purpose, seed=seed, epoch=number, number=0)
    count = 1 + int(drawn[0] % _MOST_SHAPES)
    sides = _MOST - _LEAST + 1
    choices = (len(CLASSES), sides, _SIDE, _SIDE, 128, 128, 128)
    tries = below(drawn[1:].reshape(-1, _PER_SHAPE), choices).tolist()
    shapes: list[tuple[int, int, int, int]] = []
    for kind, larger, x, y, *colour in tries:
        side = _LEAST + larger
        left, top = x % (_SIDE - side), y % (_SIDE - side)
        touches = any(
            left < other + width and other < left + side and top < above + width and above < top + side
            for _, other, above, width in shapes
        )
        if len(shapes) < count and not touches:
            shapes.append((kind + 1, left, top, side))
            part = pixels[top : top + side, left : left + side]
            part[_mask(kind + 1, side)] = np.array(colour, dtype=np.uint8) + 128
    return pixels, shapes


def _mask(label: int, side: int) -> NDArray[np.bool_]:
    """Return which pixels of a square a shape covers; it touches all four edges."""
    covered: NDArray[np.bool_] = np.ones((side, side), dtype=np.bool_)
    down, across = np.mgrid[:side, :side]
    if CLASSES[label] == "disc":
        covered = (2 * down + 1 - side) ** 2 + (2 * across + 1 - side) ** 2 <= side * side
    if CLASSES[label] == "triangle":
        covered = abs(2 * across + 1 - side) <= down + 1
    return covered


def _bmp(pixels: Bytes) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "bmp")
    return content.getvalue()
