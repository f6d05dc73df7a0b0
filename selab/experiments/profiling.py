"""Runs the measurers on one variant and its baseline, and makes the record."""

import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import msgspec
from torch import nn

from selab._version import __version__
from selab.bench.latency import RawPhase
from selab.bench.machine import available_cores, machine
from selab.bench.memory import memory
from selab.bench.runner import DTYPES, check_device, mode_of
from selab.cost.count import cost_of, count
from selab.cost.crosscheck import compare
from selab.cost.tracer import trace
from selab.errors import ModelError, RecordError
from selab.experiments.job import Request, pair, plan_of, quick_request, workload_of
from selab.experiments.workers import Failed, Report, build_pair, raw_runs, raw_runs_of_children
from selab.models import catalog
from selab.models.build import Built, build
from selab.models.spec import Variant, pair_hash
from selab.records import verdict
from selab.records.store import record_path
from selab.records.types import SCHEMA, Cost, Insertion, Latency, Machine, Memory, Phase, Record, Workload


class Profile:
    """A profile while it grows; `record()` gives what there is at any moment, an interruption included."""

    def __init__(self, request: Request) -> None:
        check_device(request.device)
        self.request = request
        self.variant, self.baseline = pair(request)
        self.workload = workload_of(request, self.variant)
        self.machine: Machine = machine(request.device)
        self.cost: Cost | None = None
        self.baseline_cost: Cost | None = None
        self.insertions: tuple[Insertion, ...] = ()
        self.latency: dict[Phase, Latency] = {}
        self.latency_all_cores: dict[Phase, Latency] = {}
        self.gpu_methods: dict[Phase, dict[str, Latency]] = {}
        self.memory: Memory | None = None
        self.baseline_memory: Memory | None = None
        self.complete = False

    def path(self, out: Path) -> Path:
        """Where its record goes, under this folder."""
        own = self.baseline == catalog.baseline_of(self.variant)
        return record_path(
            out,
            machine=self.machine.name,
            arch=self.variant.name,
            against=None if own else self.baseline.name,
            workload=self.workload.slug,
        )

    def sites(self) -> tuple[Insertion, ...]:
        """Where blocks go into the variant, before anything is measured."""
        return build(self.variant, device="meta", input_chw=self.workload.input_chw).insertions

    @property
    def measures_all_cores(self) -> bool:
        """Whether a second row on all cores is due: on a CPU, unless the user chose the threads."""
        return self.request.device == "cpu" and self.request.threads is None and self.machine.cores > 1

    def run(self, report: Report) -> None:
        """Counts, then times, then measures memory.

        Raises:
            SelabError: a network cannot be built, fails in inference, or returns NaN. Out of memory, or a failure in
                training, is not raised: the rows that it concerns say so and the rest goes on.
        """
        # What a user's network prints is no part of our output.
        with redirect_stdout(sys.stderr):
            self._run(report)

    def _run(self, report: Report) -> None:
        built, other = build_pair(self.request, self.workload, self.variant, self.baseline)
        self.insertions = built.insertions
        variant, baseline = built.model, other.model
        report("counting", None)
        self.cost = _counted(self.variant, built, self.workload)
        self.baseline_cost = _counted(self.baseline, other, self.workload)
        self._time(variant, baseline, report)
        report("memory", None)
        self.memory = memory(variant, self.workload, seed=self.request.seed)
        self.baseline_memory = memory(baseline, self.workload, seed=self.request.seed)
        self.complete = True

    def _time(self, variant: nn.Module, baseline: nn.Module, report: Report) -> None:
        rows = [(self.workload, self.latency, self.request)]
        if self.measures_all_cores:
            workload = workload_of(self.request, self.variant, threads=self.machine.cores)
            rows.append((workload, self.latency_all_cores, quick_request(self.request)))
        for workload, into, request in rows:
            source = (
                raw_runs(request, workload, variant, baseline, report)
                if request.processes == 1
                else raw_runs_of_children(request, workload, report)
            )
            gathered: dict[tuple[Phase, str], list[RawPhase]] = {}
            for raw in source:
                if isinstance(raw, Failed):
                    into.setdefault(raw.phase, _summary(raw.phase, _method(workload), workload, request, [], raw.error))
                    continue
                both = gathered.setdefault((raw.phase, raw.method), [])
                both.append(raw)
                latency = _summary(raw.phase, raw.method, workload, request, both)
                if raw.method == _method(workload, cold=request.cold):
                    into[raw.phase] = latency
                if workload.device == "cuda":
                    self.gpu_methods.setdefault(raw.phase, {})[raw.method] = latency

    def record(self) -> Record:
        """What has been measured so far.

        Raises:
            RecordError: nothing has.
        """
        if self.cost is None:
            raise RecordError("nothing was measured yet, so nothing is kept")
        return Record(
            schema=SCHEMA,
            selab=__version__,
            kind="profile",
            arch=self.variant.name,
            baseline=self.baseline.name,
            origin=self.variant.file,
            baseline_origin=self.baseline.file,
            facts_hash=pair_hash(self.variant, self.baseline),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.request.command,
            complete=self.complete,
            workload=self.workload,
            machine=self.machine,
            seed=self.request.seed,
            cost=self.cost,
            baseline_cost=self.baseline_cost,
            insertions=self.insertions,
            latency=self.latency,
            latency_all_cores=self.latency_all_cores,
            gpu_methods=self.gpu_methods,
            memory=self.memory,
            baseline_memory=self.baseline_memory,
            warnings=warnings_of(self.cost),
        )


