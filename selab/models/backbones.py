"""Networks as backbones: their feature maps at several strides, without the classifier.

A network is cut where its modules form a chain, each reading what the one before it returned. Nothing is hooked and
nothing runs in vain: what lies behind the last wanted map is left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selab.attention.sites import declared_groups
from selab.errors import ModelError
from selab.meta import evaluating, failed_pass, make_pass
from selab.models import catalog, composed
from selab.models.build import build
from selab.models.checkpoint import load

_MAP_DIMS = 4


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One of the feature maps that a network can give.

    Attributes:
        path: of the module that returns it, the last one at this resolution.
        channels: of the map.
        stride: by how much its height and width are smaller than the image's, a power of two.
    """

    path: str
    channels: int
    stride: int


class Backbone(nn.Module):
    """A network without its classifier, which returns feature maps; made by `backbone`.

    Shapes: images (N, 3, H, W) to a list of maps (N, `channels[i]`, H / `strides[i]`, W / `strides[i]`), the largest
    first; sizes that the strides do not divide are rounded as the network's layers do.

    The parameters have the network's own keys.

    Attributes:
        feature_info: the maps that are returned.
        available: all maps that the network could give.
    """

    def __init__(
        self,
        network: nn.Module,
        steps: Sequence[str],
        features: Sequence[Feature],
        available: Sequence[Feature],
    ) -> None:
        super().__init__()
        self.feature_info, self.available = tuple(features), tuple(available)
        self._steps = tuple(steps)
        self._groups = {
            name: [path for path in paths if any(f"{path}.".startswith(f"{step}.") for step in steps)]
            for name, paths in declared_groups(network).items()
        }
        self._given = frozenset(one.path for one in features)
        self._frozen: tuple[str, ...] = ()
        self._frozen_norms = False
        for path in steps:
            _add(self, path, network.get_submodule(path))
        self.train(network.training)

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each map."""
        return tuple(one.channels for one in self.feature_info)

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each map."""
        return tuple(one.stride for one in self.feature_info)

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand, as the network does; without what was left out."""
        return {name: list(paths) for name, paths in self._groups.items()}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images (N, 3, H, W)."""
        maps = []
        for path in self._steps:
            images = self.get_submodule(path)(images)
            if path in self._given:
                maps.append(images)
        return maps

    def freeze(self, *, stages: int = 0, norms: bool = False) -> Self:
        """Keep parts of the network as they are while the rest is trained.

        Args:
            stages: everything up to this number of `available` maps needs no gradient: 2 is the stem and the first
                stage of a ResNet, as detectors are usually trained.
            norms: all BatchNorms stay in eval mode, and their scales and shifts need no gradient. For batches of a few
                images, whose statistics are too rough.

        Returns:
            This backbone.

        Raises:
            ModelError: there are fewer maps.
        """
        if not 0 <= stages <= len(self.available):
            raise ModelError(f"freeze: stages={stages}: the network has {len(self.available)}; give 0 to that many")
        # Maps and steps are in one order.
        self._frozen = self._steps[: self._steps.index(self.available[stages - 1].path) + 1] if stages else ()
        self._frozen_norms = norms
        for module in self._frozen_modules():
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Put it into train or eval mode; BatchNorms that are frozen stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules() if mode else ():
            for one in module.modules():
                if isinstance(one, _BatchNorm):
                    one.eval()
        return self

    def _frozen_modules(self) -> Iterator[nn.Module]:
        yield from (self.get_submodule(path) for path in self._frozen)
        if self._frozen_norms:
            yield from (one for one in self.modules() if isinstance(one, _BatchNorm))


