"""Arms of PyTorch: how one sample of a network is timed on a CPU, by CUDA events, or as a CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import msgspec
import torch

from selab.bench.machine import GpuMonitor, contention_flags, read_cpu
from selab.bench.runner import Call, Prepared, TrainingStep, phase_call, training_step
from selab.bench.sampler import Arm, Clock, Discarded, Sample, WallArm
from selab.records.flag_texts import flag
from selab.records.types import Flag, Phase, Run, Workload

ArmOf = Callable[[Prepared, Phase], Arm]
STEP_PHASES: tuple[Phase, Phase] = ("forward_backward", "backward")
"""The phases that the calls of one run can time together on a CPU, the headline first."""
_CLOCK_ASYMMETRY = 0.01
_K = TypeVar("_K")


def cpu_arm(clock: Clock) -> ArmOf:
    """Return a maker of arms of the method `wall`; `backward` follows an untimed forward pass."""

    def arm(prepared: Prepared, phase: Phase) -> Arm:
        if phase == "backward":
            return StepArm(step=training_step(prepared), clock=clock, names={"backward": "wall"})
        return WallArm(call=phase_call(prepared, phase), clock=clock)

    return arm


def step_arm(clock: Clock) -> ArmOf:
    """Return a maker of arms that time both phases of training; their samples have the phases' names."""

    def arm(prepared: Prepared, _phase: Phase) -> Arm:
        return StepArm(step=training_step(prepared), clock=clock, names={one: one for one in STEP_PHASES})

    return arm


@dataclass(kw_only=True)
class StepArm:
    """An arm on a CPU whose call is a forward and a backward pass, with the clock read between the two.

    Attributes:
        step: the two passes.
        names: `forward_backward` for the time of both, or `backward` → the name of its sample.
    """

    step: TrainingStep
    clock: Clock
    names: Mapping[str, str]

    def warm_call(self) -> float:
        """Make one call; return the seconds of both passes."""
        return self._times()["forward_backward"]

    def sample(self, calls: int) -> dict[str, Sample]:
        """Make `calls` calls in a row, each timed."""
        times = [self._times() for _ in range(calls)]
        return {name: Sample.of_calls([one[part] for one in times]) for part, name in self.names.items()}

    def _times(self) -> dict[str, float]:
        start = self.clock()
        outputs = self.step.forward()
        middle = self.clock()
        self.step.backward(outputs)
        del outputs
        end = self.clock()
        return {"forward_backward": end - start, "backward": end - middle}


class Watch:
    """Reader of the kernel's counters around a run, for the flags of other work on the machine.

    Args:
        workload: of the run.
        cores: that this process could use before it was pinned.
    """

    def __init__(self, workload: Workload, cores: int) -> None:
        self._threads = workload.threads if workload.device == "cpu" else 1
        self._cores = cores
        # A heap that is held has page faults only while it grows.
        self._ignored = {"page_faults"} if workload.held_heap else set()
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._before = read_cpu()

    def flagged(self, runs: Mapping[_K, Run], *, extra: Sequence[Flag] = ()) -> dict[_K, Run]:
        """Return the runs with the flags since the last restart, and restart."""
        found = contention_flags(self._before, read_cpu(), threads=self._threads, cores=self._cores)
        self.restart()
        found = [one for one in found if one.name not in self._ignored]
        return {name: msgspec.structs.replace(run, flags=(*run.flags, *found, *extra)) for name, run in runs.items()}


