"""SE blocks of other libraries: find them and give them the fused implementation."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selab.kernels.cpu import BlockParams
from selab.kernels.deferred_bn import consume, materialize, materialize_unsupported, pending_norm
from selab.kernels.dispatch import CachedDispatch, Impl, cached_call, choose, has_hooks, run
from selab.meta import Passage, passages
from selab.records.types import Insertion

PLACEMENT = "its own"


def external_insertions(model: nn.Module, input_nchw: tuple[int, ...]) -> tuple[Insertion, ...]:
    """The SE blocks of torchvision and timm in a network, as far as a map goes through them.

    Args:
        model: left as it is, whatever device it is on.
        input_nchw: the shape of an example input, (N, C, H, W).

    Raises:
        ModelError: the network fails on this input.
    """
    blocks = external_blocks(model)
    seen = passages(model, blocks, input_nchw)
    found = (_insertion(path, block, seen[path]) for path, block in blocks.items())
    return tuple(one for one in found if one is not None)


def _insertion(path: str, block: nn.Module, passage: Passage) -> Insertion | None:
    shape = passage.input_shape
    if shape is None or len(shape) != 4:
        return None
    _, channels, height, width = shape
    hidden = external_squeeze_channels(block)
    # Squeeze and scale, two layers, the activation and the gate: of one image, as our own block counts them.
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
    """Puts nn.Identity in the place of every SE block of torchvision and timm; all other weights stay as they are.

    Args:
        model: a network that the caller made, not fused.
    """
    blocks = set(external_blocks(model).values())
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in blocks:
                parent._modules[name] = nn.Identity().train(child.training)


# Where a library defines its block → the names of its reduction, activation, expansion and gate.
_FOREIGN = {
    ("timm.layers.squeeze_excite", "SEModule"): ("fc1", "act", "fc2", "gate"),
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): ("conv_reduce", "act1", "conv_expand", "gate"),
    ("torchvision.ops.misc", "SqueezeExcitation"): ("fc1", "activation", "fc2", "scale_activation"),
}
_ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
_GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}


def library_class(module: nn.Module) -> type[nn.Module] | None:
    """The library's class of a block, also of one that is fused already; a subclass may compute anything."""
    kind = type(module)
    kind = next((base for base, fast in _FAST.items() if kind is fast), kind)
    return kind if (kind.__module__, kind.__name__) in _FOREIGN else None


def external_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path → SE block of torchvision or timm, of a class that is known here; whether it can be fast says `fuse`."""
    return {path: module for path, module in model.named_modules() if library_class(module) is not None}


def external_squeeze_channels(block: nn.Module) -> int | None:
    """The width between the two layers of one of `external_blocks`; None where the first is no convolution."""
    kind = library_class(block)
    first = None if kind is None else block._modules.get(_FOREIGN[kind.__module__, kind.__name__][0])
    return first.out_channels if isinstance(first, nn.Conv2d) else None


# ----------------------------------------------------------------------------------------------------- others' blocks
def external_params(module: nn.Module, base: type[nn.Module]) -> BlockParams | str:
    """What a library's block computes, or why it is none of ours."""
    names = _FOREIGN[base.__module__, base.__name__]
    fc1, act, fc2, gate = (module._modules.get(name) for name in names)
    for name, layer in ((names[0], fc1), (names[2], fc2)):
        if type(layer) is not nn.Conv2d or layer.kernel_size != (1, 1) or layer.groups != 1 or layer.stride != (1, 1):
            return f"its {name} is no 1x1 convolution"
    activation, gating = _ACTIVATIONS.get(type(act).__name__), _GATES.get(type(gate).__name__)
    if activation is None:
        return f"its activation is {type(act).__name__}; there are fast blocks with ReLU and SiLU"
    if gating is None:
        return f"its gate is {type(gate).__name__}; there are fast blocks with Sigmoid and Hardsigmoid"
    if type(module._modules.get("bn", nn.Identity())) is not nn.Identity or getattr(module, "add_maxpool", False):
        return "it has a normalisation or a maximum of its own"
    assert isinstance(fc1, nn.Conv2d)
    assert isinstance(fc2, nn.Conv2d)
    return BlockParams(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, activation, gating)


class Fast(CachedDispatch):
    """Stands before a library's class: `isinstance`, parameters and keys stay what they were, forward is faster."""

    library: ClassVar[type[nn.Module]]
    can_overwrite: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        repeated: Tensor | None = self.replay(x)
        if repeated is not None:
            return repeated
        x = materialize_unsupported(x)
        impl, params = _foreign_choice(self, self.library, x)
        if params is None:
            out: Tensor = self.library.forward(self, materialize(x))
            return out
        if impl != "native" or torch.is_grad_enabled():
            return run(impl, materialize(x), None, params, can_overwrite=self.may_overwrite())
        fc1, _, fc2, _ = (self._modules[name] for name in _FOREIGN[self.library.__module__, self.library.__name__])
        overwrite, watched = self.may_overwrite(), (self, *self.producers)
        self.__dict__["_cached_call"] = cached_call(
            x, None, params, (self,), layers=(fc1, fc2), watched=watched, norm=pending_norm(x), can_overwrite=overwrite
        )
        return run(impl, x, None, params, can_overwrite=overwrite, norm=consume(x))

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """For copies and files, which know the library's class alone by its name."""
        return _empty, (self.library,), self.__getstate__()

    def runtime(self: Any, x: Tensor) -> tuple[Impl, str]:
        """As `SqueezeExcitation.runtime`."""
        params = external_params(self, self.library)
        return ("reference", params) if isinstance(params, str) else choose("auto", x, None, params)


_FAST: dict[type[nn.Module], type[nn.Module]] = {}


def fast_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a library's block that runs fused; made once for each class."""
    if base not in _FAST:
        body = {"library": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _FAST[base] = type(base.__name__, (Fast, base), body)
    return _FAST[base]


def _empty(base: type[nn.Module]) -> nn.Module:
    """A fast block without its state."""
    kind = fast_class(base)
    return kind.__new__(kind)


def _foreign_choice(module: nn.Module, base: type[nn.Module], x: Tensor) -> tuple[Impl, BlockParams | None]:
    if not torch.compiler.is_compiling() and has_hooks(*module.children()):
        return "reference", None
    params = external_params(module, base)
    if isinstance(params, str):
        return "reference", None
    impl, _ = choose("auto", x, None, params)
    return (impl, params) if impl != "reference" else ("reference", None)
