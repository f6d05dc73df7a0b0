"""What stands in a picture, what is left out of it and said so, and that the same data gives the same bytes."""

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import msgspec
import pytest
from fake_runs import paired_run

from selab.errors import RecordError, SelabError, UnknownNameError
from selab.experiments.compare import Compared
from selab.experiments.profiling import count_record, counted
from selab.records import verdict
from selab.report.figures import axes, curves, registry, style
from selab.report.figures import bars as report_figures_bars
from selab.report.figures import base as report_figures_base
from selab.report.figures import scatter as report_figures_scatter

SVG = "{http://www.w3.org/2000/svg}"


def latency(ratio=1.1, *, control=1.0, phase="forward"):
    return verdict.summarise(
        phase=phase,
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[paired_run(ratio)],
        controls=[paired_run(control)],
    )


def profiled(arch="se_mobilenet", *, ratio=1.1, control=1.0, **work):
    found = count_record(arch, batch=1, counters=False)
    workload = msgspec.structs.replace(found.workload, **work)
    return msgspec.structs.replace(
        found, kind="profile", workload=workload, latency={"forward": latency(ratio, control=control)}
    )


@pytest.fixture(scope="module")
def record():
    return profiled()


@pytest.fixture(scope="module")
def noisy():
    """The control is 6 % off, more than the 5 % that are allowed: no result."""
    return profiled("se_mobilenet_0_25", control=1.06)


@pytest.fixture(scope="module")
def undecided():
    """2 % slower, and the base differs from itself by 4 %."""
    return profiled("se_mobilenet_0_5", ratio=1.02, control=1.04)


PUBLISHED = """
family = "paper"
source = "this test"
builder = "nowhere:build"
input_chw = [3, 16, 16]
num_classes = 4
[variants.base]
title = "Base"
[variants.se]
title = "With SE"
baseline = "base"
[variants.se.se]
sites = "block"
bias = true
[variants.other]
title = "With SE, on other data"
baseline = "base"
[variants.other.se]
sites = "block"
bias = true
"""


def entry(variant, metric, value, where, dataset="data"):
    lines = [f"metric = {metric!r}", f"value = {value}", "source = 'a paper'", f"where = {where!r}"]
    return "\n".join([f"[[variants.{variant}.published]]", *lines, f"dataset = {dataset!r}", ""])


@pytest.fixture
def family(tmp_path):
    def write(*entries):
        path = tmp_path / "paper.toml"
        path.write_text(PUBLISHED + "".join(entry(*one) for one in entries))
        return path

    return write


# --------------------------------------------------------------------------------------------------- what stands where


def test_counted_quantities_of_the_catalog():
    needed = report_figures_scatter.costs_needed("params", "top1_error", ["se_mobilenet"])
    assert needed == ("mobilenet", "se_mobilenet")
    shown = report_figures_scatter.points("params", "top1_error", costs=counted(needed), archs=["se_mobilenet"])
    (pair,) = shown.pairs
    # 28.4 → 25.3: arXiv 1709.01507, Table 3. The parameters print as 4.2M and 4.7M there.
    assert (pair.base.y, pair.se.y) == (28.4, 25.3)
    assert (round(pair.base.x / 1e6, 1), round(pair.se.x / 1e6, 1)) == (4.2, 4.7)
    assert (pair.name, pair.family) == ("se_mobilenet", "mobilenet")
    assert shown.sources == ("Errors: arXiv 1709.01507, Table 3; ImageNet-1k val, single centre crop",)
    assert "measured" not in shown.circumstances.lower()


def test_without_names_each_base_has_one_variant():
    needed = report_figures_scatter.costs_needed("macs", "params")
    assert "se_resnet50" in needed
    assert "se_resnet50_no_bias" not in needed
    # What has no published error is not counted for a picture of it.
    assert "se_resnet18" not in report_figures_scatter.costs_needed("macs", "top1_error")
    assert report_figures_scatter.costs_needed("macs", "latency") == ()
    assert report_figures_scatter.costs_needed("top1_error", "top5_error") == ()


def test_every_counted_quantity_is_in_a_cost(record):
    for name, one in axes.AXES.items():
        if one.origin == "counted":
            shown = report_figures_scatter.points(name, "latency", records=[record])
            assert shown.pairs[0].se.x > 0


