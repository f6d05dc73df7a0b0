"""Errors that no command foresaw, in one line: those of the system, of torch, and of a user's own code."""

import errno
import os
import sys
import sysconfig
import traceback
from pathlib import Path

from selab.errors import SelabError, one_line
from selab.records.files import shown

DEBUG = "--debug"
_VARIABLE = "SELAB_DEBUG"
_HINT = "; give --debug for the traceback"


class FaultError(SelabError):
    """A command raised something else than a `SelabError`; the message is the line of it, the cause is the error."""


def take_debug(words: list[str]) -> bool:
    """Take `--debug` out of a command line, wherever it stands; return whether tracebacks are asked for."""
    end = words.index("--") if "--" in words else len(words)
    places = [place for place in range(1, end) if words[place] == DEBUG]
    for place in reversed(places):
        del words[place]
    return bool(places) or os.environ.get(_VARIABLE, "") not in ("", "0")


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an error on standard error; for a `FaultError`, that of its cause."""
    cause = error.__cause__ if isinstance(error, FaultError) else error
    traceback.print_exception(cause, file=sys.stderr)


def line_of(error: BaseException) -> str:
    """Return one line for an error: what happened, in which file of the user, and the next step."""
    if isinstance(error, SelabError):
        return str(error)
    place = _place(error)
    if isinstance(error, MemoryError):
        return f"out of memory{place}; take a smaller batch or input{_HINT}"
    if isinstance(error, RecursionError):
        return f"nested too deeply, or a function that calls itself without end{place}{_HINT}"
    if isinstance(error, SystemExit):
        return f"the network ends the program (SystemExit){place}; a network may not exit{_HINT}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
        if not where and error.errno in (errno.ENOSPC, errno.EBADF, errno.EFBIG):
            # Files have names; this is what was printed.
            return f"standard output: cannot be written: {error.strerror}"
        return f"{where}{error.strerror}{place}{_HINT}"
    if isinstance(error, UnicodeError):
        return f"text that is not valid Unicode: {one_line(error)}{place}{_HINT}"
    kind, text = type(error).__name__, one_line(error)
    return f"{kind}{'' if text == kind else f': {text}'}{place}{_HINT}"


def _place(error: BaseException) -> str:
    """Return where in a user's code an error arose, ` (net.py, line 12)`; empty if it did not arise there."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
    except Exception:  # a source file that cannot be decoded
        return ""
    own = [frame for frame in frames if _is_users(frame.filename)]
    return f" ({shown(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def _is_users(file: str) -> bool:
    folders = (Path(__file__).parents[1], sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return path.is_absolute() and not installed and not any(path.is_relative_to(folder) for folder in folders)
