"""Configuration of networks, read strictly from TOML.

A family's file names its builder and its variants. A variant states where its attention blocks go and which numbers
were published for it. Geometry belongs to the builder's arguments, so no key changes the meaning of another.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from selab.attention.config import SiteConfig, as_keys, check_positive, read_block
from selab.errors import SpecError, nearest
from selab.models.inputs import Input
from selab.records.toml import convert, parse, read_toml_text
from selab.records.types import Frozen, On

Metric = Literal[
    "top1_error_pct",
    "top5_error_pct",
    "ap_pct",
    "ap50_pct",
    "loss",
    "params",
    "macs",
    "forward_s",
    "forward_backward_s",
]


# A configuration is found by the block's name, among blocks that may have been registered; JSON gives its keys.
if TYPE_CHECKING:
    _Se = SiteConfig | None
else:
    _Se = Any

# Keys that are younger than the first records. They enter a variant's hash only if they differ from their default, so
# that records of unchanged networks do not turn stale.
_LATER_KEYS = {"block": "se", "activation": "relu", "stages": (), "init": "he", "min_channels": 1}


ONNX_FAMILY = "onnx"
DEPLOYED_FAMILY = "deployed"
"""The family of networks that are ONNX files."""


class Published(Frozen, frozen=True, kw_only=True):
    """One published number with its source; `printed` is the text in the source."""

    metric: Metric
    value: float
    source: str
    where: str
    printed: str = ""
    dataset: str = ""
    note: str = ""

    @property
    def table(self) -> str:
        """The place up to its first comma, `Table 10` of `Table 10, ratio 4`; numbers of one table share a recipe."""
        return self.where.partition(",")[0]


class _VariantTable(Frozen, frozen=True, kw_only=True):
    """A `[variants.NAME]` table of the file."""

    title: str
    baseline: str | None = None
    arguments: dict[str, bool | int | float | str] = msgspec.field(default_factory=dict)
    note: str = ""
    se: dict[str, Any] | None = None
    published: tuple[Published, ...] = ()


class _FamilyTable(Frozen, frozen=True, kw_only=True):
    """The file's top level, without its variants."""

    family: str
    source: str
    builder: str
    input_chw: tuple[int, int, int]
    num_classes: int


