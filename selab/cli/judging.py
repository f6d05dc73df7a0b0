"""Commands about trained gates: gates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from selab.cli.console import builtins, check_outputs, find, open_console, print_tables, reporting, write_json
from selab.cli.options import (
    DATA,
    OUTPUT,
    WHAT,
    Arch,
    DataOptions,
    Ema,
    Format,
    Inputs,
    Json,
    PreparationOptions,
    natural,
    option,
    with_options,
)
from selab.cli.training import open_images, preparation_of
from selab.records.bounds import MOST_IMAGES
from selab.records.types import Device

_PICTURES = ("gates.svg", "depth.svg")


@dataclass(kw_only=True)
class JudgedOptions:
    """The trained network, and how its images are read."""

    weights: Annotated[
        Path | None, option("--weights", WHAT, "Trained weights; not for an ONNX file.", metavar="FILE")
    ] = None
    ema: Ema = None
    images: Annotated[
        Path | None, option("--images", DATA, "A folder of images without labels, instead of --data.", metavar="FOLDER")
    ] = None
    inputs: Inputs = None
    most: Annotated[
        int | None, natural("--most", DATA, "Look at so many images at most; at all by default.", most=MOST_IMAGES)
    ] = None
    batch: Annotated[int, natural("--batch", DATA, "Images per pass.", most=MOST_IMAGES)] = 100
    device: Annotated[Device, option("--device", WHAT, "cpu or cuda.", metavar="NAME")] = "cpu"


@with_options
def gates(
    arch: Arch,
    options: JudgedOptions,
    data: DataOptions,
    preparation: PreparationOptions,
    classes: Annotated[
        str,
        option("--classes", OUTPUT, "Classes in the picture, by name or number; four by default.", metavar="NAME,…"),
    ] = "",
    pictures: Annotated[
        Path | None,
        option("--pictures", OUTPUT, "Also draw the gates by channel and by depth.", metavar="FOLDER"),
    ] = None,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Show what the gates of a trained network do: spread, saturation, classes."""
    variant = find(arch)
    from selab.experiments import gates as experiments_gates
    from selab.experiments.job import parse_input
    from selab.report.figures import gates as figures
    from selab.report.figures import registry
    from selab.report.gates import gates_table

    check_outputs(json_to, *([] if pictures is None else [pictures / name for name in _PICTURES]))
    if options.inputs and len(options.inputs) > 1:
        raise typer.BadParameter("one image only", param_hint="--input")
    how: dict[str, Any] = {"batch": options.batch, "most": options.most or experiments_gates.ALL_IMAGES}
    how["image"] = parse_input(options.inputs[0], option="--input") if options.inputs else None
    if options.images is not None:
        seen = experiments_gates.Seen(folder=options.images, **how)
    else:
        prepared, _ = preparation_of(data, options.weights, preparation)
        seen = experiments_gates.Seen(data=open_images(data, prepared), **how)
    chosen = [one.strip() for one in classes.split(",") if one.strip()]
    with reporting(open_console(stderr=True)) as report:
        facts: dict[str, Any] = {"weights": options.weights, "ema": options.ema, "device": options.device}
        found = experiments_gates.look(variant, seen, chosen=chosen, report=report, **facts)
    if json_to is not None:
        write_json(builtins(found), json_to)
    if pictures is not None:
        registry.draw(figures.gate_panels(found), pictures / _PICTURES[0])
        registry.draw(figures.gate_depth(found), pictures / _PICTURES[1])
    if str(json_to) != "-":
        print_tables([gates_table(found)], look)
