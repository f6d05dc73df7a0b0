"""The three standard streams: closed, full or left by their reader, and text that their encoding does not have."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

_ERRORS = "selab.plain"
# What tables and messages have beyond ASCII, in its plain spelling.
_PLAIN = str.maketrans(
    {"→": "->", "←": "<-", "…": "...", "±": "+-", "×": "x", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "·": "*"}
    | dict(zip("─━│┃┌┐└┘├┤┬┴┼╭╮╰╯╷╵", "--||+++++++++++++||", strict=True))
)
_NARROWEST = 20


def prepare() -> None:
    """Make the streams usable: open closed descriptors, and let no character be an error.

    A file that is opened later must not get the number of a closed stream. Writing to a standard output that was
    closed fails, as writing to a full disk does; what a closed standard error would show is dropped.
    """
    for number, access in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                opened = os.open(os.devnull, access)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor, open to the end
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if not os.environ.get("COLUMNS", "80").isdecimal() or int(os.environ.get("COLUMNS", "80")[:9]) < _NARROWEST:
        # rich would print a letter a line.
        del os.environ["COLUMNS"]
    codecs.register_error(_ERRORS, _plain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_ERRORS)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Notes(
            sys.stderr.buffer, encoding=sys.stderr.encoding, errors=_ERRORS, line_buffering=True, write_through=True
        )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII for characters that an encoding lacks; an error handler of the module `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class _Notes(io.TextIOWrapper):
    """Standard error; where it cannot be written, notes and progress are dropped and the work goes on."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def encodes_all(stream: TextIO) -> bool:
    """Return whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def finish() -> str | None:
    """Write out what standard output holds back; return why that fails, None where it does not.

    Of a reader that has gone, as `head` does, nothing is said: the reason is empty. Afterwards the interpreter
    has nothing left to complain of.
    """
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop()
        return ""
    except OSError as error:
        drop()
        return f"standard output: cannot be written: {error.strerror}"
    except ValueError:  # closed by a user's network
        return "standard output: was closed"
    return None


def drop() -> None:
    """Drop what standard output still holds back."""
    with suppress(OSError, ValueError):
        if sys.stdout is not None and sys.stdout.fileno() == 1:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            sys.stdout.flush()
