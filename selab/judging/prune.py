"""Take channels out whose factor is always about zero, by Torch-Pruning.

The channels of a block's map come from one convolution. Where no other layer's channels have to go with them, that
convolution, what treats channels alone (batch normalisation, depthwise convolutions), the block's own layers and the
readers of the map become narrower.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selab.attention.base import Attention
from selab.errors import DeviceError
from selab.judging.fold import Place
from selab.meta import evaluating, first_line
from selab.models.folded import SIZES, narrow

Narrowed = dict[str, dict[str, int]]
"""Path of a layer → its sizes that changed."""


def prune(
    model: nn.Module, path: str, channels: Sequence[int], place: Place, example: Tensor
) -> tuple[nn.Module, Narrowed] | str:
    """Return a copy of a network without some channels of one block's map, or why they cannot be taken out.

    Args:
        model: left unchanged.
        path: of the block; it may have been taken out.
        channels: their numbers.
        place: where the block's factors go, or went.
        example: an input, (N, C, H, W).

    Raises:
        DeviceError: torch-pruning is not installed.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise DeviceError(
            "--prune: needs the package torch_pruning, which is not installed; run pip install 'selab[prune]'"
        ) from None
    made = copy.deepcopy(model)
    block = _module(made, path)
    # The tracer follows torch's operators, not the compiled ones.
    _run_plainly(made)
    before = sizes_of(made)
    try:
        with evaluating(made), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch_pruning.DependencyGraph().build_dependency(made, example_inputs=example)
            root, how = _root(made, place, torch_pruning)
            group = found.get_pruning_group(root, how, idxs=sorted(channels))
            why_not = _why_not(group, made, torch_pruning) if found.check_pruning_group(group) else "all channels go"
            if why_not:
                return why_not
            group.prune()
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        return f"Torch-Pruning cannot follow the network: {first_line(error)}"
    changed = {
        where: {key: size for key, size in sizes.items() if size != before[where][key]}
        for where, sizes in sizes_of(made).items()
        if sizes != before[where]
    }
    if isinstance(block, Attention):
        changed[path] = {"channels": block.channels - len(channels)}
    # The same narrowing that the description makes, so that both are one.
    again = copy.deepcopy(model)
    narrow(again, changed)
    try:
        again.load_state_dict(made.state_dict())
        with evaluating(again), torch.no_grad():
            again(example)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"without them the network does not run: {first_line(error)}"
    return again, changed


def sizes_of(model: nn.Module) -> Narrowed:
    """Return the sizes of each layer that can be narrowed."""
    return {
        path: {key: int(getattr(module, key)) for key in keys}
        for path, module in model.named_modules()
        for kind, keys in SIZES.items()
        if isinstance(module, kind)
    }


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _run_plainly(model: nn.Module) -> None:
    for module in model.modules():
        block: Any = module
        if isinstance(module, Attention) and hasattr(module, "impl"):
            block.impl = "reference"


def _root(model: nn.Module, place: Place, library: Any) -> tuple[nn.Module, Any]:
    module = model.get_submodule(place.weight.rpartition(".")[0])
    if place.way == "scale":
        return module, library.prune_batchnorm_out_channels
    if place.way == "input channels":
        return module, library.prune_conv_in_channels
    depthwise = isinstance(module, nn.Conv2d) and _is_depthwise(module)
    return module, library.prune_depthwise_conv_out_channels if depthwise else library.prune_conv_out_channels


def _is_depthwise(module: nn.Conv2d) -> bool:
    return module.groups == module.in_channels == module.out_channels and module.groups > 1


def _why_not(group: Any, model: nn.Module, library: Any) -> str:
    """Return why a group of layers must keep its channels: more than one layer makes them."""
    inside = {id(layer) for module in model.modules() if isinstance(module, Attention) for layer in module.modules()}
    makers = set()
    for dependency, _ in group:
        module = dependency.target.module
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not _is_depthwise(module):
            return "a grouped convolution takes part"
        makes = dependency.handler in (library.prune_conv_out_channels, library.prune_linear_out_channels)
        if makes and id(module) not in inside:
            makers.add(id(module))
    return "" if len(makers) == 1 else "its map is joined with others, whose channels stay"


def macs_of_channels(model: nn.Module, dead: Mapping[str, tuple[int, Place]], example: Tensor) -> dict[str, int]:
    """Return the MACs of one image with which the convolution before a block makes some channels of its map.

    Args:
        model: the network.
        dead: path of a block → the number of channels, and where its factors would go.
        example: an input, (N, C, H, W).
    """
    areas: dict[str, int] = {}

    def seen(path: str) -> Any:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            areas[path] = out.shape[2] * out.shape[3]

        return hook

    convolutions = {one: module for one, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [module.register_forward_hook(seen(path)) for path, module in convolutions.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, (number, place) in dead.items():
        name = place.maker.rpartition(".")[0]
        if name in areas:
            found[path] = number * convolutions[name].weight[0].numel() * areas[name]
    return found
