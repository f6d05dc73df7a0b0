"""The command line: each command one short function; torch is imported only by the commands that need it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from selab._version import __version__
from selab.attention import user_code
from selab.cli import faults, streams, usage
from selab.cli.checks import check, diff
from selab.cli.comparing import compare
from selab.cli.console import StoppedError, print_error, tell_code
from selab.cli.deploy import export, import_timings
from selab.cli.judging import blocks, fold, gates
from selab.cli.measure import profile, roofline, show_machine, tax, timeline
from selab.cli.networks import archs, count, show, sites
from selab.cli.new import new_app
from selab.cli.options import examples
from selab.cli.placing import place
from selab.cli.render import QUANTITIES, plot, schema, table
from selab.cli.signals import INTERRUPTED, Signals
from selab.cli.sweep import sweep
from selab.cli.training import evaluate, train
from selab.cli.weights import weights_app
from selab.errors import SelabError

_HELP = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """The commands; what a user's network raises cannot be taken for an answer of the command line."""

    def invoke(self, ctx: Any) -> None:
        try:
            super().invoke(ctx)
        except (typer.Exit, typer.Abort, usage.UsageError, SelabError, KeyboardInterrupt, BrokenPipeError):
            raise
        except BaseException as error:
            if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
                # rich ends the program where the reader of a table has gone.
                raise error.__context__ from None
            raise faults.FaultError(faults.line_of(error)) from error


app = typer.Typer(
    cls=_Commands,
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

_SAFE_PATH = "PYTHONSAFEPATH"


def main() -> None:
    """Run the program.

    A user's mistake, a machine's limit and any other error end in one line and status 1, wrong usage in status 2. An
    interruption ends in one line and the status of its signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
    """
    streams.prepare()
    debug = faults.take_debug(sys.argv)
    signals = Signals()
    user_code.tell_of_code(tell_code)
    with signals.handled(), _isolated_children():
        status = _status(signals, debug=debug)
        problem = streams.finish()
        if problem and not status:
            print_error(problem)
        if problem is not None:
            status = status or 1
    sys.exit(status)


def _status(signals: Signals, *, debug: bool) -> int | str | None:
    """Run the command line; return what to exit with, after the line of an error."""
    try:
        # Of `typer.Exit` this returns the status; a command itself returns nothing.
        status: object = app(prog_name="selab", standalone_mode=False)
        if status == INTERRUPTED:
            print_error("interrupted")
            return signals.status
        return status if isinstance(status, int) else 0
    except SystemExit as end:
        return end.code
    except usage.UsageError as error:
        if not usage.is_help(error):
            if debug:
                faults.print_traceback(error)
            print_error(usage.line_of(error))
        return usage.STATUS
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; the interpreter must not complain about it at exit.
        streams.drop()
        return 1
    except BaseException as error:
        if debug:
            faults.print_traceback(error)
        if isinstance(error, StoppedError):
            print_error(str(error))
            return signals.status
        if signals.number is not None or isinstance(error, KeyboardInterrupt):
            # An interruption may come out of C code as another error.
            print_error("interrupted")
            return signals.status
        print_error(faults.line_of(error))
        stopped = error.signal if isinstance(error, SelabError) else None
        return 1 if stopped is None else 128 + stopped


@contextmanager
def _isolated_children() -> Iterator[None]:
    """Keep Python processes that this one starts (workers, compilers, Ray's) from importing from the current folder."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(faults.DEBUG, help="Show the traceback of an error; or set SELAB_DEBUG=1.")
    ] = False,
) -> None:
    # `main` takes --debug out of the command line, because it may stand behind a command as well.
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
        "tax": (
            tax,
            examples(
                "selab tax --arch se_resnet50",
                "selab tax --arch timm:seresnet50 --impl fused",
                "selab tax --arch se_mobilenet --runtime openvino",
            ),
        ),
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
    "Judge": {
        "gates": (
            gates,
            examples(
                "selab gates --arch se_small_cnn --weights results/runs/…/weights.safetensors --pictures gates",
                "selab gates model.onnx --data photos",
            ),
        ),
        "blocks": (
            blocks,
            examples(
                "selab blocks --arch se_small_cnn --weights results/runs/…/weights.safetensors --runtime onnxruntime",
            ),
        ),
        "fold": (
            fold,
            examples(
                "selab fold --arch se_small_cnn --weights results/runs/…/weights.safetensors --max-drop 0.5",
                "selab fold model.onnx --data photos --max-error 0.02",
            ),
        ),
        "place": (
            place,
            examples("selab place --arch mobilenet_cifar --data cifar10 --budget latency=1.02"),
        ),
    },
    "Deploy": {
        "export": (
            export,
            examples(
                "selab export --arch se_mobilenet --to onnx",
                "selab export --arch se_mobilenet --to openvino --dtype int8 --images photos",
            ),
        ),
        "import": (
            import_timings,
            examples(
                "selab import --arch se_mobilenet --from litert --on-device 'Pixel 8' --base a1.txt --variant b1.txt",
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
        app.command(_name, cls=usage.Command, rich_help_panel=_group, epilog=_epilog)(_command)
# What other tools call it.
_doctor = app.command(
    "doctor", cls=usage.Command, hidden=True, rich_help_panel="Inspect", epilog=examples("selab machine")
)
_doctor(show_machine)
app.add_typer(new_app, name="new", rich_help_panel="Networks")
app.add_typer(weights_app, name="weights", rich_help_panel="Networks")


if __name__ == "__main__":
    main()
