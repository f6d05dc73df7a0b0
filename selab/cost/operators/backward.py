"""The backward pass of one operator, from its rule and its forward pass."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selab.cost.operators.base import Arguments, Needs, Rule, Work


def gradients(
    rule: Rule, work: Work, args: Arguments, tensors: Sequence[Tensor], out: Tensor, needs: Needs
) -> dict[str, Any]:
    """Return the fields of an operation's backward pass; empty if no input needs a gradient."""
    needing = sum(needs(x) for x in tensors)
    if not needing or not out.dtype.is_floating_point:
        return {}
    if rule.backward is not None:
        macs, other, flops = rule.backward(args, out, work, needs)
        return {
            "input_gradient": True,
            "weight_gradient": len(rule.operands) > 1 and needs(args[rule.operands[1]]),
            "backward_macs": macs,
            "backward_other": other,
            "backward_other_flops": flops,
        }
    if rule.operands:
        operands = [needs(args[position]) for position in rule.operands]
        return {
            "input_gradient": operands[0],
            "weight_gradient": any(operands[1:2]),
            "backward_macs": work.macs * sum(operands),
            "backward_other": any(operands) * work.other,
            "backward_other_flops": any(operands) * work.other_flops,
        }
    if rule.linear:
        other, flops = 0, 0
    elif rule.affine is None:
        other, flops = needing * work.other, needing * work.other_flops
    else:
        # The scale's gradient is a sum of products, the shift's a sum.
        scale, shift = (isinstance(x, Tensor) and needs(x) for x in args[rule.affine : rule.affine + 2])
        through = needs(args[0])
        other = through * work.other + (scale + shift) * out.numel()
        flops = through * work.other_flops + (2 * scale + shift) * out.numel()
    return {"input_gradient": True, "backward_other": other, "backward_other_flops": flops}
