"""Which dimension of a site's tensor holds the channels: (N, C, H, W), (N, H, W, C), (C, H, W), or none of them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from selab.attention.dataflow import DataflowTrace
from selab.attention.gated_site import sites_own
from selab.errors import ModelError
from selab.meta import Example, On, Passage, are_shapes, evaluating, is_shape, make_pass, passages

Shape = tuple[int, ...]
Side = Literal["input", "output"]
_MAP_DIMS = 4
# Height and width follow an input of twice the size about twofold, the number of tokens of an image fourfold.
_MOST_GROWTH = 3


class ChannelDims:
    """The channel dimension of the tensors at modules, from one more pass with an input of twice the size.

    Height and width follow the size of the input, the number of channels does not. A network that takes one size only
    is traced instead: a linear layer and a permutation say where the channels are.

    Args:
        model: not changed.
        example: an example input.
        seen: the passages of the network's modules with that input.
        on: as in `insert_se`.
    """

    def __init__(self, model: nn.Module, example: Example, seen: Mapping[str, Passage], *, on: On = "fake") -> None:
        self.model = model
        self.example = example
        self.seen = seen
        self.on = on
        self._traced: dict[str, int] | None = None

    @cached_property
    def larger(self) -> Mapping[str, Passage]:
        """The passages with the larger input; none if the network does not take it."""
        with suppress(ModelError):
            return passages(self.model, list(self.seen), larger_images(self.example, 2, 2, on=self.on), on=self.on)
        return {}

    def of(self, path: str, side: Side) -> int | None:
        """Return the dimension of the channels, 1 or 3; None if it is neither.

        Args:
            path: of a module whose tensor has four dimensions.
            side: which of its tensors.
        """
        one, other = self.shape(path, side), self.shape_of_larger(path, side)
        if one is not None and other is not None and len(other) == _MAP_DIMS and one[1:] != other[1:]:
            if one[1] == other[1]:
                return 1
            return _MAP_DIMS - 1 if one[3] == other[3] and one[2] != other[2] else None
        own = sites_own(self.model.get_submodule(path))
        if isinstance(own, nn.Linear | nn.LayerNorm):
            return _MAP_DIMS - 1
        return self._dims_of_outputs().get(path, 1) if side == "output" else 1

    def is_one_image(self, path: str, side: Side) -> bool:
        """Return whether a module's tensor is the feature map of one image, (C, H, W).

        Args:
            path: of a module whose tensor has three dimensions.
            side: which of its tensors.
        """
        if any(len(shape) == _MAP_DIMS for shape in shapes_in(self.example)):
            return False
        one, other = self.shape(path, side), _shape(self.larger_single.get(path), side)
        if not self.larger_single:
            return one in shapes_at_convolutions(self.model, self.seen)
        if one is None or other is None or len(one) != len(other):
            return False
        grown = all(a < b < _MOST_GROWTH * max(a, 2) for a, b in zip(one[1:], other[1:], strict=True))
        return one[0] == other[0] and grown

    @cached_property
    def larger_single(self) -> Mapping[str, Passage]:
        """The passages with one larger image, (C, H, W); none if the network does not take it."""
        with suppress(ModelError):
            larger = larger_images(self.example, 2, 2, on=self.on, single=True)
            return passages(self.model, list(self.seen), larger, on=self.on)
        return {}

    def shape(self, path: str, side: Side) -> Shape | None:
        """Return the shape of a module's tensor."""
        return _shape(self.seen.get(path), side)

    def shape_of_larger(self, path: str, side: Side) -> Shape | None:
        """Return the shape of a module's tensor with the larger input; None if the network does not take it."""
        return _shape(self.larger.get(path), side)

    def _dims_of_outputs(self) -> dict[str, int]:
        """Return where a trace finds the channels in the last place, by the module that returned the tensor."""
        if self._traced is None:
            fakes = make_pass(self.model, self.example, self.on)
            trace = DataflowTrace(fakes)
            # The network runs with this example: it did so before.
            with evaluating(fakes.model), torch.no_grad():
                trace.run()
            self._traced = {
                one.path: _MAP_DIMS - 1
                for value in trace.values
                if value.dims is not None and len(value.dims) == _MAP_DIMS
                for one in value.returned_by
                if {letter for letter, _ in value.dims[1]} <= {"H", "W"} and value.dims[1] and value.dims[3]
                if {letter for letter, _ in value.dims[3]} == {"C"}
            }
        return self._traced


def _shape(passage: Passage | None, side: str) -> Shape | None:
    if passage is None:
        return None
    return passage.input_shape if side == "input" else passage.output_shape


def shapes_at_convolutions(model: nn.Module, seen: Mapping[str, Passage]) -> set[Shape]:
    """Return the shapes (C, H, W) of the feature maps that convolutions take and return in a pass over one image."""
    found = [
        _shape(passage, side)
        for path, passage in seen.items()
        if isinstance(sites_own(model.get_submodule(path)), nn.Conv2d | nn.ConvTranspose2d)
        for side in ("input", "output")
    ]
    return {shape for shape in found if shape is not None and len(shape) == _MAP_DIMS - 1}


def batch_of_one(example: Example) -> Example:
    """Return an example with a batch of one in the place of one image: (C, H, W) → (1, C, H, W)."""
    if is_shape(example):
        return (1, *cast("Shape", example))
    if are_shapes(example):
        return tuple((1, *sizes) for sizes in cast("tuple[Shape, ...]", example))
    batch: Example = tree_map_only(Tensor, lambda x: x.unsqueeze(0), example)
    return batch


def shapes_in(example: Example) -> list[Shape]:
    """Return the shapes of the tensors of an example."""
    if is_shape(example):
        return [cast("Shape", example)]
    if are_shapes(example):
        return list(cast("tuple[Shape, ...]", example))
    return [tuple(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


def larger_images(example: Example, down: int, across: int, *, on: On = "fake", single: bool = False) -> Example:
    """Return an example with images of so many times the height and the width.

    Args:
        example: an example input.
        down: factor of the height.
        across: factor of the width.
        on: `fake` for images without memory; otherwise each is repeated, so that its values stay in their range.
        single: whether the images are (C, H, W) instead of (N, C, H, W).
    """
    factors = (1, down, across) if single else (1, 1, down, across)
    if is_shape(example) or are_shapes(example):
        several = cast("tuple[tuple[int, ...], ...]", example if are_shapes(example) else (example,))
        made = tuple(_times(sizes, factors) if len(sizes) == len(factors) else sizes for sizes in several)
        return made if are_shapes(example) else made[0]

    def larger(image: Tensor) -> Tensor:
        if image.dim() != len(factors):
            return image
        if on == "fake":
            return torch.empty(_times(image.shape, factors), dtype=image.dtype, device="meta")
        return image.repeat(factors)

    enlarged: Example = tree_map_only(Tensor, larger, example)
    return enlarged


def _times(sizes: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(size * factor for size, factor in zip(sizes, factors, strict=True))