def test_measured_quantities_come_with_their_interval(record):
    (pair,) = report_figures_scatter.points("macs", "latency", records=[record]).pairs
    assert (pair.base.x, pair.se.x) == (record.baseline_cost.macs.paper, record.cost.macs.paper)
    # The baseline's median sample is 1.0001 ms.
    assert (pair.base.y, pair.se.y) == pytest.approx((1.0001e-3, 1.1e-3))
    low, high = pair.y_interval
    assert low <= pair.se.y * (1 + 1e-9)
    assert high >= pair.se.y * (1 - 1e-9)
    assert pair.x_interval is None
    assert pair.resolved


def test_tax_is_the_ratio_in_percent(record):
    (pair,) = report_figures_scatter.points("tax", "params", records=[record]).pairs
    # 1.1 / 1.0001 = 1.09989; the pairs' bounds are 1.1 / 1.0002 and 1.1 / 1.
    assert (pair.base.x, pair.se.x) == (0.0, pytest.approx(9.989, abs=1e-3))
    assert pair.x_interval == pytest.approx((9.978, 10.0), abs=1e-3)


def test_no_result_is_left_out_and_told(record, noisy):
    shown = report_figures_scatter.points("macs", "latency", records=[record, noisy])
    assert [pair.name for pair in shown.pairs] == ["se_mobilenet"]
    assert shown.left_out == (report_figures_base.LeftOut(name="se_mobilenet_0_25", why="too noisy"),)
    assert "Left out 1 of 2: too noisy (se_mobilenet_0_25)." in text_of(shown)


def test_what_is_not_resolved_is_marked(record, undecided):
    shown = report_figures_scatter.points("macs", "latency", records=[record, undecided])
    assert [pair.resolved for pair in shown.pairs] == [True, False]
    assert "with SE, n.s." in text_of(shown)
    taxed = report_figures_scatter.points("macs", "tax", records=[record, undecided])
    assert [one.name for one in taxed.left_out] == ["se_mobilenet_0_5"]


def test_both_errors_are_of_one_table(family):
    path = family(
        ("base", "top1_error_pct", 24.8, "Table 2, left"),
        ("base", "top1_error_pct", 23.3, "Table 10, original"),
        ("base", "top5_error_pct", 6.55, "Table 10, original"),
        ("se", "top1_error_pct", 22.28, "Table 10, ratio 16"),
        ("se", "top5_error_pct", 6.03, "Table 10, ratio 16"),
    )
    shown = report_figures_scatter.points("top1_error", "top5_error", archs=[f"{path}:se"])
    assert shown.pairs[0].base == report_figures_scatter.Point(x=23.3, y=6.55)
    assert shown.pairs[0].se == report_figures_scatter.Point(x=22.28, y=6.03)
    assert shown.sources == ("Errors: a paper, Table 10; data",)


def test_errors_of_two_tables_or_two_data_sets_make_no_pair(family):
    path = family(
        ("base", "top1_error_pct", 24.8, "Table 2"),
        ("base", "top5_error_pct", 7.0, "Table 3"),
        ("se", "top1_error_pct", 22.28, "Table 10"),
        ("other", "top1_error_pct", 5.0, "Table 2", "other data"),
        ("other", "top5_error_pct", 5.0, "Table 3"),
    )
    with pytest.raises(SelabError) as error:
        report_figures_scatter.points("top1_error", "top5_error", archs=[f"{path}:se", f"{path}:other"])
    assert "no top-1 error of the base published in the same table (se)" in str(error.value)
    assert "top-1 error of the base published on other data (other)" in str(error.value)


def test_pairs_of_other_data_do_not_share_the_axis(family):
    path = family(
        *(
            (name, metric, 10.0, "Table 1")
            for name in ("base", "se")
            for metric in ("top1_error_pct", "top5_error_pct")
        ),
        *((name, metric, 9.0, "Table 4", "z") for name in ("base", "other") for metric in METRICS),
    )
    shown = report_figures_scatter.points("top1_error", "top5_error", archs=[f"{path}:se", f"{path}:other"])
    assert [pair.name for pair in shown.pairs] == ["se"]
    assert shown.left_out == (report_figures_base.LeftOut(name="other", why="on z"),)


METRICS = ("top1_error_pct", "top5_error_pct")


