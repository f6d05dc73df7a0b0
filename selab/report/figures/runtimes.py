"""Bar chart of what SE costs in the runtimes that ship."""

from collections.abc import Sequence

from selab.errors import RecordError, UnknownNameError, nearest
from selab.models.provenance import name_of
from selab.records import verdict as records_verdict
from selab.records.types import Record
from selab.report.figures.base import LeftOut
from selab.report.figures.tax import TaxBar, TaxBars
from selab.report.runtimes import runtime_words, shown_records


def runtime_bars(records: Sequence[Record], *, archs: Sequence[str] = ()) -> TaxBars:
    """Return what SE adds to each network's time in each runtime and type, the fastest first.

    Args:
        records: of one machine.
        archs: only these networks.

    Raises:
        UnknownNameError: a network without such a record.
        RecordError: there is no record of another runtime, or they are of several machines.
    """
    found = shown_records(records)
    known = list(dict.fromkeys(record.arch for record in found))
    for name in archs:
        if name not in known:
            raise UnknownNameError(f"--arch {name}: has no record of another runtime{nearest(name, known)}")
    found = [record for record in found if not archs or record.arch in archs]
    if not found:
        raise RecordError("plot runtimes: no record of another runtime; measure with `selab profile --runtime NAME`")
    machines = {record.machine.name for record in found}
    if len(machines) > 1:
        raise RecordError(f"plot runtimes: records of {' and '.join(sorted(machines))}; name one machine's folder")
    several = len({record.arch for record in found}) > 1
    bars, left_out = [], []
    for record in found:
        latency, workload = record.latency["forward"], record.workload
        where = f"{runtime_words(record)} {workload.dtype}{', SE in fp32' if workload.float_blocks else ''}"
        name = f"{name_of(record)}, {where}" if several else where
        interval = records_verdict.not_excluded(latency)
        if latency.ratio is None or interval is None:
            left_out.append(LeftOut(name=name, why=records_verdict.TOO_NOISY))
            continue
        tax = latency.ratio - 1 if latency.verdict_kind != "undecided" else None
        bars.append(TaxBar(name=name, tax=tax, interval=interval))
    whose = "networks" if several else name_of(found[0])
    return TaxBars(
        title=f"What SE adds to the time of {whose}, by runtime",
        circumstances=f"batch 1, one thread, {found[0].machine.cpu}; the fastest runtime first",
        bars=tuple(bars),
        least=None,
        left_out=tuple(left_out),
    )
