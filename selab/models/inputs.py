"""Networks with several inputs: their shapes, an example of them, and a network that takes only the first of them."""

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from selab import units
from selab.errors import ModelError, nearest
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
_CLOSE = 0.75


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


def check_inputs(model: "nn.Module", inputs: Sequence[Input]) -> None:
    """Check that a network's forward has a place for every input.

    Args:
        model: an `nn.Module`; one whose signature cannot be read, or which takes any arguments, is not checked.
        inputs: positional ones first.

    Raises:
        ModelError: forward has no argument of an input's name, and takes no dictionary in its place; an input without a
            name and one with a name are the same argument; or there are more inputs without a name than forward takes.
    """
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return
    kinds = {one.kind for one in parameters.values()}
    positional = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    names = [one.name for one in inputs if one.name]
    count = len(inputs) - len(names)
    what = f"{type(model).__name__}.forward"
    if count > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        known = ", ".join(parameters) or "none"
        raise ModelError(
            f"--input: {count} without a name, and {what} takes {units.counted(len(positional), 'such input')}; its "
            f"arguments: {known}"
        )
    for index, one in enumerate(positional[:count]):
        if one.name in names and one.kind is not one.POSITIONAL_ONLY:
            raise ModelError(
                f"--input {one.name}: is given twice: the input without a name in place {index + 1} ({inputs[index]}) "
                f"is the argument {one.name} of {what}; name every input, as in --input {one.name}={inputs[index]}"
            )
    taken = [one.name for one in parameters.values() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    unknown = [name for name in names if name not in taken]
    if not unknown or inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    needed = [one for one in positional[count:] if one.default is one.empty]
    only_named = [one for one in parameters.values() if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    free = [name for name in taken if name not in names and name not in {one.name for one in positional[:count]}]
    as_dictionary = len(positional) > count and len(needed) <= 1 and not only_named
    # A name that is nearly that of an argument is taken for it where the inputs could be arguments.
    arguments_too = len(names) <= len(free) and (count > 0 or len(free) > 1)
    misspelt = arguments_too and any(get_close_matches(name, free, cutoff=_CLOSE) for name in unknown)
    if as_dictionary and not misspelt and (len(unknown) == len(names) or len(taken) == count + 1):
        return
    raise ModelError(f"--input {unknown[0]}: {what} has no argument of this name{nearest(unknown[0], free or taken)}")


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
