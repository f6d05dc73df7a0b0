"""How unsteady the machine is before anything is measured, and how wide the intervals will therefore be."""

import math
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from selab.bench.machine import threads_and_affinity
from selab.bench.sampler import Clock, gc_disabled
from selab.records import stats

# Standard deviation of a process's ratio on a quiet machine, where only the place of buffers in memory differs:
# 0.85 to 1.6 % for SE-MobileNet on an AMD EPYC.
_BETWEEN_PROCESSES = 0.015
# The same for other programs on all cores; on a shared AMD EPYC, a program on one of two cores makes it 5 to 7 %.
_BETWEEN_WHEN_BUSY = 0.12
# Pairs of a process, of a network whose calls last some ten milliseconds.
_PAIRS = 4
_SAMPLES = 24
_CALLS = 3


def expected_half_width(processes: int, pair_deviation: float, *, busy: float = 0.0) -> float:
    """Return half of the interval that so many processes will have, as a fraction of the ratio.

    Args:
        processes: at least 2.
        pair_deviation: of the logarithm of the ratio of two neighbouring samples.
        busy: share of the machine's cores that other programs use.
    """
    within = pair_deviation / math.sqrt(_PAIRS)
    of_a_process = math.hypot(_BETWEEN_PROCESSES, _BETWEEN_WHEN_BUSY * min(1.0, busy), within)
    return stats.student_quantile(processes - 1) * of_a_process / math.sqrt(processes)


def pair_deviation(work: Callable[[], object] | None = None, *, clock: Clock = time.perf_counter) -> float:
    """Return how much neighbouring samples of the same work differ now: the robust deviation of ln(next / last).

    Args:
        work: what is repeated; by default a convolution of some milliseconds on one pinned thread, for 0.2 s.
        clock: seconds.
    """
    if work is not None:
        return _deviation(work, clock)
    x, weight = torch.ones(1, 64, 56, 56), torch.ones(64, 64, 3, 3)
    with threads_and_affinity(1), torch.inference_mode():
        return _deviation(lambda: torch.nn.functional.conv2d(x, weight), clock)


def _deviation(work: Callable[[], object], clock: Clock) -> float:
    def sample() -> float:
        def one() -> float:
            start = clock()
            work()
            return clock() - start

        return min(one() for _ in range(_CALLS))

    with gc_disabled():
        sample()
        samples = [sample() for _ in range(_SAMPLES)]
    return stats.robust_spread([math.log(after / before) for before, after in pairwise(samples)])
