"""The commands that train and evaluate; `selab.cli` gives them their names."""

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab.console import builtins, find, open_console, plain, print_parts, reporting, write_json
from selab.options import (
    Accumulate,
    Amp,
    AmpOption,
    Arch,
    ChannelsLast,
    Compiled,
    DataDir,
    DataName,
    Device,
    Download,
    Epochs,
    Json,
    Positive,
    RecipeName,
    Threads,
    TrainBatch,
)

if TYPE_CHECKING:
    from selab.accuracy.data import Data
    from selab.accuracy.train import Progress
    from selab.accuracy_record import Options
    from selab.recipe import Recipe


def train(
    arch: Arch,
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    recipe: RecipeName = "cifar_short",
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation and dropout.")] = 0,
    epochs: Epochs = None,
    batch: TrainBatch = None,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    accumulate: Accumulate = 1,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The run goes to OUT/<machine>/runs/….")] = Path("results"),
    json_to: Json = None,
) -> None:
    """Train one network after a recipe; stopped at any moment, the same command goes on. It runs under torchrun too."""
    variant = find(arch)
    from selab import comparing
    from selab.accuracy.train import train as train_one
    from selab.recipe import find_recipe

    options = _options(device, amp, channels_last, compiled, accumulate, epochs, batch, threads)
    chosen = find_recipe(recipe)
    images = _open_data(data, data_dir, download=download, recipe=chosen)
    folder = comparing.folder_of(variant, images, chosen, options, seed, out=out)
    with reporting(open_console(stderr=True), training_words) as report, redirect_stdout(sys.stderr):
        done = train_one(
            variant,
            images,
            chosen,
            seed=seed,
            folder=folder,
            options=options,
            report=lambda state: report(variant.name, state),
        )
    if json_to is not None:
        return write_json(builtins(done), json_to)
    low, high = done.test.top1_interval_pct
    typer.echo(f"{variant.name}: top-1 {done.test.top1_pct:.2f} % [{low:.2f}, {high:.2f}], loss {done.test.loss:.4f}")
    typer.echo(f"weights: {done.weights}")
    return None


def evaluate(
    arch: Arch,
    weights: Annotated[Path, typer.Option(help="A .safetensors, .pt or .pth file of this network.")],
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    batch: Positive = 500,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    json_to: Json = None,
) -> None:
    """Top-1 and top-5 of trained weights on a data set's test images, with 95 % intervals."""
    variant = find(arch)
    from selab.accuracy.evaluate import evaluate as evaluate_one
    from selab.comparing import loaded

    images = _open_data(data, data_dir, download=download)
    with redirect_stdout(sys.stderr), reporting(open_console(stderr=True)) as report:
        report(f"evaluating {variant.name} on {images.title}", None)
        model = loaded(variant, images, weights).to(device.value)
        found = evaluate_one(
            model, images, batch=batch, device=device.value, amp=amp.value, channels_last=channels_last
        )
    if json_to is not None:
        return write_json({"arch": variant.name, "data": images.title, **builtins(found)}, json_to)
    low, high = found.top1_interval_pct
    typer.echo(f"{variant.name} on {images.title}, {found.images:,} images")
    typer.echo(f"top-1 {found.top1_pct:.2f} % [{low:.2f}, {high:.2f}]")
    if found.top5_pct is not None and found.top5_interval_pct is not None:
        low, high = found.top5_interval_pct
        typer.echo(f"top-5 {found.top5_pct:.2f} % [{low:.2f}, {high:.2f}]")
    typer.echo(f"loss {found.loss:.4f}; intervals of 95 % (Wilson) over images")
    for name in found.skipped:
        typer.echo(f"skipped, cannot be read: {name}", err=True)
    return None


def compare(
    archs: Annotated[list[str], typer.Argument(help="BASELINE VARIANT, or a variant alone for its own baseline.")],
    data: DataName = DataName.cifar10,
    data_dir: DataDir = Path("data"),
    download: Download = True,
    recipe: RecipeName = "cifar_short",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on; 5 for what you publish.")] = 3,
    epochs: Epochs = None,
    batch: TrainBatch = None,
    device: Device = Device.cpu,
    amp: AmpOption = Amp.off,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    accumulate: Accumulate = 1,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/accuracy/….")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Compare again where a record exists.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Also time both networks, as `profile --quick` does.")
    ] = True,
    json_to: Json = None,
) -> None:
    """Train a network with SE and without from several seeds: what it costs beside what it buys, with intervals."""
    if len(archs) > 2:
        raise typer.BadParameter("names one or two networks", param_hint="ARCHS")
    for one in archs:
        find(one)
    from selab import accuracy_tables, comparing, store
    from selab.accuracy_record import read_accuracy_record, to_json
    from selab.recipe import find_recipe

    baseline, variant = (None, archs[0]) if len(archs) == 1 else (archs[0], archs[1])
    comparing.pair(variant, baseline)
    plan = comparing.Plan(
        arch=variant,
        baseline=baseline,
        recipe=find_recipe(recipe),
        options=_options(device, amp, channels_last, compiled, accumulate, epochs, batch, threads),
        seeds=tuple(range(seeds)),
        command=shlex.join(["selab", *sys.argv[1:]]),
    )
    images = _open_data(data, data_dir, download=download, recipe=plan.recipe)
    growing = comparing.Comparison(plan, images, out=out)
    store.check_writable(growing.path, replace=replace)
    finished = growing.take_over()
    with reporting(open_console(stderr=True), training_words) as report, redirect_stdout(sys.stderr):
        if finished:
            report(f"{finished} of {seeds} seeds are finished already", None)
        growing.run(report)
    record = read_accuracy_record(growing.path)
    if json_to is not None and str(json_to) == "-":
        sys.stdout.buffer.write(to_json(record))
        return
    if json_to is not None:
        store.write_atomically(json_to, to_json(record))
    if latency:
        with reporting(open_console(stderr=True)) as report:
            growing.measure(report)
    beside = comparing.compared(record, out / record.machine.name)
    print_parts(accuracy_tables.comparison_grid(beside), accuracy_tables.seeds_grid(record))
    typer.echo(f"record: {growing.path}")
    return


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
    from selab.accuracy_record import Options
    from selab.measure.passes import check_device

    check_device(device.value)
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


def _open_data(name: "DataName", folder: Path, *, download: bool, recipe: "Recipe | None" = None) -> "Data":
    from selab.accuracy.data import open_data

    console = open_console(stderr=True)
    return open_data(
        name.value,
        data_dir=folder,
        download=download,
        image=None if recipe is None else recipe.image,
        report=lambda text: console.print(plain(text), highlight=False, soft_wrap=True),
    )


def training_words(state: "Progress") -> str:
    """How far a training is."""
    left = "" if state.eta_s is None else f", {state.eta_s / 60:.0f} min left"
    last = "" if state.last is None else f"; test top-1 {state.last.test_top1_pct:.2f} %"
    return (
        f"epoch {state.epoch} of {state.epochs}, step {state.step} of {state.steps}, loss {state.loss:.4f}, "
        f"top-1 {state.top1_pct:.1f} %, {state.images_per_s:,.0f} images/s{left}{last}"
    )
