"""Signals that end the program: what was measured until then is kept, and nobody sees a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# SIGHUP, which a closed terminal sends, does not exist on every system.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
INTERRUPTED = 128 + signal.SIGINT
"""The status of a shell for a program that Ctrl-C ended; 128 and the signal's number."""

# An exception that passes through the start of one of these may be swallowed or come out as another one.
_LIBRARIES = ("numpy", "torch", "torchvision", "timm", "matplotlib")


class Signals:
    """Which signal asked the program to end.

    Attributes:
        number: of the last one; None if none came.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Turn every signal of `ENDING` into KeyboardInterrupt while the program runs.

        Signals that are ignored at the start, as under nohup, stay ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {}
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, self._handle)
        hook = sys.unraisablehook
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        # An interruption that meets a destructor or a callback of C code is printed there and lost.
        sys.unraisablehook = lambda _lost: None
        if _is_importing():
            # Nothing was measured yet.
            end_at_once(number)
        raise KeyboardInterrupt

    @property
    def status(self) -> int:
        """What to exit with after an interruption."""
        return INTERRUPTED if self.number is None else 128 + self.number


@contextmanager
def quiet_start() -> Iterator[None]:
    """End the process with one line at Ctrl-C, while the program itself is being imported."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, lambda number, _frame: end_at_once(number))
    except ValueError:  # signals are the main thread's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once(number: int) -> None:
    """End the process with one line, without unwinding what is under way."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def _is_importing() -> bool:
    specs = (getattr(sys.modules.get(name), "__spec__", None) for name in _LIBRARIES)
    return any(getattr(spec, "_initializing", False) for spec in specs)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold further signals back while a record is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
