"""Commands that render records: plot, table, schema."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab import units
from selab.cli.console import BrokenFiles, check_outputs, open_console, print_parts, reporting, write_json
from selab.cli.options import OUTPUT, WHAT, Archs, Format, Json, Look, Replace, input_file, option
from selab.models import catalog

if TYPE_CHECKING:
    from selab.experiments.tax_record import TaxRecord
    from selab.records.imported import Imported
    from selab.records.types import Cost, Record
    from selab.report.figures.registry import Picture
    from selab.report.pages import Found
    from selab.report.table import Table

ALL_TABLES = "all"
QUANTITIES = (
    "counted: params, macs, macs_all, flops, bytes, activations; published: top1_error, top5_error; measured "
    "(--profiles): latency, latency_fwd_bwd, tax, saved_for_backward; trained (--profiles): top1_error_trained, "
    "top5_error_trained."
)
Profiles = Annotated[
    list[Path] | None,
    option("--profiles", WHAT, "Folder of records. Repeatable.", metavar="FOLDER"),
]


def plot(
    name: Annotated[str, typer.Argument(help="cost, accuracy, added, runtimes, curves or tax.")],
    x: Annotated[str | None, option("--x", WHAT, "Quantity; macs by default.", metavar="NAME")] = None,
    y: Annotated[
        str | None,
        option("--y", WHAT, "Quantity; latency or top1_error by default.", metavar="NAME"),
    ] = None,
    arch: Archs = (),  # type: ignore[assignment]
    profiles: Profiles = None,
    record: Annotated[
        list[Path] | None,
        option("--record", WHAT, "For curves and tax; - is standard input. Repeatable for curves.", metavar="FILE"),
    ] = None,
    workload: Annotated[
        str | None,
        option("--workload", WHAT, "One of several, as in file names.", metavar="NAME"),
    ] = None,
    out: Annotated[
        Path | None,
        option("--out", OUTPUT, "The picture; NAME.svg by default.", metavar="FILE"),
    ] = None,
    replace: Replace = False,
    json_to: Json = None,
) -> None:
    """Draw what SE costs and buys, from counts and records.

    A record that cannot be read is named in a warning and left out; the rest is drawn, and the exit status is 1.
    """
    from selab.records import files
    from selab.report.figures import registry, scatter

    to = None if json_to is not None and out is None else out or Path(f"{name}.svg")
    registry.check_file(out or Path(f"{name}.svg"))
    if name in registry.OF_ONE_RECORD and not record:
        raise typer.BadParameter("name the record to draw", param_hint="--record")
    if name == registry.TAX and record and len(record) > 1:
        raise typer.BadParameter("tax is drawn from one record", param_hint="--record")
    if to is not None:
        files.check_writable(to, replace=replace)
    check_outputs(json_to)
    if record and name in registry.OF_ONE_RECORD:
        return _show_picture(_picture_of(name, [input_file(one) for one in record]), to, json_to)
    axes = registry.axes_of(name, x, y)
    broken = BrokenFiles()
    records, compared = _measured(axes, profiles or (), broken)
    needed = scatter.costs_needed(*axes, arch) if axes is not None else ()
    costs: dict[str, Cost] = {}
    if needed:
        from selab.experiments.profiling import counted

        with reporting(open_console(stderr=True)) as report:
            report(f"counting {units.counted(len(needed), 'network')}", None)
            costs = counted(needed)
    shown = registry.picture(
        name, x=x, y=y, records=records, costs=costs, archs=arch, workload=workload, compared=compared
    )
    _show_picture(shown, to, json_to)
    broken.exit()
    return None


def _measured(
    axes: tuple[str, str] | None, profiles: Sequence[Path], broken: BrokenFiles
) -> "tuple[list[Record], list[Any]]":
    """The profiles that a picture needs, or the comparisons of accuracy, from all folders."""
    from selab.records import store
    from selab.report import pages
    from selab.report.figures import axes as figure_axes

    folders = [pages.machine_folder(one) for one in profiles]
    trained = axes is not None and figure_axes.TRAINED in [figure_axes.axis(one).origin for one in axes]
    if not trained:
        read = store.read_records
        return [record for folder in folders for record in read(folder, partial=True, on_broken=broken)], []
    from selab.experiments.compare import read_compared

    return [], [one for folder in folders for one in read_compared(folder, on_broken=broken)]


def _picture_of(name: str, records: list[Path]) -> "Picture":
    """A picture of one record, or of learning curves that share a baseline."""
    from selab.experiments.tax_record import read_tax_record
    from selab.report.figures import curves, registry
    from selab.report.figures import tax as tax_figures
    from selab.training.record import read_accuracy_record

    if name == registry.CURVES:
        first, *others = (read_accuracy_record(one) for one in records)
        return curves.curves(first, *others)
    return tax_figures.tax_bars(read_tax_record(records[0]))


def _show_picture(shown: "Picture", to: Path | None, json_to: Path | None) -> None:
    from selab.report.figures import registry

    if json_to is not None:
        write_json(dataclasses.asdict(shown), json_to)
    if to is not None:
        registry.draw(shown, to)
        typer.echo(f"picture: {to}", err=str(json_to) == "-")


def table(
    name: Annotated[
        str,
        typer.Argument(
            help="Counted: paper-2, paper-3, paper-6, paper-7, cifar, reduction, squeeze, excitation, stages, "
            "integration, mobile, zoo. Measured (--profiles): added, latency, accuracy, tax, runtimes. "
            "report: a machine's page. all: counted."
        ),
    ],
    profiles: Profiles = None,
    look: Format = "rich",
    out: Annotated[
        Path | None,
        option("--out", OUTPUT, "Write to FILE, as Markdown or --format.", metavar="FILE"),
    ] = None,
    into: Annotated[
        Path | None,
        option("--into", OUTPUT, "Put it between '<!-- table NAME -->' marks in FILE.", metavar="FILE"),
    ] = None,
    replace: Replace = False,
    json_to: Json = None,
) -> None:
    """Print a table of counted, measured and published numbers.

    A record that cannot be read is named in a warning and left out; the rest is shown, and the exit status is 1.
    """
    if out is not None and into is not None:
        raise typer.BadParameter("give --out or --into, not both", param_hint="--into")
    from selab.records import files
    from selab.report import pages

    check_outputs(json_to)
    if name == ALL_TABLES:
        return _write_tables(out, replace=replace)
    pages.check_name(name)
    if out is not None:
        files.check_writable(out, replace=replace)
    broken = BrokenFiles()
    tables, records = _named_tables(name, profiles or (), broken)
    if json_to is not None or (look == "json" and into is None):
        write_json([one.as_builtins() for one in tables], json_to or out or Path("-"))
    elif look == "rich" and out is None and into is None:
        print_parts(*tables)
    elif into is not None:
        spliced = pages.spliced(files.read_text(into), name, _text(name, tables, records, look), where=str(into))
        files.write_atomically(into, spliced.encode())
    elif out is not None:
        files.write_atomically(out, _text(name, tables, records, look).encode())
    else:
        sys.stdout.write(_text(name, tables, records, look))
    broken.exit()
    return None


def _named_tables(name: str, profiles: Sequence[Path], broken: BrokenFiles) -> "tuple[list[Table], list[Record]]":
    """A table by its name, and the profiles in it; of several machines one after the other, each with its name."""
    from selab.experiments.profiling import counted
    from selab.records.store import read_acceptance
    from selab.report import pages

    folders = list(dict.fromkeys(pages.machine_folder(one) for one in profiles))
    # What cannot be read is found before networks are counted.
    read = [_read_folder(name, one, broken) for one in folders]
    needed = pages.costs_needed(name)
    with reporting(open_console(stderr=True)) as report:
        if len(needed) > _MANY:
            report(f"counting {units.counted(len(needed), 'network')}", None)
        costs = counted(needed)
    if not profiles:
        return pages.named_tables(name, costs), []
    every: list[Table] = []
    all_records: list[Record] = []
    for folder, found in zip(folders, read, strict=True):
        tables = pages.named_tables(name, costs, found)
        if name == pages.REPORT:
            tables += pages.acceptance_tables(read_acceptance(folder, on_broken=broken))
        if len(folders) > 1:
            tables = [dataclasses.replace(one, title=f"{one.title}, {folder.name}") for one in tables]
        every += tables
        all_records += found.profiles
    return every, all_records


# Counting fewer networks takes no longer than reading about it.
_MANY = 8


def _read_folder(name: str, folder: Path, broken: BrokenFiles) -> "Found":
    """Read what a table shows of a machine's records."""
    from selab.experiments.compare import read_compared
    from selab.experiments.tax_record import read_tax_records
    from selab.judging.folding import FOLDINGS
    from selab.judging.placement import PLACEMENTS
    from selab.records import store
    from selab.records.imported import IMPORTED
    from selab.report import pages

    imported: list[Imported] = []
    if name in (pages.RUNTIMES, pages.REPORT):
        imported = IMPORTED.read_folder(folder, required=False, on_broken=broken)
    taxes: list[TaxRecord] = []
    if name in (pages.TAX, pages.RUNTIMES, pages.REPORT):
        taxes = read_tax_records(folder, on_broken=broken)
    judged: dict[str, Any] = {}
    if name in (pages.GATES, pages.REPORT):
        required = {"required": False, "on_broken": broken}
        judged = {
            "foldings": FOLDINGS.read_folder(folder, **required),  # type: ignore[arg-type]
            "placements": PLACEMENTS.read_folder(folder, **required),  # type: ignore[arg-type]
        }
    compared = read_compared(folder, on_broken=broken) if name in (pages.ACCURACY, pages.REPORT) else []
    # A phone's folder holds no profile, and spellings alone make a table of runtimes, comparisons a report.
    enough = imported or (name == pages.RUNTIMES and taxes) or (name == pages.REPORT and compared)
    others = name in (pages.ACCURACY, pages.TAX, pages.GATES) or (
        enough and not store.PROFILES.files(folder, partial=True)
    )
    return pages.Found(
        profiles=[] if others else store.read_records(folder, partial=True, on_broken=broken),
        compared=compared,
        taxes=taxes,
        imported=imported,
        **judged,
    )


def _text(name: str, tables: "Sequence[Table]", records: "Sequence[Record]", look: Look) -> str:
    """Return tables as text for a file; without a format, as a Markdown page."""
    from selab.report.pages import page
    from selab.report.table import render

    return page(name, tables, records) if look in ("rich", "markdown") else render(tables, look)


def _write_tables(out: Path | None, *, replace: bool) -> None:
    """Write every cost table as a file, counted in as many processes as pay."""
    if out is None:
        raise typer.BadParameter("the table 'all' is a folder of files; name it", param_hint="--out")
    from selab.experiments.profiling import counted
    from selab.records import files
    from selab.report import pages

    files.check_writable(out / "README.md", replace=replace)
    for name, text in pages.cost_pages(counted(catalog.installed())).items():
        files.write_atomically(out / name, text.encode())


def schema(json_to: Json = None) -> None:
    """Print the JSON Schema of a record."""
    from selab.records.types import json_schema

    check_outputs(json_to)
    write_json(json_schema(), json_to or Path("-"))
