"""Several networks of one workload as arms of one interleaved run; those that fail are named, the others go on."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import nn

from selab.bench.arms import ArmOf, Watch, can_be_captured, clock_asymmetry, cpu_arm, eager_arm, gpu_watch, graph_arm
from selab.bench.machine import GpuMonitor, available_cores, threads_and_affinity
from selab.bench.memory import saved_for_backward
from selab.bench.runner import Prepared, check_output, mode_of, prepare, translated_errors
from selab.bench.sampler import Arm, Clock, Discarded, Plan, Progress, measure_together
from selab.errors import SelabError
from selab.records.types import Flag, Phase, Run, Workload

Pair = tuple[str, str]
Make = Callable[[], nn.Module]
Report = Callable[[str, Progress | None], object]
_COMPILED_NETWORKS = 64


@dataclass(frozen=True, kw_only=True)
class Together:
    """What one interleaved run gave.

    Attributes:
        runs: method → pair → its run, the headline's method first.
        failed: (method, network) → why it is not in the run, in one line.
        saved_for_backward: bytes of each network, where the phase has a backward pass.
    """

    runs: dict[str, dict[Pair, Run]]
    failed: dict[tuple[str, str], str]
    saved_for_backward: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One way of timing: the methods that come from it, the first of them the headline, and what makes its arms."""

    methods: tuple[str, ...]
    arm_of: ArmOf
    between_quads: Callable[[], Callable[[], Sequence[Flag] | Discarded]] | None = None


def measure_networks(
    networks: Mapping[str, Make],
    pairs: Sequence[Pair],
    workload: Workload,
    phase: Phase,
    plan: Plan,
    report: Report,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    words_of: Callable[[str], str] = str,
) -> Together:
    """Makes every network, checks what it returns, and measures the pairs in one interleaved run.

    On the CPU the method is `wall`; on a GPU `eager_wall` and `eager_event` come from one run and `graph` from another,
    as in `selab.measure.latency`. All networks live at once. A network that cannot be made, fails, or does not fit is
    left out with its pairs.

    Args:
        networks: name → makes the network; the first is what nothing can be measured without.
        pairs: of names, the baseline first.
        workload: of all.
        phase: what one call is.
        plan: durations, target, and the budget of one pair.
        report: called with the network that is prepared, and after every quad with the method.
        seed: of the input and of the orders.
        clock: the host clock, seconds.
        words_of: what messages call a network of this name.

    Raises:
        SelabError: the first network fails.
        DeviceError: no such device.
    """
    cores = available_cores()
    with _place(workload, seed):
        ready, failed = _prepared(networks, workload, seed, report, words_of)
        found = Together(runs={}, failed={}, saved_for_backward={})
        for way in _ways(workload, phase, clock):
            found.failed.update({(method, name): why for method in way.methods for name, why in failed.items()})
            arms = _arms(ready, way, phase, next(iter(networks)), found, words_of)
            watch = Watch(workload, cores)
            runs = measure_together(
                arms,
                [pair for pair in pairs if set(pair) <= set(arms)],
                replace(plan, method=way.methods[0]),
                clock=clock,
                seed=seed,
                progress=_labelled(report, f"{phase.replace('_', '+')}, {len(arms)} networks, {way.methods[0]}"),
                between_quads=None if way.between_quads is None else way.between_quads(),
            )
            for (method, pair), run in watch.flagged(_by_method(runs, arms)).items():
                found.runs.setdefault(method, {})[pair] = run
        if phase != "forward":
            found.saved_for_backward.update(_saved(ready))
    return found


def _labelled(report: Report, label: str) -> Callable[[Progress], object]:
    return lambda state: report(label, state)


@contextmanager
def _place(workload: Workload, seed: int) -> Iterator[None]:
    """Threads and affinity as the workload says, random numbers of our own, and room for so many compiled networks."""
    on_gpu = workload.device == "cuda"
    devices = range(torch.cuda.device_count()) if on_gpu and torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if on_gpu else threads_and_affinity(workload.threads))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_compiler_limits() if workload.compiled else nullcontext())
        torch.manual_seed(seed)
        yield


def _compiler_limits() -> AbstractContextManager[object]:
    """Networks of one class share a code object, and past 8 compilations of one torch would silently run it eagerly."""
    from torch._dynamo import config

    patched: AbstractContextManager[object] = config.patch(
        recompile_limit=_COMPILED_NETWORKS, fail_on_recompile_limit_hit=True
    )
    return patched


def _prepared(
    networks: Mapping[str, Make], workload: Workload, seed: int, report: Report, words_of: Callable[[str], str]
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Those that return finite tensors, and of the others why not; the first one's error is raised."""
    ready: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    for name, make in networks.items():
        report(f"preparing {words_of(name)}", None)
        try:
            with translated_errors(words_of(name)):
                one = prepare(make(), workload, seed=seed)
                check_output(one, words_of(name))
        except SelabError as error:
            if not ready and not failed:
                raise
            failed[name] = str(error)
        else:
            ready[name] = one
    return ready, failed


def _ways(workload: Workload, phase: Phase, clock: Clock) -> Iterator[_Way]:
    if workload.device == "cpu":
        yield _Way(methods=("wall",), arm_of=cpu_arm(clock))
        return
    monitor = GpuMonitor()
    yield _Way(
        methods=("eager_wall", "eager_event"),
        arm_of=eager_arm(clock, monitor),
        between_quads=lambda: gpu_watch(monitor),
    )
    if can_be_captured(phase, workload):
        yield _Way(methods=("graph",), arm_of=graph_arm(clock), between_quads=lambda: gpu_watch(monitor))


def _arms(
    ready: Mapping[str, Prepared],
    way: _Way,
    phase: Phase,
    first: str,
    found: Together,
    words_of: Callable[[str], str],
) -> dict[str, Arm]:
    """Each has made one call, so that what fails, or is compiled, does so before the others are measured."""
    arms: dict[str, Arm] = {}
    for name, prepared in ready.items():
        try:
            with translated_errors(f"{words_of(name)}: {phase} in {mode_of(phase, prepared.workload)} mode"):
                arm = way.arm_of(prepared, phase)
                arm.settle()
        except SelabError as error:
            if name == first:
                raise
            found.failed.update({(method, name): str(error) for method in way.methods})
        else:
            arms[name] = arm
    return arms


def _by_method(runs: Mapping[Pair, Mapping[str, Run]], arms: Mapping[str, Arm]) -> dict[tuple[str, Pair], Run]:
    """Turned round, with what the clocks of a pair's arms say."""
    found = {}
    for pair, methods in runs.items():
        extra = clock_asymmetry(arms[pair[0]], arms[pair[1]])
        for method, run in methods.items():
            found[method, pair] = msgspec.structs.replace(run, flags=(*run.flags, *extra))
    return found


def _saved(ready: Mapping[str, Prepared]) -> Iterator[tuple[str, int]]:
    for name, prepared in ready.items():
        try:
            with translated_errors(name):
                yield name, saved_for_backward(prepared)
        except SelabError:
            continue  # it was timed, so it runs; only this count is missing, and the table shows that
