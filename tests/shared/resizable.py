"""A tiny network that can be made wider and deeper, and made-up times for it."""

from selab.records.types import Latency

NETWORKS = """
from torch import nn


class Block(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def build(num_classes):
    return nn.Sequential(
        Block(3, 8), Block(8, 8), nn.MaxPool2d(2), Block(8, 16), Block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, num_classes),
    )
"""
FAMILY = """
family = "tiny"
source = "this test"
builder = "resizable_networks:build"
input_chw = [3, 8, 8]
num_classes = 10
[variants.tiny]
title = "Tiny"
[variants.se_tiny]
title = "With blocks"
baseline = "tiny"
se = { sites = ["0", "1", "3", "4"], reduction = 2, bias = true }
"""


def latency_of(ratio):
    """A forward pass that was measured, at this ratio of the baseline's time."""
    return Latency(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        verdict_kind="slower",
        ratio=ratio,
        ratio_low=ratio - 0.001,
        ratio_high=ratio + 0.001,
        baseline_s=1e-3,
        variant_s=1e-3 * ratio,
    )
