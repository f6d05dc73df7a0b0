"""The commands `train` and `eval`, and what all commands that train or test have in common."""

import hashlib
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from selab import units
from selab._version import __version__
from selab.cli.console import (
    builtins,
    check_outputs,
    find,
    following,
    open_console,
    print_note,
    print_tables,
    reporting,
    write_json,
)
from selab.cli.data_options import DataOptions, PreparationOptions, TrainOptions
from selab.cli.measure import RESULTS
from selab.cli.options import (
    TRAINING,
    Amp,
    Arch,
    Ema,
    Format,
    Json,
    Out,
    natural,
    option,
    with_options,
)
from selab.errors import SelabError
from selab.models.spec import ONNX_FAMILY
from selab.records.types import Device

if TYPE_CHECKING:
    from selab.models.spec import Variant
    from selab.report.table import Table
    from selab.training.data import Data
    from selab.training.problems import Problems
    from selab.training.recipe import BoxRecipe, ImageRecipe, Recipe
    from selab.training.record import Accuracy, Options, Precision


@with_options
def train(
    arch: Arch,
    data: DataOptions,
    options: TrainOptions,
    seed: Annotated[
        int,
        option("--seed", TRAINING, "Of weights, order, augmentation and dropout.", metavar="N"),
    ] = 0,
    weights: Annotated[
        Path | None, option("--weights", TRAINING, "Start from these weights, not from random ones.", metavar="FILE")
    ] = None,
    out: Out = RESULTS,
    json_to: Json = None,
) -> None:
    """Train one network with a recipe; rerun to resume."""
    variant = trainable(arch)
    from selab.bench.heap import keep_freed
    from selab.experiments import compare as experiments_compare
    from selab.training.augment import check_seed
    from selab.training.distributed import join
    from selab.training.train import train as train_one

    chosen = recipe_of(options.recipe, variant, data)
    how = options_of(options, boxed=data.boxed)
    check_seed(seed)
    keep_freed(how.device)
    group = join(how.device)
    group.on_first(lambda: check_outputs(json_to))
    images = open_images(data, chosen.image, chosen.boxes)
    folder = experiments_compare.folder_of(variant, images, chosen, how, seed, out=out, weights=weights)
    with following(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        done = train_one(
            variant,
            images,
            chosen,
            seed=seed,
            folder=folder,
            options=how,
            report=lambda state: report(variant.name, state),
            say=lambda text: report.say(f"{variant.name}: {text}"),
            weights=weights,
        )
    if not group.first:
        return None
    if json_to is not None:
        return write_json(builtins(done), json_to)
    typer.echo(f"{variant.name}: {_result_words(done.test)}")
    typer.echo(f"recipe: {chosen.name}")
    typer.echo(f"weights: {done.weights}")
    print_problems(done.problems)
    return None


@with_options
def evaluate(
    arch: Arch,
    weights: Annotated[
        Path,
        option("--weights", TRAINING, "A .safetensors, .pt, .pth or .ckpt file.", metavar="FILE"),
    ],
    data: DataOptions,
    preparation: PreparationOptions,
    ema: Ema = None,
    batch: Annotated[
        int | None,
        natural("--batch", TRAINING, "Images per pass; by default 500, of a detector 2.", show_default=False),
    ] = None,
    device: Annotated[Device, option("--device", TRAINING, "cpu or cuda.", metavar="NAME")] = "cpu",
    amp: Annotated[
        Amp,
        option("--amp", TRAINING, "Mixed precision: off, bf16 or fp16.", metavar="NAME"),
    ] = "off",
    channels_last: Annotated[bool, option("--channels-last", TRAINING, "Use the memory format NHWC.")] = False,
    look: Format = "rich",
    json_to: Json = None,
) -> None:
    """Test trained weights: top-1 and top-5 with 95 % intervals, or AP."""
    variant = trainable(arch)
    check_task(variant, data)
    from selab.experiments.compare import loaded
    from selab.training.evaluate import evaluate as evaluate_one

    check_outputs(json_to)
    images, prepared, whose = open_tested(data, weights, preparation, detectors=True)
    batch = batch or (_DETECTED_AT_ONCE if data.boxed else _AT_ONCE)
    how: dict[str, Any] = {"device": device, "amp": amp, "channels_last": channels_last}
    with redirect_stdout(sys.stderr), reporting(open_console(stderr=True)) as report:
        report(f"evaluating {variant.name} on {images.title}", None)
        model = loaded(variant, images, weights, ema=ema, say=print_note).to(device)
        found = evaluate_one(model, images, batch=batch, **how)
    _compare_data(weights, images)
    if json_to is not None:
        facts = _tested(found, variant, images, weights) | how | {"prepared": builtins(prepared), "prepared_by": whose}
        return write_json(facts, json_to)
    if look != "rich":
        return print_tables([_tested_table(found, variant, images)], look)
    words = ", ".join(text for text in (amp if amp != "off" else "", "channels last" if channels_last else "") if text)
    typer.echo(
        f"{variant.name} on {images.title}, {units.counted(found.images, 'image')}{f', {words}' if words else ''}"
    )
    if prepared is not None:
        typer.echo(f"images: {prepared.test_words} ({whose})")
    for line in _found_lines(found):
        typer.echo(line)
    print_problems(getattr(images, "problems", None))
    return None


# Images per pass, by default.
_AT_ONCE, _DETECTED_AT_ONCE = 500, 2


def _result_words(test: "Accuracy") -> str:
    """Return `top-1 65.56 % [65.10, 66.02], loss 1.1146`, or `AP 37.04 %, AP at 0.50 58.12 %`."""
    if test.precision is not None:
        return f"AP {test.precision.ap_pct:.2f} %, AP at 0.50 {test.precision.ap50_pct:.2f} %"
    low, high = test.top1_interval_pct
    return f"top-1 {test.top1_pct:.2f} % [{low:.2f}, {high:.2f}], loss {test.loss:.4f}"


def _compare_data(weights: Path, images: "Data") -> None:
    """Print a note if weights were trained on other images than they are tested on."""
    from selab.models.checkpoint import read_metadata

    metadata = read_metadata(weights)
    if metadata.get("data_sha256", images.sha256) != images.sha256:
        print_note(f"{weights}: was trained on other images, {metadata.get('data', 'unnamed')}")


def _tested(found: "Accuracy", variant: "Variant", images: "Data", weights: Path) -> dict[str, object]:
    """A test for `--json`."""
    return {
        "selab": __version__,
        "arch": variant.name,
        "weights": str(weights),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "data": images.title,
        "data_sha256": images.sha256,
        **builtins(found),
        **_intervals(found),
        "problems": builtins(getattr(images, "problems", None)),
    }


def _intervals(found: "Accuracy") -> dict[str, object]:
    """Return the intervals of a classifier's accuracies; a detector's AP has none over images."""
    if found.precision is not None:
        return {}
    return {"top1_interval_pct": found.top1_interval_pct, "top5_interval_pct": found.top5_interval_pct}


def _found_lines(found: "Accuracy") -> list[str]:
    """Return what a test has found, a figure a line."""
    if found.precision is not None:
        return [f"{name} {cell}" for name, cell in _precision_rows(found.precision)]
    rows = [f"{name} {percent:.2f} % [{low:.2f}, {high:.2f}]" for name, percent, (low, high) in _top_rows(found)]
    return [*rows, f"loss {found.loss:.4f}; intervals of 95 % (Wilson) over images"]


def _precision_rows(found: "Precision") -> list[tuple[str, str]]:
    """AP, over all thresholds and at two of them, and by the size of the objects."""
    sizes = {"small": found.small_pct, "medium": found.medium_pct, "large": found.large_pct}
    values = {"AP": found.ap_pct, "AP at 0.50": found.ap50_pct, "AP at 0.75": found.ap75_pct}
    values |= {f"AP of {name} objects": value for name, value in sizes.items() if value is not None}
    return [(name, f"{value:.2f} %") for name, value in values.items()]


def _top_rows(found: "Accuracy") -> list[tuple[str, float, tuple[float, float]]]:
    """Top-1 and top-5 with their intervals, in percent; no top-5 of few classes."""
    rows = [("top-1", found.top1_pct, found.top1_interval_pct)]
    if found.top5_pct is not None and found.top5_interval_pct is not None:
        rows.append(("top-5", found.top5_pct, found.top5_interval_pct))
    return rows


def _tested_table(found: "Accuracy", variant: "Variant", images: "Data") -> "Table":
    from selab.report.table import Table

    title = f"{variant.name} on {images.title}, {units.counted(found.images, 'image')}"
    if found.precision is not None:
        return Table(title=title, columns=("", "precision"), rows=tuple(_precision_rows(found.precision)))
    rows = [(name, f"{value:.2f} %", f"[{low:.2f}, {high:.2f}]") for name, value, (low, high) in _top_rows(found)]
    return Table(
        title=title,
        columns=("", "accuracy", "95 % interval"),
        rows=(*rows, ("loss", f"{found.loss:.4f}", "")),
        notes=("Wilson intervals over images.",),
    )


def trainable(name: str, *, option: str = "--arch") -> "Variant":
    """Look up a network that PyTorch runs.

    Raises:
        SelabError: there is no such network, or it is an ONNX file.
    """
    variant = find(name, option=option)
    if variant.family == ONNX_FAMILY:
        raise SelabError(f"{option} {name}: is an ONNX network; only networks in PyTorch are trained and tested here")
    return variant


def options_of(options: TrainOptions, *, boxed: bool = False) -> "Options":
    """Return the options of a training.

    Raises:
        SelabError: the device is not there, or cannot compute in this precision.
    """
    from selab.bench.machine import has_bf16
    from selab.bench.runner import check_device
    from selab.training.record import Options

    check_device(options.device)
    if options.amp == "fp16" and options.device == "cpu":
        raise SelabError("--amp fp16: is for --device cuda; on a CPU use bf16, or leave it out")
    if options.amp == "bf16" and options.device == "cpu" and has_bf16() is False:
        print_note("--amp bf16: this processor has no instructions for it, and trains more slowly than in fp32")
    return Options(
        device=options.device,
        amp=options.amp,
        channels_last=channels_last_of(options),
        fused=fused_of(options, boxed=boxed),
        compiled=options.compiled,
        graphed=options.graphed,
        accumulate=options.accumulate,
        epochs=options.epochs,
        batch=options.batch,
        threads=options.threads,
    )


def channels_last_of(options: TrainOptions) -> bool:
    """Return whether a training uses the memory format NHWC.

    Unless asked, it does where convolutions were never slower in it: on a CPU, and on a GPU's matrix units.
    """
    if options.channels_last is not None:
        return options.channels_last
    return options.device == "cpu" or options.amp != "off"


def fused_of(options: TrainOptions, *, boxed: bool = False) -> bool:
    """Return whether a training runs through `selab.fuse`: unless asked, where its native code runs.

    Raises:
        SelabError: it was asked for together with another way of running the network.
    """
    from selab.kernels.cpu import native_reason

    other = "--compile" if options.compiled else "--cuda-graph" if options.graphed else ""
    if options.fused and other:
        raise SelabError(f"--fused: the network cannot run through it and {other}; leave out one of them")
    if options.fused is not None:
        return options.fused
    if boxed:
        # Its images have many sizes, and each would be a case of its own for the fused blocks.
        return False
    return options.device == "cpu" and options.amp == "off" and not other and not native_reason()


def recipe_of(name: str | None, variant: "Variant", data: DataOptions) -> "Recipe":
    """The recipe of that name, or the one for this network and data; it must suit the data."""
    from selab.training.recipe import check_suits, default_recipe, find_recipe

    check_task(variant, data)
    if name is None:
        return default_recipe(variant.family, in_memory=data.in_memory, data=data.data)
    chosen = find_recipe(name)
    check_suits(chosen, data.data, in_memory=data.in_memory, task="detection" if data.boxed else "classification")
    return chosen


def check_task(variant: "Variant", data: DataOptions) -> None:
    """Refuse a classifier for images with boxes, and a detector for images with classes.

    Raises:
        SelabError: they do not go together.
    """
    from selab.models import catalog, composed

    network, _ = catalog.split_address(variant.name)
    classifier = network in catalog.installed() or network.startswith("timm:")
    if data.boxed and (classifier or variant.family == "segmentation"):
        then = f"; on it as the backbone: faster_rcnn_{variant.name}_fpn" if network in catalog.installed() else ""
        raise SelabError(f"--data {data.data}: is for detectors, and {variant.name} is none{then}")
    if not data.boxed and composed.is_one(variant):
        others = "coco or shapes" if variant.family == "detection" else "classifiers; segmenters are not trained here"
        raise SelabError(
            f"--data {data.data}: has classes and {variant.name} is a {variant.family} network; use {others}"
        )


def boxes_of(data: DataOptions, weights: Path, asked: PreparationOptions) -> "tuple[BoxRecipe, str]":
    """Return how images with boxes are prepared, and who says so: the options, a recipe, the weights, or nobody."""
    from selab.training.recipe import BoxRecipe, check_suits, find_recipe, read_box_recipe

    if asked.crop is not None:
        raise SelabError("--crop: is for classifiers; the images of a detector are not cropped")
    if asked.recipe is not None:
        named = find_recipe(asked.recipe)
        check_suits(named, data.data, in_memory=False, task="detection")
        chosen, whose = named.boxes or BoxRecipe(), f"recipe {named.name}"
    else:
        own = read_box_recipe(weights)
        chosen, whose = own or BoxRecipe(), "default" if own is None else "as trained"
    if asked.resize is not None:
        # The longer side grows with the shorter one.
        longer = asked.resize * chosen.max_size // chosen.min_size
        chosen, whose = (
            msgspec.structs.replace(chosen, min_size=asked.resize, max_size=longer),
            f"{whose}, --resize",
        )
    return chosen, whose


def preparation_of(
    data: DataOptions, weights: Path | None, asked: PreparationOptions
) -> "tuple[ImageRecipe | None, str]":
    """Return how a folder's images are prepared, and who says so: the options, a recipe, the weights, or nobody.

    Raises:
        SelabError: the data lie in memory and options say how to prepare them, or the options contradict each other.
    """
    from selab.training.recipe import ImageRecipe, check_suits, find_recipe, read_image_recipe

    if data.boxed:
        raise SelabError(f"--data {data.data}: holds boxes; only train, eval and compare take detectors")
    recipe, resize, crop = asked.recipe, asked.resize, asked.crop
    own = None if weights is None else read_image_recipe(weights)
    given = [("--resize", resize), ("--crop", crop)]
    if data.in_memory:
        if any(value is not None for _, value in [("--recipe", recipe), *given]):
            raise SelabError(f"--recipe, --resize and --crop: are for image folders; {data.data} needs none of them")
        return None, ""
    if recipe is not None:
        named = find_recipe(recipe)
        check_suits(named, data.data, in_memory=False)
        chosen, whose = named.image or ImageRecipe(), f"recipe {named.name}"
    else:
        chosen, whose = own or ImageRecipe(), "default" if own is None else "as trained"
    resize, crop = resize or chosen.test_resize, crop or chosen.test_crop
    if crop > resize:
        raise SelabError(f"--crop {crop}: does not fit into images resized to {resize}; give a larger --resize")
    whose = ", ".join([whose, *(option for option, value in given if value is not None)])
    return msgspec.structs.replace(chosen, test_resize=resize, test_crop=crop), whose


def open_images(options: DataOptions, image: "ImageRecipe | None", boxes: "BoxRecipe | None" = None) -> "Data":
    """Open the data set that the options name, and print what was found.

    Raises:
        SelabError: they are images with boxes, and the command is for classifiers.
    """
    from selab.training.data import open_data

    if options.boxed and boxes is None:
        raise SelabError(f"--data {options.data}: holds boxes; only train, eval and compare take detectors")
    return open_data(
        options.data,
        data_dir=options.data_dir,
        download=options.download,
        image=image,
        boxes=boxes,
        workers=options.workers,
        classes_file=options.classes_file,
        report=print_note,
    )


def open_tested(
    options: DataOptions, weights: Path | None, asked: PreparationOptions, *, detectors: bool = False
) -> "tuple[Data, ImageRecipe | BoxRecipe | None, str]":
    """Open the data set that the options name, prepared as the images were that the weights were trained on.

    Args:
        options: which data.
        weights: a file; None where there are none.
        asked: how images are prepared instead.
        detectors: whether images with boxes are accepted.

    Returns:
        The data, how its images are prepared, and who says so; None and an empty string for images in memory.

    Raises:
        SelabError: the options contradict each other, or the data.
    """
    from selab.models.checkpoint import read_metadata
    from selab.training.data import scaled
    from selab.training.recipe import scaling_of

    if options.boxed and detectors and weights is not None:
        boxes, whose = boxes_of(options, weights, asked)
        return open_images(options, None, boxes), boxes, whose
    image, whose = preparation_of(options, weights, asked)
    scaling = "channel" if weights is None else scaling_of(read_metadata(weights), place=str(weights))
    return scaled(open_images(options, image), scaling), image, whose


def print_problems(problems: "Problems | None") -> None:
    """Print what was unusual about an image folder's images."""
    if problems is not None:
        typer.echo(f"images read: {problems.words}")
