"""A placement from the first count to the last training, on tiny networks; times are made up."""

import json
import shutil
import sys

import msgspec
import pytest
import torch
from resizable import FAMILY, NETWORKS, latency_of
from tiny_training import RECIPE, images

from selab.errors import SelabError
from selab.experiments import placing
from selab.experiments.candidates import dearest, ratio_of, repeats, shapes, sites_of, widths
from selab.experiments.compare import fitted
from selab.experiments.placing import PlaceRequest, Placing
from selab.judging.placement import Limit, best, finalists, front, read_placement
from selab.models.build import build
from selab.models.catalog import find
from selab.report.placement import placement_tables, verdict_of
from selab.report.table import render
from selab.training.train import Options

OF_NAME = {"site_0": 1.004, "site_1": 1.01, "site_2": 1.012, "site_3": 1.02}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    (folder / "resizable_networks.py").write_text(NETWORKS)
    (folder / "tiny.toml").write_text(FAMILY)
    yield f"{folder / 'tiny.toml'}:tiny"
    sys.modules.pop("resizable_networks", None)


@pytest.fixture
def measured(monkeypatch):
    """Times as they are made up; each call's networks."""
    return made_up(monkeypatch)


def made_up(monkeypatch):
    calls = []

    def times(job, archs, report):
        names = [arch.rpartition(":")[2] for arch in archs]
        calls.append(names)
        assert all(find(arch) for arch in archs)
        assert job.workload.input_chw == (3, 8, 8)
        ratios = [OF_NAME.get(name, 1.03 if name.startswith("width") else 1.015) for name in names]
        found = {arch: latency_of(ratio) for arch, ratio in zip(archs, ratios, strict=True)}
        return found, ("a remark",)

    monkeypatch.setattr(placing, "times", times)
    return calls


def request(arch, **changes):
    asked = {
        "arch": arch,
        "limit": Limit(quantity="latency", ratio=1.035),
        "insert": ("0", "1", "3", "4"),
        "se": "reduction=2",
        "recipe": msgspec.structs.replace(RECIPE, batch=10, crop_pad=1, flip=False),
        "options": Options(threads=1, epochs=2),
        "search_epochs": 1,
        "trials": 4,
        "seeds": 2,
        "runtime": "torch",
        **changes,
    }
    return PlaceRequest(**asked)


def placed(arch, out, *, report=lambda *_: None, say=lambda _: None, **changes):
    found = Placing(request(arch, **changes), images(), out)
    found.take_over(replace=False)
    found.run(report, say)
    return found


@pytest.fixture(scope="module")
def finished(family, tmp_path_factory):
    """A placement, the calls that timed networks, and what was said."""
    said = []
    with pytest.MonkeyPatch.context() as patched:
        calls = made_up(patched)
        done = placed(family, tmp_path_factory.mktemp("finished"), say=said.append)
    return done, calls, said


def test_the_sites_and_the_costs_of_their_blocks(family):
    sites = sites_of(fitted(find(family), images()), se="reduction=2", insert=("0", "1", "3", "4"))
    assert [one.path for one in sites.found] == ["0", "1", "3", "4"]
    assert [(one.channels, one.height) for one in sites.found] == [(8, 8), (8, 8), (16, 4), (16, 4)]
    assert [one.params for one in sites.found][:2] == [2 * 8 * 4 + 12] * 2
    assert list(shapes(sites.found).values()) == [[0, 1], [2, 3]]
    for one in widths(sites, 1.2, "params", most=3):
        # The numbers of channels are small, and the steps between them wide.
        assert 1 < ratio_of(one.cost, sites.cost, "params") < 2
    assert {one.network.repeat for one in repeats(sites, 1.2, "macs", most=5)} == {"1", "4"}
    assert dearest({"a": 1.01, "b": 1.02, "c": 1.5}, 1.1) == "b"
    assert dearest({"a": 1.3, "b": 1.2}, 1.1) == "b"


