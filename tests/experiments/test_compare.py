"""A comparison keeps what it has finished, and goes on from there."""

import json
from types import SimpleNamespace

import msgspec
import pytest

from selab.errors import RecordError, SelabError, SpecError
from selab.experiments import compare, trainings
from selab.experiments.job import resolve
from selab.experiments.trainings import run_all, schedule_of
from selab.models import catalog
from selab.records.store import partial_path, read_record, save
from selab.report import accuracy
from selab.training.data import synthetic_set
from selab.training.progress import TrainingProgress
from selab.training.recipe import find_recipe
from selab.training.record import Accuracy, Epoch, Options, read_accuracy_record
from selab.training.train import DivergedError, TrainingError
from selab.training.verdict import compare_verdict


@pytest.fixture(scope="module")
def data():
    return synthetic_set(train_size=256, test_size=100)


def test_a_network_needs_something_to_be_compared_with():
    with pytest.raises(SpecError, match="is a baseline itself; name both"):
        compare.pair("small_cnn", None)
    with pytest.raises(SpecError, match="compared with itself"):
        compare.pair("se_small_cnn", "se_small_cnn")
    variant, baseline = compare.pair("se_small_cnn", None)
    assert (variant.name, baseline.name) == ("se_small_cnn", "small_cnn")


class StopError(SelabError):
    pass


def small_plan(**changes):
    plain = compare.ComparisonPlan(
        variant=catalog.find("se_small_cnn"),
        baseline=catalog.find("small_cnn"),
        recipe=find_recipe("cifar_short"),
        options=Options(epochs=1, batch=64, threads=1),
        seeds=(0, 1),
        command="selab compare small_cnn se_small_cnn",
    )
    return msgspec.structs.replace(plain, **changes)


def test_a_comparison_that_is_stopped_goes_on(data, tmp_path):
    started = []

    def stop_at_third(label, state):
        if state is None:
            started.append(label)
            if len(started) == 3:
                raise StopError("enough")

    growing = compare.Comparison(small_plan(), data, out=tmp_path)
    with pytest.raises(StopError):
        run_all([growing], stop_at_third)
    partial = read_accuracy_record(partial_path(growing.path))
    assert not partial.complete
    assert [one.variant is not None for one in partial.seeds] == [True, False]

    again = compare.Comparison(small_plan(), data, out=tmp_path)
    assert again.take_over() == 1
    labels = []
    run_all([again], lambda label, state: labels.append(label) if state is None else None)
    assert labels == ["training 1 of 2 (seed 1, small_cnn)", "training 2 of 2 (seed 1, se_small_cnn)"]
    record = read_accuracy_record(again.path)
    assert record.complete
    assert not partial_path(again.path).exists()
    # What was finished before the stop is what it was.
    assert record.seeds[0] == partial.seeds[0]

    grid = accuracy.comparison_table(compare.compared(record, again.path.parents[1]))
    rows = {row[0]: row for row in grid.rows}
    assert rows["parameters"][3] == "+0.10 %"
    assert "2 seeds" in rows["top-1 accuracy"][1]
    assert len(accuracy.seeds_table(record).rows) == 2


@pytest.fixture
def pretended(monkeypatch):
    """Trainings that take no time: a list of (network, seed) that grows; those in its set `diverging` diverge."""

    class Trainings(list):
        diverging = frozenset()
        torch = "2.13"

    trained = Trainings()

    def pretend(variant, data, recipe, *, seed, folder, options, report, say, weights=None):
        trained.append((variant.name, seed))
        if (variant.name, seed) in trained.diverging:
            raise DivergedError(
                f"{variant.name}, epoch 1 of 1, step 3 of 4: the loss is nan: the training has diverged"
            )
        epoch = Epoch(
            epoch=1,
            lr=0.1,
            train_loss=2.0,
            train_top1_pct=20.0,
            test_loss=2.0,
            test_top1_pct=20.0 + seed,
            test_top5_pct=70.0,
            seconds=1.0,
            images_per_s=256.0,
        )
        test = Accuracy(images=data.test_size, top1_correct=20 + seed, top5_correct=70, loss=2.0)
        return SimpleNamespace(test=test, seconds=1.0, epochs=(epoch,), torch=trained.torch)

    monkeypatch.setattr(trainings, "train", pretend)
    return trained


