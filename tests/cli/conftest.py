"""Fixtures of the commands' tests."""

import sys

import pytest
import tiny_family


def _one_line(error):
    """A user's mistake: one line, no traceback."""
    assert "Traceback" not in error
    progress = [
        line
        for line in error.splitlines()
        if line.endswith(("…", "the same command resumes")) or line.startswith("running code from ")
    ]
    lines = [line for line in error.splitlines() if line and line not in progress]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Trainings in this process, where tests can see to them."""
    monkeypatch.setattr("selab.experiments.at_once.own_jobs", lambda: 1)


@pytest.fixture
def one_line():
    """Checks that an error is one line, and returns the line."""
    return _one_line


NETWORK = """
import torch
from torch import nn

print("this module was imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.separable = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        print("forward")
        return self.fc(self.separable(self.stem(x)).mean((2, 3)))
"""


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return f"{path}:Net"


@pytest.fixture
def tiny(tmp_path):
    yield tiny_family.write(tmp_path)
    sys.modules.pop("tiny_networks", None)
