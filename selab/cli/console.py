"""What the commands print: tables, errors, progress and JSON, each to its stream."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from selab import units
from selab.attention import user_code
from selab.cli.streams import encodes_all
from selab.errors import SelabError
from selab.models import catalog, external
from selab.records.estimate import MIN_PAIRS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from selab.bench.progress import Progress
    from selab.cli.options import Look
    from selab.experiments.job import Job, Request
    from selab.models.spec import Variant
    from selab.records.types import Cost, Insertion
    from selab.report.table import Table
    from selab.training.progress import TrainingProgress


# Seconds between two lines of a training's progress where there is no terminal; each epoch has a line of its own.
_LINE_S = 60.0
# Of a word in an error that is longer, the beginning and so much of the end are shown.
_RUN, _TAIL = 400, 60
# Blocks with a narrower squeeze are remarked upon, and so many found sites are named.
_NARROW, _NAMED_SITES = 8, 3


class StoppedError(SelabError):
    """A command was interrupted; the message says where the results so far are."""


class BrokenFiles:
    """Files that cannot be read and are left out: each is named in a line of its own, once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, error: SelabError) -> None:
        """Print the warning of a file."""
        if str(error) not in self._told:
            self._told.add(str(error))
            _print_line("yellow", "warning", f"left out {error}")

    def exit(self) -> None:
        """End the command with status 1 if a file was left out; what was read has been shown."""
        if self._told:
            raise typer.Exit(1)


def print_error(message: str) -> None:
    """Print one line on standard error, whatever the message has in it."""
    _print_line("red", "error", message)


def _print_line(colour: str, kind: str, message: str) -> None:
    line = "".join(
        each if each.isprintable() or (each.isspace() and each > "~") else " " if each in "\t\n\r" else repr(each)[1:-1]
        for each in message.strip()
    )
    line = re.sub(rf"(\S{{{_RUN // 2}}})\S{{{_RUN // 2},}}(?=\S{{{_TAIL}}})", r"\1…", line)
    start = f"[bold {colour}]{kind}:[/]"
    open_console(stderr=True).print(f"{start} {escape_markup(line)}", highlight=False, soft_wrap=True)


def is_rank_zero() -> bool:
    """Return whether this process prints for all of a job: torchrun's first one, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def print_note(text: str) -> None:
    """Print one line on standard error, from one of a job's processes."""
    if is_rank_zero():
        open_console(stderr=True).print(escape_markup(text), highlight=False, soft_wrap=True)


def open_console(*, stderr: bool = False) -> "Console":
    """Return a console; rich is imported only here."""
    from rich.console import Console

    # A name between colons, as in path/to/file.py:net:, is not an emoji.
    return Console(stderr=stderr, emoji=False)


def escape_markup(text: str) -> str:
    """Return text whose brackets are not markup."""
    from rich.markup import escape

    return escape(text)


def find(name: str, *, option: str = "--arch") -> "Variant":
    """Look up a variant; print a note if building it runs a user's code."""
    variant = catalog.find(name, option=option)
    announce_code(variant)
    return variant


def announce_code(variant: "Variant") -> None:
    """Print a note if building a variant runs a user's code."""
    for place in external.places_of_code(variant):
        tell_code(place)
        user_code.code_is_known(place)


def tell_code(place: str) -> None:
    """Print that a user's code runs."""
    print_note(f"running code from {place}")


def resolve_job(request: "Request") -> "Job":
    """Look up a request's networks; print a note for each whose building runs a user's code."""
    from selab.experiments.job import resolve

    job = resolve(request)
    announce_code(job.variant)
    if job.baseline is not None and request.baseline is not None:
        announce_code(job.baseline)
    return job


def finds_sites(variant: "Variant") -> bool:
    """Return whether a variant's sites are found by tracing, as with `--insert auto`."""
    sites = () if variant.se is None else variant.se.sites
    return "auto" in ([sites] if isinstance(sites, str) else sites)


def announce_sites(variant: "Variant", insertions: "Sequence[Insertion]") -> None:
    """Print which sites `--insert auto` found: how many, and the first of them; nothing for sites that were named."""
    if not insertions or not finds_sites(variant):
        return
    first = ", ".join(one.path for one in insertions[:_NAMED_SITES])
    more = ", …" if len(insertions) > _NAMED_SITES else ""
    found = units.counted(len(insertions), "site")
    print_note(f"auto: {found} found: {first}{more}; `selab sites` shows them in the network")


def print_insertion_notes(variant: "Variant", insertions: "Sequence[Insertion]", base_params: int) -> None:
    """Print what is unusual about inserted blocks: sites left out, a narrow squeeze, or doubled parameters.

    Args:
        variant: of the network; one of the catalog, unchanged, gets no note.
        insertions: its blocks.
        base_params: parameters without the blocks; 0 where they are not known.
    """
    skipped: tuple[str, ...] = getattr(insertions, "skipped", ())
    if skipped:
        shown = ", ".join(skipped[:_NAMED_SITES]) + (", …" if len(skipped) > _NAMED_SITES else "")
        print_note(f"note: left out {units.counted(len(skipped), 'site')}: {shown}")
    if "+" not in variant.name:
        return
    narrow = [one.squeeze_channels for one in insertions if (one.squeeze_channels or _NARROW) < _NARROW]
    # A width that was given is meant.
    if narrow and "latent_channels" not in variant.name:
        blocks = f"{units.counted(len(insertions), 'block')} {units.plural_of(len(narrow), 'squeezes', 'squeeze')}"
        print_note(
            f"note: {len(narrow)} of {blocks} to fewer than {_NARROW} channels, "
            f"the narrowest to {min(one for one in narrow if one)}; give --se divisor={_NARROW}, or a smaller reduction"
        )
    added = sum(one.params for one in insertions)
    if added > base_params > 0:
        share = units.percent(added / base_params, decimals=0)
        print_note(f"note: the blocks more than double the network: {share} parameters; fewer sites cost less")


