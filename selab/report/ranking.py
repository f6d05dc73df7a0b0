"""What each block is worth beside what it costs: one row a block, those to take out first at the top."""

from selab import units
from selab.judging.loss import Loss
from selab.judging.ranking import BlockWorth, Ranking
from selab.records.types import Latency
from selab.records.verdict import change_words
from selab.report.table import Table
from selab.units import NONE


def ranking_table(record: Ranking) -> Table:
    """Return the table of a network's blocks, the least worth of the dearest first."""
    timed = any(one.latency is not None for one in record.blocks)
    labelled = any(one.loss_mean is not None for one in record.blocks)
    lost = ("lost at its mean", "lost at one") if labelled else ("change at its mean", "change at one")
    columns = ("block", *lost, *(("without it",) if timed else ()), "parameters", "MACs, all", "bytes", "")
    front = record.front
    ordered = sorted(record.blocks, key=lambda one: (one.path not in front, one.worth, -_price(one)))
    where = f"; times in {record.runtime}, {units.counted(record.threads, 'thread')}" if timed else ""
    notes = [
        "Lost: points of accuracy without the gate, over the same images; in brackets 95 % intervals."
        if labelled
        else "Change: the largest change of an output without the gate, over the network's largest output.",
        *(["Without it: time of the network without the block over that with all blocks."] if timed else []),
        f"*: on the Pareto front: no other block is worth less and {'takes more time' if timed else 'moves more bytes'}"
        f"{'; without those whose time is n.s' if timed else ''}. Take out those first that lose nothing.",
        *record.remarks,
    ]
    return Table(
        title=f"The blocks of {record.arch} on {units.counted(record.images, 'image')} of {record.data}{where}",
        columns=columns,
        rows=tuple(_row(one, record, timed=timed, labelled=labelled) for one in ordered),
        notes=tuple(notes),
        words=frozenset({0}),
        drop_first=(len(columns) - 2, len(columns) - 3, 2),
    )


def _price(one: BlockWorth) -> float:
    return one.saved if one.saved is not None else float(one.bytes)


def _row(one: BlockWorth, record: Ranking, *, timed: bool, labelled: bool) -> tuple[str, ...]:
    lost = (
        (_loss(one.loss_mean), _loss(one.loss_one)) if labelled else (f"{one.error_mean:.2g}", f"{one.error_one:.2g}")
    )
    return (
        one.path,
        *lost,
        *((_time(one.latency),) if timed else ()),
        units.count(one.params),
        units.count(one.macs),
        units.size(one.bytes),
        "*" if one.path in record.front else "",
    )


def _loss(loss: Loss | None) -> str:
    return NONE if loss is None else f"{loss.points:.2f} [{loss.low:.2f}, {loss.high:.2f}]"


def _time(latency: Latency | None) -> str:
    return NONE if latency is None else change_words(latency)
