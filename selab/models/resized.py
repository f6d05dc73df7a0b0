"""A network with more channels in every layer, or with a block once more: what the time of attention buys otherwise."""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from selab.errors import ModelError, SelabError, SpecError
from selab.meta import evaluating, first_line, meta_twin
from selab.models import catalog
from selab.models.build import build
from selab.models.folded import SIZES

BUILDER = "selab.models.resized:network"
# Channels grow in steps of so many, which is what vectors of most processors hold.
_UNIT = 4


def network(*, num_classes: int, arch: str, width: float = 1.0, repeat: str = "") -> nn.Module:
    """Return a network with more channels, or with one of its blocks twice.

    New weights are drawn from those of the layer that they are added to, so that they begin with its distribution.

    Args:
        num_classes: of the classifier.
        arch: as `--arch` takes it; without attention blocks of its own configuration.
        width: all numbers of channels are multiplied by it, and rounded; 1 or more.
        repeat: the path of a block whose output has the shape of its input; it runs once more, with weights of its own.
            Several are a sum, `stage1.1+stage2.1`; one that is named twice runs twice more.

    Raises:
        SpecError: a width below 1, or a network with blocks.
        ModelError: the network cannot be made wider, or has no such block.
    """
    variant = catalog.find(arch)
    if not width >= 1:
        raise SpecError(f"width: {width:g}: allowed: 1 or more")
    if variant.se is not None:
        raise SpecError(f"arch: {arch}: has attention blocks; name a network without them")
    # The caller has seeded the generator, and says where parameters are made.
    device = torch.empty(0).device.type
    fitting = msgspec.structs.replace(variant, num_classes=num_classes)
    model = build(fitting, seed=torch.initial_seed(), device=device).model
    for path in repeat.split("+") if repeat else ():
        model = repeated(model, path)
    if width > 1:
        resize(model, wider(model, width, variant.input_chw, name=arch))
    return model


def wider(model: nn.Module, width: float, image: tuple[int, int, int], *, name: str) -> dict[str, dict[str, int]]:
    """Return the sizes of each layer of a wider network: path → attribute → size; see `wider_twin`."""
    layers = _layers(wider_twin(model, width, image, name=name), name)
    return {path: {key: int(getattr(one, key)) for key in _keys(one)} for path, one in layers.items()}


def wider_twin(model: nn.Module, width: float, image: tuple[int, int, int], *, name: str) -> nn.Module:
    """Return a wider network without memory or values, on the meta device.

    Args:
        model: not changed. All its weights are in convolutions, fully connected layers and batch normalisations.
        width: all numbers of channels are multiplied by it, and rounded; never below what they were.
        image: (C, H, W) of the input.
        name: of the network, for messages.

    Raises:
        ModelError: it has other weights, or does not run with other numbers of channels.
    """
    twin = meta_twin(model)
    layers = _layers(twin, name)
    unit = math.lcm(_UNIT, *(one.groups for one in layers.values() if isinstance(one, nn.Conv2d) and not _apart(one)))
    example = torch.zeros(2, *image, device="meta")
    order: list[str] = []
    handles = [one.register_forward_pre_hook(_noting(order, path)) for path, one in layers.items()]
    shape = _shape_of(twin, example, name)
    _remove(handles)
    last = next((path for path in reversed(order) if not isinstance(layers[path], nn.BatchNorm2d)), "")

    def out_of(path: str, size: int) -> int:
        return size if path == last else max(size, round(size * width / unit) * unit)

    handles = [one.register_forward_pre_hook(_growing(path, out_of)) for path, one in layers.items()]
    grown = _shape_of(twin, example, name)
    _remove(handles)
    if grown != shape:
        raise ModelError(f"{name}: cannot be made wider: its output becomes {grown}, not {shape}")
    return twin


def _layers(model: nn.Module, name: str) -> dict[str, Any]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, tuple(SIZES)):
            found[path] = module
        elif next(module.parameters(recurse=False), None) is not None:
            kind = type(module).__name__
            raise ModelError(f"{name}: cannot be made wider: {path or 'the network'}, a {kind}, has weights of its own")
    return found


def _keys(module: nn.Module) -> tuple[str, ...]:
    return next(keys for kind, keys in SIZES.items() if isinstance(module, kind))


def _apart(module: nn.Conv2d) -> bool:
    """Return whether each input channel has filters of its own."""
    return module.groups == module.in_channels


def _noting(order: list[str], path: str) -> Any:
    def hook(_module: nn.Module, _args: object) -> None:
        order.append(path)

    return hook


