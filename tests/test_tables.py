"""What may share a table, and what a table says about its rows."""

import msgspec
import pytest

from selab import pages, tables, verdict
from selab.catalog import find
from selab.errors import RecordError
from selab.profiling import count_record, warnings_of
from selab.record import Quad, Run
from selab.spec import pair_hash


def run(ratio):
    """Twenty pairs of 1 ms against `ratio` ms with a little noise."""
    quads = []
    for index in range(10):
        base, other = 1e-3 * (1 + 1e-4 * (index % 3)), ratio * 1e-3
        four = (base, other, other, base)
        quads.append(Quad(order="ABBA", floor=four, typical=four, mean=four))
    return Run(
        calls_per_sample=1,
        warmup_calls=10,
        warmup_s=1.0,
        seed=0,
        steady=True,
        status="converged",
        elapsed_s=1.0,
        quads=tuple(quads),
    )


def profiled(arch="se_mobilenet_0_25", *, ratio=1.1, baseline=None, **work):
    counted = count_record(arch, batch=1, counters=False)
    latency = verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[run(ratio)],
        controls=[run(1.0)],
    )
    changes = {"kind": "profile", "latency": {"forward": latency}}
    if baseline is not None:
        changes |= {"baseline": baseline, "facts_hash": pair_hash(find(arch), find(baseline))}
    return msgspec.structs.replace(counted, workload=msgspec.structs.replace(counted.workload, **work), **changes)


@pytest.fixture(scope="module")
def record():
    return profiled()


def test_a_profile_shows_base_variant_and_difference(record):
    rows = {row[0]: row[1:] for row in tables.profile_grid(record).rows}
    assert rows["parameters"] == ("470.1 k", "500.1 k", "+29.98 k", "+6.38 %")
    # The median baseline sample is 1.0001 ms: 1.1 / 1.0001 = 1.09989.
    assert rows["forward, 1 thr"] == ("1.000 ms", "1.100 ms", "+99.9 µs", "+9.989 %")


def test_a_verdict_line_for_each_latency(record):
    (line,) = tables.verdict_lines(record)
    assert line.startswith("forward, 1 thr: slower by ")


def test_warnings_come_first(record):
    odd = msgspec.structs.replace(record.cost, unknown={"aten.fft": 2})
    (warning,) = warnings_of(odd)
    assert warning == "no counting rule for aten.fft (2 calls): not in the totals"
    warned = msgspec.structs.replace(record, warnings=(warning,))
    assert tables.verdict_lines(warned)[0] == f"warning: {warning}"
    assert tables.single_count_grid(warned).notes == (warning,)


def test_workloads_do_not_share_a_table(record):
    others = [profiled(batch=8), profiled(mode="train"), profiled(dtype="bf16"), profiled(threads=2)]
    for grids in (tables.latency_grids([record, *others]), tables.added_grids([record, *others])):
        titles = [grid.title for grid in grids]
        assert len(set(titles)) == 5
        assert [len(grid.rows) for grid in grids] == [1] * 5
        assert sum("train mode" in title for title in titles) == 1


@pytest.mark.parametrize("field", ["name", "libraries"])
def test_machines_do_not_share_a_table(record, field):
    other = {"name": "elsewhere"} if field == "name" else {"libraries": {"torch": "0.1"}}
    moved = msgspec.structs.replace(record, machine=msgspec.structs.replace(record.machine, **other))
    for make in (tables.latency_grids, tables.added_grids):
        with pytest.raises(RecordError, match="different machines do not share a table"):
            make([record, moved])


def test_another_baseline_is_not_what_se_adds(record):
    other = profiled(baseline="shufflenet_0_25")
    (grid,) = tables.added_grids([record, other])
    assert [row[0] for row in grid.rows] == ["se_mobilenet_0_25"]
    names = [row[0] for row in tables.latency_grids([record, other])[0].rows]
    assert names == ["se_mobilenet_0_25", "se_mobilenet_0_25 against shufflenet_0_25"]


def test_changed_facts_are_stale(record):
    assert not tables.is_stale(record)
    assert tables.is_stale(msgspec.structs.replace(record, facts_hash="0" * 12))


def test_the_mobile_table_takes_only_the_plain_workload():
    costs = {name: count_record(name, batch=1, counters=False).cost for name in pages.costs_needed("mobile")}
    measured, batched = profiled("se_mobilenet"), profiled("se_mobilenet", batch=64)
    for records, shown in (([measured], "+9.989 % [9.978, 10.000]"), ([batched], "–"), ([], "–")):
        rows = {row[0]: row for row in tables.mobile_grid(costs, records).rows}
        assert rows["se_mobilenet"][4] == shown


def test_one_s_own_family_shows_its_own_published_numbers(toy):
    text = toy.read_text() + '\n[[variants.se_toy.published]]\nmetric = "top1_error_pct"\nvalue = 12.5\n'
    toy.write_text(text + 'source = "a paper"\nwhere = "Table 7"\n')
    grid = tables.profile_grid(count_record(f"{toy}:se_toy", batch=1, counters=False))
    assert ("published top-1 error", "–", "12.5 %", "–", "") in grid.rows
    assert grid.notes == ("published: a paper, Table 7",)


def test_a_report_without_measurements_shows_what_needs_none():
    costs = {name: count_record(name, batch=1, counters=False).cost for name in pages.costs_needed("report")}
    assert len(pages.named_grids("report", costs, [])) == 4
