"""Spend the time of a variant's blocks otherwise: make its baseline wider, or deeper, until it is as slow.

The networks alternate in fresh processes: baseline, variant, and wider and deeper baselines. Of each kind the one
nearest to the variant's time is taken. What was measured is kept, so that a comparison that goes on later, or on
another machine, trains the same networks.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from selab._version import __version__
from selab.attention.config import as_keys
from selab.bench.machine import machine
from selab.bench.progress import Report
from selab.cost.count import count
from selab.errors import ModelError, RecordError, SelabError
from selab.experiments.candidates import (
    ORIGINAL,
    Network,
    Resized,
    Sites,
    family_text,
    ratio_of,
    repeats,
    widths,
)
from selab.experiments.job import Request, resolve
from selab.experiments.prices import times
from selab.models.build import build
from selab.models.provenance import fixed_address
from selab.models.spec import Variant, read_family
from selab.records.files import read_text, write_atomically
from selab.records.store import file_name
from selab.records.types import Frozen, Latency, decoded

SCHEMA = "selab.equal-time/1"
Kind = Literal["width", "depth"]
BLOCKS = "with_blocks"
"""The variant among the networks that are measured."""
# Wider networks have up to so many times the MACs that the blocks add, and at least so many: blocks are slower than
# their MACs.
_REACH, _LEAST_REACH = 4.0, 0.5
# So many of them are measured at first, then so many between the two nearest ones, of so many in all; and deeper ones.
_FIRST, _THEN, _MOST_WIDTHS, _DEEPER = 6, 4, 60, 4
# A network is as slow as the variant if their times differ by no more.
_NEAR = 0.02


class Tried(Frozen, frozen=True, kw_only=True):
    """A network that was measured.

    Attributes:
        params: learnable parameters; `macs` by all operators.
        latency: over the baseline, forward.
    """

    network: Network
    kind: Kind
    params: int
    macs: int
    latency: Latency


class EqualTime(Frozen, frozen=True, kw_only=True):
    """The baselines that are as slow as a variant.

    Attributes:
        facts_hash: of the variant; `baseline_facts_hash` of the baseline.
        variant: its latency over the baseline's, forward, one image.
        tried: wider and deeper networks.
        chosen: names of those nearest to the variant, one of each kind.
        remarks: what a reader must know, one line each.
    """

    schema: str = SCHEMA
    selab: str = __version__
    arch: str
    baseline: str
    facts_hash: str
    baseline_facts_hash: str
    input_chw: tuple[int, int, int]
    num_classes: int
    machine: str
    variant: Latency
    tried: tuple[Tried, ...]
    chosen: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def nearest(ratios: Mapping[str, float], aim: float) -> str:
    """Return the name of the ratio nearest to an aim, in proportion; of two that are as near, the smaller ratio."""
    return min(ratios, key=lambda name: (abs(math.log(ratios[name] / aim)), ratios[name]))


def between(ordered: Sequence[str], ratios: Mapping[str, float], aim: float, *, most: int) -> list[str]:
    """Return what is not measured between the two neighbours around an aim, evenly spaced.

    Args:
        ordered: names of all networks, by size.
        ratios: of those that were measured.
        aim: the ratio that is looked for.
        most: so many.
    """
    known = [place for place, name in enumerate(ordered) if name in ratios]
    low = max((place for place in known if ratios[ordered[place]] <= aim), default=-1)
    high = min((place for place in known if place > low and ratios[ordered[place]] > aim), default=len(ordered))
    return spaced([name for name in ordered[low + 1 : high] if name not in ratios], most)


def spaced(names: Sequence[str], most: int) -> list[str]:
    """Return at most so many names, evenly spaced, the last one among them."""
    number = min(most, len(names))
    return [names[(place + 1) * len(names) // number - 1] for place in range(number)]


def equal_time(
    variant: Variant,
    baseline: Variant,
    *,
    out: Path,
    budget_s: float,
    report: Report,
    say: Callable[[str], object] = lambda _: None,
) -> list[tuple[Variant, str]]:
    """Return the baselines that are as slow as a variant: a wider one and a deeper one, where there are such.

    With each comes a line with the times of both over the baseline's; it says so if they are not equal.

    Measured is the forward pass of one image on one thread of the CPU, in PyTorch.

    Args:
        variant: with blocks, fitted to the images.
        baseline: without them, fitted likewise.
        out: the folder of all results; the networks go into a TOML in it, and what was measured beside that.
        budget_s: seconds of measuring; half as many may follow.
        report: called with what is done.
        say: called with each remark.

    Raises:
        SelabError: a network cannot be measured, or none can be made wider or deeper; what lies there cannot be read.
    """
    path = out / "equal-time" / f"{file_name(f'{variant.name}-vs-{baseline.name}')}.json"
    family = path.with_suffix(".toml")
    found = _there(path, variant, baseline)
    if found is None:
        found = _measured(variant, baseline, family, budget_s=budget_s, report=report)
        write_atomically(path, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    networks = [one.network for one in found.tried if one.network.name in found.chosen]
    write_atomically(family, _networks_text(_sites(baseline), variant, networks).encode())
    made = read_family(family)
    for remark in found.remarks:
        say(remark)
    return [(made[one.name], _times_words(found, one.name)) for one in networks]


def _times_words(found: EqualTime, name: str) -> str:
    """Return both networks' times over the baseline's, for those who read only the comparison."""
    latency = next(one.latency for one in found.tried if one.network.name == name)
    each = [f"{network} {_over(one)}" for network, one in ((name, latency), (found.arch, found.variant))]
    words = f"forward pass of one image, over {found.baseline}'s: {', '.join(each)}"
    return words if _near(_ratio(latency, name), _ratio(found.variant, found.arch)) else f"not equal in time: {words}"


def _over(latency: Latency) -> str:
    """Return `x 1.390 [1.381, 1.402]`."""
    bounds = latency.interval
    shown = "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    return f"x {latency.ratio:.3f}{shown}"


def _near(ratio: float, aim: float) -> bool:
    return abs(math.log(ratio / aim)) <= _NEAR


def _there(path: Path, variant: Variant, baseline: Variant) -> EqualTime | None:
    """Return what was measured before, of the same networks; None if nothing was."""
    if not path.exists():
        return None
    found = decoded(read_text(path).encode(), EqualTime, schema=SCHEMA, where=str(path), again="delete it")
    asked = (variant.facts_hash, baseline.facts_hash, variant.input_chw, variant.num_classes)
    if (found.facts_hash, found.baseline_facts_hash, found.input_chw, found.num_classes) != asked:
        raise RecordError(f"{path}: is of other networks or other images; delete it, or name another folder with --out")
    return found


def _sites(baseline: Variant) -> Sites:
    cost = count(build(baseline, device="meta").model, (1, *baseline.input_chw))
    return Sites(original=baseline, block={}, found=(), cost=cost)


def _candidates(sites: Sites, reach: float, remarks: list[str]) -> dict[str, tuple[Kind, Resized]]:
    """Return wider networks up to a share of MACs, the narrowest first, and deeper ones behind them."""
    baseline = sites.original
    found: dict[str, tuple[Kind, Resized]] = {}
    try:
        for one in widths(sites, reach, "macs", most=_MOST_WIDTHS):
            found[one.network.name] = ("width", one)
    except ModelError as error:
        remarks.append(str(error))
    deeper = repeats(sites, reach, "macs", most=_DEEPER)
    found |= {one.network.name: ("depth", one) for one in deeper}
    if not deeper:
        remarks.append(f"{baseline.name}: no block keeps the shape of its map, so that none runs once more")
    if not found:
        raise SelabError(f"--equal-time: {baseline.name} can be made neither wider nor deeper: {'; '.join(remarks)}")
    return found


def _measured(variant: Variant, baseline: Variant, family: Path, *, budget_s: float, report: Report) -> EqualTime:
    sites, remarks = _sites(baseline), []  # type: tuple[Sites, list[str]]
    own = count(build(variant, device="meta").model, (1, *variant.input_chw))
    reach = 1 + max(_LEAST_REACH, _REACH * (ratio_of(own, sites.cost, "macs") - 1))
    resized = _candidates(sites, reach, remarks)
    write_atomically(family, _family_text(sites, variant, [one.network for _, one in resized.values()]).encode())
    wider = [name for name, (kind, _) in resized.items() if kind == "width"]
    deeper = [name for name, (kind, _) in resized.items() if kind == "depth"]
    latencies = _latencies(family, [BLOCKS, *spaced(wider, _FIRST), *deeper], baseline, budget_s, report)
    with_blocks = latencies.pop(BLOCKS)
    aim = _ratio(with_blocks, variant.name)
    ratios = {name: _ratio(one, name) for name, one in latencies.items()}
    more = between(wider, ratios, aim, most=_THEN)
    if more:
        latencies |= _latencies(family, more, baseline, budget_s / 2, report)
        ratios = {name: _ratio(one, name) for name, one in latencies.items()}
    chosen = []
    for kind, names in (("width", wider), ("depth", deeper)):
        of_kind = {name: ratios[name] for name in names if name in ratios}
        if of_kind:
            name = nearest(of_kind, aim)
            chosen.append(name)
            if not _near(ratios[name], aim):
                remarks.append(
                    f"{baseline.name}: no {kind} takes as long as {variant.name}, x {aim:.3f}; the nearest, {name}, "
                    f"takes x {ratios[name]:.3f}"
                )
    return EqualTime(
        arch=variant.name,
        baseline=baseline.name,
        facts_hash=variant.facts_hash,
        baseline_facts_hash=baseline.facts_hash,
        input_chw=variant.input_chw,
        num_classes=variant.num_classes,
        machine=machine("cpu").name,
        variant=with_blocks,
        tried=tuple(
            Tried(
                network=resized[name][1].network,
                kind=resized[name][0],
                params=resized[name][1].cost.params,
                macs=resized[name][1].cost.macs.all,
                latency=latency,
            )
            for name, latency in latencies.items()
        ),
        chosen=tuple(chosen),
        remarks=tuple(remarks),
    )


def _networks_text(sites: Sites, variant: Variant, networks: Sequence[Network]) -> str:
    """Return the TOML of the baseline and wider and deeper networks."""
    names = shlex.join([sites.original.name, variant.name])
    return family_text(sites, networks, family="equal_time", source=f"selab compare {names} --equal-time")


def _family_text(sites: Sites, variant: Variant, networks: Sequence[Network]) -> str:
    """Return the TOML of everything that is measured: the baseline, the networks, and the variant with its blocks.

    Raises:
        SelabError: the variant is not the baseline with blocks.
    """
    baseline = sites.original
    if variant.se is None or (variant.builder, variant.arguments) != (baseline.builder, baseline.arguments):
        raise SelabError(
            f"--equal-time: {variant.name} is not {baseline.name} with blocks; name such a pair, or leave it out"
        )
    keys = {key: value for key, value in as_keys(variant.se).items() if value is not None}
    named, title = (json.dumps(text) for text in (fixed_address(baseline), variant.title))
    # Texts, numbers, truth values and lists of them are written as in JSON.
    blocks = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return (
        _networks_text(sites, variant, networks)
        + f'\n[variants.{BLOCKS}]\ntitle = {title}\nbaseline = "{ORIGINAL}"\narguments = {{ arch = {named} }}\n'
        + f"se = {{ {blocks} }}\n"
    )


def _latencies(
    family: Path, names: Sequence[str], baseline: Variant, budget_s: float, report: Report
) -> dict[str, Latency]:
    """Return the latency of networks of the family over that of the baseline, all in turns."""
    job = resolve(
        Request(
            arch=f"{family}:{ORIGINAL}",
            phases=("forward",),
            threads=1,
            budget_s=budget_s,
            input_chw=baseline.input_chw,
        )
    )
    found, _ = times(job, [f"{family}:{name}" for name in names], report)
    for name in names:
        if f"{family}:{name}" not in found:
            raise _untimed(name)
    return {name: found[f"{family}:{name}"] for name in names}


def _ratio(latency: Latency, name: str) -> float:
    if latency.ratio is None:
        raise _untimed(name, latency.verdict)
    return latency.ratio


def _untimed(name: str, why: str = "") -> ModelError:
    told = f" ({why})" if why else ""
    return ModelError(f"--equal-time: {name} could not be timed on this machine{told}; try again when it is quieter")
