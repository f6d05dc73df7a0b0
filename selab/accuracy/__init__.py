"""Data, training and evaluation: accuracy next to cost."""
