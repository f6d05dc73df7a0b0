"""SE blocks of torchvision and timm: find them, remove them, and compute them in fewer passes."""

import sys
from functools import partial
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from selab.kernels.cpu import BlockParams
from selab.kernels.deferred_bn import materialize, run_block, supported
from selab.kernels.dispatch import CachedDispatch, Impl, choose, has_hooks, holds_weights
from selab.kernels.ownership import Arrival
from selab.kernels.squeeze_scale import refuses, run_stepwise
from selab.kernels.swap import Swapped, library_of
from selab.meta import On, Passage, passages
from selab.records.types import Insertion

PLACEMENT = "its own"

# Module and name of a library's class → attributes of its reduction, activation, expansion and gate.
_LAYERS = {
    ("timm.layers.squeeze_excite", "SEModule"): ("fc1", "act", "fc2", "gate"),
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): ("conv_reduce", "act1", "conv_expand", "gate"),
    ("timm.models.senet", "SEModule"): ("fc1", "relu", "fc2", "sigmoid"),
    ("pretrainedmodels.models.senet", "SEModule"): ("fc1", "relu", "fc2", "sigmoid"),
    ("torchvision.ops.misc", "SqueezeExcitation"): ("fc1", "activation", "fc2", "scale_activation"),
}
_ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
_GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}


def external_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → SE block of torchvision or timm; fused ones too, and those that `fuse` cannot fuse."""
    return {path: module for path, module in model.named_modules() if is_external(module)}


def is_external(module: nn.Module) -> bool:
    """Return whether a module is of exactly a library's SE class, fused or not; a subclass may compute anything."""
    return _layer_names(module) is not None


def external_squeeze_channels(block: nn.Module) -> int | None:
    """Return the squeeze width of one of `external_blocks`; None if its first layer is not a convolution."""
    names = _layer_names(block)
    first = None if names is None else block._modules.get(names[0])
    return first.out_channels if isinstance(first, nn.Conv2d) else None


def external_insertions(model: nn.Module, input_nchw: tuple[int, ...], *, on: On = "fake") -> tuple[Insertion, ...]:
    """Return the SE blocks of torchvision and timm that run in a forward pass.

    Args:
        model: not changed, on any device.
        input_nchw: the shape of an example input, (N, C, H, W).
        on: as in `selab.fuse`.

    Raises:
        ModelError: the network fails on this input.
    """
    blocks = external_blocks(model)
    seen = passages(model, blocks, input_nchw, on=on)
    found = (_insertion(path, block, seen[path]) for path, block in blocks.items())
    return tuple(one for one in found if one is not None)


def _insertion(path: str, block: nn.Module, passage: Passage) -> Insertion | None:
    shape = passage.input_shape
    if shape is None or len(shape) != 4:
        return None
    _, channels, height, width = shape
    hidden = external_squeeze_channels(block)
    # Of one image, with the same conventions as SqueezeExcitation.macs: two layers with activation and gate, then
    # squeeze and scale.
    layers = 0 if hidden is None else 2 * channels * hidden + hidden + channels
    return Insertion(
        path=path,
        placement=PLACEMENT,
        channels=channels,
        squeeze_channels=hidden,
        params=sum(parameter.numel() for parameter in block.parameters()),
        height=height,
        width=width,
        macs=layers + 2 * channels * height * width,
    )


def remove_external_blocks(model: nn.Module) -> None:
    """Replace every SE block of torchvision and timm by nn.Identity, in place; all other weights stay as they are.

    Args:
        model: a copy that the caller may change, not fused.
    """
    blocks = set(external_blocks(model).values())
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in blocks:
                parent._modules[name] = nn.Identity().train(child.training)


