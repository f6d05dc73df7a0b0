"""What a sweep measures, what it takes over, skips and notes, and what it writes."""

import csv
import functools
import io
import json
import sys

import msgspec
import pytest
from fake_runs import paired_run

from selab.bench.machine import machine
from selab.cli.console import measuring_words
from selab.errors import ModelError, OutOfMemoryError, RecordError, SelabError
from selab.experiments import sweep
from selab.experiments.job import Request, resolve
from selab.experiments.profiling import Profile, count_record
from selab.experiments.schedule import effort_of
from selab.records import store, verdict
from selab.records.files import write_atomically
from selab.records.types import PHASES, from_json
from selab.report import sweep as report_sweep
from selab.report.figures import base as report_figures_base
from selab.report.figures import lines as report_figures_lines
from selab.report.figures import registry

ARCH = "se_resnet20_cifar"


@functools.cache
def counted(arch, batch, resolution):
    return count_record(arch, batch=batch, resolution=resolution, counters=False)


class Fake:
    """Measures nothing: records of a tenth more time; `faults` maps (batch, resolution) to what goes wrong."""

    def __init__(self, **faults):
        self.asked = []
        self.faults = faults.get("faults", {})

    def __call__(self, job, report):
        request = job.request
        self.asked.append(request)
        fault = self.faults.get((request.batch, request.resolution))
        if isinstance(fault, BaseException):
            raise fault
        errors = fault or {}
        processes = effort_of(request).least
        latency = {
            phase: verdict.summarise(
                phase=phase,
                method="wall",
                statistic="floor",
                threads=1,
                mode="eval",
                runs=[] if phase in errors else [paired_run(1.1)] * processes,
                controls=[] if phase in errors else [paired_run(1.0)] * processes,
                target_half_width=job.plan.target_half_width,
                error=errors.get(phase, ""),
                unit="pair" if processes == 1 else "process",
            )
            for phase in request.phases
        }
        record = counted(request.arch, request.batch, request.resolution)
        return msgspec.structs.replace(
            record, kind="profile", workload=job.workload, latency=latency, command=job.command(), machine=machine()
        )

    @property
    def sizes(self):
        return [(one.batch, one.resolution) for one in self.asked]


def grid(*, archs=(ARCH,), batches=(1, 2, 4), resolutions=(16, 32), **axes):
    """Cells measured in one process unless `axes` says more."""
    axes = {"phases": ("forward",), "quick": True, "threads": 1, "processes": 1, "held_heap": False, **axes}
    return sweep.cells(archs, resolutions, batches, **axes)


def jobs(asked):
    return [resolve(request) for request in asked]


def path_of(request, out):
    return resolve(request).path(out, machine().name)


def swept(asked, out, measure=None, **options):
    return list(sweep.sweep(jobs(asked), out, lambda *_: None, measure=measure or Fake(), **options))


def states(outcomes):
    return [one.state for one in outcomes]


# --------------------------------------------------------------------------------------------------------------- cells


def test_batches_rise_within_resolutions_within_settings():
    asked = grid(batches=(4, 1), resolutions=(32, 16), dtype=["fp32", "bf16"])
    assert [(one.dtype, one.resolution, one.batch) for one in asked] == [
        (dtype, resolution, batch) for dtype in ("fp32", "bf16") for resolution in (16, 32) for batch in (1, 4)
    ]


def test_records_lie_where_profile_puts_them(tmp_path):
    for request in grid(archs=(ARCH, f"{ARCH}+reduction=8"), resolutions=()):
        assert path_of(request, tmp_path) == Profile(resolve(request)).path(tmp_path)


def test_mistakes_of_networks_and_resolutions_are_told_before_anything_is_measured():
    asked = grid(archs=("resnet20_cifar", "se_small_cnn"), batches=(1, 2))
    base, small = sweep.resolve_cells(asked)[1]
    assert "is a baseline itself; profile its variant: --arch se_resnet20_cifar, or name" in base
    assert small.startswith("--resolution 16: se_small_cnn: ")
    assert sweep.resolve_cells(grid()) == (jobs(grid()), [])


