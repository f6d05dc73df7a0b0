"""The pipes between a profile and its fresh processes, where one of the two ends early."""

import itertools
import re
import signal
import subprocess
import sys

import msgspec
import pytest

from selab.errors import SelabError
from selab.experiments import children, workers
from selab.experiments.children import Ended, Found, Started, in_processes
from selab.experiments.job import Request, resolve
from selab.experiments.schedule import Effort, Schedule
from selab.experiments.workers import Placed, WorkerJob


@pytest.fixture
def order():
    job = resolve(Request(arch="se_small_cnn", threads=1, processes=3))
    return WorkerJob(job=job, quad_seed=0, rows=(1,), seconds=0.01, control=False)


def events(order, processes):
    effort = Effort(seconds=1.0, least=processes, most=processes)
    schedule = Schedule(began=0.0, effort=effort, runs=1, clock=lambda: 0.0)
    return in_processes(schedule, workers.__name__, lambda _: order, Placed)


def started(stdout):
    command = [sys.executable, "-P", "-c", children._START.format(module=workers.__name__)]
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
        list(events(order, 3))
    assert begun[1:] == ["the start went on"]
    assert begun[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("length", [1, 10_000_000])
def test_processes_that_end_before_they_read_their_order_are_named(order, length, monkeypatch):
    """Also where the order is larger than the pipe's buffer. The fourth is one too many."""
    monkeypatch.setattr(children, "_START", "raise SystemExit(7)")
    monkeypatch.setattr(msgspec.json, "encode", lambda _: b"x" * length)
    why, running = "a measuring process ended with status 7; see its message above", events(order, 3)
    seen = list(itertools.islice(running, 8))
    assert [(one.number, one.died) for one in seen if isinstance(one, Ended)] == [(n, why) for n in range(4)]
    with pytest.raises(SelabError, match=f"4 processes died: {why}"):
        next(running)


def test_a_process_that_died_is_replaced_and_keeps_its_number(order, monkeypatch):
    said = [msgspec.json.encode({"found": {"threads": 1}}), b'{"ready": true}']

    def scripted(module, text):
        assert (module, text) == (workers.__name__, msgspec.json.encode(order))
        yield said[0]
        yield said[1]
        if not deaths:
            deaths.append("a measuring process was ended by SIGKILL; is the memory full?")
            raise children.DiedError(deaths[0])

    deaths = []
    monkeypatch.setattr(children, "lines_of", scripted)
    seen = list(events(order, 3))
    started = [one.where for one in seen if isinstance(one, Started)]
    assert started[:2] == ["process 1 of 3"] * 2
    # From then on it is known how long a process takes.
    assert re.fullmatch(r"process 2 of 3, about \d+ s left", started[2])
    assert re.fullmatch(r"process 3 of 3, about \d+ s left", started[3])
    assert [(one.number, one.died) for one in seen if isinstance(one, Ended)] == [
        (0, deaths[0]),
        (1, ""),
        (2, ""),
        (3, ""),
    ]
    assert [one.what for one in seen if isinstance(one, Found)] == [Placed(threads=1)] * 4


def test_an_error_of_a_process_is_the_measurement_s(order, monkeypatch):
    monkeypatch.setattr(children, "lines_of", lambda *_: (text for text in [b'{"error": "broken"}']))
    with pytest.raises(SelabError, match=r"^broken$"):
        list(events(order, 3))
