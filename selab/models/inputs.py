"""Networks with several inputs: their shapes, an example of them, and a network that takes only the first of them."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selab.records.types import Frozen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from selab.meta import Example

    Drawn = dict[tuple[object, ...], list[Tensor]]


class Input(Frozen, frozen=True, kw_only=True):
    """One input of a network, without the batch.

    Attributes:
        shape: behind the dimension of the batch, such as (C, H, W).
        name: of the argument of `forward`, or the key of a dictionary; empty for a positional argument.
    """

    shape: tuple[int, ...]
    name: str = ""

    def __str__(self) -> str:
        """Return the input as `--input` takes it."""
        sizes = "x".join(map(str, self.shape))
        return f"{self.name}={sizes}" if self.name else sizes


def main_input(inputs: Sequence[Input]) -> int | None:
    """Return the index of the first image, (C, H, W); None where there is none."""
    return next((index for index, one in enumerate(inputs) if len(one.shape) == _IMAGE), None)


_IMAGE = 3


def example_of(model: "nn.Module", inputs: Sequence[Input], *, batch: int) -> "Example":
    """Return tensors for all inputs of a network, with the dtype and on the device of its parameters.

    Args:
        model: decides whether named inputs are arguments of `forward` or the keys of one dictionary.
        inputs: positional ones first.
        batch: images.
    """
    import torch

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    made = [torch.zeros((batch, *one.shape), dtype=like.dtype, device=like.device) for one in inputs]
    args, kwargs = _arranged(model, inputs, made)
    # An example is either positional or named; the names of positional arguments are those of `forward`.
    if not kwargs:
        return args
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def feed(model: "nn.Module", inputs: Sequence[Input]) -> None:
    """Let a network that is called with one image be called with all its inputs.

    The first image takes its place among them. The others are drawn from N(0, 1), once for each batch, device and
    dtype. A call with several arguments is left as it is. The network itself stays as it is: a hook adds the inputs.
    """
    if main_input(inputs) is None:
        return
    drawn: Drawn = {}

    def complete(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return None
        return arguments(module, inputs, args[0], drawn)

    model.register_forward_pre_hook(complete, with_kwargs=True)


def arguments(
    model: "nn.Module", inputs: Sequence[Input], image: "Tensor", drawn: "Drawn"
) -> "tuple[tuple[Any, ...], dict[str, Any]]":
    """Return positional and keyword arguments for a network with several inputs, as `feed` does.

    Args:
        model: decides whether named inputs are arguments of `forward` or the keys of one dictionary.
        inputs: positional ones first; one is an image.
        image: takes the place of the first image.
        drawn: keeps the other inputs from call to call.
    """
    every = _others(image, inputs, drawn)
    place = main_input(inputs)
    if place is not None:
        every[place] = image
    return _arranged(model, inputs, every)


def _others(image: "Tensor", inputs: Sequence[Input], drawn: "Drawn") -> "list[Tensor]":
    import torch

    if image.is_meta or type(image) is not torch.Tensor:
        # A pass that computes no values; its tensors belong to it alone.
        return [image.new_zeros((image.shape[0], *one.shape)) for one in inputs]
    key = (image.shape[0], image.device, image.dtype)
    if key not in drawn:
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn((image.shape[0], *one.shape), generator=generator) for one in inputs]
        drawn[key] = [one.to(image.device, image.dtype) for one in made]
    return list(drawn[key])


def _arranged(
    model: "nn.Module", inputs: Sequence[Input], values: "Sequence[Tensor]"
) -> "tuple[tuple[Any, ...], dict[str, Any]]":
    """Return values as positional and keyword arguments; as one dictionary if `forward` does not know their names."""
    named = {one.name: value for one, value in zip(inputs, values, strict=True) if one.name}
    args = tuple(value for one, value in zip(inputs, values, strict=True) if not one.name)
    if not named or _knows(model, named):
        return args, named
    return (*args, named), {}


def _knows(model: "nn.Module", names: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    free = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return free or set(names) <= parameters.keys()
