"""Write the SE blocks of a network in other operators with the same weights, for a runtime's compiler."""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.se import ACTIVATIONS, GATES, SqueezeExcitation
from selab.errors import UnknownNameError
from selab.fusion.external import external_blocks, external_params
from selab.records.types import Frozen


class Spelling(Frozen, frozen=True, kw_only=True):
    """The operators of an SE block.

    Attributes:
        squeeze: `pool`: global average pooling; `mean`: a mean over height and width that keeps them.
        layers: 1x1 convolutions (`conv`), fully connected (`linear`), or products and sums that a compiler of loops can
            fuse (`sums`; for few images).
        scale: `broadcast`: one factor per channel times the map; `enlarged`: the factors are repeated over height and
            width first (nearest neighbour), so that the product is one of two maps.
        gate: `hardsigmoid` instead of a sigmoid, which changes what the network computes; empty for the block's own.
    """

    squeeze: Literal["pool", "mean"] = "pool"
    layers: Literal["conv", "linear", "sums"] = "conv"
    scale: Literal["broadcast", "enlarged"] = "broadcast"
    gate: Literal["", "hardsigmoid"] = ""

    @property
    def name(self) -> str:
        """The spelling in a word: `pool-conv`, `mean-linear-enlarged`, `pool-conv-hardsigmoid`."""
        parts: list[str] = [self.squeeze, self.layers, self.scale if self.scale != "broadcast" else "", self.gate]
        return "-".join(part for part in parts if part)


def _all() -> dict[str, Spelling]:
    found = [Spelling(squeeze="pool", layers="conv"), Spelling(squeeze="pool", layers="linear")]
    found += [Spelling(squeeze="mean", layers="conv"), Spelling(squeeze="mean", layers="linear")]
    found += [Spelling(squeeze="mean", layers="sums"), Spelling(scale="enlarged"), Spelling(gate="hardsigmoid")]
    return {one.name: one for one in found}


SPELLINGS: dict[str, Spelling] = _all()
"""Name → spelling: each squeeze with each kind of layers; the gate enlarged; a hard gate."""


def spelling_of(name: str, *, option: str = "--spelling") -> Spelling:
    """Return a spelling by its name.

    Raises:
        UnknownNameError: there is no such spelling.
    """
    if name not in SPELLINGS:
        raise UnknownNameError(f"{option} {name}: there is no such spelling; allowed: {', '.join(SPELLINGS)}")
    return SPELLINGS[name]


class SpelledSE(nn.Module):
    """An SE block in the operators of a spelling.

    Shapes: input and output (N, C, H, W); factors (N, C, 1, 1).

    Args:
        fc1: of the block, (K, C) and its bias; copied. `fc2` likewise, (C, K).
        activation: between the layers.
        gate: after them.
        spelling: of the operators.
        affine: (scale, offset) of the gate of a block that starts as the identity.
        relu_in: whether the block applies a ReLU to its input first.
    """

    affine: Tensor | None

    def __init__(
        self,
        fc1: "tuple[Tensor, Tensor | None]",
        fc2: "tuple[Tensor, Tensor | None]",
        activation: nn.Module,
        gate: nn.Module,
        spelling: Spelling,
        *,
        affine: Tensor | None = None,
        relu_in: bool = False,
    ) -> None:
        super().__init__()
        self.spelling, self.relu_in = spelling, relu_in
        self.pool = nn.AdaptiveAvgPool2d(1)
        layer = pointwise if spelling.layers == "conv" else _linear
        self.fc1 = layer(*fc1)
        self.activation = activation
        self.fc2 = layer(*fc2)
        self.gate = nn.Hardsigmoid() if spelling.gate and isinstance(gate, nn.Sigmoid) else gate
        self.register_buffer("affine", None if affine is None else affine.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        if self.relu_in:
            x = F.relu(x)
        squeezed = self.pool(x) if self.spelling.squeeze == "pool" else x.mean((2, 3), keepdim=True)
        if self.spelling.layers != "conv":
            squeezed = squeezed.flatten(1)
        factor: Tensor = self.gate(self._layer(self.activation(self._layer(squeezed, self.fc1)), self.fc2))
        if self.affine is not None:
            factor = factor * self.affine[0] + self.affine[1]
        if self.spelling.layers != "conv":
            factor = factor[:, :, None, None]
        if self.spelling.scale == "enlarged":
            factor = F.interpolate(factor, size=(x.shape[2], x.shape[3]), mode="nearest")
        return x * factor

    def _layer(self, x: Tensor, layer: Any) -> Tensor:
        if self.spelling.layers != "sums":
            out: Tensor = layer(x)
            return out
        summed: Tensor = (x[:, None, :] * layer.weight).sum(2)
        return summed if layer.bias is None else summed + layer.bias

    def extra_repr(self) -> str:
        """Return the spelling, for printing."""
        return self.spelling.name


def respelled(model: nn.Module, spelling: Spelling) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a network whose SE blocks are written in the operators of a spelling, and their paths.

    Blocks of this project, torchvision's and timm's are; one with another squeeze than the mean, or with a layer that
    was replaced or is hooked (a quantised one, LoRA's), stays as it is.

    Args:
        model: left unchanged.
        spelling: of the operators.
    """
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    paths = []
    found = dict(external_blocks(model))
    found |= {path: module for path, module in model.named_modules() if isinstance(module, SqueezeExcitation)}
    for path, block in found.items():
        new = made[id(block)] if id(block) in made else _spelled(block, spelling)
        if new is None:
            continue
        made[id(block)] = new.train(block.training)
        paths.append(path)
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child is not None and id(child) in made:
                parent._modules[attribute] = made[id(child)]
    return model, tuple(paths)


def _spelled(block: nn.Module, spelling: Spelling) -> SpelledSE | None:
    activation: str
    gate: str
    if isinstance(block, SqueezeExcitation):
        squeeze, activation, gate = block.kinds
        if squeeze != "avg" or block.why_called():
            return None
        one, two = _weights(block.fc1), _weights(block.fc2)
        relu_in = block.relu_in
        affine = block.gate_affine
    else:
        params = external_params(block)
        if isinstance(params, str):
            return None
        one, two = (params.w1, params.b1), (params.w2, params.b2)
        activation, gate, relu_in, affine = params.activation, params.gate, False, None
    return SpelledSE(one, two, ACTIVATIONS[activation](), GATES[gate](), spelling, affine=affine, relu_in=relu_in)


def _weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight, layer.bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    made: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    return _filled(made, weight, bias)


def pointwise(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a 1x1 convolution with the weights of a fully connected layer, (out, in) and (out) or None; copied."""
    made: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, weight.shape[1], weight.shape[0], 1, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    return _filled(made, weight[:, :, None, None], bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    made: nn.Module = layer
    return made
