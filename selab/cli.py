"""The command line: each command one short function; torch is imported only by the commands that need it."""

import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab import __version__, catalog
from selab.console import (
    builtins,
    check_outputs,
    complain,
    find,
    measuring_words,
    open_console,
    plain,
    print_parts,
    reporting,
    write_json,
)
from selab.errors import RecordError, SelabError, nearest
from selab.options import (
    Arch,
    Archs,
    ChannelsLast,
    Compiled,
    Device,
    Dtype,
    HoldHeap,
    Input,
    Insert,
    Json,
    Mode,
    Phase,
    Positive,
    Se,
    StepMode,
    StepPhase,
)
from selab.training_commands import compare, evaluate, train

if TYPE_CHECKING:
    from selab.accuracy_tables import Compared
    from selab.grid import Grid
    from selab.plots import Picture
    from selab.profiling import Profile
    from selab.record import Cost, Insertion, Record
    from selab.request import Request
    from selab.spec import Variant
    from selab.sweep import Outcome
    from selab.workers import Report

app = typer.Typer(
    help="What channel attention really costs: insert, count and measure Squeeze-and-Excitation blocks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


weights_app = typer.Typer(
    help="Convert trained weights of other libraries.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(weights_app, name="weights")


class By(StrEnum):
    """How to share a cost out."""

    operator = "operator"
    module = "module"


class TableFormat(StrEnum):
    """The look of a table."""

    rich = "rich"
    markdown = "markdown"
    csv = "csv"
    latex = "latex"
    json = "json"


_ALL_TABLES = "all"
_TABLE_HELP = (
    "paper-2, paper-3, cifar, reduction, squeeze, excitation, stages, integration, mobile or zoo, which are counted; "
    "added, latency, accuracy or tax, which are measured (--profiles); "
    "report, a machine's page; all, every counted one as files."
)


# What typer's own runner exits with when it is interrupted: 128 + SIGINT.
_INTERRUPTED = 130


def main() -> None:
    """The program: a user's mistake, a machine's limit and an interruption end in one line and status 1."""
    try:
        app()
    except SelabError as error:
        complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            complain("interrupted")
            sys.exit(1)
        raise
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
        sys.stdout = None
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selab {__version__}")
        raise typer.Exit


def _address(arch: str, se: str | None, insert: Sequence[str] | None) -> str:
    """One word for a network and the blocks in it, as `selab.catalog.find` reads it."""
    changes = [*([] if se is None else [se]), *([f"sites={'+'.join(insert)}"] if insert else [])]
    if not changes:
        return arch
    return arch + ("," if re.search(r"\+\w+\s*=", arch) else "+") + ",".join(changes)


def _input_chw(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or 0 in map(int, found.groups()):
        raise typer.BadParameter(f"{text!r} is not CxHxW; for example 3x224x224", param_hint="--input")
    return int(found[1]), int(found[2]), int(found[3])


def _tell_found_sites(word: str, insertions: "Sequence[Insertion]") -> None:
    """Nothing is guessed silently: where `--insert auto` put blocks is said before anything is said about them."""
    if "sites=auto" not in word or not insertions:
        return
    listed = ", ".join(one.path for one in insertions)
    open_console(stderr=True).print(
        f"auto: {len(insertions)} site{'s' if len(insertions) > 1 else ''} found: {plain(listed)}; "
        "`selab sites` shows them in the network",
        highlight=False,
        soft_wrap=True,
    )


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def archs(json_to: Json = None) -> None:
    """List the architectures, each with its baseline."""
    from selab.grid import Grid
    from selab.spec import as_builtins

    variants = catalog.installed()
    if json_to is not None:
        return write_json([as_builtins(variant) for variant in variants.values()], json_to)
    rows = tuple((one.name, one.baseline or "", one.title) for one in variants.values())
    columns = ("name", "baseline", "what it is")
    return print_parts(Grid(title="Architectures", columns=columns, rows=rows, words=frozenset(range(3))))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="As --arch.")],
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Instead: how each SE block runs after selab.fuse, and why not faster.")
    ] = False,
    device: Device = Device.cpu,
    batch: Positive = 1,
    dtype: Dtype = Dtype.fp32,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")] = False,
    json_to: Json = None,
) -> None:
    """Show one architecture: its facts, its SE sites and what others published about it."""
    variant = find(name, option="show")
    if runtime:
        return _show_runtime(variant, device, batch, dtype, channels_last=channels_last, json_to=json_to)
    from selab.build import build
    from selab.spec import as_builtins
    from selab.tables import facts_grid, published_grid, sites_grid

    insertions = build(variant, device="meta").insertions
    if json_to is not None:
        return write_json({**as_builtins(variant), "insertions": [builtins(one) for one in insertions]}, json_to)
    published = [published_grid(variant)] if variant.published else []
    return print_parts(facts_grid(variant), *([sites_grid(insertions)] if insertions else []), *published)


