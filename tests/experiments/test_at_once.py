"""Several trainings at the same time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_family

from selab.errors import SelabError
from selab.experiments import at_once
from selab.experiments.at_once import Place, places_of
from selab.training.record import read_accuracy_record

WILD = """
[recipes.wild]
title = "Wild"
source = "this test"
where = "above"
lr = 1e9
momentum = 0.9
weight_decay = 0.0
batch = 2000
epochs = 1
schedule = "constant"
"""

# So many epochs that neither of two trainings ends while the other one begins.
LONG = ("--epochs", 8, "--batch", 50)


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr(at_once, "available_cores", lambda: 4)
    assert places_of("cpu", None, trainings=6) == [Place(threads=1)] * 4
    assert places_of("cpu", None, trainings=2) == [Place(threads=2)] * 2
    assert places_of("cpu", None, trainings=1) == [Place()], "one alone has torch's own threads"
    assert places_of("cpu", 3, trainings=6) == [Place(threads=1)] * 3
    assert places_of("cpu", 2, trainings=6, threads=3) == [Place(threads=3)] * 2
    assert places_of("cpu", None, trainings=6, in_memory=False) == [Place()]
    monkeypatch.setattr(at_once, "available_cores", lambda: 64)
    assert places_of("cpu", None, trainings=100) == [Place(threads=8)] * 8
    with pytest.raises(SelabError, match="--jobs 65: there are 64 cores, and each training takes one; give at most 64"):
        places_of("cpu", 65, trainings=100)


def test_each_gpu_has_a_training(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [one.gpu for one in places_of("cuda", None, trainings=9)] == ["0", "1", "2"]
    assert [one.gpu for one in places_of("cuda", None, trainings=2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc,7")
    assert [one.gpu for one in places_of("cuda", 2, trainings=9)] == ["5", "GPU-abc"]
    with pytest.raises(SelabError, match="--jobs 4: there are 3 GPUs"):
        places_of("cuda", 4, trainings=9)


@pytest.fixture
def comparing(tmp_path):
    """Starts `selab compare --jobs 2` in a process: words → the process."""
    tiny = tiny_family.write(tmp_path)
    (tmp_path / "own.toml").write_text(WILD)
    started = []

    def start(*words):
        names = [f"{tiny}:tiny", f"{tiny}:se_tiny", "--data", "synthetic", "--no-latency", "--jobs", 2, "--out", "out"]
        command = [sys.executable, "-P", "-m", "selab", "compare", *map(str, [*names, *words])]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def children_of(process):
    """The processes that a process has started."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(word) for one in lists for word in one.read_text().split()]


def checkpoints(tmp_path):
    return list(tmp_path.glob("out/runs/*/checkpoint.pt"))


def wait_for(found, process):
    while not (there := found()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return there


def test_all_are_saved_when_one_is_asked_to_stop_and_go_on(comparing, tmp_path):
    words = ["--seeds", 1, *LONG]
    running = comparing(*words)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2, running)
    running.send_signal(signal.SIGTERM)
    _, error = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM, error
    assert "Traceback" not in error
    assert "stopped with 2 trainings left; everything is saved: the same command resumes" in error
    again = comparing(*words)
    _, error = again.communicate()
    assert again.returncode == 0, error
    assert error.count(": resuming at epoch ") == 2
    assert "resuming at epoch 1:" not in error
    (path,) = tmp_path.glob("out/*/accuracy/*.json")
    assert read_accuracy_record(path).complete


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="no lists of children here")
@pytest.mark.parametrize("imported_s", [0.1, 0.5, 1.5])
def test_control_c_while_the_processes_start_is_one_line(comparing, imported_s):
    running = comparing("--seeds", 1, *LONG)
    wait_for(lambda: len(children_of(running)) == 2, running)
    time.sleep(imported_s)
    for one in (running.pid, *children_of(running)):
        os.kill(one, signal.SIGINT)  # as a terminal does
    _, error = running.communicate()
    assert running.returncode == 128 + signal.SIGINT, error
    assert "Traceback" not in error
    assert "message above" not in error
    assert "stopped with 2 trainings left; everything is saved" in error.splitlines()[-1]


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="no lists of children here")
def test_a_process_that_is_killed_ends_all_and_nothing_is_lost(comparing, tmp_path):
    running = comparing("--seeds", 1, *LONG)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2, running)
    os.kill(children_of(running)[0], signal.SIGKILL)
    _, error = running.communicate()
    assert running.returncode == 1
    assert error.splitlines()[-1].startswith("error: training ")
    assert "a training process was ended by SIGKILL; is the memory full?; the same command resumes" in error
    assert len(checkpoints(tmp_path)) == 2


def test_a_network_that_diverges_in_every_seed_is_no_comparison(comparing, tmp_path):
    running = comparing("--seeds", 1, "--recipe", "own.toml:wild")
    out, error = running.communicate()
    assert running.returncode == 1
    last = error.splitlines()[-1]
    assert last.startswith("error: diverged: tiny in every one of 1 seed; se_tiny in every one of 1 seed; nothing is")
    assert "1 of 1 seed diverged" in " ".join(out.split())
    (path,) = tmp_path.glob("out/*/accuracy/*.json")
    assert read_accuracy_record(path).complete
