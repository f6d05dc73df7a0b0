"""The one boundary: whatever is raised ends in one line, and --debug shows where it came from."""

import os
import subprocess
import sys

import pytest

from selab.cli import faults
from selab.errors import SelabError, one_line

NETWORKS = """
import torch
from torch import nn


class Outside(BaseException):
    pass


class Silent(BaseException):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Loud(Exception):
    def __str__(self):
        raise Silent


def network(fault):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            raise fault

    return Net


outside = network(Outside("from outside"))
silent = network(Silent())
loud = network(Loud())
leaves = network(SystemExit(0))
leaves_with_words = network(SystemExit("bye"))
memory = network(MemoryError())
end_of_file = network(EOFError("nothing to read"))
system = network(OSError(5, "the disk is broken", "weights.bin"))
lines = network(ValueError("first\\nsecond\\x1b[2J" + "x" * 10_000))
controls = network(Outside("\\x1b[2J\\r\\0" + "x" * 10_000))
text = network(UnicodeEncodeError("utf-8", "\\udc80", 0, 1, "surrogates"))
generator = network(GeneratorExit())
overflow = network(OverflowError("too large"))


class endless(nn.Module):
    def forward(self, x):
        return self.forward(x)


class constructor(nn.Module):
    def __init__(self):
        raise Outside("in the constructor")


class attributes(nn.Module):
    def __getattr__(self, name):
        raise Silent


class copies(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def __deepcopy__(self, memo):
        raise Outside("no copies")

    def forward(self, x):
        return self.conv(x)


class shapes(nn.Module):
    def forward(self, x):
        return torch.empty(2**40, 2**40, device=x.device)
"""
NAMES = [
    "outside",
    "silent",
    "loud",
    "leaves",
    "leaves_with_words",
    "memory",
    "end_of_file",
    "system",
    "lines",
    "controls",
    "text",
    "generator",
    "overflow",
    "endless",
    "constructor",
    "attributes",
]


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(NETWORKS)
    return path


@pytest.mark.parametrize(
    "words", [["count"], ["sites", "--insert", "auto"], ["count", "--insert", "auto"]], ids=" ".join
)
@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_raises_is_one_line(selab, one_line, bad, name, words):
    status, out, error = selab(*words, "--arch", f"{bad}:{name}")
    line = one_line(error)
    assert (status, out) == (1, "")
    assert len(line) < 800
    assert all(each.isprintable() for each in line)
    assert "bad.py" in line


def test_copies_are_not_needed_to_count(selab, bad):
    assert selab("count", "--arch", f"{bad}:copies")[0] == 0


@pytest.mark.parametrize("name", ["copies", "shapes"])
def test_more_networks_are_one_line(selab, one_line, bad, name):
    status, _, error = selab("count", "--arch", f"{bad}:{name}", "--insert", "auto")
    assert status == 1
    one_line(error)


class TestDebug:
    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_the_traceback_wherever_the_option_stands(self, selab, bad, place):
        words = ["count", "--arch", f"{bad}:outside"]
        words.insert(place, "--debug")
        status, _, error = selab(*words)
        assert status == 1
        assert "Traceback" in error
        assert "raise fault" in error
        assert error.splitlines()[-1].startswith("error: Outside: from outside")

    def test_the_variable(self, selab, bad, monkeypatch):
        monkeypatch.setenv("SELAB_DEBUG", "1")
        assert "raise fault" in selab("count", "--arch", f"{bad}:silent")[2]
        monkeypatch.setenv("SELAB_DEBUG", "0")
        assert "Traceback" not in selab("count", "--arch", f"{bad}:silent")[2]

    def test_a_mistake_has_a_traceback_too(self, selab):
        assert "UnknownNameError" in selab("archs", "nope", "--debug")[2]

    def test_it_is_no_word_behind_two_dashes(self):
        words = ["selab", "archs", "--", "--debug"]
        assert not faults.take_debug(words)
        assert words[-1] == "--debug"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SelabError("mine"), "mine"),
        (MemoryError(), "out of memory; take a smaller batch or input; give --debug for the traceback"),
        (OSError(28, "No space left on device"), "standard output: cannot be written: No space left on device"),
        (PermissionError(13, "Permission denied", "a\nb"), r"a\nb: Permission denied; give --debug for the traceback"),
        (OSError("odd"), "OSError: odd; give --debug for the traceback"),
        (ZeroDivisionError(), "ZeroDivisionError; give --debug for the traceback"),
    ],
)
def test_lines(error, line):
    assert faults.line_of(error) == line


def test_one_line_of_any_message():
    assert one_line(ValueError("first.\nsecond")) == "first"
    assert one_line(ValueError("\n\n")) == "ValueError"
    assert one_line(ValueError("\x1b[31mred")) == r"\x1b[31mred"
    assert len(one_line(ValueError("x" * 10**6))) == 301


def test_an_interruption_while_a_library_starts():
    """Ctrl-C between the first and the last line of torch's own start: no traceback, and the status of the signal."""
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._C" or name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["selab", "count", "--arch", "se_small_cnn"]
from selab.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert "Traceback" not in done.stderr


def test_an_interruption_while_the_program_starts():
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from selab.cli import main
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
