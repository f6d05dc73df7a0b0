"""Runs the measurers on one variant and its baseline, and makes the record.

A fresh process for a published figure is this module run as a program: it reads a request as JSON from its standard
input and writes one JSON object per line, progress and raw runs, to its standard output.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from torch import nn

import selab
from selab import catalog, verdict
from selab.build import build
from selab.errors import OutOfMemoryError, RecordError, SelabError, SpecError
from selab.measure.counters import compare
from selab.measure.counts import count
from selab.measure.latency import PHASES, RawPhase, measure_phase, networks
from selab.measure.machine import machine
from selab.measure.memory import memory
from selab.measure.paired import Plan, Progress
from selab.measure.passes import DTYPES, check_device, mode_of
from selab.record import (
    SCHEMA,
    Cost,
    Device,
    Dtype,
    Frozen,
    Insertion,
    Latency,
    Machine,
    Memory,
    MemoryFormat,
    Mode,
    Phase,
    Record,
    Workload,
    to_json,
)
from selab.spec import Variant

Report = Callable[[str, Progress | None], object]


class Request(Frozen, frozen=True, kw_only=True):
    """Everything that decides a profile; the record's `command` is written from it.

    Attributes:
        baseline: what to compare with; None for the one that the variant's facts name.
        resolution: height and width of the input; None for those of the facts.
        threads: CPU threads of the headline; None for one thread, with all cores beside it.
        budget_s: seconds of sampling per phase; None for 60 (quick: 15).
        processes: fresh processes per figure; 1 measures in this one.
        cold: on a GPU, flush the L2 cache before each call.
    """

    arch: str
    baseline: str | None = None
    device: Device = "cpu"
    batch: int = 1
    resolution: int | None = None
    dtype: Dtype = "fp32"
    memory_format: MemoryFormat = "contiguous"
    mode: Mode = "auto"
    compiled: bool = False
    threads: int | None = None
    quick: bool = False
    budget_s: float | None = None
    seed: int = 0
    processes: int = 1
    cold: bool = False
    phases: tuple[Phase, ...] = PHASES

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["selab", "profile", "--arch", self.arch]
        default = Request(arch=self.arch)
        for name, option in _OPTIONS.items():
            value = getattr(self, name)
            if value != getattr(default, name):
                words += [option] if value is True else [option, str(value)]
        if self.memory_format == "channels_last":
            words.append("--channels-last")
        for phase in self.phases if self.phases != PHASES else ():
            words += ["--phase", phase]
        return " ".join(words)


_OPTIONS = {
    "baseline": "--baseline",
    "device": "--device",
    "batch": "--batch",
    "resolution": "--resolution",
    "dtype": "--dtype",
    "mode": "--mode",
    "compiled": "--compile",
    "threads": "--threads",
    "quick": "--quick",
    "budget_s": "--budget",
    "seed": "--seed",
    "processes": "--processes",
    "cold": "--cold",
}


def pair(request: Request) -> tuple[Variant, Variant]:
    """The variant that is asked for, and its baseline.

    Raises:
        SpecError: there is no baseline, or its input has another shape.
        UnknownNameError: no such name.
    """
    variant = catalog.find(request.arch)
    baseline = catalog.find(request.baseline) if request.baseline else catalog.baseline_of(variant)
    if baseline is None:
        others = [other.name for other in catalog.installed().values() if other.baseline == variant.name]
        instead = f"profile its variant: --arch {others[0]}, or name" if others else "name"
        raise SpecError(f"--arch {request.arch}: is a baseline itself; {instead} what to compare with: --baseline NAME")
    if baseline.input_chw != variant.input_chw:
        raise SpecError(
            f"--baseline {baseline.name}: its input is {list(baseline.input_chw)}, that of {variant.name} is "
            f"{list(variant.input_chw)}; only networks of equal input can be compared"
        )
    return variant, baseline


def workload_of(request: Request, variant: Variant, *, threads: int | None = None) -> Workload:
    """The request's workload, on this many threads."""
    channels, height, width = variant.input_chw
    if request.resolution is not None:
        height = width = request.resolution
    return Workload(
        batch=request.batch,
        input_chw=(channels, height, width),
        device=request.device,
        dtype=request.dtype,
        memory_format=request.memory_format,
        mode=request.mode,
        threads=threads or request.threads or 1,
        compiled=request.compiled,
    )


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
        self.latency: dict[str, Latency] = {}
        self.latency_all_cores: dict[str, Latency] = {}
        self.gpu_methods: dict[str, dict[str, Latency]] = {}
        self.memory: Memory | None = None
        self.baseline_memory: Memory | None = None
        self.complete = False

    @property
    def measures_all_cores(self) -> bool:
        """Whether a second row on all cores is due: on a CPU, unless the user chose the threads."""
        return self.request.device == "cpu" and self.request.threads is None and self.machine.cores > 1

    def run(self, report: Report) -> None:
        """Counts, then times, then measures memory.

        Raises:
            SelabError: the network cannot be built, fails, or returns NaN. Out of memory is not raised: the rows that
                it concerns say so and the rest goes on.
        """
        variant, baseline = self._build()
        report("counting", None)
        self.cost = _counted(variant, self.workload)
        self.baseline_cost = _counted(baseline, self.workload)
        self._time(variant, baseline, report)
        report("memory", None)
        self.memory = memory(variant, self.workload, seed=self.request.seed)
        self.baseline_memory = memory(baseline, self.workload, seed=self.request.seed)
        self.complete = True

    def _build(self) -> tuple[nn.Module, nn.Module]:
        _, height, width = self.workload.input_chw
        built = build(self.variant, seed=self.request.seed, input_hw=(height, width))
        self.insertions = built.insertions
        return built.model, build(self.baseline, seed=self.request.seed).model

    def _time(self, variant: nn.Module, baseline: nn.Module, report: Report) -> None:
        rows = [(self.workload, self.latency, self.request)]
        if self.measures_all_cores:
            workload = workload_of(self.request, self.variant, threads=self.machine.cores)
            rows.append((workload, self.latency_all_cores, _in_haste(self.request)))
        for workload, into, request in rows:
            source = (
                raw_runs(request, workload, variant, baseline, report)
                if request.processes == 1
                else _raw_runs_of_children(request, workload, report)
            )
            gathered: dict[tuple[Phase, str], list[RawPhase]] = {}
            for raw in source:
                if isinstance(raw, Failed):
                    into.setdefault(raw.phase, self._summary(raw.phase, _method(workload), workload, [], raw.error))
                    continue
                both = gathered.setdefault((raw.phase, raw.method), [])
                both.append(raw)
                latency = self._summary(raw.phase, raw.method, workload, both)
                if raw.method == _method(workload, cold=request.cold):
                    into[raw.phase] = latency
                if workload.device == "cuda":
                    self.gpu_methods.setdefault(raw.phase, {})[raw.method] = latency

    def _summary(self, phase: Phase, method: str, workload: Workload, raws: list[RawPhase], error: str = "") -> Latency:
        plan = plan_of(self.request, workload)
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

    def record(self) -> Record:
        """What has been measured so far.

        Raises:
            RecordError: nothing has.
        """
        if self.cost is None:
            raise RecordError("nothing was measured yet, so nothing is kept")
        return Record(
            schema=SCHEMA,
            selab=selab.__version__,
            kind="profile",
            arch=self.variant.name,
            baseline=self.baseline.name,
            facts_hash=facts_hash(self.variant, self.baseline),
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
        )


