"""Configuration of attention blocks, read from TOML and from `--se`; starts without torch."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import msgspec

from selab.errors import SpecError, nearest
from selab.records.bounds import MOST_STAGE
from selab.records.toml import convert
from selab.records.types import Frozen

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max", "none"]
Gate = Literal["sigmoid", "tanh", "relu", "hardsigmoid"]
Activation = Literal["relu", "silu"]
SqueezeFrom = Literal["site", "block_input"]
Init = Literal["he", "identity"]
Argument = bool | int | float | str

# Installed packages offer blocks under this group of entry points: `NAME = "package.module:Block"`.
ENTRY_POINTS = "selab.blocks"
_TARGET = re.compile(r"(?:.+\.py|[A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_][\w.]*")


class SiteConfig(Frozen, frozen=True, kw_only=True, tag_field="block"):
    """Where attention blocks go and how they start; the configuration of every kind of block begins with it.

    Attributes:
        sites: a site group that the network declares, module-path patterns (`*` within a name, `**` across names), or
            `auto` for the block ends found by tracing.
        placement: the tensor of a residual block that is gated.
        stages: keep only sites below these modules, 2 for `stage2`; empty keeps all.
        init: `he`, or `identity` for blocks that return their input unchanged at first.
        min_channels: leave out sites with fewer channels.
    """

    sites: str | tuple[str, ...]
    placement: Placement = "standard"
    stages: tuple[int, ...] = ()
    init: Init = "he"
    min_channels: int = 1


class SEConfig(SiteConfig, frozen=True, kw_only=True, tag="se"):
    """Squeeze-and-Excitation.

    Attributes:
        bias: whether the two fully connected layers have biases. Every variant states it, because codebases differ.
        squeeze_from: the channels that `reduction` divides, those at the site or those of the block's input.
        divisor: the squeeze width is rounded to a multiple of it.
        latent_channels: the squeeze width, or below 1 the fraction of the channels; instead of `reduction`.
        squeeze: mean or maximum over the feature map, or `none` for one gate per position (arXiv 1709.01507, Table 16).
        activation: between the two layers.
    """

    bias: bool
    reduction: int = 16
    squeeze_from: SqueezeFrom = "site"
    divisor: int = 1
    squeeze: Squeeze = "avg"
    gate: Gate = "sigmoid"
    activation: Activation = "relu"
    latent_channels: int | float | None = None


class ECAConfig(SiteConfig, frozen=True, kw_only=True, tag="eca"):
    """Efficient Channel Attention; `kernel_size` None is the paper's adaptive size."""

    kernel_size: int | None = None


class CBAMConfig(SiteConfig, frozen=True, kw_only=True, tag="cbam"):
    """Convolutional Block Attention Module: a channel gate, then a spatial gate of `kernel_size`."""

    reduction: int = 16
    kernel_size: int = 7


class CoordinateConfig(SiteConfig, frozen=True, kw_only=True, tag="coordinate"):
    """Coordinate Attention."""

    reduction: int = 32


class SCSEConfig(SiteConfig, frozen=True, kw_only=True, tag="scse"):
    """Concurrent spatial and channel SE."""

    reduction: int = 2


class SSEConfig(SiteConfig, frozen=True, kw_only=True, tag="sse"):
    """Spatial SE alone."""


class GatherExciteConfig(SiteConfig, frozen=True, kw_only=True, tag="gather_excite"):
    """Gather-Excite without parameters; `extent` 0 gathers the whole feature map."""

    extent: int = 0


class ESEConfig(SiteConfig, frozen=True, kw_only=True, tag="ese"):
    """Effective SE, with one layer."""


class GRNConfig(SiteConfig, frozen=True, kw_only=True, tag="grn"):
    """Global Response Normalisation."""


class SimAMConfig(SiteConfig, frozen=True, kw_only=True, tag="simam"):
    """SimAM, without parameters; `e_lambda` is added to the variance."""

    e_lambda: float = 1e-4


class GlobalContextConfig(SiteConfig, frozen=True, kw_only=True, tag="global_context"):
    """Global Context."""

    reduction: int = 16


