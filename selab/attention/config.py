"""Typed configuration of attention blocks, read from TOML and from `--se`."""

import re
from typing import Literal, get_args

import msgspec

from selab.errors import SpecError, nearest
from selab.records.toml import convert
from selab.records.types import Frozen

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max", "none"]
Gate = Literal["sigmoid", "tanh", "relu", "hardsigmoid"]
Activation = Literal["relu", "silu"]
SqueezeFrom = Literal["site", "block_input"]


class SiteConfig(Frozen, frozen=True, kw_only=True, tag_field="block"):
    """Where attention blocks stand: what the facts of every kind of block begin with.

    Attributes:
        sites: a site group that the network declares, module-path patterns (`*` within a name, `**` across names), or
            `auto` for the block ends that tracing finds.
        placement: which tensor at a residual block.
        stages: only the sites below a module of these names: `stage2` for 2; empty for all.
    """

    sites: str | tuple[str, ...]
    placement: Placement = "standard"
    stages: tuple[int, ...] = ()


class SEConfig(SiteConfig, frozen=True, kw_only=True, tag="se"):
    """How SE stands in a variant.

    Attributes:
        bias: whether the two fully connected layers have biases. Stated by every variant, for codebases differ.
        squeeze_from: the channels that `reduction` divides: those at the site, or those of the block's input.
        divisor: the squeeze width is rounded to a multiple of it.
        squeeze: mean or maximum over the map, or `none` for one gate per position (Table 16 of arXiv 1709.01507).
        activation: between the two layers.
    """

    bias: bool
    reduction: int = 16
    squeeze_from: SqueezeFrom = "site"
    divisor: int = 1
    squeeze: Squeeze = "avg"
    gate: Gate = "sigmoid"
    activation: Activation = "relu"


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
    """Gather-Excite without parameters; `extent` 0 gathers the whole map."""

    extent: int = 0


class ESEConfig(SiteConfig, frozen=True, kw_only=True, tag="ese"):
    """Effective SE, with one layer."""


BlockConfig = (
    SEConfig | ECAConfig | CBAMConfig | CoordinateConfig | SCSEConfig | SSEConfig | GatherExciteConfig | ESEConfig
)
BLOCKS: dict[str, type[SiteConfig]] = {str(kind.__struct_config__.tag): kind for kind in get_args(BlockConfig)}


def check_block(facts: SiteConfig, *, origin: str, key: str) -> None:
    """Raise SpecError for sizes below 1; types were checked on reading."""
    for name in ("reduction", "divisor", "kernel_size"):
        value = getattr(facts, name, None)
        if value is not None:
            check_positive((value,), origin=origin, key=f"{key}.{name}" if key else name)
    if facts.stages:
        check_positive(facts.stages, origin=origin, key=f"{key}.stages" if key else "stages")


def check_positive(values: tuple[int, ...], *, origin: str, key: str) -> None:
    """Raise SpecError if a value is below 1."""
    if min(values) < 1:
        raise SpecError(f"{origin}: {key}: {values[0] if len(values) == 1 else list(values)}; must be at least 1")


def block_config(*, origin: str = "SE", **keys: object) -> BlockConfig:
    """The facts of an attention block from keyword arguments, as strictly as from a TOML.

    Args:
        origin: where the keys stand, for messages.
        keys: those of the block's facts; `block` names its kind, by default `se`.

    Raises:
        SpecError: an unknown block or key, a wrong type, or a value that is not allowed; the message names the key.
    """
    block = keys.get("block", "se")
    if not isinstance(block, str) or block not in BLOCKS:
        raise SpecError(f"{origin}: block {block!r}: no such block{nearest(str(block), BLOCKS)}")
    facts = convert({**keys, "block": block}, BLOCKS[block], place=f"{origin}:")
    check_block(facts, origin=origin, key="")
    return facts  # type: ignore[return-value]


def changed(start: BlockConfig | None, text: str, *, option: str = "--se") -> BlockConfig:
    """Facts written in one line: `reduction=8,stages=2-4,placement=pre`.

    The grammar: KEY=VALUE, separated by commas; the keys are those of a TOML's `se` table. A number or a word stands as
    it is; `bias` is `yes` or `no`; several stages are a range or a sum (`2-4`, `2+4`); several sites are a sum
    (`layer1.*.bn3+layer2.*.bn3`).

    Args:
        start: the facts that are changed; None to begin with the defaults (and `bias=yes`, as the authors' released
            models). Where `block` names another kind, only sites, placement and stages are kept.
        text: the line.
        option: where it was given, for messages.

    Raises:
        SpecError: the text is not of this grammar (the message names the character), or as `block_config`.
    """
    given: dict[str, str] = {}
    position = 1
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        where = f"{option} {text}: character {position}"
        if not re.fullmatch(r"\w+", key) or not equals or not value:
            raise SpecError(f"{where}: expected KEY=VALUE, found {part!r}; for example reduction=8,stages=2-4")
        if key in given:
            raise SpecError(f"{where}: {key} is given twice")
        given[key] = value
        position += len(part) + 1
    block = given.pop("block", None if start is None else start.__struct_config__.tag) or "se"
    if block not in BLOCKS:
        raise SpecError(f"{option} {text}: block {block!r}: no such block{nearest(str(block), BLOCKS)}")
    kind = BLOCKS[str(block)]
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    keys: dict[str, object] = {} if start is None else msgspec.to_builtins(start)
    keys = {key: value for key, value in keys.items() if key in (fields if type(start) is kind else _SHARED_KEYS)}
    if "bias" in fields:
        keys.setdefault("bias", True)
    for key, value in given.items():
        if key not in fields:
            close = nearest(key, fields)
            meant = close if close.startswith("; did") else ""
            allowed = ", ".join(("block", *fields))
            raise SpecError(f"{option} {text}: {key}: unknown key{meant}; allowed for {block}: {allowed}")
        keys[key] = _value(key, value, fields[key], where=f"{option} {text}: {key}")
    if "sites" not in keys:
        raise SpecError(f"{option} {text}: sites: missing; name a site group or a pattern, or give --insert")
    return block_config(origin=f"{option} {text}", block=block, **keys)


_SHARED_KEYS = SiteConfig.__struct_fields__


def _value(key: str, text: str, kind: object, *, where: str) -> object:
    if key == "sites":
        return text.split("+") if "+" in text else text
    if key == "stages":
        found = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.split("+")]
        if not all(found):
            raise SpecError(f"{where}: {text!r} names no stages; write 3, 2-4 or 2+4")
        ranges = [range(int(one[1]), int(one[2] or one[1]) + 1) for one in found if one is not None]
        if not all(ranges):
            raise SpecError(f"{where}: {text!r} ends before it begins; write 2-4")
        return sorted({stage for one in ranges for stage in one})
    if kind is bool:
        if text not in _YES_NO:
            raise SpecError(f"{where}: {text!r}; allowed: {', '.join(_YES_NO)}")
        return _YES_NO[text]
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if kind is int or kind == int | None:
        raise SpecError(f"{where}: {text!r} is no whole number")
    return text


_YES_NO = {"yes": True, "no": False, "true": True, "false": False}