def test_from_the_first_count_to_the_last_training(finished):
    done, measured, said = finished
    assert "search: 0 of 4 trials done" in said
    record = read_placement(done.path)
    assert record == done.record
    assert record.complete
    # One block alone for each shape of map, with the widths and the depths, in one run; the last ones in another.
    assert {name for name in measured[0] if name.startswith("site")} == {"site_0", "site_2"}
    assert any(name.startswith("width") for name in measured[0])
    assert len(measured) == 2
    # Sites of one shape share the figure of the first.
    assert [one.ratio for one in record.sites] == [1.004, 1.004, 1.012, 1.012]
    kinds = {one.kind for one in record.arms}
    assert {"original", "last", "width", "depth"} <= kinds
    assert record.arm("all") is not None or any(len(one.sites) == 4 for one in record.arms)
    assert all(one.cost <= 1.035 + 1e-6 for one in record.arms if one.kind in ("tried", "last"))
    assert all(one.held_out_pct is not None for one in record.arms)
    ends = finalists(record)
    assert ends[0] == "original"
    # All blocks, whether they fit or not.
    assert sum(len(record.arm(name).sites) == 4 for name in ends) == 1
    assert {one.name for one in record.arms if one.tests} == set(ends)
    assert all(len(record.arm(name).tests) == 2 for name in ends)
    assert all(record.arm(name).latency is not None for name in ends if name != "original")
    found = best(record, "found")
    assert found.sites
    assert found.held_out_pct == max(
        one.held_out_pct for one in record.arms if one.kind in ("tried", "last") and one.sites and not one.stopped
    )
    assert front(record.arms)[0].cost == min(one.cost for one in record.arms)
    # The choosing images are a tenth of the training images, and none of the test images.
    assert done.choosing.test_size == 10
    assert done.choosing.train_size == 90


def test_the_networks_are_a_family_like_any_other(finished):
    done, _, _ = finished
    found = best(done.record, "found")
    variant = find(f"{done.networks}:placed")
    assert variant.baseline == "original"
    built = build(variant)
    assert [one.path for one in built.insertions] == [done.record.sites[one].path for one in found.sites]
    assert sum(one.numel() for one in built.model.parameters()) == found.params
    for name in finalists(done.record):
        model = build(find(f"{done.networks}:{name}")).model
        assert sum(one.numel() for one in model.parameters()) == done.record.arm(name).params
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_a_second_call_trains_and_measures_nothing(family, finished, measured, monkeypatch, tmp_path):
    first, _, _ = finished
    shutil.copytree(first.out, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(placing, "train", lambda *_, **__: pytest.fail("trained again"))
        again = placed(family, tmp_path / "out")
    assert again.record == first.record
    assert measured == []
    # More trials and seeds go on.
    again = placed(family, tmp_path / "out", trials=6, seeds=3)
    assert {one.name for one in first.record.arms} <= {one.name for one in again.record.arms}
    assert all(len(again.record.arm(name).tests) == 3 for name in finalists(again.record))


@pytest.mark.parametrize("after", [1, 4, 9])
def test_interrupted_it_ends_at_the_same_record(family, finished, tmp_path, measured, monkeypatch, after):
    whole = finished[0].record
    real, left = placing.train, [after]

    def train(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise SelabError("stopped")
        return real(*args, **kwargs)

    monkeypatch.setattr(placing, "train", train)
    with pytest.raises(SelabError, match="stopped"):
        placed(family, tmp_path / "out")
    monkeypatch.setattr(placing, "train", real)
    resumed = placed(family, tmp_path / "out").record
    for name in ("original", *(one.name for one in whole.arms if one.kind in ("last", "width", "depth"))):
        assert resumed.arm(name).held_out_pct == whole.arm(name).held_out_pct
    assert resumed.complete
    assert resumed.trials == 4


@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_what_is_counted_needs_no_clock(family, tmp_path, measured, quantity):
    done = placed(family, tmp_path / "out", limit=Limit(quantity=quantity, ratio=1.3), trials=1, seeds=1)
    # Only the networks of the end are timed.
    assert len(measured) == 1
    base = done.record.arm("original")
    for one in done.record.arms:
        own = one.params / base.params if quantity == "params" else one.macs / base.macs
        assert one.cost == pytest.approx(own, rel=0.01)


def test_tables_and_the_picture(finished, tmp_path):
    from selab.report.figures import registry
    from selab.report.figures.placement import placement_front

    record = finished[0].record
    shown = " ".join(render(placement_tables(record), "markdown").split())
    assert "as it is" in shown
    assert "more width: width_" in shown
    assert "(placed)" in shown
    # Against everything that was compared with it.
    assert len(verdict_of(record)) == len(finalists(record)) - 1
    registry.draw(placement_front(record), tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    assert "Where blocks pay" in picture
    assert "front" in picture


def test_another_request_is_refused(family, finished):
    with pytest.raises(SelabError, match=r"is a placement whose limit is .*1.035.*use --replace"):
        placed(family, finished[0].out, limit=Limit(quantity="latency", ratio=1.05))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"limit": Limit(quantity="latency", ratio=1.001)},
            "no block fits; the cheapest one, at 0, makes it x 1.0040",
        ),
        ({"arch": "se_tiny"}, "has attention blocks already; name its baseline, tiny"),
        ({"insert": ("nowhere",)}, "matches no module"),
    ],
)
def test_bad_input(family, tmp_path, measured, changes, said):
    arch = family.rpartition(":")[0] + f":{changes['arch']}" if "arch" in changes else family
    others = {key: value for key, value in changes.items() if key != "arch"}
    with pytest.raises(SelabError, match=said):
        placed(arch, tmp_path / "out", **others)
    assert not list(tmp_path.glob("out/*.json"))


