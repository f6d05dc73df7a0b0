"""The command line; `main` is the program."""

from selab.cli.signals import quiet_start

with quiet_start():
    from selab.cli.main import main

__all__ = ["main"]