def test_a_network_without_a_baseline_is_told_so(toy):
    (mistake,) = sweep.resolve_cells(grid(archs=(f"{toy}:toy",), batches=(1,), resolutions=()))[1]
    assert mistake.endswith(":toy: has no baseline; name what to compare with: `selab profile --baseline NAME`")


# ----------------------------------------------------------------------------------------------------------- measuring


def test_a_sweep_goes_on_where_it_was(tmp_path):
    asked = grid()
    first = Fake(faults={(4, 16): KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        swept(asked, tmp_path, first)
    second = Fake()
    outcomes = swept(asked, tmp_path, second)
    assert states(outcomes) == ["taken over"] * 2 + ["measured"] * 4
    assert second.sizes == [(4, 16), (1, 32), (2, 32), (4, 32)]
    assert len(store.read_records(tmp_path / machine().name)) == 6


@pytest.mark.parametrize("change", ["stale", "incomplete", "other torch", "wide"])
def test_what_is_not_what_was_asked_is_measured_again(tmp_path, change):
    asked = grid(batches=(1,), resolutions=(16,), quick=change != "wide")
    record = Fake()(resolve(grid(batches=(1,), resolutions=(16,))[0]), None)
    other = msgspec.structs.replace(record.machine, libraries={"torch": "0.1"})
    changes = {
        "stale": {"facts_hash": "an older one"},
        "incomplete": {"complete": False},
        "other torch": {"machine": other},
        "wide": {},
    }
    store.save(msgspec.structs.replace(record, **changes[change]), path_of(asked[0], tmp_path))
    assert states(swept(asked, tmp_path)) == ["measured"]
    assert states(swept(asked, tmp_path)) == ["taken over"]


def without_result(record, **changes):
    """The same record, its one run stopped by the budget and disturbed: its control shows a difference of 30 %."""
    old = record.latency["forward"]
    latency = verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[msgspec.structs.replace(old.runs[0], **changes)],
        controls=[paired_run(1.3)],
        target_half_width=old.target_half_width,
    )
    assert latency.verdict_kind == "no_result"
    return msgspec.structs.replace(record, latency={"forward": latency})


def test_a_longer_budget_measures_again_what_the_time_was_too_short_for(tmp_path):
    asked = grid(batches=(1,), resolutions=(16,), budget_s=2.0)
    record = without_result(Fake()(resolve(asked[0]), None), status="budget", elapsed_s=2.1)
    store.save(record, path_of(asked[0], tmp_path))
    assert states(swept(asked, tmp_path)) == ["taken over"]
    assert states(swept(grid(batches=(1,), resolutions=(16,), budget_s=9.0), tmp_path)) == ["measured"]


def test_short_runs_are_taken_over_for_no_more_than_they_are(tmp_path):
    def asked(**changes):
        return grid(batches=(1,), resolutions=(16,), **{"processes": None, **changes})

    assert states(swept(asked(), tmp_path)) == ["measured"]
    for less in ({}, {"processes": 1}, {"processes": 3}):
        assert states(swept(asked(**less), tmp_path)) == ["taken over"], less
    for more in ({"processes": 4}, {"quick": False}, {"quick": False, "thorough": True}):
        assert states(swept(asked(**more), tmp_path)) == ["measured"], more
    assert states(swept(asked(), tmp_path)) == ["taken over"]


def test_a_long_run_is_not_taken_over_for_short_ones(tmp_path):
    assert states(swept(grid(batches=(1,), resolutions=(16,)), tmp_path)) == ["measured"]
    assert states(swept(grid(batches=(1,), resolutions=(16,), processes=None), tmp_path)) == ["measured"]


def test_what_gave_no_result_is_tried_again_if_asked(tmp_path):
    asked = grid(batches=(1,), resolutions=(16,))
    store.save(without_result(Fake()(resolve(asked[0]), None)), path_of(asked[0], tmp_path))
    assert states(swept(asked, tmp_path)) == ["taken over"]
    assert states(swept(asked, tmp_path, retry=True)) == ["measured"]
    assert states(swept(asked, tmp_path, retry=True)) == ["taken over"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(selab, tmp_path):
    (tmp_path / "file").touch()
    fake = Fake()
    with pytest.raises(RecordError, match="cannot be written"):
        swept(grid(), tmp_path / "file", fake)
    assert not fake.asked
    words = ("sweep", "--arch", "se_small_cnn", "--out", tmp_path / "r", "--pictures", tmp_path / "file")
    status, _, err = selab(*words)
    assert status == 1
    assert "cannot be written" in err
    assert not (tmp_path / "r").exists()


def test_measuring_another_phase_loses_nothing(tmp_path):
    (first,) = swept(grid(batches=(1,), resolutions=(16,), quick=False, processes=3), tmp_path)
    again = Fake()
    (outcome,) = swept(grid(batches=(1,), resolutions=(16,), phases=("backward",)), tmp_path, again)
    assert again.asked[0].phases == ("backward",)
    assert list(outcome.record.latency) == ["backward"]
    kept = store.read_record(first.job.path(tmp_path, machine().name))
    assert (list(kept.latency), len(kept.latency["forward"].runs)) == (["forward"], 3)
    # Readers see one record with both phases.
    (joined,) = store.read_records(tmp_path / machine().name)
    assert list(joined.latency) == ["forward", "backward"]
    assert len(joined.latency["forward"].runs) == 3


def test_measuring_again_is_no_less_thorough(tmp_path):
    asked = grid(batches=(1,), resolutions=(16,), quick=False, processes=3)
    record = without_result(Fake()(resolve(asked[0]), None), status="budget", elapsed_s=0.1)
    store.save(record, path_of(asked[0], tmp_path))
    again = Fake()
    swept(grid(batches=(1,), resolutions=(16,), processes=4), tmp_path, again)
    assert (again.asked[0].quick, again.asked[0].processes) == (False, 4)


def test_a_record_of_all_phases_is_taken_over_for_some(tmp_path):
    whole = grid(batches=(1,), resolutions=(16,), phases=PHASES)
    some = grid(batches=(1,), resolutions=(16,))
    assert states(swept(whole, tmp_path)) == ["measured"]
    (outcome,) = swept(some, tmp_path)
    assert (outcome.state, list(outcome.record.latency)) == ("taken over", list(PHASES))
    assert path_of(whole[0], tmp_path) != path_of(some[0], tmp_path)


MEMORY = OutOfMemoryError("out of memory: no room; use a smaller --batch or --resolution")


def test_what_is_larger_than_a_cell_that_ran_out_of_memory_is_skipped(tmp_path):
    asked = grid(dtype=["fp32", "bf16"])
    fake = Fake(faults={(2, 16): MEMORY})
    outcomes = swept(asked, tmp_path, fake)
    # Of either dtype: batch 4 at 16, and batches 2 and 4 at 32.
    assert states(outcomes) == ["measured", "out of memory", "skipped", "measured", "skipped", "skipped"] * 2
    assert outcomes[2].text == "skipped: batch 2 at 16 ran out of memory"
    mark = store.failed_path(path_of(asked[1], tmp_path))
    assert json.loads(mark.read_text()) == {"reason": str(MEMORY), "command": asked[1].command()}
    assert len(store.read_records(mark.parent)) == 4


def test_marks_hold_until_they_are_forgotten(tmp_path):
    asked = grid(resolutions=(16,))
    swept(asked, tmp_path, Fake(faults={(2, 16): MEMORY}))
    fake = Fake()
    assert states(swept(asked, tmp_path, fake)) == ["taken over", "out of memory", "skipped"]
    assert fake.asked == []
    assert states(swept(asked, tmp_path, fake, retry=True)) == ["taken over", "measured", "measured"]
    assert not list(tmp_path.rglob("*.failed.json"))


def test_a_broken_mark_is_told_in_one_line(tmp_path):
    asked = grid(batches=(1,), resolutions=(16,))
    write_atomically(store.failed_path(path_of(asked[0], tmp_path)), b"{}")
    (outcome,) = swept(asked, tmp_path)
    assert (outcome.state, "remove the file" in outcome.text) == ("failed", True)


def test_a_phase_that_runs_out_of_memory_keeps_the_others(tmp_path):
    asked = grid(batches=(1, 2), resolutions=(16,), phases=("forward", "backward"))
    outcomes = swept(asked, tmp_path, Fake(faults={(1, 16): {"backward": str(MEMORY)}}))
    assert states(outcomes) == ["out of memory", "skipped"]
    assert [row["status"] for row in report_sweep.rows(outcomes)] == ["measured", "out of memory", "skipped", "skipped"]
    assert states(swept(asked, tmp_path)) == ["out of memory", "skipped"]


def test_nothing_is_kept_of_a_cell_without_a_phase(tmp_path):
    asked = grid(batches=(1,), resolutions=(16,))
    (outcome,) = swept(asked, tmp_path, Fake(faults={(1, 16): {"forward": str(MEMORY)}}))
    assert (outcome.state, outcome.record) == ("out of memory", None)
    assert [path.name.split(".", 1)[1] for path in tmp_path.rglob("*.json")] == [
        "cpu-b1-16-fp32-t1.forward.failed.json"
    ]


def test_other_failures_are_noted_and_the_sweep_goes_on(tmp_path):
    fake = Fake(faults={(2, 16): ModelError("it is broken"), (4, 16): {"forward": "a phase is broken"}})
    outcomes = swept(grid(resolutions=(16,)), tmp_path, fake)
    assert [(one.state, one.text) for one in outcomes] == [
        ("measured", ""),
        ("failed", "it is broken"),
        ("failed", "a phase is broken"),
    ]
    assert not list(tmp_path.rglob("*.failed.json"))


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Two networks at two batches and two resolutions; batch 2 at 32 ran out of memory."""
    asked = grid(archs=(ARCH, f"{ARCH}+reduction=8"), batches=(1, 2))
    return swept(asked, tmp_path_factory.mktemp("sweep"), Fake(faults={(2, 32): MEMORY}))


def test_rows_are_flat_and_complete(outcomes):
    rows = report_sweep.rows(outcomes)
    assert all(list(row) == list(report_sweep.COLUMNS) for row in rows)
    assert [row["reduction"] for row in rows] == [16] * 4 + [8] * 4
    first, lost = rows[0], rows[3]
    assert (first["baseline"], first["batch"], first["resolution"]) == ("resnet20_cifar", 1, 16)
    # The median baseline sample is 1.0001 ms.
    assert first["ratio"] == pytest.approx(1.1 / 1.0001)
    assert first["macs"] == outcomes[0].record.cost.macs.paper
    assert first["command"].startswith("selab profile --arch se_resnet20_cifar --resolution 16")
    assert (lost["status"], lost["ratio"], lost["verdict"]) == ("out of memory", None, str(MEMORY))


def test_tables_are_read_back_alike(outcomes, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = report_sweep.rows(outcomes)
    for ending in report_sweep.ENDINGS:
        assert report_sweep.write_tables(outcomes, tmp_path / f"all{ending}") == [tmp_path / f"all{ending}"]
    assert json.loads((tmp_path / "all.json").read_text()) == rows
    assert parquet.read_table(tmp_path / "all.parquet").to_pylist() == rows
    with (tmp_path / "all.csv").open() as file:
        texts = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
        assert list(csv.DictReader(file)) == texts


def test_a_column_without_values_keeps_its_type(outcomes, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    report_sweep.write_tables([one for one in outcomes if one.record is None], tmp_path / "lost.parquet")
    assert str(parquet.read_schema(tmp_path / "lost.parquet").field("ratio").type) == "double"


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SelabError, match=r"pip install 'selab\[parquet\]'"):
        report_sweep.check_table(tmp_path / "all.parquet")
    with pytest.raises(SelabError, match=r"\.txt; a table ends in \.csv, \.json, \.parquet"):
        report_sweep.check_table(tmp_path / "all.txt")


def elsewhere(one):
    return msgspec.structs.replace(one, name="elsewhere")


def test_each_machine_has_its_own_table(outcomes, tmp_path):
    moved = [
        sweep.Outcome(job=one.job, machine=elsewhere(one.machine), state=one.state, record=one.record)
        for one in outcomes
    ]
    written = report_sweep.write_tables([*outcomes, *moved], tmp_path / "all.csv")
    assert [path.name for path in written] == [f"all.{machine().name}.csv", "all.elsewhere.csv"]
    assert len(report_sweep.sweep_tables([*outcomes, *moved], jobs(grid()))) == 2


def test_the_table_shows_what_varies(outcomes):
    (shown,) = report_sweep.sweep_tables(outcomes, [one.job for one in outcomes])
    assert shown.columns == ("", "batch", "resolution", "base", "change", "verdict")
    assert shown.rows[0] == (ARCH, "1", "16", "1.000 ms", "+9.989 % [9.978, 10.000]", "slower")
    assert shown.rows[3][-1] == "out of memory"
    assert "dtype fp32" in shown.title
    assert any(str(MEMORY) in note and "2 cells" in note for note in shown.notes)


def test_off_a_terminal_there_is_a_line_for_each_cell(outcomes):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=40)
    with report_sweep.showing(console, [one.job for one in outcomes], measuring_words) as (report, tell):
        for outcome in outcomes[:2]:
            report("measuring", None)
            tell(outcome)
    assert console.file.getvalue().splitlines() == [
        "1: se_resnet20_cifar, batch 1, 3×16×16, fp32: 1.000 ms +9.989 % [9.978, 10.000] slower",
        "2: se_resnet20_cifar, batch 2, 3×16×16, fp32: 1.000 ms +9.989 % [9.978, 10.000] slower",
    ]


def test_each_of_several_phases_is_named(tmp_path):
    from rich.console import Console

    asked = grid(batches=(1,), resolutions=(16,), phases=("forward", "forward_backward"))
    console = Console(file=io.StringIO(), width=40)
    with report_sweep.showing(console, asked, measuring_words) as (_, tell):
        tell(swept(asked, tmp_path)[0])
    said = "1.000 ms +9.989 % [9.978, 10.000] slower"
    assert console.file.getvalue().endswith(f": forward {said}; forward+backward {said}\n")


def test_on_a_terminal_the_table_grows(outcomes):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    with report_sweep.showing(console, [one.job for one in outcomes], measuring_words) as (report, tell):
        before = console.file.getvalue()
        assert "slower" not in before
        tell(outcomes[0])
        assert "slower" in console.file.getvalue()
        report("cell 2", None)
        assert "cell 2" in console.file.getvalue()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_lines_leave_out_what_is_missing_and_say_so(outcomes):
    records = [one.record for one in outcomes if one.record is not None]
    missing = [report_figures_base.LeftOut(name="a cell", why="out of memory")]
    shown = report_figures_lines.tax_lines(records, "batch", missing=missing)
    assert [(line.name, line.xs) for line in shown.series] == [
        (f"{ARCH}+reduction=8, 16 px", (1.0, 2.0)),
        (f"{ARCH}+reduction=8, 32 px", (1.0,)),
        (f"{ARCH}, 16 px", (1.0, 2.0)),
        (f"{ARCH}, 32 px", (1.0,)),
    ]
    assert shown.series[0].ys == pytest.approx((9.989, 9.989), abs=1e-3)
    assert shown.series[0].intervals[0] == pytest.approx((9.978, 10.0), abs=1e-3)
    # What differs stands on the axis or beside the lines, not in what they share.
    assert "batch" not in shown.circumstances
    assert "fp32" in shown.circumstances
    text = registry.rendered(shown, ".svg").decode()
    assert "Left out 1 of 7: out of memory (a cell)." in text
    assert registry.rendered(shown, ".svg").decode() == text


def test_pictures_are_drawn_or_it_is_said_why_not(outcomes, tmp_path):
    lines = report_sweep.write_pictures(outcomes, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency_macs.svg",
        "tax_batch.svg",
        "tax_resolution.svg",
    ]
    assert all(line.startswith("picture: ") for line in lines)
    lost = [one for one in outcomes if one.record is None]
    lines = report_sweep.write_pictures(lost, tmp_path / "lost")
    assert len(lines) == 2
    assert all(line.startswith("no ") for line in lines)


def test_one_resolution_makes_no_picture_of_resolutions(outcomes, tmp_path):
    report_sweep.write_pictures([one for one in outcomes if one.job.request.resolution == 16], tmp_path)
    assert not (tmp_path / "tax_resolution.svg").exists()


# --------------------------------------------------------------------------------------------------------- the command


def test_a_grid_from_the_command_line(selab, quick_plans, tmp_path):
    networks = ["se_small_cnn", "se_small_cnn+reduction=8,gate=sigmoid"]
    words = ["sweep", "--arch", ",".join(networks), "--batch", "1,2", "--out", tmp_path / "r"]
    words += ["--table", tmp_path / "t.csv"]
    status, out, error = selab(*words)
    assert status == 0, error
    assert out.startswith("What attention adds")
    with (tmp_path / "t.csv").open() as file:
        found = [(row["arch"], row["batch"], row["status"]) for row in csv.DictReader(file)]
    assert found == [(name, batch, "measured") for name in networks for batch in "12"]
    paths = sorted((tmp_path / "r").rglob("*.json"))
    assert len(paths) == 4
    before = [path.stat().st_mtime_ns for path in paths]
    assert from_json(paths[0].read_bytes(), where="it").complete
    status, out, _ = selab(*words, "--json", "-")
    assert status == 0
    assert {row["status"] for row in json.loads(out)} == {"taken over"}
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_each_mistake_is_one_line_and_nothing_is_measured(selab, tmp_path):
    status, out, error = selab(
        *("sweep", "--arch", "se_smal_cnn,se_small_cnn", "--batch", "0,x,1", "--dtype", "fp31", "--resolution", "16"),
        *("--memory-format", "nhwc", "--out", tmp_path / "r"),
    )
    assert (status, out) == (1, "")
    lines = error.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for start in ("--arch se_smal_cnn: ", "--batch 0: ", "--batch x: ", "--dtype fp31: ", "--memory-format nhwc: "):
        assert sum(line.startswith(f"error: {start}") for line in lines) == 1
    assert not (tmp_path / "r").exists()


def test_kinds_of_blocks_and_their_options_are_axes(selab, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "sweep", functools.partial(sweep.sweep, measure=Fake(faults={})))
    words = ("sweep", "--arch", "se_small_cnn", "--out", tmp_path / "r", "--json", "-")
    status, out, error = selab(*words, "--block", "se,eca")
    assert status == 0, error
    assert [row["arch"] for row in json.loads(out)] == ["se_small_cnn+block=se", "se_small_cnn+block=eca"]
    status, out, error = selab(*words, "--gate", "sigmoid,hardsigmoid", "--reduction", "4,8")
    assert status == 0, error
    assert [(row["arch"], row["reduction"]) for row in json.loads(out)] == [
        (f"se_small_cnn+gate={gate},reduction={reduction}", reduction)
        for gate in ("sigmoid", "hardsigmoid")
        for reduction in (4, 8)
    ]
    status, _, error = selab(*words, "--block", "eca", "--reduction", "8")
    assert (status, len(error.splitlines())) == (1, 1)
    assert "reduction: unknown key" in error


def test_a_failed_cell_ends_with_status_one(selab, tmp_path, monkeypatch):
    faults = Fake(faults={(1, None): ModelError("it is broken")})
    monkeypatch.setattr(sweep, "sweep", functools.partial(sweep.sweep, measure=faults))
    status, out, error = selab("sweep", "--arch", "se_small_cnn", "--batch", "1,2", "--out", tmp_path)
    assert status == 1
    assert "it is broken" in out
    assert error.splitlines()[-1].startswith("error: 1 of 2 cells failed")
    faults.faults = {(1, None): MEMORY}
    status, _, error = selab("sweep", "--arch", "se_small_cnn", "--batch", "1", "--out", tmp_path)
    assert (status, "error: " in error) == (0, False)


def test_an_interrupted_sweep_says_how_to_go_on(selab, tmp_path, monkeypatch):
    faults = Fake(faults={(2, None): KeyboardInterrupt()})
    monkeypatch.setattr(sweep, "sweep", functools.partial(sweep.sweep, measure=faults))
    status, shown, error = selab("sweep", "--arch", "se_small_cnn", "--batch", "1,2", "--out", tmp_path)
    assert "se_small_cnn" in shown
    assert status == 130
    assert error.splitlines()[-1] == "error: interrupted; cells done: 1; the same command resumes"
    words = ("sweep", "--arch", "se_small_cnn", "--batch", "1,2", "--out", tmp_path)
    assert selab(*words, "--json", "-")[:2] == (130, "")
    assert selab(*words, "--format", "csv")[1].startswith("table,")


def test_a_request_of_a_sweep_is_that_of_profile():
    (request,) = grid(batches=(2,), resolutions=(16,), processes=None, held_heap=None)
    assert request == Request(arch=ARCH, batch=2, resolution=16, threads=1, quick=True, phases=("forward",))


def test_a_grid_takes_every_option_of_a_profile(selab, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(sweep, "sweep", functools.partial(sweep.sweep, measure=fake))
    options = ["--hold-heap", "--fused", "--compile", "--mode", "train", "--seed", 3, "--channels-last"]
    words = [
        "--arch",
        "small_cnn",
        "--baseline",
        "small_cnn",
        "--se",
        "block=eca",
        "--threads",
        "1,2",
        "--dtype",
        "bf16",
    ]
    status, out, error = selab("sweep", *words, *options, "--phase", "forward", "--out", tmp_path)
    assert status == 0, error
    asked = Request(
        arch="small_cnn+block=eca",
        baseline="small_cnn",
        held_heap=True,
        fused=True,
        compiled=True,
        mode="train",
        seed=3,
        memory_format="channels_last",
        dtype="bf16",
        quick=True,
        threads=1,
        phases=("forward",),
    )
    assert fake.asked == [asked, msgspec.structs.replace(asked, threads=2)]
    # What varies has a column.
    assert any("threads" in line.split() for line in out.splitlines()[1:4])


def test_blocks_are_inserted_at_each_reduction(selab, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(sweep, "sweep", functools.partial(sweep.sweep, measure=fake))
    words = ["--arch", "mobilenet_cifar,resnet20_cifar", "--insert", "auto", "--se", "bias=no", "--reduction", "2,4"]
    status, _, error = selab("sweep", *words, "--out", tmp_path)
    assert status == 0, error
    names = ["mobilenet_cifar", "resnet20_cifar"]
    archs = [f"{name}+bias=no,reduction={one},sites=auto" for name in names for one in (2, 4)]
    assert [one.arch for one in fake.asked] == archs
    assert error.count("auto: ") == 4
