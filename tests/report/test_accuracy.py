"""What a comparison's tables say, and what its accuracies are read beside."""

from types import SimpleNamespace

import msgspec
import pytest

from selab.errors import RecordError
from selab.experiments import compare
from selab.experiments.compare import Compared
from selab.experiments.job import resolve
from selab.experiments.profiling import Profile
from selab.records.store import save
from selab.report.accuracy import accuracy_tables, comparison_table, name_of, seeds_table
from selab.report.pages import Found, named_tables
from selab.training.record import accuracy_path, save_accuracy_record

BASE = (60.0, 61.0, 62.0)
BETTER = (61.0, 62.1, 62.9)
ALIKE = (60.5, 60.5, 62.1)


def cells(grid, name):
    return dict(zip(grid.columns, next(row for row in grid.rows if row[0] == name), strict=True))


def written(record, folder):
    return save_accuracy_record(
        record,
        accuracy_path(
            folder.parent, machine=folder.name, arch=record.arch, against=None, data="d", recipe=record.recipe.name
        ),
    )


def test_a_row_says_what_se_adds_and_what_it_changes(compared_small_cnn, tmp_path):
    folder = tmp_path / "here"
    written(compared_small_cnn(BASE, BETTER), folder)
    (one,) = compare.read_compared(folder)
    grid, costs = accuracy_tables([one])
    row = cells(grid, "se_small_cnn")
    # 0.1 either side of a mean of 1, times Student's 4.303 over the root of 3.
    assert row["points"] == "+1.00 [0.75, 1.25]"
    assert row["base top-1"] == "61.0 ± 1.0 %"
    assert row["seeds"] == "3"
    assert cells(costs, "se_small_cnn")["params"] == "+0.10 %"
    assert cells(costs, "se_small_cnn")["forward"] == "–"
    assert grid.notes[-1].startswith("Some images is not the published set")


def test_nothing_shown_is_said_so(compared_small_cnn):
    grid, costs = accuracy_tables([Compared(record=compared_small_cnn(BASE, ALIKE))])
    assert cells(grid, "se_small_cnn")["points"].startswith("n.s. [")
    assert cells(costs, "se_small_cnn")["params"] == "–"
    assert any("would be needed" in note for note in grid.notes)


def diverging(record):
    """The same with a base that diverged from its first seed, and a variant from its last."""
    first, *others, last = record.seeds
    first = msgspec.structs.replace(first, baseline=None, baseline_diverged="small_cnn, epoch 1: the loss is nan")
    last = msgspec.structs.replace(last, variant=None, variant_diverged="se_small_cnn, epoch 2: the loss is inf")
    return msgspec.structs.replace(record, seeds=(first, *others, last))


def test_seeds_that_diverged_are_told_and_not_compared(compared_small_cnn):
    record = diverging(compared_small_cnn((60, 61, 62, 63, 64), (61, 62, 63.5, 64, 65)))
    told = "2 of 5 seeds diverged (small_cnn, seed 0; se_small_cnn, seed 4)"
    grid = comparison_table(Compared(record=record))
    assert f"{told}; what is compared are the seeds that both networks finished." in grid.notes
    assert any("3 of 5 seeds" in note for note in grid.notes)
    grid, _ = accuracy_tables([Compared(record=record)])
    row = cells(grid, "se_small_cnn")
    assert row["seeds"] == "3 of 5"
    assert row["points"].startswith("+1.17 [")
    assert f"se_small_cnn: {told}" in grid.notes
    rows = {row[0]: row for row in seeds_table(record).rows}
    assert rows["0"][1:4] == ("diverged", "61.00 %", "–")
    assert rows["4"][1:4] == ("64.00 %", "diverged", "–")


def test_a_comparison_of_which_nothing_is_left_has_its_table(compared_small_cnn):
    one = Compared(record=diverging(compared_small_cnn((60, 61), (61, 62))))
    assert cells(comparison_table(one), "top-1 accuracy")["difference"] == "–"
    grid, _ = accuracy_tables([one])
    assert cells(grid, "se_small_cnn")["seeds"] == "0 of 2"


