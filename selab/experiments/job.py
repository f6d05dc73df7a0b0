"""What a user asks for, resolved once: the two networks, the workload, and how long to measure."""

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from selab.bench.heap import has_mallopt
from selab.bench.sampler import Plan
from selab.errors import SpecError
from selab.models import catalog
from selab.models.inputs import Input, main_input
from selab.models.spec import ONNX_FAMILY, Variant
from selab.records.bounds import MOST_PIXELS
from selab.records.estimate import LEAST_PROCESSES
from selab.records.files import shown
from selab.records.store import read_record, record_path
from selab.records.types import (
    ONNX_RUNTIME,
    PHASES,
    TORCH,
    Device,
    Dtype,
    Frozen,
    MemoryFormat,
    Mode,
    On,
    Phase,
    Record,
    Workload,
)


class Request(Frozen, frozen=True, kw_only=True):
    """The options of a measurement as a user gives them; networks are names here.

    Attributes:
        baseline: what to compare with; None for the variant's own baseline.
        input_chw: channels, height and width of the input; None for the network's own.
        inputs: all inputs, of a network that takes several or a named one; the first image is `input_chw`.
        resolution: height and width of the input; None for those of `input_chw`.
        on: `cpu` to look at the networks (to count, and to find sites) on real tensors, where values decide what they
            compute.
        threads: CPU threads of the headline; None for one thread, and a second row on all cores.
        frozen: whether the compiler takes the weights as constants.
        held_heap: whether freed memory is kept, as in a program that runs for long; None for yes on a CPU whose C
            library has `mallopt`.
        quick: short, as `selab.experiments.schedule` says; `thorough` is long, for what is published.
        budget_s: seconds of the whole command; None for those of its degree, as in `selab.experiments.schedule`.
        processes: fresh processes, each of which measures every phase for a short time; None for as many as fit, and on
            a GPU for 1. That one is this process: it measures for long, and says nothing about another one.
        cold: on a GPU, flush the L2 cache before each call.
        runtime: name of the backend that runs both networks (`selab.bench.backends`).
        spelling: of the exported SE blocks (`selab.deploy.spelling`); empty for the runtime's own.
        float_blocks: whether the SE blocks of a quantised network stay in fp32.
        images: folder of images that int8 is calibrated on; None for noise.
    """

    arch: str
    baseline: str | None = None
    device: Device = "cpu"
    batch: int = 1
    input_chw: tuple[int, int, int] | None = None
    inputs: tuple[Input, ...] = ()
    resolution: int | None = None
    on: On = "fake"
    dtype: Dtype = "fp32"
    memory_format: MemoryFormat = "contiguous"
    mode: Mode = "auto"
    compiled: bool = False
    frozen: bool = False
    fused: bool = False
    held_heap: bool | None = None
    threads: int | None = None
    quick: bool = False
    thorough: bool = False
    budget_s: float | None = None
    seed: int = 0
    processes: int | None = None
    cold: bool = False
    runtime: str = TORCH
    spelling: str = ""
    float_blocks: bool = False
    images: str | None = None
    phases: tuple[Phase, ...] = PHASES

    @property
    def in_this_process(self) -> bool:
        """Whether to measure for long in this process, and not for a short time in each of several fresh ones."""
        return self.processes == 1 or (self.processes is None and self.device == "cuda")

    @property
    def holds_heap(self) -> bool:
        """Whether freed memory is kept."""
        return self.device == "cpu" and has_mallopt() if self.held_heap is None else self.held_heap

    def command(self, verb: str = "profile") -> str:
        """Return the command line that asks for the same again.

        Args:
            verb: the command of `selab`.
        """
        words = ["selab", verb, "--arch", self.arch]
        default = Request(arch=self.arch)
        for name, option in _OPTIONS.items():
            value = getattr(self, name)
            if value != getattr(default, name):
                words += [option] if value is True else [option, str(value)]
        for one in self.inputs:
            words += ["--input", str(one)]
        if self.input_chw is not None and not self.inputs:
            words += ["--input", "x".join(map(str, self.input_chw))]
        if self.memory_format == "channels_last":
            words.append("--channels-last")
        if self.held_heap is not None:
            words.append("--hold-heap" if self.held_heap else "--free-heap")
        for phase in self.phases if self.phases != PHASES else ():
            words += ["--phase", phase]
        return shlex.join(words)