@app.command()
def sites(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    input_size: Input = None,
    json_to: Json = None,
) -> None:
    """Show a network's module tree and where blocks stand or could stand; its forward runs once, without arithmetic."""
    variant = find(_address(arch, se, insert))
    from selab.build import build
    from selab.catalog import baseline_of
    from selab.ends import Ends, trace_ends
    from selab.sites import declared_groups
    from selab.tree import site_tree, sites_as_builtins

    size = _input_chw(input_size) or variant.input_chw
    shape = (1, *size)
    with redirect_stdout(sys.stderr):
        network = build(baseline_of(variant) or variant, device="meta", input_chw=size).model
        insertions = build(variant, device="meta", input_chw=size).insertions
        groups = declared_groups(network)
        found = trace_ends(network, shape) if not groups or "auto" in (insert or ()) else Ends(found=(), left_out=())
        tree = site_tree(network, insertions, ends=found.found, groups=groups, input_nchw=shape)
    if json_to is not None:
        return write_json(
            sites_as_builtins(network, insertions, ends=found.found, groups=groups, input_nchw=shape), json_to
        )
    lines = [f"auto: {end.path}: {end.reason}" for end in found.found] + [f"left out: {one}" for one in found.left_out]
    legend = [f"[{', '.join(groups)}]: site groups (--insert NAME)"] if groups else []
    legend += ["[auto]: a block's end, found by tracing (--insert auto)"] if found.found else []
    legend += ["← what would stand there"] if insertions else []
    return print_parts(tree, "\n".join(map(plain, (*legend, *lines))))


@app.command()
def count(
    arch: Archs = (),  # type: ignore[assignment]
    every: Annotated[bool, typer.Option("--all", help="All architectures.")] = False,
    se: Se = None,
    insert: Insert = None,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    by: Annotated[By | None, typer.Option(help="Share each network's cost out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write each record to OUT/<arch>.json and show the table.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over existing records.")] = False,
    json_to: Json = None,
) -> None:
    """Count parameters, MACs, FLOPs, bytes and activations; no kernel runs, so batch and resolution cost nothing."""
    if every and (arch or se is not None or insert):
        raise typer.BadParameter(
            "counts the catalog as it is; leave --arch, --se and --insert away", param_hint="--all"
        )
    names = list(catalog.installed()) if every else [_address(one, se, insert) for one in arch]
    if not names:
        raise typer.BadParameter("name at least one network, or give --all", param_hint="--arch")
    variants = [find(name) for name in names]
    size = _input_chw(input_size)
    from selab import profiling, store, tables

    paths: dict[str, Path] = {}
    if out is not None:
        paths = {name: out / f"{store.file_name(one.name)}.json" for name, one in zip(names, variants, strict=True)}
    if len(set(paths.values())) < len(paths):
        raise RecordError(f"--out {out}: two of these networks have the same name; count them into two folders")
    for path in paths.values():
        store.check_writable(path, replace=replace)
    counters = len(names) == 1 or bool(paths) or json_to is not None
    records = []
    with reporting(open_console(stderr=True)) as report:
        for name in names:
            report(f"counting {name}" if len(names) > 1 else "counting", None)
            one = profiling.count_record(
                name,
                batch=batch,
                input_chw=size,
                resolution=resolution,
                by_module=by is By.module,
                counters=counters,
            )
            _tell_found_sites(name, one.insertions)
            records.append(one)
            if paths:
                store.save(one, paths[name])
    if json_to is not None:
        return write_json([builtins(one) for one in records] if len(records) > 1 else builtins(records[0]), json_to)
    if by is not None:
        return print_parts(*(tables.share_grid(record, by.value) for record in records))
    if len(records) > 1:
        return print_parts(tables.count_grid(records))
    cost = records[0].cost
    stages = [tables.stage_grid(cost)] if cost.se.blocks else []
    return print_parts(tables.single_count_grid(records[0]), *stages, tables.counters_grid(cost))