def test_blocks_before_the_last_one_may_fit_alone(family, tmp_path, measured):
    # The last block has the most parameters.
    sites = sites_of(fitted(find(family), images()), se="reduction=2", insert=("0", "1", "3", "4"))
    ratio = 1 + 1.2 * sites.found[0].params / sites.cost.params
    assert sites.found[-1].params > 1.2 * sites.found[0].params
    limit = Limit(quantity="params", ratio=ratio)
    record = placed(family, tmp_path / "out", limit=limit, trials=3, seeds=1).record
    assert not any(one.kind == "last" for one in record.arms)
    assert all(set(one.sites) <= {0, 1} for one in record.arms if one.kind == "tried")


def test_a_network_that_cannot_be_wider_is_compared_without(family, tmp_path, measured, monkeypatch):
    from selab.errors import ModelError

    def refused(*_args, **_kwargs):
        raise ModelError("tiny: cannot be made wider: for this test")

    monkeypatch.setattr(placing, "widths", refused)
    record = placed(family, tmp_path / "out", trials=1, seeds=1).record
    assert all(one.kind != "width" for one in record.arms)
    assert "tiny: cannot be made wider: for this test" in record.remarks


def test_trainings_that_are_behind_are_ended_early(family, tmp_path, measured, monkeypatch):
    # Whatever the pruner is asked after the first epochs, it ends the training.
    import optuna

    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda _self: True)
    record = placed(family, tmp_path / "out", search_epochs=2, trials=6, seeds=1).record
    tried = [one for one in record.arms if one.kind == "tried"]
    assert tried
    assert all(one.stopped for one in tried)
    # None of them is the best, or on the front.
    assert not best(record, "found").stopped
    assert not any(one.stopped for one in front(record.arms))


def test_the_command(selab, family, tmp_path, monkeypatch, measured):
    monkeypatch.setattr("selab.cli.placing.open_images", lambda *_: images())
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[recipes.r]\ntitle = "R"\nsource = "this test"\nwhere = "here"\nlr = 0.05\nmomentum = 0.9\n'
        'weight_decay = 1e-3\nbatch = 10\nepochs = 1\nschedule = "cosine"\ncrop_pad = 1\n'
    )
    words = ("place", "--arch", family, "--recipe", recipe, "--data", "synthetic", "--insert", "auto")
    short = ("--trials", 1, "--search-epochs", 1, "--seeds", 1, "--out", tmp_path / "out")
    status, _, err = selab(*words, "--budget", "latency=1.05", *short, "--json", tmp_path / "a.json")
    assert status == 0, err
    assert "1 seed" in err
    assert json.loads((tmp_path / "a.json").read_text())["complete"]
    names = {one.name for one in (tmp_path / "out").iterdir()}
    assert {"tiny.placed.toml", "tiny.placement.json", "placement.svg", "runs"} <= names
    status, _, err = selab(*words, *short)
    assert status != 0
    assert "--budget: missing; give --budget" in " ".join(err.replace("│", " ").split())
    for bad in ("latency", "latency=1", "latency=11", "speed=1.1", "macs=nan"):
        status, _, err = selab(*words, "--budget", bad, *short)
        assert status != 0
        assert "is written QUANTITY=RATIO, such as latency=1.02" in " ".join(err.replace("│", " ").split())
