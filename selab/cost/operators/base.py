"""The form of a counting rule, and the arithmetic that many rules share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Role = Literal["", "convolution", "reduction", "product"]


class Work(NamedTuple):
    """The arithmetic of one operator call.

    Attributes:
        macs: of convolutions and matrix products.
        other: all other arithmetic, in fused multiply-adds.
        other_flops: the same in floating-point operations.
    """

    macs: int = 0
    other: int = 0
    other_flops: int = 0


Arguments = Sequence[Any]
"""Positional arguments of an operator; trailing ones that have their default may be missing."""
Arithmetic = Callable[[Arguments, Tensor], Work]
"""(arguments, first output) → arithmetic of one call."""
Traffic = Callable[[Arguments, Tensor], Sequence[tuple[Tensor, int]]]
"""(arguments, first output) → tensors with the number of their elements that are read or written."""
Needs = Callable[[Tensor], bool]
"""Whether a tensor needs a gradient."""
Backward = Callable[[Arguments, Tensor, Work, Needs], Work]
"""(arguments, first output, forward's arithmetic, needs) → arithmetic of the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one operator is counted.

    Attributes:
        name: the row in tables.
        work: (arguments, output) → arithmetic of one call; None if the shapes do not tell it.
        role: `reduction` and `product` mark the squeeze and the scale of an SE block.
        operands: positions of the factors of a convolution or matrix product.
        linear: whether the gradient passes through without arithmetic, or is zero.
        affine: position of a normalisation's scale; its shift follows it.
        statistics: arguments → whether a normalisation computes its statistics from the batch.
        traffic: what is read and written, where that is not every input and the output.
        backward: the backward pass, where the attributes above do not say it.
    """

    name: str
    work: Callable[[Arguments, Tensor], Work | None]
    role: Role = ""
    operands: tuple[int, ...] = ()
    linear: bool = False
    affine: int | None = None
    statistics: Callable[[Arguments], bool] | None = None
    traffic: Traffic | None = None
    backward: Backward | None = None


def argument(args: Arguments, position: int, default: Any = None) -> Any:
    """Return an argument, or its default if the call leaves it out."""
    return args[position] if len(args) > position else default


def each(value: int | Sequence[int], dims: int) -> Sequence[int]:
    """Return one number per dimension; a single number holds for all."""
    values = [value] if isinstance(value, int) else value
    return values if len(values) == dims else [values[0]] * dims


def nothing(_args: Arguments, _out: Tensor) -> Work:
    """Return no arithmetic."""
    return Work()


def elements(count: int) -> Work:
    """Return so many operations of one floating-point operation each."""
    return Work(0, count, count)


def per_output(count: int, flops: int | None = None) -> Arithmetic:
    """Return the rule of `count` multiply-adds per element of the output."""
    flops = count if flops is None else flops
    return lambda _args, out: Work(0, count * out.numel(), flops * out.numel())


def per_input(count: int, position: int = 0) -> Arithmetic:
    """Return the rule of `count` operations per element of an input."""
    return lambda args, _out: elements(count * args[position].numel())


def comparisons(length: int) -> int:
    """Return the comparisons that place one element among `length` sorted ones."""
    return max(length - 1, 0).bit_length()


def named(names: str, rule: Callable[[str], Rule]) -> dict[str, Rule]:
    """Return one rule for several aten operators and their in-place forms, each under its own name."""
    return {f"aten::{name}{place}": rule(name.strip("_")) for name in names.split() for place in ("", "_")}


def table(rule: Rule, names: str) -> dict[str, Rule]:
    """Return the same rule for several operators; a name without a library is one of aten."""
    return {name if "::" in name else f"aten::{name}": rule for name in names.split()}
