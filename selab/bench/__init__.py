"""Measure latency and memory of `nn.Module`s."""
