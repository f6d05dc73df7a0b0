"""Latency of a variant against its baseline: networks become arms, the paired sampler times them, controls frame it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn

from selab.measure.machine import GpuMonitor, available_cores, contention_flags, read_cpu, threads_and_affinity
from selab.measure.paired import (
    Arm,
    Clock,
    Plan,
    Progress,
    Sample,
    Void,
    WallArm,
    measure,
    measure_control,
)
from selab.measure.passes import Call, Prepared, check_output, mode_of, phase_call, prepare, translated_errors
from selab.record import Flag, Frozen, Phase, Run, Workload

PHASES: tuple[Phase, ...] = ("forward", "backward", "forward_backward")
ProgressOf = Callable[[str, Progress], object]
ArmOf = Callable[[Prepared, Phase], Arm]
_CLOCK_ASYMMETRY = 0.01
_K = TypeVar("_K")


class RawPhase(Frozen, frozen=True, kw_only=True):
    """What one process measured of one phase by one method: the run, and the controls before and after it."""

    phase: Phase
    method: str
    run: Run
    controls: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Baseline, a second instance of it for the control, and the variant: private copies, ready to run.

    Attributes:
        cores: that this process could use before it was pinned.
    """

    baseline: Prepared
    again: Prepared
    variant: Prepared
    workload: Workload
    cores: int


@contextmanager
def networks(
    baseline: nn.Module,
    variant: nn.Module,
    workload: Workload,
    *,
    seed: int = 0,
    names: tuple[str, str] = ("baseline", "variant"),
) -> Iterator[Networks]:
    """Copies both networks to where they will run and checks what they return; the models are left as they are.

    Threads and affinity are as the workload says while the block runs, and random numbers are its own.

    Args:
        baseline: arm A.
        variant: arm B.
        workload: of both.
        seed: of the input, the same for both.
        names: what to call the two in messages.

    Raises:
        DeviceError: no such device.
        OutOfMemoryError: three copies and an input do not fit.
        ModelError: a network fails, or its output is not finite.
    """
    on_gpu = workload.device == "cuda"
    place = nullcontext() if on_gpu else threads_and_affinity(workload.threads)
    cores = available_cores()
    devices = range(torch.cuda.device_count()) if on_gpu and torch.cuda.is_available() else []
    with place, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = [prepare(model, workload, seed=seed) for model in (baseline, baseline, variant)]
        for prepared, name in zip(made, (names[0], *names), strict=True):
            check_output(prepared, name)
        yield Networks(baseline=made[0], again=made[1], variant=made[2], workload=workload, cores=cores)


def measure_phase(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    *,
    seed: int = 0,
    cold: bool = False,
    clock: Clock = time.perf_counter,
    progress: ProgressOf | None = None,
) -> dict[str, RawPhase]:
    """Measures one phase by every method of the device: a control, the comparison, a control.

    On the CPU the method is `wall`. On a GPU `eager_wall` (k calls, one synchronize, host clock) and `eager_event`
    (CUDA events around the same calls) come from one run; `graph` (one captured call, replayed) from another, for
    forward and forward_backward, and is left out where the network cannot be captured.

    Args:
        nets: as from `networks`, whose block must still be open.
        phase: what one call is.
        plan: durations, target and budget; its method is replaced by the device's.
        seed: of the order of the quads.
        cold: on a GPU, flush the L2 cache before each call, outside the events; then only `eager_event` is measured.
        clock: the host clock, seconds.
        progress: called with a label (`control`, `forward` …) after every quad.

    Raises:
        OutOfMemoryError: the pass does not fit.
        ModelError: there is nothing to differentiate.
    """
    with translated_errors(f"{phase} in {mode_of(phase, nets.workload)} mode"):
        if nets.workload.device == "cpu":
            return _measured(nets, phase, plan, cpu_arm(clock), seed=seed, clock=clock, progress=progress)
        return _on_gpu(nets, phase, plan, seed=seed, cold=cold, clock=clock, progress=progress)


def cpu_arm(clock: Clock) -> ArmOf:
    """Makes arms of the method `wall`."""

    def arm(prepared: Prepared, phase: Phase) -> Arm:
        return WallArm(call=phase_call(prepared, phase), clock=clock)

    return arm


