"""Every operator under the roof of a device, and what the roof is worth as a prediction."""

import itertools
import json

import msgspec
import pytest
import torch
from torch import nn

from selab.attention.insert import insert_se
from selab.bench import roofline as measured
from selab.bench.devices import devices, find_device
from selab.bench.machine import machine
from selab.bench.roofline import Peaks, Point, Roofline, roofline
from selab.errors import ModelError, SelabError, SpecError, UnknownNameError
from selab.experiments import roofline as experiments_roofline
from selab.experiments.job import Request, resolve
from selab.records.acceptance import Distance, RoofDistances
from selab.report import traces
from selab.report.figures import registry
from selab.report.figures import roofline as report_figures_roofline

PEAKS = Peaks(dtype="fp32", flops_per_s=1e9, bandwidths=((1000, 4e9), (100_000, 1e9)), source="made up")


def ticking(step=1e-3):
    """A clock that is a millisecond later each time."""
    numbers = itertools.count()
    return lambda: next(numbers) * step


def test_what_fits_into_a_cache_is_held_against_the_cache():
    assert PEAKS.bandwidth(10) == 4e9
    assert PEAKS.bandwidth(1000) == 4e9
    assert PEAKS.bandwidth(99_999) == 4e9
    assert PEAKS.bandwidth(100_000) == 1e9
    assert PEAKS.memory_bandwidth == 1e9


def test_the_least_time_is_the_longer_of_arithmetic_and_bytes(workload):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = roofline(model, workload(batch=1, input_chw=(3, 8, 8)), PEAKS, budget_s=0, clock=ticking())
    conv, relu = found.points
    # 4 maps of 6x6 from 27 inputs each.
    assert conv.flops == 2 * 4 * 36 * 27
    assert conv.least_s == pytest.approx(conv.flops / 1e9)
    assert conv.bound == "arithmetic"
    # 144 floats are read and as many written.
    assert (relu.bytes, relu.bound) == (8 * 144, "memory")
    assert relu.least_s == pytest.approx(8 * 144 / 4e9)
    assert conv.measured_s == pytest.approx(1e-3)
    assert found.measured_s == pytest.approx(2e-3)
    assert found.least_s == pytest.approx(conv.least_s + relu.least_s)


