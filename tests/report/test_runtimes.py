"""What SE costs in other runtimes, in tables and a picture."""

import msgspec
import pytest
from fake_runs import paired_run

from selab.errors import RecordError, UnknownNameError
from selab.experiments.profiling import count_record
from selab.experiments.tax_exported import advice
from selab.experiments.tax_record import read_tax_records
from selab.records import verdict
from selab.records.consistency import mistaken_record
from selab.records.exported import Agreement, Exported, ExportedFile, Partitions
from selab.report import pages, profiles
from selab.report.exports import exported_notes, per_block
from selab.report.figures import registry
from selab.report.figures import runtimes as figures
from selab.report.runtimes import runtime_tables, spelling_tables
from selab.report.tax import summary_tables, tax_tables

COUNTED = {}


def exported(*, reorders=(9, 1), subgraphs=(None, None), same=0.5):
    files = [
        ExportedFile(bytes=size, partitions=Partitions(reorders=turns, subgraphs=parts, operators={"Conv": 3}))
        for size, turns, parts in zip((2200, 2000), reorders, subgraphs, strict=True)
    ]
    agreement = Agreement(max_absolute=0.1, max_relative=0.02, same_top_1=same, inputs="8 inputs of noise")
    return Exported(spelling="pool-conv", blocks=4, with_blocks=files[0], without_blocks=files[1], agreement=agreement)


def profiled(arch="se_small_cnn", *, ratio=1.1, scale=1.0, facts=None, **work):
    if arch not in COUNTED:
        COUNTED[arch] = count_record(arch, batch=1, counters=False)
    counted = COUNTED[arch]
    run = paired_run(ratio)
    quads = tuple(
        msgspec.structs.replace(
            quad, **{name: tuple(scale * one for one in getattr(quad, name)) for name in ("floor", "typical", "mean")}
        )
        for quad in run.quads
    )
    latency = verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[msgspec.structs.replace(run, quads=quads)],
        controls=[paired_run(1.0)],
    )
    changes = {"kind": "profile", "latency": {"forward": latency}, "exported": facts}
    return msgspec.structs.replace(counted, workload=msgspec.structs.replace(counted.workload, **work), **changes)


@pytest.fixture
def records():
    return [
        profiled(),
        profiled(runtime="onnxruntime", scale=0.5, ratio=1.2, facts=exported()),
        profiled(runtime="openvino", scale=0.25, ratio=1.3, facts=exported(reorders=(None, None)), dtype="int8"),
        profiled(runtime="executorch", scale=0.6, facts=exported(subgraphs=(7, 1)), dtype="int8", float_blocks=True),
        profiled(compiled=True, frozen=True, scale=0.7),
        # Not shown: a larger batch, weights that are not constants, and a network that was never exported.
        profiled(runtime="onnxruntime", batch=8),
        profiled(compiled=True),
        profiled("se_mobilenet_0_25"),
    ]


def test_the_fastest_runtime_stands_first(records):
    (table,) = runtime_tables(records)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["runtime"] for row in rows] == ["openvino", "onnxruntime", "executorch", "torch.compile", "torch"]
    assert [row["type"] for row in rows] == ["int8", "fp32", "int8, SE in fp32", "fp32", "fp32"]
    assert [row["parts"] for row in rows] == ["–", "+2 a block", "7 (+6)", "–", "–"]
    assert rows[0]["SE adds"].startswith("+29.98")
    assert rows[1]["base"] == "500 µs"
    assert (rows[1]["file"], rows[1]["SE adds to it"]) == ("2.20 kB", "+10.00 %")
    assert (rows[1]["error"], rows[1]["same top-1"]) == ("0.02", "50.0 %")
    assert [rows[place]["file"] for place in (3, 4)] == ["–", "–"]


def test_other_runtimes_stay_out_of_what_se_adds_in_pytorch(records):
    tables = profiles.added_tables(records)
    assert [len(table.rows) for table in tables] == [1, 1, 1, 1]
    assert not any(name in table.title for table in tables for name in ("onnxruntime", "openvino", "executorch"))


def test_the_table_by_its_name(records):
    assert pages.named_tables("runtimes", {}, pages.Found(profiles=records)) == runtime_tables(records)
    with pytest.raises(RecordError, match="no record of another runtime; use `selab profile --runtime NAME`"):
        pages.named_tables("runtimes", {}, pages.Found(profiles=records[:1]))


def test_spellings_stand_side_by_side(root):
    folder = root / "profiles" / "amd-epyc-2c"
    taxes = [one for one in read_tax_records(folder) if one.arch == "se_mobilenet"]
    (table,) = spelling_tables(taxes)
    assert table.title.startswith("What SE adds by spelling: se_mobilenet, batch 1, 3×224×224 (amd-epyc-2c)")
    assert table.columns[:3] == ("", "onnxruntime fp32", "openvino fp32")
    names = [row[0] for row in table.rows]
    assert names[:2] == ["baseline", "pool-conv"]
    assert {"mean-linear", "pool-conv-enlarged", "late blocks only"} <= set(names)
    exported = [one for one in taxes if one.workload.runtime != "torch"]
    assert len(table.columns) == 1 + len(exported)
    # Records of PyTorch compare implementations, in tables of their own.
    assert all("pool-conv" not in grid.columns for grid in summary_tables(taxes))
    assert len(summary_tables(exported)) == 0


