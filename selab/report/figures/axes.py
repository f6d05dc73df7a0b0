"""Axes of figures: which quantity, its label and unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selab import units
from selab.errors import UnknownNameError, nearest


@dataclass(frozen=True)
class Axis:
    """A quantity that can stand on an axis.

    Attributes:
        origin: who says so: our counter, a paper, a profile, or a comparison of accuracy.
        path: the field of a `Cost`, a `Memory` or a verdict, the metric, or the phase that it is read from.
        short: what it is called in a title.
        label: what is said along the axis.
        unit: of its values; `%` is percent, not a fraction.
    """

    name: str
    origin: Literal["counted", "published", "measured", "trained"]
    path: str
    short: str
    label: str
    unit: Literal["", "B", "s", "%"] = ""
    logarithmic: bool = True


_MACS = "MACs of a forward pass"
_TIME = "time of a forward pass"
_ADDED = "time that SE adds to a forward pass (% of the base)"
_SAVED = "memory kept for the backward pass"
_ALL_AXES = (
    Axis("params", "counted", "params", "parameters", "parameters"),
    Axis("macs", "counted", "macs.paper", "MACs", f"{_MACS} (paper's FLOPs)"),
    Axis("macs_all", "counted", "macs.all", "MACs", f"{_MACS} (all operations)"),
    Axis("flops", "counted", "flops", "FLOPs", "floating-point operations of a forward pass"),
    Axis("bytes", "counted", "bytes", "bytes moved", "bytes moved in a forward pass", "B"),
    Axis("activations", "counted", "activations", "activations", "activations (elements of convolution outputs)"),
    Axis("top1_error", "published", "top1_error_pct", "top-1 error", "top-1 error, published (%)", "%", False),
    Axis("top5_error", "published", "top5_error_pct", "top-5 error", "top-5 error, published (%)", "%", False),
    Axis("top1_error_trained", "trained", "top1", "top-1 error", "top-1 error, trained here (%)", "%", False),
    Axis("top5_error_trained", "trained", "top5", "top-5 error", "top-5 error, trained here (%)", "%", False),
    Axis("latency", "measured", "forward", _TIME, _TIME, "s"),
    Axis(
        "latency_fwd_bwd", "measured", "forward_backward", "time of both passes", f"{_TIME} and the backward one", "s"
    ),
    Axis("tax", "measured", "forward", "time added to a forward pass", _ADDED, "%", False),
    Axis("saved_for_backward", "measured", "saved_for_backward_bytes", _SAVED, _SAVED, "B"),
)
AXES = {axis.name: axis for axis in _ALL_AXES}
TRAINED = "trained"


def axis(name: str, *, option: str = "axis") -> Axis:
    """Return a quantity by name.

    Args:
        name: the word.
        option: where it was given, for the message.

    Raises:
        UnknownNameError: nothing has this name; the message lists the nearest ones.
    """
    if name not in AXES:
        raise UnknownNameError(f"{option} {name}: no such quantity{nearest(name, AXES)}")
    return AXES[name]


def tick_labels(unit: str, values: Sequence[float]) -> list[str]:
    """Return ticks' labels; those with the same unit have the same number of decimals: `24.0 %` next to `23.5 %`."""
    texts = [with_unit(unit, value).split(" ", 1) for value in values]
    decimals: dict[str, int] = {}
    for number, *suffix in texts:
        key = "".join(suffix)
        decimals[key] = max(decimals.get(key, 0), len(number.partition(".")[2]))
    return [" ".join((_padded(number, decimals["".join(suffix)]), *suffix)) for number, *suffix in texts]


def _padded(number: str, decimals: int) -> str:
    whole, _, rest = number.partition(".")
    return f"{whole}.{rest.ljust(decimals, '0')}" if decimals else number


def with_unit(unit: str, value: float) -> str:
    """Return a tick's value with as many digits as it has: 2e8 → `200 M`, 0.025 → `25 ms`."""
    if unit == "%":
        return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
    show = {"": units.count, "B": units.size, "s": units.seconds}[unit]
    texts = [show(value, digits=digits) for digits in range(1, 8)]
    return next(text for text in texts if float(text.split()[0]) == float(texts[-1].split()[0]))
