"""Count and measure one variant against its baseline, and make the record."""

import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import nn

from selab import units
from selab._version import __version__
from selab.bench.backends import backend, together
from selab.bench.energy import ENERGY_PHASES, EnergyMeter, energy_meter
from selab.bench.machine import CpuReading, available_cores, machine, read_cpu
from selab.bench.memory import memory
from selab.bench.progress import Report
from selab.bench.runner import DTYPES, check_device
from selab.bench.sampler import Clock
from selab.cost.count import cost_of, count
from selab.cost.crosscheck import compare
from selab.cost.tracer import op_trace
from selab.deploy.target import FIXED_THREADS, scratch
from selab.errors import DeviceError, ModelError, RecordError
from selab.experiments import workers
from selab.experiments.children import Found, Started, Turn, in_processes
from selab.experiments.exporting import exported, is_exported
from selab.experiments.job import Job, Request, resolve
from selab.experiments.placements import Placements, method_of, summary
from selab.experiments.schedule import Schedule, effort_of, expectation
from selab.experiments.workers import Failed, Placed, WorkerJob, build_pair, raw_runs
from selab.graphs.module import OnnxNetwork
from selab.models import catalog
from selab.models.build import Built, build
from selab.models.inputs import example_of
from selab.models.spec import Variant, pair_hash
from selab.records.energy import summarise as summarise_energy
from selab.records.types import (
    PHASE_NAMES,
    SCHEMA,
    Cost,
    Energy,
    Insertion,
    Latency,
    Machine,
    Memory,
    Phase,
    Record,
    Workload,
)

if TYPE_CHECKING:
    from selab.bench.latency import RawPhase
    from selab.meta import Example
    from selab.records.exported import Exported


COUNTED = "counted"
"""The label that is reported when the counted costs are there."""
# Of a run in this process, in seconds; on a GPU it takes more for the fewest samples with an interval.
_LEAST_SAMPLING_S = {"cpu": 0.05, "cuda": 0.8}
# So many seconds more than the budget are said.
_NOTEWORTHY_S = 2.0


def sites_of(job: Job) -> tuple[Insertion, ...]:
    """Return the blocks that a job's variant gets; nothing is measured."""
    with redirect_stdout(sys.stderr):
        return build(job.variant, device="meta", input_chw=job.workload.input_chw).insertions


