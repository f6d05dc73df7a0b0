"""Layers and small networks for the tests of sites that are found by tracing."""

from torch import nn

from selab.attention.auto_sites import trace_ends

NCHW = (1, 3, 16, 16)


def conv(channels=8, kernel_size=3, groups=1, out=None, **keys):
    return nn.Conv2d(channels, out or channels, kernel_size, padding=kernel_size // 2, groups=groups, **keys)


def normed(channels=8, kernel_size=3, groups=1, out=None, **keys):
    return nn.Sequential(conv(channels, kernel_size, groups, out, **keys), nn.BatchNorm2d(out or channels))


def network(*blocks, channels=8, out=8):
    return nn.Sequential(conv(3, out=channels), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 4))


def found(model, input_nchw=NCHW):
    return [(end.path, end.kind) for end in trace_ends(model, input_nchw).found]


def left_out(model, input_nchw=NCHW):
    return " | ".join(trace_ends(model, input_nchw).left_out)
