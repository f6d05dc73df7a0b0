"""What the commands say: tables and errors, progress, and JSON; each to its stream."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selab import catalog, foreign, units

if TYPE_CHECKING:
    from rich.console import Console

    from selab.measure.paired import Progress
    from selab.spec import Variant


def complain(message: str) -> None:
    """One line on standard error."""
    open_console(stderr=True).print(f"[bold red]error:[/] {plain(message)}", highlight=False, soft_wrap=True)


def open_console(*, stderr: bool = False) -> "Console":
    """Where to print; rich is imported only here."""
    from rich.console import Console

    # A name between colons, as of a file's callable, is no emoji.
    return Console(stderr=stderr, emoji=False)


def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    from rich.markup import escape

    return escape(text)


def find(word: str, *, option: str = "--arch") -> "Variant":
    """A variant; says so if that runs a user's code."""
    variant = catalog.find(word, option=option)
    code = foreign.runs_code_of(variant)
    if code is not None:
        open_console(stderr=True).print(f"running code from {plain(code)}", highlight=False, soft_wrap=True)
    return variant


def builtins(value: object) -> Any:
    """A record as dictionaries and lists."""
    import msgspec

    return msgspec.to_builtins(value)


def print_parts(*parts: object) -> None:
    """Tables and texts on standard output, an empty line between them."""
    console = open_console()
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part, highlight=False)


def write_json(value: object, to: Path) -> None:
    """To a file, whole or not at all, or for `-` to standard output.

    Raises:
        RecordError: it cannot be written.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if str(to) == "-":
        sys.stdout.write(text)
        return
    from selab.store import write_atomically

    write_atomically(to, text.encode())


@contextmanager
def reporting(console: "Console", words: Callable[[Any], str] | None = None) -> Iterator[Callable[[str, Any], None]]:
    """Progress on standard error: a live line on a terminal, otherwise one line per stage.

    The live line is drawn only when it is told something, which is between samples: a thread that turned a spinner
    would run beside what is measured.
    """
    seen: set[str] = set()

    def say(label: str, _state: "Progress | None") -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"{plain(label)} …", highlight=False)

    if not console.is_terminal:
        yield say
        return
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, transient=True) as line:

        def draw(label: str, state: "Progress | None") -> None:
            line.update(Text(label if state is None else f"{label}: {(words or measuring_words)(state)}"), refresh=True)

        yield draw


def measuring_words(state: "Progress") -> str:
    """How far a measurement is."""
    width = "" if state.half_width is None else f", ±{units.share(state.half_width, decimals=2)}"
    return f"{state.quads} quads{width}, {state.elapsed_s:.0f} of at most {state.budget_s:.0f} s"
