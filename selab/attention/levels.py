"""Where the resolution of feature maps changes, and operations that read several of them."""

import math
from collections.abc import Sequence

from selab.attention.dataflow import BATCH_NORMS, INPUT, Value

JOINS = {"cat", "stack", "bmm", "baddbmm", "mm", "addmm"}
# Why a concatenation with an upsampled feature map ends no block, and what the ends of the levels around it are.
RESAMPLED = "one of its feature maps was upsampled, so it joins levels of different resolutions and ends no block"
LEVELS = "the last layers of the levels of an encoder and decoder, which are no blocks; name those to gate"

# Why a network without other blocks has no stages either.
NOT_PLAIN = "it joins several tensors, so the network is no plain sequence of stages"
_WEIGHTED = {"convolution", "mm", "addmm", "bmm", *BATCH_NORMS}


def before_resampling(last: Value) -> list[Value]:
    """Return the values on the way to a feature map after which the resolution changes, and that feature map."""
    ends = [last]
    value: Value | None = last
    shape = last.shape[2:]
    while value is not None and value.operation != INPUT:
        if value.is_image and value.shape[2:] != shape:
            ends.append(value)
            shape = value.shape[2:]
        # Of a gate and its operand, the operand.
        value = max(value.operands, key=lambda one: math.prod(one.shape), default=None)
    return ends[::-1]


def level_ends(maps: Sequence[Value]) -> list[Value]:
    """Return, also beside joins, the feature maps that an operation reads at another resolution, and the last one."""
    return [
        value
        for value in maps
        if value is maps[-1] or any(one.is_image and one.shape[2:] != value.shape[2:] for one in value.readers)
    ]


def is_in_head(join: Value, last: Value) -> bool:
    """Return whether a join is behind the last feature map, such as that of a recurrent layer's two directions.

    Residual additions are those of a network's own blocks, as in a transformer.
    """
    residual = any(one is not other and one.comes_from(other) for one in join.terms for other in join.terms)
    return not residual and all(one.comes_from(last) and not one.is_image for one in join.operands)


def is_head(last: Value, values: Sequence[Value], outputs: Sequence[Value]) -> bool:
    """Return whether a convolution computes the network's outputs: no weights follow, and it is not normalised."""
    if any(one.operation in _WEIGHTED and one.comes_from(last) and one is not last for one in values):
        return False
    return any(one.comes_from(last) for one in outputs)


def reads_several(value: Value) -> bool:
    """Return whether an operation adds, concatenates or compares several values that are more than vectors."""
    sides = [one for one in value.operands if len(one.shape) > 2]
    return len(sides) > 1 and (bool(value.terms) or value.operation in JOINS or "attention" in value.operation)
