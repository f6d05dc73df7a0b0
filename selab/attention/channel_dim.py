"""Which dimension of a site's tensor holds the channels: (N, C, H, W), (N, H, W, C), or none of them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from selab.attention.dataflow import DataflowTrace
from selab.attention.gated_site import sites_own
from selab.errors import ModelError
from selab.meta import Example, On, Passage, are_shapes, evaluating, is_shape, make_pass, passages

Shape = tuple[int, ...]
Side = Literal["input", "output"]
_MAP_DIMS = 4


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


def _shape(passage: Passage | None, side: Side) -> Shape | None:
    if passage is None:
        return None
    return passage.input_shape if side == "input" else passage.output_shape


def larger_images(example: Example, down: int, across: int, *, on: On = "fake") -> Example:
    """Return an example with images of so many times the height and the width.

    Args:
        example: an example input.
        down: factor of the height.
        across: factor of the width.
        on: `fake` for images without memory; otherwise each is repeated, so that its values stay in their range.
    """
    factors = (1, 1, down, across)
    if is_shape(example) or are_shapes(example):
        several = cast("tuple[tuple[int, ...], ...]", example if are_shapes(example) else (example,))
        made = tuple(_times(sizes, factors) if len(sizes) == _MAP_DIMS else sizes for sizes in several)
        return made if are_shapes(example) else made[0]

    def larger(image: Tensor) -> Tensor:
        if image.dim() != _MAP_DIMS:
            return image
        if on == "fake":
            return torch.empty(_times(image.shape, factors), dtype=image.dtype, device="meta")
        return image.repeat(factors)

    enlarged: Example = tree_map_only(Tensor, larger, example)
    return enlarged


def _times(sizes: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(size * factor for size, factor in zip(sizes, factors, strict=True))
