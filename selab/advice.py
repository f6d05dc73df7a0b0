"""This machine as a place to measure on: what it is, what is wrong with it, and what to do about that."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from selab import units
from selab.grid import Grid
from selab.kernels.cpu import native_reason
from selab.measure.machine import (
    CpuReading,
    GpuMonitor,
    GpuReading,
    Surroundings,
    contention_flags,
    machine,
    read_cpu,
    surroundings,
)
from selab.record import Device, Machine

WATCHED_S = 2.0
"""How long the machine is watched while this process does nothing."""
_SLOW_CLOCK = 0.8


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that makes measurements worse, and what helps."""

    what: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """A machine as it was found."""

    machine: Machine
    surroundings: Surroundings
    before: CpuReading | None
    after: CpuReading | None
    gpu_facts: dict[str, str]
    gpu: GpuReading | None
    gpu_problem: str


def look(device: Device = "cpu", *, sleep: Callable[[float], object] = time.sleep) -> Look:
    """Watches the machine for `WATCHED_S` seconds while this process does nothing.

    Args:
        device: `cuda` looks at the first GPU too.
        sleep: how to wait.
    """
    monitor = GpuMonitor() if device == "cuda" else None
    before = read_cpu()
    sleep(WATCHED_S)
    return Look(
        machine=machine(device),
        surroundings=surroundings(),
        before=before,
        after=read_cpu(),
        gpu_facts=monitor.facts() if monitor else {},
        gpu=monitor.read() if monitor else None,
        gpu_problem=monitor.problem if monitor else "",
    )


def problems(found: Look) -> list[Problem]:
    """What is wrong with a machine for measuring, the worst first."""
    return [*_busy(found), *_throttled(found), *_oversubscribed(found), *_hidden(found), *_gpu(found)]


def _busy(found: Look) -> list[Problem]:
    flags = contention_flags(found.before, found.after, threads=0, cores=found.machine.cores)
    advice = {
        "neighbours": "stop them, or wait: `top` shows who it is; ratios survive a little of it, times do not",
        "contention": "stop them, or wait: `top` shows who it is",
        "stolen_time": "measure at another hour, or on a machine of your own",
    }
    what = {
        "neighbours": "busy: other processes use {:.2f} of {} cores",
        "contention": "busy: other processes use {:.2f} of {} cores",
    }
    return [
        Problem(
            what=what[flag.name].format(_others(found), found.machine.cores) if flag.name in what else flag.detail,
            advice=advice[flag.name],
        )
        for flag in flags
        if flag.name in advice
    ]


def _others(found: Look) -> float:
    if found.before is None or found.after is None:
        return 0.0
    busy = found.after.busy_s - found.before.busy_s - (found.after.own_s - found.before.own_s)
    return busy / (found.after.at_s - found.before.at_s)


def _throttled(found: Look) -> list[Problem]:
    around, place = found.surroundings, found.machine
    listed = []
    if place.governor not in (None, "performance"):
        listed.append(
            Problem(
                what=f"the clock's governor is {place.governor}: the processor speeds up and slows down as it likes",
                advice="sudo cpupower frequency-set --governor performance",
            )
        )
    if place.quota_cores is not None and place.quota_cores < place.cores:
        listed.append(
            Problem(
                what=f"the container may use {place.quota_cores:g} cores' worth of time, and stops when that is spent",
                advice="give it whole cores: --cpuset-cpus instead of --cpus",
            )
        )
    now, most = around.clock_mhz, around.most_clock_mhz
    if now is not None and most is not None and place.governor == "performance" and now < _SLOW_CLOCK * most:
        listed.append(
            Problem(
                what=f"the processor runs at {now:.0f} of {most:.0f} MHz: throttled, by heat or by its power limit",
                advice="let it cool down, and look at `turbostat` or `sensors`",
            )
        )
    return listed


def _oversubscribed(found: Look) -> list[Problem]:
    listed = []
    for name, value in found.surroundings.thread_variables.items():
        if value.isdigit() and int(value) > found.machine.cores:
            listed.append(
                Problem(
                    what=f"{name} is {value} on {found.machine.cores} cores: threads wait for each other",
                    advice=f"unset {name}; `--threads` says how many are used",
                )
            )
    if found.machine.cores == 1:
        listed.append(
            Problem(
                what="one core: whatever else runs interrupts what is measured",
                advice="give the machine or the container a second one",
            )
        )
    return listed


