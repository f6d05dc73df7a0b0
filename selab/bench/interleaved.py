"""Several networks of one workload as arms of one interleaved run; one that fails is named and left out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from torch import nn

from selab.bench.arms import Watch
from selab.bench.backends import Backend, Timing, backend, check_phase
from selab.bench.machine import available_cores
from selab.bench.progress import Report
from selab.bench.runner import mode_of
from selab.bench.sampler import Arm, Clock, Plan, measure_together
from selab.errors import SelabError
from selab.records.types import Phase, Run, Workload

Pair = tuple[str, str]
Make = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Together:
    """The result of one interleaved run.

    Attributes:
        runs: method → pair → its run, the headline's method first.
        failed: (method, network) → the reason why it is not in the run, in one line.
        saved_for_backward: bytes of each network, where the phase has a backward pass.
    """

    runs: dict[str, dict[Pair, Run]]
    failed: dict[tuple[str, str], str]
    saved_for_backward: dict[str, int]


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
    """Make every network, check its output, and measure the pairs in one interleaved run per group of methods.

    The methods are those of the workload's runtime, as in `selab.bench.latency`. All networks are in memory at once.
    A network that cannot be made, fails, or does not fit is left out with its pairs.

    Args:
        networks: name → makes the network; the first is required, as every comparison needs it.
        pairs: of names, the baseline first.
        workload: of all.
        phase: what one call is.
        plan: durations, target, and the budget of one pair.
        report: called with the network being prepared, and after every ABBA block with the method.
        seed: of the input and of the orders.
        clock: the host clock, seconds.
        words_of: name → the name used in messages.

    Raises:
        SelabError: the first network fails.
        ModelError: the runtime cannot run this phase.
        UnknownNameError: there is no such runtime.
        DeviceError: no such device, or the runtime is not installed.
    """
    runtime = backend(workload.runtime)
    check_phase(runtime, phase)
    cores = available_cores()
    with runtime.session(workload, seed=seed):
        ready, failed = _prepared(runtime, networks, workload, seed, report, words_of)
        found = Together(runs={}, failed={}, saved_for_backward={})
        for timing in runtime.timings(workload, phase, clock=clock):
            found.failed.update({(method, name): why for method in timing.methods for name, why in failed.items()})
            arms = _arms(runtime, ready, timing, workload, phase, next(iter(networks)), found, words_of)
            watch = Watch(workload, cores)
            with runtime.translated_errors(f"{phase} of {len(arms)} networks"):
                runs = measure_together(
                    arms,
                    [pair for pair in pairs if set(pair) <= set(arms)],
                    timing.plan(plan),
                    clock=clock,
                    seed=seed,
                    progress=partial(report, f"{phase.replace('_', '+')}, {len(arms)} networks, {timing.methods[0]}"),
                    between_blocks=None if timing.watch is None else timing.watch(),
                )
            for (method, pair), run in watch.flagged(_by_method(runs, arms, timing)).items():
                found.runs.setdefault(method, {})[pair] = run
        if phase != "forward":
            found.saved_for_backward.update(_saved(runtime, ready))
    return found


def _prepared(
    runtime: Backend[Any],
    networks: Mapping[str, Make],
    workload: Workload,
    seed: int,
    report: Report,
    words_of: Callable[[str], str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the networks whose outputs are finite, and the reason for each other one; the first one must succeed."""
    ready: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, make in networks.items():
        report(f"preparing {words_of(name)}", None)
        try:
            with runtime.translated_errors(words_of(name)):
                one = runtime.prepare(make(), workload, seed=seed)
                runtime.check_output(one, words_of(name))
        except SelabError as error:
            if not ready and not failed:
                raise
            failed[name] = str(error)
        else:
            ready[name] = one
    return ready, failed


def _arms(
    runtime: Backend[Any],
    ready: Mapping[str, Any],
    timing: Timing,
    workload: Workload,
    phase: Phase,
    first: str,
    found: Together,
    words_of: Callable[[str], str],
) -> dict[str, Arm]:
    """Make the arms and call each once, so that failures and compilation happen before anything is measured."""
    arms: dict[str, Arm] = {}
    for name, prepared in ready.items():
        try:
            with runtime.translated_errors(f"{words_of(name)}: {phase} in {mode_of(phase, workload)} mode"):
                arm = timing.arm(prepared, phase)
                arm.warm_call()
        except SelabError as error:
            if name == first:
                raise
            found.failed.update({(method, name): str(error) for method in timing.methods})
        else:
            arms[name] = arm
    return arms


def _by_method(
    runs: Mapping[Pair, Mapping[str, Run]], arms: Mapping[str, Arm], timing: Timing
) -> dict[tuple[str, Pair], Run]:
    """Return (method, pair) → run, with the flags of the pair's arms."""
    found = {}
    for pair, methods in runs.items():
        extra = timing.flags(arms[pair[0]], arms[pair[1]])
        for method, run in methods.items():
            found[method, pair] = msgspec.structs.replace(run, flags=(*run.flags, *extra))
    return found


def _saved(runtime: Backend[Any], ready: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, prepared in ready.items():
        try:
            with runtime.translated_errors(name):
                yield name, runtime.saved_for_backward(prepared)
        except SelabError:
            continue  # it was timed, so it runs; only this count is missing, and the table shows that
