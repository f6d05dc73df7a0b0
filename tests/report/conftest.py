"""Every table that committed records and the catalog give, without counting or measuring."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from selab.experiments.compare import read_compared
from selab.experiments.diff import check_comparable
from selab.experiments.tax_record import read_tax_records
from selab.models.catalog import installed
from selab.records import store
from selab.records.types import Cost, Record
from selab.report import accuracy, checks, networks, pages, profiles, tax
from selab.report.table import Table


def folders(root: Path) -> list[Path]:
    """The machines' folders."""
    return sorted(folder for folder in (root / "profiles").iterdir() if any(folder.glob("*.json")))


def all_tables(root: Path, costs: dict[str, Cost]) -> Iterator[Table]:
    """Tables of the catalog, then of each machine."""
    for name in pages.COST_TABLES:
        yield from pages.named_tables(name, costs)
    for variant in installed().values():
        yield networks.facts_table(variant)
        yield networks.published_table(variant)
    for folder in folders(root):
        records = store.read_records(folder)
        yield from _of_machine(folder, records, costs)
        for record in records:
            yield from _of_record(record)


def _of_machine(folder: Path, records: list[Record], costs: dict[str, Cost]) -> Iterator[Table]:
    yield from pages.named_tables("mobile", costs, pages.Found(profiles=records))
    yield from pages.named_tables("added", {}, pages.Found(profiles=records))
    yield from pages.named_tables("latency", {}, pages.Found(profiles=records))
    yield from pages.acceptance_tables(store.read_acceptance(folder))
    if taxes := read_tax_records(folder):
        yield from pages.named_tables("tax", {}, pages.Found(taxes=taxes))
        for one in taxes:
            yield from tax.tax_tables(one)
    if (folder / "accuracy").is_dir():
        compared = read_compared(folder)
        yield from pages.named_tables("accuracy", {}, pages.Found(compared=compared))
        for beside in compared:
            yield accuracy.comparison_table(beside)
            yield accuracy.seeds_table(beside.record)


def _of_record(record: Record) -> Iterator[Table]:
    yield profiles.profile_table(record)
    yield profiles.single_count_table(record)
    yield profiles.count_table([record])
    yield profiles.counters_table(record.cost)
    yield profiles.share_table(record, "operator")
    if record.cost.se.blocks:
        yield profiles.stage_table(record.cost)
    if record.insertions:
        yield networks.sites_table(record.insertions)
    check_comparable(record, record, names=("before", "after"))
    yield checks.diff_table(record, record)


@pytest.fixture(scope="session")
def tables(root, committed_costs):
    """All of them."""
    return list(all_tables(root, committed_costs))