def test_bars_show_what_the_table_shows(record, noisy, undecided):
    shown = report_figures_bars.bars([record, noisy, undecided])
    rows = {row.name: row for row in shown.rows}
    # Smallest first, as in the table.
    assert list(rows) == ["se_mobilenet_0_25", "se_mobilenet_0_5", "se_mobilenet"]
    row = rows["se_mobilenet"]
    # 571.9 M of 568.7 M MACs, 173.2 MB of 138.7 MB: +0.56 % and +24.9 %.
    assert round(row.macs * 100, 2) == 0.56
    assert round(row.bytes * 100, 1) == 24.9
    assert row.forward == pytest.approx(0.0999, abs=1e-4)
    assert (rows["se_mobilenet_0_25"].forward, rows["se_mobilenet_0_25"].interval) == (None, None)
    low, high = rows["se_mobilenet_0_5"].interval
    assert rows["se_mobilenet_0_5"].forward is None
    # 1.04 / 1.0001 against itself: what cannot be excluded reaches as far to both sides.
    assert low == pytest.approx(-0.04, abs=3e-4)
    assert high == pytest.approx(0.04, abs=3e-4)
    written = text_of(shown)
    assert {"too noisy", "+0.56 %", "added by SE (% of the base)"} <= set(written)
    assert "too noisy: no bar for 1 of 3 times; their records say why." in written


# -------------------------------------------------------------------------------------------------------- circumstances


def test_one_workload_per_picture(record):
    batch, half = profiled("se_mobilenet_0_25", batch=8), profiled("se_mobilenet_0_5")
    shown = report_figures_scatter.points("macs", "latency", records=[record, batch, half])
    assert [pair.name for pair in shown.pairs] == ["se_mobilenet", "se_mobilenet_0_5"]
    assert shown.left_out[0].why == f"measured under {batch.workload.slug}"
    assert "one thread, batch 1, 3×224×224, fp32" in shown.circumstances
    other = report_figures_scatter.points("macs", "latency", records=[record, batch], workload=batch.workload.slug)
    assert "batch 8" in other.circumstances
    slugs = " [|] ".join(sorted(one.workload.slug for one in (record, batch)))
    with pytest.raises(RecordError, match=f"--workload {slugs}"):
        report_figures_scatter.points("macs", "latency", records=[record, batch])
    with pytest.raises(UnknownNameError, match=record.workload.slug):
        report_figures_scatter.points("macs", "latency", records=[record], workload="cpu-b1-224-fp32")


def test_one_machine_per_picture(record):
    elsewhere = msgspec.structs.replace(record, machine=msgspec.structs.replace(record.machine, name="other"))
    with pytest.raises(RecordError, match="different machines"):
        report_figures_bars.bars([record, elsewhere])


def test_only_the_variants_that_were_named(record, noisy):
    assert [row.name for row in report_figures_bars.bars([record, noisy], archs=["se_mobilenet"]).rows] == [
        "se_mobilenet"
    ]
    both = report_figures_bars.bars([record], archs=["se_mobilenet", "se_resnet50"])
    assert both.left_out == (report_figures_base.LeftOut(name="se_resnet50", why="no record"),)
    with pytest.raises(RecordError, match="no record of se_resnet50; there are some of se_mobilenet"):
        report_figures_bars.bars([record], archs=["se_resnet50"])


# --------------------------------------------------------------------------------------------------------------- errors


def test_unknown_words_name_the_nearest():
    with pytest.raises(UnknownNameError, match=r"--x mac: no such quantity; did you mean macs"):
        report_figures_scatter.points("mac", "latency")
    with pytest.raises(UnknownNameError, match="plot costs: no such picture; did you mean cost"):
        registry.axes_of("costs")
    with pytest.raises(UnknownNameError, match=r"--arch mobilenet: a baseline; .*se_mobilenet"):
        report_figures_scatter.points("macs", "params", archs=["mobilenet"])
    with pytest.raises(SelabError, match="--y macs: stands on the other axis already"):
        report_figures_scatter.points("macs", "macs")
    with pytest.raises(SelabError, match="--x and --y are for cost and accuracy"):
        registry.axes_of("added", x="macs")


def test_without_records_it_says_what_to_do(record):
    for records in ([], [msgspec.structs.replace(record, kind="count")]):
        with pytest.raises(RecordError, match=r"measure with `selab profile`.*--profiles"):
            report_figures_scatter.points("macs", "latency", records=records)
        with pytest.raises(RecordError, match=r"measure with `selab profile`.*--profiles"):
            report_figures_bars.bars(records)


