"""A search of learning rate and weight decay, on tiny networks."""

import json
import sys

import msgspec
import pytest
from tiny_training import FAMILY, NETWORKS, RECIPE, images

from selab.errors import RecordError, SelabError
from selab.experiments import compare, tuning
from selab.experiments.trainings import run_all
from selab.experiments.tuning import Trial, Tuning, tuned, with_values
from selab.models.catalog import find
from selab.report import accuracy
from selab.report.table import render
from selab.training.record import Options, read_accuracy_record
from selab.training.train import DivergedError
from selab.training.verdict import compare_verdict

pytest.importorskip("optuna")
SHORT = msgspec.structs.replace(RECIPE, batch=10, warmup_epochs=1.0, warmup_lr=0.005)
OPTIONS = Options(threads=1)


@pytest.fixture
def network(tmp_path):
    (tmp_path / "tiny_networks.py").write_text(NETWORKS)
    (tmp_path / "tiny.toml").write_text(FAMILY)
    yield lambda name: find(f"{tmp_path / 'tiny.toml'}:{name}")
    sys.modules.pop("tiny_networks", None)


def search(network, out, *, trials=3, epochs=1, recipe=SHORT, report=lambda *_: None, said=None):
    say = (lambda _: None) if said is None else said.append
    return tuned(network, images(), recipe, OPTIONS, trials=trials, epochs=epochs, out=out, report=report, say=say)


def recorded(out):
    (path,) = (out / "tuning").glob("*.json")
    return path, msgspec.json.decode(path.read_bytes(), type=Tuning)


def test_the_best_of_the_trials_is_taken_and_the_first_is_the_recipe(network, tmp_path):
    said = []
    found = search(network("plain"), tmp_path, said=said)
    _, record = recorded(tmp_path)
    assert [len(one.held_out_pct) for one in record.trials] == [1, 1, 1]
    assert (record.trials[0].lr, record.trials[0].weight_decay) == (SHORT.lr, SHORT.weight_decay)
    assert len({(one.lr, one.weight_decay) for one in record.trials}) == 3
    for one in record.trials:
        assert SHORT.lr / 10.001 <= one.lr <= SHORT.lr * 10.001
    best = max(record.trials, key=lambda one: one.held_out_pct[-1])
    assert (found.lr, found.weight_decay) == (best.lr, best.weight_decay)
    assert found.name == "tiny_tuned3"
    # The warm-up begins in the same proportion.
    assert found.warmup_lr / found.lr == pytest.approx(SHORT.warmup_lr / SHORT.lr)
    assert said == [f"plain: lr {best.lr:.3g}, weight decay {best.weight_decay:.3g}: best of 3 trials"]


def test_the_test_images_choose_nothing(network, tmp_path, monkeypatch):
    seen = []
    plain = tuning.train

    def train(variant, data, recipe, **more):
        seen.append((data.train_size, data.test_size, data.sha256))
        return plain(variant, data, recipe, **more)

    monkeypatch.setattr(tuning, "train", train)
    search(network("plain"), tmp_path, trials=1)
    whole = images()
    ((trains, judges, sha256),) = seen
    assert trains + judges == whole.train_size
    assert sha256 != whole.sha256


def test_a_search_goes_on_where_it_was_stopped(network, tmp_path):
    first = search(network("plain"), tmp_path, trials=2)
    labels, said = [], []
    search(network("plain"), tmp_path, trials=4, report=lambda label, _: labels.append(label), said=said)
    _, record = recorded(tmp_path)
    assert len(record.trials) == 4
    assert said[0] == "plain: 2 of 4 trials already done"
    assert labels[0].startswith("plain: trial 3 of 4 (lr ")
    # Fewer trials than there are: as many as are asked for, so that no network has more than another.
    labels.clear()
    assert search(network("plain"), tmp_path, trials=2, report=lambda label, _: labels.append(label)) == first
    assert labels == []


def test_a_recipe_outside_of_the_bounds_is_the_first_trial(network, tmp_path):
    search(network("plain"), tmp_path, trials=2, recipe=msgspec.structs.replace(SHORT, weight_decay=0.0))
    _, record = recorded(tmp_path)
    assert record.trials[0].weight_decay == 0.0
    assert record.trials[1].weight_decay >= 1e-6