def quiet(*_):
    pass


def test_a_training_that_diverges_is_a_result_and_the_others_go_on(data, tmp_path, pretended):
    pretended.diverging = {("small_cnn", 0)}
    told = []
    growing = compare.Comparison(small_plan(seeds=(0, 1, 2)), data, out=tmp_path)
    run_all([growing], quiet, told.append)
    assert pretended == [(name, seed) for seed in (0, 1, 2) for name in ("small_cnn", "se_small_cnn")]
    assert any(
        label.startswith("training 1 of 6 (seed 0, small_cnn): small_cnn, epoch 1 of 1, step 3") for label in told
    )
    record = read_accuracy_record(growing.path)
    assert record.complete
    assert record.seeds[0].baseline is None
    assert "step 3 of 4: the loss is nan" in record.seeds[0].baseline_diverged
    assert record.seeds[0].variant is not None
    # The seed whose variant came to its end says nothing about the difference.
    verdict = compare_verdict(record)
    assert verdict.score.difference.seeds == verdict.score.variant.seeds == 2
    assert verdict.diverged == "1 of 3 seeds diverged (small_cnn, seed 0)"


def test_what_has_diverged_is_not_trained_again(data, tmp_path, pretended):
    pretended.diverging = {("small_cnn", 0)}
    growing = compare.Comparison(small_plan(), data, out=tmp_path)

    def stop_at_second_seed(label, state):
        if "seed 1, small_cnn" in label:
            raise StopError("enough")

    with pytest.raises(StopError):
        run_all([growing], stop_at_second_seed)
    pretended.clear()
    again = compare.Comparison(small_plan(), data, out=tmp_path)
    assert again.take_over() == 1
    run_all([again], quiet)
    assert pretended == [("small_cnn", 1), ("se_small_cnn", 1)]


def finished(data, out, **changes):
    """Runs what is left of a comparison; its record."""
    growing = compare.Comparison(small_plan(**changes), data, out=out)
    for one in compare.left_of([growing], replace=False):
        run_all([one], quiet)
    return read_accuracy_record(growing.path)


def test_more_seeds_extend_a_record(data, tmp_path, pretended):
    pretended.diverging = {("se_small_cnn", 1)}
    first = finished(data, tmp_path, seeds=(0, 1), command="first")
    pretended.clear()
    pretended.torch = "2.14"
    said = []
    growing = compare.Comparison(small_plan(seeds=(0, 1, 2), command="second"), data, out=tmp_path)
    (left,) = compare.left_of([growing], replace=False)
    run_all([left], quiet, said.append)
    assert said[1:] == ["se_small_cnn: 2 of 3 seeds already finished"]
    assert pretended == [("small_cnn", 2), ("se_small_cnn", 2)]
    record = read_accuracy_record(growing.path)
    assert record.complete
    assert record.seeds[:2] == first.seeds
    assert (len(record.seeds), record.command) == (3, "second")
    assert record.warnings == ("not all were trained under the same version of torch: 2.13 (seed 0, 1); 2.14 (seed 2)",)


def test_an_extension_that_is_stopped_goes_on(data, tmp_path, pretended):
    def stop_at_last(label, _):
        if "seed 2, small_cnn" in label:
            raise StopError("enough")

    finished(data, tmp_path, seeds=(0,))
    growing = compare.Comparison(small_plan(seeds=(0, 1, 2)), data, out=tmp_path)
    growing.take_over()
    with pytest.raises(StopError):
        run_all([growing], stop_at_last)
    assert len(read_accuracy_record(growing.path).seeds) == 1
    pretended.clear()
    # Fewer seeds than were begun with: all of them are finished.
    assert len(finished(data, tmp_path, seeds=(0, 1)).seeds) == 2
    assert pretended == []
    assert len(finished(data, tmp_path, seeds=(0, 1, 2)).seeds) == 3
    assert pretended == [("small_cnn", 2), ("se_small_cnn", 2)]


