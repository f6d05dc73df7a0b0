"""What the commands say: tables and errors, progress, and JSON; each to its stream."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selab import units
from selab.models import catalog, external

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from selab.bench.sampler import Progress
    from selab.models.spec import Variant
    from selab.training.progress import TrainingProgress


# Where no terminal shows how far a training is, a line at most so often, beside those of finished epochs.
_LINE_S = 60.0


def print_error(message: str) -> None:
    """One line on standard error."""
    open_console(stderr=True).print(f"[bold red]error:[/] {plain(message)}", highlight=False, soft_wrap=True)


def is_rank_zero() -> bool:
    """Whether this process says what all of a job's processes know: torchrun's first one, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def print_note(text: str) -> None:
    """One line on standard error, of one of a job's processes."""
    if is_rank_zero():
        open_console(stderr=True).print(plain(text), highlight=False, soft_wrap=True)


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
    code = external.runs_code_of(variant)
    if code is not None:
        print_note(f"running code from {code}")
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


def check_outputs(*paths: Path | None) -> None:
    """Before anything is measured: whether files that are asked for can be written; they may exist, and `-` may.

    Raises:
        RecordError: one cannot be written.
    """
    from selab.records.store import check_writable

    for path in paths:
        if path is not None and str(path) != "-":
            check_writable(path, replace=True)


def write_json(value: object, to: Path) -> None:
    """To a file, whole or not at all, or for `-` to standard output.

    Raises:
        RecordError: it cannot be written.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if str(to) == "-":
        sys.stdout.write(text)
        return
    from selab.records.store import write_atomically

    write_atomically(to, text.encode())


@contextmanager
def reporting(console: "Console") -> Iterator[Callable[[str, Any], None]]:
    """Progress of measurements on standard error: a live line on a terminal, otherwise one line per stage.

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
            line.update(Text(label if state is None else f"{label}: {measuring_words(state)}"), refresh=True)

        yield draw


class Following:
    """What is said while networks are trained; this one says nothing, for another process of the job does."""

    def __call__(self, label: str, state: "TrainingProgress | None") -> None:
        """A training begins, or is so far."""

    def say(self, text: str) -> None:
        """One line that stays."""


@contextmanager
def following(console: "Console", *, clock: Callable[[], float] = time.monotonic) -> Iterator[Following]:
    """Progress of trainings on standard error: a bar on a terminal, otherwise lines, as they are kept in a log.

    Both are drawn only when they are told something: a thread that redrew them would run beside what is trained.

    Args:
        console: where to.
        clock: seconds since some moment.
    """
    if not is_rank_zero():
        yield Following()
    elif not console.is_terminal:
        yield _Lines(console, clock)
    else:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        words = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        with Bar(BarColumn(bar_width=None), words, console=console, auto_refresh=False, transient=True) as bar:
            yield _Display(console, bar)


class _Lines(Following):
    """A line when a training begins and when an epoch is finished, and in between at most one a minute."""

    def __init__(self, console: "Console", clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._seen: set[str] = set()
        self._said_s = clock()

    def __call__(self, label: str, state: "TrainingProgress | None") -> None:
        if label not in self._seen:
            self._seen.add(label)
            self.say(f"{label} …")
        if state is None:
            return
        finished = state.last is not None and state.last.epoch == state.epoch
        if finished or self._clock() - self._said_s >= _LINE_S:
            self.say(f"{label}: {state.words}")

    def say(self, text: str) -> None:
        self._said_s = self._clock()
        self._console.print(plain(text), highlight=False, soft_wrap=True)


class _Display(Following):
    """A line when a training begins, and below the last one a bar of all epochs, with how far and how good it is."""

    def __init__(self, console: "Console", bar: "Bar") -> None:
        self._console, self._bar = console, bar
        self._seen: set[str] = set()
        self._task = bar.add_task("", visible=False)

    def __call__(self, label: str, state: "TrainingProgress | None") -> None:
        if label not in self._seen:
            self._seen.add(label)
            self.say(f"{label} …")
        if state is not None:
            self._bar.update(
                self._task,
                total=state.epochs * state.steps,
                completed=(state.epoch - 1) * state.steps + state.step,
                description=state.short_words,
                visible=True,
            )
            self._bar.refresh()

    def say(self, text: str) -> None:
        # What the bar shows is of what was before.
        self._bar.update(self._task, visible=False)
        self._bar.refresh()
        self._console.print(plain(text), highlight=False, soft_wrap=True)


def measuring_words(state: "Progress") -> str:
    """How far a measurement is."""
    width = "" if state.half_width is None else f", ±{units.share(state.half_width, decimals=2)}"
    return f"{state.quads} quads{width}, {state.elapsed_s:.0f} of at most {state.budget_s:.0f} s"
