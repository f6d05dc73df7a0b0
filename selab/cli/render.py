"""Commands that render records: plot, table, schema."""

import dataclasses
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab.cli.console import (
    open_console,
    print_parts,
    reporting,
    write_json,
)
from selab.cli.options import (
    Archs,
    Json,
)
from selab.models import catalog

if TYPE_CHECKING:
    from selab.experiments.compared import Compared
    from selab.records.types import Cost, Record
    from selab.report.figures.registry import Picture
    from selab.report.table import Table


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
    from selab.records import store
    from selab.report.figures import axes as report_figures_axes
    from selab.report.figures import registry, scatter

    to = out or Path(f"{name}.svg")
    registry.check_file(to)
    if name in registry.OF_ONE_RECORD:
        if record is None:
            raise typer.BadParameter("name the comparison's record", param_hint="--record")
        return _show_picture(_picture_of(name, record), to, json_to)
    axes = registry.axes_of(name, x, y)
    trained = axes is not None and report_figures_axes.TRAINED in [report_figures_axes.axis(one).origin for one in axes]
    records = store.read_records(profiles) if profiles is not None and not trained else []
    compared: Sequence[Compared] = ()
    if trained and profiles is not None:
        from selab.experiments.compare import read_compared

        compared = read_compared(profiles)
    needed = scatter.costs_needed(*axes, arch) if axes is not None else ()
    costs: dict[str, Cost] = {}
    if needed:
        from selab.experiments.profiling import counted

        with reporting(open_console(stderr=True)) as report:
            report(f"counting {len(needed)} networks", None)
            costs = counted(needed)
    shown = registry.picture(
        name, x=x, y=y, records=records, costs=costs, archs=arch, workload=workload, compared=compared
    )
    return _show_picture(shown, None if json_to is not None and out is None else to, json_to)


def _picture_of(name: str, record: Path) -> "Picture":
    """Of one record, by the picture's name."""
    from selab.experiments.tax_record import read_tax_record
    from selab.report.figures import curves, registry
    from selab.report.figures import tax as report_figures_tax
    from selab.training.record import read_accuracy_record

    if name == registry.CURVES:
        return curves.curves(read_accuracy_record(record))
    return report_figures_tax.tax_bars(read_tax_record(record))


def _show_picture(shown: "Picture", to: Path | None, json_to: Path | None) -> None:
    from selab.report.figures import registry

    if json_to is not None:
        write_json(dataclasses.asdict(shown), json_to)
    if to is not None:
        registry.draw(shown, to)
        typer.echo(f"picture: {to}", err=str(json_to) == "-")


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
    from selab.records import store
    from selab.report import pages

    if name == _ALL_TABLES:
        return _write_tables(out)
    pages.check_name(name)
    profiles = None if profiles is None else pages.machine_folder(profiles)
    apart = (pages.ACCURACY, pages.TAX)
    records = store.read_records(profiles) if profiles is not None and name not in apart else []
    from selab.experiments.compare import read_compared
    from selab.experiments.profiling import counted
    from selab.experiments.tax_record import read_tax_records

    compared = read_compared(profiles) if profiles is not None and name in (pages.ACCURACY, pages.REPORT) else []
    taxes = read_tax_records(profiles) if profiles is not None and name in (pages.TAX, pages.REPORT) else []
    grids = pages.named_tables(name, counted(pages.costs_needed(name)), records, compared, taxes)
    if name == pages.REPORT and profiles is not None:
        grids += pages.acceptance_tables(store.read_acceptance(profiles))
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


def _markdown(name: str, grids: "Sequence[Table]", records: "Sequence[Record]") -> str:
    from selab.report.pages import page

    return page(name, grids, records)


def _write_tables(out: Path | None) -> None:
    """Every cost table as a file, counted in as many processes as pay."""
    if out is None:
        raise typer.BadParameter("the table 'all' is a folder of files; name it", param_hint="--out")
    from selab.experiments.profiling import counted
    from selab.records import store
    from selab.report import pages

    store.check_writable(out / "README.md", replace=True)
    for name, text in pages.cost_pages(counted(catalog.installed())).items():
        store.write_atomically(out / name, text.encode())


def schema(json_to: Json = None) -> None:
    """Print the JSON Schema of a record."""
    from selab.records.types import json_schema

    write_json(json_schema(), json_to or Path("-"))