def test_nothing_to_draw_says_why(noisy):
    with pytest.raises(SelabError, match=r"no top-1 error published \(se_mobilenet_0_25\)"):
        report_figures_scatter.points("latency", "top1_error", records=[noisy])
    with pytest.raises(SelabError, match=r"too noisy \(se_mobilenet_0_25\)"):
        report_figures_scatter.points("latency", "macs", records=[noisy])
    with pytest.raises(SelabError, match=r"forward not measured \(se_mobilenet_0_25\)"):
        report_figures_bars.bars([msgspec.structs.replace(noisy, latency={})])


def test_the_ending_decides(tmp_path, record):
    with pytest.raises(SelabError, match=r"cost\.jpg: \.jpg; a picture ends in \.svg, \.png or \.pdf"):
        registry.check_file(tmp_path / "cost.jpg")
    shown = registry.picture("cost", records=[record])
    registry.draw(shown, tmp_path / "a" / "cost.PNG")
    assert (tmp_path / "a" / "cost.PNG").read_bytes().startswith(b"\x89PNG")
    registry.draw(shown, tmp_path / "cost.svg")
    assert ET.fromstring((tmp_path / "cost.svg").read_bytes()).tag == f"{SVG}svg"


# ------------------------------------------------------------------------------------------------------------------ ink


def text_of(shown):
    """The lines of text in the SVG, in which text is text."""
    root = ET.fromstring(registry.rendered(shown, ".svg"))
    return ["".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]


def test_a_picture_says_what_it_shows(record, noisy):
    text = text_of(report_figures_scatter.points("macs", "latency", records=[record]))
    assert {"se_mobilenet", "base", "with SE", "time of a forward pass"} <= set(text)
    assert any("batch 1, 3×224×224, fp32" in line for line in text)
    assert any(line.endswith((" µs", " ms")) for line in text)


def test_the_same_data_gives_the_same_bytes(record, noisy, undecided):
    import matplotlib

    scatter, bars = (
        report_figures_scatter.points("macs", "tax", records=[record]),
        report_figures_bars.bars([record, noisy, undecided]),
    )
    before = [registry.rendered(shown, ending) for shown in (scatter, bars) for ending in registry.ENDINGS]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        kept = dict(matplotlib.rcParams)
        after = [registry.rendered(shown, ending) for shown in (scatter, bars) for ending in registry.ENDINGS]
        assert dict(matplotlib.rcParams) == kept
    assert before == after
    assert b"<dc:date>" not in before[0]


def test_a_legend_of_families_only_where_there_are_several(record):
    one = report_figures_scatter.points("macs", "latency", records=[record])
    assert "mobilenet" not in text_of(one)
    pair = replace(one.pairs[0], name="x", family="resnet")
    assert {"mobilenet", "resnet"} <= set(text_of(replace(one, pairs=(*one.pairs, pair))))


def test_matplotlib_waits_until_something_is_drawn():
    code = (
        "import sys, selab.report.figures.registry; "
        "print([name for name in sys.modules if name in ('matplotlib', 'torch')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def grey(colour):
    """Rec. 709 luma of #rrggbb, of 255."""
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_hold_in_grey():
    fills = [grey(colour) for colour in style.FILLS.values()]
    assert all(abs(one - other) > 40 for one, other in itertools.combinations(fills, 2))
    # Markers and lines are told from the white page, and families by their shape.
    assert all(grey(colour) < 128 for colour in style.COLOURS)
    assert len(set(style.MARKERS)) == len(style.MARKERS)


# --------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "expected"),
    [
        (9e7, 3e9, True, [1e8, 2e8, 5e8, 1e9, 2e9]),
        (9e5, 2e9, True, [1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9]),
        (9e3, 2e9, True, [1e4, 1e5, 1e6, 1e7, 1e8, 1e9]),
        (25e6, 41e6, True, [26e6, 28e6, 30e6, 32e6, 34e6, 36e6, 38e6, 40e6]),
        (-0.5, 21.0, False, [0, 5, 10, 15, 20]),
        (22.25, 23.25, False, [22.4, 22.6, 22.8, 23.0, 23.2]),
    ],
)
def test_ticks_are_round(low, high, logarithmic, expected):
    assert style.ticks(low, high, logarithmic=logarithmic) == pytest.approx(expected)


def test_a_small_difference_looks_small():
    """An axis shows at least an octave, or ±10 % of its middle."""
    low, high = style.limits([3.858e9, 3.866e9], logarithmic=True, wide=True)
    assert high / low == pytest.approx(2)
    assert low < 3.858e9 < 3.866e9 < high
    low, high = style.limits([24.0, 24.1], logarithmic=False, wide=True)
    assert (low, high) == pytest.approx((24.05 * 0.9, 24.05 * 1.1))
    assert style.limits([1.0, 100.0], logarithmic=True, wide=True) == style.limits([1.0, 100.0], logarithmic=True)


