"""Commands for CI: check and diff."""

import dataclasses
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from selab.cli.console import (
    check_outputs,
    find,
    open_console,
    print_parts,
    reporting,
    write_json,
)
from selab.cli.options import (
    Json,
)
from selab.errors import SelabError


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
    from selab.experiments import budget as experiments_budget
    from selab.report import checks

    check_outputs(json_to)
    budgets = experiments_budget.read_budgets(file, only=only or ())
    for one in budgets.values():
        find(one.arch)
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        findings = list(experiments_budget.check(budgets, report, quick=not thorough, processes=processes))
    if json_to is not None:
        write_json([dataclasses.asdict(one) for one in findings], json_to)
    if str(json_to) != "-":
        print_parts(checks.check_table(findings))
    over = [one for one in findings if one.state == "over"]
    if over:
        names = ", ".join(f"{one.name}.{one.limit}" for one in over)
        raise SelabError(f"{file}: over budget: {names}; make the network cheaper, or raise the limit")


def diff(
    before: Annotated[Path, typer.Argument(help="A record of `selab profile` or `selab count --out`.")],
    after: Annotated[Path, typer.Argument(help="Another of equal workload, machine and baseline.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="End with status 1 if the second costs more or is shown to be slower.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Compare two records: what changed in cost, and whether the ratio to the baseline did."""
    from selab.experiments import diff as experiments_diff
    from selab.records import store
    from selab.report import checks

    records = [store.read_record(path) for path in (before, after)]
    experiments_diff.check_comparable(*records, names=(str(before), str(after)))
    if json_to is not None:
        changes = [dataclasses.asdict(one) for one in experiments_diff.ratio_changes(*records)]
        write_json(
            {"before": str(before), "after": str(after), "worse": experiments_diff.grew(*records), "ratios": changes},
            json_to,
        )
    if str(json_to) != "-":
        print_parts(checks.diff_table(*records))
    worse = experiments_diff.grew(*records)
    if strict and worse:
        raise SelabError(f"{after}: worse than {before}: {', '.join(worse)}")