def test_machines_and_data_sets_share_no_table(compared_small_cnn):
    record = compared_small_cnn(BASE, BETTER)
    other_data = msgspec.structs.replace(record, data=msgspec.structs.replace(record.data, sha256="e"))
    other_place = msgspec.structs.replace(record, machine=msgspec.structs.replace(record.machine, name="there"))
    for other, tables in ((record, 1), (other_data, 2), (other_place, 2)):
        assert len(accuracy_tables([Compared(record=record), Compared(record=other)])) == 2 * tables


def test_two_recipes_of_one_network_are_told_apart(compared_small_cnn):
    record = compared_small_cnn(BASE, BETTER)
    other = msgspec.structs.replace(
        compared_small_cnn(BASE, ALIKE), recipe=msgspec.structs.replace(record.recipe, name="mine")
    )
    grid, costs = accuracy_tables([Compared(record=one) for one in (record, other)])
    names = [f"se_small_cnn, {one.recipe.name}, {one.recipe.epochs} epochs" for one in (record, other)]
    assert [row[0] for row in grid.rows] == [row[0] for row in costs.rows] == names
    assert any(note.startswith(f"{names[1]}, top-1: no difference shown") for note in grid.notes)


def test_changed_facts_are_stale(compared_small_cnn):
    record = compared_small_cnn(BASE, BETTER)
    assert name_of(record) == "se_small_cnn"
    for field in ("facts_hash", "baseline_facts_hash"):
        assert name_of(msgspec.structs.replace(record, **{field: "0"})) == "se_small_cnn (stale)"


def test_a_network_that_is_gone_has_no_costs(compared_small_cnn, tmp_path):
    gone = msgspec.structs.replace(compared_small_cnn(BASE, BETTER), arch="se_gone")
    one = compare.compared(gone, tmp_path)
    assert one == Compared(record=gone)
    assert cells(comparison_table(one), "parameters")["difference"] == "–"


def test_what_is_timed_is_one_image_forward_and_one_batch_as_it_was_trained(compared_small_cnn):
    record = compared_small_cnn(BASE, BETTER)
    forward, step = compare.requests_of(record).values()
    assert (forward.batch, forward.threads, forward.phases) == (1, 1, ("forward",))
    assert (step.batch, step.threads, step.phases) == (128, 1, ("forward_backward",))
    options = msgspec.structs.replace(record.options, channels_last=True, accumulate=4, threads=None)
    step = compare.requests_of(msgspec.structs.replace(record, options=options))["forward_backward"]
    assert (step.batch, step.memory_format, step.threads) == (32, "channels_last", record.machine.cores)
    mixed = msgspec.structs.replace(record.options, amp="bf16")
    assert set(compare.requests_of(msgspec.structs.replace(record, options=mixed))) == {"forward"}


@pytest.mark.usefixtures("quick_plans")
def test_accuracies_stand_beside_the_profiles_of_their_machine(compared_small_cnn, tmp_path):
    record = compared_small_cnn(
        BASE, BETTER, recipe=msgspec.structs.replace(compared_small_cnn((), ()).recipe, batch=2)
    )
    for request in compare.requests_of(record).values():
        profile = Profile(resolve(request))
        profile.run(lambda *_: None)
        save(profile.record(), profile.path(tmp_path))
    one = compare.compared(record, tmp_path / record.machine.name)
    assert one.forward.workload.batch == 1
    assert one.step.workload.batch == 2
    labels = [row[0] for row in comparison_table(one).rows]
    assert {"forward, batch 1", "forward+backward, batch 2"} <= set(labels)


def test_warnings_stand_below_the_tables(compared_small_cnn):
    one = Compared(record=compared_small_cnn(BASE, BETTER, warnings=("2 of 10,000 test images could not be read",)))
    assert "2 of 10,000 test images could not be read" in comparison_table(one).notes
    grid, _ = accuracy_tables([one])
    assert "se_small_cnn: 2 of 10,000 test images could not be read" in grid.notes