def params_of(cost: "Cost | None") -> int:
    """Return the parameters of a cost; 0 where there is none."""
    return 0 if cost is None else cost.params


def builtins(value: object) -> Any:
    """Return a record as dictionaries and lists."""
    import msgspec

    return msgspec.to_builtins(value)


def print_parts(*parts: object) -> None:
    """Print tables and texts on standard output, an empty line between them."""
    console = open_console()
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part, highlight=False)


def print_tables(tables: "Sequence[Table]", look: "Look" = "rich", *texts: str) -> None:
    """Print tables on standard output in a format.

    Args:
        tables: in their order.
        look: `rich` for a terminal, or text for another program.
        texts: what stands below the tables on a terminal.
    """
    if look == "rich":
        print_parts(*tables)
        for text in texts:
            open_console().print(f"\n{escape_markup(text)}", highlight=False, soft_wrap=True)
        return
    from selab.report.table import render

    sys.stdout.write(render(tables, look))


def check_outputs(*paths: Path | None) -> None:
    """Find out whether files can be written, before anything is measured; they may exist, and `-` may.

    Raises:
        RecordError: one cannot be written.
    """
    from selab.records.files import check_writable

    for path in paths:
        if path is not None and str(path) != "-":
            check_writable(path, replace=True)


def write_json(value: object, to: Path) -> None:
    """Write to a file, whole or not at all, or for `-` to standard output.

    Raises:
        RecordError: it cannot be written.
    """
    if str(to) == "-":
        text = json.dumps(value, indent=1, ensure_ascii=not encodes_all(sys.stdout))
        sys.stdout.write(f"{text}\n")
        return
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    from selab.records.files import write_atomically

    # A name that is no valid Unicode has surrogates, which JSON escapes.
    write_atomically(to, text.encode(errors="backslashreplace"))


@contextmanager
def reporting(console: "Console") -> Iterator[Callable[[str, Any], None]]:
    """Show the progress of measurements on standard error: a live line on a terminal, otherwise one line per stage.

    The live line is drawn only on a report, which comes between samples: a thread that turned a spinner would disturb
    the measurement.
    """
    seen: set[str] = set()

    def say(label: str, _state: "Progress | None") -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"{escape_markup(label)} …", highlight=False)

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
    """The progress of trainings; this one prints nothing, because another process of the job does."""

    def __call__(self, label: str, state: "TrainingProgress | None") -> None:
        """Report that a training begins, or where it stands."""

    def say(self, text: str) -> None:
        """Print one line that stays."""


@contextmanager
def following(console: "Console", *, clock: Callable[[], float] = time.monotonic) -> Iterator[Following]:
    """Show the progress of trainings on standard error: a bar on a terminal, otherwise lines for a log.

    Both are drawn only on a report: a thread that redrew them would disturb the training.

    Args:
        console: where to print.
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
        self._console.print(escape_markup(text), highlight=False, soft_wrap=True)


class _Display(Following):
    """A line when a training begins, and below a bar for each that runs: all epochs, how far and how good it is."""

    def __init__(self, console: "Console", bar: "Bar") -> None:
        self._console, self._bar = console, bar
        self._tasks: dict[str, TaskID] = {}
        self._running: set[str] = set()

    def __call__(self, label: str, state: "TrainingProgress | None") -> None:
        if label not in self._tasks:
            self.say(f"{label} …")
            self._tasks[label] = self._bar.add_task("", visible=False)
        if state is not None:
            ended = state.last is not None and state.last.epoch == state.epochs
            (self._running.discard if ended else self._running.add)(label)
            # `training 3 of 10 (seed 0, net)` → `seed 0, net`, where there are several bars.
            which = f"{label.rpartition('(')[2].rstrip(')')}: " if len(self._running) > 1 else ""
            self._bar.update(
                self._tasks[label],
                total=state.epochs * state.steps,
                completed=(state.epoch - 1) * state.steps + state.step,
                description=which + state.short_words,
                visible=not ended,
            )
            self._bar.refresh()

    def say(self, text: str) -> None:
        # A bar may be of a training that has ended; those that run show themselves again.
        for task in self._tasks.values():
            self._bar.update(task, visible=False)
        self._running.clear()
        self._bar.refresh()
        self._console.print(escape_markup(text), highlight=False, soft_wrap=True)


def measuring_words(state: "Progress") -> str:
    """Return how far a measurement is: `28 pairs, ±0.71 %, 3 of 15 s`.

    Sampling goes on beyond the budget while there are too few pairs for an interval; the words say so.
    """
    pairs = 2 * state.blocks
    width = "" if state.half_width is None else f", ±{units.share(state.half_width, decimals=2)}"
    if state.elapsed_s <= state.budget_s:
        return f"{pairs} pairs{width}, {state.elapsed_s:.0f} of {state.budget_s:.0f} s"
    needed = f" (budget {state.budget_s:.0f} s; {MIN_PAIRS} pairs are needed)" if pairs < MIN_PAIRS else ""
    return f"{pairs} pairs{width}, {state.elapsed_s:.0f} s{needed}"