# ----------------------------------------------------------------------------------------------------------------- GPU
@dataclass(kw_only=True)
class EventArm:
    """An arm on a GPU: k calls with an event before and after each, one synchronize at the end.

    `eager_wall` is the host's time for all k, `eager_event` the device's time of each.

    Attributes:
        synchronize: waits for the device.
        event: makes a timing event.
        flush: clears the cache before each call, outside its events; the wall time is then meaningless and left out.
        monitor: read after each sample, untimed.
        clocks_mhz: the SM clock at each reading.
    """

    call: Call
    clock: Clock
    synchronize: Callable[[], object]
    event: Callable[[], Any]
    flush: Call | None = None
    monitor: GpuMonitor | None = None
    clocks_mhz: list[int] = field(default_factory=list)

    def warm_call(self) -> float:
        """Make one call, finished when this returns; return its seconds on the host."""
        start = self.clock()
        self.call()
        self.synchronize()
        return self.clock() - start

    def sample(self, calls: int) -> dict[str, Sample]:
        """Make `calls` calls in a row, finished when this returns."""
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

    def warm_call(self) -> float:
        """Replay once, finished when this returns; return its seconds."""
        start = self.clock()
        self.replay()
        self.synchronize()
        return self.clock() - start

    def sample(self, calls: int) -> dict[str, Sample]:
        """Replay `calls` times in a row, finished when this returns."""
        self.synchronize()
        start = self.clock()
        for _ in range(calls):
            self.replay()
        self.synchronize()
        return {"graph": Sample.of_window(self.clock() - start, calls)}


def clock_asymmetry(baseline: Arm, variant: Arm) -> list[Flag]:
    """Return a flag if the GPU's clocks of the two arms differed by more than 1 %."""
    clocks = [arm.clocks_mhz for arm in (baseline, variant) if isinstance(arm, EventArm) and arm.clocks_mhz]
    if len(clocks) < 2:
        return []
    first, second = median(clocks[0]), median(clocks[1])
    if abs(second - first) <= _CLOCK_ASYMMETRY * first:
        return []
    return [flag("clock_asymmetry", baseline=first, variant=second)]


def eager_arm(clock: Clock, monitor: GpuMonitor | None, *, flush: Call | None = None) -> ArmOf:
    """Return a maker of arms of the methods `eager_wall` and `eager_event`; with a flush only of the latter."""

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
    """Return a maker of arms of the method `graph`.

    Its graphs share one pool of memory: none runs beside another, and none reads what another one wrote. Apart, the
    graphs of a training step of seven networks would not fit a device that each of them fits.
    """
    pool: list[Any] = []

    def arm(prepared: Prepared, phase: Phase) -> Arm:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        replay = captured(phase_call(prepared, phase, capture=True), pool[0])
        return GraphArm(replay=replay, clock=clock, synchronize=torch.cuda.synchronize)

    return arm


def can_be_captured(phase: Phase, workload: Workload) -> bool:
    """Return True if a call can be a CUDA graph: not over a retained autograd graph, nor through torch.compile."""
    return phase != "backward" and not workload.compiled


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The replay of a captured call.

    Attributes:
        call: holds the tensors that the graph reads. Their memory is not the graph's: once freed, a replay reads what
            others wrote there, or no memory at all.
        result: the graph writes into these tensors.
    """

    graph: torch.cuda.CUDAGraph
    call: Call
    result: object

    def __call__(self) -> object:
        """Replay the call; return its result, the same tensors every time."""
        self.graph.replay()
        return self.result


def captured(call: Call, pool: Any = None) -> Captured:
    """Capture one call in a CUDA graph, after the required warm-up on a side stream; return its replay.

    Args:
        call: reads the same tensors every time.
        pool: as of `torch.cuda.graph_pool_handle`; None for one of its own.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return Captured(graph=graph, call=call, result=result)


def l2_flush() -> Call:
    """Return a call that overwrites twice the L2 cache of the GPU."""
    size: int = torch.cuda.get_device_properties(0).L2_cache_size
    scratch = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    return scratch.zero_


def gpu_watch(monitor: GpuMonitor) -> Callable[[], Sequence[Flag] | Discarded]:
    """Return a watcher of ABBA blocks: hard throttling discards the block; the other findings are flags."""
    reserved = torch.cuda.memory_reserved()

    def look() -> Sequence[Flag] | Discarded:
        nonlocal reserved
        flags: list[Flag] = []
        reading = monitor.read()
        if reading is None:
            flags.append(flag("unwatched", problem=monitor.problem))
        elif reading.hard_throttle:
            return Discarded(reason=f"the GPU was throttled: {', '.join(reading.hard_throttle)}")
        elif reading.power_capped:
            flags.append(flag("power_capped"))
        now = torch.cuda.memory_reserved()
        if now > reserved:
            flags.append(flag("allocator_growth", grown=now - reserved))
            reserved = now
        return flags

    return look
