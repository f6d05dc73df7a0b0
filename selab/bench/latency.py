"""Latency of a variant against its baseline, framed by A/A controls."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, cast

from torch import nn

from selab.bench.arms import Watch
from selab.bench.backends import Timing, backend, check_phase
from selab.bench.machine import available_cores
from selab.bench.progress import Progress
from selab.bench.runner import mode_of
from selab.bench.sampler import Arm, Clock, Plan, measure, measure_together
from selab.meta.state import restored
from selab.records.types import PHASES, Frozen, Phase, Run, Workload

ProgressOf = Callable[[str, Progress], object]


class RawPhase(Frozen, frozen=True, kw_only=True):
    """The raw result of one process for one phase and method: the run, and the controls before and after it."""

    phase: Phase
    method: str
    run: Run
    controls: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Baseline, a second instance of it for the control, and the variant: private copies, ready to run.

    The networks are in the type of the workload's runtime.

    Attributes:
        cores: that this process could use before it was pinned.
    """

    baseline: Any
    again: Any
    variant: Any
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
    shuffle: int | None = None,
) -> Iterator[Networks]:
    """Prepare copies of both networks in the workload's runtime and check their outputs; the models stay unchanged.

    Threads, affinity and random state are set for the body and restored after it, and so are the caches beside the
    models that their forward fills.

    Args:
        baseline: arm A.
        variant: arm B.
        workload: of both.
        seed: of the input, the same for both.
        names: the names of the two in messages.
        shuffle: seed of the order in which the copies are made, which decides where they lie in memory; None for
            baseline, second instance, variant.

    Raises:
        UnknownNameError: there is no such runtime.
        DeviceError: no such device, or the runtime is not installed.
        OutOfMemoryError: three copies and an input do not fit.
        ModelError: a network fails, or its output is not finite.
    """
    runtime = backend(workload.runtime)
    cores = available_cores()
    with restored(baseline), restored(variant), runtime.session(workload, seed=seed):
        models = (baseline, baseline, variant)
        order = list(range(3)) if shuffle is None else Random(f"order {shuffle}").sample(range(3), 3)
        copies = {place: runtime.prepare(models[place], workload, seed=seed) for place in order}
        made = [copies[place] for place in range(3)]
        for prepared, name in zip(made, (names[0], *names), strict=True):
            runtime.check_output(prepared, name)
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
    """Measure one phase by every method of the runtime, as `phase_runs`; return method name → its runs."""
    runs = phase_runs(nets, phase, plan, seed=seed, cold=cold, clock=clock, progress=progress)
    return {raw.method: raw for raw in runs}


def phase_runs(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    *,
    seed: int = 0,
    cold: bool = False,
    clock: Clock = time.perf_counter,
    progress: ProgressOf | None = None,
) -> Iterator[RawPhase]:
    """Measure one phase by every method of the runtime: a control, the comparison, a control.

    What was yielded stands, also where a later method fails. The methods of PyTorch are listed at
    `selab.bench.backends.torch.TorchBackend.timings`.

    Args:
        nets: as from `networks`, whose block must still be open.
        phase: what one call is.
        plan: durations, target and budget; its method is replaced by the runtime's.
        seed: of the order of the ABBA blocks.
        cold: on a GPU, flush the L2 cache before each call, outside the events; then only `eager_event` is measured.
        clock: the host clock, seconds.
        progress: called with a label (`control`, `forward` …) after every ABBA block.

    Yields:
        The runs of each method, the headline first.

    Raises:
        OutOfMemoryError: the pass does not fit.
        ModelError: the runtime cannot run this phase, or there is nothing to differentiate.
    """
    runtime = backend(nets.workload.runtime)
    check_phase(runtime, phase)
    with runtime.translated_errors(f"{phase} in {mode_of(phase, nets.workload)} mode"):
        for timing in runtime.timings(nets.workload, phase, clock=clock, cold=cold):
            yield from _measured(nets, phase, timing.plan(plan), timing, seed=seed, clock=clock, progress=progress)


def measure_short(
    nets: Networks,
    phases: tuple[Phase, ...],
    plan: Plan,
    *,
    seed: int = 0,
    control: bool = True,
    cold: bool = False,
    clock: Clock = time.perf_counter,
) -> list[RawPhase]:
    """Measure phases for a short time by every method of the runtime, comparison and control interleaved.

    One of many such runs, each in a fresh process; alone it has no interval.

    Args:
        nets: as from `networks`, whose block must still be open.
        phases: one, or those that the same calls can time: a group of `selab.bench.backends.together`.
        plan: as of `Plan.short`; its method is replaced by the runtime's.
        seed: of the order of the ABBA blocks.
        control: whether the baseline is also measured against its second instance.
        cold: as in `measure_phase`.
        clock: the host clock, seconds.

    Returns:
        The run of each phase and method, with no control or one, the headline first.

    Raises:
        OutOfMemoryError, ModelError: as `measure_phase`.
    """
    runtime = backend(nets.workload.runtime)
    phase = phases[0]
    check_phase(runtime, phase)
    found = []
    with runtime.translated_errors(f"{phase} in {mode_of(phase, nets.workload)} mode"):
        step = runtime.training_step(nets.workload, clock=clock) if len(phases) > 1 else None
        alone = runtime.timings(nets.workload, phase, clock=clock, cold=cold)
        for timing in alone if step is None else [step]:
            prepared = {"baseline": nets.baseline, "variant": nets.variant}
            prepared |= {"again": nets.again} if control else {}
            arms = {name: timing.arm(one, phase) for name, one in prepared.items()}
            watch = Watch(nets.workload, nets.cores)
            runs = measure_together(
                arms,
                [("baseline", name) for name in arms if name != "baseline"],
                timing.plan(plan),
                clock=clock,
                seed=seed,
                between_blocks=None if timing.watch is None else timing.watch(),
            )
            compared, controls = runs["baseline", "variant"], runs.get(("baseline", "again"), {})
            compared = watch.flagged(compared, extra=timing.flags(arms["baseline"], arms["variant"]))
            for name, run in compared.items():
                controlled = (controls[name],) if controls else ()
                which, method = (phase, name) if step is None else (cast("Phase", name), step.method)
                found.append(RawPhase(phase=which, method=method, run=run, controls=controlled))
    return sorted(found, key=lambda raw: PHASES.index(raw.phase))


def _measured(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    timing: Timing,
    *,
    seed: int,
    clock: Clock,
    progress: ProgressOf | None,
) -> Iterator[RawPhase]:
    """Run control, comparison and control, with the machine watched around each."""
    between = None if timing.watch is None else timing.watch()
    baseline, again = timing.arm(nets.baseline, phase), timing.arm(nets.again, phase)
    watch = Watch(nets.workload, nets.cores)

    def against(other: Arm, plan: Plan, seed: int, label: str) -> dict[str, Run]:
        watch.restart()
        runs = measure(
            baseline,
            other,
            plan,
            clock=clock,
            seed=seed,
            progress=None if progress is None else partial(progress, label),
            between_blocks=between,
        )
        return watch.flagged(runs, extra=timing.flags(baseline, other) if other is not again else ())

    before = against(again, plan.for_control(), seed + 1, "control")
    plan = plan.warmed()
    variant = timing.arm(nets.variant, phase)
    runs = against(variant, plan, seed, phase)
    del variant
    after = against(again, plan.for_control(), seed + 2, "control")
    for method, run in runs.items():
        yield RawPhase(phase=phase, method=method, run=run, controls=(before[method], after[method]))
