"""Records of acceptance measurements."""

import math
from collections.abc import Iterator
from statistics import median
from typing import Literal

from selab.errors import RecordError
from selab.records.consistency import mistaken_machine
from selab.records.types import Dtype, Flag, Frozen, Latency, Machine, MemoryFormat, VerdictKind
from selab.records.verdict import check


class LiveAcceptance(Frozen, frozen=True, kw_only=True):
    """A network against itself, and against itself slowed down, measured live on one machine.

    Attributes:
        median_error: of |ratio - 1| where the truth is one, and its 95th percentile.
        intervals_holding_one: of `trials`.
        slower_by_calibration: by how much the second kind was slowed down, as timed apart.
        slower_detected: trials of `slower_trials` whose verdict was `slower`.
        same: ratio, low and high of each trial of the first kind.
        slowed: of the second kind, with the noise floor and the verdict.
    """

    kind: Literal["aa"]
    machine: Machine
    arch: str
    trials: int
    seconds_per_trial: float
    median_error: float
    p95_error: float
    intervals_holding_one: int
    slower_by_calibration: float
    slower_detected: int
    slower_trials: int
    flags: tuple[Flag, ...]
    same: tuple[tuple[float, float, float], ...]
    slowed: tuple[tuple[float | None, float | None, float | None, float | None, VerdictKind], ...]


class CountingTime(Frozen, frozen=True, kw_only=True):
    """Latency of other counters against selab's at batch 1, by their names."""

    kind: Literal["counting"]
    arch: str
    machine: Machine
    comparisons: dict[str, Latency]


class LoadingTime(Frozen, frozen=True, kw_only=True):
    """Latency of torchvision's pipeline against selab's, by name: batches alone, and whole training steps.

    Attributes:
        arch: the trained network.
        images_per_call: images in one sample, by comparison.
        torchvision: its version.
    """

    kind: Literal["loading"]
    arch: str
    batch: int
    data: dict[str, str]
    images_per_call: dict[str, int]
    machine: Machine
    torchvision: str
    flags: tuple[Flag, ...]
    comparisons: dict[str, Latency]


class Distance(Frozen, frozen=True, kw_only=True):
    """The time of a network and the sum of its operators' least times."""

    name: str
    least_s: float
    whole_s: float

    @property
    def factor(self) -> float:
        """Measured over predicted."""
        return self.whole_s / self.least_s


class RoofDistances(Frozen, frozen=True, kw_only=True):
    """The accuracy of a prediction by the roofline alone: every network's time over its least time.

    Attributes:
        place: the processor and its threads.
        flops_per_s: the measured peak of matrix products, fp32.
        bandwidths: (bytes moved, bytes per second) of measured copies.
        failed: networks that could not be run.
    """

    kind: Literal["roofline"] = "roofline"
    machine: Machine
    place: str
    flops_per_s: float
    bandwidths: tuple[tuple[int, float], ...]
    networks: tuple[Distance, ...]
    failed: int


class KernelTime(Frozen, frozen=True, kw_only=True):
    """Calls of one GPU kernel, or of all kernels of a pass, on one feature map.

    Attributes:
        kernel: its name; `copy` is torch's copy of the same map.
        shape: (N, C, H, W).
        bytes: of the maps that it must read and write once.
        times_s: seconds of its calls, measured in turn with the other kernels.
        share_of_copy: its bytes per second over those of the copy, by the medians.
    """

    kernel: str
    dtype: Dtype
    memory_format: MemoryFormat
    shape: tuple[int, int, int, int]
    bytes: int
    times_s: tuple[float, ...]
    share_of_copy: float


class KernelBandwidth(Frozen, frozen=True, kw_only=True):
    """The share of the copy bandwidth that each GPU kernel reaches on the maps of ResNet-50's stages."""

    kind: Literal["kernels"] = "kernels"
    machine: Machine
    rows: tuple[KernelTime, ...]


class Acceptance(Frozen, frozen=True, kw_only=True):
    """Results of the measurements of selab itself on one machine.

    Attributes:
        live: by `nox -s aa`.
        counting: by `nox -s bench_counts` and `nox -s bench_tables`.
        loading: by `nox -s bench_data`.
        roof: by `selab roofline --all`.
        kernels: by `nox -s gpu`.
    """

    live: LiveAcceptance | None
    counting: tuple[CountingTime, ...]
    loading: LoadingTime | None
    roof: RoofDistances | None
    kernels: KernelBandwidth | None = None


def mistaken_acceptance(
    found: LiveAcceptance | CountingTime | LoadingTime | RoofDistances | KernelBandwidth,
) -> Iterator[str]:
    """Yield what is impossible in one of these results: field and reason. Latencies are checked by their samples."""
    yield from mistaken_machine(found.machine)
    if isinstance(found, CountingTime | LoadingTime):
        for name, latency in found.comparisons.items():
            try:
                check(latency)
            except RecordError as error:
                yield f"comparisons.{name}: {error}"
        return
    if isinstance(found, KernelBandwidth):
        copies = {
            (one.dtype, one.memory_format, one.shape): median(one.times_s)
            for one in found.rows
            if one.kernel == "copy" and one.times_s
        }
        for index, row in enumerate(found.rows):
            copy_s = copies.get((row.dtype, row.memory_format, row.shape))
            if copy_s is None or not row.times_s or min(row.times_s) <= 0 or row.bytes < 1:
                yield f"rows[{index}]: has no times above 0, no bytes, or no copy beside it"
                continue
            maps = row.bytes / (math.prod(row.shape) * (2 if row.dtype in ("bf16", "fp16") else 4))
            share = maps / median(row.times_s) * copy_s / 2
            if not math.isclose(share, row.share_of_copy, rel_tol=1e-9):
                yield f"rows[{index}].share_of_copy: is {row.share_of_copy!r}, its times say {share!r}"
        return
    if isinstance(found, RoofDistances):
        times = {"flops_per_s": found.flops_per_s}
        times |= {f"bandwidths[{index}]": speed for index, (_, speed) in enumerate(found.bandwidths)}
        for one in found.networks:
            times |= {f"networks.{one.name}.least_s": one.least_s, f"networks.{one.name}.whole_s": one.whole_s}
        yield from (f"{name}: is {value!r}, expected above 0" for name, value in times.items() if not value > 0)
        if found.failed < 0:
            yield f"failed: is {found.failed}, expected 0 or more"
        return
    for name, part, whole in (
        ("intervals_holding_one", found.intervals_holding_one, found.trials),
        ("slower_detected", found.slower_detected, found.slower_trials),
    ):
        if not 0 <= part <= whole:
            yield f"{name}: is {part} of {whole}"
    for name in ("median_error", "p95_error", "seconds_per_trial"):
        if not getattr(found, name) >= 0:
            yield f"{name}: is {getattr(found, name)!r}, expected 0 or more"
    for index, (ratio, low, high) in enumerate(found.same):
        if not 0 < low <= ratio <= high:
            yield f"same[{index}]: is {ratio!r} in [{low!r}, {high!r}]"
