"""A trained network whose gates are judged, in PyTorch or in an ONNX file, and the images it is judged on."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor, nn

from selab.attention.gates import convert_gates
from selab.errors import SelabError
from selab.experiments.compare import fitted, loaded
from selab.experiments.images import read_images
from selab.graphs import fold as graphs_fold
from selab.graphs.gates import blocks_in, gates_of, session_of
from selab.graphs.module import OnnxNetwork
from selab.graphs.reading import image_shape
from selab.judging import fold
from selab.judging.choose import Candidate
from selab.judging.folding import Dead
from selab.judging.look import Watcher, gates, parts_of
from selab.judging.prune import macs_of_channels, prune
from selab.judging.record import Gates
from selab.judging.watch import gated_blocks
from selab.judging.worth import Arm, Replaced
from selab.models.build import build
from selab.models.checkpoint import load, read_metadata
from selab.models.external import runs_code_of
from selab.models.spec import ONNX_FAMILY, Variant
from selab.training.data import Data
from selab.training.recipe import PREPARATION

if TYPE_CHECKING:
    from onnx import ModelProto

Batch = Tensor | tuple[Tensor, Tensor]
Factors = Mapping[str, NDArray[np.float64]]
"""Path of a block → its factors, (C)."""
ALL_IMAGES = 1_000_000
PARTS = 3
"""Into which images are divided, where one part may not see what another one decided."""
HARD = "hardsigmoid"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a network is judged on: the test images of a data set, or a folder of images without labels.

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
        if self.data is None:
            return str(self.folder)
        if getattr(self.data, "image", None) is None:
            return f"{self.data.title} (test)"
        # How many images its title says; here it may be fewer.
        size = "×".join(map(str, self.data.input_chw))
        return f"{self.data.title.partition(',')[0]} (test, {size})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers; empty without labels."""
        if self.data is None:
            return ()
        return tuple(getattr(self.data, "classes", ())) or tuple(map(str, range(self.data.num_classes)))


@dataclass(frozen=True, kw_only=True)
class DeadChannels:
    """Channels of a block whose factor is always about zero.

    Attributes:
        found: what is told of them.
        place: where the block's factors go or went; None where they cannot be folded.
    """

    found: Dead
    place: fold.Place | None = None


