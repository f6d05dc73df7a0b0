"""Figures made of records."""
