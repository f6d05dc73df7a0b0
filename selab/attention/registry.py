"""Attention blocks by name: those of selab, those that were registered, and classes from files."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from selab.attention.base import Attention
from selab.attention.blocks import CBAM, ECA, ESE, SCSE, SSE, CoordinateAttention, GatherExcite
from selab.attention.config import (
    BLOCKS,
    BUILT_IN,
    ExternalConfig,
    SEConfig,
    SiteConfig,
    block_keys,
    block_name,
)
from selab.attention.ela import ELA
from selab.attention.gather_excite import GETheta, GEThetaPlus
from selab.attention.global_context import GlobalContext
from selab.attention.grn import GRN
from selab.attention.se import SqueezeExcitation
from selab.attention.selective_kernel import SelectiveKernel
from selab.attention.simam import SimAM
from selab.attention.triplet import TripletAttention
from selab.attention.user_code import imported
from selab.errors import InsertionError, SpecError

_CLASSES: dict[str, type[Attention]] = {
    "se": SqueezeExcitation,
    "eca": ECA,
    "cbam": CBAM,
    "coordinate": CoordinateAttention,
    "scse": SCSE,
    "sse": SSE,
    "gather_excite": GatherExcite,
    "ese": ESE,
    "grn": GRN,
    "simam": SimAM,
    "global_context": GlobalContext,
    "triplet": TripletAttention,
    "ela": ELA,
    "sk": SelectiveKernel,
    "ge_theta": GETheta,
    "ge_theta_plus": GEThetaPlus,
}
_NOT_KEYS = ("channels", "init")


def register_block(name: str, block: type[Attention], *, replace: bool = False) -> None:
    """Make an attention block known by a name: to `insert_se(block=NAME)`, to `--se block=NAME` and to a family's TOML.

    The keyword arguments of the class become the keys of its configuration, with their types and defaults. A package
    makes its blocks known to the command line by an entry point in the group `selab.blocks` instead, which needs no
    call of this function.

    Args:
        name: lower-case letters, digits and `_`.
        block: a subclass of `Attention`. Its first parameter is the number of channels; `init` is optional; all others
            need defaults or are keys that the user must give.
        replace: whether a block that was registered before may be replaced. The blocks of selab stay.

    Raises:
        SpecError: the name is taken or malformed, or the class is not usable; one line says why.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> from selab.attention import Attention, register_block
        >>> class Constant(Attention):
        ...     '''factor * x.'''
        ...     def __init__(self, channels, *, factor=1.0):
        ...         super().__init__(channels)
        ...         self.factor = factor
        ...     def forward(self, x):
        ...         return self.factor * x
        ...     def macs(self, height, width):
        ...         return self.channels * height * width
        >>> register_block("constant", Constant, replace=True)
        >>> selab.insert_se(nn.Sequential(nn.Conv2d(3, 8, 3)), "0", block="constant", input_nchw=(1, 3, 8, 8))[0].block
        'constant'
    """
    place = f"register_block {name!r}"
    if not name.replace("_", "a").isalnum() or name != name.lower() or not name.isascii():
        raise SpecError(f"{place}: a name is lower-case letters, digits and _")
    if name in BUILT_IN or name == "external":
        raise SpecError(f"{place}: is a block of selab; choose another name")
    if name in BLOCKS and not replace:
        known = _CLASSES[name]
        raise SpecError(f"{place}: is taken by {known.__module__}.{known.__qualname__}; give replace=True")
    parameters = _parameters(block, place=place)
    BLOCKS[name] = _config_type(name, block, parameters)
    _CLASSES[name] = block


def _parameters(block: Any, *, place: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of an attention class by name, `self` left out.

    Raises:
        SpecError: not a subclass of Attention, abstract, or a constructor that does not begin with the channels.
    """
    if not (isinstance(block, type) and issubclass(block, Attention)):
        raise SpecError(f"{place}: expected a subclass of selab.attention.Attention, got {_named(block)}")
    if block.__abstractmethods__:
        missing = ", ".join(sorted(block.__abstractmethods__))
        raise SpecError(f"{place}: {block.__name__} does not define {missing}")
    parameters = dict(list(inspect.signature(block).parameters.items()))
    first = next(iter(parameters.values()), None)
    if first is None or first.name != "channels" or first.kind is first.KEYWORD_ONLY:
        raise SpecError(f"{place}: the first parameter of {block.__name__} must be `channels`")
    return parameters


def _named(value: object) -> str:
    return value.__name__ if isinstance(value, type) else f"a value of type {type(value).__name__}"


def _config_type(name: str, block: type[Attention], parameters: dict[str, inspect.Parameter]) -> type[SiteConfig]:
    fields: list[Any] = []
    for key, one in _keys(parameters).items():
        if key in SiteConfig.__struct_fields__ or key == "block":
            raise SpecError(f"register_block {name!r}: parameter {key!r} is a key of every block; rename it")
        kind = _type_of(block, one)
        fields.append((key, kind) if one.default is one.empty else (key, kind, one.default))
    made: Any = msgspec.defstruct(
        f"{block.__name__}Config",
        fields,
        bases=(SiteConfig,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
        tag_field="block",
        tag=name,
    )
    config: type[SiteConfig] = made
    return config


def _keys(parameters: dict[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """Return the parameters that a configuration sets."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: one for key, one in parameters.items() if key not in _NOT_KEYS and one.kind in named}


def _type_of(block: type[Attention], parameter: inspect.Parameter) -> Any:
    """Return a parameter's annotation, or the type of its default where there is none."""
    try:
        hints = typing.get_type_hints(block.__init__)
    except NameError:
        hints = {}
    if parameter.name in hints:
        return hints[parameter.name]
    default = parameter.default
    return type(default) if isinstance(default, bool | int | float | str) else Any


def make_block(config: SiteConfig, channels: int, squeeze_channels: int | None = None) -> Attention:
    """Build the block that a configuration describes.

    Args:
        config: of a block of selab, a registered one, or an external class.
        channels: C of the feature map (N, C, H, W).
        squeeze_channels: the squeeze width of SE where it does not follow from `channels`.

    Raises:
        InsertionError: the block refuses these channels or keys.
        SpecError: an external class cannot be imported, or fails.
    """
    keys = block_keys(config)
    if isinstance(config, SEConfig):
        for name in ("reduction", "latent_channels", "squeeze_from", "divisor"):
            del keys[name]
        return SqueezeExcitation(channels, **keys, squeeze_channels=squeeze_channels, init=config.init)
    if isinstance(config, ExternalConfig):
        with imported(config.target) as found:
            _check_keys(_parameters(found, place=config.target), keys, place=config.target)
            return _called(found, channels, keys, config)  # type: ignore[arg-type]
    return _called(_CLASSES[block_name(config)], channels, keys, config)


def _called(block: Callable[..., Attention], channels: int, keys: dict[str, Any], config: SiteConfig) -> Attention:
    if "init" in inspect.signature(block).parameters:
        return block(channels, **keys, init=config.init)
    if config.init != "he":
        raise InsertionError(f"init {config.init!r}: {block_name(config)} has no parameter `init`")
    return block(channels, **keys)


def _check_keys(parameters: dict[str, inspect.Parameter], keys: dict[str, Any], *, place: str) -> None:
    known = _keys(parameters)
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for key in keys:
        if key not in known and not open_ended:
            raise SpecError(f"{place}: {key}: unknown key; allowed: {', '.join(known) or 'none'}")
    missing = [key for key, one in known.items() if one.default is one.empty and key not in keys]
    if missing:
        raise SpecError(f"{place}: {missing[0]}: missing; give {missing[0]}=VALUE")