class Judged:
    """A network to judge. Blocks go by their paths, or in an ONNX network by the names of their products.

    Attributes:
        variant: as it is built, with the classes and the input of the images.
        name: of the network.
        model: what runs the images.
        weights: the name of their file; empty without one.
        metadata: of that file.
    """

    def __init__(self, variant: Variant, seen: Seen, model: nn.Module, device: str, weights: str) -> None:
        self.variant, self.seen, self.model, self.device, self.weights = variant, seen, model, device, weights
        self.name, self.batch = variant.name, seen.batch
        self.metadata: Mapping[str, str] = {}
        self._images: list[Tensor] | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image that the network gets, (C, H, W)."""
        return self.seen.image or self.variant.input_chw

    @property
    def preparation(self) -> dict[str, str]:
        """What the metadata say of how images are prepared; files of weights made of these take it over."""
        return {key: value for key, value in self.metadata.items() if key in PREPARATION}

    def batches(self, *parts: int) -> Iterator[Batch]:
        """Yield images, or images and labels.

        Args:
            parts: numbers below `PARTS`: image i is in part i modulo `PARTS`. All images without any.
        """
        left, place = self.seen.most, 0
        for batch in self._all():
            images, labels = parts_of(batch)
            images, labels = images[:left], None if labels is None else labels[:left]
            number = len(images)
            left -= number
            if parts:
                kept = [one for one in range(number) if (place + one) % PARTS in parts]
                images, labels = images[kept], None if labels is None else labels[kept]
            place += number
            if len(images):
                yield images if labels is None else (images, labels)
            if left <= 0:
                return

    def _all(self) -> Iterator[Batch]:
        if self.seen.data is not None:
            yield from self.seen.data.test_batches(batch=self.batch, device=torch.device(self.device))
            return
        assert self.seen.folder is not None
        if self._images is None:
            self._images = read_images(self.seen.folder, self.image, self.seen.most)
        for first in range(0, len(self._images), self.batch):
            yield torch.cat(self._images[first : first + self.batch]).to(self.device)

    @staticmethod
    def repeated(seen: Gates) -> frozenset[str]:
        """Return the rows of blocks that run more than once in a pass, whose gates are several."""
        again = {one.path.partition(" (call ")[0] for one in seen.blocks if " (call " in one.path}
        return frozenset(one.path for one in seen.blocks if one.path.partition(" (call ")[0] in again)

    def gates(
        self,
        batches: Iterable[Batch],
        *,
        chosen: Sequence[str] = (),
        report: Callable[[int], object] = lambda _: None,
    ) -> Gates:
        """Look at the gates in one pass.

        Args:
            batches: of `self.batches`.
            chosen: names or numbers of the classes that are kept for pictures.
            report: called with the number of images so far.
        """
        raise NotImplementedError

    def candidates(self, seen: Gates) -> list[Candidate]:
        """Return for each block whether a constant gate could be folded, and where it would go."""
        raise NotImplementedError

    def arm(self, constants: Factors) -> Arm:
        """Return the network with constants instead of some gates."""
        raise NotImplementedError

    def folded(self, constants: Factors) -> "tuple[nn.Module, dict[str, fold.Place | graphs_fold.GraphPlace | str]]":
        """Return the network with these constants in other weights, and where each of them went or why it did not."""
        raise NotImplementedError

    def dead(self, network: nn.Module, seen: Gates, went: Mapping[str, Any]) -> list[DeadChannels]:
        """Return the channels that are always about zero.

        Args:
            network: folded.
            seen: the gates of the network as it was.
            went: of `folded`.
        """
        raise NotImplementedError

    def pruned(self, network: nn.Module, dead: DeadChannels) -> tuple[nn.Module, dict[str, dict[str, int]]] | str:
        """Return a folded network without dead channels, with the sizes of its layers that changed; or why not."""
        raise NotImplementedError

    def with_hard_gates(self, network: nn.Module) -> nn.Module:
        """Return a folded network whose gates are hard sigmoids; those in the code of a user's block stay."""
        made = copy.deepcopy(network)
        convert_gates(made, HARD)
        return made

    def running(self, network: nn.Module) -> nn.Module:
        """Return a folded network as a module that runs images."""
        return network


class JudgedModule(Judged):
    """A network in PyTorch."""

    def __init__(self, variant: Variant, seen: Seen, model: nn.Module, device: str, weights: str) -> None:
        super().__init__(variant, seen, model.to(device).eval(), device, weights)
        self.blocks = gated_blocks(model)

    def gates(
        self,
        batches: Iterable[Batch],
        *,
        chosen: Sequence[str] = (),
        report: Callable[[int], object] = lambda _: None,
    ) -> Gates:
        """As in `Judged`."""
        return gates(
            self.model,
            batches,
            classes=self.seen.classes,
            chosen=chosen,
            arch=self.name,
            weights=self.weights,
            data=self.seen.words,
            report=report,
        )

    def candidates(self, seen: Gates) -> list[Candidate]:
        """As in `Judged`."""
        repeated = self.repeated(seen)
        found: dict[str, fold.Place | str] = dict.fromkeys(repeated, "it runs more than once")
        once = [one.path for one in seen.blocks if one.path not in repeated]
        found |= fold.places(self.model, once, self._example())
        return [_candidate(one.path, one.spread, min(one.mean), found[one.path]) for one in seen.blocks]

    def arm(self, constants: Factors) -> Arm:
        """As in `Judged`."""
        return Replaced(model=self.model, blocks=self.blocks, constants=self._tensors(constants))

    def folded(self, constants: Factors) -> "tuple[nn.Module, dict[str, fold.Place | graphs_fold.GraphPlace | str]]":
        """As in `Judged`."""
        made, went = fold.fold(self.model, self._tensors(constants), self._example())
        return made.eval(), dict(went)

    def dead(self, network: nn.Module, seen: Gates, went: Mapping[str, Any]) -> list[DeadChannels]:
        """As in `Judged`."""
        repeated = self.repeated(seen)
        told = [one for one in _dead_in(seen) if one.found.path not in repeated]
        left = [one.found.path for one in told if one.found.path not in went]
        places = {**(fold.places(network, left, self._example()) if left else {}), **went}
        found = [replace(one, place=_place_in(places, one.found.path)) for one in told]
        numbers = {one.found.path: (len(one.found.channels), one.place) for one in found if one.place is not None}
        macs = macs_of_channels(network, numbers, self._example()) if numbers else {}
        return [replace(one, found=structs.replace(one.found, macs=macs.get(one.found.path))) for one in found]

    def pruned(self, network: nn.Module, dead: DeadChannels) -> tuple[nn.Module, dict[str, dict[str, int]]] | str:
        """As in `Judged`."""
        if dead.place is None:
            return "its factors cannot go into the weights beside it"
        return prune(network, dead.found.path, dead.found.channels, dead.place, self._example())

    def _tensors(self, constants: Factors) -> dict[str, Tensor]:
        return {path: torch.from_numpy(one).float().to(self.device) for path, one in constants.items()}

    def _example(self) -> Tensor:
        return torch.zeros((2, *self.image), device=self.device)


