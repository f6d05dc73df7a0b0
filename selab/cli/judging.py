"""Commands about trained gates: gates, blocks, fold."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from selab import units
from selab.cli.console import (
    builtins,
    check_outputs,
    find,
    following,
    open_console,
    print_tables,
    reporting,
    write_json,
)
from selab.cli.data_options import DataName, DataOptions, PreparationOptions
from selab.cli.options import (
    DATA,
    OUTPUT,
    TIME,
    WHAT,
    WORKLOAD,
    Arch,
    Ema,
    Format,
    Inputs,
    Json,
    Replace,
    natural,
    option,
    runtime_of,
    seconds,
    with_options,
)
from selab.cli.training import open_tested
from selab.errors import SelabError
from selab.models.spec import ONNX_FAMILY
from selab.records.bounds import MOST_IMAGES, MOST_THREADS
from selab.records.types import Device

if TYPE_CHECKING:
    from selab.experiments.folding import Rule
    from selab.experiments.judged import Judged
    from selab.judging.folding import Folding
    from selab.models.spec import Variant
    from selab.training.data import Data

_PICTURES = ("gates.svg", "depth.svg")
_TOLD = 1000
# Seconds of timing all blocks, by default.
_BLOCKS_S = 120.0


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
        int | None, natural("--most", DATA, "Look at so many images at most; all by default.", most=MOST_IMAGES)
    ] = None
    batch: Annotated[int, natural("--batch", DATA, "Images per pass.", most=MOST_IMAGES)] = 100
    device: Annotated[Device, option("--device", WHAT, "cpu or cuda.", metavar="NAME")] = "cpu"


@dataclass(kw_only=True)
class JudgedDataOptions(DataOptions):
    """Which images the network is judged on."""

    data: Annotated[
        str | None,
        option(
            "--data",
            DATA,
            "cifar10 (default), cifar100, synthetic, imagenet, places365, folder, or a folder itself.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None  # type: ignore[assignment]

    @property
    def unlabelled(self) -> Path | None:
        """The folder that `--data` names, if it holds images; None for a data set and for a folder of classes."""
        if self.data is None or self.data in get_args(DataName):
            return None
        from selab.training.image_listing import SUFFIXES

        folder = Path(self.data)
        if not folder.is_dir():
            named = ", ".join(get_args(DataName))
            raise typer.BadParameter(f"{self.data!r} is no folder, and not one of {named}", param_hint="--data")
        return folder if any(one.suffix.lower() in SUFFIXES for one in folder.iterdir() if one.is_file()) else None

    @property
    def labelled(self) -> DataOptions:
        """The images with labels that are named."""
        if self.data is None or self.data in get_args(DataName):
            return replace_fields(self, data=self.data or "cifar10")
        return replace_fields(self, data="folder", data_dir=Path(self.data))


@with_options
def gates(
    arch: Arch,
    options: JudgedOptions,
    data: JudgedDataOptions,
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
    from selab.judging.look import chosen_classes
    from selab.report.figures import gates as figures
    from selab.report.figures import registry
    from selab.report.gates import gates_table

    if classes and pictures is None and json_to is None:
        raise typer.BadParameter("is of pictures and JSON; give --pictures or --json too", param_hint="--classes")
    variant = find(arch)
    check_outputs(json_to, *([] if pictures is None else [pictures / name for name in _PICTURES]))
    chosen = [one.strip() for one in classes.split(",") if one.strip()]
    with reporting(open_console(stderr=True)) as report:
        network = _judged(variant, options, data, preparation)
        if chosen:
            # Names are checked before the pass; whether a class has images shows behind it.
            chosen_classes(network.seen.classes, chosen, [1] * len(network.seen.classes))
        found = network.gates(
            network.batches(),
            chosen=chosen,
            report=lambda number: report(f"looking at the gates, {_told(number)}", None),
        )
    if json_to is not None:
        write_json(builtins(found), json_to)
    if pictures is not None:
        registry.draw(figures.gate_panels(found), pictures / _PICTURES[0])
        registry.draw(figures.gate_depth(found), pictures / _PICTURES[1])
    if str(json_to) != "-":
        print_tables([gates_table(found)], look)


def _told(number: int) -> str:
    # In a pipe each text is a line.
    return units.counted(number // _TOLD * _TOLD, "image") if number >= _TOLD else f"less than {_TOLD:,} images"


@with_options
def blocks(
    arch: Arch,
    options: JudgedOptions,
    data: JudgedDataOptions,
    preparation: PreparationOptions,
    runtime: Annotated[
        str | None, option("--runtime", WORKLOAD, "Time the blocks in this runtime, or in torch.", metavar="NAME")
    ] = None,
    threads: Annotated[
        int | None, natural("--threads", WORKLOAD, "CPU threads of the times; 1 by default.", most=MOST_THREADS)
    ] = None,
    fused: Annotated[bool, option("--fused", WORKLOAD, "Time the network after selab.fuse.")] = False,
    budget: Annotated[float | None, seconds("--budget", TIME, "Seconds of timing; 120 by default.", least=1)] = None,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Show what each block is worth beside what it costs."""
    own = runtime_of(arch, runtime)
    for name, given in (("--budget", budget), ("--threads", threads), ("--fused", fused or None)):
        if runtime is None and given is not None:
            raise typer.BadParameter("is for times; give --runtime too, torch or another", param_hint=name)
    variant = find(arch)
    check_outputs(json_to)
    from selab.bench.backends import backend
    from selab.experiments import ranking
    from selab.experiments.job import Request, resolve
    from selab.report.ranking import ranking_table

    backend(own)
    with reporting(open_console(stderr=True)) as report:
        network = _judged(variant, options, data, preparation)
        request = Request(
            arch=arch,
            runtime=own,
            phases=("forward",),
            threads=threads or 1,
            fused=fused,
            budget_s=_BLOCKS_S if budget is None else budget,
            input_chw=network.image,
        )
        job = resolve(request)
        done = ranking.rank(network, report=report)
        if runtime is not None:
            done = ranking.priced(done, job, report=report)
    if json_to is not None:
        write_json(builtins(done), json_to)
    if str(json_to) != "-":
        print_tables([ranking_table(done)], look)


