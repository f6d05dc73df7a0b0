"""Hold a part of the training images back, to choose by; the test images then report what the choice is worth."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from selab.errors import SelabError

Places = NDArray[np.int64]


def split(labels: NDArray[np.int64], share: float, *, title: str) -> tuple[Places, Places]:
    """Return the places of the images that train, and of those that are held back: the share of each class, at random.

    Which images that are depends on their number, their labels and the share alone.

    Args:
        labels: of all training images, (N,).
        share: of each class that is held back, between 0 and 1; at least one image of a class of two and more.
        title: of the data, for messages.

    Raises:
        SelabError: no class has two images.
    """
    generator = np.random.default_rng(0)
    held: list[Places] = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        number = min(len(places) - 1, max(1, round(share * len(places))))
        held.append(generator.permutation(places)[:number])
    back = np.sort(np.concatenate(held)) if held else np.empty(0, dtype=np.int64)
    if not len(back):
        raise SelabError(f"{title}: no class has two training images, so that none can be held back to choose by")
    return np.setdiff1d(np.arange(len(labels)), back), back


def identity_of(sha256: str, share: float) -> str:
    """Return the identity of the part of a data set whose share is held back."""
    return hashlib.sha256(f"{sha256} holdout {share!r}".encode()).hexdigest()
