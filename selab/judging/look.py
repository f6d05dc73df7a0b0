"""Look at the gates of a trained network in one pass over the images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.errors import ModelError, SelabError, nearest
from selab.judging.record import Gates
from selab.judging.statistics import GateStatistics
from selab.judging.watch import gated_blocks, watched
from selab.meta import evaluating, first_line

_CHOSEN = 4
"""So many classes are shown unless others are named; the paper shows five."""


class Watcher:
    """Statistics of every block, batch after batch, of gates from any runtime.

    Args:
        classes: how many there are; 0 without labels.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.images = 0
        self._statistics: dict[str, GateStatistics] = {}

    def add(self, gates: Mapping[str, NDArray[Any]], labels: NDArray[np.int64] | None) -> None:
        """Take in one batch.

        Args:
            gates: path of a block → (N, channels).
            labels: (N,), or None without classes.

        Raises:
            ModelError, SelabError: as `GateStatistics.add`; or the blocks differ from batch to batch.
        """
        if self._statistics and gates.keys() != self._statistics.keys():
            odd = sorted(gates.keys() ^ self._statistics.keys())
            raise ModelError(f"{odd[0]}: runs in some batches and not in others, so its gates cannot be compared")
        for path, found in gates.items():
            if path not in self._statistics:
                self._statistics[path] = GateStatistics(path, found.shape[-1], classes=self.classes)
            self._statistics[path].add(found, labels)
            number = len(found)
        if gates:
            self.images += number

    def gates(self, *, arch: str, data: str, weights: str = "", names: Sequence[str], chosen: Sequence[str]) -> Gates:
        """Return what was seen.

        Args:
            arch: the network's name.
            data: the images, in words.
            weights: as they were named.
            names: of the classes; empty without labels.
            chosen: names of the classes whose mean gates are kept; empty for a few, evenly spaced.

        Raises:
            SelabError: there were no images, or a class that was chosen has none.
        """
        if not self._statistics:
            raise SelabError(f"{data}: holds no image; name images to look at the gates with")
        every = list(self._statistics.values())
        kept = chosen_classes(names, chosen, every[0].images_of_classes)
        return Gates(
            arch=arch,
            weights=weights,
            data=data,
            images=self.images,
            classes=tuple(names),
            blocks=tuple(one.summary() for one in every),
            class_means={names[label]: tuple(one.class_mean(label) for one in every) for label in kept},
        )


def chosen_classes(names: Sequence[str], chosen: Sequence[str], images: Sequence[int]) -> list[int]:
    """Return the numbers of the classes to show: those that were named, or a few that have images, evenly spaced.

    Args:
        names: of all classes.
        chosen: names, or numbers.
        images: of each class.

    Raises:
        SelabError: there are no labels, no such class, or no image of it.
    """
    if not names:
        if chosen:
            raise SelabError(f"--classes {','.join(chosen)}: the images have no labels; leave it out")
        return []
    if not chosen:
        there = [label for label, number in enumerate(images) if number]
        return [there[place * len(there) // _CHOSEN] for place in range(_CHOSEN)] if len(there) > _CHOSEN else there
    found = []
    for word in dict.fromkeys(chosen):
        label = names.index(word) if word in names else int(word) if word.isascii() and word.isdigit() else -1
        if not 0 <= label < len(names):
            raise SelabError(
                f"--classes {word}: no such class{nearest(word, names)}; classes have numbers up to {len(names) - 1}"
            )
        if not images[label]:
            raise SelabError(f"--classes {word}: has no image in this data; leave it out")
        found.append(label)
    return found


def gates(
    model: nn.Module,
    loader: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    classes: Sequence[str] = (),
    chosen: Sequence[str] = (),
    arch: str = "",
    weights: str = "",
    data: str = "the loader's images",
    report: Callable[[int], object] | None = None,
) -> Gates:
    """Look at the gates of a network in one pass; memory does not grow with the number of images.

    Blocks of this project, of torchvision and timm, and of any class that multiplies its input by one gate per channel
    computed from the input's mean. The network is in eval mode meanwhile, and restored.

    Args:
        model: on the device that the images are moved to.
        loader: batches of images, (N, C, H, W), or pairs of images and labels, (N,).
        classes: names of the classes, in the order of their numbers. Without them, labels are numbered as far as the
            network has outputs.
        chosen: names or numbers of the classes whose mean gates are kept for pictures.
        arch: the network's name in the record; its class by default.
        weights: of the network, for the record.
        data: the images in words, for the record.
        report: called with the number of images so far.

    Returns:
        For each block and channel: mean, deviation, extremes, saturation, and the share of the variance between the
        classes.

    Raises:
        InsertionError: there is no such block; the message says what was looked for.
        ModelError: the forward pass fails, or a gate is not finite.
        SelabError: there are no images, or some batches have labels and others not.

    Source: the figures of arXiv 1709.01507, Sec. 6.4 (mean gate by class and depth).

    Examples:
        >>> import torch
        >>> import selab
        >>> net = selab.build("se_small_cnn")
        >>> seen = selab.gates(net, [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))])
        >>> seen.images, [block.channels for block in seen.blocks]
        (2, [32, 32, 64, 64])
    """
    blocks = gated_blocks(model)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    now: dict[str, NDArray[Any]] = {}

    def take(path: str, gate: Tensor) -> None:
        place, again = path, 1
        while place in now:
            again += 1
            place = f"{path} (call {again})"
        now[place] = gate.float().cpu().numpy()

    seen: Watcher | None = None
    names = list(classes)
    with evaluating(model), torch.no_grad(), watched(blocks, take):
        for batch in loader:
            images, labels = parts_of(batch)
            if not len(images):
                continue
            now.clear()
            out = run(model, images.to(device))
            if labels is not None and not names:
                names = [str(one) for one in range(_width(out))]
            if seen is None:
                seen = Watcher(len(names) if labels is not None else 0)
            if not now:
                raise ModelError(f"{type(model).__name__}: none of its {len(blocks)} gated blocks runs")
            seen.add(now, None if labels is None else labels.cpu().numpy().astype(np.int64))
            if report is not None:
                report(seen.images)
    if seen is None:
        raise SelabError(f"{data}: holds no image; name images to look at the gates with")
    named = names if seen.classes else []
    title = arch or type(model).__name__
    return seen.gates(arch=title, data=data, weights=weights, names=named, chosen=chosen)


def parts_of(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the images of a batch, and its labels where it has some.

    Raises:
        SelabError: it is neither images nor a pair.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(one, Tensor) for one in batch):
        images, labels = batch
        if labels.ndim == 1 and len(labels) == len(images) and not labels.is_floating_point():
            return images, labels
    raise SelabError("the loader: a batch is neither images (N, C, H, W) nor a pair of images and labels (N,)")


def run(model: nn.Module, images: Tensor) -> Any:
    """Run a network.

    Raises:
        ModelError: it fails; the message says on what.
    """
    try:
        return model(images)
    except SelabError:
        raise
    except Exception as error:
        shape = "×".join(map(str, images.shape))
        raise ModelError(f"{type(model).__name__}: forward fails on images of {shape}: {first_line(error)}") from error


def _width(out: Any) -> int:
    found = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
    if not found or found[0].ndim != 2:
        raise SelabError("the network returns no logits (N, classes), so the labels cannot be numbered: give `classes`")
    return int(found[0].shape[1])