def _measured(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    arm_of: ArmOf,
    *,
    seed: int,
    clock: Clock,
    progress: ProgressOf | None,
    between_quads: Callable[[], Sequence[Flag] | Void] | None = None,
) -> dict[str, RawPhase]:
    """Control, comparison, control, with the machine watched around each."""
    baseline, again = arm_of(nets.baseline, phase), arm_of(nets.again, phase)
    watch = Watch(nets.workload, nets.cores)

    def control(number: int) -> dict[str, Run]:
        runs = measure_control(
            baseline,
            again,
            plan,
            clock=clock,
            seed=seed + number,
            progress=_labelled(progress, "control"),
            between_quads=between_quads,
        )
        return watch.flagged(runs)

    before = control(1)
    variant = arm_of(nets.variant, phase)
    watch.restart()
    runs = measure(
        baseline,
        variant,
        plan,
        clock=clock,
        seed=seed,
        progress=_labelled(progress, phase),
        between_quads=between_quads,
    )
    runs = watch.flagged(runs, extra=clock_asymmetry(baseline, variant))
    del variant
    after = control(2)
    return {
        method: RawPhase(phase=phase, method=method, run=run, controls=(before[method], after[method]))
        for method, run in runs.items()
    }


def _labelled(progress: ProgressOf | None, label: str) -> Callable[[Progress], object] | None:
    return None if progress is None else lambda state: progress(label, state)


class Watch:
    """Reads the kernel's counters around a run and flags what others did meanwhile.

    Args:
        workload: what is run.
        cores: that this process could use before it was pinned.
    """

    def __init__(self, workload: Workload, cores: int) -> None:
        self._threads = workload.threads if workload.device == "cpu" else 1
        self._cores = cores
        self.restart()

    def restart(self) -> None:
        """Begins anew."""
        self._before = read_cpu()

    def flagged(self, runs: Mapping[_K, Run], *, extra: Sequence[Flag] = ()) -> dict[_K, Run]:
        """The runs with what was seen since the last restart, which this is another of."""
        found = contention_flags(self._before, read_cpu(), threads=self._threads, cores=self._cores)
        self.restart()
        return {name: msgspec.structs.replace(run, flags=(*run.flags, *found, *extra)) for name, run in runs.items()}


# ----------------------------------------------------------------------------------------------------------------- GPU


@dataclass(kw_only=True)
class EventArm:
    """An arm on a GPU: k calls with an event before and after each, one synchronize at the end.

    `eager_wall` is the host's time for all k, `eager_event` the device's time of each.

    Attributes:
        synchronize: waits for the device.
        event: makes a timing event.
        flush: empties the cache before each call, outside its events; the wall time then means nothing and is left out.
        monitor: read after each sample, untimed; the clocks go to `clocks_mhz`.
    """

    call: Call
    clock: Clock
    synchronize: Callable[[], object]
    event: Callable[[], Any]
    flush: Call | None = None
    monitor: GpuMonitor | None = None
    clocks_mhz: list[int] = field(default_factory=list)

    def settle(self) -> float:
        """One call, finished when this returns; its seconds on the host."""
        start = self.clock()
        self.call()
        self.synchronize()
        return self.clock() - start

    def sample(self, calls: int) -> dict[str, Sample]:
        """`calls` calls in a row, finished when this returns."""
        events = [(self.event(), self.event()) for _ in range(calls)]
        self.synchronize()
        start = self.clock()
        for first, last in events:
            if self.flush is not None:
                self.flush()
            first.record()
            self.call()
            last.record()
        self.synchronize()
        window_s = self.clock() - start
        reading = self.monitor.read() if self.monitor is not None else None
        if reading is not None:
            self.clocks_mhz.append(reading.sm_clock_mhz)
        timed = Sample.of_calls([first.elapsed_time(last) / 1e3 for first, last in events])
        if self.flush is not None:
            return {"eager_event": timed}
        return {"eager_wall": Sample.of_window(window_s, calls), "eager_event": timed}


@dataclass(kw_only=True)
class GraphArm:
    """An arm that replays a captured call: k replays, one synchronize, the host's clock."""

    replay: Call
    clock: Clock
    synchronize: Callable[[], object]

    def settle(self) -> float:
        """One replay, finished when this returns; its seconds."""
        start = self.clock()
        self.replay()
        self.synchronize()
        return self.clock() - start

    def sample(self, calls: int) -> dict[str, Sample]:
        """`calls` replays in a row, finished when this returns."""
        self.synchronize()
        start = self.clock()
        for _ in range(calls):
            self.replay()
        self.synchronize()
        return {"graph": Sample.of_window(self.clock() - start, calls)}