@pytest.mark.parametrize("seeds", [(0, 1), (0,)])
def test_nothing_is_left_of_a_record_that_has_the_seeds(data, tmp_path, pretended, seeds):
    record = finished(data, tmp_path)
    growing = compare.Comparison(small_plan(seeds=seeds), data, out=tmp_path)
    assert compare.left_of([growing], replace=False) == []
    assert growing.exists
    pretended.clear()
    (again,) = compare.left_of([growing], replace=True)
    run_all([again], quiet)
    assert pretended == [(name, seed) for seed in seeds for name in ("small_cnn", "se_small_cnn")]
    assert read_accuracy_record(growing.path).seeds == record.seeds[: len(seeds)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": Options(epochs=1, batch=32, threads=1)}, "recipe.batch is 64, not 32"),
        ({"options": Options(epochs=1, batch=64, accumulate=2)}, "options.accumulate is 1, not 2"),
        ({"recipe": msgspec.structs.replace(find_recipe("cifar_short"), lr=0.3)}, "recipe.lr is 0.1, not 0.3"),
    ],
)
def test_a_record_of_another_request_is_not_extended(data, tmp_path, pretended, changes, message):
    finished(data, tmp_path)
    with pytest.raises(RecordError, match=f"exists: a comparison whose {message}; use --replace"):
        finished(data, tmp_path, seeds=(0, 1, 2), **changes)


def test_of_several_comparisons_those_that_are_finished_are_passed_over(data, tmp_path, pretended):
    finished(data, tmp_path)
    plans = [small_plan(), small_plan(variant=catalog.find("se_small_cnn+reduction=8"))]
    both = [compare.Comparison(plan, data, out=tmp_path) for plan in plans]
    assert compare.left_of(both, replace=False) == both[1:]
    assert compare.left_of(both, replace=True) == both


def test_another_error_ends_a_comparison(data, tmp_path, pretended, monkeypatch):
    def gone(*_, **__):
        raise TrainingError("another process is gone")

    monkeypatch.setattr(trainings, "train", gone)
    with pytest.raises(TrainingError, match="is gone"):
        run_all([compare.Comparison(small_plan(), data, out=tmp_path)], quiet)


def test_networks_are_timed_again_where_facts_or_torch_have_changed(data, root, tmp_path, monkeypatch):
    # Mixed precision has no profile of a step.
    growing = compare.Comparison(small_plan(options=Options(epochs=1, threads=1, amp="bf16")), data, out=tmp_path)
    there = read_record(root / "profiles" / "intel-xeon-2c" / "se_small_cnn.cpu-b1-32-fp32-held-t1.json")
    fresh = msgspec.structs.replace(there, machine=growing.machine)
    (request,) = compare.requests_of(growing.record()).values()
    path = resolve(request).path(tmp_path, growing.machine.name)

    class Timed:
        times = 0

        def __init__(self, request):
            self.path = lambda out: path
            self.record = lambda: fresh

        def run(self, report):
            Timed.times += 1

    monkeypatch.setattr(compare, "Profile", Timed)
    growing.measure(quiet)
    growing.measure(quiet)
    assert Timed.times == 1
    libraries = {**growing.machine.libraries, "torch": "1.0"}
    for changes in (
        {"facts_hash": "0" * 12},
        {"complete": False},
        {"machine": msgspec.structs.replace(growing.machine, libraries=libraries)},
    ):
        save(msgspec.structs.replace(fresh, **changes), path)
        Timed.times = 0
        growing.measure(quiet)
        growing.measure(quiet)
        assert Timed.times == 1


