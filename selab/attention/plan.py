"""Plan an insertion: the tensor of each site, its channels, and the block that fits it; nothing is changed."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selab import units
from selab.attention.auto_sites import usable_ends
from selab.attention.base import Attention
from selab.attention.channel_dim import ChannelDims
from selab.attention.config import SEConfig, SiteConfig, block_name
from selab.attention.gated_site import GatedSite, named_sites, sites_own
from selab.attention.given import check_network
from selab.attention.registry import make_block
from selab.attention.se import GatedJoin, latent_width, squeeze_width
from selab.attention.sites import (
    Tap,
    check_unshared,
    declared_groups,
    find_sites,
    in_stages,
    is_residual_block,
    matches,
    tap_for,
)
from selab.errors import InsertionError, ModelError
from selab.meta import Example, On, Passage, passages
from selab.meta.modes import made_on
from selab.records.types import Insertion

AUTO = "auto"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A block to insert.

    Attributes:
        dtype: of the gated tensor.
        one_tensor: whether the site is called with one tensor by position.
        channels_last: whether the gated tensor is (N, H, W, C).
    """

    tap: Tap
    insertion: Insertion
    dtype: torch.dtype | None
    one_tensor: bool
    channels_last: bool


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The blocks to insert, the sites that were left out and why, and all modules' passages without the blocks."""

    plans: tuple[Plan, ...]
    skipped: tuple[str, ...]
    seen: Mapping[str, Passage]


def plan_insertion(model: nn.Module, config: SiteConfig, example: Example, *, on: On = "fake") -> Plans:
    """Return the blocks that a configuration puts into a network; the arguments are those of `insert_se`.

    Raises:
        InsertionError: as `insert_se`.
        ModelError: the forward pass fails with this input, or the network cannot be changed.
    """
    check_changeable(model, "insert_se")
    skipped: list[str] = []
    if config.sites == AUTO:
        ends = usable_ends(model, example, on=on)
        sites, alone = [end.path for end in ends.found], set()
        skipped += ends.left_out
    else:
        sites = find_sites(model, config.sites)
        alone = _named_alone(model, config.sites, sites)
    if config.stages:
        sites = in_stages(sites, config.stages)
    taps = [tap_for(model, site, config.placement) for site in sites]
    check_unshared(model, [tap.module for tap in taps])
    for tap in taps:
        _check_free(model, tap)
    seen = passages(model, [path for path, _ in named_sites(model)], example, on=on)
    planner = _Planner(model, config, ChannelDims(model, example, seen, on=on))
    plans = []
    for tap in taps:
        too_small = planner.too_small(tap, named=tap.site in alone)
        if too_small:
            skipped.append(f"{tap.site} ({too_small})")
        else:
            plans.append(planner.plan(tap))
    if not plans:
        more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        raise InsertionError(f"no site is left: {', '.join(skipped[:_SHOWN])}{more}; choose larger sites")
    return Plans(plans=tuple(plans), skipped=tuple(skipped), seen=seen)


def check_changeable(model: nn.Module, where: str) -> None:
    """Refuse networks whose modules cannot be exchanged, or are not known yet.

    Args:
        model: what was given.
        where: the function, for the message.

    Raises:
        ModelError: no module, a compiled TorchScript network, or lazy modules without parameters.
    """
    check_network(model, where)
    for path, module in model.named_modules():
        lazy: Any = module
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and lazy.has_uninitialized_params():
            raise ModelError(
                f"{path or type(model).__name__}: a lazy {type(module).__name__} that has no parameters yet; run the "
                "network once on an example before"
            )


def _named_alone(model: nn.Module, given: str | Sequence[str], sites: Sequence[str]) -> set[str]:
    """Return the sites that a pattern of their own names."""
    if isinstance(given, str) and given in declared_groups(model):
        return set()
    found = [[site for site in sites if matches(one, site)] for one in ([given] if isinstance(given, str) else given)]
    return {one[0] for one in found if len(one) == 1}


def _check_free(model: nn.Module, tap: Tap) -> None:
    holder = model.get_submodule(f"{tap.site}.join" if tap.edge else tap.module)
    own = [child for child in holder.children() if isinstance(child, Attention) and child.inserted]
    if isinstance(holder, GatedJoin | GatedSite) or own:
        raise InsertionError(f"{tap.site}: already holds an SE block; remove it first")
    parent = model.get_submodule(tap.module.rpartition(".")[0])
    if isinstance(parent, torch.jit.ScriptModule):
        raise ModelError(f"{tap.module}: is inside a TorchScript module, whose children cannot be exchanged")


