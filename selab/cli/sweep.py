"""The command `selab sweep`."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from selab import units
from selab.cli.console import (
    StoppedError,
    announce_code,
    announce_sites,
    check_outputs,
    escape_markup,
    finds_sites,
    measuring_words,
    open_console,
    print_error,
    print_tables,
    write_json,
)
from selab.cli.measure import RESULTS
from selab.cli.options import (
    OUTPUT,
    TIME,
    WHAT,
    EffortOptions,
    Format,
    GridOptions,
    Json,
    Out,
    option,
    option_of,
    with_options,
)
from selab.errors import SelabError, nearest
from selab.experiments.job import network_address
from selab.records.types import RUNTIMES, TORCH, Dtype, MemoryFormat

if TYPE_CHECKING:
    from selab.bench.progress import Report
    from selab.experiments.job import Job, Request
    from selab.experiments.sweep import Outcome


@with_options
def sweep(
    arch: Annotated[
        list[str],
        option("--arch", WHAT, "Networks, as for `profile`; comma list or repeated.", metavar="NAME,…"),
    ],
    options: GridOptions,
    effort: EffortOptions,
    retry: Annotated[bool, option("--retry", TIME, "Retry cells without memory or result.")] = False,
    ray: Annotated[
        str | None,
        option("--ray", TIME, "Use a Ray cluster; auto, or local.", metavar="ADDRESS"),
    ] = None,
    out: Out = RESULTS,
    table_to: Annotated[
        Path | None,
        option("--table", OUTPUT, "Also write rows: .csv, .json, .parquet.", metavar="FILE"),
    ] = None,
    pictures: Annotated[
        Path | None,
        option("--pictures", OUTPUT, "Also draw time by batch and size.", metavar="FOLDER"),
    ] = None,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Measure a grid of networks and workloads; rerun to resume."""
    wrong: list[str] = []
    own = effort.fields_of_request(quick=True)
    asked = list(_cells(arch, options, own, wrong))
    from selab.bench.runner import check_device
    from selab.experiments import sweep as experiments_sweep
    from selab.report import sweep as report_sweep

    if ray is None:
        check_device(options.device or "cpu")
    if table_to is not None:
        report_sweep.check_table(table_to)
    check_outputs(table_to, json_to, None if pictures is None else pictures / "tax_batch.svg")
    jobs, mistakes = experiments_sweep.resolve_cells(asked)
    for line in dict.fromkeys([*wrong, *mistakes]):
        print_error(line)
    if wrong or mistakes:
        raise typer.Exit(1)
    _announce(jobs)

    def show(done: "Sequence[Outcome]") -> None:
        if str(json_to) != "-":
            print_tables(report_sweep.sweep_tables(done, jobs), look)

    done = _measured(jobs, out, show, retry=retry, ray=ray)
    _write(done, table_to, pictures)
    if json_to is not None:
        write_json(report_sweep.rows(done), json_to)
    show(done)
    _check_failed(done)


def _check_failed(done: "Sequence[Outcome]") -> None:
    if failed := sum(one.state == "failed" for one in done):
        cells = units.counted(len(done), "cell")
        raise SelabError(f"{failed} of {cells} failed; the table says why, and the same command tries again")


def _cells(arch: Sequence[str], options: GridOptions, own: dict[str, Any], wrong: list[str]) -> "Iterator[Request]":
    """Every cell of the grid; what is wrong with the options is added to `wrong`."""
    from selab.experiments.sweep import cells

    if options.channels_last and not options.memory_format:
        options.memory_format, options.channels_last = "channels_last", False
    common = options.fields_of_request()
    for name in ("batch", "resolution", "reduction", "threads", "dtype", "runtime", "memory_format", *_BLOCK_AXES):
        common.pop(name, None)
    batches, resolutions, reductions, threads = (
        _naturals(getattr(options, name), option_of(GridOptions, name), wrong)
        for name in ("batch", "resolution", "reduction", "threads")
    )
    if common.get("device") == "cuda":
        threads = []
    formats = _listed(options.memory_format or "contiguous", get_args(MemoryFormat), "--memory-format", wrong)
    axes: dict[str, Any] = {
        # Where no value is right there is a cell all the same, so that wrong networks are found too.
        "dtype": _listed(options.dtype, get_args(Dtype), "--dtype", wrong) or ["fp32"],
        "runtime": _listed(options.runtime, RUNTIMES, "--runtime", wrong) or [TORCH],
        "memory_format": formats or ["contiguous"],
        "threads": threads or [None],
        "phases": ("forward",),
    }
    yield from cells(_addresses(arch, options, reductions), resolutions, batches or [1], **{**own, **axes, **common})