class Variant(Frozen, frozen=True, kw_only=True):
    """One network with or without attention blocks: its builder, its configuration and its published numbers.

    Attributes:
        builder: `package.module:callable`, called with `num_classes` and `arguments`.
        baseline: the variant that this one is compared with; None for a baseline.
        se: configuration of its blocks; None for none.
        origin: its file, for messages.
        file: the path of a user's own TOML; empty for installed families.
        inputs: where it takes several, all of them; `input_chw` is the first image among them.
        on: `cpu` to look at it on real tensors, because values decide what it computes; no part of the network.
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
    se: _Se
    published: tuple[Published, ...]
    note: str
    origin: str
    file: str
    inputs: tuple[Input, ...] = ()
    on: On = "fake"

    def __post_init__(self) -> None:
        """Read the keys of the blocks that JSON gives."""
        keys: Any = self.se
        if isinstance(keys, dict):
            msgspec.structs.force_setattr(self, "se", read_block(keys, place=f"{self.name}: se"))

    @property
    def place(self) -> str:
        """The place of the variant in messages."""
        in_file = self.origin.endswith(".toml") and "+" not in self.name
        return f"{self.origin}: variants.{self.name}" if in_file else self.name

    @property
    def facts_hash(self) -> str:
        """Twelve hex digits over what determines the network; titles, notes and published numbers do not enter."""
        se = None if self.se is None else as_keys(self.se)
        if se is not None:
            se = {key: value for key, value in se.items() if key not in _LATER_KEYS or value != _LATER_KEYS[key]}
        content: tuple[object, ...] = (self.builder, self.arguments, self.input_chw, self.num_classes, se)
        if self.inputs:
            content = (*content, self.inputs)
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:12]


def pair_hash(variant: Variant, baseline: Variant | None) -> str:
    """Return the hash of both networks; a record with another one is stale."""
    return variant.facts_hash + ("" if baseline is None else f"-{baseline.facts_hash}")


def parse_family(text: str, *, origin: str, file: str = "") -> dict[str, Variant]:
    """Return the variants of a family's TOML by name.

    Args:
        text: the file's content.
        origin: the file's name, for messages.
        file: its path, for a user's own TOML.

    Raises:
        SpecError: malformed TOML, unknown key, wrong type, missing source, or a baseline that does not exist. The
            message names the file and the key.
    """
    data = parse(text, origin=origin)
    tables = data.pop("variants", None)
    if not isinstance(tables, dict) or not tables:
        raise SpecError(f"{origin}: no [variants.NAME] table; a family needs at least one")
    family = convert(data, _FamilyTable, place=f"{origin}:")
    if not re.fullmatch(r"[\w.]+:\w+", family.builder):
        raise SpecError(f"{origin}: builder: {family.builder!r} is not of the form 'package.module:callable'")
    check_positive(family.input_chw, place=f"{origin}: input_chw")
    check_positive((family.num_classes,), place=f"{origin}: num_classes")
    variants = {name: _variant(name, table, family, tables, origin, file) for name, table in tables.items()}
    _check_baselines(variants, origin)
    return variants


def _check_baselines(variants: dict[str, Variant], origin: str) -> None:
    """Raise SpecError if a variant is compared, through its baselines, with itself."""
    for name in variants:
        chain = [name]
        while (baseline := variants[chain[-1]].baseline) is not None:
            chain.append(baseline)
            if baseline == name:
                circle = " → ".join(chain)
                raise SpecError(
                    f"{origin}: variants.{name}.baseline: a circle, {circle}; leave out the baseline of one"
                )
            if len(chain) > len(variants):
                break  # it leads into a circle of others, which is reported for them


def _check_published(published: Published, place: str) -> None:
    """Raise SpecError if a value is none that can be published: not finite, negative, or more than 100 %."""
    most = 100 if published.metric.endswith("_pct") else math.inf
    if not math.isfinite(published.value) or not 0 <= published.value <= most:
        allowed = "0 to 100" if most == 100 else "a finite number, not negative"
        raise SpecError(f"{place}.value: {published.metric} is {published.value!r}; allowed: {allowed}")


def _variant(
    name: str, table: object, family: _FamilyTable, tables: dict[str, object], origin: str, file: str
) -> Variant:
    key = f"variants.{name}"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise SpecError(f"{origin}: {key}: a variant's name is lower-case letters, digits and _")
    given = convert(table, _VariantTable, place=f"{origin}: {key}")
    if given.baseline is not None and given.baseline not in tables:
        raise SpecError(
            f"{origin}: {key}.baseline: no variant {given.baseline!r} here{nearest(given.baseline, tables)}"
        )
    if given.se is not None and given.baseline is None:
        raise SpecError(f"{origin}: {key}.baseline: missing; a variant with SE names the variant it is compared with")
    for index, published in enumerate(given.published):
        _check_published(published, f"{origin}: {key}.published[{index}]")
        if not published.source.strip() or not published.where.strip():
            raise SpecError(
                f"{origin}: {key}.published[{index}]: source and where must name the publication and the place in it"
            )
    return Variant(
        name=name,
        family=family.family,
        title=given.title,
        source=family.source,
        builder=family.builder,
        arguments=given.arguments,
        input_chw=family.input_chw,
        num_classes=family.num_classes,
        baseline=given.baseline,
        se=None if given.se is None else read_block(given.se, place=f"{origin}: {key}.se"),
        published=given.published,
        note=given.note,
        origin=origin,
        file=file,
    )


def read_family(path: Path) -> dict[str, Variant]:
    """Return the variants of a TOML file by name.

    Raises:
        SpecError: as `parse_family`, or the file cannot be read.
    """
    return parse_family(read_toml_text(path), origin=str(path), file=str(path))


def as_builtins(variant: Variant) -> dict[str, Any]:
    """Return a variant as plain dictionaries and lists, for `--json`."""
    se = None if variant.se is None else as_keys(variant.se)
    plain = {**msgspec.to_builtins(variant), "se": se, "facts_hash": variant.facts_hash}
    del plain["on"]
    if not variant.inputs:
        del plain["inputs"]
    return plain
