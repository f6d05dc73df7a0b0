"""Runtimes that networks are measured in: the protocol that each implements, and their registry.

A new runtime is one module with a `Backend` and one line in `REGISTRY`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol, TypeVar

from torch import nn

from selab.bench.sampler import Arm, Clock, Plan, WatchBlocks
from selab.deploy.target import needed
from selab.errors import ModelError, UnknownNameError, nearest
from selab.records.types import PHASES, Flag, Memory, Phase, Statistic, Workload

REGISTRY = {
    "torch": "selab.bench.backends.torch:BACKEND",
    "onnxruntime": "selab.bench.backends.onnxruntime:BACKEND",
    "openvino": "selab.bench.backends.openvino:BACKEND",
    "executorch": "selab.bench.backends.executorch:BACKEND",
    "litert": "selab.bench.backends.litert:BACKEND",
    "aoti": "selab.bench.backends.aoti:BACKEND",
}
"""`Workload.runtime` → `module:object` of its backend, imported when it is asked for."""

P = TypeVar("P")
"""A private copy of a network with its input, in the runtime's own type."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One interleaved run: how its arms are made and which methods it times.

    Attributes:
        methods: names, the headline first; every arm samples all of them. Where one run measures several phases, these
            are the phases' names.
        method: then the name of the way of timing.
        arm: makes the arm of a prepared network for a phase.
        statistic: of the headline; None for the plan's.
        watch: makes the watcher of a run; None where there is nothing to watch.
        pair_flags: returns the flags of a baseline's and a variant's arm after a run; None where there are none.
    """

    methods: tuple[str, ...]
    arm: Callable[[Any, Phase], Arm]
    statistic: Statistic | None = None
    watch: Callable[[], WatchBlocks] | None = None
    pair_flags: Callable[[Arm, Arm], Sequence[Flag]] | None = None
    method: str = ""

    def plan(self, plan: Plan) -> Plan:
        """Return the plan with this run's headline."""
        return replace(plan, method=self.methods[0], statistic=self.statistic or plan.statistic)

    def flags(self, baseline: Arm, variant: Arm) -> Sequence[Flag]:
        """Return the flags of two arms after a run."""
        return () if self.pair_flags is None else self.pair_flags(baseline, variant)


class Backend(Protocol[P]):
    """A runtime: it prepares networks, times calls of them, and checks their outputs."""

    @property
    def name(self) -> str:
        """The name in `Workload.runtime`."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that it can run."""

    def session(self, workload: Workload, *, seed: int) -> AbstractContextManager[None]:
        """Set threads, affinity and random state for the body, and restore them."""

    def prepare(self, model: nn.Module, workload: Workload, *, seed: int) -> P:
        """Make a private copy of the model, ready to run; the model is left unchanged.

        Args:
            model: the network.
            workload: batch, input, device, dtype, memory format and threads.
            seed: of the input, which is drawn from N(0, 1).

        Raises:
            DeviceError: no such device, or the runtime cannot use it.
            ModelError: the runtime cannot convert the network.
            OutOfMemoryError: the copy or the input does not fit.
        """

    def check_output(self, prepared: P, name: str) -> None:
        """Run the network once in inference.

        Raises:
            ModelError: it fails, returns no tensor, or returns a value that is not finite; the message begins with
                `name`.
            OutOfMemoryError: the pass does not fit.
        """

    def timings(self, workload: Workload, phase: Phase, *, clock: Clock, cold: bool = False) -> Iterable[Timing]:
        """Yield the runs that measure a phase, the headline first.

        Args:
            workload: of all networks.
            phase: what one call is.
            clock: the host clock, seconds.
            cold: on a GPU, flush the L2 cache before each call.
        """

    def training_step(self, workload: Workload, *, clock: Clock) -> Timing | None:
        """Return the run that times `backward` and `forward_backward` by the same calls; None where there is none.

        Its methods are the names of the two phases.
        """

    def translated_errors(self, what: str) -> AbstractContextManager[None]:
        """Turn the runtime's exceptions in the body into ModelError or OutOfMemoryError; `what` begins the message."""

    def memory(self, model: nn.Module, workload: Workload, *, seed: int, phases: Sequence[Phase]) -> Memory:
        """Measure the peak memory of these phases on a private copy; a failure is reported in `Memory.error`."""

    def saved_for_backward(self, prepared: P) -> int:
        """Return the bytes kept between the forward and the backward pass; called for phases with a backward pass."""


def backend(name: str) -> Backend[Any]:
    """Return a runtime by its name.

    Raises:
        UnknownNameError: there is no such runtime.
        DeviceError: a package that it needs is not installed.
    """
    if name not in REGISTRY:
        raise UnknownNameError(f"runtime {name}: unknown{nearest(name, REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    with needed(name):
        found: Backend[Any] = getattr(import_module(module), attribute)
    return found


def together(runtime: Backend[Any], workload: Workload, phases: Sequence[Phase]) -> list[tuple[Phase, ...]]:
    """Return the phases in groups: those that the same calls of a short run can time are one group."""
    step = runtime.training_step(workload, clock=time.perf_counter)
    both = () if step is None else tuple(one for one in PHASES if one in step.methods)
    if not both or not set(both) <= set(phases):
        return [(one,) for one in phases]
    return [*((one,) for one in phases if one not in both), both]


def check_phase(runtime: Backend[Any], phase: Phase) -> None:
    """Raise ModelError where the runtime cannot run this phase."""
    if phase not in runtime.phases:
        raise ModelError(f"runtime {runtime.name} cannot run {phase}; it runs {', '.join(runtime.phases)}")
