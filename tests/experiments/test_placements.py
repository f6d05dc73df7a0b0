"""Profiles in short fresh processes: what counts, what is left out, and what is said while they run."""

import os
import re

import msgspec
import pytest
from fake_runs import paired_run

from selab.bench.latency import RawPhase
from selab.errors import SpecError
from selab.experiments.job import Request, resolve
from selab.experiments.placements import Placements
from selab.experiments.profiling import Profile
from selab.experiments.workers import Failed, Placed
from selab.records.store import read_record


def placed(ratio, *, phase="forward", threads=1, control=True):
    controls = (paired_run(1.0, blocks=2),) if control else ()
    raw = RawPhase(phase=phase, method="wall", run=paired_run(ratio, blocks=2), controls=controls)
    return Placed(threads=threads, raw=raw)


@pytest.fixture
def rows():
    job = resolve(Request(arch="se_small_cnn", threads=1, processes=3))
    kept = {}
    return Placements(rows=[(job, kept)], keep=lambda into, phase, _, latency: into.update({phase: latency})), kept


def test_figures_grow_with_the_processes(rows):
    placements, kept = rows
    said = []
    for process, ratio in enumerate((1.08, 1.09, 1.10)):
        placements.add(process, placed(ratio, control=process != 1))
        said.append(placements.words())
    # The mean is that of the logarithms: sqrt(1.08 * 1.09) is 1.08499.
    assert said[:2] == ["forward about +8 %", "forward about +8.49 % [7.58, 9.42]"]
    assert said[2].startswith("forward +9.0 % [")
    assert (len(kept["forward"].runs), len(kept["forward"].controls)) == (3, 2)
    assert kept["forward"].unit == "process"


def test_the_interval_so_far_holds_its_own_estimate(rows):
    placements, _ = rows
    # Two slow blocks of many draw the mean of all blocks, but not the medians.
    for process in range(2):
        run = paired_run(1.5, blocks=9)
        slow = paired_run(4.0, blocks=2)
        run = msgspec.structs.replace(run, quads=(*run.quads, *slow.quads))
        placements.add(process, Placed(threads=1, raw=RawPhase(phase="forward", method="wall", run=run, controls=())))
    said = placements.words()
    estimate, low, high = map(float, re.fullmatch(r"forward about \+(\S+) % \[(\S+), (\S+)\]", said).groups())
    assert low < estimate < high
    assert estimate == pytest.approx(50, abs=1)


def test_a_process_that_died_does_not_count(rows):
    placements, kept = rows
    for process, ratio in enumerate((1.08, 5.0, 1.09, 1.10)):
        placements.add(process, placed(ratio))
    placements.add(1, Placed(threads=1, failed=Failed(phase="backward", error="it was dying")))
    placements.drop(1)
    assert [run.quads[0].floor[1] for run in kept["forward"].runs] == pytest.approx([1.08e-3, 1.09e-3, 1.10e-3])
    placements.add(2, placed(1.2, phase="backward"))
    assert kept["backward"].error == ""


def test_a_phase_that_fails_says_why(rows):
    placements, kept = rows
    placements.add(0, Placed(threads=1, failed=Failed(phase="backward", error="out of memory: no room")))
    assert kept["backward"].verdict == "no result: out of memory: no room"


def test_two_processes_are_refused():
    with pytest.raises(SpecError, match="--processes 2: too few for an interval; give 3 or more, or 1 to measure in"):
        resolve(Request(arch="se_small_cnn", processes=2))


DYING = """
import os
import signal
from pathlib import Path

from torch import nn

MARK = Path({mark!r})


class Net(nn.Module):
    input_size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        real = type(x).__name__ == "Tensor" and x.device.type == "cpu"
        if real and os.environ.get("SELAB_TEST_PARENT") != str(os.getpid()) and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.conv(x).mean((2, 3)))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_others_go_on(tmp_path, selab, monkeypatch):
    monkeypatch.setenv("SELAB_TEST_PARENT", str(os.getpid()))
    network = tmp_path / "dying.py"
    network.write_text(DYING.format(mark=str(tmp_path / "mark")))
    words = ["profile", "--arch", f"{network}:Net", "--insert", "conv", "--phase", "forward", "--threads", "1"]
    status, _, error = selab(*words, "--processes", "3", "--budget", "12", "--out", tmp_path / "r")
    assert status == 0, error
    said = " ".join(error.split())
    assert "process 1: a measuring process was ended by SIGKILL; is the memory full?; its samples are left out" in said
    (path,) = (tmp_path / "r").rglob("*.json")
    record = read_record(path)
    assert len(record.latency["forward"].runs) == 3
    assert any("SIGKILL" in warning for warning in record.warnings)
    assert record.memory.peak_forward_bytes is not None


def test_the_profile_of_a_killed_network_has_a_clock(tmp_path):
    """The time of a command counts from when it began, not from when its networks were built."""
    now = [50.0]
    job = resolve(Request(arch="se_small_cnn", processes=4, budget_s=100.0))
    profile = Profile(job, clock=lambda: now[0], began=10.0)
    assert profile._schedule().expected_s() <= 60.0
