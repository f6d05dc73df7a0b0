"""A family of two networks that train and are measured in no time: its TOML, and the module that builds them."""

import types

TOML = """
family = "tiny"
source = "this test"
builder = "tiny_networks:build"
input_chw = [3, 32, 32]
num_classes = 10
[variants.tiny]
title = "Tiny"
[variants.se_tiny]
title = "Tiny with SE"
baseline = "tiny"
[variants.se_tiny.se]
sites = ["0"]
reduction = 4
bias = true
"""
MODULE = """
from torch import nn


def build(num_classes):
    conv = nn.Conv2d(3, 16, 5, stride=4)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))
"""


def write(folder, name="tiny.toml"):
    """Write the family into a folder; return the path of its TOML."""
    (folder / "tiny_networks.py").write_text(MODULE)
    path = folder / name
    path.write_text(TOML)
    return path


def build(num_classes=10):
    """Return the baseline."""
    module = types.ModuleType("tiny_networks")
    exec(MODULE, vars(module))
    return module.build(num_classes)
