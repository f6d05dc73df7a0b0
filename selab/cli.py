"""The command line: each command one short function; torch is imported only by the commands that need it."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab import __version__, catalog
from selab.errors import RecordError, SelabError

if TYPE_CHECKING:
    from rich.console import Console

    from selab.measure.paired import Progress
    from selab.record import Record

app = typer.Typer(
    help="What channel attention really costs: insert, count and measure Squeeze-and-Excitation blocks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


class Phase(StrEnum):
    """What one call is."""

    forward = "forward"
    backward = "backward"
    forward_backward = "forward_backward"


class By(StrEnum):
    """How to share a cost out."""

    operator = "operator"
    module = "module"


class TableFormat(StrEnum):
    """The look of a table."""

    rich = "rich"
    markdown = "markdown"
    json = "json"


Json = Annotated[Path | None, typer.Option("--json", help="Write JSON to this file, or to - for standard output.")]
Arch = Annotated[str, typer.Option("--arch", help="A name from `selab archs`, or path/to/family.toml[:variant].")]
Archs = Annotated[list[str], typer.Option("--arch", help="As in `profile`; repeat it for several networks.")]
Positive = Annotated[int, typer.Option(min=1)]


def main() -> None:
    """The program: a user's mistake, a machine's limit and an interruption end in one line and status 1."""
    try:
        app()
    except SelabError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
        sys.stdout = None
        sys.exit(1)


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selab {__version__}")
        raise typer.Exit


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
    from selab.spec import as_builtins
    from selab.tables import Grid

    variants = catalog.installed()
    if json_to is not None:
        return _write_json([as_builtins(variant) for variant in variants.values()], json_to)
    rows = tuple((one.name, one.baseline or "", one.title) for one in variants.values())
    columns = ("name", "baseline", "what it is")
    return _print(Grid(title="Architectures", columns=columns, rows=rows, words=frozenset(range(3))))


@app.command()
def show(name: Annotated[str, typer.Argument(help="As --arch.")], json_to: Json = None) -> None:
    """Show one architecture: its facts, its SE sites and what others published about it."""
    variant = catalog.find(name)
    from selab.build import build
    from selab.spec import as_builtins
    from selab.tables import facts_grid, published_grid, sites_grid

    insertions = build(variant, device="meta").insertions
    if json_to is not None:
        return _write_json({**as_builtins(variant), "insertions": [_builtins(one) for one in insertions]}, json_to)
    return _print(facts_grid(variant), *([sites_grid(insertions)] if insertions else []), published_grid(variant))


@app.command()
def count(
    arch: Archs = (),  # type: ignore[assignment]
    every: Annotated[bool, typer.Option("--all", help="All architectures.")] = False,
    batch: Positive = 1,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    by: Annotated[By | None, typer.Option(help="Share each network's cost out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write each record to OUT/<arch>.json and show the table.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over existing records.")] = False,
    json_to: Json = None,
) -> None:
    """Count parameters, MACs, FLOPs, bytes and activations; nothing is run, so this takes no time or memory."""
    names = list(catalog.installed()) if every else list(arch)
    if not names:
        raise typer.BadParameter("name at least one network, or give --all", param_hint="--arch")
    variants = [catalog.find(name) for name in names]
    from selab import profiling, tables

    paths = {variant.name: out / f"{variant.name}.json" for variant in variants} if out is not None else {}
    for path in paths.values():
        profiling.check_writable(path, replace=replace)
    records = []
    with _reporting(_console(stderr=True)) as report:
        for variant in variants:
            report(f"counting {variant.name}" if len(variants) > 1 else "counting", None)
            records.append(
                profiling.count_record(variant, batch=batch, resolution=resolution, by_module=by is By.module)
            )
            if paths:
                profiling.save(records[-1], paths[variant.name])
    if json_to is not None:
        return _write_json([_builtins(one) for one in records] if len(records) > 1 else _builtins(records[0]), json_to)
    if by is not None:
        return _print(*(tables.share_grid(record, by.value) for record in records))
    if len(records) > 1:
        return _print(tables.count_grid(records))
    cost = records[0].cost
    stages = [tables.stage_grid(cost)] if cost.se.blocks else []
    return _print(tables.single_count_grid(records[0]), *stages, tables.counters_grid(cost))


@app.command()
def profile(
    arch: Arch,
    baseline: Annotated[str | None, typer.Option(help="Compare with this instead of the variant's own.")] = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")] = False,
    mode: Mode = Mode.auto,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    phase: Annotated[list[Phase] | None, typer.Option(help="Measure only this; repeat it for several.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="±1 % within 15 s a phase instead of ±0.5 % in 60 s.")] = False,
    budget: Annotated[float | None, typer.Option(min=0.1, help="Seconds of sampling a phase.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default 1, with all cores beside.")
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
    catalog.find(arch)
    if baseline is not None:
        catalog.find(baseline)
    from selab import profiling

    options: dict[str, Any] = {"phases": tuple(one.value for one in phase)} if phase else {}
    request = profiling.Request(
        arch=arch,
        baseline=baseline,
        device=device.value,
        batch=batch,
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        mode=mode.value,
        compiled=compiled,
        threads=threads,
        quick=quick,
        budget_s=budget,
        seed=seed,
        processes=processes,
        cold=cold,
        **options,
    )
    growing = profiling.Profile(request)
    path = profiling.record_path(out, growing)
    profiling.check_writable(path, replace=replace)
    try:
        with _reporting(_console(stderr=True)) as report:
            growing.run(report)
    except KeyboardInterrupt:
        partial = profiling.partial_path(path)
        profiling.save(growing.record(), partial)
        raise SelabError(f"interrupted; what was measured until then is in {partial}") from None
    record = growing.record()
    profiling.save(record, path)
    _show_profile(_read_back(path), path, json_to=json_to, svg=svg)


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="added, mobile, paper-2, paper-3, latency, or report (all of them).")],
    profiles: Annotated[Path | None, typer.Option(help="A machine's folder of records.")] = None,
    look: Annotated[TableFormat, typer.Option("--format")] = TableFormat.rich,
    out: Annotated[Path | None, typer.Option(help="Write Markdown to this file instead.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put it between '<!-- table NAME -->' marks in this file.")] = None,
    json_to: Json = None,
) -> None:
    """Render a table again, from the records and the published numbers."""
    from selab import tables

    tables.check_name(name)
    if profiles is not None and not profiles.is_dir():
        raise RecordError(f"{profiles}: is no folder; name the folder of one machine's records")
    records = tables.read_records(profiles) if profiles is not None else []
    from selab.profiling import counted, write_atomically

    costs = counted(tables.costs_needed(name))
    grids = tables.named_grids(name, costs, records)
    if json_to is not None or look is TableFormat.json:
        return _write_json([grid.as_builtins() for grid in grids], json_to or out or Path("-"))
    if look is TableFormat.rich and out is None and into is None:
        return _print(*grids)
    text = tables.page(name, grids, records)
    if into is not None:
        write_atomically(into, tables.spliced(_read_text(into), name, text, where=str(into)).encode())
    elif out is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(out, text.encode())
    return None


@app.command("schema")
def schema(json_to: Json = None) -> None:
    """Print the JSON Schema of a record."""
    from selab.record import json_schema

    _write_json(json_schema(), json_to or Path("-"))


# -------------------------------------------------------------------------------------------------------------- output


def _builtins(value: object) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def _print(*parts: object) -> None:
    console = _console()
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part, highlight=False)


def _write_json(value: object, to: Path) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if str(to) == "-":
        sys.stdout.write(text)
        return
    from selab.profiling import write_atomically

    write_atomically(to, text.encode())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None


def _read_back(path: Path) -> "Record":
    from selab.tables import read_record

    return read_record(path)


def _show_profile(record: "Record", path: Path, *, json_to: Path | None, svg: Path | None) -> None:
    """From the file that was written, not from memory: what is shown is what anyone else would read."""
    from rich.console import Console

    from selab.record import to_json
    from selab.tables import profile_grid, stage_grid, verdict_lines

    if json_to is not None and str(json_to) == "-":
        sys.stdout.buffer.write(to_json(record))
        return
    consoles = [_console()]
    if svg is not None:
        consoles.append(Console(record=True, width=88, file=io.StringIO(), force_terminal=True))
    for console in consoles:
        console.print(profile_grid(record), highlight=False)
        if record.cost.se.blocks:
            console.print()
            console.print(stage_grid(record.cost), highlight=False)
        console.print()
        for line in verdict_lines(record):
            console.print(_plain(line), highlight=False, soft_wrap=False)
        console.print(f"\nrecord: {_plain(str(path))}", highlight=False, soft_wrap=True)
    if svg is not None:
        consoles[1].save_svg(str(svg), title=record.command)
    if json_to is not None:
        from selab.profiling import write_atomically

        write_atomically(json_to, to_json(record))


@contextmanager
def _reporting(console: "Console") -> Iterator[Callable[[str, "Progress | None"], None]]:
    """Progress on standard error: a live line on a terminal, otherwise one line per stage."""
    seen: set[str] = set()

    def say(label: str, _state: "Progress | None") -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"{_plain(label)} …", highlight=False)

    if not console.is_terminal:
        yield say
        return
    with console.status("starting") as status:

        def live(label: str, state: "Progress | None") -> None:
            status.update(_plain(label if state is None else f"{label}: {_describe(state)}"))

        yield live


def _describe(state: "Progress") -> str:
    width = "" if state.half_width is None else f", ±{state.half_width:.2%}".replace("%", " %")
    return f"{state.quads} quads{width}, {state.elapsed_s:.0f} of at most {state.budget_s:.0f} s"


if __name__ == "__main__":
    main()