class JudgedGraph(Judged):
    """A network in an ONNX file, which ONNX Runtime runs on the CPU."""

    def __init__(self, variant: Variant, seen: Seen, network: OnnxNetwork) -> None:
        self.network = network
        super().__init__(variant, seen, _Session(network.model, network.place), "cpu", "")
        self.blocks = blocks_in(network.model, network.place)
        fixed = image_shape(network.model, network.place)[1][0]
        self.batch = fixed or seen.batch

    def batches(self, *parts: int) -> Iterator[Batch]:
        """As in `Judged`; of a network with a fixed number of images all batches have it."""
        if image_shape(self.network.model, self.network.place)[1][0] is None:
            yield from super().batches(*parts)
            return
        kept: list[tuple[Tensor, Tensor | None]] = []
        for batch in super().batches(*parts):
            images, labels = parts_of(batch)
            kept += [
                (images[one : one + 1], None if labels is None else labels[one : one + 1]) for one in range(len(images))
            ]
            while len(kept) >= self.batch:
                now, kept = kept[: self.batch], kept[self.batch :]
                stacked = torch.cat([image for image, _ in now])
                named = [label for _, label in now if label is not None]
                yield (stacked, torch.cat(named)) if named else stacked

    def gates(
        self,
        batches: Iterable[Batch],
        *,
        chosen: Sequence[str] = (),
        report: Callable[[int], object] = lambda _: None,
    ) -> Gates:
        """As in `Judged`."""
        labels: list[Any] = []

        def images() -> Iterator[Any]:
            for batch in batches:
                given, named = parts_of(batch)
                labels.append(None if named is None else named.numpy().astype(np.int64))
                yield given.numpy()

        names = self.seen.classes
        seen = Watcher(len(names))
        for _, found in gates_of(self.network.model, images(), place=self.network.place):
            seen.add({block.name: gate for block, gate in zip(self.blocks, found, strict=True)}, labels.pop())
            report(seen.images)
        return seen.gates(arch=self.name, data=self.seen.words, names=names, chosen=chosen)

    def candidates(self, seen: Gates) -> list[Candidate]:
        """As in `Judged`."""
        found = graphs_fold.places(self.network.model, self.blocks)
        return [_candidate(one.path, one.spread, min(one.mean), found[one.path]) for one in seen.blocks]

    def arm(self, constants: Factors) -> Arm:
        """As in `Judged`."""
        return _Session(graphs_fold.with_constants(self.network.model, self.blocks, constants), self.network.place)

    def folded(self, constants: Factors) -> "tuple[nn.Module, dict[str, fold.Place | graphs_fold.GraphPlace | str]]":
        """As in `Judged`."""
        made, went = graphs_fold.fold(self.network.model, constants)
        return OnnxNetwork(made, self.network.place), dict(went)

    def dead(self, network: nn.Module, seen: Gates, went: Mapping[str, Any]) -> list[DeadChannels]:  # noqa: ARG002
        """As in `Judged`; what their convolutions cost is not counted in a graph."""
        return _dead_in(seen)

    def pruned(self, network: nn.Module, dead: DeadChannels) -> tuple[nn.Module, dict[str, dict[str, int]]] | str:  # noqa: ARG002
        """As in `Judged`."""
        return "only channels of a network in PyTorch are taken out"

    def with_hard_gates(self, network: nn.Module) -> nn.Module:
        """As in `Judged`."""
        assert isinstance(network, OnnxNetwork)
        return OnnxNetwork(graphs_fold.with_hard_gates(network.model), network.place)

    def running(self, network: nn.Module) -> nn.Module:
        """As in `Judged`."""
        assert isinstance(network, OnnxNetwork)
        return _Session(network.model, network.place)


