"""The runs of one or several processes that measured the implementations of a tax."""

from collections.abc import Iterator, Sequence

from selab.bench.interleaved import Pair
from selab.bench.runner import mode_of
from selab.experiments.job import Job
from selab.experiments.placements import so_far
from selab.experiments.tax_record import AGAIN, BASELINE, PLAIN, WITHOUT, TaxPair, words_of
from selab.records import verdict
from selab.records.types import Frozen, Latency, Run


class TaxFound(Frozen, frozen=True, kw_only=True):
    """What one process found.

    Attributes:
        runs: (method, baseline, variant, run), the headline's method first.
        failed: (method, network, why it is not among them).
        saved: bytes that each network saves for its backward pass.
        remarks: network -> how it was changed.
    """

    runs: tuple[tuple[str, str, str, Run], ...]
    failed: tuple[tuple[str, str, str], ...]
    saved: dict[str, int]
    remarks: dict[str, str]


class Gathered:
    """The findings so far.

    Args:
        job: what is measured.
        pairs: that are to be measured.

    Attributes:
        saved: as in `TaxFound`, of the first process that found it; `remarks` likewise.
        deaths: what is to be said of processes that died.
    """

    def __init__(self, *, job: Job, pairs: Sequence[Pair]) -> None:
        self.job, self.pairs = job, list(pairs)
        self.saved: dict[str, int] = {}
        self.remarks: dict[str, str] = {}
        self.deaths: list[str] = []
        self._runs: dict[str, dict[Pair, dict[int, Run]]] = {}
        self._failed: dict[tuple[str, str], tuple[int, str]] = {}

    def add(self, process: int, found: TaxFound) -> None:
        """Keep what a process found."""
        for method, baseline, variant, run in found.runs:
            self._runs.setdefault(method, {}).setdefault((baseline, variant), {})[process] = run
        for method, name, why in found.failed:
            self._failed.setdefault((method, name), (process, why))
        self.saved = {**found.saved, **self.saved}
        self.remarks = {**found.remarks, **self.remarks}

    def drop(self, process: int, remark: str) -> None:
        """Leave out a process that died."""
        self.deaths.append(remark)
        for pairs in self._runs.values():
            for runs in pairs.values():
                runs.pop(process, None)
        self._failed = {where: (at, why) for where, (at, why) in self._failed.items() if at != process}

    @property
    def processes(self) -> int:
        """The number of processes whose findings are here."""
        return len({process for pairs in self._runs.values() for runs in pairs.values() for process in runs})

    def has_failed(self, name: str) -> bool:
        """Return whether a network failed."""
        return any(failed == name for _, failed in self._failed)

    def summaries(self) -> Iterator[TaxPair]:
        """Yield the figures of every pair, method by method."""
        for method in self._runs:
            for pair in self.pairs:
                yield TaxPair(baseline=pair[0], variant=pair[1], latency=self._latency(method, pair))

    def words(self) -> str:
        """Return the figures of the implementations in a few words: `reference +12 % [11, 13], fused about +3 %`."""
        for method in self._runs:
            left_out = {AGAIN, PLAIN, *WITHOUT.values()}
            shown = [pair for pair in self.pairs if pair[0] == BASELINE and pair[1] not in left_out]
            return ", ".join(f"{words_of(pair[1])} {so_far(self._latency(method, pair))}" for pair in shown)
        return "measuring"

    def _latency(self, method: str, pair: Pair) -> Latency:
        request, plan, workload = self.job.request, self.job.plan, self.job.workload
        phase = request.phases[0]
        runs = list(self._runs[method].get(pair, {}).values())
        controls = list(self._runs[method].get((BASELINE, AGAIN), {}).values())
        why = [self._failed[method, name][1] for name in pair if (method, name) in self._failed]
        return verdict.summarise(
            phase=phase,
            method=method,
            statistic=plan.statistic,
            threads=workload.threads,
            mode=mode_of(phase, workload),
            runs=runs,
            controls=controls if runs else [],
            target_half_width=plan.target_half_width,
            error=why[0] if why else "",
            unit="pair" if request.in_this_process else "process",
        )