def test_times_of_another_number_of_classes_are_told(compared_small_cnn, workload):
    record = compared_small_cnn(BASE, BETTER)
    profile = SimpleNamespace(latency={}, workload=workload(batch=128))
    hundred = msgspec.structs.replace(record, data=msgspec.structs.replace(record.data, num_classes=100))
    told = "se_small_cnn: times are of 10 classes, costs and accuracies of the data's 100."
    for one, notes in (
        (Compared(record=hundred, forward=profile), [told]),
        (Compared(record=hundred, step=profile), [told]),
        (Compared(record=hundred), []),
        (Compared(record=record, forward=profile), []),
    ):
        for grid in (comparison_table(one), accuracy_tables([one])[1]):
            assert [note for note in grid.notes if "times are of" in note] == notes


def test_the_table_needs_comparisons(compared_small_cnn, tmp_path):
    with pytest.raises(RecordError, match="table accuracy: no comparisons; `selab compare`"):
        named_tables("accuracy", {}, Found(compared=compare.read_compared(tmp_path)))
    found = [Compared(record=compared_small_cnn(BASE, BETTER))]
    assert len(named_tables("accuracy", {}, Found(compared=found))) == 2


def test_why_a_time_has_no_result_is_told(compared_small_cnn):
    noisy = SimpleNamespace(
        ratio=None,
        ratio_low=None,
        ratio_high=None,
        baseline_s=1.0,
        variant_s=1.1,
        verdict_kind="no_result",
        verdict="no result: only 4 pairs",
        error="",
        phase="forward",
    )
    one = Compared(record=compared_small_cnn(BASE, BETTER), forward=SimpleNamespace(latency={"forward": noisy}))
    for grid in (comparison_table(one), accuracy_tables([one])[1]):
        assert "se_small_cnn, forward: too noisy: only 4 pairs" in grid.notes


def test_a_folder_that_holds_none_is_told_from_one_that_is_not_there(compared_small_cnn, tmp_path):
    folder = tmp_path / "here"
    written(compared_small_cnn(BASE, BETTER), folder)
    with pytest.raises(RecordError, match="nowhere: not a folder"):
        compare.read_compared(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="contains no comparisons; its subfolders do: here"):
        compare.read_compared(tmp_path)
    (tmp_path / "empty").mkdir()
    assert compare.read_compared(tmp_path / "empty") == []


def test_the_shell_shows_the_table_of_a_folder(selab, compared_small_cnn, tmp_path):
    folder = tmp_path / "here"
    written(compared_small_cnn(BASE, BETTER), folder)
    status, out, _ = selab("table", "accuracy", "--profiles", folder, "--format", "markdown")
    assert status == 0
    assert "| se_small_cnn | 3 | 61.0 ± 1.0 % |" in out
    assert "Trained: cifar_short, 10 epochs, 3 seeds." in out
    status, same, _ = selab("table", "accuracy", "--profiles", tmp_path, "--format", "markdown")
    assert (status, same) == (0, out)
    written(compared_small_cnn(BASE, BETTER), tmp_path / "there")
    status, _, err = selab("table", "accuracy", "--profiles", tmp_path)
    assert status == 1
    assert "contains no comparisons" in err


def test_a_folder_of_comparisons_alone_has_tables_and_a_report(selab, compared_small_cnn, tmp_path):
    """The other folders that `compare` makes are no machine's."""
    record = compared_small_cnn(BASE, BETTER)
    written(record, tmp_path / record.machine.name)
    for name in ("runs/some", "equal-time", "tuning"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "some.json").write_text("{}")
    for name in ("accuracy", "report"):
        status, out, error = selab("table", name, "--profiles", tmp_path, "--format", "markdown")
        assert status == 0, error
        assert "| se_small_cnn | 3 |" in out
