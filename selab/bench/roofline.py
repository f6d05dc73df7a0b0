"""Roofline of a forward pass: the least time of every operator on a device, next to its measured time.

The least time is that of its arithmetic at the device's peak, or of its bytes at the bandwidth of a copy, whichever is
longer. Both peaks are measured in the same run: the arithmetic by matrix products, the bandwidth by copies of several
sizes, because data that fits into a cache moves faster. An operator is compared with the largest copy that moves no
more bytes than it does, so that its least time stays a lower bound.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model", CACM 52(4).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selab import units
from selab.bench.devices import copy_bandwidth
from selab.bench.machine import threads_and_affinity
from selab.bench.runner import DTYPES, fp32_mode, prepare, translated_errors
from selab.cost.rules import is_counted
from selab.cost.tracer import Operation, op_trace
from selab.errors import ModelError
from selab.meta.modes import DispatchMode
from selab.records.types import Dtype, On, Workload

Bound = Literal["arithmetic", "memory"]
COPIES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28)
"""Bytes that a measured copy moves, half of them read and half written."""
_MATRICES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
_REPEATS = 5
_LEAST_PASSES = 5


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The peak rates of a device in one dtype.

    Attributes:
        flops_per_s: of matrix products.
        bandwidths: (bytes moved, bytes per second) of copies, the smallest first.
        source: `measured in this run`, or the publication.
    """

    dtype: Dtype
    flops_per_s: float
    bandwidths: tuple[tuple[int, float], ...]
    source: str

    def bandwidth(self, moved: int) -> float:
        """Return the bytes per second of the largest copy that moves no more than `moved` bytes, or of the smallest."""
        return copy_bandwidth(self.bandwidths, moved)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second of the largest copy, which exceeds every cache."""
        return self.bandwidths[-1][1]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operator call.

    Attributes:
        path: of the module that called it.
        stage: of an SE block; empty outside of one.
        least_s: seconds at the device's peaks.
        measured_s: least seconds of several passes; None if the device is not present.
        bound: the limiting resource.
    """

    name: str
    path: str
    stage: str
    flops: int
    bytes: int
    least_s: float
    measured_s: float | None
    bound: Bound

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.bytes if self.bytes else float("inf")

    @property
    def efficiency(self) -> float | None:
        """Least over measured time: 1 on the roofline."""
        return None if not self.measured_s else self.least_s / self.measured_s


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """All operators of a forward pass under the peaks of a device.

    Attributes:
        whole_s: seconds of the whole pass, run as usual; the operators are timed one by one, with a clock between them.
    """

    peaks: Peaks
    points: tuple[Point, ...]
    whole_s: float | None

    @property
    def least_s(self) -> float:
        """Sum of the operators' least times, seconds."""
        return sum(point.least_s for point in self.points)

    @property
    def measured_s(self) -> float | None:
        """Sum of the operators' measured times, seconds; None if one was not measured."""
        times = [point.measured_s for point in self.points]
        return None if None in times else sum(one for one in times if one is not None)


# --------------------------------------------------------------------------------------------------------------- peaks
def measure_peaks(
    device: str, dtype: Dtype, *, threads: int = 1, clock: Callable[[], float] = time.perf_counter
) -> Peaks:
    """Measure a device's peaks: the best of several matrix products, and of copies of each size.

    Args:
        device: `cpu` or `cuda`.
        dtype: of both.
        threads: of the CPU.
        clock: seconds.
    """
    failing = translated_errors("measuring the device's peaks")
    with threads_and_affinity(threads), fp32_mode(device, dtype), torch.inference_mode(), failing:
        products = [_product_rate(size, device, dtype, clock) for size in _MATRICES[device]]
        bandwidths = tuple((size, _copy_rate(size, device, dtype, clock)) for size in COPIES)
    return Peaks(dtype=dtype, flops_per_s=max(products), bandwidths=bandwidths, source="measured in this run")


def _product_rate(size: int, device: str, dtype: Dtype, clock: Callable[[], float]) -> float:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, clock)