# Options of the blocks that a grid may have several values of, in the words of --se.
_BLOCK_AXES = ("block", "placement", "stages", "gate")


def _addresses(arch: Sequence[str], options: GridOptions, reductions: Sequence[int]) -> list[str]:
    """Every network of the grid by name, with its blocks."""
    # A comma before KEY= stands within a change: resnet50+reduction=8,stages=2-4.
    named = [name.strip() for listed in arch for name in re.split(r",(?!\s*\w+\s*=)", listed)]
    values: dict[str, list[Any]] = {
        key: [value.strip() for value in str(getattr(options, key)).split(",") if value.strip()] for key in _BLOCK_AXES
    }
    values["reduction"] = list(reductions)
    axes = [[f"{key}={value}" for value in found] for key, found in values.items() if found]
    changes = [",".join(change) for change in product(*axes)]
    insert = options.insert or ()
    found = []
    for name in named:
        for change in changes:
            both = ",".join(text for text in (options.se, change) if text) or None
            found.append(network_address(name, both, insert))
    return list(dict.fromkeys(found))


def _announce(jobs: "Sequence[Job]") -> None:
    """Announce, once for each network, that a user's code runs, and which sites were found by tracing."""
    from selab.experiments.profiling import sites_of

    for job in {one.variant.name: one for one in jobs}.values():
        announce_code(job.variant)
        if finds_sites(job.variant):
            announce_sites(job.variant, sites_of(job))


def _measured(
    jobs: "Sequence[Job]", out: Path, show: "Callable[[Sequence[Outcome]], None]", *, retry: bool, ray: str | None
) -> "list[Outcome]":
    """Measure every cell, here or on a cluster, and report progress; `show` prints what an interruption leaves."""
    from selab.report import sweep as report_sweep

    done: list[Outcome] = []
    console = open_console(stderr=True)
    try:
        with report_sweep.showing(console, jobs, measuring_words) as (report, tell), redirect_stdout(sys.stderr):
            for outcome in _outcomes(jobs, out, report, retry=retry, ray=ray):
                done.append(outcome)
                tell(outcome)
    except KeyboardInterrupt:
        if done:
            show(done)
        raise StoppedError(f"interrupted; cells done: {len(done)}; the same command resumes") from None
    return done


def _write(done: "Sequence[Outcome]", table_to: Path | None, pictures: Path | None) -> None:
    """Write the flat rows and the pictures that were asked for, and say where they are."""
    from selab.report import sweep as report_sweep

    if table_to is not None:
        _say(*(f"table: {path}" for path in report_sweep.write_tables(done, table_to)))
    if pictures is not None:
        _say(*report_sweep.write_pictures(done, pictures))


def _outcomes(
    jobs: "Sequence[Job]", out: Path, report: "Report", *, retry: bool, ray: str | None
) -> "Iterator[Outcome]":
    if ray is not None:
        from selab.experiments import cluster

        return cluster.swept(jobs, out, report, address=ray, retry=retry)
    from selab.experiments.sweep import sweep

    return sweep(jobs, out, report, retry=retry)


def _say(*lines: str) -> None:
    console = open_console(stderr=True)
    for line in lines:
        console.print(escape_markup(line), highlight=False, soft_wrap=True)


def _listed(text: str, allowed: Sequence[str], option: str, wrong: list[str]) -> list[str]:
    """Split a comma list; words that are not allowed are added to `wrong`."""
    words = [word.strip() for word in text.split(",")]
    wrong += [f"{option} {word}: no such value{nearest(word, allowed)}" for word in words if word not in allowed]
    return [word for word in words if word in allowed]


def _naturals(text: str, option: str, wrong: list[str]) -> list[int]:
    """Split a comma list of numbers from 1 on; others are added to `wrong`."""
    words = [word.strip() for word in text.split(",")] if text else []
    good = [word for word in words if re.fullmatch(r"0*[1-9][0-9]{0,8}", word)]
    wrong += [
        f"{option} {word}: not a whole number from 1 to 999,999,999; for example {option} 8,16"
        for word in words
        if word not in good
    ]
    return [int(word) for word in good]