@app.command()
def profile(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this instead of the variant's own.")] = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")] = False,
    mode: Mode = Mode.auto,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Both networks through selab.fuse: SE made cheap.")] = False,
    hold_heap: HoldHeap = False,
    phase: Annotated[list[Phase] | None, typer.Option(help="Measure only this; repeat it for several.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Stop at ±1 % or after 15 s of sampling, instead of ±0.5 % or 60 s.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of sampling for each phase; its two controls take half each.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default 1, and beside it a quick row on all cores.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes per figure; 3 for what you publish.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="On a GPU: flush the L2 cache before each call.")] = False,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/<arch>.<workload>.json.")] = Path(
        "results"
    ),
    replace: Annotated[bool, typer.Option("--replace", help="Measure again where a record exists.")] = False,
    json_to: Json = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw what was shown as an SVG picture.")] = None,
) -> None:
    """Count and measure a network against its baseline: cost, latency with its interval, memory."""
    if cold and device is Device.cpu:
        raise typer.BadParameter("flushes a GPU's cache; give --device cuda, or leave it away", param_hint="--cold")
    if svg is not None and svg.suffix.lower() != ".svg":
        raise typer.BadParameter(f"{svg}: a picture of the terminal ends in .svg", param_hint="--svg")
    arch = _address(arch, se, insert)
    find(arch)
    if baseline is not None:
        find(baseline, option="--baseline")
    from selab import profiling, store
    from selab.request import Request

    options: dict[str, Any] = {"phases": tuple(one.value for one in phase)} if phase else {}
    request = Request(
        arch=arch,
        baseline=baseline,
        device=device.value,
        batch=batch,
        input_chw=_input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        mode=mode.value,
        compiled=compiled,
        fused=fused,
        held_heap=hold_heap,
        threads=threads,
        quick=quick,
        budget_s=budget,
        seed=seed,
        processes=processes,
        cold=cold,
        **options,
    )
    growing = profiling.Profile(request)
    path = growing.path(out)
    store.check_writable(path, replace=replace)
    check_outputs(svg, json_to)
    _tell_found_sites(arch, growing.sites())
    try:
        with reporting(open_console(stderr=True)) as report:
            growing.run(report)
    except KeyboardInterrupt:
        raise SelabError(f"interrupted; {_keep_partial(growing, path)}") from None
    except Exception:
        if growing.latency:
            _keep_partial(growing, path)
        raise
    store.save(growing.record(), path)
    _show_profile(store.read_record(path), path, json_to=json_to, svg=svg)


def _keep_partial(growing: "Profile", path: Path) -> str:
    """Saves what there is of a profile that ended early; says what was done."""
    from selab import store

    if growing.cost is None:
        return "nothing was measured yet, and nothing was written"
    partial = store.partial_path(path)
    store.save(growing.record(), partial)
    return f"what was measured until then is in {partial}"


@app.command()
def plot(
    name: Annotated[
        str,
        typer.Argument(
            help="cost or accuracy (base → SE, with --x and --y), added (bars), or of one record (--record): curves "
            "of a comparison's trainings, tax of implementations."
        ),
    ],
    x: Annotated[
        str | None,
        typer.Option(
            help="params, macs, macs_all, flops, bytes, activations (counted); top1_error, top5_error (published); "
            "latency, latency_fwd_bwd, tax, saved_for_backward (measured: --profiles); top1_error_trained, "
            "top5_error_trained (of comparisons: --profiles). By default macs."
        ),
    ] = None,
    y: Annotated[str | None, typer.Option(help="As --x; by default latency for cost, top1_error for accuracy.")] = None,
    arch: Archs = (),  # type: ignore[assignment]
    profiles: Annotated[Path | None, typer.Option(help="A machine's folder of records.")] = None,
    record: Annotated[Path | None, typer.Option(help="A record of `compare` for curves, of `tax` for tax.")] = None,
    workload: Annotated[
        str | None, typer.Option(help="Of several in the records this one, as in their files' names.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The picture, .svg or .png; by default NAME.svg.")] = None,
    json_to: Json = None,
) -> None:
    """Draw base → SE in the plane of two quantities, or what SE adds as bars; the picture says what it leaves out."""
    from selab import ink, plots, store

    to = out or Path(f"{name}.svg")
    ink.check_file(to)
    if name in plots.OF_ONE_RECORD:
        if record is None:
            raise typer.BadParameter("name the comparison's record", param_hint="--record")
        return _show_picture(_picture_of(name, record), to, json_to)
    axes = plots.axes_of(name, x, y)
    trained = axes is not None and plots.TRAINED in [plots.axis(one).origin for one in axes]
    records = store.read_records(profiles) if profiles is not None and not trained else []
    compared: Sequence[Compared] = ()
    if trained and profiles is not None:
        from selab.comparing import read_compared

        compared = read_compared(profiles)
    needed = plots.costs_needed(*axes, arch) if axes is not None else ()
    costs: dict[str, Cost] = {}
    if needed:
        from selab.profiling import counted

        with reporting(open_console(stderr=True)) as report:
            report(f"counting {len(needed)} networks", None)
            costs = counted(needed)
    shown = plots.picture(
        name, x=x, y=y, records=records, costs=costs, archs=arch, workload=workload, compared=compared
    )
    return _show_picture(shown, None if json_to is not None and out is None else to, json_to)


def _picture_of(name: str, record: Path) -> "Picture":
    """Of one record, by the picture's name."""
    from selab import plots
    from selab.accuracy_record import read_accuracy_record
    from selab.tax_record import read_tax_record

    if name == plots.CURVES:
        return plots.curves(read_accuracy_record(record))
    return plots.tax_bars(read_tax_record(record))


