"""The frozen types of an architecture's facts, read strictly from TOML.

A family's file names its builder and its variants; a variant says where SE stands in it and what others published
about it. Geometry is Python's business (builder arguments), so no key here changes the meaning of another.
"""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from selab.errors import SpecError, nearest
from selab.record import Frozen

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max", "none"]
Gate = Literal["sigmoid", "tanh", "relu", "hardsigmoid"]
Activation = Literal["relu", "silu"]
SqueezeFrom = Literal["site", "block_input"]
Metric = Literal["top1_error_pct", "top5_error_pct", "params", "macs", "forward_s", "forward_backward_s"]

_T = TypeVar("_T", bound=Frozen)


class SiteFacts(Frozen, frozen=True, kw_only=True, tag_field="block"):
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


class SEFacts(SiteFacts, frozen=True, kw_only=True, tag="se"):
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


class ECAFacts(SiteFacts, frozen=True, kw_only=True, tag="eca"):
    """Efficient Channel Attention; `kernel_size` None is the paper's adaptive size."""

    kernel_size: int | None = None


class CBAMFacts(SiteFacts, frozen=True, kw_only=True, tag="cbam"):
    """Convolutional Block Attention Module: a channel gate, then a spatial gate of `kernel_size`."""

    reduction: int = 16
    kernel_size: int = 7


class CoordinateFacts(SiteFacts, frozen=True, kw_only=True, tag="coordinate"):
    """Coordinate Attention."""

    reduction: int = 32


class SCSEFacts(SiteFacts, frozen=True, kw_only=True, tag="scse"):
    """Concurrent spatial and channel SE."""

    reduction: int = 2


class SSEFacts(SiteFacts, frozen=True, kw_only=True, tag="sse"):
    """Spatial SE alone."""


class GatherExciteFacts(SiteFacts, frozen=True, kw_only=True, tag="gather_excite"):
    """Gather-Excite without parameters; `extent` 0 gathers the whole map."""

    extent: int = 0


class ESEFacts(SiteFacts, frozen=True, kw_only=True, tag="ese"):
    """Effective SE, with one layer."""


BlockFacts = SEFacts | ECAFacts | CBAMFacts | CoordinateFacts | SCSEFacts | SSEFacts | GatherExciteFacts | ESEFacts
BLOCKS: dict[str, type[SiteFacts]] = {str(kind.__struct_config__.tag): kind for kind in get_args(BlockFacts)}

# Keys that came after the first records: they enter a variant's hash only where they say something, so that a record
# stays as fresh as the network that it is about.
_LATER_KEYS = {"block": "se", "activation": "relu", "stages": ()}


class Published(Frozen, frozen=True, kw_only=True):
    """One number that others published, with its source; `printed` is the text as it stands there."""

    metric: Metric
    value: float
    source: str
    where: str
    printed: str = ""
    dataset: str = ""
    note: str = ""

    @property
    def table(self) -> str:
        """The place up to its first comma, `Table 10` of `Table 10, ratio 4`: numbers of one table have one recipe."""
        return self.where.partition(",")[0]


class _VariantTable(Frozen, frozen=True, kw_only=True):
    """A `[variants.NAME]` table as it stands in the file."""

    title: str
    baseline: str | None = None
    arguments: dict[str, bool | int | float | str] = msgspec.field(default_factory=dict)
    note: str = ""
    se: BlockFacts | None = None
    published: tuple[Published, ...] = ()


class _FamilyTable(Frozen, frozen=True, kw_only=True):
    """The file's top level, its variants apart."""

    family: str
    source: str
    builder: str
    input_chw: tuple[int, int, int]
    num_classes: int