def test_the_macs_of_se_resnet50_look_as_few_as_they_are():
    shown = report_figures_scatter.points(
        "macs", "top1_error", costs=counted(["resnet50", "se_resnet50"]), archs=["se_resnet50"]
    )
    drawn = report_figures_scatter.scatter_figure(shown).axes[0]
    low, high = drawn.get_xlim()
    assert high / low >= 2 - 1e-9
    labels = [tick.get_text() for tick in drawn.get_yticklabels()]
    assert len({len(label.partition(".")[2]) for label in labels}) == 1


def test_ticks_of_a_unit_have_the_same_decimals():
    assert axes.tick_labels("%", [23.5, 24.0, 24.5]) == ["23.5", "24.0", "24.5"]
    assert axes.tick_labels("", [5e8, 1e9, 2e9]) == ["500 M", "1 G", "2 G"]
    assert axes.tick_labels("", [3e9, 3.5e9]) == ["3.0 G", "3.5 G"]


def test_blocks_of_different_kinds_differ_and_are_named():
    archs = ["se_resnet18", "resnet18+block=eca,sites=residual", "resnet18+block=cbam,sites=residual"]
    costs = counted(report_figures_scatter.costs_needed("params", "macs", archs))
    shown = report_figures_scatter.points("params", "macs", costs=costs, archs=archs)
    assert [pair.block for pair in shown.pairs] == ["SE", "ECA", "CBAM"]
    looks = report_figures_scatter._looks(shown.pairs)
    assert len({colour for _, colour in looks.values()}) == 3
    assert len({marker for marker, _ in looks.values()}) == 3
    written = set(text_of(shown))
    assert {"SE", "ECA", "CBAM", "with a block"} <= written
    assert "with SE" not in written


def test_a_pdf_has_no_date(record):
    shown = registry.picture("cost", records=[record])
    found = registry.rendered(shown, ".pdf")
    assert found.startswith(b"%PDF-")
    assert b"CreationDate" not in found
    assert found == registry.rendered(shown, ".pdf")


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [("", 2e8, "200 M"), ("", 1.5e9, "1.5 G"), ("B", 1e8, "100 MB"), ("s", 0.025, "25 ms"), ("%", -5.0, "−5")],
)
def test_ticks_carry_their_prefix(unit, value, text):
    assert axes.with_unit(unit, value) == text


def test_labels_keep_apart_and_inside():
    anchors = [(50.0 + index, 50.0) for index in range(6)]
    bounds = (0.0, 0.0, 200.0, 120.0)
    boxes = style.placed(anchors, [(40.0, 10.0)] * 6, [], bounds)
    for one, other in itertools.combinations(boxes, 2):
        # Of 400: that two corners touch is no overlap that anyone sees.
        assert style._overlap(one, other) < 4
    for left, bottom, right, top in boxes:
        assert left >= 0
        assert bottom >= 0
        assert right <= 200
        assert top <= 120


def test_a_label_makes_room_for_what_is_drawn():
    marker = (45.0, 45.0, 90.0, 55.0)
    (box,) = style.placed([(50.0, 50.0)], [(30.0, 8.0)], [marker], (0.0, 0.0, 200.0, 100.0))
    assert style._overlap(box, marker) == 0