def _show_picture(shown: "Picture", to: Path | None, json_to: Path | None) -> None:
    from selab import ink

    if json_to is not None:
        write_json(dataclasses.asdict(shown), json_to)
    if to is not None:
        ink.draw(shown, to)
        typer.echo(f"picture: {to}", err=str(json_to) == "-")


@app.command()
def table(
    name: Annotated[str, typer.Argument(help=_TABLE_HELP)],
    profiles: Annotated[
        Path | None, typer.Option(help="A machine's folder of records, or the one above where there is no other.")
    ] = None,
    look: Annotated[TableFormat, typer.Option("--format", help="For standard output.")] = TableFormat.rich,
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this file instead, as Markdown or as --format says; for all, a folder."),
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Put it between '<!-- table NAME -->' marks in this file.")] = None,
    json_to: Json = None,
) -> None:
    """Render a table again, from the records and the published numbers."""
    if out is not None and into is not None:
        raise typer.BadParameter("give --out or --into, not both", param_hint="--into")
    from selab import pages, store

    if name == _ALL_TABLES:
        return _write_tables(out)
    pages.check_name(name)
    profiles = None if profiles is None else pages.machine_folder(profiles)
    apart = (pages.ACCURACY, pages.TAX)
    records = store.read_records(profiles) if profiles is not None and name not in apart else []
    from selab.comparing import read_compared
    from selab.profiling import counted
    from selab.tax_record import read_tax_records

    compared = read_compared(profiles) if profiles is not None and name in (pages.ACCURACY, pages.REPORT) else []
    taxes = read_tax_records(profiles) if profiles is not None and name in (pages.TAX, pages.REPORT) else []
    grids = pages.named_grids(name, counted(pages.costs_needed(name)), records, compared, taxes)
    if name == pages.REPORT and profiles is not None:
        grids += pages.acceptance_grids(store.read_acceptance(profiles))
    if json_to is not None or look is TableFormat.json:
        return write_json([grid.as_builtins() for grid in grids], json_to or out or Path("-"))
    if look is TableFormat.rich and out is None and into is None:
        return print_parts(*grids)
    text = _TEXT[look](name, grids, records)
    if into is not None:
        spliced = pages.spliced(store.read_text(into), name, text, where=str(into))
        store.write_atomically(into, spliced.encode())
    elif out is not None:
        store.write_atomically(out, text.encode())
    else:
        typer.echo(text, nl=False)
    return None


_TEXT: dict[TableFormat, Callable[..., str]] = {
    TableFormat.csv: lambda _name, grids, _records: "".join(
        grid.csv(first=index == 0 or grid.columns != grids[index - 1].columns) for index, grid in enumerate(grids)
    ),
    TableFormat.latex: lambda _name, grids, _records: "\n".join(grid.latex() for grid in grids),
    TableFormat.markdown: lambda *parts: _markdown(*parts),
    TableFormat.rich: lambda *parts: _markdown(*parts),
}


def _markdown(name: str, grids: "Sequence[Grid]", records: "Sequence[Record]") -> str:
    from selab.pages import page

    return page(name, grids, records)


def _write_tables(out: Path | None) -> None:
    """Every cost table as a file, counted in as many processes as pay."""
    if out is None:
        raise typer.BadParameter("the table 'all' is a folder of files; name it", param_hint="--out")
    from selab import pages, store
    from selab.profiling import counted

    store.check_writable(out / "README.md", replace=True)
    for name, text in pages.cost_pages(counted(catalog.installed())).items():
        store.write_atomically(out / name, text.encode())


@weights_app.command("list")
def weights_list(json_to: Json = None) -> None:
    """List which networks of other libraries equal ours."""
    from selab import keys
    from selab.grid import Grid

    rows = tuple((port.arch, port.source, port.model) for port in keys.PORTS)
    if json_to is not None:
        return write_json([{"arch": arch, "source": source, "model": model} for arch, source, model in rows], json_to)
    columns = ("--arch", "--from", "called there")
    grid = Grid(title="Weights that can be converted", columns=columns, rows=rows, words=frozenset(range(3)))
    return print_parts(grid)


@weights_app.command("convert")
def weights_convert(
    source_path: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors, .pt or .pth file.")],
    target_path: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    source: Annotated[str, typer.Option("--from", help="timm, torchvision or cadene.")],
    arch: Annotated[str, typer.Option("--arch", help="Ours; `selab weights list` has all.")],
    replace: Annotated[bool, typer.Option("--replace", help="Write over an existing file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show every tensor's way; write nothing.")] = False,
) -> None:
    """Convert another library's weights into those of a network here that computes the same."""
    from selab import weights
    from selab.grid import Grid

    done = weights.convert(source_path, None if dry_run else target_path, source=source, arch=arch, replace=replace)
    if dry_run:
        rows = tuple(
            (step.theirs, f"{step.ours} (folded)" if step.folded else step.ours, str(step.shape))
            for step in done.renamed
        )
        columns = ("theirs", "ours", "shape")
        print_parts(Grid(title=f"{done.port.model} → {arch}", columns=columns, rows=rows, words=frozenset(range(3))))
    verb = "would be read" if dry_run else "was read"
    started = f"; {len(done.filled)} counters of seen batches start at zero" if done.filled else ""
    typer.echo(f"{source_path} {verb} as {source}'s {done.port.model}: {len(done.renamed)} tensors{started}")
    if not dry_run:
        typer.echo(f"weights: {target_path}")


