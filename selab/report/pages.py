"""Tables by their names, and the pages that they stand on."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from selab import units
from selab.errors import RecordError, UnknownNameError, nearest
from selab.experiments import tax_record
from selab.experiments.compared import Compared
from selab.experiments.tax_record import TaxRecord
from selab.judging import folding, placement
from selab.judging.folding import Folding
from selab.judging.placement import Placement
from selab.models import catalog
from selab.records import imported as imported_record
from selab.records.acceptance import Acceptance, KernelBandwidth, LoadingTime
from selab.records.files import files_ending
from selab.records.imported import Imported
from selab.records.store import NO_MACHINES
from selab.records.types import TORCH, Cost, Latency, Machine, Record
from selab.report.accuracy import accuracy_tables
from selab.report.folding import summary_table
from selab.report.machines import by_machine
from selab.report.placement import placement_tables
from selab.report.profiles import added_tables, latency_tables, ratio_cells
from selab.report.published import (
    OF_TORCHVISION,
    PAPER_TABLES,
    mobile_names,
    mobile_published_table,
    mobile_table,
    paper_reproduced,
    paper_table,
    reproduced,
    zoo_tables,
)
from selab.report.runtimes import imported_table, runtime_tables, spelling_tables
from selab.report.table import Table
from selab.report.tax import summary_tables
from selab.report.traces import distances_table
from selab.training import record as training_record
from selab.units import NONE

REPORT = "report"
ZOO = "zoo"
ACCURACY = "accuracy"
TAX = "tax"
RUNTIMES = "runtimes"
GATES = "gates"
MEASURED = ("added", "latency", ACCURACY, TAX, RUNTIMES, GATES)
COST_TABLES = (*(name for name in PAPER_TABLES if name not in OF_TORCHVISION), "mobile", ZOO)
NAMES = (*COST_TABLES, *OF_TORCHVISION, *MEASURED)
_REPORTED = ("added", RUNTIMES, TAX, GATES, ACCURACY, "mobile", "paper-2", "paper-3", "latency")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The records of one machine, or of one device.

    Attributes:
        profiles: of networks with SE and without.
        compared: of accuracy.
        taxes: of implementations.
        imported: what a device's own benchmark tools timed.
        foldings: of trained gates.
        placements: searches for sites.
    """

    profiles: Sequence[Record] = ()
    compared: Sequence[Compared] = ()
    taxes: Sequence[TaxRecord] = ()
    imported: Sequence[Imported] = ()
    foldings: Sequence[Folding] = ()
    placements: Sequence[Placement] = ()


NOTHING = Found()


def check_name(name: str) -> None:
    """Refuse a name that no table has.

    Raises:
        UnknownNameError: the message lists the nearest names.
    """
    if name not in (*NAMES, REPORT):
        raise UnknownNameError(f"table {name}: no such table{nearest(name, (*NAMES, REPORT))}")


def machine_folder(profiles: Path) -> Path:
    """Return the folder of one machine's records: the one named, or the only one below it that holds records."""

    def holds(folder: Path) -> bool:
        kinds = (
            folder,
            *(folder / one.FOLDER for one in (training_record, tax_record, imported_record, folding, placement)),
        )
        return any(files_ending(kind, ".json") for kind in kinds)

    machines = (folder for folder in profiles.glob("*/") if folder.name not in NO_MACHINES)
    below = [] if holds(profiles) else [folder for folder in machines if holds(folder)]
    return below[0] if len(below) == 1 else profiles


def costs_needed(name: str) -> tuple[str, ...]:
    """Return the variants whose cost a table shows."""
    if name == REPORT:
        return tuple(dict.fromkeys(arch for one in _REPORTED for arch in costs_needed(one)))
    if name == ZOO:
        return tuple(catalog.installed())
    if name == "mobile":
        return tuple(mobile_names())
    return tuple(dict.fromkeys(row for table in PAPER_TABLES.get(name, ()) for row in table.rows))