def clock_asymmetry(baseline: Arm, variant: Arm) -> list[Flag]:
    """Flags arms on a GPU whose clocks differed by more than 1 % while they ran."""
    clocks = [arm.clocks_mhz for arm in (baseline, variant) if isinstance(arm, EventArm) and arm.clocks_mhz]
    if len(clocks) < 2:
        return []
    first, second = median(clocks[0]), median(clocks[1])
    if abs(second - first) <= _CLOCK_ASYMMETRY * first:
        return []
    detail = f"the SM clock was {first:.0f} MHz beside the baseline and {second:.0f} MHz beside the variant"
    return [Flag(name="clock_asymmetry", detail=f"{detail}; part of the ratio is the clock's")]


def _on_gpu(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    *,
    seed: int,
    cold: bool,
    clock: Clock,
    progress: ProgressOf | None,
) -> dict[str, RawPhase]:
    monitor = GpuMonitor()
    flush = _l2_flush() if cold else None
    between = gpu_watch(monitor)
    headline = "eager_event" if cold else "eager_wall"
    found = _measured(
        nets,
        phase,
        replace(plan, method=headline, statistic="typical"),
        eager_arm(clock, monitor, flush=flush),
        seed=seed,
        clock=clock,
        progress=progress,
        between_quads=between,
    )
    if not cold and can_be_captured(phase, nets.workload):
        found |= _measured(
            nets,
            phase,
            replace(plan, method="graph", statistic="typical"),
            graph_arm(clock),
            seed=seed,
            clock=clock,
            progress=progress,
            between_quads=between,
        )
    return found


def eager_arm(clock: Clock, monitor: GpuMonitor | None, *, flush: Call | None = None) -> ArmOf:
    """Makes arms of the methods `eager_wall` and `eager_event`; with a flush only of the latter."""

    def arm(prepared: Prepared, phase: Phase) -> Arm:
        return EventArm(
            call=phase_call(prepared, phase),
            clock=clock,
            synchronize=torch.cuda.synchronize,
            event=lambda: torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
            flush=flush,
            monitor=monitor,
        )

    return arm


def graph_arm(clock: Clock) -> ArmOf:
    """Makes arms of the method `graph`."""

    def arm(prepared: Prepared, phase: Phase) -> Arm:
        replay = captured(phase_call(prepared, phase, capture=True))
        return GraphArm(replay=replay, clock=clock, synchronize=torch.cuda.synchronize)

    return arm


def can_be_captured(phase: Phase, workload: Workload) -> bool:
    """Whether a call can be a CUDA graph: not over a graph of autograd's that is kept, nor through torch.compile."""
    return phase != "backward" and not workload.compiled


def captured(call: Call) -> Call:
    """Captures one call in a CUDA graph, after the warm-up on a side stream that this needs; returns its replay."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept  # the graph writes into these tensors, so they must live as long as it does

    return replay


def _l2_flush() -> Call:
    size: int = torch.cuda.get_device_properties(0).L2_cache_size
    scratch = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    return scratch.zero_


def gpu_watch(monitor: GpuMonitor) -> Callable[[], Sequence[Flag] | Void]:
    """At each quad's end: hard throttling voids the quad; the power cap, allocator growth and a mute NVML are told."""
    reserved = torch.cuda.memory_reserved()

    def look() -> Sequence[Flag] | Void:
        nonlocal reserved
        flags: list[Flag] = []
        reading = monitor.read()
        if reading is None:
            flags.append(Flag(name="unwatched", detail=monitor.problem))
        elif reading.hard_throttle:
            return Void(reason=f"the GPU was throttled: {', '.join(reading.hard_throttle)}; let it cool")
        elif reading.power_capped:
            flags.append(
                Flag(name="power_capped", detail="the GPU ran at its power limit, so its clock was below its best")
            )
        now = torch.cuda.memory_reserved()
        if now > reserved:
            grown = f"the allocator took {now - reserved} more bytes from the device while samples were taken"
            flags.append(Flag(name="allocator_growth", detail=f"{grown}; warm up longer"))
            reserved = now
        return flags

    return look
