"""Measure latency and memory of `nn.Module`s."""

import os

# torch 2.13's profiler writes a line to standard error whenever it starts or stops; it reads this when it first runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
