"""Synthetic images that can be learned: the shifted pattern of a class, mixed with another one and noise.

The arithmetic is in integers, so that the images are the same to the bit on every machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from selab.training.augment import below, words

Bytes = NDArray[np.uint8]
CLASSES = 10
_CHANNELS, _SIDE = 3, 32
_PIXELS = _CHANNELS * _SIDE * _SIDE
# A pattern is periodic: random values on a 4 x 4 grid, interpolated linearly.
_GRID = 4
_CELL = _SIDE // _GRID
_OWN, _MOST_OTHER, _NOISE = 4, 4, 4  # parts of an image
_PATTERNS, _TRAIN, _TEST = 3, 4, 5  # purposes of the random words
# Images per chunk. Each chunk has its own epoch of random words, so that a larger set begins with a smaller one.
_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class SyntheticSplit:
    """Images (N, 3, 32, 32) and labels (N,)."""

    images: Bytes
    labels: Bytes


def make(*, train_size: int, test_size: int, seed: int) -> tuple[SyntheticSplit, SyntheticSplit]:
    """Return a training set and a test set: (4 own + w other + 4 noise) / (8 + w) of patterns drawn from the seed.

    For each image are drawn: its class with the pattern `own`; a second pattern `other` and its weight w from 0 to 4; a
    cyclic shift of each; noise for each pixel and colour. A network learns most of it within a hundred steps and the
    rest never.

    Args:
        train_size: training images.
        test_size: test images.
        seed: of patterns and images.
    """
    patterns = _patterns(seed)
    return (
        _split(patterns, train_size, seed=seed, purpose=_TRAIN),
        _split(patterns, test_size, seed=seed, purpose=_TEST),
    )


def _patterns(seed: int) -> NDArray[np.int16]:
    """Return the pattern of each class, repeated so that any shift is a slice: (10, 3, 63, 63) of 0 to 255."""
    drawn = words(CLASSES * _CHANNELS * _GRID * _GRID, purpose=_PATTERNS, seed=seed)
    values = below(drawn[:, None], (256,)).reshape(CLASSES, _CHANNELS, _GRID, _GRID)
    pixel = np.arange(_SIDE)
    cell = pixel // _CELL
    # Distance of a pixel's centre from the grid point before it, in half pixels.
    after = 2 * (pixel % _CELL) + 1
    before = 2 * _CELL - after
    values = values[:, :, cell] * before[:, None] + np.roll(values, -1, 2)[:, :, cell] * after[:, None]
    values = values[..., cell] * before + np.roll(values, -1, 3)[..., cell] * after
    pattern = (values // (2 * _CELL) ** 2).astype(np.int16)
    return np.tile(pattern, (1, 1, 2, 2))[..., :-1, :-1]


def _split(patterns: NDArray[np.int16], size: int, *, seed: int, purpose: int) -> SyntheticSplit:
    shifted = sliding_window_view(patterns, (_SIDE, _SIDE), axis=(2, 3))
    images = np.empty((size, _CHANNELS, _SIDE, _SIDE), dtype=np.uint8)
    labels = np.empty(size, dtype=np.uint8)
    choices = (CLASSES, _SIDE, _SIDE, CLASSES, _SIDE, _SIDE, _MOST_OTHER + 1)
    for chunk, start in enumerate(range(0, size, _CHUNK)):
        drawn = words(_CHUNK * len(choices), purpose=purpose, seed=seed, epoch=chunk, number=0)
        decided = below(drawn.reshape(_CHUNK, -1), choices)[: size - start]
        own, own_top, own_left, other, other_top, other_left, weight = decided.T
        count = len(decided)
        drawn = words(count * _PIXELS // 8, purpose=purpose, seed=seed, epoch=chunk, number=1)
        noise = drawn.astype("<u8").view(np.uint8).reshape(count, _CHANNELS, _SIDE, _SIDE).astype(np.int16)
        part = weight.astype(np.int16)[:, None, None, None]
        mixed = _OWN * shifted[own, :, own_top, own_left] + part * shifted[other, :, other_top, other_left]
        images[start : start + count] = (mixed + _NOISE * noise) // (_OWN + _NOISE + part)
        labels[start : start + count] = own
    return SyntheticSplit(images=images, labels=labels)
