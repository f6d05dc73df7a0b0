"""The C library's heap: whether memory that was freed goes back to the system."""

import ctypes
from collections.abc import Callable

from selab.errors import DeviceError
from selab.records.types import Device

# Parameters of mallopt, and what they are set to: nothing freed goes back to the system, nothing comes from mmap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def hold_heap() -> None:
    """Make the C library keep freed memory until this process ends.

    By default glibc returns large buffers to the system, which clears and maps every page again at the next request.
    For a small network that is half of its time, and a different share with SE than without.

    Raises:
        DeviceError: a C library without `mallopt`.

    Source: mallopt(3).
    """
    mallopt = _mallopt()
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, _MOST)):
        raise DeviceError("--hold-heap: this system's C library has no mallopt; omit the option")


def keep_freed(device: Device) -> None:
    """Hold the heap of a process that trains on the CPU, where the C library can.

    A step would otherwise map and clear most of its pages again.

    Args:
        device: that is trained on.
    """
    if device == "cpu" and has_mallopt():
        hold_heap()


def has_mallopt() -> bool:
    """Return whether `hold_heap` can do its work here."""
    return _mallopt() is not None


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return None  # no such function, or (on Windows) no such library
