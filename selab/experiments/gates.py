"""Look at the gates of a network by its name, or of an ONNX file, over a data set or a folder of images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selab.bench.progress import Report
from selab.errors import SelabError
from selab.experiments.compare import loaded
from selab.experiments.images import read_images
from selab.graphs.blocks import find_blocks
from selab.graphs.gates import gates_of
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.judging.look import Watcher, gates
from selab.judging.record import Gates
from selab.models.build import build
from selab.models.checkpoint import load
from selab.models.external import runs_code_of
from selab.models.spec import Variant
from selab.training.data import Data
from selab.units import counted

ALL_IMAGES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the gates are looked at on: the test images of a data set, or a folder of images without labels.

    Attributes:
        data: the data set; None for a folder.
        folder: of the images; None for a data set.
        batch: images of a pass.
        most: so many images at most.
        image: (C, H, W) that images of a folder are fitted to; None for the network's own input.
    """

    data: Data | None = None
    folder: Path | None = None
    batch: int = 100
    most: int = ALL_IMAGES
    image: tuple[int, int, int] | None = None

    @property
    def words(self) -> str:
        """What the images are."""
        return str(self.folder) if self.data is None else f"{self.data.title} (test)"


def look(
    variant: Variant,
    seen: Seen,
    *,
    weights: Path | None,
    chosen: Sequence[str],
    device: str = "cpu",
    ema: bool | None = None,
    report: Report,
) -> Gates:
    """Look at the gates of a network in one pass over the images.

    Args:
        variant: the network; one in an ONNX file has its weights.
        seen: the images.
        weights: of the network; needed unless it is a file or a user's own code.
        chosen: names or numbers of the classes that are kept for pictures.
        device: where the images go; an ONNX network runs on the CPU.
        ema: as in `loaded`.
        report: called with what is done.

    Raises:
        SelabError: the network cannot be built or loaded, has no gated block, or does not run; there are no images;
            weights are missing, or not wanted.
    """
    model = _network(variant, seen, weights, ema=ema)
    shape = seen.image or variant.input_chw
    batches = _limited(_batches(seen, shape, torch.device("cpu" if isinstance(model, OnnxNetwork) else device)), seen)
    names = tuple(getattr(seen.data, "classes", ())) if seen.data is not None else ()
    if seen.data is not None and not names:
        names = tuple(map(str, range(seen.data.num_classes)))
    told = "" if weights is None else weights.name
    if isinstance(model, OnnxNetwork):
        return _of_graph(model, batches, names, arch=variant.name, data=seen.words, chosen=chosen, report=report)
    model.to(device)
    return gates(
        model,
        batches,
        classes=names,
        chosen=chosen,
        arch=variant.name,
        weights=told,
        data=seen.words,
        report=lambda number: report(f"looking at the gates, {counted(number, 'image')}", None),
    )


def _network(variant: Variant, seen: Seen, weights: Path | None, *, ema: bool | None) -> nn.Module:
    if weights is not None and seen.data is not None:
        return loaded(variant, seen.data, weights, ema=ema)
    model = build(variant, input_chw=seen.image or variant.input_chw).model
    if isinstance(model, OnnxNetwork):
        if weights is not None:
            raise SelabError(
                f"--weights {weights}: {variant.name} is an ONNX file, which has its weights; leave it out"
            )
        return model
    if weights is not None:
        load(model, weights, variant=variant, ema=ema)
    elif runs_code_of(variant) is None:
        raise SelabError(
            f"{variant.name}: has random weights, whose gates mean nothing; give trained ones: --weights FILE"
        )
    return model


def _batches(seen: Seen, shape: tuple[int, int, int], device: torch.device) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    if seen.data is not None:
        yield from seen.data.test_batches(batch=seen.batch, device=device)
        return
    assert seen.folder is not None
    images = read_images(seen.folder, shape, seen.most)
    for first in range(0, len(images), seen.batch):
        yield torch.cat(images[first : first + seen.batch]).to(device)


def _limited(batches: Iterable[Tensor | tuple[Tensor, Tensor]], seen: Seen) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    left = seen.most
    for batch in batches:
        if left <= 0:
            return
        yield batch[:left] if isinstance(batch, Tensor) else (batch[0][:left], batch[1][:left])
        left -= len(batch if isinstance(batch, Tensor) else batch[0])


def _of_graph(
    model: OnnxNetwork,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    names: Sequence[str],
    *,
    arch: str,
    data: str,
    chosen: Sequence[str],
    report: Report,
) -> Gates:
    blocks = find_blocks(Graph(model.model))
    labels: list[Any] = []

    def images() -> Iterator[Any]:
        for batch in batches:
            both = (batch, None) if isinstance(batch, Tensor) else batch
            labels.append(None if both[1] is None else both[1].numpy().astype(np.int64))
            yield both[0].numpy()

    seen = Watcher(len(names))
    for _, found in gates_of(model.model, images(), place=model.place):
        seen.add({block.name: gate for block, gate in zip(blocks, found, strict=True)}, labels.pop())
        report(f"looking at the gates, {counted(seen.images, 'image')}", None)
    return seen.gates(arch=arch, data=data, names=names, chosen=chosen)