def named_tables(name: str, costs: dict[str, Cost], found: Found = NOTHING) -> list[Table]:
    """Return tables by name; `report` is the measured ones and those that they are read with.

    Args:
        name: one of `NAMES`, or `report`.
        costs: of `costs_needed(name)`.
        found: the records of one machine.

    Raises:
        UnknownNameError: there is no such table.
        RecordError: the table needs records and there are none.
    """
    check_name(name)
    records, compared, taxes = found.profiles, found.compared, found.taxes
    profiles = [record for record in records if record.kind == "profile"]
    runtimes = runtime_tables(profiles) + spelling_tables(taxes)
    runtimes += [imported_table(found.imported)] if found.imported else []
    taxes = [one for one in taxes if one.workload.runtime == TORCH]
    if name == REPORT:
        there = {
            "added": bool(profiles),
            RUNTIMES: bool(runtimes),
            "latency": bool(profiles),
            ACCURACY: bool(compared),
            TAX: bool(taxes),
            GATES: bool(found.foldings or found.placements),
        }
        names = [one for one in _REPORTED if there.get(one, True)]
        return [grid for one in names for grid in named_tables(one, costs, found)]
    if name == "mobile":
        return [mobile_table(costs, records), mobile_published_table(costs)]
    if name == ZOO:
        return zoo_tables(costs)
    if name in PAPER_TABLES:
        return [paper_table(one, costs) for one in PAPER_TABLES[name]]
    if name == ACCURACY:
        if not compared:
            raise RecordError(
                f"table {name}: no comparisons; `selab compare`, and name their machine's folder: --profiles"
            )
        return accuracy_tables(compared)
    if name == TAX:
        if not taxes:
            raise RecordError(f"table {name}: no comparisons; `selab tax`, and name their machine's folder: --profiles")
        return summary_tables(taxes)
    if name == RUNTIMES and runtimes:
        return runtimes
    if name == GATES:
        if not (found.foldings or found.placements):
            raise RecordError(
                f"table {name}: no records; put those of `selab fold` into FOLDER/{folding.FOLDER} or those of "
                f"`selab place` into FOLDER/{placement.FOLDER}, and name FOLDER: --profiles"
            )
        tables = [summary_table(found.foldings)] if found.foldings else []
        return tables + [grid for one in found.placements for grid in placement_tables(one)]
    if not profiles:
        raise RecordError(f"table {name}: no records; measure with `selab profile`, and name their folder: --profiles")
    if name == RUNTIMES:
        raise RecordError(f"table {name}: no record of another runtime; use `selab profile --runtime NAME`")
    return latency_tables(profiles) if name == "latency" else added_tables(profiles)


def cost_pages(costs: dict[str, Cost]) -> dict[str, str]:
    """Return every cost table as the text of a file, by file name; README.md lists them."""
    pages = {}
    rows = []
    for name in COST_TABLES:
        grids = named_tables(name, costs)
        pages[f"{name}.md"] = page(name, grids, ())
        equal, total = _met(name, costs)
        about = "; ".join(grid.title for grid in grids) if len(grids) < 3 else f"every variant, {len(grids)} families"
        rows.append((f"[{name}]({name}.md)", about, f"{equal} of {total}" if total else NONE))
    equal, total = _met(ZOO, costs)
    index = Table(
        title="Cost tables",
        columns=("table", "what it shows", "published cost numbers met"),
        rows=tuple(rows),
        notes=(
            f"{equal} of {total} published cost numbers reproduced to the printed digit.",
            "Counted, not timed: no machine enters. Rendered, not typed. The same in exact integers: "
            "[costs.json](costs.json).",
        ),
        words=frozenset({0, 1}),
    )
    lines = ",\n".join(f' "{name}": {_exact_costs(cost)}' for name, cost in costs.items())
    return {"README.md": index.markdown(), **pages, "costs.json": f"{{\n{lines}\n}}\n"}


def _met(name: str, costs: dict[str, Cost]) -> tuple[int, int]:
    """Return how many published cost numbers of a table match the counts, and how many it has."""
    known = catalog.installed()
    if name == ZOO:
        return reproduced(known.values(), costs)
    if name == "mobile":
        return reproduced((known[one] for one in mobile_names()), costs)
    return paper_reproduced(PAPER_TABLES.get(name, ()), costs)


def _exact_costs(cost: Cost) -> str:
    macs = cost.macs
    return json.dumps(
        {
            "params": cost.params,
            "buffer_elements": cost.buffer_elements,
            "macs": {"conv_linear": macs.conv_linear, "paper": macs.paper, "all": macs.all},
            "macs_backward": cost.macs_backward.all,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "activations": cost.activations,
            "se": {"blocks": cost.se.blocks, "params": cost.se.params},
        }
    )


def acceptance_tables(found: Acceptance) -> list[Table]:
    """Return how far a machine's ratios can be trusted, and how long counting and loading take on it."""
    grids = []
    if (live := found.live) is not None:
        rows = (
            ("median |ratio − 1| of a network against itself", units.share(live.median_error, decimals=2)),
            ("95th percentile of the same", units.share(live.p95_error, decimals=2)),
            ("intervals that hold 1", f"{live.intervals_holding_one} of {live.trials}"),
            (
                f"slowed by {units.share(live.slower_by_calibration, decimals=2)} and found slower",
                f"{live.slower_detected} of {live.slower_trials}",
            ),
        )
        notes = tuple(f"flag {flag.name}: {flag.detail}" for flag in live.flags)
        title = f"Live acceptance: {live.arch}, trials of {live.seconds_per_trial:g} s"
        grids.append(Table(title=title, columns=("", "measured"), rows=rows, notes=notes))
    for one in found.counting:
        lines = tuple((name, *ratio_cells(latency)) for name, latency in one.comparisons.items())
        columns = ("", "ours, batch 1", "this", "ratio", "95 % interval", "verdict")
        title = f"Time to count {one.arch}"
        grids.append(Table(title=title, columns=columns, rows=lines, words=frozenset({0, 5})))
    if found.loading is not None:
        grids.append(_loading_table(found.loading))
    if found.roof is not None:
        grids.append(distances_table(found.roof))
    if found.kernels is not None:
        grids.append(_kernels_table(found.kernels))
    return grids


