"""The networks that a placement tries, as a family in a TOML: blocks at some sites, or more width or depth instead."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from selab.attention.config import as_keys
from selab.attention.sites import declared_groups
from selab.cost.count import count
from selab.errors import ModelError, SelabError
from selab.experiments.job import network_address
from selab.judging.placement import Site
from selab.models import catalog, resized
from selab.models.build import build
from selab.models.provenance import address, fixed_address
from selab.models.spec import Variant, read_family
from selab.records.files import write_atomically
from selab.records.types import Cost
from selab.units import counted

ORIGINAL = "original"
# More than these steps of width are not tried.
_STEPS, _MOST_WIDTH = 60, 4.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of the family.

    Attributes:
        name: of its table.
        title: for tables.
        sites: paths of the sites with a block.
        width: as `selab.models.resized.network` takes it; `repeat` likewise.
    """

    name: str
    title: str
    sites: tuple[str, ...] = ()
    width: float = 1.0
    repeat: str = ""


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The sites of a network.

    Attributes:
        original: the network without blocks, for the classes and the size of the images.
        block: the configuration of a block, without its sites.
        found: the sites, in the order of the network.
        cost: of the network without blocks, one image.
    """

    original: Variant
    block: dict[str, Any]
    found: tuple[Site, ...]
    cost: Cost

    @property
    def words(self) -> str:
        """The block in words: `se, reduction 16`."""
        told = ("reduction", "latent_channels", "placement")
        parts = [str(self.block.get("block", "se")), *(f"{key} {self.block[key]}" for key in told if key in self.block)]
        return ", ".join(parts)


def sites_of(original: Variant, *, se: str | None, insert: Sequence[str]) -> Sites:
    """Return the sites of a network and the block that each of them may get.

    By default those of the network's own SE variant in the catalog; else its first group of sites, or those that are
    found by tracing.

    Args:
        original: without blocks, fitted to the images.
        se: changes of the block, as `--se` takes them.
        insert: sites, as `--insert` takes them.

    Raises:
        SelabError: it has blocks already, or a site cannot get one.
    """
    if original.se is not None:
        raise SelabError(f"{original.name}: has attention blocks already; name its baseline, {original.baseline}")
    named = address(original.name, original.file)
    bare = build(original, device="meta").model
    own = [one for one in catalog.installed().values() if one.baseline == original.name and one.se is not None]
    if own and not insert:
        # `se_mobilenet` before other variants.
        chosen = next((one for one in own if one.name == f"se_{original.name}"), own[0])
        with_all = catalog.find(network_address(chosen.name, se))
    else:
        groups = declared_groups(bare)
        given = tuple(insert) or (next(iter(groups), "auto"),)
        with_all = catalog.find(network_address(named, se, given))
    config = with_all.se
    assert config is not None
    with_all = msgspec.structs.replace(with_all, num_classes=original.num_classes, input_chw=original.input_chw)
    insertions = build(with_all, device="meta").insertions
    left_out = ("sites", "stages")
    keys = {key: value for key, value in as_keys(config).items() if key not in left_out and value is not None}
    return Sites(
        original=original,
        block=keys,
        found=tuple(
            Site(
                path=one.path,
                channels=one.channels,
                height=one.height,
                width=one.width,
                params=one.params,
                macs=one.macs,
            )
            for one in insertions
        ),
        cost=count(bare, (1, *original.input_chw)),
    )


# ------------------------------------------------------------------------------------------------------------- the TOML
def write_networks(sites: Sites, networks: Sequence[Network], path: Path) -> dict[str, Variant]:
    """Write the family of networks of `selab place` and return its variants, the original among them.

    Raises:
        RecordError: the file cannot be written.
    """
    text = family_text(sites, networks, family="placed", source=f"selab place --arch {sites.original.name}")
    write_atomically(path, text.encode())
    return read_family(path)


def family_text(sites: Sites, networks: Sequence[Network], *, family: str, source: str) -> str:
    """Return the TOML of some networks, the original first.

    Args:
        sites: of the original.
        networks: the others.
        family: its name.
        source: the command that chose them.
    """
    original = sites.original
    named = json.dumps(fixed_address(original))
    text = (
        f"family = {json.dumps(family)}\nsource = {json.dumps(source)}\n"
        f'builder = "{resized.BUILDER}"\n'
        f"input_chw = [{', '.join(map(str, original.input_chw))}]\nnum_classes = {original.num_classes}\n"
    )
    for one in (Network(name=ORIGINAL, title=f"{original.name} as it is"), *networks):
        more = f", width = {one.width!r}" if one.width > 1 else ""
        more += f", repeat = {json.dumps(one.repeat)}" if one.repeat else ""
        text += f"\n[variants.{one.name}]\ntitle = {json.dumps(one.title)}\narguments = {{ arch = {named}{more} }}\n"
        text += f'baseline = "{ORIGINAL}"\n' if one.name != ORIGINAL else ""
        if one.sites:
            keys = {"sites": list(one.sites), **sites.block}
            text += f"se = {{ {', '.join(f'{key} = {_toml(value)}' for key, value in keys.items())} }}\n"
    return text


def _toml(value: object) -> str:
    # Texts, numbers, truth values and lists of them are written as in JSON.
    return json.dumps(value)


# -------------------------------------------------------------------------------------------------- width and depth
@dataclass(frozen=True, kw_only=True)
class Resized:
    """A wider or deeper network, and its cost."""

    network: Network
    cost: Cost


def widths(sites: Sites, ratio: float, quantity: str, *, most: int) -> list[Resized]:
    """Return wider networks around a cost, the cheapest first: of all different ones those nearest to it.

    Args:
        sites: of the network.
        ratio: of MACs or parameters, over those of the network.
        quantity: `params`, or else MACs are compared.
        most: so many.

    Raises:
        ModelError: the network cannot be made wider.
    """
    original = sites.original
    model = build(original, device="meta").model
    found: dict[tuple[int, int], Resized] = {}
    step = max(0.005, (ratio - 1) / 8)
    width, failure = 1.0, None
    for _ in range(_STEPS):
        width = round(width + step, 4)
        try:
            one = copy_resized(model, original, width)
        except ModelError as error:
            # Some numbers of channels do not fit each other, where maps are put one behind another.
            failure = error
            continue
        key = (one.cost.params, one.cost.macs.conv_linear)
        if key != (sites.cost.params, sites.cost.macs.conv_linear):
            found.setdefault(key, one)
        if width > _MOST_WIDTH or ratio_of(one.cost, sites.cost, quantity) > 1 + 3 * (ratio - 1):
            break
    if failure is not None and not found:
        raise failure
    near = sorted(found.values(), key=lambda one: abs(ratio_of(one.cost, sites.cost, quantity) - ratio))[:most]
    return sorted(near, key=lambda one: one.network.width)


def widths_between(sites: Sites, low: float, high: float, *, most: int) -> list[Resized]:
    """Return networks between two widths, evenly spaced; those whose numbers of channels do not fit are left out."""
    model = build(sites.original, device="meta").model
    found = []
    for step in range(1, most + 1):
        width = round(low + (high - low) * step / (most + 1), 4)
        with suppress(ModelError):
            found.append(copy_resized(model, sites.original, width))
    return found


def copy_resized(model: torch.nn.Module, original: Variant, width: float) -> Resized:
    """Return a wider network with its cost; the model is not changed."""
    twin = resized.wider_twin(model, width, original.input_chw, name=original.name)
    name = f"width_{width:g}".replace(".", "_")
    network = Network(name=name, title=f"{original.name}, {width:g} times as wide", width=width)
    return Resized(network=network, cost=count(twin, (1, *original.input_chw)))


def repeats(sites: Sites, ratio: float, quantity: str, *, most: int) -> list[Resized]:
    """Return networks with a block once more, the cheapest first: those nearest to a cost.

    Args:
        sites: of the network.
        ratio: as of `widths`, with `quantity` and `most`.
        quantity: `params`, or else MACs are compared.
        most: so many.
    """
    original = sites.original
    model = build(original, device="meta").model
    found: dict[tuple[int, int], Resized] = {}
    for path in resized.repeatable(model, original.input_chw, name=original.name):
        again = resized.repeated(build(original, device="meta").model, path)
        cost = count(again, (1, *original.input_chw))
        name = "repeat_" + path.replace(".", "_")
        network = Network(name=name, title=f"{original.name}, {path} once more", repeat=path)
        # Of blocks of one cost the last: the deepest one.
        found[cost.params, cost.macs.conv_linear] = Resized(network=network, cost=cost)
    near = sorted(found.values(), key=lambda one: abs(ratio_of(one.cost, sites.cost, quantity) - ratio))[:most]
    return sorted(near, key=lambda one: ratio_of(one.cost, sites.cost, quantity))


def deeper(sites: Sites, reach: float, *, most: int) -> list[Resized]:
    """Return networks with one block more, two blocks more, and so on: those of all stages in turn.

    Args:
        sites: of the network.
        reach: the last one has more than so many times the MACs.
        most: so many blocks.
    """
    original = sites.original
    model = build(original, device="meta").model
    paths = [one.network.repeat for one in repeats(sites, 1.0, "macs", most=most)]
    # Whole blocks, not layers of a block that cannot run again as a whole.
    paths = [path for path in paths if path.count(".") == min(each.count(".") for each in paths)]
    found: list[Resized] = []
    for number in range(1, most + 1 if paths else 1):
        chosen = [paths[place % len(paths)] for place in range(number)]
        model = resized.repeated(model, chosen[-1])
        title = f"{original.name}, {counted(number, 'block')} more"
        network = Network(name=f"deeper_{number}", title=title, repeat="+".join(chosen))
        found.append(Resized(network=network, cost=count(model, (1, *original.input_chw))))
        if ratio_of(found[-1].cost, sites.cost, "macs") > reach:
            break
    return found


def ratio_of(cost: Cost, other: Cost, quantity: str) -> float:
    """Return the parameters of a network over those of another one, or else the MACs."""
    if quantity == "params":
        return cost.params / other.params
    return cost.macs.all / other.macs.all


def dearest(ratios: Mapping[str, float], limit: float) -> str:
    """Return the name of the largest ratio within a limit; of the smallest of all where none is."""
    within = {name: ratio for name, ratio in ratios.items() if ratio <= limit}
    return max(within, key=lambda name: within[name]) if within else min(ratios, key=lambda name: ratios[name])


def shapes(sites: Sequence[Site]) -> dict[tuple[int, int, int, int], list[int]]:
    """Return the numbers of the sites of each shape of map and block."""
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for place, one in enumerate(sites):
        found.setdefault((one.channels, one.height, one.width, one.params), []).append(place)
    return found


def with_ratios(sites: Sequence[Site], ratios: Mapping[int, float]) -> tuple[Site, ...]:
    """Return sites with the measured ratio of the first one of their shape."""
    found = list(sites)
    for places in shapes(sites).values():
        for place in places:
            found[place] = msgspec.structs.replace(sites[place], ratio=ratios[places[0]])
    return tuple(found)
