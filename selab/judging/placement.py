"""Where blocks pay in a network without any: candidates, what they cost and what they bring, as a record."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from selab._version import __version__
from selab.judging.record import read_as
from selab.records.frozen import Frozen
from selab.records.store import Store
from selab.records.types import Latency, lined_json

SCHEMA, FOLDER = "selab.placement/1", "placements"
Quantity = Literal["latency", "params", "macs"]
QUANTITIES: tuple[Quantity, ...] = ("latency", "params", "macs")
Kind = Literal["original", "found", "tried", "last", "all", "width", "depth"]
# A site whose score is below it gets no block, so that a search may use less than the budget.
_LEAST_SCORE = 0.5


class Limit(Frozen, frozen=True, kw_only=True):
    """What a placement may cost, over the network as it is.

    Attributes:
        quantity: what is limited.
        ratio: above 1.
    """

    quantity: Quantity
    ratio: float

    @property
    def words(self) -> str:
        """`latency x 1.02`."""
        return f"{self.quantity} x {self.ratio:g}"


class Site(Frozen, frozen=True, kw_only=True):
    """A place for a block.

    Attributes:
        path: of the site.
        channels: of its map.
        height: of its map, in pixels; `width` likewise.
        params: of the block there.
        macs: of the block, for one image.
        ratio: time of the network with this block alone over that without; None if it was not measured. Sites of one
            shape share the figure of the first.
    """

    path: str
    channels: int
    height: int
    width: int
    params: int
    macs: int
    ratio: float | None = None


class SeedTest(Frozen, frozen=True, kw_only=True):
    """The test of one training.

    Attributes:
        correct: of `images` test images.
    """

    seed: int
    correct: int
    images: int


class Arm(Frozen, frozen=True, kw_only=True):
    """One network that was tried.

    Attributes:
        name: in the TOML of the networks.
        kind: `found` by the search, `tried` in it; blocks in the `last` sites or in `all`; more `width` or `depth`
            instead; or the `original`.
        sites: numbers of the sites with a block.
        params: of the network; `macs` likewise, for one image.
        cost: over the original, in the limit's quantity, as counted or added up; of width and depth as measured.
        held_out_pct: right answers to the training images that were held back, in percent; None without a training.
        stopped: whether its training was ended early, because others were ahead.
        latency: its time over the original's, measured together with the others at the end.
        tests: of the trainings on all training images, on the test images.
    """

    name: str
    kind: Kind
    sites: tuple[int, ...] = ()
    params: int
    macs: int
    cost: float
    held_out_pct: float | None = None
    stopped: bool = False
    latency: Latency | None = None
    tests: tuple[SeedTest, ...] = ()


class Placement(Frozen, frozen=True, kw_only=True):
    """A search for the sites that deserve a block.

    Attributes:
        arch: the network as it is.
        block: of every site, in words.
        data: the images, in words; `data_sha256` their identity.
        recipe: of the trainings; `epochs` of those at the end, `search_epochs` of those that choose.
        held_back: share of the training images that choose.
        trials: networks that the search tried, with those that were ended early.
        runtime: that the times are of; `machine` is where.
        sites: in the order of the network.
        arms: in the order in which they were tried.
        remarks: what must be known.
        complete: whether everything was done that was asked for.
    """

    schema: str = SCHEMA
    selab: str = __version__
    arch: str
    block: str
    data: str
    data_sha256: str
    recipe: str
    epochs: int
    search_epochs: int
    held_back: float
    limit: Limit
    runtime: str
    threads: int
    machine: str
    command: str = ""
    sites: tuple[Site, ...]
    trials: int = 0
    arms: tuple[Arm, ...] = ()
    remarks: tuple[str, ...] = ()
    complete: bool = False

    def arm(self, name: str) -> Arm | None:
        """Return an arm by its name."""
        return next((one for one in self.arms if one.name == name), None)

    @property
    def finalists(self) -> tuple[Arm, ...]:
        """The arms that were trained on all training images."""
        return tuple(one for one in self.arms if one.tests)


def cost_of(sites: Sequence[Site], chosen: Sequence[int], limit: Limit, *, params: int, macs: int) -> float:
    """Return what blocks at some sites cost, over a network without: the blocks' costs added up.

    Args:
        sites: all of them.
        chosen: numbers of sites.
        limit: its quantity is what is counted.
        params: of the network without blocks.
        macs: of the network without blocks, for one image.
    """
    if limit.quantity == "params":
        return 1 + sum(sites[one].params for one in chosen) / params
    if limit.quantity == "macs":
        return 1 + sum(sites[one].macs for one in chosen) / macs
    # Noise may make a block look faster than none.
    return 1 + math.fsum(max(0.0, (sites[one].ratio or 1.0) - 1) for one in chosen)


def fill(scores: Sequence[float], costs: Sequence[float], limit: float) -> tuple[int, ...]:
    """Return the sites that get a block: by descending score, as long as they fit into the limit.

    Args:
        scores: from 0 to 1; below a half there is no block.
        costs: of each block, over the network, above 1.
        limit: of the sum.

    Returns:
        Numbers, ascending.
    """
    left, chosen = limit - 1, []
    for place in sorted(range(len(scores)), key=lambda one: (-scores[one], one)):
        cost = costs[place] - 1
        # One part in a million for rounding.
        if scores[place] >= _LEAST_SCORE and cost <= left + 1e-6:
            chosen.append(place)
            left -= cost
    return tuple(sorted(chosen))


def last_ones(costs: Sequence[float], limit: float) -> list[tuple[int, ...]]:
    """Return the last 1, 2, 4, … sites, and as many of the last as fit into the limit."""
    number, left = 0, limit - 1
    for cost in reversed(costs):
        if cost - 1 > left + 1e-6:
            break
        left -= cost - 1
        number += 1
    counts = {number} | {2**power for power in range(12) if 2**power < number}
    return [tuple(range(len(costs) - one, len(costs))) for one in sorted(counts - {0})]


def front(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Return the arms that no other one beats: none costs no more and answers better, or costs less and as well."""
    there = [one for one in arms if one.held_out_pct is not None and not one.stopped]
    found: list[Arm] = []
    for one in sorted(there, key=lambda one: (one.cost, -(one.held_out_pct or 0))):
        if not found or (one.held_out_pct or 0) > (found[-1].held_out_pct or 0):
            found.append(one)
    return tuple(found)


