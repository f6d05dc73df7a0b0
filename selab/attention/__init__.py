"""Attention blocks, their configuration, and inserting them into networks."""