def test_an_unfinished_comparison_of_something_else_is_not_mixed_in(data, tmp_path):
    growing = compare.Comparison(small_plan(), data, out=tmp_path)
    partial = partial_path(growing.path)
    partial.parent.mkdir(parents=True)
    found = msgspec.to_builtins(growing.record())
    for changes, message in (
        ({"facts_hash": "0" * 12}, "facts_hash is 0{12}, not "),
        ({"recipe": {**found["recipe"], "batch": 32}}, "recipe.batch is 32, not 64; finish it with the command in it"),
        ({"options": {**found["options"], "amp": "bf16"}}, "options.amp is bf16, not off"),
    ):
        partial.write_text(json.dumps({**found, **changes}))
        with pytest.raises(RecordError, match=f"an unfinished comparison whose {message}"):
            growing.take_over()
    # What decides nothing may be another.
    options = {**found["options"], "threads": 7, "checkpoint_s": 1.0}
    partial.write_text(json.dumps({**found, "options": options, "command": "another"}))
    assert growing.take_over() == 0


def test_a_folder_is_of_one_request(data, tmp_path):
    variant, _ = compare.pair("se_small_cnn", None)
    recipe = find_recipe("cifar_short")

    def folder(seed=0, of=variant, **options):
        return compare.folder_of(of, data, recipe, Options(**options), seed, out=tmp_path)

    assert (
        folder() == folder(checkpoint_s=1.0) == folder(threads=7) == folder(fused=True) == folder(epochs=recipe.epochs)
    )
    other_facts = msgspec.structs.replace(variant, se=msgspec.structs.replace(variant.se, reduction=2))
    others = {folder(seed=1), folder(epochs=2), folder(channels_last=True), folder(batch=32), folder(of=other_facts)}
    assert len({folder(), *others}) == 6
    # A cluster's next node may be of another type.
    assert folder().parent == tmp_path / "runs"


def test_a_training_of_many_sites_has_a_folder(data, tmp_path):
    variant = catalog.find(
        "small_cnn+sites=" + "+".join(f"layer3.{block}.some.long.name.of.a.site" for block in range(41))
    )
    folder = compare.folder_of(variant, data, find_recipe("cifar_short"), Options(), 0, out=tmp_path)
    folder.mkdir(parents=True)
    assert folder.name.startswith("small_cnn+")


def test_going_on_is_said(data, tmp_path):
    """In one line, with the epoch and the folder; and that a training is already finished."""

    def stop_in_second(label, state):
        if state is not None and (state.epoch, label) == (2, "training 2 of 2 (seed 0, se_small_cnn)"):
            raise StopError("enough")

    plan = msgspec.structs.replace(small_plan(), seeds=(0,), options=Options(epochs=2, batch=128, threads=1))
    growing = compare.Comparison(plan, data, out=tmp_path)
    said = []
    with pytest.raises(StopError):
        run_all([growing], stop_in_second, said.append)
    few = "an interval worth reading needs at least 3 seeds"
    announced = f"2 trainings × 2 epochs on synthetic; {few}; Ctrl-C saves everything, the same command resumes"
    assert said == [announced]
    partial_path(growing.path).unlink()
    growing = compare.Comparison(plan, data, out=tmp_path)
    run_all([growing], lambda label, state: None, said.append)
    folders = {
        name: compare.folder_of(catalog.find(name), data, plan.recipe, plan.options, 0, out=tmp_path)
        for name in ("small_cnn", "se_small_cnn")
    }
    going_on = announced.replace("2 trainings", "1 training").replace(
        "synthetic;", "synthetic, 1 more trained already;"
    )
    assert said == [
        announced,
        going_on,
        f"training 1 of 2 (seed 0, small_cnn): already finished: {folders['small_cnn']}",
        f"training 2 of 2 (seed 0, se_small_cnn): resuming at epoch 2: {folders['se_small_cnn']}",
    ]
    growing.path.unlink()
    said.clear()
    run_all([compare.Comparison(plan, data, out=tmp_path)], lambda label, state: None, said.append, expects=None)
    assert said[0] == "2 trainings × 2 epochs on synthetic: all 2 are trained already"


def test_a_network_for_much_larger_images_is_named(data, tmp_path):
    plan = msgspec.structs.replace(small_plan(), variant=catalog.find("se_resnet18"), baseline=catalog.find("resnet18"))
    assert compare.too_small(compare.Comparison(plan, data, out=tmp_path)) == [
        f"{name}: is made for images of 224 pixels, those of synthetic have 32; `selab archs` lists networks for small "
        "images"
        for name in ("resnet18", "se_resnet18")
    ]
    assert compare.too_small(compare.Comparison(small_plan(), data, out=tmp_path)) == []


