"""A network without the blocks that became constants in its weights, as `selab fold` describes it."""

from collections.abc import Mapping

import msgspec
import torch
from torch import nn

from selab.attention.base import Attention
from selab.attention.gates import convert_gates
from selab.attention.insert import take_out
from selab.errors import SpecError
from selab.models import catalog
from selab.models.build import build

BUILDER = "selab.models.folded:network"
SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("out_channels", "in_channels", "groups"),
    nn.Linear: ("out_features", "in_features"),
    nn.BatchNorm2d: ("num_features",),
}
"""Layers that can be narrowed, and their attributes that are sizes."""
_OUT, _IN = ("out_channels", "out_features", "num_features"), ("in_channels", "in_features")


def network(*, num_classes: int, arch: str, folded: str, gate: str = "", narrowed: str = "") -> nn.Module:
    """Return a network whose blocks at some paths pass their input on; its weights are in a file of their own.

    Args:
        num_classes: of the classifier.
        arch: as `--arch` takes it.
        folded: the paths of the blocks, separated by blanks; empty for the network as it was.
        gate: of the blocks that are left, as `selab.convert_gates` takes it; empty for their own.
        narrowed: layers with fewer channels, `path:size=N,size=N` separated by blanks; empty for none.

    Raises:
        SelabError: the network cannot be found or built, or has no such block.
    """
    model = build(msgspec.structs.replace(catalog.find(arch), num_classes=num_classes)).model
    for path in folded.split():
        take_out(model, path)
    if gate:
        convert_gates(model, gate)
    narrow(model, sizes_in(narrowed))
    return model


def narrow(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers fewer channels; their weights keep the first ones, and are to be loaded.

    Args:
        model: changed.
        sizes: path of a layer or block → its sizes that change, by the name of the attribute.

    Raises:
        SpecError: there is no such layer, or it has no such size.
    """
    for path, changed in sizes.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise SpecError(f"narrowed: {path}: there is no such layer") from None
        own = ("channels",) if isinstance(module, Attention) else _sizes_of(module)
        for key, size in changed.items():
            if key not in own or not 1 <= size <= getattr(module, key):
                raise SpecError(f"narrowed: {path}: {key}={size} is no size of a {type(module).__name__} like this")
            setattr(module, key, size)
        if isinstance(module, Attention):
            continue
        out = next((changed[key] for key in _OUT if key in changed), None)
        into = next((changed[key] for key in _IN if key in changed), None)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            into = None  # a depthwise weight has one input channel
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.dim():
                continue  # the counter of a normalisation
            less = tensor.detach()[:out] if tensor.dim() == 1 else tensor.detach()[:out, :into]
            less = less.clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                less = nn.Parameter(less, tensor.requires_grad)
            setattr(module, name, less)


def _sizes_of(module: nn.Module) -> tuple[str, ...]:
    return next((keys for kind, keys in SIZES.items() if isinstance(module, kind)), ())


def sizes_in(text: str) -> dict[str, dict[str, int]]:
    """Parse `path:size=N,size=N path:size=N`.

    Raises:
        SpecError: it is written otherwise.
    """
    found: dict[str, dict[str, int]] = {}
    for one in text.split():
        path, _, sizes = one.partition(":")
        try:
            found[path] = {key: int(size) for key, size in (part.split("=") for part in sizes.split(","))}
        except ValueError:
            raise SpecError(f"narrowed: {one}: is written PATH:SIZE=N,SIZE=N") from None
    return found


def sizes_text(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Return what `sizes_in` parses."""
    return " ".join(
        f"{path}:{','.join(f'{key}={size}' for key, size in changed.items())}" for path, changed in sizes.items()
    )
