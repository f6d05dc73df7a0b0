"""Timeline of a few passes: every operator as torch.profiler records it, with SE's stages as named ranges.

A range is named after its stage and its block, `se.squeeze blocks.0.se`. An operator belongs to a stage if it ran
inside its range, or if it is the gradient of one that did: autograd gives both the same sequence number. Profiling
costs time itself, more per operator than per byte. The shares of a timeline say where to look, a measured ratio how
much it is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from selab.attention.base import Attention
from selab.attention.gated_site import named_sites
from selab.attention.se import SqueezeExcitation
from selab.bench.machine import threads_and_affinity
from selab.bench.runner import fp32_mode, phase_call, prepare, translated_errors
from selab.records.types import Phase, Workload

STAGES = ("squeeze", "excitation", "scale")
WHOLE = "whole block"
"""The stage of a block that is not split: of another kind than SE, or part of another library's network."""
_RANGE = "se."
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """An operator over the recorded steps; its own time, without that of the operators it calls.

    Attributes:
        calls: per step.
        self_s: seconds per step: of kernels where a GPU ran them, of the CPU otherwise.
    """

    name: str
    calls: float
    self_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The time of a few steps, by operator and by stage.

    Attributes:
        total_s: seconds of operators per step; Python's time between them is not included.
        operators: the greatest first.
        stages: name → seconds per step of that stage of all blocks, forward and backward.
        blocks: number of blocks.
    """

    steps: int
    phase: Phase
    total_s: float
    operators: tuple[OperatorTime, ...]
    stages: dict[str, float]
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A timeline with its trace.

    Attributes:
        export: writes the trace to a file, as JSON for TensorBoard and Perfetto.
    """

    timeline: Timeline
    export: Callable[[Path], None]


def record_steps(
    model: nn.Module, workload: Workload, phase: Phase, *, steps: int = 5, native: Iterable[str] = (), seed: int = 0
) -> Recorded:
    """Run a private copy of the model under the profiler, with shapes, memory and call stacks.

    Args:
        model: left unchanged.
        workload: batch, input, device, dtype, memory format and threads.
        phase: of one step.
        steps: number of recorded steps, after a warm-up.
        native: paths of blocks that are part of the network, not inserted.
        seed: of the input.

    Raises:
        DeviceError: no such device.
        ModelError: the network fails.
        OutOfMemoryError: a pass does not fit.
    """
    prepared = prepare(model, workload, seed=seed)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if workload.device == "cuda" else [])]
    mode = fp32_mode(workload.device, workload.dtype)
    with threads_and_affinity(workload.threads), mode, translated_errors("a step"):
        call = phase_call(prepared, phase)
        for _ in range(_WARM_UP):
            call()
        _wait(workload)
        with (
            named_ranges(prepared.network, native) as blocks,
            profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
                record_shapes=True,
                profile_memory=True,
                with_stack=True,
                # There is one cycle only; otherwise torch 2.12 warns that events of earlier cycles are dropped.
                acc_events=True,
                # Without it the stacks stay empty (torch 2.11 to 2.13).
                experimental_config=torch._C._profiler._ExperimentalConfig(verbose=True),
            ) as profiler,
        ):
            for _ in range(steps + 1):
                call()
                _wait(workload)
                profiler.step()
    return Recorded(
        timeline=_timeline(profiler.events() or [], steps, phase, blocks, on_gpu=workload.device == "cuda"),
        export=lambda path: profiler.export_chrome_trace(str(path)),
    )


def _wait(workload: Workload) -> None:
    if workload.device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def named_ranges(network: nn.Module, native: Iterable[str] = ()) -> Iterator[int]:
    """Mark the blocks of a network for the profiler during the body; yield their number.

    Args:
        network: its modules get hooks, which are removed at the end.
        native: paths of blocks that are not an `Attention`.
    """
    others = set(native)
    blocks = {path: module for path, module in named_sites(network) if isinstance(module, Attention) or path in others}
    with ExitStack() as stack:
        for path, block in blocks.items():
            if isinstance(block, SqueezeExcitation):
                _mark_stages(block, path, stack)
            else:
                _mark(block, f"{_RANGE}{WHOLE} {path}", stack)
        yield len(blocks)


def _mark(module: nn.Module, name: str, stack: ExitStack) -> None:
    opened: list[record_function] = []

    def enter(*_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _mark_stages(block: SqueezeExcitation, path: str, stack: ExitStack) -> None:
    """Mark the three stages: squeeze is a child, excitation a method, the scale the rest of forward."""
    _mark(block.squeeze, f"{_RANGE}squeeze {path}", stack)
    excite = block.excite
    scaling: list[record_function] = []

    def excited(squeezed: torch.Tensor) -> torch.Tensor:
        with record_function(f"{_RANGE}excitation {path}"):
            factor = excite(squeezed)
        scaling.append(record_function(f"{_RANGE}scale {path}"))
        scaling[-1].__enter__()  # type: ignore[no-untyped-call]
        return factor

    def leave(*_: object) -> None:
        scaling.pop().__exit__(None, None, None)

    block.excite = excited  # type: ignore[method-assign]
    stack.callback(block.__dict__.pop, "excite")
    stack.callback(block.register_forward_hook(leave).remove)


# ------------------------------------------------------------------------------------------------- events, summed up
def _timeline(events: Iterable[Any], steps: int, phase: Phase, blocks: int, *, on_gpu: bool) -> Timeline:
    # The trace also contains Python's frames, which are not operators.
    # Releases of torch before 2.12 have no such mark: calls of Python functions are not among their events.
    every = [
        one
        for one in events
        if not getattr(one, "is_python_function", False) and not one.name.startswith("ProfilerStep")
    ]
    ranges = [one for one in every if one.name.startswith(_RANGE)]
    marks = {id(one) for one in ranges}
    stage_of: dict[int, str] = {}
    gradients: dict[int, str] = {}
    for one in ranges:
        stage = _stage(one.name)
        for inner in _below(one):
            stage_of[id(inner)] = stage
            if inner.sequence_nr >= 0:
                gradients.setdefault(inner.sequence_nr, stage)
    for one in every:
        if one.name.startswith("autograd::engine::evaluate_function") and one.sequence_nr in gradients:
            stage_of[id(one)] = gradients[one.sequence_nr]
            stage_of.update((id(inner), gradients[one.sequence_nr]) for inner in _below(one))
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    stages: dict[str, float] = defaultdict(float)
    for one in every:
        if id(one) in marks:
            continue
        seconds = (one.self_device_time_total if on_gpu else one.self_cpu_time_total) * 1e-6
        calls[one.name] += 1
        times[one.name] += seconds
        if id(one) in stage_of:
            stages[stage_of[id(one)]] += seconds
    order = sorted(times, key=lambda name: (-times[name], name))
    return Timeline(
        steps=steps,
        phase=phase,
        total_s=sum(times.values()) / steps,
        operators=tuple(
            OperatorTime(name=name, calls=calls[name] / steps, self_s=times[name] / steps) for name in order
        ),
        stages={name: stages[name] / steps for name in (*STAGES, WHOLE) if name in stages},
        blocks=blocks,
    )


def _stage(name: str) -> str:
    text = name.removeprefix(_RANGE)
    return next(stage for stage in (*STAGES, WHOLE) if text.startswith(stage))


def _below(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _below(child)
