"""Exchange the gates of SE blocks that are already in a network, such as sigmoid for hard sigmoid."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from selab import units
from selab.attention.base import Attention
from selab.attention.base import Gate as BaseGate
from selab.attention.gated_site import named_sites
from selab.attention.se import GATES, SqueezeExcitation
from selab.errors import ModelError, nearest
from selab.records.display import Displayed

# Where a library defines its block → the name of the gate.
_EXTERNAL = {
    ("timm.layers.squeeze_excite", "SEModule"): "gate",
    ("timm.layers.squeeze_excite", "EffectiveSEModule"): "gate",
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): "gate",
    ("torchvision.ops.misc", "SqueezeExcitation"): "scale_activation",
}
_NAMES = {
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
    "Hardsigmoid": "hardsigmoid",
    "HardSigmoid": "hardsigmoid",
}


@dataclass(frozen=True, kw_only=True)
class GateConversion:
    """The conversion of one block's gate.

    Attributes:
        path: of the block.
        kind: the name of the block's class.
        before: the gate that was there.
        after: the gate that is there now.
        reason: why it was left; empty if it was not.
    """

    path: str
    kind: str
    before: str
    after: str
    reason: str = ""


class GateConversions(Displayed, tuple[GateConversion, ...]):
    """The result of `convert_gates`, block by block; prints as one line."""

    def summary(self) -> str:
        """Return one line: `16 gates converted from sigmoid to hardsigmoid; 2 left: …`."""
        done = Counter((one.before, one.after) for one in self if not one.reason and one.before != one.after)
        left = Counter(one.reason for one in self if one.reason)
        words = [
            f"{units.counted(count, 'gate')} converted from {before} to {after}"
            for (before, after), count in done.items()
        ]
        words += [f"{count} left: {reason}" for reason, count in left.items()]
        return "; ".join(words) or "no gates to convert"

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return "path", "kind", "before", "after", "reason"

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [(one.path, one.kind, one.before, one.after, one.reason) for one in self]


def convert_gates(model: nn.Module, gate: str) -> GateConversions:
    """Exchange the gates of the SE blocks of a network, in place; all weights and keys stay.

    The outputs change: a hard sigmoid is not a sigmoid, so a trained network needs fine-tuning or a check of its
    accuracy. Blocks that start as the identity stay so, except with a ReLU gate.

    Args:
        model: with blocks of selab, torchvision (`torchvision.ops.SqueezeExcitation`) or timm (`SEModule`,
            `SqueezeExcite`, `EffectiveSEModule`).
        gate: `sigmoid`, `tanh`, `relu` or `hardsigmoid`. Other blocks than SE take `sigmoid` and `hardsigmoid`.

    Returns:
        The conversions, block by block; prints as one line.

    Raises:
        ModelError: `model` is not an nn.Module, or there is no such gate.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), selab.SqueezeExcitation(16, 4))
        >>> selab.convert_gates(net, "hardsigmoid")
        1 gate converted from sigmoid to hardsigmoid
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"selab.convert_gates: expected a torch.nn.Module, got {type(model).__name__}")
    if gate not in GATES:
        raise ModelError(f"selab.convert_gates: no gate {gate!r}{nearest(str(gate), GATES)}")
    return GateConversions(
        found for path, module in named_sites(model) if (found := _converted(path, module, gate)) is not None
    )


def _converted(path: str, module: nn.Module, gate: str) -> GateConversion | None:
    name = type(module).__name__
    if isinstance(module, SqueezeExcitation):
        before: str = module.kinds[2]
        reason = _convert_se(module, gate)
    elif isinstance(module, Attention):
        gates = [child for child in module.children() if isinstance(child, BaseGate)]
        before, reason = ("hardsigmoid" if gates and gates[0].hard else "sigmoid"), ""
        if not gates or gate not in ("sigmoid", "hardsigmoid"):
            reason = f"{name} has no gate to exchange" if not gates else f"{name} takes sigmoid and hardsigmoid only"
        for one in gates if not reason else ():
            one.hard = gate == "hardsigmoid"
    else:
        attribute = next((_EXTERNAL[key] for one in type(module).__mro__ if (key := _key(one)) in _EXTERNAL), None)
        if attribute is None:
            return None
        there = module._modules.get(attribute)
        before, reason = _NAMES.get(type(there).__name__, type(there).__name__), ""
        if there is None:
            reason = f"its {attribute} is not a module"
        else:
            setattr(module, attribute, GATES[gate]().train(there.training))
    return GateConversion(path=path, kind=name, before=before, after=before if reason else gate, reason=reason)


def _key(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _convert_se(block: SqueezeExcitation, gate: str) -> str:
    """Exchange the gate of a block of selab; return why it cannot be, or an empty string."""
    there: Any = block.gate
    if type(there) is not GATES[block.kinds[2]]:
        return f"unsupported gate: {type(there).__name__}"
    if block.gate_affine is not None and gate == "relu":
        return "a block that starts as the identity needs a bias of one for a ReLU gate"
    block.exchange_gate(gate)
    return ""
