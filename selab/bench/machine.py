"""Describe the machine for a record, and read what disturbs a measurement for its flags."""

import importlib.metadata
import math
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from selab.records.flag_texts import flag
from selab.records.types import Device, Flag, Machine

# A fault costs about a microsecond, so this many are a hundredth of the time.
_MANY_FAULTS = 10_000
_LIBRARIES = (
    *("torch", "numpy", "fvcore", "thop", "triton"),
    *("onnx", "onnxruntime", "openvino", "nncf", "executorch", "torchao"),
    *("litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
)
# Products of int8 in one instruction: /proc/cpuinfo's names on x86 and on ARM.
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
# The same of bf16.
_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def machine(device: Device = "cpu") -> Machine:
    """Describe this machine, with the library versions that affect a latency. No host name, no path.

    The name counts the machine's or container's processors, whatever the affinity mask of this process.
    """
    cpu = _cpu_name()
    on_gpu = device == "cuda" and torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if on_gpu else None
    return Machine(
        name=_slug(gpu) if gpu else f"{_slug(cpu)}-{_installed_cores()}c",
        cpu=cpu,
        cores=available_cores(),
        memory_bytes=_memory_bytes(),
        gpu=gpu,
        gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        driver=_driver() if on_gpu else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries=_versions(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        quota_cores=_quota_cores(),
    )


def available_cores() -> int:
    """Return how many logical processors this process may use: by its affinity mask and its container's quota."""
    return _within_quota(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _installed_cores() -> int:
    """Return the logical processors of the machine, or those that its container was given by a cpuset or a quota."""
    cores = os.cpu_count() or 1
    return _within_quota(min(cores, _cpuset_cores() or cores))


def _within_quota(cores: int) -> int:
    quota = _quota_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cpuset_cores() -> int:
    """Return the size of the container's cpuset, `0-3,8`, from cgroup v2; 0 where there is none."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", _read("/sys/fs/cgroup/cpuset.cpus.effective") or "")
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


def _slug(name: str) -> str:
    words = re.sub(r"\((r|tm)\)", "", name.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", words)).replace("-processor", "").replace("-cpu", "") or "unknown"


def _cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo") or "")
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def _memory_bytes() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def _quota_cores() -> float | None:
    """Return the container's limit in cores, from cgroup v2."""
    words = (_read("/sys/fs/cgroup/cpu.max") or "max").split()
    return None if words[0] == "max" or len(words) < 2 else int(words[0]) / int(words[1])


def _driver() -> str | None:
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", _read("/proc/driver/nvidia/version") or "")
    return found[1] if found else None


def int8_words() -> str | None:
    """Return which instructions this processor has for products of int8, in words; None where the system tells not."""
    flags = _cpu_flags()
    if flags is None:
        return None
    there = [name for name in _INT8 if name in flags]
    if there:
        return f"int8 products by the processor's {', '.join(there)}"
    return f"the processor has no instructions for int8 products ({', '.join(_INT8)}): int8 gains little here"


def has_bf16() -> bool | None:
    """Return whether this processor has instructions for products of bf16; None where the system tells not."""
    flags = _cpu_flags()
    return None if flags is None else any(name in flags for name in _BF16)


def _cpu_flags() -> list[str] | None:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return None if found is None else found[1].split()


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Conditions of a measurement on the CPU that a record does not hold; None where the system does not report them.

    Attributes:
        load: average number of runnable processes in the last minute.
        clock_mhz: of the fastest processor now.
        most_clock_mhz: the highest clock that it may have.
        turbo: whether clocks above the base one are allowed.
        smt: whether two hardware threads share a core.
        virtual: whether this is a virtual machine.
        thread_variables: OMP_NUM_THREADS and its like, as they are set.
    """

    load: float | None
    clock_mhz: float | None
    most_clock_mhz: float | None
    turbo: bool | None
    smt: bool | None
    virtual: bool
    thread_variables: dict[str, str]


def surroundings() -> Surroundings:
    """Read the system's state; nothing is timed."""
    clocks = [float(one) for one in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo") or "")]
    most = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    no_turbo = _read("/sys/devices/system/cpu/intel_pstate/no_turbo")
    boost = _read("/sys/devices/system/cpu/cpufreq/boost")
    smt = _read("/sys/devices/system/cpu/smt/active")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCH_NUM_THREADS")
    return Surroundings(
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        clock_mhz=max(clocks, default=None),
        most_clock_mhz=None if most is None else int(most) / 1000,
        turbo=no_turbo == "0" if no_turbo is not None else None if boost is None else boost == "1",
        smt=None if smt is None else smt == "1",
        virtual=" hypervisor" in (_read("/proc/cpuinfo") or ""),
        thread_variables={name: os.environ[name] for name in names if name in os.environ},
    )


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


# ------------------------------------------------------------------------------------------------- while measuring: CPU
@dataclass(frozen=True, kw_only=True)
class CpuReading:
    """The kernel's counters at one moment, in seconds since an arbitrary start.

    Attributes:
        at_s: the clock.
        busy_s: processor time of all processes.
        stolen_s: processor time taken by the host.
        own_s: processor time of this process.
        page_faults: minor page faults of this process.
    """

    at_s: float
    busy_s: float
    stolen_s: float
    own_s: float
    page_faults: int = 0


def read_cpu() -> CpuReading | None:
    """Read the kernel's counters; None where there are none (not Linux)."""
    line = (_read("/proc/stat") or "").split("\n", 1)[0].split()
    if len(line) < 9:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) / tick for word in line[1:9])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return CpuReading(
        at_s=time.monotonic(),
        busy_s=user + nice + system + irq + softirq,
        stolen_s=steal,
        own_s=usage.ru_utime + usage.ru_stime,
        page_faults=usage.ru_minflt,
    )


# The counters go in steps of a hundredth of a second: over a shorter time a step is a tenth of a core.
_LEAST_BETWEEN_S = 0.2


def cores_of_others(before: CpuReading | None, after: CpuReading | None) -> float:
    """Return how many cores other processes used between two readings.

    Returns:
        0 where there are no counters, and where the readings are too near to tell.
    """
    if before is None or after is None or after.at_s - before.at_s < _LEAST_BETWEEN_S:
        return 0.0
    busy_s = after.busy_s - before.busy_s - (after.own_s - before.own_s)
    return max(0.0, busy_s / (after.at_s - before.at_s))


def cores_of_others_since(before: CpuReading | None) -> float:
    """Return how many cores other processes have used since a reading; waits where that is too short to tell."""
    if before is None:
        return 0.0
    time.sleep(max(0.0, before.at_s + _LEAST_BETWEEN_S - time.monotonic()))
    return cores_of_others(before, read_cpu())


def contention_flags(before: CpuReading | None, after: CpuReading | None, *, threads: int, cores: int) -> list[Flag]:
    """Return the flags of other work on the machine between two readings.

    Other processes' work is flagged from a tenth of one core on, stolen time from 2 % of the wall time on.

    Args:
        before: the first reading; None where there are no counters.
        after: the second reading.
        threads: measured ones.
        cores: logical processors that the process may use.
    """
    flags: list[Flag] = []
    if threads > cores:
        flags.append(flag("oversubscribed", threads=threads, cores=cores))
    if before is None or after is None or after.at_s <= before.at_s:
        return flags
    elapsed = after.at_s - before.at_s
    others = cores_of_others(before, after)
    stolen = (after.stolen_s - before.stolen_s) / elapsed
    free = cores - threads
    if others > max(0.1, free + 0.1) or (others > 0.1 and free <= 0):
        flags.append(flag("contention", others=others, cores=cores, threads=threads))
    elif others > 0.1:
        flags.append(flag("neighbours", others=others, cores=cores, threads=threads))
    faults = (after.page_faults - before.page_faults) / elapsed
    if faults > _MANY_FAULTS:
        flags.append(flag("page_faults", faults=faults))
    if stolen > 0.02:
        flags.append(flag("stolen_time", stolen=stolen))
    return flags


@contextmanager
def threads_and_affinity(threads: int) -> Iterator[None]:
    """Run the body with this many threads; one thread is pinned to the last core that this process may use.

    Both settings are restored at the end. The last core is used because the first serves most interrupts.
    """
    before = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    if threads == 1 and allowed:
        os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        if threads == 1 and allowed:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- while measuring: GPU
@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """One reading of the GPU through NVML: its clock in MHz, and the reasons that limit it."""

    sm_clock_mhz: int
    hard_throttle: tuple[str, ...]
    power_capped: bool


class GpuMonitor:
    """Reader of clocks and throttle reasons through NVML; where NVML is not available, `problem` says why."""

    # NVML's bits of nvmlClocksEventReason*: slowdowns that discard an ABBA block, and the power cap, which is a flag.
    _HARD = MappingProxyType(
        {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
    )
    _POWER_CAP = 0x4

    def __init__(self) -> None:
        self.problem = ""
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            # By PCI address: CUDA's order, and CUDA_VISIBLE_DEVICES, are not NVML's.
            properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
            address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(address)
            self._nvml = pynvml
        except Exception as error:
            self.problem = f"NVML is not available ({error})"

    def facts(self) -> dict[str, str]:
        """Return the GPU's settings by name, as far as NVML reports them; empty without NVML."""
        nvml = self._nvml
        if nvml is None:
            return {}
        asked: dict[str, Callable[[], str]] = {
            "clock now": lambda: f"{nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)} MHz",
            "clock at most": lambda: f"{nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM)} MHz",
            "memory clock": lambda: f"{nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_MEM)} MHz",
            "power limit": lambda: f"{nvml.nvmlDeviceGetPowerManagementLimit(self._handle) / 1000:.0f} W",
            "temperature": lambda: f"{nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)} °C",
            "other processes": lambda: str(
                sum(one.pid != os.getpid() for one in nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
            ),
        }
        found = {}
        for name, ask in asked.items():
            with suppress(Exception):
                found[name] = ask()
        return found

    def energy_j(self) -> float | None:
        """Return the energy of the GPU since its driver was loaded, in joules; None, with `problem`, if unknown."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except Exception as error:
            self.problem = f"NVML does not tell this GPU's energy ({error})"
            return None

    def read(self) -> GpuReading | None:
        """Return one reading, or None without NVML."""
        if self._nvml is None:
            return None
        try:
            clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
            reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        except Exception as error:
            self.problem, self._nvml = f"NVML stopped answering ({error})", None
            return None
        hard = tuple(name for bit, name in self._HARD.items() if reasons & bit)
        return GpuReading(sm_clock_mhz=clock, hard_throttle=hard, power_capped=bool(reasons & self._POWER_CAP))