def _kernels_table(one: KernelBandwidth) -> Table:
    names = tuple(dict.fromkeys(row.kernel for row in one.rows if row.kernel != "copy"))
    maps: dict[tuple[str, ...], dict[str, str]] = {}
    for row in one.rows:
        layout = "channels last" if row.memory_format == "channels_last" else row.memory_format
        place = (row.dtype, layout, "×".join(map(str, row.shape)))
        cell = f"{units.size(row.bytes / median(row.times_s), digits=3)}/s"
        maps.setdefault(place, {})[row.kernel] = cell if row.kernel == "copy" else units.share(row.share_of_copy)
    return Table(
        title="Bandwidth of the GPU kernels, in percent of a copy's",
        columns=("type", "memory format", "map", "copy", *names),
        rows=tuple((*place, *(cells.get(name, NONE) for name in ("copy", *names))) for place, cells in maps.items()),
        notes=("Bytes are those of the maps that a kernel must read and write once; the copy is torch's, in turn.",),
        words=frozenset({0, 1, 2}),
    )


def _loading_table(one: LoadingTime) -> Table:
    def rates(name: str, latency: Latency) -> tuple[str, str]:
        images = one.images_per_call[name]
        both = (latency.baseline_s, latency.variant_s)
        ours, theirs = (NONE if seconds is None else f"{images / seconds:,.0f}" for seconds in both)
        return ours, theirs

    rows = tuple((name, *rates(name, latency), *ratio_cells(latency)[2:]) for name, latency in one.comparisons.items())
    threads = max((latency.threads for latency in one.comparisons.values()), default=1)
    return Table(
        title="Images per second of loading, and of training with it",
        columns=("", "ours", "torchvision", "ratio of times", "95 % interval", "verdict"),
        rows=rows,
        notes=(
            f"{one.data.get('title', '')}, batch {one.batch}, {one.arch}, {units.counted(threads, 'thread')}, "
            f"torchvision {one.torchvision} with its DataLoader and so many workers; "
            "crop, flip and normalisation in both.",
            *(f"flag {flag.name}: {flag.detail}" for flag in one.flags),
        ),
        words=frozenset({0, 5}),
    )


def page(name: str, grids: Sequence[Table], records: Sequence[Record]) -> str:
    """Return tables as a Markdown page; a report names its machine and the commands that repeat it."""
    body = "\n".join(grid.markdown() for grid in grids)
    if name != REPORT or not records:
        return body
    machines = [group[0].machine for group in by_machine(records).values()]
    commands = "\n".join(dict.fromkeys(record.command for record in records if record.kind == "profile"))
    head = f"# Measured on {' and '.join(machine.gpu or machine.cpu for machine in machines)}\n\n"
    head += "\n".join(f"- {line}" for machine in machines for line in machine_lines(machine))
    how = f"### How to repeat this\n\n```\n{commands}\n```\n"
    return f"{head}\n\nRendered from the records in this folder by `selab table report`; not typed.\n\n{body}\n{how}"


def spliced(text: str, name: str, body: str, *, where: str) -> str:
    """Put a rendered table between `<!-- table NAME -->` and `<!-- /table -->`, in place of what stands there.

    Raises:
        RecordError: the file has no such pair of marks.
    """
    pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- /table -->)", re.DOTALL)
    if pattern.search(text) is None:
        raise RecordError(
            f"{where}: has no lines '<!-- table {name} -->' and '<!-- /table -->' to put the table between"
        )
    return pattern.sub(lambda found: found[1] + body + found[2], text)


def machine_lines(machine: Machine) -> list[str]:
    """Return machine and libraries in words, one line each."""
    cores = units.counted(machine.cores, "core")
    lines = [f"{machine.cpu}, {cores}, {units.size(machine.memory_bytes, digits=3)}; {machine.system}"]
    if machine.gpu is not None:
        lines.append(f"{machine.gpu}, driver {machine.driver}")
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    lines.append(f"Python {machine.python}, {libraries}")
    return lines