@app.command()
def timeline(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    mode: Annotated[StepMode, typer.Option(help="eval: inference; train: forward and backward.")] = StepMode.eval,
    steps: Annotated[int, typer.Option(min=1, help="Recorded ones, after some that warm up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="The trace goes to OUT/<machine>/timeline/….")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Record again where a trace exists.")] = False,
    json_to: Json = None,
) -> None:
    """Record a few steps for TensorBoard and Perfetto, SE's stages as named ranges; show where the time goes."""
    arch = _address(arch, se, insert)
    find(arch)
    from selab import store, tracing
    from selab.measure.passes import check_device
    from selab.request import Request

    check_device(device.value)
    request = Request(
        arch=arch,
        device=device.value,
        batch=batch,
        input_chw=_input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        threads=threads,
    )
    phase: Any = "forward" if mode is StepMode.eval else "forward_backward"
    path = tracing.trace_path(request, phase, out)
    store.check_writable(path, replace=replace)
    check_outputs(json_to)
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        report(f"recording {steps} step{'s' if steps > 1 else ''} of {arch}", None)
        found = tracing.recorded(request, phase, steps=steps)
    tracing.write_trace(found, path, replace=replace)
    if json_to is not None:
        write_json({"trace": str(path), **dataclasses.asdict(found.timeline)}, json_to)
    if str(json_to) != "-":
        print_parts(*tracing.timeline_grids(arch, found.timeline))
        typer.echo("\n".join(("", *tracing.how_to_look(path))))


@app.command()
def roofline(
    arch: Annotated[str | None, typer.Option("--arch", help="As in `profile`.")] = None,
    se: Se = None,
    insert: Insert = None,
    preset: Annotated[
        str | None, typer.Option("--as", help="Predict for a device that is not here, from its published peaks.")
    ] = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds to repeat the pass for; at least five times.")] = 5.0,
    every: Annotated[
        bool, typer.Option("--all", help="Hold every network here against its roof: what a prediction is worth.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also draw it, .svg or .png.")] = None,
    json_to: Json = None,
) -> None:
    """Hold every operator against what this device could do at most; SE's operators apart."""
    if every == (arch is not None):
        raise typer.BadParameter("name a network, or give --all", param_hint="--arch")
    if every:
        beside: dict[str, object] = {"--as": preset, "--se": se, "--insert": insert, "--input": input_size}
        beside |= {"--resolution": resolution, "--out": out, "--channels-last": channels_last}
        beside |= {"--device": device is not Device.cpu, "--batch": batch != 1, "--dtype": dtype is not Dtype.fp32}
        beside |= {"--threads": threads != 1, "--budget": budget != 5.0}
        wrong = [option for option, value in beside.items() if value]
        if wrong:
            text = f"is one image in fp32 on one thread of the CPU; leave {', '.join(wrong)} away"
            raise typer.BadParameter(text, param_hint="--all")
        return _all_rooflines(json_to)
    if preset is not None and out is not None:
        raise typer.BadParameter("is a prediction, which has no picture; leave --out away", param_hint="--as")
    from selab import devices, ink, roofs
    from selab.measure.machine import machine
    from selab.measure.passes import check_device
    from selab.measure.roofline import measure_peaks
    from selab.request import Request, workload_of

    if out is not None:
        ink.check_file(out)
    check_outputs(out, json_to)
    name = _address(str(arch), se, insert)
    find(name)
    request = Request(
        arch=name,
        device=device.value,
        batch=batch,
        input_chw=_input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        threads=threads,
    )
    workload = workload_of(request, catalog.find(name))
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        if preset is not None:
            published = devices.find_device(preset, dtype.value)
            peaks, place = roofs.published_peaks(published, dtype.value), published.title
        else:
            check_device(device.value)
            here = machine(device.value)
            place = here.gpu or f"{here.cpu}, {threads} thread{'s' if threads > 1 else ''}"
            report("measuring the peaks", None)
            peaks = measure_peaks(device.value, dtype.value, threads=threads)
        report(f"timing {name}" if preset is None else f"counting {name}", None)
        under = roofs.roofline_of(request, peaks, measured=preset is None, budget_s=budget)
    if out is not None:
        ink.draw(roofs.roof(under, arch=name, workload=workload, place=place), out)
    if json_to is not None:
        facts = dataclasses.asdict(under)
        facts |= {"arch": name, "place": place, "predicted": preset is not None, "workload": builtins(workload)}
        write_json(facts, json_to)
    if str(json_to) != "-":
        print_parts(roofs.roofline_grid(under, arch=name, workload=workload, place=place))
        if out is not None:
            typer.echo(f"picture: {out}")
    return None