class TripletConfig(SiteConfig, frozen=True, kw_only=True, tag="triplet"):
    """Triplet Attention."""

    kernel_size: int = 7


class ELAConfig(SiteConfig, frozen=True, kw_only=True, tag="ela"):
    """Efficient Local Attention."""

    kernel_size: int = 7


class SelectiveKernelConfig(SiteConfig, frozen=True, kw_only=True, tag="sk"):
    """Selective Kernel: `branches` of grouped convolutions, weighted per channel."""

    branches: int = 2
    groups: int = 32
    reduction: int = 16


class GEThetaConfig(SiteConfig, frozen=True, kw_only=True, tag="ge_theta"):
    """Gather-Excite with convolutions as its gather; `extent` is a power of two."""

    extent: int = 8


class GEThetaPlusConfig(SiteConfig, frozen=True, kw_only=True, tag="ge_theta_plus"):
    """Gather-Excite with convolutions as its gather and the two layers of SE."""

    extent: int = 8
    reduction: int = 16


class ExternalConfig(SiteConfig, frozen=True, kw_only=True, tag="external"):
    """A block from a Python file or module, which is imported when the block is built and not before.

    Attributes:
        target: `path/to/file.py:Class` or `package.module:Class`.
        arguments: keyword arguments of the class.
    """

    target: str
    arguments: dict[str, Argument] = msgspec.field(default_factory=dict)


BLOCKS: dict[str, type[SiteConfig]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        SEConfig,
        ECAConfig,
        CBAMConfig,
        CoordinateConfig,
        SCSEConfig,
        SSEConfig,
        GatherExciteConfig,
        ESEConfig,
        GRNConfig,
        SimAMConfig,
        GlobalContextConfig,
        TripletConfig,
        ELAConfig,
        SelectiveKernelConfig,
        GEThetaConfig,
        GEThetaPlusConfig,
    )
}
"""Name of a block → type of its configuration; `selab.attention.register_block` adds to it."""
BUILT_IN = frozenset(BLOCKS)
# What papers call blocks whose names here are longer.
_PAPERS_NAMES = {
    "ca": ("coordinate",),
    "gc": ("global_context",),
    "ge": ("gather_excite", "ge_theta", "ge_theta_plus"),
    "sknet": ("sk",),
}

_SHARED_KEYS = SiteConfig.__struct_fields__


def block_name(config: SiteConfig) -> str:
    """Return the block's name as `--se block=NAME` takes it."""
    return config.target if isinstance(config, ExternalConfig) else str(config.__struct_config__.tag)


def block_keys(config: SiteConfig) -> dict[str, Any]:
    """Return the keys of the block itself, without where it goes."""
    if isinstance(config, ExternalConfig):
        return dict(config.arguments)
    return {name: getattr(config, name) for name in config.__struct_fields__ if name not in _SHARED_KEYS}


def as_keys(config: SiteConfig) -> dict[str, Any]:
    """Return a configuration as plain values, as `block_config` takes them."""
    keys: dict[str, Any] = msgspec.to_builtins(config)
    if isinstance(config, SEConfig):
        del keys["latent_channels" if config.latent_channels is None else "reduction"]
    if isinstance(config, ExternalConfig):
        keys |= {"block": keys.pop("target"), **keys.pop("arguments")}
    return keys


def merged_keys(keys: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, Any]:
    """Return keys with changes; a squeeze width that is given in another way replaces the one that was there."""
    other = {"reduction": "latent_channels", "latent_channels": "reduction"}
    replaced = {other[key] for key, value in changes.items() if key in other and value is not None}
    return {**{key: value for key, value in keys.items() if key not in replaced}, **changes}


def block_config(*, origin: str = "SE", **keys: object) -> SiteConfig:
    """Return the configuration of an attention block from keyword arguments, as strictly as from a TOML.

    Args:
        origin: where the keys were given, for messages.
        keys: those of the block's configuration; `block` names its kind, by default `se`.

    Raises:
        SpecError: an unknown block or key, a wrong type, or a value that is not allowed; the message names the key.
    """
    return read_block(keys, place=f"{origin}:")


