"""The commands that train and evaluate; `selab.cli` gives them their names."""

import hashlib
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab._version import __version__
from selab.cli.console import (
    builtins,
    check_outputs,
    find,
    following,
    open_console,
    print_note,
    print_parts,
    reporting,
    write_json,
)
from selab.cli.options import (
    Accumulate,
    Amp,
    AmpOption,
    Arch,
    ChannelsLast,
    ClassesFile,
    Compiled,
    Crop,
    DataDir,
    DataName,
    Device,
    Download,
    Epochs,
    ImageRecipeName,
    Json,
    Positive,
    RecipeName,
    Resize,
    Threads,
    TrainBatch,
    Workers,
)
from selab.errors import SelabError

if TYPE_CHECKING:
    from selab.experiments.compare import Comparison
    from selab.models.spec import Variant
    from selab.training.data import Data
    from selab.training.problems import Problems
    from selab.training.recipe import ImageRecipe, Recipe
    from selab.training.record import AccuracyRecord, Options


def train(
    arch: Arch,
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    workers: Workers = None,
    classes_file: ClassesFile = None,
    recipe: RecipeName = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation and dropout; 0 to 2^64 - 1.")] = 0,
    epochs: Epochs = None,
    batch: TrainBatch = None,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    accumulate: Accumulate = 1,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The run goes to OUT/runs/….")] = Path("results"),
    json_to: Json = None,
) -> None:
    """Train one network with a recipe. Ctrl-C saves everything; the same command resumes. Runs under torchrun too."""
    variant = find(arch)
    from selab.experiments import compare as experiments_compare
    from selab.training.augment import check_seed
    from selab.training.distributed import join
    from selab.training.train import train as train_one

    chosen = _recipe_of(recipe, variant, data)
    options = _options(device, amp, channels_last, compiled, accumulate, epochs, batch, threads)
    check_seed(seed)
    group = join(options.device)
    group.on_first(lambda: check_outputs(json_to))
    images = _open_data(data, data_dir, download, workers, classes_file, chosen.image)
    folder = experiments_compare.folder_of(variant, images, chosen, options, seed, out=out)
    with following(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        done = train_one(
            variant,
            images,
            chosen,
            seed=seed,
            folder=folder,
            options=options,
            report=lambda state: report(variant.name, state),
            say=lambda text: report.say(f"{variant.name}: {text}"),
        )
    if not group.first:
        return None
    if json_to is not None:
        return write_json(builtins(done), json_to)
    low, high = done.test.top1_interval_pct
    typer.echo(f"{variant.name}: top-1 {done.test.top1_pct:.2f} % [{low:.2f}, {high:.2f}], loss {done.test.loss:.4f}")
    typer.echo(f"recipe: {chosen.name}")
    typer.echo(f"weights: {done.weights}")
    _tell_problems(done.problems)
    return None


def evaluate(
    arch: Arch,
    weights: Annotated[Path, typer.Option(help="A .safetensors, .pt or .pth file of this network.")],
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    workers: Workers = None,
    classes_file: ClassesFile = None,
    recipe: ImageRecipeName = None,
    resize: Resize = None,
    crop: Crop = None,
    batch: Positive = 500,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    json_to: Json = None,
) -> None:
    """Top-1 and top-5 of trained weights on a data set's test images, with 95 % intervals."""
    variant = find(arch)
    from selab.experiments.compare import loaded
    from selab.models.checkpoint import read_metadata
    from selab.training.evaluate import evaluate as evaluate_one

    check_outputs(json_to)
    prepared, whose = _preparation(data, weights, recipe, resize, crop)
    images = _open_data(data, data_dir, download, workers, classes_file, prepared)
    with redirect_stdout(sys.stderr), reporting(open_console(stderr=True)) as report:
        report(f"evaluating {variant.name} on {images.title}", None)
        model = loaded(variant, images, weights).to(device.value)
        found = evaluate_one(
            model, images, batch=batch, device=device.value, amp=amp.value, channels_last=channels_last
        )
    problems: Problems | None = getattr(images, "problems", None)
    metadata = read_metadata(weights)
    if metadata.get("data_sha256", images.sha256) != images.sha256:
        print_note(f"{weights}: was trained on other images, {metadata.get('data', 'unnamed')}")
    if json_to is not None:
        told = {
            "selab": __version__,
            "arch": variant.name,
            "weights": str(weights),
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "device": device.value,
            "amp": amp.value,
            "channels_last": channels_last,
            "data": images.title,
            "data_sha256": images.sha256,
            "prepared": builtins(prepared),
            "prepared_by": whose,
            **builtins(found),
            "top1_interval_pct": found.top1_interval_pct,
            "top5_interval_pct": found.top5_interval_pct,
            "problems": builtins(problems),
        }
        return write_json(told, json_to)
    low, high = found.top1_interval_pct
    how = ", ".join(["" if amp is Amp.off else amp.value, "channels last" if channels_last else ""]).strip(", ")
    typer.echo(f"{variant.name} on {images.title}, {found.images:,} images{f', {how}' if how else ''}")
    if prepared is not None:
        typer.echo(f"images: {prepared.test_words} ({whose})")
    typer.echo(f"top-1 {found.top1_pct:.2f} % [{low:.2f}, {high:.2f}]")
    if found.top5_pct is not None and found.top5_interval_pct is not None:
        low, high = found.top5_interval_pct
        typer.echo(f"top-5 {found.top5_pct:.2f} % [{low:.2f}, {high:.2f}]")
    typer.echo(f"loss {found.loss:.4f}; intervals of 95 % (Wilson) over images")
    _tell_problems(problems)
    return None


def compare(
    archs: Annotated[list[str], typer.Argument(help="BASELINE VARIANT…, or a variant alone for its own baseline.")],
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    workers: Workers = None,
    classes_file: ClassesFile = None,
    recipe: RecipeName = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many, from 0 on; more extend a record; 5 for what you publish.")
    ] = 3,
    epochs: Epochs = None,
    batch: TrainBatch = None,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    accumulate: Accumulate = 1,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/accuracy/…, runs to OUT/runs/….")] = Path(
        "results"
    ),
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Make the record anew. Finished trainings in OUT/runs are taken over; delete them to train again.",
        ),
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Also time both networks, as `profile --quick` does.")
    ] = True,
    json_to: Json = None,
) -> None:
    """Train networks with and without SE from several seeds; compare accuracy and cost, with intervals."""
    for one in archs:
        find(one)
    from selab.experiments import compare as experiments_compare
    from selab.report import accuracy
    from selab.training.distributed import join, leave
    from selab.training.record import read_accuracy_record

    pairs = [(None, archs[0])] if len(archs) == 1 else [(archs[0], one) for one in dict.fromkeys(archs[1:])]
    networks = [experiments_compare.pair(variant, baseline) for baseline, variant in pairs]
    chosen = _recipe_of(recipe, networks[0][1], data)
    options = _options(device, amp, channels_last, compiled, accumulate, epochs, batch, threads)
    group = join(options.device)
    group.on_first(lambda: check_outputs(json_to))
    images = _open_data(data, data_dir, download, workers, classes_file, chosen.image)
    plans = [
        experiments_compare.ComparisonPlan(
            variant=variant,
            baseline=baseline,
            recipe=chosen,
            options=options,
            seeds=tuple(range(seeds)),
            command=shlex.join(["selab", *sys.argv[1:]]),
        )
        for variant, baseline in networks
    ]
    comparisons = [experiments_compare.Comparison(plan, images, out=out) for plan in plans]
    with redirect_stdout(sys.stderr):
        left = experiments_compare.left_of(comparisons, replace=replace)
    for finished in comparisons:
        if finished not in left:
            print_note(f"{finished.path}: already finished; more --seeds extend it, --replace trains again")
    with following(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        experiments_compare.run_all(left, report, report.say)
    # Nothing else may run on the machine while networks are timed.
    leave()
    if not group.first:
        return
    records = [read_accuracy_record(one.path) for one in comparisons]
    if json_to is not None:
        _write_records(records, json_to)
        if str(json_to) == "-":
            return
    for growing, record in zip(comparisons, records, strict=True):
        if latency:
            _measure(growing)
        beside = experiments_compare.compared(record, out / record.machine.name)
        print_parts(accuracy.comparison_table(beside), accuracy.seeds_table(record))
        typer.echo(f"record: {growing.path}")
    _tell_problems(getattr(images, "problems", None))


def _write_records(records: "list[AccuracyRecord]", to: Path) -> None:
    """One record as it is on disk, several in a list."""
    from selab.records.store import write_atomically
    from selab.training.record import to_json

    each = [to_json(record) for record in records]
    content = each[0] if len(each) == 1 else b"[\n" + b",\n".join(each) + b"]\n"
    if str(to) == "-":
        sys.stdout.buffer.write(content)
    else:
        write_atomically(to, content)


def _measure(growing: "Comparison") -> None:
    try:
        with reporting(open_console(stderr=True)) as report:
            growing.measure(report)
    except KeyboardInterrupt:
        raise SelabError(
            f"interrupted; the comparison is in {growing.path}, times are missing: `selab table accuracy --profiles "
            f"{growing.path.parents[1]}` shows what there is"
        ) from None


def _options(
    device: Device,
    amp: "Amp",
    channels_last: bool,
    compiled: bool,
    accumulate: int,
    epochs: int | None,
    batch: int | None,
    threads: int | None,
) -> "Options":
    from selab.bench.runner import check_device
    from selab.training.record import Options

    check_device(device.value)
    if amp is Amp.fp16 and device is Device.cpu:
        raise SelabError("--amp fp16: is for --device cuda; on a CPU take bf16, or leave it away")
    return Options(
        device=device.value,
        amp=amp.value,
        channels_last=channels_last,
        compiled=compiled,
        accumulate=accumulate,
        epochs=epochs,
        batch=batch,
        threads=threads,
    )


def _recipe_of(word: str | None, variant: "Variant", data: DataName) -> "Recipe":
    """The recipe that was named, or the one for this network and data; it must be for such data."""
    from selab.training.recipe import check_suits, default_recipe, find_recipe

    if word is None:
        return default_recipe(variant.family, in_memory=data.in_memory)
    chosen = find_recipe(word)
    check_suits(chosen, data.value, in_memory=data.in_memory)
    return chosen


def _preparation(
    data: DataName, weights: Path, recipe: str | None, resize: int | None, crop: int | None
) -> "tuple[ImageRecipe | None, str]":
    """What is done to a folder's images, and who says so: the options, a recipe, the weights themselves, or nobody.

    Raises:
        SelabError: the data lie in memory and options say how to prepare them, or these contradict each other.
    """
    import msgspec

    from selab.training.recipe import ImageRecipe, check_suits, find_recipe, read_image_recipe

    own, given = read_image_recipe(weights), [("--resize", resize), ("--crop", crop)]
    if data.in_memory:
        if any(value is not None for _, value in [("--recipe", recipe), *given]):
            raise SelabError(f"--recipe, --resize and --crop: are for image folders; {data.value} needs none of them")
        return None, ""
    if recipe is not None:
        named = find_recipe(recipe)
        check_suits(named, data.value, in_memory=False)
        chosen, whose = named.image or ImageRecipe(), f"recipe {named.name}"
    else:
        chosen, whose = own or ImageRecipe(), "default" if own is None else "as trained"
    resize, crop = resize or chosen.test_resize, crop or chosen.test_crop
    if crop > resize:
        raise SelabError(f"--crop {crop}: does not fit into images resized to {resize}; give a larger --resize")
    whose = ", ".join([whose, *(option for option, value in given if value is not None)])
    return msgspec.structs.replace(chosen, test_resize=resize, test_crop=crop), whose


def _open_data(
    name: DataName,
    folder: Path,
    download: bool,
    workers: int | None,
    classes_file: Path | None,
    image: "ImageRecipe | None",
) -> "Data":
    from selab.training.data import open_data

    return open_data(
        name.value,
        data_dir=folder,
        download=download,
        image=image,
        workers=workers,
        classes_file=classes_file,
        report=print_note,
    )


def _tell_problems(problems: "Problems | None") -> None:
    """What was peculiar among an image folder's images."""
    if problems is not None:
        typer.echo(f"images read: {problems.words}")
