"""Energy of calls by the counters of the machine: NVML's of a GPU, RAPL's of a CPU's packages."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Protocol

from selab.bench.backends import backend
from selab.bench.latency import Networks
from selab.bench.machine import GpuMonitor
from selab.bench.sampler import Arm, Clock, Plan, gc_disabled, orders, warm_up
from selab.errors import DeviceError
from selab.records.types import Device, EnergyBlock, Phase

RAPL = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
ENERGY_PHASES: tuple[Phase, ...] = ("forward", "forward_backward")
"""The energy of a backward pass alone is not measured: a counter cannot be read between the passes of one call."""
# A counter that stands still for so many seconds more than a sample lasts does not count.
_PATIENCE_S = 3.0
# Seconds of work between two readings.
_READING_S = 0.02


class EnergyMeter(Protocol):
    """A counter of energy."""

    @property
    def name(self) -> str:
        """What it counts, for the record."""

    def joules(self) -> float:
        """Return the energy since some moment in the past; it may move in steps.

        Raises:
            DeviceError: it does not answer any more.
        """


class NvmlMeter:
    """The energy of the whole GPU since its driver was loaded, by nvmlDeviceGetTotalEnergyConsumption (mJ)."""

    name = "NVML, the whole GPU"

    def __init__(self, monitor: GpuMonitor) -> None:
        self._monitor = monitor

    def joules(self) -> float:
        """Return the counter."""
        found = self._monitor.energy_j()
        if found is None:
            raise DeviceError(self._monitor.problem)
        return found


class RaplMeter:
    """The energy of all CPU packages, other programs included, by Linux' powercap (µJ, with an overflow).

    Args:
        packages: folders of the packages in `/sys/class/powercap`.

    Source: Linux, Documentation/power/powercap/powercap.rst.
    """

    name = "RAPL, all CPU packages"

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._ranges = [int((folder / "max_energy_range_uj").read_text(encoding="ascii")) for folder in packages]
        self._last = self._read()
        self._passed = [0] * len(packages)

    def joules(self) -> float:
        """Return the energy since this object was made."""
        now = self._read()
        for place, (before, after, size) in enumerate(zip(self._last, now, self._ranges, strict=True)):
            self._passed[place] += after - before if after >= before else after - before + size
        self._last = now
        return sum(self._passed) / 1e6

    def _read(self) -> list[int]:
        try:
            return [int((folder / "energy_uj").read_text(encoding="ascii")) for folder in self._packages]
        except (OSError, ValueError) as error:
            raise DeviceError(f"RAPL stopped answering ({error})") from None


def energy_meter(device: Device, *, folder: Path = RAPL) -> EnergyMeter:
    """Return the counter of a device.

    Args:
        device: `cpu` or `cuda`.
        folder: of powercap.

    Raises:
        DeviceError: there is none that this process can read; says why.
    """
    if device == "cuda":
        monitor = GpuMonitor()
        meter = NvmlMeter(monitor)
        meter.joules()
        return meter
    packages = sorted(one for one in folder.glob("intel-rapl:*") if _PACKAGE.fullmatch(one.name))
    if not packages:
        raise DeviceError(f"{folder} has no counter of a CPU package (RAPL); virtual machines seldom have one")
    try:
        return RaplMeter(packages)
    except PermissionError as error:
        raise DeviceError(f"{error.filename} may be read by the administrator only") from None
    except (OSError, ValueError) as error:
        raise DeviceError(f"RAPL cannot be read ({error})") from None


def energy_blocks(
    nets: Networks,
    phase: Phase,
    plan: Plan,
    meter: EnergyMeter,
    *,
    blocks: int,
    sample_s: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Iterator[EnergyBlock]:
    """Yield ABBA blocks of the energy of a call, by the calls of the runtime's headline.

    Args:
        nets: as from `selab.bench.latency.networks`, whose block must still be open.
        phase: one of `ENERGY_PHASES`.
        plan: its warm-up.
        meter: the counter.
        blocks: how many.
        sample_s: seconds of a sample, at least.
        seed: of the order within each block.
        clock: seconds.

    Raises:
        DeviceError: the counter stands still, or does not answer any more.
        OutOfMemoryError, ModelError: as `selab.bench.latency.measure_phase`.
    """
    runtime = backend(nets.workload.runtime)
    with runtime.translated_errors(f"energy of {phase}"), gc_disabled():
        timing = next(iter(runtime.timings(nets.workload, phase, clock=clock)))
        arms = {"A": timing.arm(nets.baseline, phase), "B": timing.arm(nets.variant, phase)}
        warm = warm_up(list(arms.values()), plan, clock)
        calls = max(1, round(_READING_S / max(warm.calls_s)))
        coin = orders(Random(f"energy {seed}").getrandbits(32))
        for _ in range(blocks):
            order = next(coin)
            first, second, third, fourth = (
                sample_j(arms[letter], meter, calls=calls, least_s=sample_s, clock=clock) for letter in order
            )
            yield EnergyBlock(order=order, joules=(first, second, third, fourth))


def sample_j(arm: Arm, meter: EnergyMeter, *, calls: int, least_s: float, clock: Clock) -> float:
    """Return the joules of one call: from a step of the counter to another one, with calls all the while.

    NVML's counter moves about ten times a second. Read at any moment, it would be off by the energy of a tenth of one.

    Args:
        arm: what runs.
        meter: the counter.
        calls: between two readings.
        least_s: seconds from step to step, at least.
        clock: seconds.

    Raises:
        DeviceError: the counter stands still.
    """
    began = clock()
    last = start = _next_step(arm, meter, meter.joules(), calls, began + _PATIENCE_S, clock)[0]
    began, done = clock(), 0
    while clock() - began < least_s or last == start:
        last, more = _next_step(arm, meter, last, calls, clock() + _PATIENCE_S, clock)
        done += more
    return (last - start) / done


def _next_step(
    arm: Arm, meter: EnergyMeter, before: float, calls: int, limit: float, clock: Clock
) -> tuple[float, int]:
    """Run calls until the counter has moved; return its value and the number of calls."""
    done = 0
    while True:
        arm.sample(calls)
        done += calls
        now = meter.joules()
        if now > before:
            return now, done
        if clock() > limit:
            raise DeviceError(f"{meter.name}: the counter stood still for {_PATIENCE_S:g} s")