@dataclass(kw_only=True)
class FoldOptions:
    """What folding may cost, and how it is measured."""

    max_drop: Annotated[
        float | None,
        option("--max-drop", WHAT, "Points of accuracy that it may cost; 0.1 by default.", metavar="POINTS"),
    ] = None
    max_error: Annotated[
        float | None,
        option(
            "--max-error",
            WHAT,
            "Without labels: how far an output may change, as a share of the largest; 0.01 by default.",
            metavar="SHARE",
        ),
    ] = None
    gate: Annotated[
        str, option("--gate", WHAT, "hardsigmoid: also convert the gates that are left.", metavar="NAME")
    ] = ""
    prune: Annotated[
        bool, option("--prune", WHAT, "Also take out channels whose factor is always about 0 (torch-pruning).")
    ] = False
    runtime: Annotated[
        str | None, option("--runtime", WORKLOAD, "Compare the times in this runtime.", metavar="NAME")
    ] = None
    budget: Annotated[
        float, seconds("--budget", TIME, "Seconds of comparing the times; 0 leaves that out.", least=0)
    ] = 30
    finetune: Annotated[
        int, natural("--finetune", TIME, "Epochs of training after folding, of both networks.", least=0)
    ] = 0

    def rule(self, *, labels: bool) -> "Rule":
        """Return how much folding may cost.

        Raises:
            typer.BadParameter: a limit is not possible, or both are given.
        """
        from selab.experiments.folding import Rule

        if self.max_drop is not None and self.max_error is not None:
            raise typer.BadParameter("contradicts --max-drop; leave one of them out", param_hint="--max-error")
        if self.max_drop is not None and not labels:
            raise typer.BadParameter("the images have no labels; use --max-error", param_hint="--max-drop")
        for name, value, most in (("--max-drop", self.max_drop, 100), ("--max-error", self.max_error, 1)):
            if value is not None and not 0 <= value <= most:
                raise typer.BadParameter(f"{value:g}: allowed: 0 to {most}", param_hint=name)
        if self.gate not in ("", "hardsigmoid"):
            raise typer.BadParameter(f"{self.gate}: allowed: hardsigmoid", param_hint="--gate")
        return Rule.of(self.max_drop, self.max_error, labels=labels)


