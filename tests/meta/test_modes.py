"""What looks at a network loads no compiler."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from selab.meta.modes import made_on

PROGRAM = """
import sys
from selab.cli.main import main
sys.argv = ["selab", *sys.argv[1:]]
try:
    main()
finally:
    print("torch" in sys.modules, "torch._dynamo" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["count", "--arch", "se_mobilenet_v2"],
        ["sites", "--arch", "resnet18", "--insert", "auto"],
        ["count", "--arch", "mnasnet_a1_no_se+block=eca"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_these_commands_load_no_compiler(words):
    """It takes two seconds to load, as long as all the rest."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "True False"


def test_no_values_are_drawn_where_there_are_none():
    before = torch.random.get_rng_state()
    with made_on("meta"):
        layer = nn.Linear(3, 4)
        assert nn.init.normal_(layer.weight, std=0.1) is layer.weight
        assert nn.init.normal_(tensor=layer.weight) is layer.weight
        nn.init.kaiming_normal_(layer.weight)
    assert layer.weight.is_meta
    assert torch.equal(torch.random.get_rng_state(), before)


def test_values_are_drawn_where_there_is_memory():
    with made_on("cpu"):
        layer = nn.Linear(300, 40)
        nn.init.normal_(layer.weight, std=3.0)
    assert float(layer.weight.detach().std()) == pytest.approx(3.0, rel=0.1)
    with made_on("meta"):
        drawn = torch.empty(10, device="cpu").fill_(7.0).normal_()
    assert (drawn != 7.0).all()