def read_block(keys: dict[str, Any], *, place: str) -> SiteConfig:
    """Return the configuration that a TOML's `se` table describes.

    Args:
        keys: the table; `block` names the kind, by default `se`.
        place: file and table, for messages.

    Raises:
        SpecError: as `block_config`.
    """
    name = keys.get("block", "se")
    if name == "external":
        return convert(keys, ExternalConfig, place=place)
    kind, target = _kind_of(name) if isinstance(name, str) else (None, "")
    if kind is None:
        raise SpecError(
            f"{_at(place, 'block')}: no such block {name!r}{_suggested(name)}; or a class of your own, "
            "path/to/file.py:Class, package.module:Class"
        )
    if kind is ExternalConfig:
        own = {key: value for key, value in keys.items() if key not in (*_SHARED_KEYS, "block")}
        keys = {key: value for key, value in keys.items() if key in _SHARED_KEYS}
        _check_arguments(own, place=place)
        keys |= {"target": target, "arguments": own, "block": "external"}
    else:
        keys = {**keys, "block": name}
    if kind is SEConfig and keys.get("latent_channels") is not None and "reduction" in keys:
        raise SpecError(
            f"{_at(place, 'latent_channels')}: sets the squeeze width as reduction does; give one of the two"
        )
    config = convert(keys, kind, place=place)
    _check_sizes(config, place=place)
    return config


def _kind_of(name: str) -> tuple[type[SiteConfig] | None, str]:
    """Return the configuration type of a block, and the class to import where it is not known yet."""
    if name in BLOCKS:
        return BLOCKS[name], ""
    if _TARGET.fullmatch(name):
        return ExternalConfig, name
    # Loading it takes a while, and known names do not need it.
    from importlib.metadata import entry_points

    offered = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return (ExternalConfig, offered[name]) if name in offered else (None, "")


def _suggested(name: object) -> str:
    """Return the end of a message about an unknown block: the names that are near, or all."""
    meant = _PAPERS_NAMES.get(str(name).lower())
    if meant is not None:
        return f"; did you mean {', '.join(meant)}?"
    return nearest(str(name), BLOCKS, shown=len(BLOCKS))


def _check_arguments(arguments: dict[str, Any], *, place: str) -> None:
    for key, value in arguments.items():
        if not isinstance(value, Argument):
            raise SpecError(f"{_at(place, key)}: expected a number, a boolean or text, got {type(value).__name__}")


def _at(place: str, key: str) -> str:
    return f"{place}{' ' if place.endswith(':') else '.'}{key}"