def _copy_rate(moved: int, device: str, dtype: Dtype, clock: Callable[[], float]) -> float:
    elements = moved // 2 // DTYPES[dtype].itemsize
    source = torch.ones(elements, device=device, dtype=DTYPES[dtype])
    target = torch.empty_like(source)
    # Small copies are repeated within a sample, so that the overhead of a call is small.
    times = max(1, 2**22 // moved)

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    return moved * times / _best(copies, device, clock)


def _best(call: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    samples = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        start = clock()
        call()
        _wait(device)
        samples.append(clock() - start)
    return min(samples[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------- operators
class _Timed(DispatchMode):
    """Times each counted operator as it passes."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.times: list[float] = []
        self._device = device
        self._clock = clock

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_counted(func):
            return func(*args, **(kwargs or {}))
        _wait(self._device)
        start = self._clock()
        out = func(*args, **(kwargs or {}))
        _wait(self._device)
        self.times.append(self._clock() - start)
        self.names.append(func._schema.name)
        return out


def roofline(
    model: nn.Module,
    workload: Workload,
    peaks: Peaks,
    *,
    native: Iterable[str] = (),
    budget_s: float = 5.0,
    measured: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    on: On = "fake",
) -> Roofline:
    """Return the least time of every operator of an inference pass and, if the device is present, its measured time.

    Args:
        model: left as it is.
        workload: batch, input, device, dtype, memory format and threads; in half precision the whole network is.
        peaks: of the device.
        native: paths of SE blocks that the network brings along.
        budget_s: seconds to repeat the pass for; it is run at least five times.
        measured: whether to run it here at all.
        clock: seconds.
        on: `cpu` to count its operators on real tensors, where values decide what it computes.

    Raises:
        ModelError: the network fails, or runs other operators here than on the meta device.
    """
    shape = (workload.batch, *workload.input_chw)
    traced = op_trace(model, shape, dtype=DTYPES[workload.dtype], se_blocks=tuple(native), on=on)
    if not measured:
        return Roofline(peaks=peaks, points=_points(traced.operations, peaks, None), whole_s=None)
    plain = prepare(model, workload)
    network = plain.network.eval().to(DTYPES[workload.dtype])
    example = plain.input.to(DTYPES[workload.dtype])
    mode, failing = fp32_mode(workload.device, workload.dtype), translated_errors("the network's forward")
    with threads_and_affinity(workload.threads), mode, torch.no_grad(), failing:
        names, times = _operator_times(network, example, workload.device, budget_s, clock)
        whole = _best(lambda: network(example), workload.device, clock)
    if names != [operation.operator for operation in traced.operations]:
        ran = units.counted(len(names), "operator")
        raise ModelError(
            f"{type(model).__name__}: runs {ran} on {workload.device}, {len(traced.operations)} were "
            "counted; they cannot be told apart, so there is no roofline: leave --dtype at fp32, or use eager mode"
        )
    return Roofline(peaks=peaks, points=_points(traced.operations, peaks, times), whole_s=whole)


def _operator_times(
    network: nn.Module, example: Tensor, device: str, budget_s: float, clock: Callable[[], float]
) -> tuple[list[str], list[float]]:
    """Return the names of the operators, and the least time of each over the passes."""
    network(example)
    end = clock() + budget_s
    passes: list[_Timed] = []
    while len(passes) < _LEAST_PASSES or clock() < end:
        passes.append(_Timed(device, clock))
        with passes[-1]:
            network(example)
    return passes[0].names, [min(times) for times in zip(*(one.times for one in passes), strict=True)]


def _points(operations: Sequence[Operation], peaks: Peaks, times: Sequence[float] | None) -> tuple[Point, ...]:
    points = []
    for index, operation in enumerate(operations):
        flops = 2 * operation.macs + operation.other_flops
        arithmetic = flops / peaks.flops_per_s
        memory = operation.bytes / peaks.bandwidth(operation.bytes)
        points.append(
            Point(
                name=operation.name,
                path=operation.path,
                stage=operation.stage,
                flops=flops,
                bytes=operation.bytes,
                least_s=max(arithmetic, memory),
                measured_s=None if times is None else times[index],
                bound="arithmetic" if arithmetic >= memory else "memory",
            )
        )
    return tuple(points)