def backbone(
    network: nn.Module | str,
    out_indices: Sequence[int] | None = None,
    *,
    input_nchw: Sequence[int] | None = None,
    output_stride: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> Backbone:
    """Return a network as a backbone of detectors and segmenters, SE blocks included.

    A map is the output of the last module at its resolution before the classifier, as in timm's `features_only`. The
    maps are numbered from 0, the largest, which has stride 2 in most networks for ImageNet. FPNs read 1 to 4.

    Args:
        network: a name, as in `selab.build`, or a module, whose parts the backbone then shares.
        out_indices: the maps that are wanted, in rising order; None for all.
        input_nchw: an input that the network takes; needed for a module.
        output_stride: the largest stride. Later convolutions step by one pixel instead of two, and those behind them
            are dilated as much, as in DeepLab (Chen et al., arXiv 1706.05587).
        weights: a file of the network's weights, as `selab weights` writes them; a classifier of another number of
            classes is left out.
        seed: of random weights, for a name.

    Raises:
        ModelError: the network's modules are no chain up to such a map; it has no such map (the message lists what it
            has); a module that is not a convolution or a pooling would have to be dilated.
        UnknownNameError, SpecError: as `selab.build`.
        WeightsError: the weights do not fit.

    Examples:
        >>> import torch
        >>> from selab.models import backbone
        >>> trunk = backbone("se_resnet18", (1, 2, 3, 4))
        >>> trunk.channels, trunk.strides
        ((64, 128, 256, 512), (4, 8, 16, 32))
        >>> [tuple(one.shape) for one in trunk(torch.zeros(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """
    if isinstance(network, str):
        variant = catalog.find(network, option="backbone")
        if composed.is_one(variant):
            trunk = variant.arguments["trunk"]
            raise ModelError(f"{network}: is built on a backbone itself; take that of its network, {trunk}")
        model = build(variant, seed=seed).model
        if weights is not None:
            load(model, Path(weights), variant=variant, head="drop")
        input_nchw = input_nchw or (1, *variant.input_chw)
    else:
        model = network
        if input_nchw is None:
            raise ModelError("backbone: a module needs `input_nchw`, the shape (N, C, H, W) of an input that it takes")
        if weights is not None:
            load(model, Path(weights), head="drop")
    name = network if isinstance(network, str) else type(network).__name__
    steps, every, end = _cut(model, tuple(input_nchw), name)
    chosen = _chosen(every, out_indices, name, end)
    steps = steps[: steps.index(chosen[-1].path) + 1]
    made = Backbone(model, steps, chosen, [one for one in every if one.path in steps])
    return made if output_stride is None else _dilated(made, output_stride, tuple(input_nchw), name)


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    *above, name = path.split(".")
    for part in above:
        if part not in root._modules:
            root.add_module(part, nn.Sequential())
        root = root.get_submodule(part)
    root.add_module(name, module)


def _chosen(every: Sequence[Feature], wanted: Sequence[int] | None, name: str, end: str) -> list[Feature]:
    has = ", ".join(f"{i} (stride {one.stride}, {one.channels} channels)" for i, one in enumerate(every)) + end
    if wanted is None:
        return list(every)
    if isinstance(wanted, int | str):
        raise ModelError(f"{name}: out_indices {wanted!r}: give a list of numbers; it has {has}")
    if not len(wanted):
        raise ModelError(f"{name}: out_indices: name at least one feature map; it has {has}")
    for index in wanted:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(every):
            raise ModelError(f"{name}: has no feature map {index!r}; it has {has}")
    if list(wanted) != sorted(set(wanted)):
        raise ModelError(f"{name}: out_indices {list(wanted)}: name feature maps in rising order; it has {has}")
    return [every[index] for index in wanted]


# --------------------------------------------------------------------------------------------------------- the chain
@dataclass(frozen=True, kw_only=True)
class _Call:
    """A module's only call in a pass: what tells its input and its output from other values, and their shapes."""

    path: str
    given: object
    made: object
    given_shape: tuple[int, ...]
    made_shape: tuple[int, ...]


def _cut(model: nn.Module, input_nchw: tuple[int, ...], name: str) -> tuple[list[str], list[Feature], str]:
    """Return the modules from the image to the last feature map, in order, the maps that they give, and why they end.

    The third is empty if they end before a classifier, or with the network.

    Raises:
        ModelError: the network fails, or its modules are no chain up to any map.
    """
    calls = _calls(model, input_nchw)
    root = calls.get("")
    if root is None or len(root.given_shape) != _MAP_DIMS:
        raise ModelError(f"{name}: takes no image (N, C, H, W) as its only input, so that it has no feature maps")
    every = _prefix("", model, calls)
    chain = list(_before_classifier(every, model, calls))
    whole = len(chain) < len(every) or (bool(every) and calls[every[-1]].made == root.made)
    end = "" if whole or not chain else f"; behind {chain[-1]} its modules do not form a chain"
    steps = [step for path in chain for step in _expanded(path, model, calls)]
    size = root.given_shape[2:]
    features: list[Feature] = []
    for path in steps:
        shape = calls[path].made_shape
        stride = _stride(size, shape[2:])
        if features and features[-1].stride == stride:
            features.pop()
        if features and stride < features[-1].stride:
            break
        features.append(Feature(path=path, channels=shape[1], stride=stride))
    if not features:
        raise ModelError(
            f"{name}: its modules do not form a chain, each reading what the one before it returned; give a network "
            "whose forward calls its stages one after the other"
        )
    return steps, features, end


def _calls(model: nn.Module, input_nchw: tuple[int, ...]) -> dict[str, _Call]:
    """Run the network once; return the call of each module that ran once, on one tensor, and returned one."""
    fakes = make_pass(model, input_nchw)
    begun: dict[str, tuple[Tensor, int, tuple[int, ...]]] = {}
    calls: dict[str, _Call] = {}
    odd: set[str] = set()
    alive: list[Tensor] = []

    def begin(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in begun or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                odd.add(path)
                return
            begun[path] = (args[0], args[0]._version, tuple(args[0].shape))

        return hook

    def end(path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if path in odd or not isinstance(output, Tensor):
                odd.add(path)
                return
            given, version, shape = begun[path]
            # While a tensor lives, no other has its id; one that was changed in place is another value.
            alive.extend((given, output))
            calls[path] = _Call(
                path=path,
                given=(id(given), version),
                made=(id(output), output._version),
                given_shape=shape,
                made_shape=tuple(output.shape),
            )

        return hook

    for path, module in fakes.model.named_modules():
        module.register_forward_pre_hook(begin(path), with_kwargs=True)
        module.register_forward_hook(end(path))
    try:
        with evaluating(fakes.model), torch.no_grad(), fakes.running():
            fakes()
    except Exception as error:
        raise failed_pass(fakes, model, error) from error
    return {path: call for path, call in calls.items() if path not in odd}


def _prefix(path: str, model: nn.Module, calls: dict[str, _Call]) -> list[str]:
    """Return the children that a module runs one after the other, from its input on, up to the first that does not."""
    names = [f"{path}.{name}" if path else name for name, _ in model.get_submodule(path).named_children()]
    waiting = [calls[name] for name in names if name in calls]
    value, chain = calls[path].given, []
    while (found := next((one for one in waiting if one.given == value), None)) is not None:
        waiting.remove(found)
        chain.append(found.path)
        value = found.made
    return chain


def _before_classifier(chain: Sequence[str], model: nn.Module, calls: dict[str, _Call]) -> Iterator[str]:
    """Yield the modules of a chain before the one in which the map becomes a vector or a single pixel.

    If that is the first, its own children are looked at.
    """
    for number, path in enumerate(chain):
        shape = calls[path].made_shape
        if len(shape) == _MAP_DIMS and shape[2:] != (1, 1):
            yield path
            continue
        if not number:
            yield from _before_classifier(_prefix(path, model, calls), model, calls)
        return


def _expanded(path: str, model: nn.Module, calls: dict[str, _Call]) -> list[str]:
    """Return a module, or the modules that it runs one after the other, if a map ends between them."""
    call = calls[path]
    # A block whose layers happen to form a chain stays whole: inside it, the map is wider than the network's.
    inner = _prefix(path, model, calls) if isinstance(model.get_submodule(path), nn.Sequential) else []
    if call.given_shape == call.made_shape or not inner or calls[inner[-1]].made != call.made:
        return [path]
    steps = [step for one in inner for step in _expanded(one, model, calls)]
    whole = {_stride(calls[step].made_shape[2:], call.made_shape[2:]) for step in steps} == {1}
    return [path] if whole else steps


def _stride(larger: tuple[int, ...], smaller: tuple[int, ...]) -> int:
    return 1 << max(0, round(math.log2(larger[0] / smaller[0])))


# ------------------------------------------------------------------------------------------------------------- dilation
def _dilated(trunk: Backbone, output_stride: int, input_nchw: tuple[int, ...], name: str) -> Backbone:
    """Replace the steps of two pixels beyond a stride by dilation.

    A convolution that reads a map of stride s is dilated by s / output_stride, so that it sees the same pixels of the
    image as before.
    """
    strides = [one.stride for one in trunk.available]
    if output_stride not in strides:
        raise ModelError(f"{name}: output_stride {output_stride}: its maps have strides {', '.join(map(str, strides))}")
    undo: list[tuple[nn.Module, str, Any]] = []
    size = input_nchw[2:]
    for path, call in _calls(trunk, input_nchw).items():
        module = trunk.get_submodule(path)
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and call.given_shape[2:] != (1, 1):
            reads, makes = (_stride(size, shape[2:]) for shape in (call.given_shape, call.made_shape))
            changed = _with_dilation(module, reads // output_stride or 1) if makes > output_stride else {}
            undo.extend((module, key, getattr(module, key)) for key in changed)
            for key, value in changed.items():
                setattr(module, key, value)
    try:
        made = _calls(trunk, input_nchw)
        fits = all(
            _stride(size, made[one.path].made_shape[2:]) == min(one.stride, output_stride) for one in trunk.available
        )
    except ModelError:
        fits = False
    if not fits:
        for module, key, value in reversed(undo):
            setattr(module, key, value)
        raise ModelError(
            f"{name}: output_stride {output_stride}: something other than convolutions, and poolings of odd size, "
            "makes its maps smaller there; leave it out"
        )
    for key in ("feature_info", "available"):
        mapped = tuple(replace(one, stride=min(one.stride, output_stride)) for one in getattr(trunk, key))
        setattr(trunk, key, mapped)
    return trunk


def _with_dilation(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, dilation: int) -> dict[str, Any]:
    """Return the attributes of a convolution or pooling that steps by one pixel, on a map that is so much larger."""
    changed: dict[str, Any] = {"stride": (1, 1)}
    if isinstance(module, nn.Conv2d):
        changed["dilation"] = tuple(dilation * one for one in module.dilation)
        if not isinstance(module.padding, str):
            changed["padding"] = tuple(dilation * one for one in module.padding)
            changed["_reversed_padding_repeated_twice"] = [
                dilation * one for one in module._reversed_padding_repeated_twice
            ]
    return changed
