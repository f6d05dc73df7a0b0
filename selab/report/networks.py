"""Tables about one network: its configuration, sites, runtime and published numbers."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selab import units
from selab.attention.config import SEConfig, SiteConfig, block_keys, block_name
from selab.models import external
from selab.models.spec import ONNX_FAMILY, Published, Variant
from selab.records.types import Cost, Insertion
from selab.report.table import Table
from selab.units import NONE

if TYPE_CHECKING:
    from selab.fusion.fuse import Runtime


def facts_table(variant: Variant, cost: Cost | None = None) -> Table:
    """Return what the catalog says about a variant, and its total cost.

    Args:
        variant: of the catalog.
        cost: of one input; without it there is no total.
    """
    facts = {
        "title": variant.title,
        "family": f"{variant.family} ({variant.source})",
        "builder": variant.builder,
        "arguments": ", ".join(f"{key}={value}" for key, value in variant.arguments.items()) or NONE,
        "input": "×".join(map(str, variant.input_chw)),
        "classes": NONE if _has_own_classes(variant) else str(variant.num_classes),
        "baseline": variant.baseline or NONE,
    }
    if variant.se is not None:
        sites = variant.se.sites if isinstance(variant.se.sites, str) else ", ".join(variant.se.sites)
        stages = f", stages {', '.join(map(str, variant.se.stages))} only" if variant.se.stages else ""
        facts["SE sites"] = f"{sites}, placement {variant.se.placement}{stages}"
        facts["SE block"] = block_words(variant.se)
    if cost is not None:
        total = f"{units.count(cost.params)} parameters, {units.count(cost.macs.paper)}FLOPs as the paper counts (MACs)"
        facts["total"] = total
    facts |= {"note": variant.note} if variant.note else {}
    facts["facts from"] = f"{variant.origin} ({variant.facts_hash})"
    rows = tuple(facts.items())
    return Table(title=variant.name, columns=("", ""), rows=rows, words=frozenset({0, 1}))


def _has_own_classes(variant: Variant) -> bool:
    """Return whether the number of classes is the network's own affair."""
    return variant.family == ONNX_FAMILY or (external.runs_code_of(variant) is not None and not variant.file)


def block_words(facts: SiteConfig) -> str:
    """Return what kind of block stands at the sites, in words."""
    if isinstance(facts, SEConfig):
        latent = facts.latent_channels
        width = f"reduction {facts.reduction}" if latent is None else f"squeeze width {latent}"
        return (
            f"{width} of the {facts.squeeze_from}'s channels, squeeze {facts.squeeze}, "
            f"gate {facts.gate}, activation {facts.activation}, {'with' if facts.bias else 'without'} bias"
        )
    return ", ".join([block_name(facts), *(f"{name} {value}" for name, value in block_keys(facts).items())])


def sites_table(insertions: Sequence[Insertion]) -> Table:
    """Return where SE stands in a network, and what each block costs."""
    rows = tuple(
        (
            one.path,
            f"{one.channels}→{one.squeeze_channels}" if one.squeeze_channels else str(one.channels),
            f"{one.height}×{one.width}",
            units.exact(one.params),
            units.count(one.macs),
        )
        for one in insertions
    )
    title = f"SE sites ({len(insertions)}, placement {insertions[0].placement})"
    return Table(title=title, columns=("module", "channels", "map", "params", "MACs, all"), rows=rows)


def runtime_table(found: "Sequence[Runtime]", *, title: str) -> Table:
    """Return how each block would run, and why not faster."""
    rows = []
    for one in found:
        done = [
            word
            for word, is_so in (
                ("BatchNorm", one.block.normalising),
                ("ReLU", one.block.absorbed),
                ("join", one.block.joined),
                ("in place", one.block.in_place),
            )
            if is_so and one.impl != "reference"
        ]
        shape = "×".join(map(str, one.map_nchw[1:]))
        rows.append((one.block.path, shape, one.impl, ", ".join(done) or NONE, one.reason or NONE))
    columns = ("block", "map", "runs as", "fused with it", "why not faster")
    return Table(title=title, columns=columns, rows=tuple(rows), words=frozenset({0, 2, 3, 4}))


def _printed(fact: Published) -> str:
    """Return what a source prints; of an accuracy, the error that it means before it."""
    found = re.match(r"\d+(?:\.\d+)?", fact.printed)
    if found is None or not fact.metric.endswith("_error_pct"):
        return fact.printed or f"{fact.value:g}"
    number = float(found[0])
    as_accuracy = abs(100 - number - fact.value) < abs(number - fact.value)
    return f"{fact.value:g} (printed: accuracy {fact.printed})" if as_accuracy else fact.printed


def published_table(variant: Variant) -> Table:
    """Return what others published about a variant."""
    rows = tuple((one.metric, _printed(one), one.dataset, f"{one.source}, {one.where}") for one in variant.published)
    notes = tuple(f"{one.metric}: {one.note}" for one in variant.published if one.note)
    columns = ("published", "value", "on", "source")
    return Table(title="Published", columns=columns, rows=rows, notes=notes, words=frozenset({0, 2, 3}))