def facts_hash(variant: Variant, baseline: Variant | None) -> str:
    """Of the variant's facts and its baseline's: a record whose hash differs from the catalog's is stale."""
    return variant.facts_hash + ("" if baseline is None else f"-{baseline.facts_hash}")


def _counted(model: nn.Module, workload: Workload, *, by_module: bool = False) -> Cost:
    """Ours and the other counters; by module only if asked, for that is a hundred kilobytes for a deep network."""
    shape = (workload.batch, *workload.input_chw)
    dtype = DTYPES[workload.dtype]
    cost = count(model, shape, dtype=dtype)
    by = cost.by_module if by_module else {}
    return msgspec.structs.replace(cost, counters=compare(model, shape, dtype=dtype), by_module=by)


def counted(names: Iterable[str]) -> dict[str, Cost]:
    """The cost of these variants for one image, without the other counters."""
    found = {}
    for name in names:
        variant = catalog.find(name)
        found[name] = count(build(variant, device="meta").model, (1, *variant.input_chw))
    return found


def count_record(variant: Variant, *, batch: int, resolution: int | None = None, by_module: bool = False) -> Record:
    """Counts a variant and its baseline, without timing anything; the networks have no memory either (meta device).

    Raises:
        SelabError: the network cannot be built, or fails on this input.
    """
    baseline = catalog.baseline_of(variant)
    workload = workload_of(Request(arch=variant.name, batch=batch, resolution=resolution), variant)
    _, height, width = workload.input_chw
    built = build(variant, device="meta", input_hw=(height, width))
    other = build(baseline, device="meta").model if baseline is not None else None
    return Record(
        schema=SCHEMA,
        selab=selab.__version__,
        kind="count",
        arch=variant.name,
        baseline=None if baseline is None else baseline.name,
        facts_hash=facts_hash(variant, baseline),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"selab count --arch {variant.name} --batch {batch}",
        complete=True,
        workload=workload,
        machine=machine(),
        seed=0,
        cost=_counted(built.model, workload, by_module=by_module),
        baseline_cost=None if other is None else _counted(other, workload, by_module=by_module),
        insertions=built.insertions,
    )


