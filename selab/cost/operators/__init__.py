"""Counting rules of torch's own operators, by theme; `selab.cost.rules` joins them in one table."""
