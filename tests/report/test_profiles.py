"""What may share a table, and what a table says about its rows."""

import msgspec
import pytest
from fake_runs import paired_run

from selab.experiments.profiling import count_record, warnings_of
from selab.models import provenance
from selab.models.catalog import find
from selab.models.spec import pair_hash
from selab.records import verdict
from selab.records.flag_texts import CAUSES
from selab.records.types import Flag
from selab.report import pages, profiles, published, wording
from selab.report.table import render


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


def test_the_mobile_table_takes_only_the_plain_workload(committed_costs):
    measured, batched = profiled("se_mobilenet"), profiled("se_mobilenet", batch=64)
    for records, shown in (([measured], "+9.989 % [9.978, 10.000]"), ([batched], "–"), ([], "–")):
        rows = {row[0]: row for row in published.mobile_table(committed_costs, records).rows}
        assert rows["se_mobilenet"][4] == shown


def test_one_s_own_family_shows_its_own_published_numbers(toy):
    text = toy.read_text() + '\n[[variants.se_toy.published]]\nmetric = "top1_error_pct"\nvalue = 12.5\n'
    toy.write_text(text + 'source = "a paper"\nwhere = "Table 7"\n')
    grid = profiles.profile_table(count_record(f"{toy}:se_toy", batch=1, counters=False))
    assert ("published top-1 error", "–", "12.5 %", "–", "") in grid.rows
    assert grid.notes == ("published: a paper, Table 7",)


def test_a_report_without_measurements_shows_what_needs_none(committed_costs):
    costs = {name: committed_costs[name] for name in pages.costs_needed("report")}
    assert len(pages.named_tables("report", costs)) == 4


# ------------------------------------------------------------------------------------------------------ what is printed
def flagged(record, *names):
    """The same with these flags on its latency."""
    flags = tuple(Flag(name=name, detail=f"{name} was seen") for name in names)
    latency = msgspec.structs.replace(record.latency["forward"], flags=flags)
    return msgspec.structs.replace(record, latency={"forward": latency})


def test_each_cause_is_said_once_and_at_most_three(record):
    (_, remark) = profiles.verdict_lines(flagged(record, "contention", "neighbours", "dispersion", "outliers"))
    assert remark == CAUSES["busy"]
    causes = flagged(record, "contention", "drift", "page_faults", "order_effect", "unwatched")
    sentence, *remarks = profiles.verdict_lines(causes)
    assert sentence.startswith("forward, 1 thr: slower by ")
    assert remarks == [CAUSES["busy"], CAUSES["unsteady"], "3 more remarks: --verbose shows all."]


def test_verbose_says_everything(record):
    lines = profiles.verdict_lines(flagged(record, "contention", "drift", "page_faults", "order_effect"), verbose=True)
    assert lines[1:5] == [CAUSES[cause] for cause in ("busy", "unsteady", "allocator", "order")]
    assert lines[5:] == [
        f"flag {name}: {name} was seen" for name in ("contention", "drift", "page_faults", "order_effect")
    ]


def test_a_sentence_says_samples_per_second(record):
    (line,) = profiles.verdict_lines(record)
    # 1 / 1.0001 ms and 1 / 1.1 ms.
    assert line.endswith("; 999.9 → 909.1 samples/s")


def test_a_noisy_phase_says_its_first_reason(record):
    noisy = msgspec.structs.replace(
        record.latency["forward"],
        verdict_kind="no_result",
        verdict="no result: the interval is wide; quiet; control: no",
    )
    noisy = msgspec.structs.replace(record, latency={"forward": noisy})
    (line,) = profiles.verdict_lines(noisy)
    assert line.startswith("forward, 1 thr: too noisy: the interval is wide; 999.9")
    assert "control: no" in profiles.verdict_lines(noisy, verbose=True)[0]
    table = profiles.profile_table(noisy)
    assert {row[0]: row[4] for row in table.rows}["forward, 1 thr"] == "too noisy"
    assert table.notes[-1].startswith("too noisy: ")


def test_words_are_explained_once_where_they_stand():
    (note,) = wording.words_note([("a", "n.s. [-1.0, 2.0]"), ("b", "too noisy"), ("c", "n.s. [0.0, 1.0]")])
    assert note.startswith("n.s.: not significant")
    assert note.count("too noisy:") == 1
    assert wording.words_note([("a", "+1.0 %")]) == ()


def test_a_latency_row_is_short(record):
    (table,) = profiles.latency_tables([flagged(record, "contention", "drift", "page_faults")])
    assert table.rows[0][-1] == "slower"
    text = render([table], "rich", width=80).splitlines()
    assert len([line for line in text if "se_mobilenet_0_25" in line]) == 1
    assert len(text) < 12


def test_two_networks_in_count_have_a_difference():
    base, se = (count_record(name, batch=1, counters=False) for name in ("mobilenet_0_25", "se_mobilenet_0_25"))
    for records in ((base, se), (se, base)):
        table = profiles.count_table(records)
        assert table.columns == ("", "mobilenet_0_25", "se_mobilenet_0_25", "difference", "change")
        rows = {row[0]: row[1:] for row in table.rows}
        assert rows["parameters"] == ("470.1 k", "500.1 k", "+29.98 k", "+6.38 %")
        assert "MACs (paper's FLOPs)" in rows
    assert len(profiles.count_table([base, se, base]).rows) == 3


def test_one_network_without_a_baseline_has_no_empty_columns():
    table = profiles.single_count_table(count_record("mobilenet_0_25", batch=1, counters=False))
    assert table.columns == ("", "count")
    assert ("parameters", "470.1 k") in table.rows


def test_a_partial_record_is_marked(record):
    partial = msgspec.structs.replace(record, complete=False)
    assert [row[0] for row in profiles.latency_tables([partial])[0].rows] == ["se_mobilenet_0_25 (partial)"]
    assert profiles.profile_table(partial).title.endswith(" (partial)")


def test_mobile_networks_of_several_machines_have_a_column_each(committed_costs):
    one = profiled("se_mobilenet")
    other = msgspec.structs.replace(one, machine=msgspec.structs.replace(one.machine, name="elsewhere"))
    table = published.mobile_table(committed_costs, [one, other])
    assert [head.split(" with ")[0] for head in table.columns[4:6]] == [
        f"forward, {one.machine.name}",
        "forward, elsewhere",
    ]
    row = next(row for row in table.rows if row[0] == "se_mobilenet")
    assert row[4] == row[5] == "+9.989 % [9.978, 10.000]"


def test_a_report_names_every_machine(record):
    moved = msgspec.structs.replace(
        record, machine=msgspec.structs.replace(record.machine, cpu="Another", name="other")
    )
    text = pages.page("report", [], [record, moved])
    assert text.startswith(f"# Measured on {record.machine.gpu or record.machine.cpu} and Another\n\n- ")
    assert "\n- Another, " in text
