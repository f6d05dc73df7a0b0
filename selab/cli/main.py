"""The command line: each command one short function; torch is imported only by the commands that need it."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from selab._version import __version__
from selab.cli.checks import check, diff
from selab.cli.console import print_error
from selab.cli.measure import profile, roofline, show_machine, tax, timeline
from selab.cli.networks import archs, count, show, sites
from selab.cli.new import new_app
from selab.cli.render import plot, schema, table
from selab.cli.sweep import sweep
from selab.cli.training import compare, evaluate, train
from selab.cli.weights import weights_app
from selab.errors import SelabError

app = typer.Typer(
    help="What channel attention really costs: insert, count and measure Squeeze-and-Excitation blocks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# What typer's own runner exits with when it is interrupted: 128 + SIGINT.
_INTERRUPTED = 130


def main() -> None:
    """The program: a user's mistake, a machine's limit and an interruption end in one line and status 1."""
    try:
        app()
    except SelabError as error:
        print_error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print_error("interrupted")
            sys.exit(1)
        raise
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; the interpreter must not complain about it at exit.
        sys.stdout = None
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# The commands by the group that `selab --help` shows them in.
_COMMANDS: dict[str, dict[str, Callable[..., object]]] = {
    "Measure": {"profile": profile, "tax": tax, "sweep": sweep},
    "Inspect": {"count": count, "sites": sites, "timeline": timeline, "roofline": roofline, "machine": show_machine},
    "Accuracy": {"train": train, "eval": evaluate, "compare": compare},
    "CI": {"check": check, "diff": diff, "schema": schema},
    "Networks": {"archs": archs, "show": show},
    "Tables and figures": {"table": table, "plot": plot},
}
for _group, _members in _COMMANDS.items():
    for _name, _command in _members.items():
        app.command(_name, rich_help_panel=_group)(_command)
app.add_typer(new_app, name="new", rich_help_panel="Networks")
app.add_typer(weights_app, name="weights", rich_help_panel="Networks")


if __name__ == "__main__":
    main()
