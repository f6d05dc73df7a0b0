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

from selab import __version__, catalog, units
from selab.errors import RecordError, SelabError

if TYPE_CHECKING:
    from rich.console import Console

    from selab.measure.paired import Progress
    from selab.profiling import Profile
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


# What typer's own runner exits with when it is interrupted: 128 + SIGINT.
_INTERRUPTED = 130

Json = Annotated[Path | None, typer.Option("--json", help="Write JSON to this file, or to - for standard output.")]
Arch = Annotated[str, typer.Option("--arch", help="A name from `selab archs`, or path/to/family.toml[:variant].")]
Archs = Annotated[list[str], typer.Option("--arch", help="As in `profile`; repeat it for several networks.")]
Positive = Annotated[int, typer.Option(min=1)]


def main() -> None:
    """The program: a user's mistake, a machine's limit and an interruption end in one line and status 1."""
    try:
        app()
    except SelabError as error:
        _complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _complain("interrupted; nothing was written")
            sys.exit(1)
        raise
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
        sys.stdout = None
        sys.exit(1)


def _complain(message: str) -> None:
    _console(stderr=True).print(f"[bold red]error:[/] {_plain(message)}", highlight=False, soft_wrap=True)


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
    from selab.grid import Grid
    from selab.spec import as_builtins

    variants = catalog.installed()
    if json_to is not None:
        return _write_json([as_builtins(variant) for variant in variants.values()], json_to)
    rows = tuple((one.name, one.baseline or "", one.title) for one in variants.values())
    columns = ("name", "baseline", "what it is")
    return _print(Grid(title="Architectures", columns=columns, rows=rows, words=frozenset(range(3))))


@app.command()
def show(name: Annotated[str, typer.Argument(help="As --arch.")], json_to: Json = None) -> None:
    """Show one architecture: its facts, its SE sites and what others published about it."""
    variant = catalog.find(name, option="show")
    from selab.build import build
    from selab.spec import as_builtins
    from selab.tables import facts_grid, published_grid, sites_grid

    insertions = build(variant, device="meta").insertions
    if json_to is not None:
        return _write_json({**as_builtins(variant), "insertions": [_builtins(one) for one in insertions]}, json_to)
    published = [published_grid(variant)] if variant.published else []
    return _print(facts_grid(variant), *([sites_grid(insertions)] if insertions else []), *published)


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
    """Count parameters, MACs, FLOPs, bytes and activations; no kernel runs, so batch and resolution cost nothing."""
    names = list(catalog.installed()) if every else list(arch)
    if not names:
        raise typer.BadParameter("name at least one network, or give --all", param_hint="--arch")
    variants = [catalog.find(name) for name in names]
    from selab import profiling, store, tables

    paths = {} if out is None else {name: out / f"{one.name}.json" for name, one in zip(names, variants, strict=True)}
    if len(set(paths.values())) < len(paths):
        raise RecordError(f"--out {out}: two of these networks have the same name; count them into two folders")
    for path in paths.values():
        store.check_writable(path, replace=replace)
    counters = len(names) == 1 or bool(paths) or json_to is not None
    records = []
    with _reporting(_console(stderr=True)) as report:
        for name in names:
            report(f"counting {name}" if len(names) > 1 else "counting", None)
            one = profiling.count_record(
                name, batch=batch, resolution=resolution, by_module=by is By.module, counters=counters
            )
            records.append(one)
            if paths:
                store.save(one, paths[name])
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
    catalog.find(arch)
    if baseline is not None:
        catalog.find(baseline, option="--baseline")
    from selab import profiling, store
    from selab.request import Request

    options: dict[str, Any] = {"phases": tuple(one.value for one in phase)} if phase else {}
    request = Request(
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
    path = growing.path(out)
    store.check_writable(path, replace=replace)
    for extra in (svg, json_to):
        if extra is not None and str(extra) != "-":
            store.check_writable(extra, replace=True)
    try:
        with _reporting(_console(stderr=True)) as report:
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
def table(
    name: Annotated[str, typer.Argument(help="added, mobile, paper-2, paper-3, latency, or report (all of them).")],
    profiles: Annotated[Path | None, typer.Option(help="A machine's folder of records.")] = None,
    look: Annotated[TableFormat, typer.Option("--format", help="For standard output.")] = TableFormat.rich,
    out: Annotated[Path | None, typer.Option(help="Write Markdown to this file instead.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put it between '<!-- table NAME -->' marks in this file.")] = None,
    json_to: Json = None,
) -> None:
    """Render a table again, from the records and the published numbers."""
    if out is not None and into is not None:
        raise typer.BadParameter("give --out or --into, not both", param_hint="--into")
    from selab import store, tables

    tables.check_name(name)
    records = store.read_records(profiles) if profiles is not None else []
    from selab.profiling import counted

    costs = counted(tables.costs_needed(name))
    grids = tables.named_grids(name, costs, records)
    if name == tables.REPORT and profiles is not None:
        grids += tables.acceptance_grids(*store.read_acceptance(profiles))
    if json_to is not None or look is TableFormat.json:
        return _write_json([grid.as_builtins() for grid in grids], json_to or out or Path("-"))
    if look is TableFormat.rich and out is None and into is None:
        return _print(*grids)
    text = tables.page(name, grids, records)
    if into is not None:
        spliced = tables.spliced(store.read_text(into), name, text, where=str(into))
        store.write_atomically(into, spliced.encode())
    elif out is not None:
        store.write_atomically(out, text.encode())
    else:
        typer.echo(text, nl=False)
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
    from selab.store import write_atomically

    write_atomically(to, text.encode())


def _show_profile(record: "Record", path: Path, *, json_to: Path | None, svg: Path | None) -> None:
    """From the file that was written, not from memory: what is shown is what anyone else would read."""
    from rich.console import Console

    from selab.record import to_json
    from selab.store import write_atomically
    from selab.tables import profile_grid, stage_grid, verdict_lines

    alone = str(json_to) == "-"
    if alone:
        sys.stdout.buffer.write(to_json(record))
    consoles = [Console(file=io.StringIO()) if alone else _console()]
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
        write_atomically(svg, consoles[1].export_svg(title=record.command).encode())
    if json_to is not None and not alone:
        write_atomically(json_to, to_json(record))


@contextmanager
def _reporting(console: "Console") -> Iterator[Callable[[str, "Progress | None"], None]]:
    """Progress on standard error: a live line on a terminal, otherwise one line per stage.

    The live line is drawn only when it is told something, which is between samples: a thread that turned a spinner
    would run beside what is measured.
    """
    seen: set[str] = set()

    def say(label: str, _state: "Progress | None") -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"{_plain(label)} …", highlight=False)

    if not console.is_terminal:
        yield say
        return
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as line:

        def draw(label: str, state: "Progress | None") -> None:
            line.update(Text(label if state is None else f"{label}: {_describe(state)}"), refresh=True)

        yield draw


def _describe(state: "Progress") -> str:
    width = "" if state.half_width is None else f", ±{units.share(state.half_width, decimals=2)}"
    return f"{state.quads} quads{width}, {state.elapsed_s:.0f} of at most {state.budget_s:.0f} s"


if __name__ == "__main__":
    main()