class Variant(Frozen, frozen=True, kw_only=True):
    """One network, with or without SE, and everything that is known about it.

    Attributes:
        builder: `package.module:callable`, called with `num_classes` and `arguments`.
        baseline: the variant that this one is compared with; None for a baseline.
        origin: the file that says so, for messages.
        file: its path if it is a user's own; empty for the families that are installed.
    """

    name: str
    family: str
    title: str
    source: str
    builder: str
    arguments: dict[str, bool | int | float | str]
    input_chw: tuple[int, int, int]
    num_classes: int
    baseline: str | None
    se: BlockFacts | None
    published: tuple[Published, ...]
    note: str
    origin: str
    file: str

    @property
    def place(self) -> str:
        """Where a message says that it stands."""
        in_file = self.origin.endswith(".toml") and "+" not in self.name
        return f"{self.origin}: variants.{self.name}" if in_file else self.name

    @property
    def facts_hash(self) -> str:
        """Twelve hex digits over what decides the network; titles, notes and published numbers do not enter."""
        se = None if self.se is None else msgspec.to_builtins(self.se)
        if se is not None:
            se = {key: value for key, value in se.items() if key not in _LATER_KEYS or value != _LATER_KEYS[key]}
        facts = (self.builder, self.arguments, self.input_chw, self.num_classes, se)
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:12]


def pair_hash(variant: Variant, baseline: Variant | None) -> str:
    """Of both networks' facts: a record whose hash differs from today's is stale."""
    return variant.facts_hash + ("" if baseline is None else f"-{baseline.facts_hash}")


