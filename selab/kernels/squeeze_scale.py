"""Run a block's own code with its squeeze and its scale as native passes.

The block is given its feature map as an `InterceptedMap`. Its global mean and its product with one gate per channel are
computed by the native code; every other operation, and all layers between the two, run as they are. So nothing is
assumed about the block: its layers may be replaced, pruned, quantised or wrapped, and its code may branch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selab.kernels import cpu
from selab.kernels.dispatch import needs_reference


class InterceptedMap(Tensor):
    """A feature map (N, C, H, W) whose global mean and scale are native passes, for inference on a CPU."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation natively if it is a squeeze or a scale, else as it is; results are plain tensors."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            handler = _HANDLERS.get(func)
            if handler is not None and not torch.is_grad_enabled() and "input" not in kwargs:
                out = handler(*args, **kwargs)
                if out is not None:
                    return out
            return func(*args, **kwargs)


class Recorded:
    """What a block did with its feature map.

    Attributes:
        squeezes: how often the global mean was taken.
        scaled: the products with one gate per channel.
        gates: of these products, (N, C) each.
    """

    def __init__(self) -> None:
        self.squeezes = 0
        self.scaled: list[Tensor] = []
        self.gates: list[Tensor] = []


class RecordedMap(InterceptedMap):
    """A feature map that records in its attribute `record` what is done with it, and computes as torch does."""

    record: Recorded

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation as it is, and record it."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            handler = None if "input" in kwargs else _HANDLERS.get(func)
            if handler is not None and handler(*args, **kwargs, natively=False) is not None:
                record = next(one.__dict__["record"] for one in (*args, *kwargs.values()) if type(one) is cls)
                record.squeezes += func in _SQUEEZES
                if func in _SCALES:
                    record.scaled.append(out)
                    record.gates += [gates for gates in (_factors(*args, **kwargs)[1],) if gates is not None]
            return out


def refuses(x: Tensor) -> str:
    """Return why squeeze and scale of this feature map cannot be native passes now; empty if they can."""
    if torch.compiler.is_compiling():
        return "the compiler generates the loops"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    return needs_reference(x) or cpu.activated_refuses(x, None) or ("" if x.numel() else "it has no elements")


def run_stepwise(forward: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Run a block's own code on x, (N, C, H, W), for which `refuses` has returned an empty string."""
    given = x.as_subclass(InterceptedMap)
    out = forward(given)
    return x if out is given else out


def recorded(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, Recorded]:
    """Run a block's own code on x, (N, C, H, W); return its output and what it did with x."""
    given: Any = x.as_subclass(RecordedMap)
    given.record = Recorded()
    return forward(given), given.record


# --------------------------------------------------------------------------------------- computed natively, or None
def _mean(
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    keepdims: bool = False,
    natively: bool = True,
    **others: Any,
) -> Tensor | None:
    """Return mean(x) over height and width."""
    if others or not isinstance(dim, (tuple, list)) or set(dim) not in _HEIGHT_AND_WIDTH or len(dim) != 2:
        return None
    return _squeezed(x, keepdim=keepdim or keepdims) if natively else x


def _pooled(input: Tensor, output_size: Any, *, natively: bool = True) -> Tensor | None:  # noqa: A002 - torch's name
    """Return adaptive_avg_pool2d(input, 1)."""
    if output_size != 1 and tuple(output_size if isinstance(output_size, (tuple, list)) else ()) != (1, 1):
        return None
    return _squeezed(input, keepdim=True) if natively else input


def _squeezed(x: Tensor, *, keepdim: bool) -> Tensor | None:
    if not isinstance(x, InterceptedMap):
        return None
    means = cpu.native_squeezed(x)
    return means[:, :, None, None] if keepdim else means


def _product(x: Tensor, other: Any, *, natively: bool = True, **others: Any) -> Tensor | None:
    """Return x * other, if one of them is the feature map and the other one gate per channel."""
    feature_map, gates = _factors(x, other)
    if others or gates is None:
        return None
    if not natively:
        return feature_map
    if not gates.is_cpu:
        return None
    return cpu.native_scaled(feature_map, gates.contiguous())


def _factors(x: Tensor, other: Any) -> tuple[Tensor, Tensor | None]:
    """Return the feature map of a product, and the gate (N, C) that it is multiplied by; None for anything else."""
    feature_map, gates = (x, other) if isinstance(x, InterceptedMap) else (other, x)
    if type(gates) is not Tensor or gates.dtype != feature_map.dtype or gates.dim() != 4:
        return feature_map, None
    if gates.shape != (*feature_map.shape[:2], 1, 1):
        # As by expand_as, which repeats without copying.
        if gates.shape != feature_map.shape or gates.stride()[2:] != (0, 0):
            return feature_map, None
        gates = gates[:, :, :1, :1]
    return feature_map, gates.flatten(1)


_HEIGHT_AND_WIDTH = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
_SQUEEZES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.mean: _mean,
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _pooled,
}
_SCALES: dict[Any, Callable[..., Tensor | None]] = dict.fromkeys(
    (Tensor.mul, torch.mul, Tensor.multiply, torch.multiply, Tensor.__mul__, Tensor.__rmul__), _product
)
_HANDLERS = {**_SQUEEZES, **_SCALES}
