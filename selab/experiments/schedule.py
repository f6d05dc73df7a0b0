"""How many short processes fit into the time of a profile, and how long each of them samples.

Time alone decides. Neither a ratio nor the width of an interval has a say in when a measurement ends: to stop when an
interval happens to be narrow makes a 95 % interval hold the truth in 92 % of measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from selab import units
from selab.bench.machine import CpuReading, cores_of_others_since
from selab.bench.noise import expected_half_width, pair_deviation
from selab.experiments.job import Request
from selab.records.estimate import LEAST_PROCESSES
from selab.records.types import Device

# Until the first process shows them: seconds from a start to the first run, and of a run beside its sampling.
_READY_S, _BESIDE_S = 3.0, 0.5
# Seconds of sampling in a run: at least, and at most. Another process is worth more than longer samples, but not while
# a single ABBA block varies by more than processes do.
_LEAST_S, _MOST_S = 0.4, 2.0


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a whole profile takes, and in how many processes.

    Attributes:
        seconds: of the whole command. It is exceeded where the fewest processes do not fit: by as much again at most,
            and then there are fewer, three at least.
        least: the fewest processes.
        most: the most; what time is left makes their samples longer.
    """

    seconds: float
    least: int
    most: int


QUICK = Effort(seconds=27.0, least=LEAST_PROCESSES, most=6)
DEFAULT = Effort(seconds=80.0, least=6, most=12)
THOROUGH = Effort(seconds=300.0, least=12, most=24)


def effort_of(request: Request) -> Effort:
    """Return how long a request takes: a given budget or number of processes replaces that of its degree."""
    effort = QUICK if request.quick else THOROUGH if request.thorough else DEFAULT
    if request.budget_s is not None:
        effort = Effort(seconds=request.budget_s, least=LEAST_PROCESSES, most=THOROUGH.most)
    processes = 1 if request.in_this_process else request.processes
    return effort if processes is None else replace(effort, least=processes, most=processes)


@dataclass(kw_only=True)
class Schedule:
    """The time of a measurement in short processes.

    Attributes:
        began: when the command began, by the clock.
        effort: how long, in how many processes.
        runs: short runs of each process: phases times rows times ways of timing.
        clock: seconds.
        control_share: of the processes that also measure a control, for as long again.
        done: processes that have ended well.
    """

    began: float
    effort: Effort
    runs: int
    clock: Callable[[], float]
    control_share: float = 0.5
    done: int = 0
    _ready_s: float = field(default=_READY_S, init=False)
    _beside_s: float = field(default=_BESIDE_S, init=False)

    @property
    def total(self) -> int:
        """Return how many processes there will be, as far as is known by now."""
        of_one = self._ready_s + self.runs * (self._beside_s + (1 + self.control_share) * _LEAST_S)
        fitting = self.done + int(self._left_s() / of_one)
        return max(self.done, self._least(of_one), min(self.effort.most, fitting))

    @property
    def total_words(self) -> str:
        """Return how many processes there will be, in words that say whether it may change."""
        fixed = self.effort.least == self.effort.most or self.done + 1 == self.total
        return f"{self.total}" if fixed else f"about {self.total}"

    def _least(self, of_one: float) -> int:
        """Return the fewest processes: of large networks those that fit into twice the time, and at least three."""
        effort = self.effort
        if effort.least == effort.most:
            return effort.least
        fitting = self.done + int((self._left_s() + effort.seconds) / of_one)
        return min(effort.least, max(LEAST_PROCESSES, fitting))

    @property
    def left(self) -> int:
        """Return how many processes are left to run."""
        return self.total - self.done

    def sampling_s(self) -> float:
        """Return the seconds of sampling of each short run of the next process."""
        share = self._left_s() / max(1, self.left) - self._ready_s
        return min(_MOST_S, max(_LEAST_S, (share / self.runs - self._beside_s) / (1 + self.control_share)))

    def expected_s(self) -> float:
        """Return the seconds that are expected from now to the end."""
        sampling = (1 + self.control_share) * self.sampling_s()
        return self.left * (self._ready_s + self.runs * (self._beside_s + sampling))

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

    def _left_s(self) -> float:
        return self.began + self.effort.seconds - self.clock()


# Cores; a tenth of one is what a system does by itself.
_MANY_OTHERS = 0.1


def expectation(schedule: Schedule, before: CpuReading | None, *, device: Device, cores: int) -> str:
    """Return in words how long a measurement will take, how wide its intervals will be, and what other programs use.

    Args:
        schedule: of the measurement.
        before: the processors' counters some time ago; None where there are none.
        device: that is measured.
        cores: logical processors that this process may use.
    """
    number = units.counted(schedule.total, "fresh process", "fresh processes")
    said = f"measuring for about {schedule.expected_s():.0f} s in {number}"
    if device != "cpu":
        return said
    others = cores_of_others_since(before)
    half = expected_half_width(schedule.total, pair_deviation(), busy=others / cores)
    seen = f"other programs use {others:.1f} of {cores} cores: " if others > _MANY_OTHERS else ""
    return f"{said}; {seen}expect about ±{100 * half:.2g} % on one thread"