def test_a_trial_that_is_behind_is_ended_early(network, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_STARTUP", 1)
    # Of equal answers none is behind: so each next one gets fewer.
    given = iter(range(90, 0, -1))
    plain = tuning.train

    def train(variant, data, recipe, *, report, **more):
        def worse(state):
            last = state.last and msgspec.structs.replace(state.last, test_top1_pct=float(next(given)))
            report(msgspec.structs.replace(state, last=last))

        return plain(variant, data, recipe, report=worse, **more)

    monkeypatch.setattr(tuning, "train", train)
    search(network("plain"), tmp_path, trials=3, epochs=3)
    _, record = recorded(tmp_path)
    assert [one.stopped for one in record.trials] == [False, True, True]
    assert record.best == record.trials[0]
    assert len(record.trials[1].held_out_pct) < 3


def test_a_trial_that_diverges_is_a_trial(network, tmp_path, monkeypatch):
    plain = tuning.train
    calls = []

    def train(*args, **more):
        calls.append(args)
        if len(calls) == 1:
            raise DivergedError("it diverged")
        return plain(*args, **more)

    monkeypatch.setattr(tuning, "train", train)
    found = search(network("plain"), tmp_path, trials=2)
    _, record = recorded(tmp_path)
    assert record.trials[0].held_out_pct == ()
    assert found.lr == record.trials[1].lr


def test_where_every_trial_diverges_nothing_is_tuned(network, tmp_path, monkeypatch):
    def train(*_, **__):
        raise DivergedError("it diverged")

    monkeypatch.setattr(tuning, "train", train)
    with pytest.raises(SelabError, match="plain: none of 2 trials was finished: all diverged or were ended early"):
        search(network("plain"), tmp_path, trials=2)
    assert len(recorded(tmp_path)[1].trials) == 2


def test_a_broken_search_is_one_line(network, tmp_path):
    search(network("plain"), tmp_path, trials=1)
    path, record = recorded(tmp_path)
    path.write_text("{")
    with pytest.raises(RecordError, match=r"plain.*\.json: .*delete it"):
        search(network("plain"), tmp_path, trials=1)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, data_sha256="1" * 64)))
    with pytest.raises(RecordError, match="is a search of another network or other images; delete it"):
        search(network("plain"), tmp_path, trials=1)


def test_each_network_is_trained_at_its_best(network, tmp_path):
    own = {name: with_values(SHORT, Trial(lr=lr, weight_decay=1e-4), trials=5)
           for name, lr in (("plain", 0.01), ("se_plain", 0.03))}  # fmt: skip
    common = {"variant": network("se_plain"), "baseline": network("plain"), "options": Options(threads=1, epochs=1),
              "seeds": (0, 1, 2), "command": "selab compare …"}  # fmt: skip
    ways = ({"recipe": SHORT}, {"recipe": own["plain"], "variant_recipe": own["se_plain"]})
    both = [compare.Comparison(compare.ComparisonPlan(**common, **way), images(), out=tmp_path) for way in ways]
    labels = []
    left = compare.left_of(both, replace=False)
    said = []
    run_all(left, lambda label, state: state or labels.append(label), said.append, expects=lambda *_: 7.0)
    # Six trainings in the one recipe, six at the networks' own values.
    assert said[0].startswith("12 trainings × 1 epoch on tiny, about 1 min by a few steps of each; ")
    assert labels[-1] == "training 12 of 12 (seed 2, se_plain, tiny_tuned5)"
    assert both[0].path != both[1].path
    records = [read_accuracy_record(one.path) for one in both]
    assert [one.variant_recipe and one.variant_recipe.lr for one in records] == [None, 0.03]
    lrs = [[one.seeds[0].baseline.epochs[0].lr, one.seeds[0].variant.epochs[0].lr] for one in records]
    assert lrs[1][1] / lrs[1][0] == pytest.approx(3)
    shown = " ".join(
        render([accuracy.comparison_table(compare.compared(records[1], tmp_path / "m"))], "markdown").split()
    )
    best = "Each network at its best (learning rate and weight decay: best of 5 trials): "
    assert f"{best}plain with a learning rate of 0.01" in shown
    (sentence,) = accuracy.both_ways(records)
    assert sentence.startswith("se_plain against plain, same recipe: ")
    assert "; each at its best: " in sentence
    # In a table of both, each has a row of its own, and says that nothing is shown if so.
    bought, costs = accuracy.accuracy_tables([compare.compared(one, tmp_path / "m") for one in records])
    names = ["se_plain", "se_plain, each at its best"]
    assert [row[0] for row in bought.rows] == [row[0] for row in costs.rows] == names
    said = [note.partition(", top-1:")[0] for note in bought.notes if ", top-1: " in note]
    kinds = [compare_verdict(one).score.difference.kind for one in records]
    assert said == [name for name, kind in zip(names, kinds, strict=True) if kind not in ("better", "worse")]
    assert sum("each at its best: Each network at its best (" in note for note in bought.notes) == 1
    # More trials make a comparison of their own; another pair of values under one name is refused.
    more = with_values(SHORT, Trial(lr=0.02, weight_decay=1e-4), trials=6)
    after = compare.ComparisonPlan(**common, recipe=more, variant_recipe=more)
    assert compare.Comparison(after, images(), out=tmp_path).path != both[1].path
    other = compare.ComparisonPlan(**common, recipe=own["plain"], variant_recipe=own["plain"])
    with pytest.raises(RecordError, match=r"exists: a comparison whose variant_recipe.lr is 0.03, not 0.01"):
        compare.Comparison(other, images(), out=tmp_path).take_over()
    assert json.loads(both[0].path.read_text())["variant_recipe"] is None


def test_the_search_is_announced_with_its_time():
    said = tuning.searching([90.0, 150.0], 10, 2)
    assert said.startswith(
        "--tune: 10 trials × 2 epochs of each of 2 networks, one after the other, about 40 min at most;"
    )
    assert "about" not in tuning.searching([90.0, None], 10, 2)
