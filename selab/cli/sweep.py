"""The command `selab sweep`."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab.cli.console import (
    check_outputs,
    find,
    measuring_words,
    open_console,
    plain,
    print_error,
    print_parts,
    write_json,
)
from selab.cli.options import Device, Dtype, Json, Phase, network_address
from selab.errors import SelabError, nearest

if TYPE_CHECKING:
    from selab.experiments.job import Job
    from selab.experiments.sweep import Outcome
    from selab.experiments.workers import Report


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
    for address in dict.fromkeys(network_address(name, change, None) for name in named for change in changes):
        try:
            find(address)
        except SelabError as error:
            wrong.append(str(error))
        else:
            addresses.append(address)
    from selab.bench.runner import check_device
    from selab.experiments import sweep as experiments_sweep
    from selab.report import sweep as report_sweep

    if ray is None:
        check_device(device.value)
    if table_to is not None:
        report_sweep.check_table(table_to)
    check_outputs(table_to, json_to, None if pictures is None else pictures / "tax_batch.svg")
    asked = experiments_sweep.cells(
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
    jobs, mistakes = experiments_sweep.resolve_cells(asked)
    wrong += mistakes
    if wrong:
        for line in dict.fromkeys(wrong):
            print_error(line)
        raise typer.Exit(1)
    console = open_console(stderr=True)
    done: list[Outcome] = []
    try:
        with report_sweep.showing(console, jobs, measuring_words) as (report, tell), redirect_stdout(sys.stderr):
            for outcome in _outcomes(jobs, out, report, retry=retry, ray=ray):
                done.append(outcome)
                tell(outcome)
    except KeyboardInterrupt:
        raise SelabError(f"interrupted; cells done: {len(done)}; the same command goes on") from None
    if table_to is not None:
        for path in report_sweep.write_tables(done, table_to):
            console.print(f"table: {plain(str(path))}", highlight=False, soft_wrap=True)
    if pictures is not None:
        for line in report_sweep.write_pictures(done, pictures):
            console.print(plain(line), highlight=False, soft_wrap=True)
    if json_to is not None:
        write_json(report_sweep.rows(done), json_to)
    if str(json_to) != "-":
        print_parts(*report_sweep.sweep_tables(done, jobs))
    failed = sum(one.state == "failed" for one in done)
    if failed:
        raise SelabError(f"{failed} of {len(done)} cells failed; the table says why, and the same command tries again")


def _outcomes(
    asked: "Sequence[Job]", out: Path, report: "Report", *, retry: bool, ray: str | None
) -> "Iterator[Outcome]":
    """Of every cell, on this machine or on a cluster's."""
    if ray is not None:
        from selab.experiments import cluster

        return cluster.swept(asked, out, report, address=ray, retry=retry)
    from selab.experiments.sweep import sweep

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
