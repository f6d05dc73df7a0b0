"""The command line; `main` is the program."""

from selab.cli.main import main

__all__ = ["main"]
