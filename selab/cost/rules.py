"""Counting rules: the multiply-accumulates and FLOPs of one call of each operator.

A rule sees shapes only. It returns the arithmetic as `Work`; bytes and the backward pass follow from the shapes and
from the attributes of the rule. `register_rule` adds rules for operators of other libraries.

Operators without a rule are listed in `Cost.unknown`. These have none because shapes do not tell their arithmetic, or
because it depends on the algorithm of a library: Fourier transforms, decompositions of matrices, operators of sparse
and nested tensors, regions of interest without a sampling ratio, and non-maximum suppression.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from selab.cost.operators.base import Rule, Work, nothing
from selab.cost.operators.elementwise import ELEMENTWISE
from selab.cost.operators.gradients import GRADIENTS
from selab.cost.operators.movement import FREE, MOVEMENT
from selab.cost.operators.products import PRODUCTS
from selab.cost.operators.windows import WINDOWS
from selab.errors import SpecError
from selab.meta import first_line

__all__ = ["FOUND", "RULES", "VIEW", "Rule", "Work", "is_counted", "register_rule", "rule_of"]

RULES: dict[str, Rule] = {**PRODUCTS, **WINDOWS, **ELEMENTWISE, **MOVEMENT, **GRADIENTS}
"""The full name of an operator, without its overload → its rule; `register_rule` adds to it."""

VIEW = Rule(name="view", work=nothing, linear=True)
# Operator → rule, for those that were met.
FOUND: dict[Any, Rule] = {}


def register_rule(
    operator: str,
    work: Callable[[Sequence[Any], Tensor], Work],
    *,
    name: str = "",
    role: Literal["", "convolution", "reduction", "product"] = "",
    operands: tuple[int, ...] = (),
    linear: bool = False,
    affine: int | None = None,
    replace: bool = False,
) -> None:
    """Add a rule for an operator that selab does not count, such as one of your own library.

    Such operators are listed in `Cost.unknown` with zero cost. The output's shape comes from the operator's own meta
    (fake) kernel, which must exist.

    Args:
        operator: `library::name` without an overload, such as `aten::relu` or `torchvision::deform_conv2d`.
        work: called with the operator's positional arguments (tensors are on the meta device) and its first output.
            Returns the arithmetic of one call as `Work`: `macs` for products of convolutions and matrices, `other` and
            `other_flops` for everything else. It must not read values, only shapes.
        name: the row in tables; by default the operator's name.
        role: `reduction` and `product` mark the squeeze and the scale of an SE block.
        operands: positions of the two factors of a convolution or a matrix product. Each one that needs a gradient
            costs the forward's MACs in the backward pass.
        linear: whether the gradient passes through without arithmetic, as for an addition or a copy.
        affine: position of a normalisation's scale, if its shift follows it.
        replace: whether an existing rule may be replaced. That changes every count from then on.

    Raises:
        SpecError: a malformed name, an operator that has a rule, or a rule that cannot be called. A rule that returns
            something else than `Work` of whole numbers raises SpecError when a network is counted.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import selab
        >>> from selab.cost import Work, register_rule
        >>> @torch.library.custom_op("doc_example::square", mutates_args=())
        ... def square(x: torch.Tensor) -> torch.Tensor:
        ...     return x * x
        >>> @square.register_fake
        ... def _(x):
        ...     return torch.empty_like(x)
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return square(x)
        >>> selab.count(Net(), (1, 3, 4, 4)).unknown
        {'doc_example.square': 1}
        >>> register_rule("doc_example::square", lambda args, out: Work(other=out.numel(), other_flops=out.numel()))
        >>> selab.count(Net(), (1, 3, 4, 4)).macs.all
        48
    """
    place = f"register_rule {operator!r}"
    if not isinstance(operator, str) or not re.fullmatch(r"\w+::\w+", operator):
        raise SpecError(f"{place}: expected library::name without an overload, such as aten::relu")
    if not callable(work):
        raise SpecError(f"{place}: the rule is a {type(work).__name__}; expected a function (args, out) -> Work")
    if (operator in RULES or operator in FREE) and not replace:
        known = RULES.get(operator, VIEW).name
        raise SpecError(f"{place}: is counted already, as {known!r}; give replace=True to count it by another rule")
    RULES[operator] = Rule(
        name=name or operator.partition("::")[2],
        work=_checked(operator, work),
        role=role,
        operands=operands,
        linear=linear,
        affine=affine,
    )
    FOUND.clear()


def _checked(operator: str, work: Callable[[Sequence[Any], Tensor], Work]) -> Callable[[Sequence[Any], Tensor], Work]:
    """Return a rule that refuses to return nonsense."""

    def rule(args: Sequence[Any], out: Tensor) -> Work:
        place = f"the counting rule of {operator}"
        try:
            found = work(args, out)
        except Exception as error:
            raise SpecError(f"{place} fails: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(found, Work):
            raise SpecError(f"{place} returned {found!r}; expected selab.cost.Work(macs, other, other_flops)")
        for field, value in found._asdict().items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SpecError(f"{place} returned {field}={value!r}; expected a whole number, 0 or more")
        return found

    return rule


def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operator; None where there is none."""
    name = func._schema.name
    rule = RULES.get(name) or (VIEW if func.is_view or name in FREE else None)
    if rule is not None:
        FOUND[func] = rule
    return rule


def is_counted(func: Any) -> bool:
    """Return whether a call of this operator is an `Operation`: neither a view nor uninitialised memory."""
    return rule_of(func) is not VIEW