class _Planner:
    """Fit blocks to the tensors of sites."""

    def __init__(self, model: nn.Module, config: SiteConfig, channel_dims: ChannelDims) -> None:
        self.model = model
        self.config = config
        self.channel_dims = channel_dims
        self.seen = channel_dims.seen

    def too_small(self, tap: Tap, *, named: bool) -> str:
        """Return why a site is left out: too few channels, for `min_channels`, or for a reduction; else nothing.

        Args:
            tap: at the site.
            named: whether the user named this site alone, so that a reduction that does not fit is an error.
        """
        channels, _, _ = self.sizes(tap)
        if channels < self.config.min_channels:
            return f"{units.counted(channels, 'channel')}, fewer than min_channels {self.config.min_channels}"
        if named:
            return ""
        reduction, latent = getattr(self.config, "reduction", None), getattr(self.config, "latent_channels", None)
        divided = self._divided(tap, channels)
        if latent is not None:
            return (
                f"{units.counted(divided, 'channel')}, of which {latent} is none"
                if latent_width(divided, latent) < 1
                else ""
            )
        # The bottleneck of these has a least width.
        if self.config.__struct_config__.tag in ("coordinate", "sk") or reduction is None or reduction <= divided:
            return ""
        return f"{units.counted(divided, 'channel')}, fewer than reduction {reduction}"

    def plan(self, tap: Tap) -> Plan:
        channels, height, width = self.sizes(tap)
        passage, config = self.seen[tap.module], self.config
        try:
            squeezed = self._squeezed(self._divided(tap, channels))
            with made_on("meta"):
                block = make_block(config, channels, squeezed)
        except InsertionError as error:
            raise InsertionError(f"{tap.module}: {error}") from None
        insertion = Insertion(
            path=tap.site,
            placement=config.placement,
            channels=channels,
            squeeze_channels=block.squeeze_channels,
            params=sum(parameter.numel() for parameter in block.parameters()),
            height=height,
            width=width,
            macs=block.macs(height, width),
            block=block_name(config),
        )
        return Plan(
            tap=tap,
            insertion=insertion,
            dtype=passage.input_dtype if tap.side == "input" else passage.output_dtype,
            one_tensor=passage.input_shape is not None and _takes_one_argument(self.model.get_submodule(tap.module)),
            channels_last=self.channel_dims.of(tap.module, tap.side) == 3,
        )

    def sizes(self, tap: Tap) -> tuple[int, int, int]:
        """Return channels, height and width of the gated tensor.

        Raises:
            InsertionError: the module does not run once, or the tensor has no channels in the place of a feature map's.
        """
        passage = self.seen[tap.module]
        if passage.calls != 1:
            how = (
                "does not run (a container, or unused)"
                if passage.calls == 0
                else f"runs {passage.calls} times (a shared module)"
            )
            raise InsertionError(
                f"{tap.module}: {how} in a forward pass, so it cannot be a site; it must run exactly once"
            )
        shape = passage.input_shape if tap.side == "input" else passage.output_shape
        one_image = shape is not None and len(shape) == 3 and self.channel_dims.is_one_image(tap.module, tap.side)
        if shape is None or (len(shape) != 4 and not one_image):
            kind = passage.input_kind if tap.side == "input" else passage.output_kind
            what = kind if shape is None else f"a tensor of shape {shape}"
            needed = "SE needs (N, C, H, W), or (C, H, W) of one image"
            if shape is not None and len(shape) == 3:
                needed += ", with a height and width that follow the input's; tokens (N, L, C) have no height and width"
            raise InsertionError(f"{tap.module}: its {tap.side} is {what}; {needed}")
        dtype = passage.input_dtype if tap.side == "input" else passage.output_dtype
        if dtype is not None and not dtype.is_floating_point:
            raise InsertionError(
                f"{tap.module}: its {tap.side} is of {dtype}, and a block computes in floating point; insert the "
                "blocks before the network is quantised"
            )
        if one_image:
            return shape[0], shape[1], shape[2]
        dim = self.channel_dims.of(tap.module, tap.side)
        if dim is None:
            other = self.channel_dims.shape_of_larger(tap.module, tap.side)
            raise InsertionError(
                f"{tap.module}: its {tap.side} has the shape {shape}, and {other} with an input of twice the size, so "
                "its second dimension does not hold channels; SE needs (N, C, H, W) or (N, H, W, C)"
            )
        if dim == 1:
            return shape[1], shape[2], shape[3]
        if tap.edge or (tap.module != tap.site and is_residual_block(self.model.get_submodule(tap.site))):
            raise InsertionError(
                f"{tap.module}: its {tap.side} is (N, H, W, C), and a join gates (N, C, H, W); name a module of the "
                "branch by a pattern instead"
            )
        return shape[3], shape[1], shape[2]

    def _divided(self, tap: Tap, channels: int) -> int:
        """Return the number of channels that the reduction divides."""
        config = self.config
        if not isinstance(config, SEConfig) or config.squeeze_from == "site":
            return channels
        block_input = self.seen[tap.block].input_shape
        if block_input is not None and len(block_input) == 3 and self.channel_dims.is_one_image(tap.block, "input"):
            return block_input[0]
        if block_input is None or len(block_input) != 4:
            raise InsertionError(
                f"{tap.module}: the input of {tap.block or 'the network'} is not (N, C, H, W); use squeeze_from='site'"
            )
        return block_input[self.channel_dims.of(tap.block, "input") or 1]

    def _squeezed(self, divided: int) -> int | None:
        config = self.config
        if not isinstance(config, SEConfig):
            return None
        if config.latent_channels is not None:
            return latent_width(divided, config.latent_channels, config.divisor)
        return squeeze_width(divided, config.reduction, config.divisor)


def _takes_one_argument(module: nn.Module) -> bool:
    try:
        parameters = list(inspect.signature(sites_own(module).forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
