"""The pipes between a profile and its fresh processes, where one of the two ends early."""

import signal
import subprocess
import sys

import msgspec
import pytest

from selab.experiments import workers
from selab.experiments.job import Request, resolve
from selab.experiments.workers import Ended, WorkerJob, short_runs_of_child


@pytest.fixture
def order():
    job = resolve(Request(arch="se_small_cnn", threads=1, processes=3))
    return WorkerJob(job=job, quad_seed=0, rows=(1,), seconds=0.01, control=False)


def started(stdout):
    command = [sys.executable, "-P", "-c", workers._START]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_an_order_that_breaks_off_is_no_fault_of_the_process(order, length):
    """The profile was killed while it wrote: the process ends and says nothing."""
    out, error = started(subprocess.PIPE).communicate(msgspec.json.encode(order)[:length], timeout=60)
    assert (out, error) == (b"", b"")


def test_a_process_whose_profile_has_gone_says_nothing(order):
    with started(subprocess.PIPE) as running:
        running.stdout.close()
        running.stdin.write(msgspec.json.encode(order))
        running.stdin.close()
        assert (running.stderr.read(), running.wait(timeout=60)) == (b"", 1)


def test_a_signal_during_the_start_of_a_process_ends_it(order, monkeypatch):
    begun = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *words, **how):
            super().__init__(*words, **how)
            begun.append(self)
            signal.raise_signal(signal.SIGINT)
            begun.append("the start went on")

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(short_runs_of_child(order, 0, lambda: 0.0))
    assert begun[1:] == ["the start went on"]
    assert begun[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("length", [1, 10_000_000])
def test_a_process_that_ends_before_it_reads_its_order_is_named(order, length, monkeypatch):
    """Also where the order is larger than the pipe's buffer."""
    monkeypatch.setattr(workers, "_START", "raise SystemExit(7)")
    monkeypatch.setattr(msgspec.json, "encode", lambda _: b"x" * length)
    (end,) = short_runs_of_child(order, 0, lambda: 0.0)
    assert isinstance(end, Ended)
    assert end.died == "a measuring process ended with status 7; see its message above"