def test_how_long_it_takes_is_said_beforehand(data, tmp_path, pretended):
    plans = [small_plan(seeds=(0, 1, 2)), small_plan(variant=catalog.find("se_small_cnn+reduction=8"))]
    both = [compare.Comparison(plan, data, out=tmp_path) for plan in plans]
    labels, said = [], []
    run_all(compare.left_of(both, replace=False), lambda label, state: labels.append(label), said.append)
    # Three seeds of three networks: the second comparison has two seeds, and its baseline is that of the first.
    assert said == ["8 trainings × 1 epoch on synthetic; Ctrl-C saves everything, the same command resumes"]
    assert labels[0] == "training 1 of 8 (seed 0, small_cnn)"
    assert labels[2:] == [
        "training 3 of 8 (seed 0, se_small_cnn+reduction=8)",
        "training 4 of 8 (seed 1, small_cnn)",
        "training 5 of 8 (seed 1, se_small_cnn)",
        "training 6 of 8 (seed 1, se_small_cnn+reduction=8)",
        "training 7 of 8 (seed 2, small_cnn)",
        "training 8 of 8 (seed 2, se_small_cnn)",
    ]
    said.clear()
    run_all(compare.left_of(both, replace=False), quiet, said.append)
    assert said == []


def test_the_time_of_all_trainings_is_told_after_an_epoch(data, tmp_path):
    plan = small_plan(options=Options(epochs=4, batch=64, threads=1))
    growing = compare.Comparison(plan, data, out=tmp_path)
    schedule = schedule_of([growing])
    state = TrainingProgress(
        epoch=1, epochs=4, step=2, steps=4, images_per_s=1.0, eta_s=35.0, loss=1.0, top1_pct=1.0, last=None
    )
    first, second, third, last = schedule.pending
    schedule.begin(first)
    assert schedule.timed(first, state).total_eta_s is None
    finished = msgspec.structs.replace(state, epoch_s=10.0, eta_s=30.0)
    # This one's 30 s, and three trainings of 4 epochs; the variant is taken to be as fast.
    assert schedule.timed(first, finished).total_eta_s == 30 + 3 * 4 * 10
    schedule.end(first)
    schedule.begin(second)
    # Its first epoch is not finished: the time of its own epochs is still unknown.
    assert schedule.timed(second, state).total_eta_s is None
    slower = msgspec.structs.replace(finished, epoch_s=20.0, eta_s=60.0)
    assert schedule.timed(second, slower).total_eta_s == 60 + 4 * 10 + 4 * 20
    schedule.end(second)
    schedule.begin(third)
    assert schedule.timed(third, finished).total_eta_s == 30 + 4 * 20
    schedule.end(third)
    schedule.begin(last)
    assert schedule.timed(last, slower).total_eta_s is None, "the last one has its own time"
    assert schedule.timed(last, slower).left == "1 min left"
    assert msgspec.structs.replace(slower, total_eta_s=5820.0).left == "1 min left, 1 h 37 min for all"


@pytest.mark.parametrize(
    ("baseline", "variant", "words"),
    [
        ("small_cnn", "se_small_cnn", ""),
        ("small_cnn", "se_small_cnn+init=identity", ""),
        ("se_small_cnn", "se_small_cnn+init=identity", ""),
        ("mobilenet", "resnet18", ""),
        (
            "se_small_cnn",
            "small_cnn",
            "se_small_cnn is the baseline here, as the first name; the usual order is small_",
        ),
        ("resnet20_cifar", "se_small_cnn", "se_small_cnn: its own baseline is small_cnn, not resnet20_cifar; what is"),
        ("se_resnet18", "se_small_cnn", "se_small_cnn: its own baseline is small_cnn, not se_resnet18; what is compar"),
    ],
)
def test_what_differs_besides_blocks_is_said(baseline, variant, words):
    said = compare.unlike(*compare.pair(variant, baseline))
    assert said.startswith(words)
    assert bool(said) == bool(words)
