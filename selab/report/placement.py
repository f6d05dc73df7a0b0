"""Which sites deserve a block, and whether more width or depth would have been the better use of the same cost."""

from selab import units
from selab.judging.placement import Arm, Placement, best, differences, finalists, front
from selab.records import stats
from selab.records.verdict import change_words
from selab.report.table import Table
from selab.training.verdict import judge
from selab.units import NONE


def placement_tables(record: Placement) -> list[Table]:
    """Return the sites with their costs, and the networks that were compared."""
    return [_sites(record), _arms(record)]


def verdict_of(record: Placement) -> list[str]:
    """Return in sentences whether the blocks that were found beat the network as it is, and other uses of the cost."""
    found, said = best(record, "found"), []
    if found is None or not found.tests:
        return []
    for name in finalists(record):
        other = record.arm(name)
        if other is None or other.name == found.name or not other.tests:
            continue
        said.append(
            f"placed against {_words(other, record)}: {judge('placed', 'top1', differences(found, other)).text}"
        )
    return said


def _sites(record: Placement) -> Table:
    found = best(record, "found")
    chosen = set(found.sites) if found is not None else set()
    timed = record.limit.quantity == "latency"
    how = f"in {record.runtime}, {units.counted(record.threads, 'thread')}"
    rows = []
    for place, one in enumerate(record.sites):
        ratio = units.percent(one.ratio - 1) if one.ratio is not None else NONE
        rows.append(
            (
                "✓" if place in chosen else "",
                str(place),
                one.path,
                f"{one.channels}×{one.height}×{one.width}",
                units.count(one.params),
                units.count(one.macs),
                *([ratio] if timed else []),
            )
        )
    return Table(
        title=f"Sites of {record.arch} for a block ({record.block})",
        columns=("placed", "site", "path", "map", "parameters", "MACs", *(["adds to the time"] if timed else [])),
        rows=tuple(rows),
        notes=(
            f"✓: the best that was found within {record.limit.words}.",
            *([f"Time: one block alone, once for each shape of map, {how}."] if timed else []),
        ),
        words=frozenset({0, 2}),
    )


def _arms(record: Placement) -> Table:
    ends = finalists(record)
    on_front = {one.name for one in front(record.arms)}
    shown = [one for one in record.arms if one.name in ends or one.name in on_front]
    found = best(record, "found")
    rows = []
    for one in sorted(shown, key=lambda one: one.cost):
        tests = [100 * test.correct / test.images for test in one.tests]
        mean = NONE if not tests else f"{stats.mean(tests):.2f} %"
        if len(tests) > 1:
            mean = f"{stats.mean(tests):.2f} ± {stats.sample_deviation(tests):.2f} %"
        rows.append(
            (
                f"{_words(one, record)}{' (placed)' if found is not None and one.name == found.name else ''}",
                f"× {one.cost:.4f}",
                NONE if one.latency is None else change_words(one.latency),
                units.count(one.params),
                units.count(one.macs),
                NONE if one.held_out_pct is None else f"{one.held_out_pct:.2f} %",
                mean,
                "front" if one.name in on_front else "",
            )
        )
    trained = sum(one.kind == "tried" for one in record.arms)
    stopped = sum(one.stopped for one in record.arms)
    return Table(
        title=f"{record.arch} under {record.limit.words}, {record.data}",
        columns=("network", record.limit.quantity, "time", "parameters", "MACs", "held out", "test", ""),
        rows=tuple(rows),
        notes=(
            f"{record.limit.quantity}: over the original, added up from the sites; of width and depth as "
            f"{'measured' if record.limit.quantity == 'latency' else 'counted'}. Time: measured side by side, "
            f"{record.runtime}, with a 95 % interval.",
            f"Held out: of {100 * record.held_back:g} % of the training images, after "
            f"{units.counted(record.search_epochs, 'epoch')} on the others, one seed. Test: after "
            f"{units.counted(record.epochs, 'epoch')} on all training images, mean and deviation of the seeds.",
            f"The search tried {units.counted(trained, 'other network')}; {stopped} were ended early.",
            "front: no other network costs as little and answers as well.",
            *verdict_of(record),
            *_warnings(record),
            *record.remarks,
        ),
        words=frozenset({0, 7}),
        drop_first=(4, 3, 7),
    )


def _warnings(record: Placement) -> list[str]:
    """Return in sentences what the figures alone may hide."""
    found, limit, said = best(record, "found"), record.limit.ratio, []
    if found is not None and found.kind == "last":
        said.append("The search found nothing better than blocks at the last sites.")
    if found is not None and found.latency is not None and record.limit.quantity != "latency":
        ratio = found.latency.ratio
        if ratio is not None and ratio - 1 > _MANY_TIMES * (limit - 1):
            said.append(
                f"Within the {record.limit.quantity}, and {units.percent(ratio - 1)} in time; --budget latency=RATIO "
                "limits that."
            )
    far = [one for one in record.arms if one.kind in ("width", "depth") and one.cost - 1 < _NEAR * (limit - 1)]
    nearer = "is nearer to the limit, and within it"
    return said + [f"{one.name}: costs × {one.cost:.4f}; no more {one.kind} {nearer}." for one in far]


# Over the limit in another quantity, and of the limit, from where on that is said.
_MANY_TIMES, _NEAR = 2, 0.5


def _words(arm: Arm, record: Placement) -> str:
    if arm.kind == "original":
        return "as it is"
    if arm.kind in ("width", "depth"):
        return f"more {arm.kind}: {arm.name}"
    if arm.kind == "all" or len(arm.sites) == len(record.sites):
        return f"all {len(record.sites)} blocks"
    number = units.counted(len(arm.sites), "block")
    if arm.sites == tuple(range(len(record.sites) - len(arm.sites), len(record.sites))):
        return f"the last {number}"
    return f"{number}: {', '.join(map(str, arm.sites))}" if arm.sites else "no block"