def test_se_s_operators_are_marked_and_the_model_stays(workload):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).train()
    insert_se(model, ["0"], input_nchw=(1, 3, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = roofline(model, workload(batch=1, input_chw=(3, 8, 8)), PEAKS, budget_s=0, clock=ticking())
    assert {point.stage for point in found.points} == {"", "squeeze", "excitation", "scale"}
    names = [one.name for one in traces.groups(found)]
    assert "se.squeeze: mean" in names
    assert "se.scale: mul" in names
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_that_of_the_whole_network(workload):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    work = workload(batch=1, input_chw=(3, 8, 8), dtype="bf16")
    found = roofline(model, work, PEAKS, budget_s=0, clock=ticking())
    assert found.points[1].bytes == 4 * 144


def test_without_a_device_nothing_runs(workload):
    found = roofline(nn.Sequential(nn.ReLU()).to("meta"), workload(), PEAKS, measured=False)
    assert found.whole_s is None
    assert found.measured_s is None
    assert found.points[0].efficiency is None


def test_operators_that_cannot_be_told_apart_are_refused(workload):
    class Fickle(nn.Module):
        def forward(self, x):
            # Only counting has tensors of another class.
            return x.relu() * 2 if type(x) is torch.Tensor else x.relu()

    with pytest.raises(ModelError, match="runs 2 operators on cpu, 1 were counted"):
        roofline(Fickle(), workload(), PEAKS, budget_s=0)


def test_peaks_are_the_best_of_what_was_measured(monkeypatch):
    monkeypatch.setattr(measured, "COPIES", (2**12, 2**14))
    monkeypatch.setitem(measured._MATRICES, "cpu", (4, 8))
    peaks = measured.measure_peaks("cpu", "fp32", clock=ticking())
    # Every sample lasts one tick.
    assert peaks.flops_per_s == pytest.approx(2 * 8**3 / 1e-3)
    assert [size for size, _ in peaks.bandwidths] == [2**12, 2**14]
    assert peaks.bandwidths[0][1] == pytest.approx(2**22 / 1e-3)


def test_published_peaks_name_their_source():
    for name, one in devices().items():
        assert one.source
        assert find_device(name, "fp32") == one
        assert experiments_roofline.published_peaks(one, "fp32").bandwidth(1) == one.bandwidth
    with pytest.raises(UnknownNameError, match=r"--as h20: no such device.*h200"):
        find_device("h20", "fp32")
    with pytest.raises(SpecError, match="--as t4: has no published peak in bf16; there are fp32, fp16"):
        find_device("t4", "bf16")


def made_up():
    points = (
        Point(
            name="conv", path="a", stage="", flops=1000, bytes=100, least_s=1e-6, measured_s=2e-6, bound="arithmetic"
        ),
        Point(name="mul", path="b", stage="scale", flops=10, bytes=100, least_s=1e-7, measured_s=1e-6, bound="memory"),
    )
    return Roofline(peaks=PEAKS, points=points, whole_s=5e-6)


def test_the_table_has_the_efficiency_and_se_together():
    work = resolve(Request(arch="se_small_cnn")).workload
    grid = traces.roofline_table(made_up(), arch="x", workload=work, place="here")
    rows = {row[0]: row for row in grid.rows}
    assert rows["conv ×1"][-1] == "50.0 %"
    assert rows["SE together ×1"][-1] == "10.0 %"
    assert any("4.5 times the least" in note for note in grid.notes)


def test_a_prediction_is_called_one():
    work = resolve(Request(arch="se_small_cnn")).workload
    points = tuple(
        Point(**{**{name: getattr(one, name) for name in Point.__dataclass_fields__}, "measured_s": None})
        for one in made_up().points
    )
    found = Roofline(peaks=PEAKS, points=points, whole_s=None)
    grid = traces.roofline_table(found, arch="x", workload=work, place="there")
    assert grid.title.startswith("x predicted for there")
    assert "predicted" in grid.columns
    assert "took" not in grid.columns
    with pytest.raises(SelabError, match="nothing was measured"):
        report_figures_roofline.roof(found, arch="x", workload=work, place="there")


def test_the_picture_is_drawn(tmp_path):
    work = resolve(Request(arch="se_small_cnn")).workload
    shown = report_figures_roofline.roof(made_up(), arch="x", workload=work, place="here")
    assert [mark.inside_se for mark in shown.marks] == [False, True]
    registry.draw(shown, tmp_path / "roof.svg")
    assert "FLOPs per byte" in (tmp_path / "roof.svg").read_text()


def test_how_far_the_roof_is_away():
    found = RoofDistances(
        machine=machine(),
        place="here",
        flops_per_s=1.0,
        bandwidths=((1, 1.0),),
        networks=tuple(Distance(name=str(factor), least_s=1.0, whole_s=factor) for factor in (2.0, 3.0, 4.0)),
        failed=1,
    )
    grid = traces.distances_table(found)
    assert "median 3.00" in grid.notes[0]
    # 3/2 - 1 = 0.5, 3/3 - 1 = 0, 1 - 3/4 = 0.25: the middle one.
    assert "off by 25.0 %" in grid.notes[1]
    assert "1 network failed" in grid.notes[2]
    assert [row[3] for row in grid.rows] == ["2.00", "3.00", "4.00"]


def test_a_network_that_fails_is_told_and_the_others_go_on():
    found = list(experiments_roofline.distances(["no_such_network", "small_cnn"], PEAKS, lambda *_: None))
    assert isinstance(found[0], SelabError)
    assert isinstance(found[1], Distance)


def test_the_shell_predicts_for_a_device_that_is_not_here(selab):
    status, out, _ = selab("roofline", "--arch", "se_small_cnn", "--as", "h200", "--json", "-")
    assert status == 0
    facts = json.loads(out)
    assert facts["predicted"]
    assert facts["place"] == "NVIDIA H200 SXM"
    assert facts["whole_s"] is None
    assert selab("roofline")[0] == 2
    assert selab("roofline", "--arch", "se_small_cnn", "--as", "h200", "--out", "x.svg")[0] == 2
    status, _, err = selab("roofline", "--arch", "se_small_cnn", "--as", "tpu")
    assert status == 1
    assert "--as tpu: no such device" in err


def test_mistakes_are_told_before_anything_is_measured(selab, monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "measure_peaks", lambda *_args, **_options: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for words, told in (
        (["--arch", "no_such_network"], "no such architecture"),
        (["--arch", "small_cnn", "--out", tmp_path / "file" / "x.svg"], "cannot be written"),
        (["--arch", "small_cnn", "--json", tmp_path / "file" / "x.json"], "cannot be written"),
        (["--all", "--json", tmp_path / "file" / "x.json"], "cannot be written"),
    ):
        status, _, err = selab("roofline", *words)
        assert status == 1
        assert told in err


@pytest.mark.parametrize("words", [["--dtype", "bf16"], ["--threads", "2"], ["--out", "x.svg"], ["--as", "h200"]])
def test_all_networks_are_held_against_one_workload(selab, words):
    status, _, err = selab("roofline", "--all", *words)
    assert status == 2
    assert f"leave out {words[0]}" in " ".join(err.replace("│", "").split())


def test_the_shell_measures_here(selab, monkeypatch, tmp_path):
    peaks = msgspec.convert({"fp32": 1e12}, dict[str, float])
    monkeypatch.setattr(
        measured,
        "measure_peaks",
        lambda *_args, **_options: Peaks(
            dtype="fp32", flops_per_s=peaks["fp32"], bandwidths=((0, 1e12),), source="measured in this run"
        ),
    )
    picture = tmp_path / "roof.svg"
    status, out, _ = selab("roofline", "--arch", "se_small_cnn", "--budget", "0", "--out", picture)
    assert status == 0
    assert "SE together" in out
    assert picture.exists()
