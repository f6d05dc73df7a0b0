"""What may share a table, and what a table says about its rows."""

import msgspec
import pytest
from fake_runs import paired_run

from selab.experiments.profiling import count_record, warnings_of
from selab.models import provenance
from selab.models.catalog import find
from selab.models.spec import pair_hash
from selab.records import verdict
from selab.report import pages, profiles, published


def profiled(arch="se_mobilenet_0_25", *, ratio=1.1, baseline=None, **work):
    counted = count_record(arch, batch=1, counters=False)
    latency = verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[paired_run(ratio)],
        controls=[paired_run(1.0)],
    )
    changes = {"kind": "profile", "latency": {"forward": latency}}
    if baseline is not None:
        changes |= {"baseline": baseline, "facts_hash": pair_hash(find(arch), find(baseline))}
    return msgspec.structs.replace(counted, workload=msgspec.structs.replace(counted.workload, **work), **changes)


@pytest.fixture(scope="module")
def record():
    return profiled()


def test_a_profile_shows_base_variant_and_difference(record):
    rows = {row[0]: row[1:] for row in profiles.profile_table(record).rows}
    assert rows["parameters"] == ("470.1 k", "500.1 k", "+29.98 k", "+6.38 %")
    # The median baseline sample is 1.0001 ms: 1.1 / 1.0001 = 1.09989.
    assert rows["forward, 1 thr"] == ("1.000 ms", "1.100 ms", "+99.9 µs", "+9.989 %")


def test_a_verdict_line_for_each_latency(record):
    (line,) = profiles.verdict_lines(record)
    assert line.startswith("forward, 1 thr: slower by ")


def test_warnings_come_first(record):
    odd = msgspec.structs.replace(record.cost, unknown={"aten.fft": 2})
    (warning,) = warnings_of(odd)
    assert warning == "no counting rule for aten.fft (2 calls): not in the totals"
    warned = msgspec.structs.replace(record, warnings=(warning,))
    assert profiles.verdict_lines(warned)[0] == f"warning: {warning}"
    assert profiles.single_count_table(warned).notes == (warning,)


def test_workloads_do_not_share_a_table(record):
    others = [profiled(batch=8), profiled(mode="train"), profiled(dtype="bf16"), profiled(threads=2)]
    for grids in (profiles.latency_tables([record, *others]), profiles.added_tables([record, *others])):
        titles = [grid.title for grid in grids]
        assert len(set(titles)) == 5
        assert [len(grid.rows) for grid in grids] == [1] * 5
        assert sum("train mode" in title for title in titles) == 1


@pytest.mark.parametrize("field", ["name", "libraries"])
def test_machines_do_not_share_a_table(record, field):
    other = {"name": "elsewhere"} if field == "name" else {"libraries": {"torch": "0.1"}}
    moved = msgspec.structs.replace(record, machine=msgspec.structs.replace(record.machine, **other))
    for make in (profiles.latency_tables, profiles.added_tables):
        tables = make([record, moved])
        assert [len(table.rows) for table in tables] == [1, 1]
        places = [f"{one.machine.name} with torch {one.machine.libraries['torch']})" for one in (record, moved)]
        assert all(table.title.endswith(place) for table, place in zip(tables, places, strict=True))


def test_another_baseline_is_not_what_se_adds(record):
    other = profiled(baseline="shufflenet_0_25")
    (grid,) = profiles.added_tables([record, other])
    assert [row[0] for row in grid.rows] == ["se_mobilenet_0_25"]
    names = [row[0] for row in profiles.latency_tables([record, other])[0].rows]
    assert names == ["se_mobilenet_0_25", "se_mobilenet_0_25 against shufflenet_0_25"]


def test_changed_facts_are_stale(record):
    assert not provenance.is_stale(record)
    assert provenance.is_stale(msgspec.structs.replace(record, facts_hash="0" * 12))


def test_the_mobile_table_takes_only_the_plain_workload():
    costs = {name: count_record(name, batch=1, counters=False).cost for name in pages.costs_needed("mobile")}
    measured, batched = profiled("se_mobilenet"), profiled("se_mobilenet", batch=64)
    for records, shown in (([measured], "+9.989 % [9.978, 10.000]"), ([batched], "–"), ([], "–")):
        rows = {row[0]: row for row in published.mobile_table(costs, records).rows}
        assert rows["se_mobilenet"][4] == shown


def test_one_s_own_family_shows_its_own_published_numbers(toy):
    text = toy.read_text() + '\n[[variants.se_toy.published]]\nmetric = "top1_error_pct"\nvalue = 12.5\n'
    toy.write_text(text + 'source = "a paper"\nwhere = "Table 7"\n')
    grid = profiles.profile_table(count_record(f"{toy}:se_toy", batch=1, counters=False))
    assert ("published top-1 error", "–", "12.5 %", "–", "") in grid.rows
    assert grid.notes == ("published: a paper, Table 7",)


def test_a_report_without_measurements_shows_what_needs_none():
    costs = {name: count_record(name, batch=1, counters=False).cost for name in pages.costs_needed("report")}
    assert len(pages.named_tables("report", costs, [])) == 4