_OPTIONS = {
    "baseline": "--baseline",
    "device": "--device",
    "batch": "--batch",
    "resolution": "--resolution",
    "on": "--on",
    "dtype": "--dtype",
    "mode": "--mode",
    "compiled": "--compile",
    "frozen": "--freeze",
    "fused": "--fused",
    "threads": "--threads",
    "quick": "--quick",
    "thorough": "--thorough",
    "budget_s": "--budget",
    "seed": "--seed",
    "processes": "--processes",
    "cold": "--cold",
    "runtime": "--runtime",
    "spelling": "--spelling",
    "float_blocks": "--float-blocks",
    "images": "--images",
}


class Job(Frozen, frozen=True, kw_only=True):
    """A request resolved: it travels as a value, and no name is looked up again.

    Attributes:
        baseline: None for a network that is a baseline itself, where the request names no other.
        plan: how long to measure, and when to stop.
    """

    request: Request
    variant: Variant
    baseline: Variant | None
    workload: Workload
    plan: Plan

    @property
    def pair(self) -> tuple[Variant, Variant]:
        """The variant and its baseline.

        Raises:
            SpecError: there is no baseline; names a variant of this network, if there is one.
        """
        if self.baseline is None:
            arch = self.request.arch
            others = [one.name for one in catalog.installed().values() if one.baseline == self.variant.name]
            if self.is_graph:
                raise SpecError(f"--arch {arch}: has no SE block; name what to compare with: --baseline OTHER.onnx")
            what = (
                f"is a baseline itself; profile its variant: --arch {others[0]}, or" if others else "has no baseline;"
            )
            raise SpecError(f"--arch {arch}: {what} name what to compare with: `selab profile --baseline NAME`")
        return self.variant, self.baseline

    @property
    def is_graph(self) -> bool:
        """Whether the network is an ONNX file."""
        return self.variant.family == ONNX_FAMILY

    @property
    def against(self) -> str | None:
        """The baseline's name, if it is not the variant's own baseline; else None."""
        if self.baseline is None or self.request.baseline is None:
            return None
        own = (self.variant.baseline, self.variant.file) == (self.baseline.name, self.baseline.file)
        return None if own else self.baseline.name

    def path(self, out: Path, machine: str) -> Path:
        """Return where its record goes: `OUT/<machine>/<arch>.<workload>[.<phases>].json`.

        A record of some phases has a path of its own, so that it never takes the place of a whole one.
        """
        phases = "" if set(self.request.phases) >= set(PHASES) else f".{'+'.join(self.request.phases)}"
        return self._path(out, machine, phases)

    def paths(self, out: Path, machine: str) -> tuple[Path, ...]:
        """Return where a record of its phases may lie: `path`, then the path of the record of all phases."""
        return tuple(dict.fromkeys((self.path(out, machine), self._path(out, machine, ""))))

    def stored(self, out: Path, machine: str) -> Record | None:
        """Return the record of its phases that lies under a folder; None where there is none.

        Where the request leaves the heap open, a record of the other heap is the next best.

        Raises:
            RecordError: a record cannot be trusted.
        """
        others = [self.changed(held_heap=not self.workload.held_heap)] if self.request.held_heap is None else []
        for path in (path for job in (self, *others) for path in job.paths(out, machine)):
            if path.exists():
                record = read_record(path)
                if record.latency.keys() >= set(self.request.phases):
                    return record
        return None

    def _path(self, out: Path, machine: str, phases: str) -> Path:
        workload = self.workload.slug + phases
        return record_path(out, machine=machine, arch=self.variant.name, against=self.against, workload=workload)

    def command(self, verb: str = "profile") -> str:
        """Return the command line that asks for the same again, as `Request.command`."""
        return self.request.command(verb)

    def changed(self, **changes: Any) -> "Job":
        """Return the job of the same two networks with other fields of its request."""
        return job_of(msgspec.structs.replace(self.request, **changes), self.variant, self.baseline)


