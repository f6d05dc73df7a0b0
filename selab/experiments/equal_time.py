"""Spend the time of a variant's blocks otherwise: make its baseline wider, or deeper, until it is as slow.

The networks alternate in fresh processes: baseline, variant, and wider and deeper baselines. Of each kind the one
nearest to the variant's time is taken, if it is near. What was measured is kept, so that a comparison that goes on
later, or on another machine, trains the same networks.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    deeper,
    family_text,
    ratio_of,
    widths,
    widths_between,
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
# Networks have at first up to so many times the MACs that the blocks add, and at least so many: blocks are slower than
# their MACs. Where all are faster than the variant, the reach grows by the last factor.
_REACH, _LEAST_REACH, _FURTHER = 4.0, 0.5, 4.0
# So many are measured at first, then in so many turns so many more: between the two nearest ones, or larger ones.
_FIRST, _FIRST_DEEPER, _TURNS, _THEN = 6, 4, 3, 4
# There are so many in all; the deepest one has so many blocks more.
_MOST_WIDTHS, _MOST_DEEPER = 60, 30
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
        chosen: names of those that are as slow as the variant, at most one of each kind.
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
    low, high = neighbours(ordered, ratios, aim)
    return spaced([name for name in ordered[low + 1 : high] if name not in ratios], most)


def neighbours(ordered: Sequence[str], ratios: Mapping[str, float], aim: float) -> tuple[int, int]:
    """Return the places of the last measured network that is no slower than an aim, and of the next one that is.

    Where there is none: -1, and the number of networks. Arguments as of `between`.
    """
    known = [place for place, name in enumerate(ordered) if name in ratios]
    low = max((place for place in known if ratios[ordered[place]] <= aim), default=-1)
    high = min((place for place in known if place > low and ratios[ordered[place]] > aim), default=len(ordered))
    return low, high


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

    With each comes a line with the times of both over the baseline's.

    Measured is the forward pass of one image on one thread of the CPU, in PyTorch.

    Args:
        variant: with blocks, fitted to the images.
        baseline: without them, fitted likewise.
        out: the folder of all results; the networks go into a TOML in it, and what was measured beside that.
        budget_s: seconds of measuring; half as many may follow, up to three times.
        report: called with what is done.
        say: called with each remark.

    Raises:
        SelabError: a network cannot be measured; none takes as long; what lies there cannot be read.
    """
    path = out / "equal-time" / f"{file_name(f'{variant.name}-vs-{baseline.name}')}.json"
    family = path.with_suffix(".toml")
    found = _there(path, variant, baseline)
    if found is None:
        found = _measured(variant, baseline, family, budget_s=budget_s, report=report)
        write_atomically(path, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    networks = [one.network for one in found.tried if one.network.name in found.chosen]
    if not networks:
        raise SelabError(
            f"--equal-time: {'; '.join(found.remarks)}; compare without it, or delete {path} to measure again"
        )
    write_atomically(family, _networks_text(_sites(baseline), variant, networks).encode())
    made = read_family(family)
    for remark in found.remarks:
        say(remark)
    return [(made[one.name], times_words(found, one.name)) for one in networks]


def times_words(found: EqualTime, name: str) -> str:
    """Return both networks' times over the baseline's, for those who read only the comparison."""
    latency = next(one.latency for one in found.tried if one.network.name == name)
    each = [f"{network} {_over(one)}" for network, one in ((name, latency), (found.arch, found.variant))]
    return f"forward pass of one image, over {found.baseline}'s: {', '.join(each)}"


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


class _Search:
    """The wider and deeper networks of a pair: those that may be measured, and the times of those that were.

    Args:
        variant: with blocks.
        sites: of the baseline.
        family: the TOML of all networks, which the processes that measure read.
        report: called with what is done.

    Attributes:
        remarks: why there is nothing of a kind.
        latencies: of each network that was measured, the variant's under `BLOCKS`.
    """

    def __init__(self, variant: Variant, sites: Sites, family: Path, report: Report) -> None:
        self.remarks: list[str] = []
        self.latencies: dict[str, Latency] = {}
        self._variant, self._sites, self._family, self._report = variant, sites, family, report
        self._found: dict[Kind, dict[str, Resized]] = {"width": {}, "depth": {}}
        own = count(build(variant, device="meta").model, (1, *variant.input_chw))
        reach = max(_LEAST_REACH, _REACH * (ratio_of(own, sites.cost, "macs") - 1))
        self._reach: dict[Kind, float] = dict.fromkeys(self._found, reach)

    def look(self) -> None:
        """Find the first networks of both kinds.

        Raises:
            SelabError: the variant is not the baseline with blocks, or there is neither a wider nor a deeper network.
        """
        baseline = self._sites.original
        try:
            self._reached("width")
        except ModelError as error:
            self.remarks.append(str(error))
        self._reached("depth")
        if not self._found["depth"]:
            self.remarks.append(f"{baseline.name}: no block keeps the shape of its map, so that none runs once more")
        if not self.kinds:
            raise SelabError(
                f"--equal-time: {baseline.name} can be made neither wider nor deeper: {'; '.join(self.remarks)}"
            )

    def _reached(self, kind: Kind) -> None:
        """Add the networks of a kind within its reach."""
        reach = 1 + self._reach[kind]
        if kind == "width":
            self._add(kind, widths(self._sites, reach, "macs", most=_MOST_WIDTHS))
        else:
            self._add(kind, deeper(self._sites, reach, most=_MOST_DEEPER))

    def _add(self, kind: Kind, networks: Sequence[Resized]) -> None:
        """Add networks whose like is not there under another name."""
        there = {(one.cost.params, one.cost.macs.all) for one in self._found[kind].values()}
        self._found[kind] |= {
            one.network.name: one for one in networks if (one.cost.params, one.cost.macs.all) not in there
        }

    @property
    def kinds(self) -> list[Kind]:
        """Return the kinds that there are networks of."""
        return [kind for kind, found in self._found.items() if found]

    def network(self, name: str) -> tuple[Kind, Resized]:
        """Return a network and its kind."""
        return next((kind, found[name]) for kind, found in self._found.items() if name in found)

    def ordered(self, kind: Kind) -> list[str]:
        """Return the networks of a kind, the cheapest first."""
        found = self._found[kind]
        return sorted(found, key=lambda name: found[name].cost.macs.all)

    def ratios(self, kind: Kind) -> dict[str, float]:
        """Return the times of the networks of a kind that were measured, over the baseline's."""
        return {name: _ratio(self.latencies[name], name) for name in self.ordered(kind) if name in self.latencies}

    def more(self, kind: Kind, aim: float) -> list[str]:
        """Return what to measure next: between the two networks around a time, or beyond the slowest one."""
        ratios = self.ratios(kind)
        if max(ratios.values()) < aim:
            largest = max(map(self.cost, ratios))
            self._reach[kind] *= _FURTHER
            with suppress(ModelError):  # none of the larger numbers of channels fit each other
                self._reached(kind)
            return spaced([name for name in self.ordered(kind) if self.cost(name) > largest], _THEN)
        found = between(self.ordered(kind), ratios, aim, most=_THEN)
        if not found and kind == "width":
            self._add(kind, self._finer(ratios, aim))
            found = between(self.ordered(kind), ratios, aim, most=_THEN)
        return found

    def _finer(self, ratios: Mapping[str, float], aim: float) -> list[Resized]:
        """Return widths between the two around a time."""
        found = [self._found["width"][name].network.width for name in self.ordered("width")]
        low, high = neighbours(self.ordered("width"), ratios, aim)
        if high == len(found):
            return []
        return widths_between(self._sites, found[low] if low >= 0 else 1.0, found[high], most=_THEN)

    def cost(self, name: str) -> float:
        """Return the MACs of a network over those of the baseline."""
        return ratio_of(self.network(name)[1].cost, self._sites.cost, "macs")

    def measure(self, names: Sequence[str], budget_s: float) -> None:
        """Measure networks in turns with the baseline.

        Raises:
            SelabError: one cannot be measured.
        """
        networks = [found[name].network for kind, found in self._found.items() for name in self.ordered(kind)]
        text = _family_text(self._sites, self._variant, networks)
        write_atomically(self._family, text.encode())
        self.latencies |= _latencies(self._family, names, self._sites.original, budget_s, self._report)


def _measured(variant: Variant, baseline: Variant, family: Path, *, budget_s: float, report: Report) -> EqualTime:
    search = _Search(variant, _sites(baseline), family, report)
    search.look()
    first = {"width": _FIRST, "depth": _FIRST_DEEPER}
    search.measure(
        [BLOCKS, *(one for kind in search.kinds for one in spaced(search.ordered(kind), first[kind]))], budget_s
    )
    with_blocks = search.latencies.pop(BLOCKS)
    aim = _ratio(with_blocks, variant.name)
    for turn in range(_TURNS):
        names = []
        for kind in search.kinds:
            ratios = search.ratios(kind)
            # What is near already may still be nearer; once is enough.
            if not turn or not _near(ratios[nearest(ratios, aim)], aim):
                names += search.more(kind, aim)
        if not names:
            break
        search.measure(names, budget_s / 2)
    chosen, remarks = [], search.remarks
    for kind in search.kinds:
        ratios = search.ratios(kind)
        name = nearest(ratios, aim)
        if _near(ratios[name], aim):
            chosen.append(name)
            continue
        tried = f"of {len(ratios)} tried, up to x {max(map(search.cost, ratios)):.2f} of the MACs"
        remarks.append(
            f"{baseline.name}: {tried}, no {kind} takes as long as {variant.name}, x {aim:.3f}; the nearest, {name}, "
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
        tried=tuple(_tried(search, name) for kind in search.kinds for name in search.ratios(kind)),
        chosen=tuple(chosen),
        remarks=tuple(remarks),
    )


def _tried(search: _Search, name: str) -> Tried:
    kind, one = search.network(name)
    return Tried(
        network=one.network,
        kind=kind,
        params=one.cost.params,
        macs=one.cost.macs.all,
        latency=search.latencies[name],
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
