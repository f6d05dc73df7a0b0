"""Order and augmentation of batches: random numbers by counter, applied to all images of a batch at once.

Order and decisions are words of a counter-based generator (Philox) at (seed, epoch, batch number). They depend on these
alone: nothing is drawn beforehand, and devices, ranks and releases of torch agree.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from selab.errors import SelabError
from selab.training.recipe import Fill

# Purposes of words: the second half of the generator's key. (`synthetic` uses 3 and more.)
_ORDER, _DECISIONS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images; none by default.

    Attributes:
        crop_pad: pixels added on each side before a random crop back to the image's size.
        fill: black pixels, or those at the edge repeated.
        flip: mirror half of the images.
        cutout: side of a square hole at a random place, in pixels; its centre is inside, its edges may not be.

    Raises:
        SelabError: a size is negative.

    Source: arXiv 1512.03385, Sec. 4.2 (crop and mirror); arXiv 1708.04552, Sec. 3.2 (cutout).
    """

    crop_pad: int = 0
    fill: Fill = "black"
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_pad", "cutout"):
            if getattr(self, name) < 0:
                raise SelabError(f"{name}: {getattr(self, name)}; allowed are 0 (none) and more pixels")


def order(size: int, *, seed: int, epoch: int) -> Tensor:
    """Return a permutation of `size` images, (size,) int64: the sorting order of an epoch's random words."""
    return torch.from_numpy(np.argsort(words(size, purpose=_ORDER, seed=seed, epoch=epoch), kind="stable"))


def decide(
    augmentation: Augmentation, *, size: int, input_hw: tuple[int, int], seed: int, epoch: int, number: int
) -> Tensor:
    """Draw the augmentation of global batch `number` of an epoch.

    Everything is drawn, used or not: a network trained with cutout sees the same crops as one without.

    Args:
        augmentation: how far a crop may be shifted.
        size: images of the global batch.
        input_hw: height and width of an image.
        seed: of the run.
        epoch: from 0.
        number: of the global batch, from 0.

    Returns:
        (size, 5) int64 on the CPU. Columns: first row and first column of the crop, each from 0 to twice the padding;
        1 to mirror, 0 not to; row and column of the hole's centre.
    """
    offsets = 2 * augmentation.crop_pad + 1
    choices = (offsets, offsets, 2, *input_hw)
    drawn = words(size * len(choices), purpose=_DECISIONS, seed=seed, epoch=epoch, number=number)
    return torch.from_numpy(below(drawn.reshape(size, -1), choices))


def augment(images: Tensor, decided: Tensor, augmentation: Augmentation, *, mean: Tensor, std: Tensor) -> Tensor:
    """Return cutout(normalise(flip(crop(x)))).

    Args:
        images: (N, C, H, W) uint8.
        decided: (N, 5), rows of what `decide` returned, on the images' device.
        augmentation: which of it is applied.
        mean: see `normalise`.
        std: see `normalise`.

    Returns:
        (N, C, H, W) float32.
    """
    top, left, mirrored, row, column = decided.unbind(1)
    if augmentation.crop_pad:
        images = crop(images, top, left, pad=augmentation.crop_pad, fill=augmentation.fill)
    if augmentation.flip:
        images = flip(images, mirrored)
    x = normalise(images, mean, std)
    return cut(x, row, column, side=augmentation.cutout) if augmentation.cutout else x


def crop(images: Tensor, top: Tensor, left: Tensor, *, pad: int, fill: Fill = "black") -> Tensor:
    """Return x[n, :, top[n] : top[n] + H, left[n] : left[n] + W] of images padded by `pad` pixels, as `fill` says.

    Shapes:
        images: (N, C, H, W); top, left: (N,), each from 0 to 2 pad; result: (N, C, H, W).
    """
    n, channels, height, width = images.shape
    if fill == "edge":
        # Replicating by torch's own padding is not there for bytes.
        rows, columns = (
            torch.arange(-pad, size + pad, device=images.device).clamp(0, size - 1) for size in (height, width)
        )
        padded = images.index_select(2, rows).index_select(3, columns)
    else:
        padded = F.pad(images, (pad, pad, pad, pad))
    # A view of the windows at every pixel, of which index_select takes one per image: it copies whole rows, where
    # indexing by three tensors takes twice as long.
    image, plane, line, pixel = padded.stride()
    last = (channels - 1) * plane + (height - 1) * line + (width - 1) * pixel
    windows = padded.as_strided((padded.numel() - last, channels, height, width), (pixel, plane, line, pixel))
    return windows.index_select(0, torch.arange(n, device=images.device) * image + top * line + left * pixel)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Return x[n, :, :, ::-1] where mirrored[n] is 1, else x[n].

    Shapes:
        images: (N, C, H, W); mirrored: (N,) of 0 and 1; result: (N, C, H, W).
    """
    n = len(images)
    # Mirroring all and selecting is faster than mirroring some: both steps copy contiguous memory.
    both = torch.cat((images, images.flip(3)))
    return both.index_select(0, torch.arange(n, device=images.device) + n * mirrored)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std in float32.

    Args:
        images: (N, C, H, W) uint8.
        mean: (C, 1, 1) float32, of 255.
        std: (C, 1, 1) float32, of 255.
    """
    return images.to(torch.float32).sub_(mean).mul_(std.reciprocal())


def cut(x: Tensor, row: Tensor, column: Tensor, *, side: int) -> Tensor:
    """Zero a square: rows and columns from centre - side // 2, `side` of each, clipped at the image's edges.

    Shapes:
        x: (N, C, H, W), changed in place; row, column: (N,).

    Source: arXiv 1708.04552, Sec. 3.2; zero is the mean of normalised images.
    """

    def covered(centre: Tensor, length: int) -> Tensor:
        distance = torch.arange(length, device=x.device) - (centre - side // 2)[:, None]
        return ((distance >= 0) & (distance < side)).to(x.dtype)

    rows, columns = covered(row, x.shape[2]), covered(column, x.shape[3])
    # Multiplying by zeros and ones: combining masks and filling takes 4 times as long.
    return x.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


# -------------------------------------------------------------------------------------------------------- random words
def check_seed(seed: int) -> None:
    """Check a seed.

    Raises:
        SelabError: the seed is negative, or has more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise SelabError(f"seed: {seed}; allowed are 0 to 2^64 - 1")


def words(size: int, *, purpose: int, seed: int, epoch: int = 0, number: int = 0) -> NDArray[np.uint64]:
    """Return random 64-bit words, independent of those of another purpose, seed, epoch or batch.

    Raises:
        SelabError: as `check_seed`.
    """
    check_seed(seed)
    key = np.array([seed, purpose], dtype=np.uint64)
    # The lowest word of the counter counts the words.
    counter = np.array([0, number, epoch, 0], dtype=np.uint64)
    drawn: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(size)
    return drawn


def below(drawn: NDArray[np.uint64], choices: Sequence[int]) -> NDArray[np.int64]:
    """Map words to integers from 0 to choices[i] - 1 in column i: floor(upper half of the word / 2^32 * choices[i]).

    Shapes:
        drawn: (N, len(choices)); result: the same.
    """
    half = np.uint64(32)
    return (((drawn >> half) * np.array(choices, dtype=np.uint64)) >> half).astype(np.int64)