def resolve(request: Request) -> Job:
    """Look up the networks of a request.

    Raises:
        SpecError: the two networks have inputs of different shapes, or a file is malformed.
        UnknownNameError: no such name.
    """
    inputs, on = request.inputs, request.on
    variant = with_inputs(catalog.find(request.arch), inputs, on)
    if request.baseline is None:
        base = catalog.baseline_of(variant)
        return job_of(request, variant, None if base is None else with_inputs(base, inputs, on))
    return job_of(request, variant, with_inputs(catalog.find(request.baseline, option="--baseline"), inputs, on))


def with_inputs(variant: Variant, inputs: tuple[Input, ...], on: On = "fake") -> Variant:
    """Return a variant that takes these inputs, where there are some, and that is looked at on fake or real tensors."""
    variant = msgspec.structs.replace(variant, inputs=inputs) if inputs else variant
    return variant if on == variant.on else msgspec.structs.replace(variant, on=on)


def job_of(request: Request, variant: Variant, baseline: Variant | None) -> Job:
    """Return the job of two networks that are at hand.

    Raises:
        SpecError: their inputs have different shapes, and the request names none; too few processes for an interval.
    """
    if baseline is not None and request.input_chw is None and baseline.input_chw != variant.input_chw:
        raise SpecError(
            f"--baseline {baseline.name}: its input is {list(baseline.input_chw)}, that of {variant.name} is "
            f"{list(variant.input_chw)}; only networks of equal input can be compared"
        )
    if 1 < (request.processes or 1) < LEAST_PROCESSES:
        raise SpecError(
            f"--processes {request.processes}: too few for an interval; give {LEAST_PROCESSES} or more, or 1 to "
            "measure in this process"
        )
    request = _of_runtime(request, variant)
    workload = _workload_of(request, variant)
    return Job(
        request=request,
        variant=variant,
        baseline=baseline,
        workload=workload,
        plan=_plan_of(request),
    )


# Runtimes that take an ONNX file.
_OF_GRAPHS = (ONNX_RUNTIME, "openvino")


def _of_runtime(request: Request, variant: Variant) -> Request:
    """Return the request with the runtime of an ONNX network, and with the phases that it can run.

    Raises:
        SpecError: it asks for another phase, or for what only exported networks have.
    """
    if variant.family == ONNX_FAMILY and request.runtime == TORCH:
        request = msgspec.structs.replace(request, runtime=ONNX_RUNTIME)
    _check_exported(request, variant)
    if request.frozen and not request.compiled:
        raise SpecError("--freeze: is of compiled networks; add --compile")
    if request.runtime == TORCH and not request.frozen:
        return request
    if request.phases == PHASES:
        request = msgspec.structs.replace(request, phases=("forward",))
    for phase in request.phases:
        if phase != "forward":
            what = "a network with frozen weights" if request.frozen else f"runtime {request.runtime}"
            raise SpecError(f"--phase {phase}: {what} runs forward only")
    return request


def _check_exported(request: Request, variant: Variant) -> None:
    if request.runtime != TORCH and request.dtype not in ("fp32", "int8"):
        raise SpecError(
            f"--dtype {request.dtype}: runtime {request.runtime} has it not; it runs fp32 or int8 on a CPU; leave it "
            "out"
        )
    if variant.family == ONNX_FAMILY and request.runtime not in _OF_GRAPHS:
        raise SpecError(
            f"--runtime {request.runtime}: {variant.name} is an ONNX network, which it does not take; use "
            f"{' or '.join(_OF_GRAPHS)}"
        )
    given = {
        "--spelling": request.spelling,
        "--float-blocks": request.float_blocks,
        "--images": request.images is not None,
    }
    for option, is_given in given.items():
        if is_given and request.runtime == TORCH:
            raise SpecError(f"{option}: is of exported networks; add --runtime NAME")
    if request.float_blocks and request.dtype != "int8":
        raise SpecError("--float-blocks: is of quantised networks; add --dtype int8")
    if request.spelling and variant.family == ONNX_FAMILY:
        raise SpecError(f"--spelling: {variant.name} is an ONNX network, whose blocks stay as they are; leave it out")
    if request.fused and request.runtime != TORCH:
        raise SpecError(f"--fused: is of networks in PyTorch; leave it out with --runtime {request.runtime}")
    if request.spelling:
        from selab.deploy.spelling import spelling_of

        spelling_of(request.spelling)


