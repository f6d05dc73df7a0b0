"""What each block of a trained network is worth: what is lost when its gate is replaced by a constant."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.errors import ModelError, SelabError
from selab.kernels.deferred_bn import materialize
from selab.meta import evaluating
from selab.records.frozen import Frozen

Bools = NDArray[np.bool_]
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
_NORMAL = NormalDist().inv_cdf(0.975)
Constants = Mapping[str, Tensor]
"""Path of a block → the factors that stand for its gate, (C)."""


class Loss(Frozen, frozen=True, kw_only=True):
    """Accuracy that a change costs, over the same images.

    Attributes:
        images: how many.
        before: correct answers without the change; `after` with it.
        worse: images that were right and are wrong; `better` the reverse.
        points: lost, in percentage points; negative for a gain.
        low: of the 95 % interval; `high` likewise.
    """

    images: int
    before: int
    after: int
    worse: int
    better: int
    points: float
    low: float
    high: float


def loss_of(before: Bools, after: Bools) -> Loss:
    """Return what was lost between two answers to the same images.

    Args:
        before: (N,), whether each answer was right.
        after: (N,), the same with the change.

    Source: Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, 2012.
    """
    images, worse, better = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    one, two = (worse + 1) / (images + 2), (better + 1) / (images + 2)
    middle = one - two
    half = _NORMAL * math.sqrt((one + two - middle**2) / (images + 2))
    return Loss(
        images=images,
        before=int(before.sum()),
        after=int(after.sum()),
        worse=worse,
        better=better,
        points=100 * (worse - better) / images,
        low=100 * (middle - half),
        high=100 * (middle + half),
    )


@contextmanager
def replaced(blocks: Mapping[str, nn.Module], constants: Constants) -> Iterator[None]:
    """Multiply by constants instead of gates, in the body.

    Args:
        blocks: of `gated_blocks`.
        constants: of some of them.
    """
    handles = []
    try:
        for path, factors in constants.items():
            handles.append(blocks[path].register_forward_hook(partial(_scaled, factors[None, :, None, None])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaled(factors: Tensor, block: nn.Module, args: tuple[Any, ...], _out: Any) -> Tensor:
    x = materialize(args[0])
    # A block that took over the ReLU before it scales what the ReLU returns.
    if getattr(block, "relu_in", False):
        x = torch.relu(x)
    scaled: Tensor = x * factors.to(x)
    return scaled


def answers(
    model: nn.Module, batches: Batches, blocks: Mapping[str, nn.Module], arms: Sequence[Constants]
) -> list[Bools]:
    """Return whether each image's answer is right, with the gates and with each set of constants, over one reading.

    Args:
        model: on the device of the images.
        batches: gives the images and labels from the beginning; called once.
        blocks: of `gated_blocks`.
        arms: sets of constants.

    Returns:
        One array (N,) for the network itself, and one for each arm.

    Raises:
        ModelError: the network returns no logits.
        SelabError: there are no images.
    """
    found: list[list[Tensor]] = [[] for _ in range(len(arms) + 1)]
    with evaluating(model), torch.no_grad():
        for images, labels in batches():
            if not len(labels):
                continue
            for place, constants in enumerate(({}, *arms)):
                with replaced(blocks, constants):
                    out = tree_leaves(model(images))[0]
                if out.ndim != 2 or len(out) != len(labels):
                    raise ModelError(f"{type(model).__name__}: its output is {tuple(out.shape)}, not logits per image")
                found[place].append(out.argmax(1) == labels)
    if not found[0]:
        raise SelabError("there are no images with labels to judge the blocks on")
    return [torch.cat(one).cpu().numpy() for one in found]
