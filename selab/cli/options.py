"""The options that commands share; a group of options is a dataclass, and `with_options` gives it to a command."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from selab.errors import SpecError
from selab.experiments.job import Request, network_address, parse_inputs
from selab.models.inputs import Input
from selab.records.bounds import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_PROCESSES,
    MOST_SECONDS,
    MOST_SEED,
    MOST_THREADS,
)
from selab.records.types import ONNX_RUNTIME, PHASES, RUNTIMES, TORCH, Device, Dtype, MemoryFormat, Mode
from selab.records.types import On as OnName

# The panels of every command's help.
WHAT, WORKLOAD, TIME, OUTPUT = "What to measure", "Workload", "How long", "Output"
TRAINING, DATA = "Training", "Data"

Look = Literal["rich", "markdown", "csv", "latex", "json"]
Amp = Literal["off", "bf16", "fp16"]
_Command = TypeVar("_Command", bound=Callable[..., object])


# ------------------------------------------------------------------------------------------------------ single options
def _phase(text: str) -> str:
    if text not in PHASES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(PHASES)}")
    return text


def option(names: str, panel: str, text: str, **more: Any) -> Any:
    """Return a typer option.

    Args:
        names: its spellings, separated by spaces.
        panel: of the help.
        text: its help.
        more: further arguments of `typer.Option`.
    """
    return typer.Option(*names.split(), rich_help_panel=panel, help=text, **more)


def natural(names: str, panel: str, text: str, *, least: int = 1, most: int = MOST_IMAGES, **more: Any) -> Any:
    """Return a typer option whose value is a whole number in a range; the arguments are those of `option`."""
    return option(names, panel, text, metavar="N", parser=partial(_whole, least=least, most=most), **more)


def seconds(names: str, panel: str, text: str, *, least: float) -> Any:
    """Return a typer option whose value is a time; the arguments are those of `option`."""
    return option(names, panel, text, metavar="SECONDS", parser=partial(_seconds, least=least))


def runtime_of(arch: str, asked: str | None) -> str:
    """Return the runtime of `--runtime`, or by default what runs a network as it is.

    Raises:
        typer.BadParameter: PyTorch is asked for to run an ONNX file.
    """
    own = ONNX_RUNTIME if arch.endswith(".onnx") else TORCH
    if asked == TORCH != own:
        raise typer.BadParameter(f"{TORCH}: {arch} runs in {own}; leave the option out", param_hint="--runtime")
    return asked or own


def _whole(given: object, *, least: int, most: int) -> int:
    # typer converts a default as well.
    text = str(given).strip()
    if re.fullmatch(r"[+-]?[0-9]{1,19}", text) and least <= int(text) <= most:
        return int(text)
    raise typer.BadParameter(f"{_cut(text)!r} is not a whole number from {least} to {most:,}")


def _seconds(given: object, *, least: float) -> float:
    text = str(given).strip()
    value = float(text) if re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", text) and text.count(".") < 2 else math.nan
    if least <= value <= MOST_SECONDS:
        return value
    raise typer.BadParameter(f"{_cut(text)!r} is not a time from {least:g} to {MOST_SECONDS:,.0f} seconds")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 40
ARCH_HELP = "A name of `selab archs`, torchvision:NAME, timm:NAME, FILE.toml[:NAME], FILE.py:NAME, or FILE.onnx."
Arch = Annotated[str, option("--arch", WHAT, ARCH_HELP, metavar="NAME")]
Archs = Annotated[list[str], option("--arch", WHAT, f"{ARCH_HELP} Repeatable.", metavar="NAME")]
Se = Annotated[
    str | None,
    option("--se", WHAT, "Insert or change attention blocks: reduction=8,stages=2-4 or block=eca.", metavar="K=V,…"),
]
Insert = Annotated[
    list[str] | None,
    option("--insert", WHAT, "Where: a site group, a pattern such as 'layer*.*.bn3', or auto.", metavar="SITES"),
]
Baseline = Annotated[
    str | None, option("--baseline", WHAT, "Compare with this network, not the variant's own.", metavar="NAME")
]
Batch = Annotated[int | None, natural("--batch", WORKLOAD, "Images; 1 by default.")]
Inputs = Annotated[
    list[str] | None,
    option("--input", WORKLOAD, "Shape, if not the network's own; NAME=CxHxW. Once per input.", metavar="CxHxW"),
]
On = Annotated[
    OnName | None,
    option(
        "--on",
        WORKLOAD,
        "fake (default), or cpu: trace it on real tensors, if values steer it.",
        metavar="NAME",
    ),
]
Resolution = Annotated[
    int | None, natural("--resolution", WORKLOAD, "Height and width of the input.", most=MOST_PIXELS)
]
ChannelsLast = Annotated[bool, option("--channels-last", WORKLOAD, "Short for --memory-format channels_last (NHWC).")]
PhaseNames = Annotated[
    list[str] | None,
    option(
        "--phase",
        WORKLOAD,
        "forward, backward or forward_backward. Repeatable.",
        metavar="PHASE",
        # typer knows no list of literals.
        parser=_phase,
    ),
]
Seed = Annotated[
    int | None, natural("--seed", WORKLOAD, "Of weights and input; 0 by default.", least=0, most=MOST_SEED)
]
Out = Annotated[Path, option("--out", OUTPUT, "Folder of the records.", metavar="FOLDER")]
Ema = Annotated[
    bool | None,
    option(
        "--ema/--no-ema", WHAT, "Take the file's moving average of the weights, or not; by default if there is one."
    ),
]
Replace = Annotated[bool, option("--replace", OUTPUT, "Write over what exists.")]
Format = Annotated[Look, option("--format", OUTPUT, "rich, markdown, csv, latex or json.", metavar="FORMAT")]
Json = Annotated[
    Path | None, option("--json", OUTPUT, "Write JSON to FILE, or to - for standard output.", metavar="FILE")
]
Verbose = Annotated[bool, option("--verbose -v", OUTPUT, "Show every flag and remark.")]


# ---------------------------------------------------------------------------------------------------- groups of options
@dataclass(kw_only=True)
class _BlockOptions:
    """Which attention blocks a network gets."""

    se: Se = None
    insert: Insert = None
    on: On = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by the name of their field."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        # An empty text is a value, and mostly a wrong one, unless it is the default of a list.
        return {name: value for name, (value, default) in values.items() if value is not None and value != default}

    def words(self) -> dict[str, str]:
        """Return how the options that were given are written: field → `--free-heap`."""
        found = {}
        for name, value in self.given().items():
            on, _, off = option_of(type(self), name).partition("/")
            found[name] = off if value is False else on
        return found

    def reject(self, why: str, *names: str) -> None:
        """Refuse options that mean nothing here.

        Args:
            why: what to tell the user, behind the option.
            names: of fields.

        Raises:
            typer.BadParameter: one of them was given.
        """
        given = self.words()
        for name in names:
            if name in given:
                raise typer.BadParameter(why, param_hint=given[name])

    def address(self, arch: str) -> str:
        """Return the name of a network with the blocks of `--se` and `--insert`."""
        return network_address(arch, self.se, self.insert or ())

    def fields_of_request(self) -> dict[str, Any]:
        """Return the fields of a `Request` that were given, in its own names.

        Raises:
            typer.BadParameter: options contradict each other, or the input is not CxHxW.
        """
        found = {name: value for name, value in self.given().items() if name not in ("se", "insert")}
        if "input_size" in found and "resolution" in found:
            raise typer.BadParameter("is in --input already; leave one of them out", param_hint="--resolution")
        if "input_size" in found:
            found["input_chw"], inputs = shapes_of(found.pop("input_size"))
            # Only where there are some: other things that are made of these fields know one input.
            found |= {"inputs": inputs} if inputs else {}
        return found

    def request(self, arch: str, **own: Any) -> Request:
        """Return the request of a command.

        Args:
            arch: the network, without the blocks of `--se` and `--insert`.
            own: fields of the request; an option that was given takes their place.

        Raises:
            typer.BadParameter: as `fields_of_request`; PyTorch is asked for to run an ONNX file.
        """
        found = self.fields_of_request()
        runtime_of(arch, found.get("runtime"))
        return Request(arch=self.address(arch), **{**own, **found})


@dataclass(kw_only=True)
class CountOptions(_BlockOptions):
    """The options of a count."""

    batch: Batch = None
    input_size: Inputs = None
    resolution: Resolution = None


_RUNTIMES = ", ".join(RUNTIMES)
OF_RUNTIMES = ("runtime", "spelling", "float_blocks", "images")
"""Fields of the options of exported networks."""


@dataclass(kw_only=True)
class _ExportedOptions(_BlockOptions):
    """How a network is written for another runtime."""

    spelling: Annotated[
        str | None,
        option("--spelling", WORKLOAD, "Operators of exported SE blocks, such as mean-linear.", metavar="NAME"),
    ] = None
    float_blocks: Annotated[
        bool, option("--float-blocks", WORKLOAD, "With --dtype int8: leave the SE blocks in fp32.")
    ] = False
    images: Annotated[
        str | None,
        option(
            "--images", WORKLOAD, "Images: int8 takes its ranges from them, export compares on them.", metavar="FOLDER"
        ),
    ] = None

    baseline: Baseline = None
    input_size: Inputs = None
    seed: Seed = None


@dataclass(kw_only=True)
class ExportOptions(_ExportedOptions):
    """What is exported."""

    batch: Batch = None
    resolution: Resolution = None
    dtype: Annotated[Dtype | None, option("--dtype", WORKLOAD, "fp32 (default) or int8.", metavar="NAME")] = None
    threads: Annotated[
        int | None,
        natural("--threads", WORKLOAD, "CPU threads that aoti compiles for; 1 by default.", most=MOST_THREADS),
    ] = None


@dataclass(kw_only=True)
class _NetworkOptions(_ExportedOptions):
    """What every measuring command takes; None where an option was not given."""

    device: Annotated[Device | None, option("--device", WORKLOAD, "cpu (default) or cuda.", metavar="NAME")] = None
    channels_last: ChannelsLast = False
    mode: Annotated[
        Mode | None,
        option("--mode", WORKLOAD, "train, eval, or auto: eval in forward, else train.", metavar="MODE"),
    ] = None
    phase: PhaseNames = None
    compiled: Annotated[bool, option("--compile", WORKLOAD, "Run through torch.compile.")] = False
    frozen: Annotated[
        bool, option("--freeze", WORKLOAD, "With --compile: take the weights as constants, for inference.")
    ] = False
    fused: Annotated[bool, option("--fused", WORKLOAD, "Run both networks through selab.fuse.")] = False
    hold_heap: Annotated[
        bool | None,
        option(
            "--hold-heap/--free-heap",
            WORKLOAD,
            "Keep freed memory, as a server that runs for long does (default on glibc); or give it back.",
        ),
    ] = None

    def fields_of_request(self) -> dict[str, Any]:
        """Return the fields of a `Request` that were given, in its own names.

        Raises:
            typer.BadParameter: options contradict each other, or the input is not CxHxW.
        """
        found = super().fields_of_request()
        if self.hold_heap is not None and self.device == "cuda":
            name = "--hold-heap" if self.hold_heap else "--free-heap"
            raise typer.BadParameter("is of the CPU's heap; leave it out with --device cuda", param_hint=name)
        if found.pop("channels_last", False) and found.setdefault("memory_format", "channels_last") != "channels_last":
            raise typer.BadParameter("contradicts --memory-format; leave one of them out", param_hint="--channels-last")
        if self.hold_heap is not None:
            found["held_heap"] = self.hold_heap
        found.pop("hold_heap", None)
        if "phase" in found:
            chosen = found.pop("phase")
            found["phases"] = tuple(one for one in PHASES if one in chosen)
        return found


@dataclass(kw_only=True)
class WorkloadOptions(_NetworkOptions):
    """The options of one measurement."""

    batch: Batch = None
    resolution: Resolution = None
    dtype: Annotated[
        Dtype | None,
        option(
            "--dtype",
            WORKLOAD,
            "fp32 (default), tf32 (CUDA), autocast to bf16 or fp16, or int8 with --runtime.",
            metavar="NAME",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        option("--runtime", WORKLOAD, f"{_RUNTIMES}; torch by default.", metavar="NAME"),
    ] = None
    memory_format: Annotated[
        MemoryFormat | None,
        option("--memory-format", WORKLOAD, "contiguous (default) or channels_last.", metavar="NAME"),
    ] = None
    threads: Annotated[
        int | None,
        natural("--threads", WORKLOAD, "CPU threads; 1 by default, in `profile` all cores too.", most=MOST_THREADS),
    ] = None


@dataclass(kw_only=True)
class EffortOptions:
    """How long a command measures."""

    quick: Annotated[bool, option("--quick", TIME, "About 30 s in 3 to 6 fresh processes.")] = False
    thorough: Annotated[
        bool, option("--thorough", TIME, "Up to 5 minutes in 12 to 24 fresh processes: for what you publish.")
    ] = False
    budget: Annotated[
        float | None, seconds("--budget", TIME, "Seconds of the whole measurement of a network.", least=0.1)
    ] = None
    processes: Annotated[
        int | None,
        natural(
            "--processes",
            TIME,
            "Short runs in so many fresh processes, 3 or more; 1: a long one in this process.",
            most=MOST_PROCESSES,
        ),
    ] = None

    def fields_of_request(self, *, quick: bool = False) -> dict[str, Any]:
        """Return the fields of a `Request`, in its own names.

        Args:
            quick: what holds where no option says how long.

        Raises:
            typer.BadParameter: quick and thorough at once.
        """
        if self.quick and self.thorough:
            raise typer.BadParameter("contradicts --quick; leave one of them out", param_hint="--thorough")
        unsaid = not self.thorough and self.budget is None
        return {
            "quick": self.quick or (quick and unsaid),
            "thorough": self.thorough,
            "budget_s": self.budget,
            "processes": self.processes,
        }


_LIST = "Comma list. "


@dataclass(kw_only=True)
class GridOptions(_NetworkOptions):
    """The options of a grid of measurements: several values of an option stand between commas."""

    batch: Annotated[str, option("--batch", WORKLOAD, f"{_LIST}Images.", metavar="N,…")] = "1"
    resolution: Annotated[
        str,
        option("--resolution", WORKLOAD, f"{_LIST}Height and width of the input.", metavar="N,…", show_default=False),
    ] = ""
    dtype: Annotated[str, option("--dtype", WORKLOAD, f"{_LIST}fp32, tf32, bf16, fp16, int8.", metavar="NAME,…")] = (
        "fp32"
    )
    runtime: Annotated[str, option("--runtime", WORKLOAD, f"{_LIST}{_RUNTIMES}.", metavar="NAME,…")] = TORCH
    memory_format: Annotated[
        str,
        option(
            "--memory-format",
            WORKLOAD,
            f"{_LIST}contiguous, channels_last.",
            metavar="NAME,…",
            show_default=False,
        ),
    ] = ""
    threads: Annotated[str, option("--threads", WORKLOAD, f"{_LIST}CPU threads.", metavar="N,…")] = "1"
    block: Annotated[
        str, option("--block", WHAT, f"{_LIST}Kinds of block, such as se or eca.", metavar="NAME,…", show_default=False)
    ] = ""
    placement: Annotated[
        str, option("--placement", WHAT, f"{_LIST}Such as standard or pre.", metavar="NAME,…", show_default=False)
    ] = ""
    stages: Annotated[
        str, option("--stages", WHAT, f"{_LIST}Stages with blocks: 2-4 or 2+4.", metavar="STAGES,…", show_default=False)
    ] = ""
    gate: Annotated[
        str, option("--gate", WHAT, f"{_LIST}Such as sigmoid or hardsigmoid.", metavar="NAME,…", show_default=False)
    ] = ""
    reduction: Annotated[
        str, option("--reduction", WHAT, f"{_LIST}Reduction of the blocks.", metavar="N,…", show_default=False)
    ] = ""


def option_of(kind: type, name: str) -> str:
    """Return the option that a field is set by: `compiled` → `--compile`."""
    hint = get_type_hints(kind, include_extras=True)[name]
    (info,) = (one for one in hint.__metadata__ if hasattr(one, "param_decls"))
    # In an annotation, typer.Option takes its first name for the default.
    return str(info.default)


def with_options(command: _Command) -> _Command:
    """Give a command the options of its dataclass parameters.

    A parameter whose type is a dataclass becomes one option for each field; the command is called with an instance.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for one in inspect.signature(command).parameters.values():
        if one.name in groups:
            kind = groups[one.name]
            types = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    one.KEYWORD_ONLY,
                    default=one.empty if field.default is MISSING else field.default,
                    annotation=types[field.name],
                )
                for field in fields(kind)
            ]
        else:
            parameters.append(one.replace(kind=one.KEYWORD_ONLY, annotation=hints[one.name]))

    @wraps(command)
    def call(**values: Any) -> object:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        return command(**values)

    del call.__wrapped__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call  # type: ignore[return-value]


def shapes_of(texts: Sequence[str] | None) -> tuple[tuple[int, int, int] | None, tuple[Input, ...]]:
    """Parse the values of `--input`; return the first image and, where there are several or a named one, all inputs.

    Raises:
        typer.BadParameter: a value is not CxHxW or NAME=CxHxW.
    """
    try:
        return parse_inputs(texts) if texts else (None, ())
    except SpecError as error:
        raise typer.BadParameter(str(error).removeprefix("--input: "), param_hint="--input") from None


def input_file(path: Path) -> Path:
    """Return the file that an argument names: standard input for `-`."""
    return Path("/dev/stdin") if str(path) == "-" else path


def examples(*lines: str) -> str:
    """Return the end of a command's help: one example a line."""
    return "\n\n".join(("Examples:", *(f"$ {line}" for line in lines)))