def warnings_of(cost: Cost) -> tuple[str, ...]:
    """What a reader of these costs must know: operators that are not in them, counters that failed."""
    unknown = [
        f"no counting rule for {name} ({calls} calls): not in the totals" for name, calls in cost.unknown.items()
    ]
    failed = [f"{counter.name} failed: {counter.error}" for counter in cost.counters.values() if counter.error]
    return (*unknown, *failed)


def _method(workload: Workload, *, cold: bool = False) -> str:
    if workload.device == "cpu":
        return "wall"
    return "eager_event" if cold else "eager_wall"


def _summary(
    phase: Phase, method: str, workload: Workload, request: Request, raws: list[RawPhase], error: str = ""
) -> Latency:
    plan = plan_of(request, workload)
    return verdict.summarise(
        phase=phase,
        method=method,
        statistic=plan.statistic,
        threads=workload.threads,
        mode=mode_of(phase, workload),
        runs=[raw.run for raw in raws],
        controls=[control for raw in raws for control in raw.controls],
        target_half_width=plan.target_half_width,
        error=error,
    )


def _counted(
    variant: Variant, built: Built, workload: Workload, *, by_module: bool = False, counters: bool = True
) -> Cost:
    """Ours and the other counters; by module only if asked, for that is a hundred kilobytes for a deep network."""
    shape = (workload.batch, *workload.input_chw)
    dtype = DTYPES[workload.dtype]
    model = built.model
    try:
        traced = trace(model, shape, dtype=dtype, se_blocks=built.native, details=counters)
    except ModelError as error:
        raise ModelError(f"{variant.place}: {error}") from error
    cost = cost_of(model, traced)
    return msgspec.structs.replace(
        cost,
        counters=compare(model, shape, dtype=dtype, traced=traced) if counters else {},
        by_module=cost.by_module if by_module else {},
    )


# Below this many networks a second process would not have loaded torch before the first has counted them all.
_PARALLEL_FROM = 24


def counted(names: Iterable[str]) -> dict[str, Cost]:
    """The cost of these variants for one image, without the other counters; many are counted on all cores."""
    chosen = list(names)
    processes = min(available_cores(), 8)
    if len(chosen) < _PARALLEL_FROM or processes < 2:
        return {name: _cost_of_one(name) for name in chosen}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(chosen, pool.map(_cost_of_one, chosen, chunksize=4), strict=True))


def _cost_of_one(name: str) -> Cost:
    variant = catalog.find(name)
    built = build(variant, device="meta")
    return count(built.model, (1, *variant.input_chw), se_blocks=built.native)


def count_record(
    arch: str,
    *,
    batch: int,
    input_chw: tuple[int, int, int] | None = None,
    resolution: int | None = None,
    by_module: bool = False,
    counters: bool = True,
) -> Record:
    """Counts a variant and its baseline, without timing anything; the networks have no memory either (meta device).

    Args:
        arch: a catalog name, or a file and its variant.
        batch: images.
        input_chw: the input, if not that of the facts.
        resolution: height and width, if not those of the input.
        by_module: whether to keep the cost of each module.
        counters: whether to ask the other counters, which takes most of the time.

    Raises:
        SelabError: the network cannot be built, or fails on this input.
    """
    variant = catalog.find(arch)
    baseline = catalog.baseline_of(variant)
    request = Request(arch=arch, batch=batch, input_chw=input_chw, resolution=resolution)
    workload = workload_of(request, variant)
    costs = []
    insertions: tuple[Insertion, ...] = ()
    for one in (variant, baseline):
        if one is None:
            continue
        with redirect_stdout(sys.stderr):
            built = build(one, device="meta", input_chw=workload.input_chw)
            insertions = insertions or built.insertions
            costs.append(_counted(one, built, workload, by_module=by_module, counters=counters))
    return Record(
        schema=SCHEMA,
        selab=__version__,
        kind="count",
        arch=variant.name,
        baseline=None if baseline is None else baseline.name,
        origin=variant.file,
        baseline_origin="" if baseline is None else baseline.file,
        facts_hash=pair_hash(variant, baseline),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=request.command.replace("selab profile", "selab count", 1),
        complete=True,
        workload=workload,
        machine=machine(),
        seed=0,
        cost=costs[0],
        baseline_cost=costs[1] if len(costs) > 1 else None,
        insertions=insertions,
        warnings=warnings_of(costs[0]),
    )
