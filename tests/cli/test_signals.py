"""Signals that end the program: partial records are kept, and no process is left."""

import os
import signal
import subprocess
import sys

import pytest

from selab.cli.signals import ENDING, Signals, held_back

# A child of the program that lives on would still be in its process group.
STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def not_under_nohup():
    """Programs inherit what is ignored, and tests may run under nohup."""
    ignored = [number for number in ENDING if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def started(words, awaited, **how):
    """Start the program in a session of its own, and wait for a line of its standard error."""
    running = subprocess.Popen(
        [sys.executable, "-m", "selab", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **how,
    )
    for line in running.stderr:
        if line.startswith(awaited):
            return running
    raise AssertionError(f"ended with {running.wait()} before it said {awaited!r}")


def is_alone(group):
    """Return whether a process group has no process left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGHUP, 1), (signal.SIGTERM, 3)])
def test_a_profile_keeps_what_there_is_and_ends_its_children(toy, tmp_path, number, processes):
    words = ["profile", "--arch", f"{toy}:se_toy", "--free-heap", "--out", tmp_path / "r", "--processes", processes]
    running = started(words, "forward" if processes == 1 else "process 1 of 3")
    running.send_signal(number)
    _, error = running.communicate(timeout=60)
    assert running.returncode == STATUSES[number]
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: interrupted; no time was measured yet; the counted costs are in")
    assert is_alone(running.pid)
    assert [path.name for path in (tmp_path / "r").rglob("*")][1:] == ["se_toy.cpu-b1-16-fp32-t1.partial.json"]


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(toy, tmp_path):
    """As under nohup: the terminal is closed, and the program goes on."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    words = ["count", "--arch", f"{toy}:se_toy", "--json", tmp_path / "a.json"]
    running = started(words, "running code from", preexec_fn=ignore)
    running.send_signal(signal.SIGHUP)
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert (tmp_path / "a.json").exists()


@pytest.mark.parametrize("number", ENDING, ids=lambda one: one.name)
def test_the_handlers_are_put_back(number):
    before = {one: signal.getsignal(one) for one in ENDING}
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.handled():
        signal.raise_signal(number)
    assert (signals.number, signals.status) == (number, STATUSES[number])
    assert {one: signal.getsignal(one) for one in ENDING} == before


@pytest.mark.parametrize("number", ENDING, ids=lambda one: one.name)
def test_a_second_signal_does_not_disturb_the_writing_of_a_record(number):
    with Signals().handled(), held_back():
        signal.raise_signal(number)
