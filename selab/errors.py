"""Errors that a user can mend. A message is one line: where, what, what is allowed, and the next step."""

from collections.abc import Iterable
from difflib import get_close_matches


class SelabError(Exception):
    """Base class: a user's mistake or a machine's limit. The command line prints its line and exits with status 1.

    Attributes:
        signal: number of the signal that stopped the work, if one did; the command line exits with 128 + `signal`.
    """

    signal: int | None = None


class SpecError(SelabError):
    """A configuration is malformed: a TOML, a line of `--se`, a registration. The message names the key."""


class UnknownNameError(SelabError):
    """A name is unknown; the message lists the nearest known names."""


class InsertionError(SelabError):
    """A block cannot be inserted at a site; the message names the module."""


class ModelError(SelabError):
    """A network fails to run, or its output is not finite."""


class DeviceError(SelabError):
    """The requested device does not exist."""


class OutOfMemoryError(SelabError):
    """The workload does not fit into the device's memory."""


class RecordError(SelabError):
    """A record cannot be read, written or compared with another."""


def one_line(error: BaseException, *, most: int = 300) -> str:
    """Return the first line of an exception's message without its full stop, or its type's name if it has none.

    An exception of a user's code may have a message that itself raises, has thousands of characters, or moves a
    terminal's cursor.

    Args:
        error: any exception.
        most: characters.
    """
    try:
        lines = str(error).strip().splitlines()
        text = str(lines[0]).rstrip(".") if lines else ""
    except BaseException:
        text = ""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[: most + 1])
    return (text if len(text) <= most else f"{text[:most]}…") or type(error).__name__


# Shorter beginnings are of many names.
_SHORT = 3


def nearest(name: str, known: Iterable[str], *, most: int = 3, shown: int = 12) -> str:
    """Return the end of an error message: `; did you mean a, b?`, or `; known: a, b, …` if no name is similar.

    Args:
        name: what was given.
        known: the names that exist.
        most: suggest at most this many.
        shown: list at most this many if no name is similar.
    """
    names = sorted(known)
    # Part of a name is closer than another name of the same length.
    longer = sorted((one for one in names if len(name) > _SHORT and one.startswith(name.lower())), key=len)
    close = longer[:most] or get_close_matches(name.lower(), names, n=most, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    listed = ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
    return f"; known: {listed}" if names else ""
