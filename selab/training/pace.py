"""When a running training reads its sums: often enough to be watched, seldom enough not to slow it down."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Means:
    """Mean loss and accuracy over the steps of an epoch so far."""

    loss: float
    top1_pct: float | None


class Pace:
    """The steps after which to look at a training. All ranks know them beforehand; rank 0's clock sets the distance.

    Args:
        every_s: seconds between two looks.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._distance, self._last, self._next = 1, 0, 1
        self._steps, self._seconds, self._warm = 0, 0.0, False

    @property
    def step_s(self) -> float | None:
        """Seconds per step, without the first look of this process: it includes compilers and loaders."""
        return self._seconds / self._steps if self._steps else None

    def begin(self, step: int) -> None:
        """Begin or resume an epoch after this step."""
        self._last, self._next = step, step + self._distance

    def due(self, step: int) -> bool:
        """Return whether to look after this step."""
        return step >= self._next

    def next_distance(self, step: int, elapsed_s: float) -> int:
        """Return the steps to the next look, at most twice as many as before.

        Args:
            step: the present one.
            elapsed_s: seconds since the last look.
        """
        wanted = (step - self._last) * self._every_s / elapsed_s if elapsed_s > 0 else math.inf
        return int(max(1, min(2 * self._distance, wanted)))

    def looked(self, step: int, elapsed_s: float, distance: int) -> int:
        """Note a look and return the steps since the last one."""
        done = step - self._last
        if self._warm:
            self._steps, self._seconds = self._steps + done, self._seconds + elapsed_s
        self._warm = True
        self._distance, self._last, self._next = distance, step, step + distance
        return done


def per_second(images: int, seconds: float) -> float:
    """Return images per second; 0 before the clock has moved."""
    return images / seconds if seconds > 0 else 0.0