def test_the_words_of_an_exported_pair():
    notes = exported_notes(exported())
    assert notes[0].startswith("exported: 4 SE blocks written as pool-conv; largest difference to the network in fp32")
    assert "0.02 of its output, same top-1 50.0 % (8 inputs of noise)" in notes[0]
    assert notes[1] == "each SE block: +2 changes of layout"
    assert per_block(exported(reorders=(None, None))) == ""
    assert per_block(exported(reorders=(None, None), subgraphs=(5, 1))) == "Each SE block: +1 subgraphs."


def test_the_profile_says_what_was_exported(records):
    table = profiles.profile_table(records[2])
    assert any("written as pool-conv" in note for note in table.notes)
    assert "counted in fp32, before it was quantised" in table.notes


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (msgspec.structs.replace(exported(), blocks=-1), "exported.blocks: is -1"),
        (exported(reorders=(-1, 0)), "exported.with_blocks.partitions.reorders: is -1"),
        (exported(same=1.5), "exported.agreement.same_top_1: is 1.5"),
        (
            msgspec.structs.replace(exported(), without_blocks=ExportedFile(bytes=0, partitions=Partitions())),
            "exported.without_blocks.bytes: is 0",
        ),
        (
            msgspec.structs.replace(
                exported(),
                agreement=Agreement(max_absolute=float("inf"), max_relative=0.0, same_top_1=None, inputs=""),
            ),
            "exported.agreement.max_absolute: is inf",
        ),
    ],
)
def test_a_record_with_impossible_facts(facts, said):
    assert any(wrong.startswith(said) for wrong in mistaken_record(profiled(runtime="openvino", facts=facts)))


def test_sound_facts_are_not_mistaken(records):
    for record in records:
        assert list(mistaken_record(record)) == []


# ------------------------------------------------------------------------------------------------------------- pictures
def test_the_bars_are_those_of_the_table(records, tmp_path):
    shown = figures.runtime_bars(records)
    assert [bar.name for bar in shown.bars] == [
        "openvino int8",
        "onnxruntime fp32",
        "executorch int8, SE in fp32",
        "torch.compile fp32",
        "torch fp32",
    ]
    assert shown.bars[0].tax == pytest.approx(0.3, abs=1e-3)
    assert shown.least is None
    registry.draw(registry.picture("runtimes", records=records), tmp_path / "a.svg")
    assert "openvino int8" in (tmp_path / "a.svg").read_text()


def test_what_cannot_be_drawn(records):
    with pytest.raises(UnknownNameError, match="--arch se_mobilenet_0_25: has no record of another runtime"):
        figures.runtime_bars(records, archs=["se_mobilenet_0_25"])
    with pytest.raises(RecordError, match="plot runtimes: no record of another runtime"):
        figures.runtime_bars(records[:1])
    moved = msgspec.structs.replace(records[1], machine=msgspec.structs.replace(records[1].machine, name="elsewhere"))
    with pytest.raises(RecordError, match=r"records of .* and .*; name one machine's folder"):
        figures.runtime_bars([*records, moved])


# ------------------------------------------------------------------------------------------------------------------ tax
def spelled(taxed, workload, ratios):
    names = tuple(ratios)
    pairs = {("baseline", name): ratio for name, ratio in ratios.items()}
    return taxed(pairs, workload=workload(runtime="openvino"), implementations=names, profiled=None)


def test_the_spelling_to_use(taxed, workload):
    record = spelled(taxed, workload, {"pool-conv": 1.1, "mean-conv": 1.2, "pool-conv-hardsigmoid": 1.05, "late": 1.01})
    assert advice(record) == "Spelling to use in openvino: pool-conv."
    close = spelled(taxed, workload, {"pool-conv": 1.1, "mean-conv": 1.10001})
    assert advice(close) == "Spelling to use in openvino: pool-conv; mean-conv cannot be told from it."
    assert advice(spelled(taxed, workload, {"late": 1.01})) == ""


def test_no_spelling_is_chosen_by_figures_that_may_not_be_quoted(taxed, workload, monkeypatch):
    record = spelled(taxed, workload, {"pool-conv": 1.1, "mean-conv": 1.2})
    plain = type(record).latency

    def noisy(names):
        def latency(self, name, *, method):
            found = plain(self, name, method=method)
            return msgspec.structs.replace(found, verdict_kind="no_result") if found and name in names else found

        return latency

    monkeypatch.setattr(type(record), "latency", noisy({"pool-conv"}))
    assert advice(record) == "Spelling to use in openvino: mean-conv."
    monkeypatch.setattr(type(record), "latency", noisy({"pool-conv", "mean-conv"}))
    assert advice(record).endswith("the runtime's own; these figures are too noisy to choose by.")


def test_the_tax_of_a_runtime(taxed, workload):
    record = spelled(taxed, workload, {"pool-conv": 1.1, "late": 1.01})
    table = tax_tables(record)[0]
    assert [row[0] for row in table.rows][1:4] == ["baseline again (control)", "pool-conv", "late blocks only"]
    notes = " ".join(table.notes)
    assert "in the same runtime" in notes
    assert "selab.fuse" not in notes
    assert "Spelling to use in openvino: pool-conv." in notes
