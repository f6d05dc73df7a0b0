"""What each block of a trained network is worth: what is lost when its gate is replaced by a constant."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.errors import ModelError, SelabError
from selab.judging.look import parts_of, run
from selab.judging.loss import Bools
from selab.kernels.deferred_bn import materialize
from selab.meta import evaluating

Batches = Callable[[], Iterable[Tensor | tuple[Tensor, Tensor]]]
Constants = Mapping[str, Tensor]
"""Path of a block → the factors that stand for its gate, (C)."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A network with constants instead of some gates.

    Attributes:
        model: the network.
        blocks: of `gated_blocks`.
        constants: of some of them.
    """

    model: nn.Module
    blocks: Mapping[str, nn.Module]
    constants: Constants


Arm = Replaced | nn.Module


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


def answers(batches: Batches, arms: Sequence[Arm]) -> list[Bools]:
    """Return whether each arm's answer to each image is right, over one reading.

    Args:
        batches: gives the images and labels from the beginning, on the arms' device; called once.
        arms: networks, or networks with constants for gates.

    Returns:
        One array (N,) for each arm.

    Raises:
        ModelError: the network returns no logits.
        SelabError: there are no images.
    """
    return both(batches, arms)[0]


def both(batches: Batches, arms: Sequence[Arm]) -> tuple[list[Bools], list[float]]:
    """Return what `answers` and `changes` do, over one reading of images with labels."""
    found: list[list[Tensor]] = [[] for _ in arms]
    largest = _Largest(len(arms))
    for labels, outs in _outputs(batches, arms):
        if labels is None:
            raise SelabError("the images have no labels to judge answers by")
        for right, out in zip(found, outs, strict=True):
            if out.ndim != 2:
                raise ModelError(f"{_name(arms[0])}: its output is {tuple(out.shape)}, not logits per image")
            right.append(out.argmax(1) == labels)
        largest.add(outs)
    if not any(found):
        raise SelabError("there are no images with labels to judge the blocks on")
    return [torch.cat(one).cpu().numpy() for one in found], largest.changes()


def changes(batches: Batches, arms: Sequence[Arm]) -> list[float]:
    """Return the largest difference of each arm's first output to that of the first arm, over the latter's largest.

    Args:
        batches: gives images, or images and labels.
        arms: as of `answers`.

    Returns:
        One number for each arm but the first.

    Raises:
        SelabError: there are no images.
    """
    largest = _Largest(len(arms))
    for _, outs in _outputs(batches, arms):
        largest.add(outs)
    return largest.changes()


class _Largest:
    """The largest output of the first arm, and the largest difference of each other one to it, batch after batch."""

    def __init__(self, arms: int) -> None:
        self._images, self._own, self._others = 0, 0.0, [0.0] * (arms - 1)

    def add(self, outs: Sequence[Tensor]) -> None:
        own, *others = outs
        self._images += len(own)
        self._own = max(self._own, float(own.abs().max()))
        self._others = [max(one, float((out - own).abs().max())) for one, out in zip(self._others, others, strict=True)]

    def changes(self) -> list[float]:
        if not self._images:
            raise SelabError("there are no images to judge the blocks on")
        return [one / max(self._own, torch.finfo(torch.float32).tiny) for one in self._others]


def _outputs(batches: Batches, arms: Sequence[Arm]) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
    """Yield for each batch its labels, and the first output of each arm."""
    with ExitStack() as modes, torch.no_grad():
        for one in arms:
            modes.enter_context(evaluating(one if isinstance(one, nn.Module) else one.model))
        for batch in batches():
            images, labels = parts_of(batch)
            if len(images):
                yield labels, [_output(arm, images) for arm in arms]


def _output(arm: Arm, images: Tensor) -> Tensor:
    if isinstance(arm, nn.Module):
        out: Tensor = tree_leaves(run(arm, images))[0]
        return out
    with replaced(arm.blocks, arm.constants):
        replaced_out: Tensor = tree_leaves(run(arm.model, images))[0]
        return replaced_out


def _name(arm: Arm) -> str:
    return type(arm if isinstance(arm, nn.Module) else arm.model).__name__