class Profile:
    """A profile while it grows; `record()` returns what has been measured, also after an interruption.

    Args:
        job: what to measure.
        clock: seconds, monotone.
        began: when the command began, by the clock; its time budget counts from there.

    Raises:
        SpecError: the job has no baseline.
        DeviceError: the device is not there.
    """

    def __init__(self, job: Job, *, clock: Clock = time.monotonic, began: float | None = None) -> None:
        check_device(job.workload.device, job.workload.dtype, runtime=job.workload.runtime)
        self.job = job
        # The same two networks, in the files of another runtime.
        self._measured = job
        self.variant, self.baseline = job.pair
        self.machine: Machine = machine(job.workload.device)
        self.cost: Cost | None = None
        self.baseline_cost: Cost | None = None
        self.insertions: tuple[Insertion, ...] = ()
        self.latency: dict[Phase, Latency] = {}
        self.latency_all_cores: dict[Phase, Latency] = {}
        self.gpu_methods: dict[Phase, dict[str, Latency]] = {}
        self.memory: Memory | None = None
        self.baseline_memory: Memory | None = None
        self.energy: dict[Phase, Energy] = {}
        self.energy_left_out = ""
        self.exported: Exported | None = None
        self.complete = False
        self.remarks: tuple[str, ...] = ()
        self.expectation = ""
        self.clock, self.began = clock, clock() if began is None else began

    def path(self, out: Path) -> Path:
        """Return where its record goes, under this folder."""
        return self.job.path(out, self.machine.name)

    @property
    def measures_all_cores(self) -> bool:
        """Whether there is a second row on all cores: on a CPU, unless the user chose the threads or a quick answer.

        In 27 s one row has twice as many processes as two rows, and less than half of their width. A file that is
        compiled for one thread has no second row.
        """
        request = self.job.request
        alone = request.quick or request.threads is not None or request.runtime in FIXED_THREADS
        return request.device == "cpu" and not alone and self.machine.cores > 1

    def run(self, report: Report) -> None:
        """Count, then time, then measure memory.

        Raises:
            SelabError: a network cannot be built, fails in inference, or returns NaN. Out of memory, or a failure in
                training, is not raised: the rows that it concerns say so, and the rest is measured.
        """
        # A user's network may print; standard output is not for it.
        with redirect_stdout(sys.stderr):
            self._run(report)

    def _run(self, report: Report) -> None:
        # A package that is not installed is told before anything is built.
        backend(self.job.request.runtime)
        built, other = build_pair(self.job)
        self.insertions = built.insertions
        variant, baseline = built.model, other.model
        before = read_cpu()
        report("counting", None)
        self.cost = _counted(self.variant, built, self.job.workload)
        self.baseline_cost = _counted(self.baseline, other, self.job.workload)
        schedule = self._schedule()
        self.expectation = self._expected(schedule, before)
        meter = self._meter()
        report(COUNTED, None)
        with ExitStack() as files:
            if is_exported(self.job):
                report("exporting", None)
                folder = files.enter_context(scratch())
                self._measured, self.exported, self.remarks = exported(self.job, variant, baseline, folder)
                variant, baseline = (built.model for built in build_pair(self._measured))
                # Some exporters compile for minutes; that is not time to measure.
                schedule.began = self.began = self.clock()
            self._measure(schedule, variant, baseline, report, meter)
        self.complete = True

    def _measure(
        self, schedule: Schedule, variant: nn.Module, baseline: nn.Module, report: Report, meter: EnergyMeter | None
    ) -> None:
        if self.job.request.in_this_process:
            self._time(variant, baseline, report, meter)
            self._measure_memory(variant, baseline, report)
            self._note_excess("the fewest samples with an interval need", report)
        else:
            self._time_in_short_processes(schedule, variant, baseline, report, energy=meter is not None)

    def _schedule(self) -> Schedule:
        request = self.job.request
        groups = together(backend(request.runtime), self.job.workload, request.phases)
        runs = (2 if request.device == "cuda" else 1) * (1 + self.measures_all_cores) * len(groups)
        return Schedule(began=self.began, effort=effort_of(request), runs=runs, clock=self.clock)

    def _expected(self, schedule: Schedule, before: CpuReading | None) -> str:
        """Return in words how long this will take, how wide the intervals will be, and what other programs use."""
        if not self.job.request.phases or self.job.request.in_this_process:
            return ""
        return expectation(schedule, before, device=self.job.workload.device, cores=self.machine.cores)

    def _measure_memory(self, variant: nn.Module, baseline: nn.Module, report: Report) -> None:
        report("memory", None)
        # What memory is used does not depend on the heap, and the heap of this process may be the user's.
        workload = msgspec.structs.replace(self.job.workload, held_heap=False)
        seed, phases = self.job.request.seed, self.job.request.phases
        self.memory = memory(variant, workload, seed=seed, phases=phases)
        self.baseline_memory = memory(baseline, workload, seed=seed, phases=phases)

    def _meter(self) -> EnergyMeter | None:
        """Return the counter of energy; None, with the reason in `energy_left_out`, where there is none."""
        if not set(self.job.request.phases) & set(ENERGY_PHASES):
            return None
        try:
            return energy_meter(self.job.workload.device)
        except DeviceError as error:
            self.energy_left_out = str(error)
            return None

    def _keep_energy(self, spent: Energy) -> None:
        known = self.energy.get(spent.phase)
        blocks = (*known.blocks, *spent.blocks) if known is not None else spent.blocks
        error = spent.error or (known.error if known is not None else "")
        batch = self.job.workload.batch
        self.energy[spent.phase] = summarise_energy(spent.phase, spent.counter, blocks, batch=batch, error=error)

    def _time(self, variant: nn.Module, baseline: nn.Module, report: Report, meter: EnergyMeter | None) -> None:
        rows = [(self._measured, self.latency)]
        if self.measures_all_cores:
            rows.append((self._measured.changed(threads=self.machine.cores, quick=True), self.latency_all_cores))
        budget_s = self.job.request.budget_s
        if budget_s is not None:
            methods = 2 if self.job.workload.device == "cuda" else 1
            runs = methods * len(rows) * max(1, len(self.job.request.phases)) + (meter is not None)
            share = max(0.0, self.began + budget_s - self.clock()) / runs
            # The two controls take as much together, and each of the three has its warm-up.
            seconds = max(_LEAST_SAMPLING_S[self.job.request.device], share / 3)
            rows = [(msgspec.structs.replace(job, plan=job.plan.sampling(seconds)), into) for job, into in rows]
        for job, into in rows:
            gathered: dict[tuple[Phase, str], list[RawPhase]] = {}
            for raw in raw_runs(job, variant, baseline, report, meter if into is self.latency else None):
                if isinstance(raw, Energy):
                    self._keep_energy(raw)
                    continue
                if isinstance(raw, Failed):
                    if raw.phase in into:
                        # What was measured before stands.
                        self.remarks += (f"{PHASE_NAMES[raw.phase]}, by another method: {raw.error}",)
                    else:
                        into[raw.phase] = summary(raw.phase, method_of(job.workload), job, [], raw.error)
                    continue
                both = gathered.setdefault((raw.phase, raw.method), [])
                both.append(raw)
                self._keep(into, raw.phase, raw.method, summary(raw.phase, raw.method, job, both))

    def _keep(self, into: dict[Phase, Latency], phase: Phase, method: str, latency: Latency) -> None:
        if method == method_of(self.job.workload, cold=self.job.request.cold):
            into[phase] = latency
        if self.job.workload.device == "cuda":
            self.gpu_methods.setdefault(phase, {})[method] = latency

    def _time_in_short_processes(
        self, schedule: Schedule, variant: nn.Module, baseline: nn.Module, report: Report, *, energy: bool
    ) -> None:
        """Measure in fresh processes until the time is spent; the memory after the first, whose answer comes early."""
        job, request = self._measured, self.job.request
        rows = [(job, self.latency)]
        if self.measures_all_cores:
            rows.append((job.changed(threads=self.machine.cores), self.latency_all_cores))
        placements = Placements(rows=rows, keep=self._keep)

        def order_of(turn: Turn) -> WorkerJob:
            return WorkerJob(
                job=job,
                quad_seed=request.seed + turn.number,
                rows=tuple(row.workload.threads for row, _ in rows),
                seconds=turn.sampling_s,
                control=turn.control,
                energy=energy,
            )

        for event in in_processes(schedule, workers.__name__, order_of, Placed):
            if isinstance(event, Started):
                report(event.where, None)
            elif isinstance(event, Found):
                placements.add(event.number, event.what)
                if event.what.spent is not None:
                    self._keep_energy(event.what.spent)
                report(f"{event.where}: {placements.words()}", None)
            else:
                if event.died:
                    placements.drop(event.number)
                    self.remarks += (event.remark,)
                    report(event.remark, None)
                if self.memory is None:
                    self._measure_memory(variant, baseline, report)
        number = units.counted(schedule.done, "process", "processes")
        self._note_excess(f"{number} need, the fewest with an interval", report)

    def _note_excess(self, needed: str, report: Report) -> None:
        budget_s, took_s = self.job.request.budget_s, self.clock() - self.began
        if budget_s is not None and took_s > budget_s + _NOTEWORTHY_S:
            self.remarks += (f"--budget {budget_s:g}: measuring took {took_s:.0f} s; that is what {needed}",)
            report(self.remarks[-1], None)

    def record(self) -> Record:
        """Return what has been measured so far.

        Raises:
            RecordError: nothing was measured yet.
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
            command=self.job.command(),
            complete=self.complete,
            workload=self.job.workload,
            machine=self.machine,
            seed=self.job.request.seed,
            cost=self.cost,
            baseline_cost=self.baseline_cost,
            insertions=self.insertions,
            latency=self.latency,
            latency_all_cores=self.latency_all_cores,
            gpu_methods=self.gpu_methods,
            memory=self.memory,
            baseline_memory=self.baseline_memory,
            energy=self.energy,
            energy_left_out=self.energy_left_out,
            exported=self.exported,
            warnings=(*warnings_of(self.cost), *self.remarks),
        )


def warnings_of(cost: Cost) -> tuple[str, ...]:
    """Return what a reader of these costs must know: operators that are not in them, counters that failed."""
    unknown = [
        f"no counting rule for {name} ({units.counted(calls, 'call')}): not in the totals"
        for name, calls in cost.unknown.items()
    ]
    failed = [f"{counter.name} failed: {counter.error}" for counter in cost.counters.values() if counter.error]
    return (*unknown, *failed)


def _counted(
    variant: Variant,
    built: Built,
    workload: Workload,
    *,
    by_module: bool = False,
    counters: bool = True,
) -> Cost:
    """Count a network, also with the other counters. By module only if asked: that is 100 kB for a deep network."""
    shape: Example = (workload.batch, *workload.input_chw)
    if variant.inputs:
        shape = example_of(built.model, variant.inputs, batch=workload.batch)
    # What is quantised is counted as it was before.
    dtype, on = DTYPES.get(workload.dtype, torch.float32), variant.on
    model = built.model
    if isinstance(model, OnnxNetwork):
        return count(model, shape)
    try:
        traced = op_trace(model, shape, dtype=dtype, se_blocks=built.native, details=counters, on=on)
    except ModelError as error:
        raise ModelError(f"{variant.place}: {error}") from error
    cost = cost_of(model, traced)
    return msgspec.structs.replace(
        cost,
        counters=compare(model, shape, dtype=dtype, traced=traced, on=on) if counters else {},
        by_module=cost.by_module if by_module else {},
    )


# Below this many networks a second process would not have loaded torch before the first has counted them all.
_PARALLEL_FROM = 24


def counted(names: Iterable[str]) -> dict[str, Cost]:
    """Count these variants for one image, without the other counters; many of them on all cores."""
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
    """Count a network by its name, as `count_job`.

    Args:
        arch: as `--arch`.
        batch: images.
        input_chw: channels, height and width of the input; None for the network's own.
        resolution: height and width of the input; None for those of `input_chw`.
        by_module: whether to keep the cost of each module.
        counters: whether to ask the other counters, which takes most of the time.

    Raises:
        SelabError: the network cannot be found or built, or fails on this input.
    """
    request = Request(arch=arch, batch=batch, input_chw=input_chw, resolution=resolution)
    return count_job(resolve(request), by_module=by_module, counters=counters)


def count_job(job: Job, *, by_module: bool = False, counters: bool = True) -> Record:
    """Count a variant and its baseline. Nothing is timed, and no weight has memory (meta device) unless values steer.

    Args:
        job: of the network; it may have no baseline. Its request says whether to count on real tensors.
        by_module: whether to keep the cost of each module.
        counters: whether to ask the other counters, which takes most of the time.

    Raises:
        SelabError: the network cannot be built, or fails on this input.
    """
    variant, baseline = job.variant, job.baseline
    # A count is the same whatever the heap does.
    job = msgspec.structs.replace(job, workload=msgspec.structs.replace(job.workload, held_heap=False))
    costs = []
    insertions: tuple[Insertion, ...] = ()
    for one in (variant, baseline):
        if one is None:
            continue
        with redirect_stdout(sys.stderr):
            built = build(one, device="meta", input_chw=job.workload.input_chw)
            insertions = insertions or built.insertions
            costs.append(_counted(one, built, job.workload, by_module=by_module, counters=counters))
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
        command=job.command("count"),
        complete=True,
        workload=job.workload,
        machine=machine(),
        seed=0,
        cost=costs[0],
        baseline_cost=costs[1] if len(costs) > 1 else None,
        insertions=insertions,
        warnings=warnings_of(costs[0]),
    )
