"""Measurers: each takes a model and an example input, returns a frozen value, prints nothing and touches no file."""