# --------------------------------------------------------------------------------------------------------- fused blocks
def external_params(module: nn.Module) -> BlockParams | str:
    """Return what one of `external_blocks` computes, or the reason why the fused implementations cannot.

    They read the weights of the two layers and call neither, so a layer that is quantised, wrapped, parametrised or
    pruned must be called by the block's own code.
    """
    names = _layer_names(module)
    if names is None:
        return f"unsupported block: {type(module).__name__}"
    fc1, act, fc2, gate = (module._modules.get(name) for name in names)
    pool = next((module._modules[name] for name in ("avgpool", "avg_pool") if name in module._modules), None)
    if pool is not None and not (type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))):
        return f"unsupported squeeze: {type(pool).__name__}"
    for name, layer in ((names[0], fc1), (names[2], fc2)):
        reason = _refuses_layer(name, layer)
        if reason:
            return reason
    activation, gating = _ACTIVATIONS.get(type(act).__name__), _GATES.get(type(gate).__name__)
    if activation is None:
        return f"unsupported activation: {type(act).__name__} (supported: ReLU, SiLU)"
    if gating is None:
        return f"unsupported gate: {type(gate).__name__} (supported: Sigmoid, Hardsigmoid)"
    if type(module._modules.get("bn", nn.Identity())) is not nn.Identity:
        return "unsupported: a normalisation between the layers"
    if getattr(module, "add_maxpool", False):
        return "unsupported: a maximum added to the mean"
    assert isinstance(fc1, nn.Conv2d)
    assert isinstance(fc2, nn.Conv2d)
    return BlockParams(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, activation, gating)


def _refuses_layer(name: str, layer: nn.Module | None) -> str:
    if type(layer) is not nn.Conv2d:
        return f"unsupported {name}: {type(layer).__name__} (supported: a 1x1 Conv2d)"
    if layer.kernel_size != (1, 1) or layer.groups != 1 or layer.stride != (1, 1) or layer.padding not in ((0, 0), 0):
        return f"unsupported {name}: not a plain 1x1 convolution"
    return "" if holds_weights(layer) else f"unsupported {name}: its weight is computed, as by pruning"


class FusedExternal(Swapped, CachedDispatch):
    """A library's SE block in fewer passes: the class, parameters and keys stay, only `forward` changes.

    For `selab.kernels.swap.swap`. Runs the library's own code wherever `runtime` answers `reference`, with squeeze and
    scale as native passes where that is possible.

    Shapes: input and output (N, C, H, W).
    """

    can_overwrite = False

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        compiling = torch.compiler.is_compiling()
        references = 0 if compiling else getrefcount(x)
        replayed: Tensor | None = self.replay(x, references=references)
        if replayed is not None:
            return replayed
        x = supported(x)
        impl, _, params = _choose(self, x)
        if params is None:
            out: Tensor = run_own_code(self, materialize(x))
            return out
        fc1, _, fc2, _ = (self._modules[name] for name in _layer_names(self) or ())
        arrival = None if compiling else Arrival(self, sys._getframe(1), references)
        return run_block(self, impl, x, None, params, layers=(fc1, fc2), arrival=arrival)

    def runtime(self: Any, x: Tensor) -> tuple[Impl, str]:
        """Return the implementation that x would take now, and the reason against a faster one (empty without one).

        Args:
            x: (N, C, H, W).
        """
        impl, reason, _ = _choose(self, x)
        return impl, reason


def _choose(module: nn.Module, x: Tensor) -> tuple[Impl, str, BlockParams | None]:
    """Return the implementation, the reason against a faster one and, except for the reference, the parameters."""
    params = external_params(module)
    if isinstance(params, str) or hooked(module):
        return "reference", params if isinstance(params, str) else hooked(module), None
    impl, reason = choose("auto", x, None, params)
    return impl, reason, None if impl == "reference" else params


def run_own_code(block: Any, x: Tensor) -> Any:
    """Run the own code of a swapped block on (N, C, H, W), with squeeze and scale as native passes if possible."""
    forward = partial(block.library.forward, block)
    return forward(x) if refuses(x) or has_hooks(*block.modules()) else run_stepwise(forward, x)


def hooked(block: nn.Module) -> str:
    """Return why the block's own code must run because of hooks on its layers; empty without any."""
    return "a hook is registered on one of its layers" if has_hooks(*block.children()) else ""


def _layer_names(module: nn.Module) -> tuple[str, str, str, str] | None:
    kind = library_of(module)
    return _LAYERS.get((kind.__module__, kind.__name__))
