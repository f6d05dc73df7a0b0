"""Experiments that combine networks, counting, measuring and training."""
