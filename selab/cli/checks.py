"""Commands for CI: check and diff."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from selab.cli.console import (
    StoppedError,
    announce_sites,
    check_outputs,
    finds_sites,
    open_console,
    print_tables,
    reporting,
    resolve_job,
    write_json,
)
from selab.cli.options import (
    OUTPUT,
    WHAT,
    EffortOptions,
    Format,
    Json,
    WorkloadOptions,
    input_file,
    option,
    with_options,
)
from selab.errors import SelabError
from selab.experiments.job import Job, Request


@with_options
def check(
    options: WorkloadOptions,
    effort: EffortOptions,
    file: Annotated[
        Path, typer.Argument(help="A TOML file with a table budgets.NAME for each budget; - is standard input.")
    ] = Path("budgets.toml"),
    only: Annotated[
        list[str] | None,
        option("--only", WHAT, "Check only this budget. Repeatable.", metavar="NAME"),
    ] = None,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Check networks against budgets; status 1 if one is exceeded.

    Options of the workload replace the keys of that name in every budget that is checked. A budget's limits choose
    the phases, so --phase is refused.
    """
    options.reject("is chosen by the limits of a budget, such as latency_ratio_forward_backward", "phase")
    from selab.experiments import budget as experiments_budget

    check_outputs(json_to)
    changes = experiments_budget.changes_of(options.fields_of_request(), se=options.se, insert=options.insert or ())
    budgets = experiments_budget.read_budgets(input_file(file), only=only or (), changes=changes)
    from selab.experiments.profiling import sites_of
    from selab.report import checks

    def resolve(request: Request) -> Job:
        job = resolve_job(request)
        if finds_sites(job.variant):
            announce_sites(job.variant, sites_of(job))
        return job

    def show(found: Sequence[experiments_budget.Finding]) -> None:
        if str(json_to) != "-":
            print_tables([checks.check_table(found)], look)

    how: dict[str, Any] = {"effort": effort.fields_of_request(quick=True), "resolve": resolve}
    findings: list[experiments_budget.Finding] = []
    try:
        with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
            for one in experiments_budget.check(budgets, report, **how):
                findings.append(one)  # noqa: PERF402 - what was found stays when the next one is interrupted
    except KeyboardInterrupt:
        if findings:
            show(findings)
        raise StoppedError("interrupted; budgets that are not listed were not checked") from None
    if json_to is not None:
        write_json([dataclasses.asdict(one) for one in findings], json_to)
    show(findings)
    over = [one for one in findings if one.state == "over"]
    if over:
        names = ", ".join(f"{one.name}.{one.limit}" for one in over)
        raise SelabError(f"{file}: over budget: {names}; make the network cheaper, or raise the limit")


def diff(
    before: Annotated[
        Path, typer.Argument(help="A record of `selab profile` or `selab count --out`; - is standard input.")
    ],
    after: Annotated[Path, typer.Argument(help="Another, of the same workload, machine and baseline.")],
    strict: Annotated[
        bool,
        option("--strict", OUTPUT, "Exit with 1 if the second costs more or is slower."),
    ] = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Compare two records: changes of cost and of the ratio."""
    from selab.experiments import diff as experiments_diff
    from selab.records import store
    from selab.report import checks

    check_outputs(json_to)
    if str(before) == str(after) == "-":
        raise typer.BadParameter("standard input can be read once only; name a file for one of the two records")
    records = [store.read_record(input_file(path)) for path in (before, after)]
    experiments_diff.check_comparable(*records, names=(str(before), str(after)))
    worse = experiments_diff.grew(*records)
    if json_to is not None:
        changes = [dataclasses.asdict(one) for one in experiments_diff.ratio_changes(*records)]
        write_json({"before": str(before), "after": str(after), "worse": worse, "ratios": changes}, json_to)
    if str(json_to) != "-":
        print_tables([checks.diff_table(*records)], look)
    if strict and worse:
        raise SelabError(f"{after}: worse than {before}: {', '.join(worse)}")