def _growing(path: str, out_of: Any) -> Any:
    """Return a hook that gives a layer the input that arrives, and more outputs."""
    done = False

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal done
        if done:
            return
        done = True
        (x, *_) = args
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = x.shape[1]
        elif isinstance(module, nn.Linear):
            module.in_features, module.out_features = x.shape[-1], out_of(path, module.out_features)
        elif _apart(module):
            each = module.out_channels // module.in_channels
            module.in_channels = module.groups = x.shape[1]
            module.out_channels = each * x.shape[1]
        else:
            module.in_channels, module.out_channels = x.shape[1], out_of(path, module.out_channels)
        _reshape(module)

    return hook


def _shape_of(model: nn.Module, example: Tensor, name: str) -> tuple[int, ...]:
    try:
        with evaluating(model), torch.no_grad():
            out = model(example)
    except SelabError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: cannot be made wider: {first_line(error)}") from error
    if not isinstance(out, Tensor):
        raise ModelError(f"{name}: cannot be made wider: it returns {type(out).__name__}, not one tensor")
    return tuple(out.shape)


def _remove(handles: list[Any]) -> None:
    for one in handles:
        one.remove()


def resize(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers more channels; new weights are drawn from the old ones, scaled to the new number of inputs."""
    for path, changed in sizes.items():
        module: Any = model.get_submodule(path)
        for key, size in changed.items():
            setattr(module, key, size)
        _reshape(module)


def _reshape(module: Any) -> None:
    """Give a layer's tensors the shapes that its sizes ask for."""
    if isinstance(module, nn.Conv2d):
        weight: tuple[int, ...] = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    elif isinstance(module, nn.Linear):
        weight = (module.out_features, module.in_features)
    else:
        weight = (module.num_features,)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim():
            grown = _grown(tensor.detach(), weight[: tensor.dim()])
            setattr(module, name, nn.Parameter(grown, tensor.requires_grad) if name in module._parameters else grown)


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    if tensor.device.type == "meta":
        return tensor.new_empty(shape)
    values = tensor.flatten()
    grown = values[torch.randint(len(values), shape)]
    if tensor.dim() > 1:
        # A sum over more inputs keeps its variance.
        grown = grown * math.sqrt(tensor[0].numel() / grown[0].numel())
    return grown.contiguous()


# ------------------------------------------------------------------------------------------------------------- depth
def repeatable(model: nn.Module, image: tuple[int, int, int], *, name: str) -> list[str]:
    """Return the blocks that can run once more: children of an `nn.Sequential` that keep the shape of a map.

    Of blocks within each other the outer one.

    Args:
        model: not changed.
        image: (C, H, W) of the input.
        name: of the network, for messages.

    Raises:
        ModelError: it does not run.
    """
    twin = meta_twin(model)
    kept: dict[str, bool] = {}

    def noting(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            alike = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            kept[path] = kept.get(path, True) and alike and out.dim() == 4 and out.shape == args[0].shape

        return hook

    handles = []
    for path, module in twin.named_modules():
        parent = twin.get_submodule(path.rpartition(".")[0]) if path else None
        if isinstance(parent, nn.Sequential) and any(isinstance(one, nn.Conv2d) for one in module.modules()):
            handles.append(module.register_forward_hook(noting(path)))
    _shape_of(twin, torch.zeros(2, *image, device="meta"), name)
    _remove(handles)
    found = {path for path, alike in kept.items() if alike}
    return [path for path, _ in model.named_modules() if path in found and not _inside(path, found)]


def _inside(path: str, others: Collection[str]) -> bool:
    return any(path.startswith(f"{one}.") for one in others)


def repeated(model: nn.Module, path: str) -> nn.Module:
    """Return a network in which a block runs once more behind itself, with its weights in another order.

    Raises:
        ModelError: it is no child of an `nn.Sequential`.
    """
    above, _, last = path.rpartition(".")
    try:
        parent, block = model.get_submodule(above), model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"repeat: {path}: there is no such block") from None
    if not isinstance(parent, nn.Sequential):
        raise ModelError(f"repeat: {path}: is no child of an nn.Sequential")
    again = copy.deepcopy(block)
    for tensor in again.parameters():
        if tensor.device.type != "meta":
            tensor.data = tensor.detach().flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    more = sum(name == f"{last}_again" or name.startswith(f"{last}_again_") for name in parent._modules)
    children = list(parent._modules.items())
    parent._modules.clear()
    for name, module in children:
        parent._modules[name] = module
        if name == last:
            parent._modules[f"{name}_again_{more + 1}" if more else f"{name}_again"] = again
    return model