def parse_family(text: str, *, origin: str, file: str = "") -> dict[str, Variant]:
    """Reads a family's TOML.

    Args:
        text: the file's content.
        origin: the file's name, for messages.
        file: its path, if it is a user's own.

    Raises:
        SpecError: malformed TOML, unknown key, wrong type, missing source, or a baseline that is not there; the message
            names the file and the key.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{origin}: not TOML: {error}") from None
    tables = data.pop("variants", None)
    if not isinstance(tables, dict) or not tables:
        raise SpecError(f"{origin}: no [variants.NAME] table; a family needs at least one")
    family = _convert(data, _FamilyTable, origin=origin, key="")
    if not re.fullmatch(r"[\w.]+:\w+", family.builder):
        raise SpecError(f"{origin}: builder: {family.builder!r} is not of the form 'package.module:callable'")
    _check_positive(family.input_chw, origin=origin, key="input_chw")
    _check_positive((family.num_classes,), origin=origin, key="num_classes")
    return {name: _variant(name, table, family, tables, origin, file) for name, table in tables.items()}


def _variant(
    name: str, table: object, family: _FamilyTable, tables: dict[str, object], origin: str, file: str
) -> Variant:
    key = f"variants.{name}"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise SpecError(f"{origin}: {key}: a variant's name is lower-case letters, digits and _")
    facts = _convert(_with_block(table), _VariantTable, origin=origin, key=key)
    if facts.baseline is not None and facts.baseline not in tables:
        raise SpecError(
            f"{origin}: {key}.baseline: no variant {facts.baseline!r} here{nearest(facts.baseline, tables)}"
        )
    if facts.se is not None:
        if facts.baseline is None:
            raise SpecError(f"{origin}: {key}.baseline: missing; a variant with SE names the one it is compared with")
        _check_block(facts.se, origin=origin, key=f"{key}.se")
    for index, published in enumerate(facts.published):
        if not published.source.strip() or not published.where.strip():
            raise SpecError(f"{origin}: {key}.published[{index}]: source and where must say where the number stands")
    return Variant(
        name=name,
        family=family.family,
        title=facts.title,
        source=family.source,
        builder=family.builder,
        arguments=facts.arguments,
        input_chw=family.input_chw,
        num_classes=family.num_classes,
        baseline=facts.baseline,
        se=facts.se,
        published=facts.published,
        note=facts.note,
        origin=origin,
        file=file,
    )


def _with_block(table: object) -> object:
    """An `se` table that does not name its block is Squeeze-and-Excitation."""
    if isinstance(table, dict) and isinstance(table.get("se"), dict):
        return {**table, "se": {"block": "se", **table["se"]}}
    return table


def _check_block(facts: SiteFacts, *, origin: str, key: str) -> None:
    for name in ("reduction", "divisor", "kernel_size"):
        value = getattr(facts, name, None)
        if value is not None:
            _check_positive((value,), origin=origin, key=f"{key}.{name}" if key else name)
    if facts.stages:
        _check_positive(facts.stages, origin=origin, key=f"{key}.stages" if key else "stages")


def _check_positive(values: tuple[int, ...], *, origin: str, key: str) -> None:
    if min(values) < 1:
        raise SpecError(f"{origin}: {key}: {values[0] if len(values) == 1 else list(values)}; must be at least 1")


def _convert(value: object, kind: type[_T], *, origin: str, key: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SpecError(f"{origin}: {_explain(str(error), kind, key, value)}") from None


def _explain(message: str, kind: type[Frozen], key: str, value: object) -> str:
    """Turns `Expected `int`, got `str` - at `$.se.reduction`` into `variants.x.se.reduction: expected int, got str`."""
    text, _, at = message.partition(" - at ")
    path = ".".join(part for part in (key, at.strip("`").removeprefix("$").removeprefix(".")) if part)
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        owner = _type_at(kind, at, value)
        return f"{path + '.' if path else ''}{unknown[1]}: unknown key; allowed: {', '.join(_keys(owner))}"
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        return f"{path + '.' if path else ''}{missing[1]}: missing"
    if path.split(".")[-1] == "block":
        return f"{path}: {text[0].lower()}{text[1:]}; allowed: {', '.join(BLOCKS)}"
    return f"{path}: {text[0].lower()}{text[1:].replace('`', '')}{_choices(kind, at, value)}"


def _keys(kind: type[Frozen]) -> tuple[str, ...]:
    return (*(("block",) if issubclass(kind, SiteFacts) else ()), *kind.__struct_fields__)


def _choices(kind: type[Frozen], at: str, value: object) -> str:
    """The allowed words of an enumerated key, as `; allowed: avg, max`."""
    owner, _, leaf = at.strip("`").rpartition(".")
    fields = {field.name: field.type for field in msgspec.structs.fields(_type_at(kind, owner, value))}
    words = getattr(fields.get(leaf), "__args__", ())
    return f"; allowed: {', '.join(map(str, words))}" if words and all(isinstance(word, str) for word in words) else ""


def _type_at(kind: type[Frozen], at: str, value: object) -> type[Frozen]:
    """The type of the table that an error message points into; `value` is what was read."""
    if ".published[" in at:
        return Published
    if re.search(r"\.se\b", at) and isinstance(value, dict):
        value, kind = value.get("se"), SEFacts
    block = value.get("block") if isinstance(value, dict) else None
    return BLOCKS.get(block, kind) if isinstance(block, str) else kind


def read_family(path: Path) -> dict[str, Variant]:
    """Reads a family's TOML from a file.

    Raises:
        SpecError: as `parse_family`, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"{path}: cannot be read: {reason}") from None
    return parse_family(text, origin=str(path), file=str(path))


def block_facts(*, origin: str = "SE", **keys: object) -> BlockFacts:
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
    facts = _convert({**keys, "block": block}, BLOCKS[block], origin=origin, key="")
    _check_block(facts, origin=origin, key="")
    return facts  # type: ignore[return-value]


def changed(start: BlockFacts | None, text: str, *, option: str = "--se") -> BlockFacts:
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
        SpecError: the text is not of this grammar (the message names the character), or as `block_facts`.
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
    return block_facts(origin=f"{option} {text}", block=block, **keys)


_SHARED_KEYS = SiteFacts.__struct_fields__


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


def as_builtins(variant: Variant) -> dict[str, Any]:
    """A variant as plain dictionaries and lists, for `--json`."""
    return {**msgspec.to_builtins(variant), "facts_hash": variant.facts_hash}