def _workload_of(request: Request, variant: Variant) -> Workload:
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
        threads=request.threads or 1,
        compiled=request.compiled,
        frozen=request.frozen,
        fused=request.fused,
        held_heap=request.holds_heap and (request.runtime == TORCH or request.held_heap is True),
        runtime=request.runtime,
        spelling=request.spelling,
        float_blocks=request.float_blocks,
        inputs=tuple(map(str, variant.inputs)),
    )


def _plan_of(request: Request) -> Plan:
    plan = Plan.for_gpu(quick=request.quick) if request.device == "cuda" else Plan.for_cpu(quick=request.quick)
    return plan.thorough_request() if request.thorough else plan


# ------------------------------------------------------------------------------------------------ parts of an address
def network_address(arch: str, se: str | None = None, insert: Sequence[str] = ()) -> str:
    """Return one name for a network and the blocks that it gets, as `selab.models.catalog.find` reads it.

    Args:
        arch: the network.
        se: changes of its attention blocks, KEY=VALUE,…
        insert: site groups, patterns, or `auto`.
    """
    changes = [*([] if se is None else [se]), *([f"sites={'+'.join(insert)}"] if insert else [])]
    if not changes:
        return arch
    return arch + ("+" if catalog.split_address(arch)[1] is None else ",") + ",".join(changes)


def parse_inputs(texts: Sequence[str], *, option: str = "--input") -> tuple[tuple[int, int, int], tuple[Input, ...]]:
    """Parse the inputs of a network: `CxHxW` for the only one, several of them, or named ones, `rgb=3x224x224`.

    Returns:
        The first image, and all inputs; these are empty where there is one without a name.

    Raises:
        SpecError: a text is not of this form, a name is given twice, or no input is an image.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return parse_input(texts[0], option=option), ()
    inputs = tuple(_parse_one(text, option) for text in texts)
    names = [one.name for one in inputs if one.name]
    if len(set(names)) < len(names):
        raise SpecError(f"{option}: two inputs are called {max(names, key=names.count)}; each has a name of its own")
    if any(one.name and not after.name for one, after in pairwise(inputs)):
        raise SpecError(f"{option}: inputs without a name come first; write {option} CxHxW {option} NAME=CxHxW")
    image = main_input(inputs)
    if image is None:
        raise SpecError(f"{option}: none of the inputs is an image; give one as CxHxW, for example 3x224x224")
    channels, height, width = inputs[image].shape
    return (channels, height, width), inputs


def _parse_one(text: str, option: str) -> Input:
    found = re.fullmatch(r"(?:(?P<name>[A-Za-z_]\w{0,99})=)?(?P<sizes>[0-9]{1,9}(?:x[0-9]{1,9}){0,4})", text)
    sizes = tuple(map(int, found["sizes"].split("x"))) if found is not None else (0,)
    if found is None or not all(0 < size <= MOST_PIXELS for size in sizes):
        raise SpecError(
            f"{option}: {shown(text)!r} is not CxHxW or NAME=CxHxW with sizes from 1 to {MOST_PIXELS:,}; "
            "for example rgb=3x224x224"
        )
    return Input(shape=sizes, name=found["name"] or "")


def parse_input(text: str, *, option: str = "--input") -> tuple[int, int, int]:
    """Parse `CxHxW`.

    Raises:
        SpecError: the text is not of this form.
    """
    found = re.fullmatch(r"0*([0-9]{1,18})x0*([0-9]{1,18})x0*([0-9]{1,18})", text)
    if found is None or 0 in map(int, found.groups()):
        raise SpecError(f"{option}: {shown(text)!r} is not CxHxW; for example 3x224x224")
    if max(map(int, found.groups())) > MOST_PIXELS:
        raise SpecError(f"{option}: {text} is too large; at most {MOST_PIXELS:,} channels, rows and columns")
    return int(found[1]), int(found[2]), int(found[3])
