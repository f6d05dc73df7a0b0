"""How long each of many short processes samples: one time for a whole profile, divided among them."""

from collections.abc import Callable
from dataclasses import dataclass, field

# Until the first process shows them: seconds from a start to the first run, and of a run beside its sampling.
_READY_S, _BESIDE_S = 3.0, 0.5
_LEAST_SAMPLING_S, _MOST_SAMPLING_S = 0.15, 10.0


@dataclass(kw_only=True)
class Schedule:
    """The time of a measurement in short processes.

    Attributes:
        end: when the profile should be done, by the clock. All processes are run, whatever it says.
        runs: short runs of each process: phases times rows times ways of timing.
        processes: that are to be run.
        clock: seconds.
        done: processes that have ended well.
    """

    end: float
    runs: int
    processes: int
    clock: Callable[[], float]
    done: int = 0
    _ready_s: float = field(default=_READY_S, init=False)
    _beside_s: float = field(default=_BESIDE_S, init=False)

    @property
    def left(self) -> int:
        """Return how many processes are left to run."""
        return self.processes - self.done

    def sampling_s(self) -> float:
        """Return the seconds of sampling of each short run of the next process."""
        share = (self.end - self.clock()) / max(1, self.left) - self._ready_s
        # Every second process, or every one of few, also measures the control, for as long again.
        return min(_MOST_SAMPLING_S, max(_LEAST_SAMPLING_S, (share / self.runs - self._beside_s) / 1.5))

    def ended(self, *, ready_s: float, elapsed_s: float, sampled_s: float) -> None:
        """Take note of a process that ended well.

        Args:
            ready_s: from its start to its first run.
            elapsed_s: from its start to its end.
            sampled_s: of sampling that each of its runs was to take.
        """
        self.done += 1
        self._ready_s = ready_s
        self._beside_s = max(0.0, (elapsed_s - ready_s) / self.runs - sampled_s)
