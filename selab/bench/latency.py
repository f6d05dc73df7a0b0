"""Latency of a variant against its baseline: networks become arms, the paired sampler times them, controls frame it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from selab.bench.arms import (
    ArmOf,
    Watch,
    can_be_captured,
    clock_asymmetry,
    cpu_arm,
    eager_arm,
    gpu_watch,
    graph_arm,
    l2_flush,
)
from selab.bench.machine import GpuMonitor, available_cores, threads_and_affinity
from selab.bench.runner import Prepared, check_output, mode_of, prepare, translated_errors
from selab.bench.sampler import Clock, Discarded, Plan, Progress, measure, measure_control
from selab.records.types import Flag, Frozen, Phase, Run, Workload

ProgressOf = Callable[[str, Progress], object]


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


def _measured(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    arm_of: ArmOf,
    *,
    seed: int,
    clock: Clock,
    progress: ProgressOf | None,
    between_quads: Callable[[], Sequence[Flag] | Discarded] | None = None,
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
    flush = l2_flush() if cold else None
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