# ------------------------------------------------------------------------------------------------------------ latencies


class Failed(Frozen, frozen=True, kw_only=True):
    """A phase that the device's memory does not hold."""

    phase: Phase
    error: str


def _method(workload: Workload, *, cold: bool = False) -> str:
    if workload.device == "cpu":
        return "wall"
    return "eager_event" if cold else "eager_wall"


def plan_of(request: Request, workload: Workload) -> Plan:
    """How long to measure, from the request."""
    plan = Plan.for_gpu(quick=request.quick) if workload.device == "cuda" else Plan.for_cpu(quick=request.quick)
    return plan if request.budget_s is None else replace(plan, budget_s=request.budget_s)


def _in_haste(request: Request) -> Request:
    return msgspec.structs.replace(request, quick=True)


def raw_runs(
    request: Request,
    workload: Workload,
    variant: nn.Module,
    baseline: nn.Module,
    report: Report,
    *,
    quad_seed: int | None = None,
) -> Iterator[RawPhase | Failed]:
    """Measures every phase in this process; a phase that runs out of memory is told and the next one is tried.

    The weights and the input come from the request's seed; the order of the quads may have its own, so that processes
    differ in nothing else.
    """
    plan = plan_of(request, workload)
    threads = f", {workload.threads} thread{'s' if workload.threads > 1 else ''}" if workload.device == "cpu" else ""
    report(f"preparing{threads}", None)
    done: set[Phase] = set()
    try:
        with networks(baseline, variant, workload, seed=request.seed) as nets:
            for phase in request.phases:
                try:
                    raws = measure_phase(
                        nets,
                        phase,
                        plan,
                        seed=request.seed if quad_seed is None else quad_seed,
                        cold=request.cold,
                        progress=_of_phase(report, phase, threads),
                    )
                except OutOfMemoryError as error:
                    yield Failed(phase=phase, error=str(error))
                else:
                    yield from raws.values()
                done.add(phase)
    except OutOfMemoryError as error:
        for phase in request.phases:
            if phase not in done:
                yield Failed(phase=phase, error=str(error))


def _of_phase(report: Report, phase: Phase, threads: str) -> Report:
    name = phase.replace("_", "+")

    def labelled(label: str, state: Progress | None) -> object:
        return report((name if label == phase else f"{name} ({label})") + threads, state)

    return labelled


