"""Which dimension of a site's tensor holds the channels: (N, C, H, W), (N, H, W, C), or none of them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from selab.attention.dataflow import DataflowTrace
from selab.attention.gated_site import sites_own
from selab.errors import ModelError
from selab.meta import Example, FakePass, Passage, evaluating, is_shape, passages

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
    """

    def __init__(self, model: nn.Module, example: Example, seen: Mapping[str, Passage]) -> None:
        self.model = model
        self.example = example
        self.seen = seen
        self.larger: Mapping[str, Passage] = {}
        with suppress(ModelError):
            self.larger = passages(model, list(seen), _larger(example))
        self._traced: dict[str, int] | None = None

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
            fakes = FakePass(self.model, self.example)
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


def _larger(example: Example) -> Example:
    """Return an example with images of twice the height and width."""
    if is_shape(example):
        sizes = cast("tuple[int, ...]", example)
        return tuple(size * (2 if len(sizes) == _MAP_DIMS and axis > 1 else 1) for axis, size in enumerate(sizes))

    def larger(image: Tensor) -> Tensor:
        if image.dim() != _MAP_DIMS:
            return image
        batch, channels, height, width = image.shape
        return torch.empty(batch, channels, 2 * height, 2 * width, dtype=image.dtype, device="meta")

    made: Example = tree_map_only(Tensor, larger, example)
    return made