def best(record: Placement, kind: Kind) -> Arm | None:
    """Return the arm of a kind that answered best, the cheaper one of equals; None if there is none.

    `found` are all with blocks that are within the limit, those of the last sites too.
    """
    limit, every = record.limit.ratio, tuple(range(len(record.sites)))
    there = [
        one
        for one in record.arms
        if one.held_out_pct is not None
        and not one.stopped
        and (
            one.kind == kind
            or (kind == "found" and one.kind in ("tried", "last") and one.sites)
            or (kind == "all" and one.sites == every)
        )
        and (kind not in ("found", "last") or one.cost <= limit + 1e-6)
    ]
    return max(there, key=lambda one: (one.held_out_pct or 0, -one.cost), default=None)


def finalists(record: Placement) -> list[str]:
    """Return the names of the arms to compare at the end: the original, and the best of each kind."""
    kinds: tuple[Kind, ...] = ("original", "found", "last", "all", "width", "depth")
    return list(dict.fromkeys(one.name for kind in kinds if (one := best(record, kind)) is not None))


def differences(arm: Arm, other: Arm) -> list[float]:
    """Return the points of accuracy between two arms, seed by seed, over the seeds that both have."""
    theirs: Mapping[int, SeedTest] = {one.seed: one for one in other.tests}
    return [
        100 * (one.correct / one.images - theirs[one.seed].correct / theirs[one.seed].images)
        for one in arm.tests
        if one.seed in theirs
    ]


def placement_json(placement: Placement) -> bytes:
    """Return a record as the content of a file."""
    return lined_json(placement)


def read_placement(path: Path) -> Placement:
    """Read a record.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    return read_as(path, Placement, schema=SCHEMA, again="place again with `selab place`", mistaken=_mistaken)


def _mistaken(record: Placement) -> Iterator[str]:
    if not record.sites:
        yield "sites: is empty"
    if not 1 < record.limit.ratio < math.inf:
        yield f"limit.ratio: is {record.limit.ratio!r}, expected above 1"
    names = [one.name for one in record.arms]
    if len(set(names)) < len(names):
        yield "arms: two have the same name"
    for place, one in enumerate(record.arms):
        if any(not 0 <= site < len(record.sites) for site in one.sites):
            yield f"arms[{place}].sites: names a site that is not there"
        if one.held_out_pct is not None and not 0 <= one.held_out_pct <= 100:
            yield f"arms[{place}].held_out_pct: is {one.held_out_pct!r}, expected 0 to 100"
        if any(not 0 <= test.correct <= test.images or test.images < 1 for test in one.tests):
            yield f"arms[{place}].tests: has more right answers than images"
        if not 0 < one.cost < math.inf:
            yield f"arms[{place}].cost: is {one.cost!r}, expected above 0"


PLACEMENTS: Store[Placement] = Store(folder=FOLDER, title="placements", command="selab place", read=read_placement)