def _check_sizes(config: SiteConfig, *, place: str) -> None:
    for name in ("reduction", "divisor", "kernel_size", "groups", "min_channels"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            check_positive((value,), place=_at(place, name))
    latent = getattr(config, "latent_channels", None)
    if latent is not None and not is_latent(latent):
        raise SpecError(f"{_at(place, 'latent_channels')}: {latent}; must be above 0: {LATENT}")
    if config.stages:
        check_positive(config.stages, place=_at(place, "stages"))


LATENT = "a whole number as the width, or below 1 a fraction of the channels"


def is_latent(value: object) -> bool:
    """Return whether a value is allowed for `latent_channels`; 2.0 is a whole number, `True` is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number = float(value)
    return 0 < number < 1 or (1 <= number < math.inf and number == int(number))


def check_positive(values: tuple[int, ...], *, place: str) -> None:
    """Raise SpecError if a value is below 1."""
    if min(values) < 1:
        raise SpecError(f"{place}: {values[0] if len(values) == 1 else list(values)}; must be at least 1")


def changed(start: SiteConfig | None, text: str, *, option: str = "--se") -> SiteConfig:
    """Return the configuration that one line describes: `reduction=8,stages=2-4,placement=pre`.

    The grammar is KEY=VALUE, separated by commas, with the keys of a TOML's `se` table. Booleans are `yes` or `no`.
    Several stages are a range or a sum (`2-4`, `2+4`), several sites a sum (`layer1.*.bn3+layer2.*.bn3`).
    `block=NAME` chooses the kind of block; `block=path/to/file.py:Class` and `block=package.module:Class` take a class
    of your own, with its keyword arguments as keys.

    Args:
        start: the configuration to change; None starts from the defaults (and `bias=yes`, as the SE authors' models).
            If `block` names another kind, only sites, placement, stages and init are kept.
        text: the line.
        option: where it was given, for messages.

    Raises:
        SpecError: the text does not follow the grammar (the message names the character), or as `block_config`.
    """
    where = f"{option} {text}"
    given = _parsed(text, where)
    name = given.pop("block", None if start is None else block_name(start)) or "se"
    kind, _ = _kind_of(name)
    if kind is None:
        raise SpecError(
            f"{where}: block {name!r}: no such block{_suggested(name)}; or a class of your own, "
            "block=path/to/file.py:Class"
        )
    fields = {
        field.name: field.type for field in msgspec.structs.fields(SiteConfig if kind is ExternalConfig else kind)
    }
    keys: dict[str, Any] = {} if start is None else as_keys(start)
    if start is None or block_name(start) != name:
        keys = {key: value for key, value in keys.items() if key in _SHARED_KEYS}
    keys.pop("block", None)
    if kind is SEConfig:
        keys.setdefault("bias", True)
    changes: dict[str, object] = {}
    for key, value in given.items():
        if key not in fields and kind is not ExternalConfig:
            close = nearest(key, fields)
            meant = close if close.startswith("; did") else ""
            allowed = ", ".join(("block", *fields))
            raise SpecError(f"{where}: {key}: unknown key{meant}; allowed for {name}: {allowed}")
        changes[key] = _value(key, value, fields.get(key, Argument), where=f"{where}: {key}")
    keys = merged_keys(keys, changes)
    if "sites" not in keys:
        raise SpecError(f"{where}: sites: missing; name a site group or a pattern, or give --insert")
    return block_config(origin=where, block=name, **keys)


def _parsed(text: str, option: str) -> dict[str, str]:
    given: dict[str, str] = {}
    position = 1
    for part in text.split(","):
        key, equals, value = (side.strip() for side in part.partition("="))
        where = f"{option}: character {position}"
        if not re.fullmatch(r"\w+", key) or not equals or not value:
            raise SpecError(f"{where}: expected KEY=VALUE, found {part!r}; for example reduction=8,stages=2-4")
        if key in given:
            raise SpecError(f"{where}: {key} is given twice")
        given[key] = value
        position += len(part) + 1
    return given


def _value(key: str, text: str, kind: object, *, where: str) -> object:
    if key == "sites":
        return text.split("+") if "+" in text else text
    if key == "stages":
        found = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.split("+")]
        if not all(found):
            raise SpecError(f"{where}: {text!r} names no stages; write 3, 2-4 or 2+4")
        if any(len(number) > _DIGITS or int(number) > MOST_STAGE for number in re.findall(r"\d+", text)):
            raise SpecError(f"{where}: {text[:_SHOWN]!r} has a stage beyond {MOST_STAGE}; networks have a few")
        ranges = [range(int(one[1]), int(one[2] or one[1]) + 1) for one in found if one is not None]
        if not all(ranges):
            raise SpecError(f"{where}: {text!r} ends before it begins; write 2-4")
        return sorted({stage for one in ranges for stage in one})
    if kind is bool:
        if text not in _YES_NO:
            raise SpecError(f"{where}: {text!r}; allowed: {', '.join(_YES_NO)}")
        return _YES_NO[text]
    if kind == Argument and text in _YES_NO:
        return _YES_NO[text]
    if re.fullmatch(r"-?\d+", text):
        if len(text) > _DIGITS:
            raise SpecError(f"{where}: a number of {len(text)} digits; at most {_DIGITS}")
        return int(text)
    if kind in (int, int | None):
        raise SpecError(f"{where}: {text!r} is not a whole number")
    decimals = (float, float | None, int | float | None, Argument)
    if kind in decimals and re.fullmatch(r"-?(\d+\.\d*|\.?\d+)(e-?\d+)?", text):
        if not math.isfinite(float(text)):
            raise SpecError(f"{where}: {text[:_SHOWN]} is not a finite number")
        return float(text)
    return text


# Numbers of so many digits fit into 64 bits; of a longer text so much is shown.
_DIGITS, _SHOWN = 18, 40
_YES_NO = {"yes": True, "no": False, "true": True, "false": False}
