"""Stopping a training between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from selab.errors import SelabError


class StopRequest:
    """Whether the training has been asked to stop, and by which signal this process was asked."""

    wanted = False
    signal: int | None = None


@contextmanager
def stoppable(*, alone: bool) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request that is met between two steps.

    A second SIGINT interrupts at once, but only where one process trains alone. Among several, the terminal sends the
    first one and torchrun the second; torchrun also ends processes that take too long.

    Args:
        alone: whether this process trains alone.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if alone and stop.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.wanted, stop.signal = True, number

    # SIGHUP, which a closed terminal sends, does not exist everywhere; under nohup it stays ignored.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield stop
    except SelabError as error:
        error.signal = stop.signal
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