def _all_rooflines(json_to: Path | None) -> None:
    """Every network here against its roof."""
    from selab import roofs
    from selab.measure.machine import machine
    from selab.measure.roofline import measure_peaks
    from selab.record import RoofDistances

    check_outputs(json_to)
    here = machine("cpu")
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        report("measuring the peaks", None)
        peaks = measure_peaks("cpu", "fp32", threads=1)
        each = list(roofs.distances(catalog.installed(), peaks, report))
    good = tuple(one for one in each if not isinstance(one, SelabError))
    distances = RoofDistances(
        machine=here,
        place=f"{here.cpu}, 1 thread",
        flops_per_s=peaks.flops_per_s,
        bandwidths=peaks.bandwidths,
        networks=good,
        failed=len(each) - len(good),
    )
    if json_to is not None:
        write_json(builtins(distances), json_to)
    if str(json_to) != "-":
        print_parts(roofs.distances_grid(distances))


@app.command()
def tax(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this instead of the variant's own.")] = None,
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="reference, torchvision, timm, fast; without_squeeze, without_excitation, without_scale for the "
            "split; repeat it for several. By default all."
        ),
    ] = None,
    phase: Annotated[StepPhase, typer.Option(help="What one call is.")] = StepPhase.forward,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    hold_heap: HoldHeap = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Stop at ±1 % or after 15 s for each pair, instead of ±0.5 % or 60 s.")
    ] = False,
    budget: Annotated[float | None, typer.Option(min=0.1, help="Seconds of sampling for each pair.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/tax/….json.")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Measure again where a record exists.")] = False,
    json_to: Json = None,
) -> None:
    """Measure SE as others write it and as it is fused, over one baseline in one run, beside the least it must cost."""
    arch = _address(arch, se, insert)
    find(arch)
    if baseline is not None:
        find(baseline, option="--baseline")
    from selab import store, tax_record, taxing
    from selab.request import Request

    asked = taxing.TaxRequest(
        request=Request(
            arch=arch,
            baseline=baseline,
            device=device.value,
            batch=batch,
            input_chw=_input_chw(input_size),
            resolution=resolution,
            dtype=dtype.value,
            memory_format="channels_last" if channels_last else "contiguous",
            compiled=compiled,
            held_heap=hold_heap,
            threads=threads,
            quick=quick,
            budget_s=budget,
            seed=seed,
            phases=(phase.value,),
        ),
        implementations=taxing.chosen_implementations(impl or ()),
    )
    comparison = taxing.Tax(asked)
    path = comparison.path(out)
    store.check_writable(path, replace=replace)
    if json_to is not None and str(json_to) != "-":
        store.check_writable(json_to, replace=True)
    with reporting(open_console(stderr=True)) as report:
        record = comparison.run(report)
    tax_record.save_tax_record(record, path)
    _show_tax(path, json_to=json_to)


def _show_tax(path: Path, *, json_to: Path | None) -> None:
    """From the file that was written, as a profile is shown."""
    from selab import store, tax_record, tax_tables

    record = tax_record.read_tax_record(path)
    if str(json_to) == "-":
        sys.stdout.write(store.read_text(path))
        return
    if json_to is not None:
        store.write_atomically(json_to, store.read_text(path).encode())
    print_parts(*tax_tables.tax_grids(record))
    open_console().print(f"\nrecord: {plain(str(path))}", highlight=False, soft_wrap=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A TOML of tables budgets.NAME.")] = Path("budgets.toml"),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Check only this budget; repeat it for several.")
    ] = None,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Measure to ±0.5 % or for 60 s, as `profile` does, instead of ±1 % or 15 s."),
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes per measured ratio.")] = 1,
    json_to: Json = None,
) -> None:
    """Hold networks against their budgets; ends with status 1 if one is exceeded."""
    from selab import budget

    check_outputs(json_to)
    budgets = budget.read_budgets(file, only=only or ())
    for one in budgets.values():
        find(one.arch)
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        findings = list(budget.check(budgets, report, quick=not thorough, processes=processes))
    if json_to is not None:
        write_json([dataclasses.asdict(one) for one in findings], json_to)
    if str(json_to) != "-":
        print_parts(budget.check_grid(findings))
    over = [one for one in findings if one.state == "over"]
    if over:
        names = ", ".join(f"{one.name}.{one.limit}" for one in over)
        raise SelabError(f"{file}: over budget: {names}; make the network cheaper, or raise the limit")


