"""Diagnose this machine: what disturbs measurements, and what helps."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from selab.bench.machine import (
    CpuReading,
    GpuMonitor,
    GpuReading,
    Surroundings,
    contention_flags,
    cores_of_others,
    machine,
    read_cpu,
    surroundings,
)
from selab.records.types import Device, Machine

WATCHED_S = 2.0
"""How long the machine is watched while this process does nothing."""
_SLOW_CLOCK = 0.8


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A disturbance of measurements, and what helps."""

    what: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A machine and what it did while it was watched."""

    machine: Machine
    surroundings: Surroundings
    before: CpuReading | None
    after: CpuReading | None
    gpu_facts: dict[str, str]
    gpu: GpuReading | None
    gpu_problem: str


def inspect(device: Device = "cpu", *, sleep: Callable[[float], object] = time.sleep) -> Snapshot:
    """Watch the machine for `WATCHED_S` seconds while this process does nothing.

    Args:
        device: `cuda` inspects the first GPU too.
        sleep: how to wait.
    """
    monitor = GpuMonitor() if device == "cuda" else None
    before = read_cpu()
    sleep(WATCHED_S)
    return Snapshot(
        machine=machine(device),
        surroundings=surroundings(),
        before=before,
        after=read_cpu(),
        gpu_facts=monitor.facts() if monitor else {},
        gpu=monitor.read() if monitor else None,
        gpu_problem=monitor.problem if monitor else "",
    )


def problems(found: Snapshot) -> list[Problem]:
    """Return what disturbs measurements on a machine, the worst first."""
    return [*_busy(found), *_throttled(found), *_oversubscribed(found), *_hidden(found), *_gpu(found)]


def _busy(found: Snapshot) -> list[Problem]:
    flags = contention_flags(found.before, found.after, threads=0, cores=found.machine.cores)
    advice = {
        "neighbours": "stop them, or wait (see `top`); ratios survive a little load, times do not",
        "contention": "stop them, or wait (see `top`)",
        "stolen_time": "measure at another time, or on a machine of your own",
    }
    what = {
        "neighbours": "busy: other processes use {:.1f} of {} cores",
        "contention": "busy: other processes use {:.1f} of {} cores",
    }
    return [
        Problem(
            what=what[flag.name].format(other_programs(found), found.machine.cores)
            if flag.name in what
            else flag.detail.partition(";")[0],
            advice=advice[flag.name],
        )
        for flag in flags
        if flag.name in advice
    ]


def other_programs(found: Snapshot) -> float:
    """Return how many cores other programs used while the machine was watched."""
    return cores_of_others(found.before, found.after)


def _throttled(found: Snapshot) -> list[Problem]:
    around, place = found.surroundings, found.machine
    listed = []
    if place.governor not in (None, "performance"):
        listed.append(
            Problem(
                what=f"the CPU governor is {place.governor}: the clock changes with the load",
                advice="sudo cpupower frequency-set --governor performance",
            )
        )
    if place.quota_cores is not None and place.quota_cores < place.cores:
        listed.append(
            Problem(
                what=f"the container has a quota of {place.quota_cores:g} cores, and pauses when it is used up",
                advice="give it whole cores: --cpuset-cpus instead of --cpus",
            )
        )
    now, most = around.clock_mhz, around.most_clock_mhz
    if now is not None and most is not None and place.governor == "performance" and now < _SLOW_CLOCK * most:
        listed.append(
            Problem(
                what=f"the processor runs at {now:.0f} of {most:.0f} MHz: throttled, by heat or by its power limit",
                advice="let it cool down; see `turbostat` or `sensors`",
            )
        )
    return listed


def _oversubscribed(found: Snapshot) -> list[Problem]:
    listed = []
    for name, value in found.surroundings.thread_variables.items():
        if value.isdigit() and int(value) > found.machine.cores:
            listed.append(
                Problem(
                    what=f"{name} is {value} on {found.machine.cores} cores: threads wait for each other",
                    advice=f"unset {name}; `--threads` sets the number",
                )
            )
    if found.machine.cores == 1:
        listed.append(
            Problem(
                what="one core: every other program interrupts the measurement",
                advice="give the machine or the container a second one",
            )
        )
    return listed


def _hidden(found: Snapshot) -> list[Problem]:
    around = found.surroundings
    listed = []
    if around.smt:
        listed.append(
            Problem(
                what="two hardware threads share each core: a busy sibling halves the speed, unseen",
                advice="keep the sibling of the measured core idle, or switch SMT off",
            )
        )
    if around.virtual:
        listed.append(
            Problem(
                what="a virtual machine: other guests share its caches and memory; only stolen time is visible",
                advice="rely on ratios, not times; use --thorough for what you publish",
            )
        )
    return listed


def _gpu(found: Snapshot) -> list[Problem]:
    listed = []
    if found.gpu_problem:
        listed.append(Problem(what=found.gpu_problem, advice="install the driver's NVML"))
    if found.gpu is not None and found.gpu.hard_throttle:
        listed.append(
            Problem(what=f"the GPU is throttled: {', '.join(found.gpu.hard_throttle)}", advice="let it cool down")
        )
    if found.gpu is not None and found.gpu.power_capped:
        listed.append(
            Problem(
                what="the GPU is at its power limit: its clock follows the load",
                advice="lock them for absolute times: sudo nvidia-smi --lock-gpu-clocks",
            )
        )
    others = found.gpu_facts.get("other processes", "0")
    if others.isdigit() and int(others) > 0:
        listed.append(Problem(what=f"{others} other processes use the GPU", advice="stop them (see `nvidia-smi`)"))
    return listed
