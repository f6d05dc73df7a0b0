"""Records of `selab tax`: written, read back and computed again; and what their tables and pictures say."""

import json

import msgspec
import pytest

from selab.errors import RecordError
from selab.experiments.tax_record import (
    IMPLEMENTATIONS,
    WITHOUT,
    StageTimes,
    least,
    read_tax_record,
    read_tax_records,
    save_tax_record,
    tax_path,
    words_of,
)
from selab.models import provenance
from selab.models.spec import pair_hash
from selab.records import verdict
from selab.records.types import Flag
from selab.report import pages
from selab.report import tax as report_tax
from selab.report.figures import registry, tax

RATIOS = {
    ("baseline", "plain"): 1.03,
    ("baseline", "reference"): 1.10,
    ("baseline", "torchvision"): 1.20,
    ("baseline", "timm"): 1.15,
    ("baseline", "fast"): 1.02,
    ("reference", "without_squeeze"): 0.95,
    ("reference", "without_excitation"): 0.98,
    ("reference", "without_scale"): 1.0,
    ("reference", "fast"): 1.02 / 1.10,
}
MAP_BYTES = 2 * 8 * 4 * 5 * 4
PARAMS = 2 * 8 * 2 + 8 + 2


@pytest.fixture
def record(taxed, workload):
    return taxed(RATIOS, workload=workload())


# -------------------------------------------------------------------------------------------------------------- files


def test_read_back_it_is_the_same_and_its_control_stands_once(record, tmp_path):
    path = tmp_path / "one.json"
    save_tax_record(record, path)
    assert read_tax_record(path) == record
    stored = json.loads(path.read_text())
    assert all(pair["latency"]["controls"] == [] for pair in stored["pairs"])


def test_a_network_that_failed_is_read_back_too(taxed, workload, tmp_path):
    record = taxed(RATIOS, workload=workload(), failed=("timm",))
    save_tax_record(record, tmp_path / "one.json")
    assert read_tax_record(tmp_path / "one.json") == record


def slower_control(stored):
    for quad in stored["pairs"][0]["latency"]["runs"][0]["quads"]:
        quad["floor"] = [sample * factor for sample, factor in zip(quad["floor"], (1, 1.1, 1.1, 1), strict=True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stored: stored["pairs"][2]["latency"].update(ratio=1.01),
            r"pairs\[2\] \(reference over baseline\).*ratio",
        ),
        (slower_control, r"pairs\[0\] \(again over baseline\)"),
        (lambda stored: stored.update(phase="forward_backward"), "phase forward in a record of forward_backward"),
        (lambda stored: stored.update(schema="selab.profile/1"), "another kind"),
        (lambda stored: stored.update(schema="selab.tax/2"), "measure again with `selab tax`"),
    ],
)
def test_a_record_that_cannot_be_trusted_is_refused(record, tmp_path, change, message):
    path = tmp_path / "one.json"
    save_tax_record(record, path)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(RecordError, match=message):
        read_tax_record(path)


def test_a_machine_s_folder(record, tmp_path):
    assert read_tax_records(tmp_path) == []
    for arch in ("b", "a"):
        path = tax_path(tmp_path, machine="", arch=arch, against=None, workload=record.workload.slug, phase="forward")
        save_tax_record(msgspec.structs.replace(record, arch=arch), path)
    assert [one.arch for one in read_tax_records(tmp_path)] == ["a", "b"]
    with pytest.raises(RecordError, match="not a folder"):
        read_tax_records(tmp_path / "nothing")


def test_the_folder_above_those_of_machines(record, tmp_path):
    save_tax_record(record, tmp_path / "here" / "tax" / "one.json")
    with pytest.raises(RecordError, match="its subfolders do: here"):
        read_tax_records(tmp_path)


@pytest.mark.parametrize("kind", ["tax/one.json", "accuracy/one.json", "one.json"])
def test_the_only_machine_below_is_the_one_that_is_meant(tmp_path, kind):
    assert pages.machine_folder(tmp_path) == tmp_path
    for name, meant in (("here", tmp_path / "here"), ("there", tmp_path)):
        (tmp_path / name / kind).parent.mkdir(parents=True)
        (tmp_path / name / kind).touch()
        (tmp_path / name / "sweep").mkdir()
        assert pages.machine_folder(tmp_path) == meant
    assert pages.machine_folder(tmp_path / "here") == tmp_path / "here"
    assert pages.machine_folder(tmp_path / "nothing") == tmp_path / "nothing"


def test_another_baseline_is_in_the_file_s_name(tmp_path):
    path = tax_path(tmp_path, machine="m", arch="a", against="b", workload="w", phase="forward")
    assert path == tmp_path / "m" / "tax" / "a-vs-b.w.forward.json"


