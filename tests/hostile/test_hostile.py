"""A part of the battery of hostile command lines; `nox -s hostile` runs all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIDE = 97


def battery(*words):
    """Run the battery in a process of its own: it forks, which a process with threads must not."""
    done = subprocess.run(
        [sys.executable, HERE / "battery.py", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_part_of_the_cases():
    status, text = battery("--fast", "--stride", str(STRIDE), "--start", "7")
    assert status == 0, text
    assert "0 faults of 0 kinds" in text


@pytest.mark.slow
def test_kills_at_steps_of_writing():
    status, text = battery("no such case", "--kills", "--stride", "5")
    assert status == 0, text
    assert text.count("killed at") == 6


def test_there_are_enough_cases_and_every_option_has_values(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import grammar

    every = grammar.cases()
    assert len(every) >= 400
    assert len({case.words for case in every}) == len(every)
    assert {name.split()[0] for name in grammar.commands()} == {case.words[0] for case in every} - {
        "",
        "\0",
        "nope",
        "--nope",
        "--debug",
    }
    assert grammar.commands().keys() == grammar.WORKING.keys()
