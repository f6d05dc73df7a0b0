"""What a user asks for: which networks, on what, for how long; and the command line that asks for it again."""

import shlex
from dataclasses import replace

import msgspec

from selab.bench.sampler import Plan
from selab.errors import SpecError
from selab.models import catalog
from selab.models.spec import Variant
from selab.records.types import PHASES, Device, Dtype, Frozen, MemoryFormat, Mode, Phase, Workload


class Request(Frozen, frozen=True, kw_only=True):
    """Everything that decides a profile; the record's `command` is written from it.

    Attributes:
        baseline: what to compare with; None for the one that the variant's facts name.
        input_chw: channels, height and width of the input; None for those of the facts.
        resolution: height and width of the input; None for those of `input_chw`.
        threads: CPU threads of the headline; None for one thread, with all cores beside it.
        budget_s: seconds of sampling per phase; None for 60 (quick: 15).
        processes: fresh processes per figure; 1 measures in this one.
        cold: on a GPU, flush the L2 cache before each call.
    """

    arch: str
    baseline: str | None = None
    device: Device = "cpu"
    batch: int = 1
    input_chw: tuple[int, int, int] | None = None
    resolution: int | None = None
    dtype: Dtype = "fp32"
    memory_format: MemoryFormat = "contiguous"
    mode: Mode = "auto"
    compiled: bool = False
    fused: bool = False
    held_heap: bool = False
    threads: int | None = None
    quick: bool = False
    budget_s: float | None = None
    seed: int = 0
    processes: int = 1
    cold: bool = False
    phases: tuple[Phase, ...] = PHASES

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["selab", "profile", "--arch", self.arch]
        default = Request(arch=self.arch)
        for name, option in _OPTIONS.items():
            value = getattr(self, name)
            if value != getattr(default, name):
                words += [option] if value is True else [option, str(value)]
        if self.input_chw is not None:
            words += ["--input", "x".join(map(str, self.input_chw))]
        if self.memory_format == "channels_last":
            words.append("--channels-last")
        for phase in self.phases if self.phases != PHASES else ():
            words += ["--phase", phase]
        return shlex.join(words)


_OPTIONS = {
    "baseline": "--baseline",
    "device": "--device",
    "batch": "--batch",
    "resolution": "--resolution",
    "dtype": "--dtype",
    "mode": "--mode",
    "compiled": "--compile",
    "fused": "--fused",
    "held_heap": "--hold-heap",
    "threads": "--threads",
    "quick": "--quick",
    "budget_s": "--budget",
    "seed": "--seed",
    "processes": "--processes",
    "cold": "--cold",
}


def pair(request: Request) -> tuple[Variant, Variant]:
    """The variant that is asked for, and its baseline.

    Raises:
        SpecError: there is no baseline, or its input has another shape.
        UnknownNameError: no such name.
    """
    variant = catalog.find(request.arch)
    baseline = catalog.find(request.baseline, option="--baseline") if request.baseline else catalog.baseline_of(variant)
    if baseline is None:
        others = [other.name for other in catalog.installed().values() if other.baseline == variant.name]
        what = f"is a baseline itself; profile its variant: --arch {others[0]}, or" if others else "has no baseline;"
        raise SpecError(f"--arch {request.arch}: {what} name what to compare with: `selab profile --baseline NAME`")
    if request.input_chw is None and baseline.input_chw != variant.input_chw:
        raise SpecError(
            f"--baseline {baseline.name}: its input is {list(baseline.input_chw)}, that of {variant.name} is "
            f"{list(variant.input_chw)}; only networks of equal input can be compared"
        )
    return variant, baseline


def workload_of(request: Request, variant: Variant, *, threads: int | None = None) -> Workload:
    """The request's workload, on this many threads."""
    channels, height, width = request.input_chw or variant.input_chw
    if request.resolution is not None:
        height = width = request.resolution
    return Workload(
        batch=request.batch,
        input_chw=(channels, height, width),
        device=request.device,
        dtype=request.dtype,
        memory_format=request.memory_format,
        mode=request.mode,
        threads=threads or request.threads or 1,
        compiled=request.compiled,
        fused=request.fused,
        held_heap=request.held_heap,
    )


def plan_of(request: Request, workload: Workload) -> Plan:
    """How long to measure, from the request."""
    plan = Plan.for_gpu(quick=request.quick) if workload.device == "cuda" else Plan.for_cpu(quick=request.quick)
    return plan if request.budget_s is None else replace(plan, budget_s=request.budget_s)


def quick_request(request: Request) -> Request:
    """The same with the targets of `--quick`: for the rows beside the headline."""
    return msgspec.structs.replace(request, quick=True)