def test_learning_curves_are_means_over_the_seeds(compared_small_cnn, tmp_path):
    record = compared_small_cnn((60, 66), (66, 69), epochs=3)
    unfinished = msgspec.structs.replace(record.seeds[0], seed=2, variant=None)
    shown = curves.curves(msgspec.structs.replace(record, complete=False, seeds=(*record.seeds, unfinished)))
    base, variant = shown.curves
    assert (base.name, variant.name) == ("small_cnn", "se_small_cnn")
    assert base.mean == pytest.approx((21, 42, 63))
    assert base.low == pytest.approx((20, 40, 60))
    assert variant.high == pytest.approx((23, 46, 69))
    assert "2 seeds" in shown.circumstances
    registry.draw(shown, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert "se_small_cnn" in text
    assert registry.rendered(shown, ".svg") == registry.rendered(shown, ".svg")


def test_learning_curves_of_several_variants_share_their_baseline(compared_small_cnn, tmp_path):
    record = compared_small_cnn((60, 66), (66, 69), epochs=3)
    other = msgspec.structs.replace(compared_small_cnn((60, 66), (50, 80), epochs=3), arch="small_cnn+block=eca")
    # The second seed is finished for one of them only.
    left = msgspec.structs.replace(other.seeds[1], variant=None)
    other = msgspec.structs.replace(other, complete=False, seeds=(other.seeds[0], left))
    shown = curves.curves(record, other)
    assert [one.name for one in shown.curves] == ["small_cnn", "se_small_cnn", "small_cnn+block=eca"]
    assert [one.mean[-1] for one in shown.curves] == pytest.approx([60, 66, 50])
    assert [one.startswith("At the end: small_cnn+block=eca: ") for one in shown.notes] == [False, False, True]
    registry.draw(shown, tmp_path / "curves.svg")
    with pytest.raises(
        RecordError, match=r"the recipe of the records differs, (.*) \(se_small_cnn, .*\) and another \1 \("
    ):
        curves.curves(record, msgspec.structs.replace(other, recipe=msgspec.structs.replace(other.recipe, lr=0.5)))
    with pytest.raises(RecordError, match=r"the baseline .* differs, small_cnn \(se_small_cnn, .*\) and tiny \("):
        curves.curves(record, msgspec.structs.replace(other, baseline="tiny", baseline_facts_hash="0" * 64))
    with pytest.raises(RecordError, match="6 records; at most 5 can be told apart"):
        curves.curves(*[record] * 6)


def test_curves_need_a_finished_seed(compared_small_cnn):
    with pytest.raises(RecordError, match="no seed is finished for both networks; go on"):
        curves.curves(compared_small_cnn((), ()))


def test_curves_leave_out_seeds_that_diverged(compared_small_cnn):
    record = compared_small_cnn((60, 66), (66, 69), epochs=3)
    diverged = msgspec.structs.replace(record.seeds[0], variant=None, variant_diverged="the loss is nan")
    shown = curves.curves(msgspec.structs.replace(record, seeds=(diverged, record.seeds[1])))
    assert shown.curves[0].mean == pytest.approx((22, 44, 66))
    assert shown.notes[-1] == "1 of 2 seeds diverged (se_small_cnn, seed 0); drawn are the others."
    with pytest.raises(
        RecordError, match=r"1 of 1 seed diverged \(se_small_cnn, seed 0\); compare with another recipe"
    ):
        curves.curves(msgspec.structs.replace(record, seeds=(diverged,)))


def test_trained_accuracy_stands_against_the_time_of_one_image(compared_small_cnn):
    one = Compared(record=compared_small_cnn((60, 61, 62), (61, 62.1, 62.9)), forward=profiled("se_small_cnn"))
    shown = registry.picture("accuracy", x="latency", y="top1_error_trained", compared=[one])
    (pair,) = shown.pairs
    assert (pair.base.y, pair.se.y) == pytest.approx((39, 38))
    # Student's 4.303 times a deviation of 0.1 over the root of three seeds.
    assert pair.y_interval == pytest.approx((38 - 0.2484, 38 + 0.2484), abs=1e-3)
    assert pair.se.x > pair.base.x
    assert pair.resolved
    assert shown.circumstances.startswith("Some images; ")
    assert shown.sources[0] == "Trained: cifar_short, 10 epochs, 3 seeds"
    assert shown.sources[1].startswith("Some images is not the published set")


def test_a_difference_that_is_not_shown_is_not_resolved(compared_small_cnn):
    one = Compared(record=compared_small_cnn((60, 61, 62), (60.5, 60.5, 62.1)), forward=profiled("se_small_cnn"))
    (pair,) = report_figures_scatter.points("latency", "top1_error_trained", compared=[one]).pairs
    assert not pair.resolved


def test_trained_accuracy_needs_comparisons_and_says_what_is_missing(compared_small_cnn):
    with pytest.raises(RecordError, match="train with `selab compare`"):
        report_figures_scatter.points("macs", "top1_error_trained")
    one = Compared(record=compared_small_cnn((60, 61), (61, 62)))
    with pytest.raises(RecordError, match="of se_resnet50; there are some of se_small_cnn"):
        report_figures_scatter.points("macs", "top1_error_trained", compared=[one], archs=["se_resnet50"])
    with pytest.raises(SelabError, match=r"no record \(se_small_cnn\)"):
        report_figures_scatter.points("latency", "top1_error_trained", compared=[one])