# ---------------------------------------------------------------------------------------------------------- the least


@pytest.mark.parametrize(
    ("phase", "dtype", "expected"),
    [
        ("forward", "fp32", MAP_BYTES + 4 * PARAMS),
        ("forward", "bf16", MAP_BYTES // 2 + 4 * PARAMS),
        ("forward_backward", "fp32", 4 * MAP_BYTES + 3 * 4 * PARAMS),
    ],
)
def test_the_least_is_arithmetic(taxed, workload, phase, dtype, expected):
    found = least(taxed(RATIOS, workload=workload(dtype=dtype), phase=phase))
    assert found.bytes == expected
    assert found.seconds == pytest.approx(expected / 1e9)


# -------------------------------------------------------------------------------------------------------------- tables


def test_each_implementation_has_its_tax_and_the_least_stands_below(record):
    grid = report_tax.tax_tables(record)[0]
    rows = {row[0]: row for row in grid.rows}
    assert list(rows)[:3] == ["baseline", "baseline again (control)", "baseline as it is built"]
    assert rows["torchvision"][2].startswith("+20.0")
    assert rows["torchvision"][3] == "slower"
    assert all("over" not in name for name in rows)
    seconds = (MAP_BYTES + 4 * PARAMS) / 1e9
    assert rows["least (1.45 kB)"][2] == f"+{seconds / 1e-3 * 100:.2f} %"


def test_the_fast_one_over_the_reference_is_a_line_and_no_row(taxed, workload):
    notes = report_tax.tax_tables(taxed(RATIOS, workload=workload()))[0].notes
    # 1.02 / 1.10 - 1; of 40 ratios 14 lie 0.1 % below.
    assert "Time of fused over that of the reference: -7.273 % [-7.365, -7.273], in the same run." in notes
    failed = report_tax.tax_tables(taxed(RATIOS, workload=workload(), failed=("fast",)))[0].notes
    assert not any(note.startswith("Time of fused over") for note in failed)


def test_what_a_tax_is_over_is_said_alike_and_of_any_network(record):
    notes = [grid.notes[0] for grid in (report_tax.tax_tables(record)[0], *report_tax.summary_tables([record]))]
    assert all(
        note.startswith("Tax: time over the baseline's, the network without SE, which selab.fuse changed too;")
        for note in notes
    )
    # MobileNet has neither joins nor shortcuts.
    assert not any(word in note for note in report_tax.tax_tables(record)[0].notes for word in ("join", "shortcut"))


def test_what_leaving_a_stage_out_saves_is_of_the_baseline_s_time(record):
    value, (low, high) = report_tax.saving(record, "squeeze", "wall")
    assert value == pytest.approx(0.05 * 1.10, abs=2e-4)
    assert low <= value <= high
    rows = {row[0]: row[1] for row in report_tax.tax_tables(record)[1].rows}
    assert rows["squeeze"].startswith("5.5")
    assert rows["scale"].startswith("n.s.") or rows["scale"].startswith("0.0")


def removed_line(record):
    return next((note for note in report_tax.tax_tables(record)[0].notes if "fused removes" in note), None)


def test_the_share_of_the_reference_s_tax_that_is_removed(record):
    share, (low, high) = report_tax.removed(record, "wall")
    assert share == pytest.approx(1 - 0.02 / 0.10, abs=2e-3)
    # Of 40 ratios 14 lie 0.1 % below the true one, which the 13th from below and not the 13th from above is among.
    assert low == pytest.approx(1 - (1.02 - 1) / (1.10 * 0.999 - 1), abs=1e-6)
    assert high == pytest.approx(1 - (1.02 * 0.999 - 1) / (1.10 - 1), abs=1e-6)
    assert removed_line(record).startswith("fused removes 80.00 % [79.78, 81.02] of the reference overhead:")


def test_where_nothing_is_shown_to_be_removed_only_the_interval_is_told(taxed, workload):
    record = taxed({**RATIOS, ("baseline", "fast"): 1.10}, workload=workload())
    assert removed_line(record).startswith("fused removes n.s. [-")


@pytest.mark.parametrize("reference", [1.0, 0.95])
def test_of_a_tax_that_is_not_shown_no_share_is_said(taxed, workload, reference):
    record = taxed({**RATIOS, ("baseline", "reference"): reference}, workload=workload())
    assert report_tax.removed(record, "wall") is None
    assert removed_line(record).endswith("is not given: the reference overhead is not significant.")


@pytest.mark.parametrize("failed", ["reference", "fast"])
def test_without_a_result_of_both_there_is_no_line(taxed, workload, failed):
    record = taxed(RATIOS, workload=workload(), failed=(failed,))
    assert report_tax.removed(record, "wall") is None
    assert removed_line(record) is None


def test_a_fast_one_within_the_control_floor_reaches_to_it(taxed, workload):
    record = taxed({**RATIOS, ("baseline", "fast"): 1.0}, workload=workload())
    pairs = tuple(
        msgspec.structs.replace(pair, latency=msgspec.structs.replace(
            pair.latency, ratio_low=1.0001, noise_floor=0.04, verdict_kind="undecided"
        )) if (pair.baseline, pair.variant) == ("baseline", "fast") else pair
        for pair in record.pairs
    )  # fmt: skip
    share, (low, high) = report_tax.removed(msgspec.structs.replace(record, pairs=pairs), "wall")
    assert share == pytest.approx(1, abs=2e-3)
    assert (low, high) == pytest.approx((0.6, 1.4), abs=1e-2)


def test_whole_blocks_that_the_profiler_saw_are_a_line_and_no_table(record):
    times = StageTimes(total_s=2.0, stages={"whole block": 0.1})
    few = msgspec.structs.replace(record, profiled=times, implementations=("reference", "fast"))
    (grid,) = report_tax.tax_tables(few)
    assert "Of a step of the reference, as the profiler sees it, its SE blocks are 5.0 %." in grid.notes


def test_a_baseline_without_the_blocks_that_its_network_brings_along_is_its_own(record):
    bare = msgspec.structs.replace(record, baseline=provenance.bare_name(record.arch))
    assert bare.bare
    assert not record.bare
    variant, baseline = provenance.variants_of(bare)
    assert (variant.name, baseline) == ("se_small_cnn", None)
    fresh = msgspec.structs.replace(bare, facts_hash=pair_hash(variant, None))
    assert provenance.name_of(fresh) == "se_small_cnn"


def test_the_profiler_s_shares_stand_beside_the_savings(record):
    times = StageTimes(total_s=2.0, stages={"squeeze": 0.1, "excitation": 0.2, "scale": 0.3})
    grid = report_tax.tax_tables(msgspec.structs.replace(record, profiled=times))[1]
    assert [row[2] for row in grid.rows] == ["5.0 %", "10.0 %", "15.0 %", "30.0 %"]


def test_saved_bytes_are_held_against_the_baseline(record):
    sizes = {"baseline": 1000, "reference": 1200}
    grid = report_tax.tax_tables(msgspec.structs.replace(record, saved_for_backward_bytes=sizes))[-1]
    assert [row[2] for row in grid.rows] == ["+0.00 %", "+20.00 %"]


def test_networks_have_words_that_are_those_of_the_tables(record):
    first = [row[0] for row in report_tax.tax_tables(record)[0].rows]
    names = ("baseline", "again", "plain", *IMPLEMENTATIONS)
    assert [words_of(name) for name in names] == first[:-1]
    assert [words_of(name) for name in WITHOUT.values()] == [f"reference without {stage}" for stage in WITHOUT]


def test_a_network_that_failed_says_why(taxed, workload):
    record = taxed(RATIOS, workload=workload(), failed=("timm",))
    grid = report_tax.tax_tables(record)[0]
    assert ("timm", "–", "failed", "failed", "") in grid.rows
    assert "timm: failed: out of memory" in grid.notes
    (summary,) = report_tax.summary_tables([record])
    assert summary.rows[0][4] == "failed"
    assert "se_small_cnn, timm: failed: out of memory" in summary.notes


def restless(record, *, wide=(), threads=1, flags=()):
    """The same with a control of 10 %, and pairs whose interval is too wide beside it."""

    def changed(pair):
        runs = [slowed(run, 0.3 if pair.variant in wide else 0.0) for run in pair.latency.runs]
        whole = {"statistic": "floor", "threads": threads, "mode": "eval", "controls": controls}
        return msgspec.structs.replace(
            pair, latency=verdict.summarise(phase="forward", method="wall", runs=runs, **whole)
        )

    def slowed(run, share):
        quads = [
            msgspec.structs.replace(quad, floor=stretched(quad.floor, 1 + share * (index % 2)))
            for index, quad in enumerate(run.quads)
        ]
        return msgspec.structs.replace(run, quads=tuple(quads), flags=flags)

    def stretched(samples, factor):
        return tuple(sample * one for sample, one in zip(samples, (1, factor, factor, 1), strict=True))

    (control,) = record.pairs[0].latency.runs
    quads = [msgspec.structs.replace(quad, floor=stretched(quad.floor, 1.1)) for quad in control.quads]
    controls = [msgspec.structs.replace(control, quads=tuple(quads))]
    return msgspec.structs.replace(record, pairs=tuple(map(changed, record.pairs)))


def test_one_reason_for_several_pairs_is_told_once_in_the_words_of_the_rows(record):
    grid = report_tax.tax_tables(restless(record))[0]
    (why,) = [note for note in grid.notes if "too noisy: control" in note]
    assert why.startswith(
        "baseline again (control), baseline as it is built, reference, torchvision, timm, fused, "
        "reference without squeeze, reference without excitation, reference without scale, fused against the "
        "reference: too noisy: control: the baseline against itself shows"
    )
    named = [name for name in why.split(": too noisy")[0].split(", ") if not name.startswith("reference without")]
    assert set(named) - {"fused against the reference"} <= {row[0] for row in grid.rows}


def test_a_second_reason_does_not_repeat_the_first(record):
    notes = report_tax.tax_tables(restless(record, wide=("timm",)))[0].notes
    assert sum("control: the baseline against itself" in note for note in notes) == 1
    (wide,) = [note for note in notes if "the interval is" in note]
    assert wide.startswith("timm: too noisy: the interval is")


def test_reasons_that_hold_for_the_same_pairs_are_one_line(record):
    busy = restless(record, threads=2, flags=(Flag(name="contention", detail="others"),))
    notes = report_tax.tax_tables(busy)[0].notes
    (why,) = [note for note in notes if "too noisy: " in note and "figures are rough" not in note]
    assert "too noisy: control: the baseline against itself" in why
    assert "; contention while 2 threads were measured" in why


def test_records_of_another_torch_have_a_table_of_their_own(taxed, workload):
    one = taxed(RATIOS, workload=workload())
    older = msgspec.structs.replace(one.machine, libraries={**one.machine.libraries, "torch": "2.12.1"})
    grids = report_tax.summary_tables([one, msgspec.structs.replace(one, machine=older)])
    title = "The SE tax (forward, batch 2, 3×8×8, fp32, cpu"
    assert [grid.title for grid in grids] == [
        f"{title}, torch {one.machine.libraries['torch']})",
        f"{title}, torch 2.12.1)",
    ]
    elsewhere = msgspec.structs.replace(one.machine, name="another")
    grids = report_tax.summary_tables([one, msgspec.structs.replace(one, machine=elsewhere)])
    assert len(grids) == 2
    assert grids[1].title == f"{title}, another with torch {one.machine.libraries['torch']})"
    assert [len(grid.rows) for grid in grids] == [1, 1]


def test_all_records_of_a_machine_as_one_section(taxed, workload):
    records = [
        taxed(RATIOS, workload=workload()),
        taxed(RATIOS, workload=workload(), phase="forward_backward"),
        taxed(RATIOS, workload=workload(), method="graph"),
    ]
    grids = pages.named_tables("tax", {}, pages.Found(taxes=records))
    assert [grid.title for grid in grids] == [
        "The SE tax (forward, batch 2, 3×8×8, fp32, cpu)",
        "The SE tax (forward+backward, batch 2, 3×8×8, fp32, cpu)",
        "The SE tax (forward, batch 2, 3×8×8, fp32, cpu, graph)",
    ]
    assert grids[0].columns == ("", "baseline", "reference", "torchvision", "timm", "fused", "least")
    with pytest.raises(RecordError, match="`selab tax`"):
        pages.named_tables("tax", {})


# ------------------------------------------------------------------------------------------------------------- pictures


def test_bars_of_each_implementation_and_of_the_least(taxed, workload):
    record = taxed({**RATIOS, ("baseline", "fast"): 1.0}, workload=workload(), failed=("timm",))
    shown = tax.tax_bars(record)
    assert [bar.name for bar in shown.bars] == ["reference", "torchvision", "fused"]
    assert shown.bars[0].tax == pytest.approx(0.10, abs=1e-3)
    assert [(one.name, one.why) for one in shown.left_out] == [("timm", "failed")]
    assert shown.least == pytest.approx((MAP_BYTES + 4 * PARAMS) / 1e9 / 1e-3, rel=1e-3)
    drawn = registry.rendered(shown, ".svg").decode()
    assert "The SE tax of se_small_cnn" in drawn
    assert "torchvision" in drawn
    assert drawn.encode() == registry.rendered(shown, ".svg")


def test_without_a_baseline_there_is_no_picture(record):
    pairs = tuple(pair for pair in record.pairs if pair.variant != "again")
    with pytest.raises(RecordError, match="baseline was not measured"):
        tax.tax_bars(msgspec.structs.replace(record, pairs=pairs))