@app.command()
def sweep(
    arch: Annotated[list[str], typer.Option("--arch", help="As in `profile`; several by commas, or repeat it.")],
    batch: Annotated[str, typer.Option(help="Images; several by commas, as everything up to --reduction.")] = "1",
    resolution: Annotated[str, typer.Option(help="Height and width of the inputs.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16.")] = "fp32",
    memory_format: Annotated[str, typer.Option(help="contiguous, channels_last.")] = "contiguous",
    reduction: Annotated[str, typer.Option(help="Of the SE blocks; by default the networks' own.")] = "",
    device: Device = Device.cpu,
    phase: Annotated[list[Phase] | None, typer.Option(help="By default forward; repeat it for several.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick/--thorough", help="To ±1 % or for 15 s; thorough: to ±0.5 % or for 60 s.")
    ] = True,
    budget: Annotated[float | None, typer.Option(min=0.1, help="Seconds of sampling for each phase of a cell.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes per figure; 3 for what you publish.")] = 1,
    out: Annotated[Path, typer.Option(help="Records go where `profile` puts them; those there are taken over.")] = Path(
        "results"
    ),
    table_to: Annotated[
        Path | None, typer.Option("--table", help="Also as flat rows, .csv, .json or .parquet.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Also draw time by batch and resolution into this folder.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what ran out of memory or gave no result.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Measure on a Ray cluster's machines: its address, auto, or local for one here.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Measure a grid of networks and workloads against their baselines; stopped, the same command goes on."""
    wrong: list[str] = []
    dtypes = _listed(dtype, tuple(Dtype), "--dtype", wrong)
    formats = _listed(memory_format, ("contiguous", "channels_last"), "--memory-format", wrong)
    batches, resolutions, reductions = (
        _naturals(text, option, wrong)
        for text, option in ((batch, "--batch"), (resolution, "--resolution"), (reduction, "--reduction"))
    )
    # A comma before KEY= stands within a change: resnet50+reduction=8,stages=2-4.
    named = [name.strip() for listed in arch for name in re.split(r",(?!\s*\w+\s*=)", listed)]
    changes: list[str | None] = [f"reduction={one}" for one in reductions] or [None]
    addresses = []
    for address in dict.fromkeys(_address(name, change, None) for name in named for change in changes):
        try:
            find(address)
        except SelabError as error:
            wrong.append(str(error))
        else:
            addresses.append(address)
    from selab import sweep as sweeping
    from selab.measure.passes import check_device

    if ray is None:
        check_device(device.value)
    if table_to is not None:
        sweeping.check_table(table_to)
    check_outputs(table_to, json_to, None if pictures is None else pictures / "tax_batch.svg")
    asked = sweeping.cells(
        addresses,
        resolutions,
        batches or [1],
        dtype=dtypes,
        memory_format=formats,
        device=device.value,
        phases=tuple(one.value for one in phase or (Phase.forward,)),
        quick=quick,
        budget_s=budget,
        threads=threads if device is Device.cpu else None,
        processes=processes,
    )
    wrong += sweeping.mistakes(asked)
    if wrong:
        for line in dict.fromkeys(wrong):
            complain(line)
        raise typer.Exit(1)
    console = open_console(stderr=True)
    done: list[Outcome] = []
    try:
        with sweeping.showing(console, asked, measuring_words) as (report, tell), redirect_stdout(sys.stderr):
            for outcome in _outcomes(asked, out, report, retry=retry, ray=ray):
                done.append(outcome)
                tell(outcome)
    except KeyboardInterrupt:
        raise SelabError(f"interrupted; cells done: {len(done)}; the same command goes on") from None
    if table_to is not None:
        for path in sweeping.write_tables(done, table_to):
            console.print(f"table: {plain(str(path))}", highlight=False, soft_wrap=True)
    if pictures is not None:
        for line in sweeping.write_pictures(done, pictures):
            console.print(plain(line), highlight=False, soft_wrap=True)
    if json_to is not None:
        write_json(sweeping.rows(done), json_to)
    if str(json_to) != "-":
        print_parts(*sweeping.sweep_grids(done, asked))
    failed = sum(one.state == "failed" for one in done)
    if failed:
        raise SelabError(f"{failed} of {len(done)} cells failed; the table says why, and the same command tries again")


def _outcomes(
    asked: "Sequence[Request]", out: Path, report: "Report", *, retry: bool, ray: str | None
) -> "Iterator[Outcome]":
    """Of every cell, on this machine or on a cluster's."""
    if ray is not None:
        from selab import cluster

        return cluster.swept(asked, out, report, address=ray, retry=retry)
    from selab.sweep import sweep

    return sweep(asked, out, report, retry=retry)


def _listed(text: str, allowed: Sequence[str], option: str, wrong: list[str]) -> list[str]:
    """Words between commas; those that are not allowed are added to what is wrong."""
    words = [word.strip() for word in text.split(",")]
    wrong += [f"{option} {word}: no such word{nearest(word, allowed)}" for word in words if word not in allowed]
    return [word for word in words if word in allowed]


def _naturals(text: str, option: str, wrong: list[str]) -> list[int]:
    """Numbers from 1 on between commas; others are added to what is wrong."""
    words = [word.strip() for word in text.split(",")] if text else []
    good = [word for word in words if re.fullmatch(r"0*[1-9]\d*", word)]
    wrong += [f"{option} {word}: no number from 1 on; for example {option} 8,16" for word in words if word not in good]
    return [int(word) for word in good]


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A record of `selab profile` or `selab count --out`.")],
    after: Annotated[Path, typer.Argument(help="Another of equal workload, machine and baseline.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="End with status 1 if the second costs more or is shown to be slower.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Compare two records: what changed in cost, and whether the ratio to the baseline did."""
    from selab import differing, store

    records = [store.read_record(path) for path in (before, after)]
    differing.check_comparable(*records, names=(str(before), str(after)))
    if json_to is not None:
        changes = [dataclasses.asdict(one) for one in differing.ratio_changes(*records)]
        write_json(
            {"before": str(before), "after": str(after), "worse": differing.grew(*records), "ratios": changes}, json_to
        )
    if str(json_to) != "-":
        print_parts(differing.diff_grid(*records))
    worse = differing.grew(*records)
    if strict and worse:
        raise SelabError(f"{after}: worse than {before}: {', '.join(worse)}")


@app.command("machine")
def show_machine(device: Device = Device.cpu, json_to: Json = None) -> None:
    """Show what will be measured on, what is wrong with it for measuring, and what helps."""
    from selab import advice
    from selab.measure.passes import check_device

    check_device(device.value)
    found = advice.look(device.value)
    if json_to is not None:
        listed = [dataclasses.asdict(one) for one in advice.problems(found)]
        around = dataclasses.asdict(found.surroundings)
        return write_json({"machine": builtins(found.machine), "surroundings": around, "problems": listed}, json_to)
    return print_parts(*advice.machine_grids(found))


app.command()(train)
app.command("eval")(evaluate)
app.command()(compare)


@app.command()
def schema(json_to: Json = None) -> None:
    """Print the JSON Schema of a record."""
    from selab.record import json_schema

    write_json(json_schema(), json_to or Path("-"))


# -------------------------------------------------------------------------------------------------------------- output


def _show_runtime(
    variant: "Variant", device: Device, batch: int, dtype: Dtype, *, channels_last: bool, json_to: Path | None
) -> None:
    import torch

    from selab.build import build
    from selab.fusing import runtimes
    from selab.measure.passes import DTYPES, check_device
    from selab.tables import runtime_grid

    check_device(device.value)
    found = runtimes(
        build(variant).model,
        (batch, *variant.input_chw),
        device=device.value,
        dtype=DTYPES[dtype.value],
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if json_to is not None:
        return write_json([dataclasses.asdict(one) for one in found], json_to)
    if not found:
        other = "its blocks are of another kind, which run as they are written" if variant.se else "has no SE block"
        return print_parts(f"{variant.name}: {other}; there is nothing that selab.fuse would run otherwise")
    layout = "channels last" if channels_last else "contiguous"
    title = f"SE blocks of {variant.name} as they run: {device.value}, batch {batch}, {dtype.value}, {layout}"
    return print_parts(runtime_grid(found, title=title))


def _show_profile(record: "Record", path: Path, *, json_to: Path | None, svg: Path | None) -> None:
    """From the file that was written, not from memory: what is shown is what anyone else would read."""
    from rich.console import Console

    from selab.record import to_json
    from selab.store import write_atomically
    from selab.tables import profile_grid, stage_grid, verdict_lines

    alone = str(json_to) == "-"
    if alone:
        sys.stdout.buffer.write(to_json(record))
    consoles = [Console(file=io.StringIO(), emoji=False) if alone else open_console()]
    if svg is not None:
        consoles.append(Console(record=True, width=88, file=io.StringIO(), force_terminal=True, emoji=False))
    for console in consoles:
        console.print(profile_grid(record), highlight=False)
        if record.cost.se.blocks:
            console.print()
            console.print(stage_grid(record.cost), highlight=False)
        console.print()
        for line in verdict_lines(record):
            console.print(plain(line), highlight=False, soft_wrap=False)
        console.print(f"\nrecord: {plain(str(path))}", highlight=False, soft_wrap=True)
    if svg is not None:
        write_atomically(svg, consoles[1].export_svg(title=record.command).encode())
    if json_to is not None and not alone:
        write_atomically(json_to, to_json(record))


if __name__ == "__main__":
    main()
