"""The frozen types of an architecture's facts, read strictly from TOML.

A family's file names its builder and its variants; a variant says where SE stands in it and what others published
about it. Geometry is Python's business (builder arguments), so no key here changes the meaning of another.
"""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from selab.errors import SpecError, nearest
from selab.record import Frozen

Placement = Literal["standard", "pre", "post", "identity", "3x3"]
Squeeze = Literal["avg", "max"]
Gate = Literal["sigmoid", "tanh", "relu", "hardsigmoid"]
SqueezeFrom = Literal["site", "block_input"]
Metric = Literal["top1_error_pct", "top5_error_pct", "params", "macs", "forward_s", "forward_backward_s"]

_T = TypeVar("_T", bound=Frozen)


class SEFacts(Frozen, frozen=True, kw_only=True):
    """How SE stands in a variant.

    Attributes:
        sites: a site group that the network declares, or module-path patterns (`*` within a name, `**` across names).
        squeeze_from: the channels that `reduction` divides: those at the site, or those of the block's input.
        divisor: the squeeze width is rounded to a multiple of it.
        bias: whether the two fully connected layers have biases. Stated by every variant, for codebases differ.
    """

    sites: str | tuple[str, ...]
    bias: bool
    placement: Placement = "standard"
    reduction: int = 16
    squeeze_from: SqueezeFrom = "site"
    divisor: int = 1
    squeeze: Squeeze = "avg"
    gate: Gate = "sigmoid"


class Published(Frozen, frozen=True, kw_only=True):
    """One number that others published, with its source; `printed` is the text as it stands there."""

    metric: Metric
    value: float
    source: str
    where: str
    printed: str = ""
    dataset: str = ""
    note: str = ""


class _VariantTable(Frozen, frozen=True, kw_only=True):
    """A `[variants.NAME]` table as it stands in the file."""

    title: str
    baseline: str | None = None
    arguments: dict[str, bool | int | float | str] = msgspec.field(default_factory=dict)
    note: str = ""
    se: SEFacts | None = None
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
    se: SEFacts | None
    published: tuple[Published, ...]
    note: str
    origin: str
    file: str

    @property
    def facts_hash(self) -> str:
        """Twelve hex digits over what decides the network; titles, notes and published numbers do not enter."""
        facts = (self.builder, self.arguments, self.input_chw, self.num_classes, self.se)
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
    facts = _convert(table, _VariantTable, origin=origin, key=key)
    if facts.baseline is not None and facts.baseline not in tables:
        raise SpecError(
            f"{origin}: {key}.baseline: no variant {facts.baseline!r} here{nearest(facts.baseline, tables)}"
        )
    if facts.se is not None:
        if facts.baseline is None:
            raise SpecError(f"{origin}: {key}.baseline: missing; a variant with SE names the one it is compared with")
        _check_positive((facts.se.reduction,), origin=origin, key=f"{key}.se.reduction")
        _check_positive((facts.se.divisor,), origin=origin, key=f"{key}.se.divisor")
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


def _check_positive(values: tuple[int, ...], *, origin: str, key: str) -> None:
    if min(values) < 1:
        raise SpecError(f"{origin}: {key}: {values[0] if len(values) == 1 else list(values)}; must be at least 1")


def _convert(value: object, kind: type[_T], *, origin: str, key: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SpecError(f"{origin}: {_explain(str(error), kind, key)}") from None


def _explain(message: str, kind: type[Frozen], key: str) -> str:
    """Turns `Expected `int`, got `str` - at `$.se.reduction`` into `variants.x.se.reduction: expected int, got str`."""
    text, _, at = message.partition(" - at ")
    path = ".".join(part for part in (key, at.strip("`").removeprefix("$").removeprefix(".")) if part)
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        owner = _type_at(kind, at)
        return f"{path + '.' if path else ''}{unknown[1]}: unknown key; allowed: {', '.join(owner.__struct_fields__)}"
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        return f"{path + '.' if path else ''}{missing[1]}: missing"
    return f"{path}: {text[0].lower()}{text[1:].replace('`', '')}{_choices(kind, at)}"


def _choices(kind: type[Frozen], at: str) -> str:
    """The allowed words of an enumerated key, as `; allowed: avg, max`."""
    owner, _, leaf = at.strip("`").rpartition(".")
    fields = {field.name: field.type for field in msgspec.structs.fields(_type_at(kind, owner))}
    words = getattr(fields.get(leaf), "__args__", ())
    return f"; allowed: {', '.join(map(str, words))}" if words and all(isinstance(word, str) for word in words) else ""


def _type_at(kind: type[Frozen], at: str) -> type[Frozen]:
    if re.search(r"\.se\b", at):
        return SEFacts
    return Published if ".published[" in at else kind


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


def se_facts(**keys: object) -> SEFacts:
    """The facts of an SE block from keyword arguments, as strictly as from a TOML.

    Raises:
        SpecError: an unknown key, a wrong type, or a value that is not allowed; the message names the key.
    """
    facts = _convert(keys, SEFacts, origin="SE", key="")
    _check_positive((facts.reduction,), origin="SE", key="reduction")
    _check_positive((facts.divisor,), origin="SE", key="divisor")
    return facts


def as_builtins(variant: Variant) -> dict[str, Any]:
    """A variant as plain dictionaries and lists, for `--json`."""
    return {**msgspec.to_builtins(variant), "facts_hash": variant.facts_hash}
