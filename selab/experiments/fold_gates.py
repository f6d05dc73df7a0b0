"""Fold the gates of a network that is at hand, judged on the images of a loader."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from selab.errors import SelabError
from selab.experiments.folding import Rule, fold
from selab.experiments.judged import Batch, JudgedModule, Seen
from selab.judging.folding import Folding
from selab.judging.look import parts_of, run
from selab.judging.watch import gated_blocks
from selab.meta import evaluating


@dataclass(frozen=True, kw_only=True)
class _Loaded(Seen):
    """The images of a loader.

    Attributes:
        numbers: of the classes; empty without labels.
    """

    numbers: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What the images are."""
        return "the loader's images"

    @property
    def classes(self) -> tuple[str, ...]:
        """The numbers of the classes; empty without labels."""
        return self.numbers


class _Given(JudgedModule):
    """A network that is at hand, and a loader of images."""

    def __init__(self, model: nn.Module, loader: Iterable[Batch]) -> None:
        self.model = copy.deepcopy(model).eval()
        self.device = str(next((one.device for one in model.parameters()), torch.device("cpu")))
        self.name, self.weights = type(model).__name__, ""
        self.loader = loader
        first = next((one for one in loader if len(parts_of(one)[0])), None)
        if first is None:
            raise SelabError("the loader holds no image; give images to judge the gates on")
        if iter(loader) is loader:
            raise SelabError("the loader can be read only once; give one that starts again, such as a DataLoader")
        images, labels = parts_of(first)
        self.batch, self._shape = len(images), tuple(images.shape[1:])
        numbers = range(0)
        if labels is not None:
            with evaluating(self.model), torch.no_grad():
                out = run(self.model, images[:2].to(self.device))
            numbers = range(out.shape[1] if isinstance(out, Tensor) and out.ndim == 2 else int(labels.max()) + 1)
        self.seen = _Loaded(numbers=tuple(map(str, numbers)))
        self.blocks = gated_blocks(self.model)

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image, (C, H, W)."""
        channels, height, width = self._shape
        return channels, height, width

    def _all(self) -> Iterator[Batch]:
        for batch in self.loader:
            images, labels = parts_of(batch)
            images = images.to(self.device)
            yield images if labels is None else (images, labels.to(self.device))


def fold_gates(
    model: nn.Module,
    loader: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    max_drop: float | None = None,
    max_error: float | None = None,
    gate: Literal["", "hardsigmoid"] = "",
    prune: bool = False,
) -> tuple[nn.Module, Folding]:
    """Return a copy of a network whose gates that hardly vary are constants in the weights beside them.

    Of three images of the loader two decide which blocks disappear, and one reports what that costs.

    Args:
        model: left unchanged; its blocks are those that `selab.gates` sees.
        loader: batches of images, (N, C, H, W), or pairs of images and labels, (N,), in the same order whenever it is
            read.
        max_drop: points of accuracy that it may cost on the images that decide; 0.1 by default, with labels.
        max_error: how far an output may change, as a share of the largest one; 0.01 by default, without labels.
        gate: `hardsigmoid` also converts the gates of the blocks that are left.
        prune: also take out channels whose factor is always about zero (needs torch-pruning).

    Returns:
        The folded network in eval mode, and the record of what was decided and what it costs. Look at the latter:
        `cost` of the images that report may exceed the limit, where few images decided.

    Raises:
        InsertionError: there is no block with one gate per channel.
        ModelError: the network fails, or cannot be exported to be followed.
        SelabError: there are no images; the loader can be read only once; both limits, or points without labels; fifty
            images and more with labels, of which none is right.

    Warns:
        UserWarning: the images that report do not show that the limit is kept.

    Examples:
        >>> import torch
        >>> import selab
        >>> net = selab.build("se_small_cnn")
        >>> _ = torch.nn.init.zeros_(net.block1.conv1.se.fc2.weight)  # its gate is one half, whatever the image
        >>> folded, record = selab.fold_gates(net, [torch.randn(8, 3, 32, 32)], max_error=1e-6)
        >>> record.folded, record.error < 1e-6
        (('block1.conv1.se',), True)
    """
    if max_drop is not None and max_error is not None:
        raise SelabError("max_drop and max_error: contradict each other; give one of them")
    if gate not in ("", "hardsigmoid"):
        raise SelabError(f"gate {gate!r}: allowed: hardsigmoid")
    given = _Given(model, loader)
    rule = Rule.of(max_drop, max_error, labels=bool(given.seen.classes))
    done = fold(given, rule, hard_gates=bool(gate), prunes=prune, report=lambda *_: None)
    loss = done.record.loss
    if done.too_dear or done.record.is_vague:
        known = "" if loss is None else f", 95 % interval {loss.low:.2f} to {loss.high:.2f}"
        warnings.warn(
            f"fold_gates: {done.record.summary()}{known}: that does not show that the limit is kept; give more images",
            stacklevel=2,
        )
    return done.network, done.record