def _hidden(found: Look) -> list[Problem]:
    around = found.surroundings
    listed = []
    if around.smt:
        listed.append(
            Problem(
                what="two hardware threads share each core: a neighbour there halves the speed unseen",
                advice="leave the sibling of the measured core idle, or switch SMT off",
            )
        )
    if around.virtual:
        listed.append(
            Problem(
                what="a virtual machine: other guests share its caches and memory, and only stolen time is seen",
                advice="trust ratios and their controls, not times; give --processes 3 for what you publish",
            )
        )
    return listed


def _gpu(found: Look) -> list[Problem]:
    listed = []
    if found.gpu_problem:
        listed.append(Problem(what=found.gpu_problem, advice="install the driver's NVML"))
    if found.gpu is not None and found.gpu.hard_throttle:
        listed.append(
            Problem(what=f"the GPU is slowed down: {', '.join(found.gpu.hard_throttle)}", advice="let it cool down")
        )
    if found.gpu is not None and found.gpu.power_capped:
        listed.append(
            Problem(
                what="the GPU is at its power limit: clocks follow the load",
                advice="lock them for absolute times: sudo nvidia-smi --lock-gpu-clocks",
            )
        )
    others = found.gpu_facts.get("other processes", "0")
    if others.isdigit() and int(others) > 0:
        listed.append(
            Problem(what=f"{others} other processes use the GPU", advice="stop them: `nvidia-smi` lists them")
        )
    return listed


def machine_grids(found: Look) -> list[Grid]:
    """The tables of `selab machine`: what this is, and what is wrong with it."""
    place, around = found.machine, found.surroundings
    rows = [
        ("name in records", place.name),
        ("processor", place.cpu),
        (
            "cores that may be used",
            f"{place.cores}" + ("" if place.quota_cores is None else f", {place.quota_cores:g} worth of time"),
        ),
        ("memory", units.size(place.memory_bytes, digits=3)),
        ("governor", place.governor or "not told"),
        ("clock now", "not told" if around.clock_mhz is None else f"{around.clock_mhz:.0f} MHz"),
        ("clocks above the base one", {None: "not told", True: "allowed", False: "off"}[around.turbo]),
        ("load of the last minute", "not told" if around.load is None else f"{around.load:.2f}"),
        ("used by others now", f"{_others(found):.2f} cores" if found.after is not None else "not told"),
        ("stolen by the host", _stolen(found)),
        ("thread variables", ", ".join(f"{name}={value}" for name, value in around.thread_variables.items()) or "none"),
    ]
    if place.gpu is not None:
        rows += [("GPU", place.gpu), ("GPU memory", units.size(place.gpu_memory_bytes or 0, digits=3))]
        rows += [
            ("driver", place.driver or "not told"),
            *(("GPU " + name, text) for name, text in found.gpu_facts.items()),
        ]
    rows += [("SE blocks on the CPU", native_reason() or "native code")]
    if place.gpu is not None:
        from selab.kernels.operators import gpu_reason

        rows += [("SE blocks on the GPU", gpu_reason() or "Triton kernels")]
    rows += [
        ("system", f"{place.system}, Python {place.python}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in place.libraries.items())),
    ]
    listed = problems(found)
    wrong = Grid(
        title=f"What is wrong with it for measuring ({len(listed)})"
        if listed
        else "Nothing is wrong with it for measuring",
        columns=("what", "what helps"),
        rows=tuple((one.what, one.advice) for one in listed),
        words=frozenset({0, 1}),
    )
    facts = Grid(title="This machine", columns=("", ""), rows=tuple(rows), words=frozenset({0, 1}))
    return [facts, wrong] if listed else [facts]


def _stolen(found: Look) -> str:
    if found.before is None or found.after is None:
        return "not told"
    elapsed = found.after.at_s - found.before.at_s
    return f"{(found.after.stolen_s - found.before.stolen_s) / elapsed:.2f} cores"
