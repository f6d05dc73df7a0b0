"""The options that commands share."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where to run."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """fp32, or autocast to half precision."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Mode(StrEnum):
    """auto: forward in eval (inference), the others in train."""

    auto = "auto"
    train = "train"
    eval = "eval"


class StepMode(StrEnum):
    """What a step is."""

    eval = "eval"
    train = "train"


class Phase(StrEnum):
    """What one call is."""

    forward = "forward"
    backward = "backward"
    forward_backward = "forward_backward"


class StepPhase(StrEnum):
    """What one call is: inference, or a step's two passes."""

    forward = "forward"
    forward_backward = "forward_backward"


class DataName(StrEnum):
    """A data set."""

    cifar10 = "cifar10"
    cifar100 = "cifar100"
    synthetic = "synthetic"
    imagenet = "imagenet"
    folder = "folder"

    @property
    def in_memory(self) -> bool:
        """Whether its images have one size and lie in memory; else they are files in a folder."""
        return self not in (DataName.imagenet, DataName.folder)


class Amp(StrEnum):
    """Automatic mixed precision."""

    off = "off"
    bf16 = "bf16"
    fp16 = "fp16"


DataDir = Annotated[Path, typer.Option("--data-dir", help="Where the images lie, or are downloaded to.")]
Download = Annotated[bool, typer.Option("--download/--no-download", help="Fetch a set that is not there.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=0, help="Processes that decode an image folder's images; one per core, at most 8, by default."
    ),
]
ClassesFile = Annotated[
    Path | None,
    typer.Option("--classes-file", help="The classes of an image folder, one a line, in the order of their numbers."),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="How to train; a name, or path/to/file.toml[:NAME]. By default one for the network and the data.",
    ),
]
ImageRecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Prepare an image folder's images as this recipe does, not as the weights were trained."
    ),
]
Resize = Annotated[
    int | None, typer.Option("--resize", min=1, help="An image folder's images: the shorter side, in pixels.")
]
Crop = Annotated[
    int | None, typer.Option("--crop", min=1, help="An image folder's images: side of the centre crop, in pixels.")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's; its schedule shrinks with them.")]
TrainBatch = Annotated[int | None, typer.Option(min=1, help="Images per step over all processes, not the recipe's.")]
AmpOption = Annotated[Amp, typer.Option("--amp", help="Automatic mixed precision.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Through torch.compile.")]
HoldHeap = Annotated[
    bool, typer.Option("--hold-heap", help="Keep freed memory (glibc), so that no page faults are measured.")
]
Accumulate = Annotated[int, typer.Option(min=1, help="Micro-batches per step; the batch stays the same.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice by default.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write JSON to this file, or to - for standard output.")]
Arch = Annotated[
    str,
    typer.Option(
        "--arch",
        help="A name from `selab archs`, path/to/family.toml[:variant], torchvision:NAME, timm:NAME, "
        "path/to/file.py:callable or package.module:callable.",
    ),
]
Archs = Annotated[list[str], typer.Option("--arch", help="As in `profile`; repeat it for several networks.")]
Se = Annotated[
    str | None,
    typer.Option(
        "--se", help="Put attention blocks in, or change them: KEY=VALUE,…, as reduction=8,stages=2-4 or block=eca."
    ),
]
Insert = Annotated[
    list[str] | None,
    typer.Option(
        "--insert", help="Where: a site group, a pattern such as 'layer*.*.bn3', or auto; repeat it for several."
    ),
]
Input = Annotated[str | None, typer.Option("--input", help="The input as CxHxW, if it is not the network's own.")]
Positive = Annotated[int, typer.Option(min=1)]


def network_address(arch: str, se: str | None, insert: Sequence[str] | None) -> str:
    """One word for a network and the blocks in it, as `selab.catalog.find` reads it."""
    changes = [*([] if se is None else [se]), *([f"sites={'+'.join(insert)}"] if insert else [])]
    if not changes:
        return arch
    return arch + ("," if re.search(r"\+\w+\s*=", arch) else "+") + ",".join(changes)


def input_chw(text: str | None) -> tuple[int, int, int] | None:
    """Parse `CxHxW`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or 0 in map(int, found.groups()):
        raise typer.BadParameter(f"{text!r} is not CxHxW; for example 3x224x224", param_hint="--input")
    return int(found[1]), int(found[2]), int(found[3])
