"""A timeline's ranges, what belongs to them, and that TensorBoard and Perfetto can read the trace."""

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from torch import nn

from selab.attention.blocks import ECA
from selab.attention.insert import insert_se
from selab.bench.profiler import WHOLE, named_ranges, record_steps
from selab.errors import RecordError
from selab.experiments import timeline
from selab.experiments.job import Request, resolve
from selab.report import traces


def gated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 5))
    insert_se(model, ["0", "2"], input_nchw=(1, 3, 8, 8))
    return model


@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
def test_every_stage_has_a_share(workload, phase):
    found = record_steps(gated(), workload(), phase, steps=2).timeline
    assert set(found.stages) == {"squeeze", "excitation", "scale"}
    assert all(seconds > 0 for seconds in found.stages.values())
    assert sum(found.stages.values()) < found.total_s
    assert found.total_s == pytest.approx(sum(one.self_s for one in found.operators))
    assert found.blocks == 2


def test_calls_are_per_step_and_gradients_belong_to_their_stage(workload):
    forward = record_steps(gated(), workload(), "forward", steps=3).timeline
    both = record_steps(gated(), workload(), "forward_backward", steps=3).timeline
    # Two blocks of two layers, and the classifier.
    assert next(one.calls for one in forward.operators if one.name == "aten::addmm") == 5
    assert any("MulBackward0" in one.name for one in both.operators)
    assert not any("Backward" in one.name for one in forward.operators)


def test_the_model_is_as_it_was(workload):
    model = gated()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record_steps(model, workload(), "forward_backward", steps=1)
    with named_ranges(model) as blocks:
        assert blocks == 2
        assert "excite" in model[0].se.__dict__
    assert "excite" not in model[0].se.__dict__
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_block_is_one_range(workload):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), ECA(16))
    assert set(record_steps(model, workload(), "forward", steps=1).timeline.stages) == {WHOLE}
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    found = record_steps(plain, workload(), "forward", steps=1).timeline
    assert (found.stages, found.blocks) == ({}, 0)
    assert set(record_steps(plain, workload(), "forward", steps=1, native=["1"]).timeline.stages) == {WHOLE}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces")
    job = resolve(Request(arch="se_small_cnn", threads=1))
    path = timeline.trace_path(job, "forward", out)
    timeline.write_trace(timeline.recorded(job, "forward", steps=2), path, replace=False)
    return path


def test_a_trace_has_ranges_shapes_memory_and_stacks(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    names = [str(event.get("name", "")) for event in events]
    # Two steps, four blocks.
    assert sum(name.startswith("se.squeeze ") for name in names) == 8
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 2
    assert any(event.get("cat") == "python_function" for event in events)
    assert any("[memory]" in name for name in names)
    assert any(event.get("args", {}).get("Input Dims") for event in events)
    # Perfetto reads complete events: a name, a begin and a duration in microseconds, a process and a thread.
    complete = [event for event in events if event.get("ph") == "X"]
    assert complete
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in complete)


def test_a_trace_is_not_written_over(trace, tmp_path):
    job = resolve(Request(arch="se_small_cnn", threads=1))
    found = timeline.recorded(job, "forward", steps=1)
    with pytest.raises(RecordError, match="exists; use --replace"):
        timeline.write_trace(found, trace, replace=False)
    before = trace.read_bytes()
    timeline.write_trace(found, trace.parent / "other.pt.trace.json", replace=True)
    assert trace.read_bytes() == before
    (trace.parent / "other.pt.trace.json").unlink()
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]


def test_a_folder_that_cannot_be_written_is_told(selab):
    status, _, err = selab("timeline", "--arch", "se_small_cnn", "--out", "/proc/nowhere")
    assert status == 1
    assert "/proc/" in err
    assert "cannot be written" in err


def test_a_json_that_cannot_be_written_is_told_before_anything_is_recorded(selab, monkeypatch, tmp_path):
    monkeypatch.setattr(timeline, "recorded", lambda *_args, **_options: pytest.fail("recorded"))
    (tmp_path / "file").touch()
    status, _, err = selab("timeline", "--arch", "small_cnn", "--out", tmp_path, "--json", tmp_path / "file" / "x.json")
    assert status == 1
    assert "cannot be written" in err


def test_the_shell_shows_operators_stages_and_how_to_look(selab, tmp_path):
    status, out, _ = selab("timeline", "--arch", "se_small_cnn", "--steps", "1", "--out", tmp_path)
    assert status == 0
    assert "The blocks by stage (4 blocks)" in out
    assert "tensorboard --logdir" in out
    assert "ui.perfetto.dev" in out
    assert len(list(tmp_path.rglob("*.pt.trace.json"))) == 1


def test_the_command_that_shows_a_trace_is_one_for_a_shell(tmp_path):
    path = tmp_path / "my results" / "here" / "timeline" / "run" / "selab.pt.trace.json"
    command, _ = traces.how_to_look(path)
    assert shlex.split(command, comments=True) == ["tensorboard", "--logdir", str(path.parent.parent)]


@pytest.mark.slow
def test_tensorboard_s_plugin_serves_the_run(trace):
    """The server's routes, on loopback; its pages fetch their charts from the web."""
    logs = trace.parent.parent
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"},
    ) as server:
        try:
            _ask_for(trace, server)
        finally:
            # Asked to end, it may wait for ever for the process that reads its runs.
            server.kill()


def _ask_for(trace, server):
    words = (word for line in server.stdout for word in line.split())
    address = next((word for word in words if word.startswith("http://127.0.0.1")), None)
    assert address, "the server ended without an address"
    base = f"{address.rstrip('/')}/data/plugin/pytorch_profiler"

    def ask(route):
        with urllib.request.urlopen(f"{base}/{route}", timeout=30) as answer:
            return json.loads(answer.read())

    run = trace.parent.name
    deadline = time.monotonic() + 120
    while run not in (runs := ask("runs"))["runs"] or runs.get("loading"):
        assert time.monotonic() < deadline, f"the plugin shows {runs}"
    assert "Operator" in ask(f"views?run={run}")
    (worker,) = ask(f"workers?run={run}&view=Operator")
    (span,) = ask(f"spans?run={run}&worker={worker}")
    table = ask(f"operation/table?run={run}&worker={worker}&span={span}&group_by=Operation")
    assert any("conv" in str(row) for row in table["data"])
