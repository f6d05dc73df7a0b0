"""Blocks that are related to SE: find them, and run their squeeze and scale as native passes where that is possible.

They are known by their class, or found by running them: a module is one if it takes the mean of its input over height
and width, and returns its input multiplied by one gate per channel. What it computes between the two does not matter,
because its own code runs in every call (`selab.kernels.squeeze_scale`).
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selab.attention.base import Attention
from selab.fusion.external import is_external, run_own_code
from selab.kernels.deferred_bn import materialize
from selab.kernels.squeeze_scale import recorded
from selab.kernels.swap import Swapped, library_of, swap

# Related classes of other layers between the squeeze and the gate. They run as they are, between two native passes.
_RELATED = {
    ("timm.layers.squeeze_excite", "EffectiveSEModule"): "one layer instead of two",
    ("timm.models.hgnet", "EseModule"): "one layer instead of two",
    ("timm.layers.eca", "EcaModule"): "its layer is a convolution over the channels",
    ("timm.layers.eca", "CecaModule"): "its layer is a convolution over the channels",
    ("timm.layers.gather_excite", "GatherExcite"): "its layers are those of a ConvMlp",
    ("pycls.models.blocks", "SE"): "its layers are in an nn.Sequential",
}
# Related classes that stay as they are, with the reason.
_POSITIONS = "unsupported: it gates positions too"
_BRANCHES = "unsupported: it weighs branches, not one feature map"
_LEFT = {
    ("timm.layers.squeeze_excite", "SqueezeExciteCl"): "unsupported: its feature maps are (N, H, W, C)",
    ("timm.layers.global_context", "GlobalContext"): "unsupported: its squeeze is a weighted mean",
    ("timm.layers.cbam", "CbamModule"): _POSITIONS,
    ("timm.layers.cbam", "LightCbamModule"): _POSITIONS,
    ("timm.layers.coord_attn", "CoordAttn"): _POSITIONS,
    ("timm.layers.coord_attn", "SimpleCoordAttn"): _POSITIONS,
    ("timm.layers.coord_attn", "EfficientLocalAttn"): _POSITIONS,
    ("timm.layers.coord_attn", "StripAttn"): _POSITIONS,
    ("timm.layers.selective_kernel", "SelectiveKernel"): _BRANCHES,
    ("timm.layers.split_attn", "SplitAttn"): _BRANCHES,
    (
        "torchvision.models.quantization.mobilenetv3",
        "QuantizableSqueezeExcitation",
    ): "unsupported: quantization must see each of its operations",
}
# Classes whose forward contains a residual addition, with a BatchNorm before it and an activation after it. There is no
# module to replace.
_INLINE_JOINS = {
    "torchvision.models.resnet": ("BasicBlock", "Bottleneck"),
    "torchvision.models.regnet": ("ResBottleneckBlock",),
    "timm.models.resnet": ("BasicBlock", "Bottleneck"),
    "timm.models.regnet": ("Bottleneck",),
    "timm.models.senet": ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck", "SEResNetBlock"),
    "timm.models.byobnet": ("BasicBlock", "BottleneckBlock", "DarkBlock", "EdgeBlock", "SelfAttnBlock"),
    "timm.models.res2net": ("Bottle2neck",),
    "timm.models.resnest": ("ResNestBottleneck",),
    "timm.models.sknet": ("SelectiveKernelBasic", "SelectiveKernelBottleneck"),
    "timm.models.repghost": ("RepGhostModule", "RepGhostBottleneck"),
    "timm.models.repvit": ("RepVggDw", "RepViTBlock"),
}
# A module with more layers than these is a network's block, not a gate.
_MOST_MODULES = 16
_UNKNOWN_CLASS = "its class is not known"


class SteppedBlock(Swapped):
    """A block that runs its own code, with squeeze and scale as native passes where that is possible.

    For `selab.kernels.swap.swap`. Class, parameters and keys stay.
    """

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the block's own class does."""
        if args or kwargs or not isinstance(x, Tensor):
            return self.library.forward(self, x, *args, **kwargs)
        return run_own_code(self, materialize(x))

    def reason(self: Any) -> str:
        """Return why its layers are not part of a native pass."""
        return _RELATED.get(_key(self), _UNKNOWN_CLASS)


