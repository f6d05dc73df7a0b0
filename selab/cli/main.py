"""The command line: each command one short function; torch is imported only by the commands that need it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from selab._version import __version__
from selab.cli.checks import check, diff
from selab.cli.console import StoppedError, print_error
from selab.cli.measure import profile, roofline, show_machine, tax, timeline
from selab.cli.networks import archs, count, show, sites
from selab.cli.new import new_app
from selab.cli.options import examples
from selab.cli.render import QUANTITIES, plot, schema, table
from selab.cli.sweep import sweep
from selab.cli.training import compare, evaluate, train
from selab.cli.weights import weights_app
from selab.errors import SelabError

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="Measure what channel attention (Squeeze-and-Excitation and its kin) costs a network.",
    epilog=examples(
        "selab count --arch se_resnet50",
        "selab profile --arch se_mobilenet --quick",
        "selab sites --arch path/to/net.py:Net --insert auto",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


# The statuses of a shell for a program that a signal ended: 128 and the signal's number.
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class _Signals:
    """Whether SIGTERM came; it ends a command as Ctrl-C does, so that what was measured is kept."""

    terminated = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Turn SIGTERM into KeyboardInterrupt while the program runs."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return

        def handle(_number: int, _frame: FrameType | None) -> None:
            self.terminated = True
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @property
    def status(self) -> int:
        """What to exit with after an interruption."""
        return _TERMINATED if self.terminated else _INTERRUPTED


def main() -> None:
    """Run the program.

    A user's mistake and a machine's limit end in one line and status 1, wrong usage in status 2. An interruption ends
    in one line and the status of its signal: 130 for SIGINT, 143 for SIGTERM.
    """
    signals = _Signals()
    try:
        with signals.handled():
            app()
    except StoppedError as error:
        print_error(str(error))
        sys.exit(signals.status)
    except SelabError as error:
        print_error(str(error))
        sys.exit(1 if error.signal is None else 128 + error.signal)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(signals.status)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print_error("interrupted")
            sys.exit(signals.status)
        raise
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; the interpreter must not complain about it at exit.
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


# The commands by the group that `selab --help` shows them in, each with the examples at the end of its own help.
_COMMANDS: dict[str, dict[str, tuple[Callable[..., object], str]]] = {
    "Measure": {
        "profile": (
            profile,
            examples(
                "selab profile --arch se_resnet50 --quick",
                "selab profile --arch resnet50 --se block=eca --phase forward",
                "selab profile --arch net.py:Net --insert auto --input 3x320x320",
            ),
        ),
        "tax": (tax, examples("selab tax --arch se_resnet50", "selab tax --arch timm:seresnet50 --impl fused")),
        "sweep": (
            sweep,
            examples(
                "selab sweep --arch se_resnet18,se_resnet50 --batch 1,8",
                "selab sweep --arch resnet50 --insert residual --reduction 4,16",
            ),
        ),
    },
    "Inspect": {
        "count": (
            count,
            examples("selab count --arch resnet50 --arch se_resnet50", "selab count --arch se_vgg16 --by operator"),
        ),
        "sites": (sites, examples("selab sites --arch timm:resnet50 --insert 'layer*.*.bn3' --depth 3")),
        "timeline": (timeline, examples("selab timeline --arch se_resnet50 --phase forward_backward")),
        "roofline": (
            roofline,
            examples("selab roofline --arch se_resnet50", "selab roofline --arch se_resnet50 --as h200 --batch 32"),
        ),
        "machine": (show_machine, examples("selab machine")),
    },
    "Accuracy": {
        "train": (
            train,
            examples("selab train --arch se_small_cnn --epochs 4", "torchrun -m selab train …"),
        ),
        "eval": (evaluate, examples("selab eval --arch se_small_cnn --weights results/runs/…/weights.safetensors")),
        "compare": (
            compare,
            examples(
                "selab compare small_cnn se_small_cnn --seeds 5 --epochs 4",
                "selab compare small_cnn small_cnn+block=eca small_cnn+block=cbam",
            ),
        ),
    },
    "CI": {
        "check": (check, examples("selab check budgets.toml", "selab check budgets.toml --only mobile --thorough")),
        "diff": (diff, examples("selab diff before.json after.json --strict")),
        "schema": (schema, examples("selab schema --json record.schema.json")),
    },
    "Networks": {
        "archs": (archs, examples("selab archs resnet", "selab archs 'se_*_cifar'")),
        "show": (show, examples("selab show se_resnet50", "selab show se_resnet50 --runtime")),
    },
    "Tables and figures": {
        "table": (
            table,
            examples("selab table paper-2", "selab table latency --profiles results", "selab table zoo --format csv"),
        ),
        "plot": (
            plot,
            f"Quantities: {QUANTITIES}\n\n"
            + examples("selab plot added --profiles results", "selab plot accuracy --x params --arch se_resnet50"),
        ),
    },
}
for _group, _members in _COMMANDS.items():
    for _name, (_command, _epilog) in _members.items():
        app.command(_name, rich_help_panel=_group, epilog=_epilog)(_command)
# What other tools call it.
app.command("doctor", hidden=True, rich_help_panel="Inspect", epilog=examples("selab machine"))(show_machine)
app.add_typer(new_app, name="new", rich_help_panel="Networks")
app.add_typer(weights_app, name="weights", rich_help_panel="Networks")


if __name__ == "__main__":
    main()