class _Line(Frozen, frozen=True, kw_only=True):
    """One line that a child process writes: progress, a result, or why it ended."""

    label: str = ""
    quads: int = 0
    half_width: float | None = None
    elapsed_s: float = 0.0
    budget_s: float = 0.0
    raw: RawPhase | None = None
    failed: Failed | None = None
    error: str = ""


class _Order(Frozen, frozen=True, kw_only=True):
    """What a child process is asked."""

    request: Request
    workload: Workload
    quad_seed: int


def _raw_runs_of_children(request: Request, workload: Workload, report: Report) -> Iterator[RawPhase | Failed]:
    for number in range(request.processes):
        order = _Order(request=request, workload=workload, quad_seed=request.seed + number)
        yield from _child(order, _of_process(report, number + 1, request.processes))


def _of_process(report: Report, number: int, processes: int) -> Report:
    return lambda label, state: report(f"process {number} of {processes}: {label}", state)


def _child(order: _Order, report: Report) -> Iterator[RawPhase | Failed]:
    command = [sys.executable, "-m", "selab.profiling"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(order))
        process.stdin.close()
        try:
            for text in process.stdout:
                line = msgspec.json.decode(text, type=_Line)
                if line.error:
                    raise SelabError(line.error)
                if line.raw is not None:
                    yield line.raw
                elif line.failed is not None:
                    yield line.failed
                else:
                    report(line.label, _progress(line))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SelabError(f"a measuring process ended with status {process.returncode}; see its message above")


def _progress(line: _Line) -> Progress | None:
    if not line.budget_s:
        return None
    return Progress(quads=line.quads, half_width=line.half_width, elapsed_s=line.elapsed_s, budget_s=line.budget_s)


def _serve() -> None:
    """The child: one order in, lines out."""

    def write(line: _Line) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()

    def report(label: str, state: Progress | None) -> None:
        if state is None:
            write(_Line(label=label))
        else:
            width, elapsed = state.half_width, state.elapsed_s
            write(_Line(label=label, quads=state.quads, half_width=width, elapsed_s=elapsed, budget_s=state.budget_s))

    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
        variant, baseline = pair(order.request)
        _, height, width = order.workload.input_chw
        models = (
            build(variant, seed=order.request.seed, input_hw=(height, width)).model,
            build(baseline, seed=order.request.seed).model,
        )
        for raw in raw_runs(order.request, order.workload, *models, report, quad_seed=order.quad_seed):
            write(_Line(failed=raw) if isinstance(raw, Failed) else _Line(raw=raw))
    except SelabError as error:
        write(_Line(error=str(error)))
    except KeyboardInterrupt:
        sys.exit(1)  # the parent was interrupted as well, and speaks


# -------------------------------------------------------------------------------------------------------------- files


def record_path(out: Path, profile: Profile) -> Path:
    """`OUT/<machine>/<arch>.<workload>.json`."""
    return out / profile.machine.name / f"{profile.variant.name}.{profile.workload.slug}.json"


def partial_path(path: Path) -> Path:
    """Where an interrupted profile is kept."""
    return path.with_suffix(".partial.json")


def check_writable(path: Path, *, replace: bool) -> None:
    """Finds out before anything is measured whether the record can be written.

    Raises:
        RecordError: it exists and may not be replaced, or its folder cannot be written.
    """
    if path.exists() and not replace:
        raise RecordError(f"{path}: exists; give --replace to measure again, or --out for another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RecordError(f"{path.parent}: cannot be written: {error.strerror}; give --out a folder that can") from None


def save(record: Record, path: Path) -> None:
    """Writes a record whole or not at all.

    Raises:
        RecordError: the folder cannot be written.
    """
    write_atomically(path, to_json(record))
    if record.complete:
        with suppress(OSError):
            partial_path(path).unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one.

    Raises:
        RecordError: the folder cannot be written, or is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror}; nothing was changed") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


if __name__ == "__main__":
    _serve()