def step_related(model: nn.Module) -> None:
    """Let the related blocks of a network run squeeze and scale as native passes, in place."""
    _step(model, {})


def related_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → block of the related blocks of a network, fused or not; nothing is changed."""
    return dict(_related(model, "", {}))


def _related(module: nn.Module, path: str, known: dict[object, bool]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, SteppedBlock) or _key(module) in _RELATED:
        yield path, module
        return
    if _is_other_block(module):
        return
    prefix = f"{path}." if path else ""
    inside = [found for name, child in module.named_children() for found in _related(child, prefix + name, known)]
    yield from inside
    if not inside and not any(map(_is_other_block, module.modules())) and _looks_like_one(module, known):
        yield path, module


def _is_other_block(module: nn.Module) -> bool:
    return isinstance(module, Attention) or is_external(module) or bool(left_reason(module))


def _looks_like_one(module: nn.Module, known: dict[object, bool]) -> bool:
    if not _may_be_one(module):
        return False
    structure = tuple((path, type(one)) for path, one in module.named_modules())
    if structure not in known:
        known[structure] = _is_one(module)
    return known[structure]


def _step(module: nn.Module, known: dict[object, bool]) -> bool:
    """Swap the related blocks among a module and all inside it; return whether there is a block of any kind.

    Args:
        module: a network or a part of it.
        known: the answers of `_is_one`. Modules of one structure are run once: a transformer has many, and large ones.
    """
    if isinstance(module, SteppedBlock) or _is_other_block(module):
        return True
    if _key(module) in _RELATED:
        swap(module, SteppedBlock)
        return True
    # A module with a block inside is not a block itself, though it may return what the block returns.
    inside = [_step(child, known) for child in module.children()]
    if any(inside):
        return True
    found = _looks_like_one(module, known)
    if found:
        swap(module, SteppedBlock)
    return found


def left_reason(module: nn.Module) -> str:
    """Return why a related block of a library stays as it is; empty for other modules."""
    return _LEFT.get(_key(module), "")


def inline_joins(model: nn.Module) -> tuple[str, ...]:
    """Return the class of every module of a library that adds a shortcut in the code of its forward."""
    kinds = (library_of(module) for module in model.modules())
    return tuple(kind.__name__ for kind in kinds if kind.__name__ in _INLINE_JOINS.get(kind.__module__, ()))


def _key(module: nn.Module) -> tuple[str, str]:
    kind = library_of(module)
    return kind.__module__, kind.__name__


# ---------------------------------------------------------------------------------------------- blocks of other classes
def _may_be_one(module: nn.Module) -> bool:
    """Return whether it is worth to run a module: a small one of somebody's class that takes one argument."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "selab.")) or "forward" in module.__dict__ or isinstance(module, Swapped):
        return False
    inside = list(module.modules())
    if not 1 < len(inside) <= _MOST_MODULES or _channels(module) is None:
        return False
    try:
        (_, *given) = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [one for one in given if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return len(needed) == 1 and needed[0] is given[0]


def _channels(module: nn.Module) -> int | None:
    """Return the channels of the feature map that a gate's first layer was made for; None if it is no gate."""
    layers = [one for one in module.modules() if isinstance(one, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    for one in layers:
        if isinstance(one, nn.Conv2d) and one.kernel_size != (1, 1):
            return None
    if not layers or isinstance(layers[0], nn.Conv1d):
        # A convolution over the channels takes any number of them.
        return 8 if layers else None
    return layers[0].in_features if isinstance(layers[0], nn.Linear) else layers[0].in_channels


@torch.no_grad()
def _is_one(module: nn.Module) -> bool:
    """Run a copy of a module on a small feature map; return whether it squeezes and scales it, and returns that."""
    channels = _channels(module)
    held = [*module.parameters(), *module.buffers()]
    if channels is None or any(one.is_meta for one in held):
        return False
    try:
        twin: Any = copy.deepcopy(module).cpu().float().eval()
        with torch.random.fork_rng(devices=[]):
            out, record = recorded(type(twin).forward.__get__(twin), torch.zeros(2, channels, 3, 5))
    except Exception:
        # Whatever it raises, it is no gate of such a feature map.
        return False
    return record.squeezes > 0 and any(out is one for one in record.scaled)
