"""What can go wrong through no fault of the program: each message says where, what, what is allowed, what is next."""

from collections.abc import Iterable
from difflib import get_close_matches


class SelabError(Exception):
    """A user's mistake or a machine's limit; the command line prints it in one line and exits 1."""


class SpecError(SelabError):
    """A TOML of facts is malformed; the message names the file and the key."""


class UnknownNameError(SelabError):
    """A name that nothing has; the message lists the nearest ones."""


class InsertionError(SelabError):
    """An SE block cannot stand where it was asked to; the message names the module."""


class ModelError(SelabError):
    """A model failed to run, or its output is not finite."""


class DeviceError(SelabError):
    """The device that was asked for is not there."""


class OutOfMemoryError(SelabError):
    """The device's memory does not hold the workload."""


class RecordError(SelabError):
    """A record cannot be read, written, or joined with another."""


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Ends an error message: `; did you mean a, b?`, or the first of what there is where nothing is near."""
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=most, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