class _Session(nn.Module):
    """Run an ONNX network on tensors."""

    def __init__(self, model: "ModelProto", place: str) -> None:
        super().__init__()
        self._session = session_of(model, place)
        self._name = image_shape(model, place)[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return the first output."""
        return torch.from_numpy(np.array(self._session.run(None, {self._name: images.numpy()})[0]))


def _dead_in(seen: Gates) -> list[DeadChannels]:
    return [DeadChannels(found=Dead(path=one.path, channels=one.dead)) for one in seen.blocks if one.dead]


def _place_in(places: Mapping[str, Any], path: str) -> fold.Place | None:
    place = places.get(path)
    return place if isinstance(place, fold.Place) else None


def _candidate(path: str, spread: float, lowest: float, place: fold.Place | graphs_fold.GraphPlace | str) -> Candidate:
    if isinstance(place, str):
        return Candidate(path=path, spread=spread, why_not=place)
    if place.needs_positive and lowest < 0:
        why = "a factor is negative, and a ReLU or a maximum stands between"
        return Candidate(path=path, spread=spread, why_not=why)
    return Candidate(path=path, spread=spread, where=place.words)


def judged(
    variant: Variant, seen: Seen, *, weights: Path | None, ema: bool | None = None, device: str = "cpu"
) -> Judged:
    """Return a network to judge.

    Args:
        variant: the network; one in an ONNX file has its weights.
        seen: the images.
        weights: of the network; needed unless it is a file or a user's own code.
        ema: as in `loaded`.
        device: where the images go; an ONNX network runs on the CPU.

    Raises:
        SelabError: the network cannot be built or loaded, or has no gated block; weights are missing, or not wanted.
    """
    told = "" if weights is None else weights.name
    if seen.data is not None:
        variant = fitted(variant, seen.data)
    if variant.family != ONNX_FAMILY:
        # Whether there is a block at all is told before weights are asked for.
        gated_blocks(build(variant, device="meta", input_chw=seen.image or variant.input_chw).model)
    if weights is not None and seen.data is not None:
        network = JudgedModule(variant, seen, loaded(variant, seen.data, weights, ema=ema), device, told)
        network.metadata = read_metadata(weights)
        return network
    model = build(variant, input_chw=seen.image or variant.input_chw).model
    if isinstance(model, OnnxNetwork):
        if weights is not None:
            raise SelabError(
                f"--weights {weights}: {variant.name} is an ONNX file, which has its weights; leave it out"
            )
        return JudgedGraph(variant, seen, model)
    if weights is not None:
        load(model, weights, variant=variant, ema=ema)
    elif runs_code_of(variant) is None:
        raise SelabError(
            f"{variant.name}: has random weights, whose gates mean nothing; give trained ones: --weights FILE"
        )
    network = JudgedModule(variant, seen, model, device, told)
    network.metadata = {} if weights is None else read_metadata(weights)
    return network