@with_options
def fold(
    arch: Arch,
    options: JudgedOptions,
    data: JudgedDataOptions,
    preparation: PreparationOptions,
    allowed: FoldOptions,
    out: Annotated[Path, option("--out", OUTPUT, "For the network and its description.", metavar="FOLDER")] = Path(
        "folded"
    ),
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Turn gates that hardly vary into constants in the weights beside them."""
    rule = allowed.rule(labels=options.images is None and data.unlabelled is None)
    runtime = runtime_of(arch, allowed.runtime)
    variant = find(arch)
    check_outputs(json_to)
    from selab.bench.backends import backend
    from selab.experiments import finetuning, folding
    from selab.report.folding import folding_tables

    backend(runtime)
    with reporting(open_console(stderr=True)) as report:
        network = _judged(variant, options, data, preparation)
        if allowed.prune and variant.family == ONNX_FAMILY:
            raise SelabError(f"--prune: {variant.name} is an ONNX network; only networks in PyTorch lose channels")
        recipe = finetuning.recipe_for(network, allowed.finetune) if allowed.finetune else None
        files = folding.files_of(network, out, replace=replace, finetune=recipe is not None)
        done = folding.fold(network, rule, hard_gates=bool(allowed.gate), prunes=allowed.prune, report=report)
        keeps = done.record.changes and not done.too_dear
        if keeps:
            folding.write(done, network, files)
            folding.save(done, files)
            how: dict[str, Any] = {"runtime": runtime, "budget_s": allowed.budget}
            done = folding.measured(done, network, files, **how, report=report)
            folding.save(done, files)
    if keeps and recipe is not None:
        with following(open_console(stderr=True)) as progress, redirect_stdout(sys.stderr):
            done = finetuning.finetuned(done, network, files, recipe, progress, progress.say)
        folding.save(done, files)
    if json_to is not None:
        write_json(builtins(done.record), json_to)
    if str(json_to) != "-":
        said = "no block folds; no network was written"
        if keeps:
            said = f"written: {', '.join(map(str, files.written))} (--arch {files.arch})"
        print_tables(folding_tables(done.record), look, *([] if done.too_dear else [said]))
    if done.too_dear:
        record = done.record
        without = ", leave out --gate" if record.gate else ""
        raise SelabError(
            f"{record.arch}: on the {units.counted(record.reported_on, 'image')} that did not decide it costs "
            f"{record.cost:.3g} {record.unit}{_interval(record)}, more than {record.limit:g}: no network was "
            f"written; allow more{without}, or give more images"
        )


def _check_input(asked: "tuple[int, int, int] | None", data: "Data") -> None:
    """Refuse a shape that images with labels do not have: they are prepared otherwise than those without."""
    if asked is None or asked == data.input_chw:
        return
    own = "x".join(map(str, data.input_chw))
    more = "" if getattr(data, "image", None) is None else "; --resize and --crop choose another, or --images any shape"
    raise typer.BadParameter(f"the images of {data.title} are {own}{more}", param_hint="--input")


def _interval(record: "Folding") -> str:
    loss = record.loss if record.unit == "points" else None
    return "" if loss is None else f" [{loss.low:.2f}, {loss.high:.2f}]"


def _judged(
    variant: "Variant", options: JudgedOptions, data: JudgedDataOptions, preparation: PreparationOptions
) -> "Judged":
    """Return the network that the options name, with its images."""
    from selab.experiments.job import parse_input
    from selab.experiments.judged import ALL_IMAGES, Seen, judged

    images = data.unlabelled if options.images is None else options.images
    if options.images is not None and data.data is not None:
        raise typer.BadParameter("contradicts --data; leave one of them out", param_hint="--images")
    if options.inputs and len(options.inputs) > 1:
        raise typer.BadParameter("one image only", param_hint="--input")
    how: dict[str, Any] = {"batch": options.batch, "most": options.most or ALL_IMAGES}
    how["image"] = parse_input(options.inputs[0], option="--input") if options.inputs else None
    if images is not None:
        seen = Seen(folder=images, **how)
    else:
        named = data.labelled
        opened, _, _ = open_tested(named, options.weights, preparation)
        _check_input(how["image"], opened)
        seen = Seen(data=opened, **how)
    return judged(variant, seen, weights=options.weights, ema=options.ema, device=options.device)
