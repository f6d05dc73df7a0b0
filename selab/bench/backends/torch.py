"""PyTorch as a runtime: eager, compiled by torch.compile, or with `selab.fuse`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from selab.bench.arms import (
    STEP_PHASES,
    can_be_captured,
    clock_asymmetry,
    cpu_arm,
    eager_arm,
    gpu_watch,
    graph_arm,
    l2_flush,
    step_arm,
)
from selab.bench.backends import Timing
from selab.bench.backends.torch_memory import memory, saved_for_backward
from selab.bench.machine import GpuMonitor, threads_and_affinity
from selab.bench.runner import Prepared, check_output, device_faults, fp32_mode, prepare, translated_errors
from selab.bench.sampler import Clock
from selab.records.types import PHASES, Memory, Phase, Workload

_COMPILED_NETWORKS = 64


class TorchBackend:
    """PyTorch on a CPU or a CUDA device."""

    name = "torch"
    phases = PHASES

    @contextmanager
    def session(self, workload: Workload, *, seed: int) -> Iterator[None]:
        """Set threads, affinity, random state, fp32's mode and the compiler's limits for the body, and restore them."""
        on_gpu = workload.device == "cuda"
        devices = range(torch.cuda.device_count()) if on_gpu and torch.cuda.is_available() else []
        # After the failure of a kernel, restoring the device's random state fails too.
        with device_faults(workload.device), ExitStack() as stack:
            stack.enter_context(nullcontext() if on_gpu else threads_and_affinity(workload.threads))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(fp32_mode(workload.device, workload.dtype))
            stack.enter_context(warnings.catch_warnings())
            # The first matrix product of autograd's thread on a GPU; torch then does what the warning asks for.
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
            stack.enter_context(_compiler_settings(workload) if workload.compiled else nullcontext())
            torch.manual_seed(seed)
            yield

    def prepare(self, model: nn.Module, workload: Workload, *, seed: int) -> Prepared:
        """Copy the model to the device, in the workload's memory format, fused or compiled if asked."""
        return prepare(model, workload, seed=seed)

    def check_output(self, prepared: Prepared, name: str) -> None:
        """Run the network once in eval mode and check that its output is finite."""
        check_output(prepared, name)

    def timings(self, workload: Workload, phase: Phase, *, clock: Clock, cold: bool = False) -> Iterator[Timing]:
        """Yield the runs of a phase.

        On a CPU the method is `wall`. On a GPU `eager_wall` (k calls, one synchronize, host clock) and `eager_event`
        (CUDA events around the same calls) come from one run. `graph` (one captured call, replayed) comes from another,
        except for `backward`, compiled networks and a cold cache.
        """
        if workload.device == "cpu":
            yield Timing(methods=("wall",), arm=cpu_arm(clock))
            return
        monitor = GpuMonitor()
        yield Timing(
            methods=("eager_event",) if cold else ("eager_wall", "eager_event"),
            arm=eager_arm(clock, monitor, flush=l2_flush() if cold else None),
            statistic="typical",
            watch=lambda: gpu_watch(monitor),
            pair_flags=clock_asymmetry,
        )
        if not cold and can_be_captured(phase, workload):
            yield Timing(
                methods=("graph",), arm=graph_arm(clock), statistic="typical", watch=lambda: gpu_watch(monitor)
            )

    def training_step(self, workload: Workload, *, clock: Clock) -> Timing | None:
        """Return the run of both phases of training on a CPU."""
        if workload.device != "cpu":
            return None
        return Timing(methods=STEP_PHASES, method="wall", arm=step_arm(clock))

    def translated_errors(self, what: str) -> AbstractContextManager[None]:
        """Turn what torch and a network raise into ModelError or OutOfMemoryError."""
        return translated_errors(what)

    def memory(self, model: nn.Module, workload: Workload, *, seed: int, phases: Sequence[Phase]) -> Memory:
        """Measure peaks by torch's profiler on a CPU, by its caching allocator on a GPU."""
        with fp32_mode(workload.device, workload.dtype):
            return memory(model, workload, seed=seed, phases=phases)

    def saved_for_backward(self, prepared: Prepared) -> int:
        """Return the bytes of the storages that autograd keeps for backward, parameters not included."""
        return saved_for_backward(prepared)


@contextmanager
def _compiler_settings(workload: Workload) -> Iterator[None]:
    """Allow many compiled networks of one class, and freeze the weights if asked.

    Past 8 compilations torch would silently run them eagerly.
    """
    from torch._dynamo import config

    with config.patch(recompile_limit=_COMPILED_NETWORKS, fail_on_recompile_limit_hit=True), ExitStack() as stack:
        if workload.frozen:
            from torch._inductor import config as inductor

            stack.enter_context(inductor.patch(freezing=True))
        yield


BACKEND = TorchBackend()
