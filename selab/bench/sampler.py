"""The paired sampler: arms alternate in one process until the interval of each ratio is narrow enough.

It uses neither torch nor any clock but the one it is given, so that tests can drive it with a fake clock. An arm
defines one call and how it is timed; the sampler decides which arm runs next, and when to stop.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from selab.bench.progress import Progress
from selab.errors import SelabError
from selab.records import estimate, stats
from selab.records.flag_texts import flag
from selab.records.types import ABBABlock, Flag, Order, Run, Statistic, Status

Clock = Callable[[], float]
LOOKS = frozenset(base << doublings for base in (10, 14) for doublings in range(20))
"""Numbers of ABBA blocks after which the width may be looked at: 10, 14, 20, 28, 40, 56, 80, 112, 160 …"""
# Seconds: the least warm-up of a run that follows another one at once.
_WARM_S = 1.0
# Of a short run; it is not judged, for no time is left to wait.
_SHORT_WARMUP_S = 0.15
_STEADY = 0.01
_LEAST_BELOW_THRESHOLD = 2
_WINDOW_ROUNDS = 2
_RECHECK = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """k calls, in seconds per call: the fastest, the median and the mean of them.

    In an `ABBABlock` these are `floor`, `typical` and `mean`, as in the JSON of a record.
    """

    min_s: float
    median_s: float
    mean_s: float

    @classmethod
    def of_calls(cls, calls_s: Sequence[float]) -> "Sample":
        """Summarise the times of single calls."""
        return cls(min_s=min(calls_s), median_s=stats.median(calls_s), mean_s=stats.mean(calls_s))

    @classmethod
    def of_window(cls, window_s: float, calls: int) -> "Sample":
        """Summarise one time around all calls: their mean is used for all three statistics."""
        each = window_s / calls
        return cls(min_s=each, median_s=each, mean_s=each)


class Arm(Protocol):
    """One of the things to compare. It times itself, possibly by several methods over the same calls."""

    def warm_call(self) -> float:
        """Make one call, finished when this returns, and return its seconds.

        Warm-up reads the time; after a change of arms it is ignored.
        """

    def sample(self, calls: int) -> Mapping[str, Sample]:
        """Make `calls` calls in a row, finished when this returns, and return method name → their sample."""


@dataclass(frozen=True, kw_only=True)
class WallArm:
    """An arm whose calls are each timed by a host clock.

    Attributes:
        call: the timed function; its result is dropped.
        clock: seconds, monotone.
        synchronize: waits until the call's work is done; part of the time.
        method: the name of this way of timing.
    """

    call: Callable[[], object]
    clock: Clock = time.perf_counter
    synchronize: Callable[[], object] | None = None
    method: str = "wall"

    def warm_call(self) -> float:
        """Make one call and return its seconds."""
        start = self.clock()
        self.call()
        if self.synchronize is not None:
            self.synchronize()
        return self.clock() - start

    def sample(self, calls: int) -> dict[str, Sample]:
        """Make `calls` calls in a row, each timed."""
        return {self.method: Sample.of_calls([self.warm_call() for _ in range(calls)])}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The warm-up, the size of a sample, and when to stop.

    Attributes:
        method: of the arms' methods, the one whose width decides when to stop.
        statistic: the statistic of that method.
        warmup_least_s: alternate for at least this long …
        warmup_least_calls: … and this many calls of the two arms together.
        warmup_most_s: give up waiting for a steady state after this long.
        sample_s: about how long one sample lasts.
        single_call_s: from here on a sample is one call, and no warm calls are made.
        target_half_width: stop when half the interval of ln(variant / baseline) is this narrow.
        budget_s: seconds of sampling, warm-up not counted, after which to stop: as soon as there are enough pairs for
            an interval, and after `most_overrun` budgets in any case.
        least_pairs: so many are enough for an interval.
    """

    method: str = "wall"
    statistic: Statistic = "floor"
    warmup_least_s: float = 1.0
    warmup_least_calls: int = 10
    warmup_most_s: float = 10.0
    sample_s: float = 0.010
    single_call_s: float = 0.050
    target_half_width: float = 0.005
    budget_s: float = 60.0
    most_overrun: float = 5.0
    least_pairs: int = estimate.MIN_PAIRS

    @classmethod
    def for_cpu(cls, *, quick: bool = False) -> "Plan":
        """Return the plan of wall time on a CPU; the headline is the fastest call (`floor`)."""
        return cls().quick_request() if quick else cls()

    @classmethod
    def for_gpu(cls, *, method: str = "eager_wall", quick: bool = False) -> "Plan":
        """Return the plan of a GPU: longer warm-up and samples; the headline is the median call (`typical`)."""
        plan = cls(method=method, statistic="typical", warmup_least_s=3.0, sample_s=0.020)
        return plan.quick_request() if quick else plan

    def thorough_request(self) -> "Plan":
        """Return the same plan that stops at ±0.25 % or after 3 minutes."""
        return replace(self, target_half_width=0.0025, budget_s=180.0)

    def quick_request(self) -> "Plan":
        """Return the same plan that stops at ±1 % or after 15 s."""
        return replace(self, target_half_width=0.01, budget_s=15.0)

    def sampling(self, seconds: float) -> "Plan":
        """Return the same plan with another budget; warm-up and samples shrink with it.

        A budget of less than a second is then possible for a small network.
        """
        return replace(
            self,
            budget_s=seconds,
            warmup_least_s=min(self.warmup_least_s, seconds / 5),
            warmup_most_s=min(self.warmup_most_s, seconds),
            sample_s=min(self.sample_s, seconds / 100),
        )

    def warmed(self) -> "Plan":
        """Return the same plan for a run that follows another one at once: the device has its working clocks."""
        return replace(self, warmup_least_s=min(self.warmup_least_s, _WARM_S))

    def short(self, seconds: float) -> "Plan":
        """Return the plan of one of many short runs, each in a fresh process: a fixed warm-up, then so many seconds.

        It takes at least one ABBA block of each pair, however long that lasts. The width of the interval of one process
        has no part in when it ends.
        """
        return replace(
            self,
            warmup_least_s=_SHORT_WARMUP_S,
            warmup_most_s=_SHORT_WARMUP_S,
            warmup_least_calls=2,
            target_half_width=0.0,
            budget_s=seconds,
            least_pairs=2,
            most_overrun=math.inf,
        )

    def for_control(self) -> "Plan":
        """Return the plan of the A/A control: ±0.5 % within half the time, even where the measurement stops at ±1 %.

        The control's half-width is part of the noise floor that a difference must exceed. With ±1 % in it, a true
        difference of 2 % would be missed in one of four measurements. It may take as long as the comparison for the
        fewest pairs.
        """
        return replace(
            self,
            target_half_width=min(self.target_half_width, 0.005),
            budget_s=self.budget_s / 2,
            most_overrun=2 * self.most_overrun,
        )


@dataclass(frozen=True, kw_only=True)
class Discarded:
    """The ABBA block that just ended must not count: the sampler discards it and runs it again."""

    reason: str


WatchBlocks = Callable[[], Sequence[Flag] | Discarded]
"""Called after every ABBA block: what to flag, or that the block must be discarded and run again."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """The result of a warm-up.

    Attributes:
        calls: of all arms together, the first ones included.
        calls_s: of each arm, its median call in the last window.
        steady: True if the last two equal windows agreed within 1 %, and where its duration was fixed.
    """

    calls: int
    elapsed_s: float
    calls_s: tuple[float, ...]
    steady: bool


def warm_up(arms: Sequence[Arm], plan: Plan, clock: Clock) -> WarmUp:
    """Call each arm once, then alternate A, B, A, B … until the last third of the rounds is as fast as the one before.

    The plan's durations are those of two arms; more arms have as much more time.

    Thirds are used because a window of fixed length is either too short for a steady median or longer than the warm-up.
    They are compared at growing intervals, which keeps the sorting off the machine's caches.
    """
    count, share = len(arms), len(arms) / 2
    start = clock()
    for arm in arms:
        arm.warm_call()
    rounds: list[tuple[float, ...]] = []
    next_check_s = plan.warmup_least_s * share
    while True:
        rounds.append(tuple(arm.warm_call() for arm in arms))
        elapsed = clock() - start
        over = elapsed >= plan.warmup_most_s * share
        if not over and (elapsed < next_check_s or 2 * len(rounds) < plan.warmup_least_calls):
            continue
        steady = plan.warmup_least_s == plan.warmup_most_s or is_steady(rounds)
        if steady or over:
            last = rounds[-_window(rounds) :]
            calls_s = tuple(stats.median([each[arm] for each in last]) for arm in range(count))
            calls = count * (1 + len(rounds))
            return WarmUp(calls=calls, elapsed_s=clock() - start, calls_s=calls_s, steady=steady)
        next_check_s = elapsed * _RECHECK


def _window(rounds: Sequence[tuple[float, ...]]) -> int:
    return max(min(_WINDOW_ROUNDS, len(rounds)), len(rounds) // 3)


def is_steady(rounds: Sequence[tuple[float, ...]]) -> bool:
    """Return True if the median rounds of the last two thirds of a warm-up differ by less than 1 %.

    Args:
        rounds: seconds of one call of each arm.
    """
    width = _window(rounds)
    if len(rounds) < 2 * width:
        return False
    totals = [sum(each) for each in rounds]
    earlier, later = stats.median(totals[-2 * width : -width]), stats.median(totals[-width:])
    return abs(later - earlier) < _STEADY * earlier


def calls_per_sample(call_s: float, plan: Plan) -> int:
    """Return k: one call from 50 ms on; below that about `sample_s` worth of calls and at least two.

    Raises:
        SelabError: a call took no time by this clock.
    """
    if not 0 < call_s < math.inf:
        raise SelabError(f"warm-up: a call took {call_s!r} s by this clock; time something longer, or a finer clock")
    if call_s >= plan.single_call_s:
        return 1
    return max(_LEAST_BELOW_THRESHOLD, round(plan.sample_s / call_s))


def orders(seed: int) -> Iterator[Order]:
    """Yield ABBA or BAAB without end, by a coin that the seed decides."""
    coin = Random(seed)
    while True:
        yield "ABBA" if coin.getrandbits(1) else "BAAB"


class _Sampler:
    """Takes ABBA blocks of two arms; a change of arm is followed by a warm call where calls are short."""

    def __init__(self, baseline: Arm, variant: Arm, *, calls: int, warm_calls: bool) -> None:
        self._arms = {"A": baseline, "B": variant}
        self._calls = calls
        self._warm_calls = warm_calls
        self._last = ""

    def leave(self) -> None:
        """Note that other arms run before the next block, so that it begins with a change of arm."""
        self._last = ""

    def block(self, order: Order) -> dict[str, ABBABlock]:
        """Take four samples in this order, by each of the arms' methods."""
        samples = [self._sample(letter) for letter in order]
        methods = samples[0].keys()
        for letter, sample in zip(order, samples, strict=True):
            if sample.keys() != methods:
                raise ValueError(f"arm {letter} samples {sorted(sample)}, another sample has {sorted(methods)}")
        return {method: _block(order, [sample[method] for sample in samples], method) for method in methods}

    def _sample(self, letter: str) -> Mapping[str, Sample]:
        arm = self._arms[letter]
        if self._warm_calls and letter != self._last:
            arm.warm_call()
        self._last = letter
        return arm.sample(self._calls)


def _block(order: Order, samples: Sequence[Sample], method: str) -> ABBABlock:
    for sample in samples:
        if not 0 < sample.min_s < math.inf:
            raise SelabError(f"{method}: a call took {sample.min_s!r} s by this clock; a finer clock is needed")
    return ABBABlock(
        order=order,
        floor=_four([sample.min_s for sample in samples]),
        typical=_four([sample.median_s for sample in samples]),
        mean=_four([sample.mean_s for sample in samples]),
    )


def _four(samples_s: Sequence[float]) -> tuple[float, float, float, float]:
    """Round to a tenth of a nanosecond: clocks tick in nanoseconds, so further digits mean nothing."""
    first, second, third, fourth = (round(sample, 10) for sample in samples_s)
    return first, second, third, fourth


class _Collected:
    """The ABBA blocks that count, by method, and the flags noticed while they were taken."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._blocks: dict[str, list[ABBABlock]] = {}
        self._noticed: dict[str, tuple[str, int]] = {}
        self._taken = 0
        self.kept = 0

    def add(self, block: Mapping[str, ABBABlock], seen: Sequence[Flag] | Discarded) -> bool:
        """Keep a block, or only note that it was discarded; return whether it counts."""
        self._taken += 1
        for method in block:
            self._blocks.setdefault(method, [])
        if self._plan.method not in self._blocks:
            raise ValueError(f"the plan's headline is {self._plan.method!r}, the arms sample {sorted(self._blocks)}")
        discarded = isinstance(seen, Discarded)
        for noticed in [flag("voided", reason=seen.reason)] if isinstance(seen, Discarded) else seen:
            self._note(noticed.name, noticed.detail)
        if discarded:
            return False
        for method, one in block.items():
            self._blocks[method].append(one)
        self.kept += 1
        return True

    def _note(self, name: str, detail: str) -> None:
        first, times = self._noticed.get(name, (detail, 0))
        self._noticed[name] = (first, times + 1)

    def half_width(self) -> float | None:
        """Return the half-width of the headline over the blocks so far."""
        return estimate.half_width(self._blocks[self._plan.method], self._plan.statistic)

    def runs(self, warm: WarmUp, *, calls: int, seed: int, status: Status, elapsed_s: float) -> dict[str, Run]:
        """Return method name → its run; flags say at how many blocks they were seen."""
        flags = tuple(
            Flag(name=name, detail=f"{detail} (at {times} of {self._taken} ABBA blocks)")
            for name, (detail, times) in self._noticed.items()
        )
        return {
            method: Run(
                calls_per_sample=calls,
                warmup_calls=warm.calls,
                warmup_s=warm.elapsed_s,
                seed=seed,
                steady=warm.steady,
                status=status,
                elapsed_s=elapsed_s,
                quads=tuple(blocks),
                flags=flags,
            )
            for method, blocks in self._blocks.items()
        }


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable the garbage collector for the body, and restore it on any exit."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_spent(plan: Plan, elapsed_s: float, blocks: int) -> bool:
    """Return True when the budget is spent; a slow network overruns it until it has enough pairs for an interval."""
    enough = 2 * blocks >= plan.least_pairs
    return elapsed_s >= plan.budget_s * (1.0 if enough else plan.most_overrun)


class _Pair:
    """One of the measured pairs: its ABBA blocks, their time, and the width of its interval."""

    def __init__(self, baseline: tuple[Arm, float], variant: tuple[Arm, float], plan: Plan, *, alone: bool) -> None:
        """Take each arm with the seconds of one of its calls; `alone` if no other pair runs between its blocks."""
        call_s = stats.mean([baseline[1], variant[1]])
        self.calls = calls_per_sample(call_s, plan)
        self.collected = _Collected(plan)
        self.elapsed_s = 0.0
        self.width: float | None = None
        self._target = plan.target_half_width
        self._alone = alone
        self._sampler = _Sampler(baseline[0], variant[0], calls=self.calls, warm_calls=call_s < plan.single_call_s)

    def block(self, order: Order, clock: Clock, watch: WatchBlocks | None) -> bool:
        """Take one ABBA block; return whether it counts."""
        start = clock()
        if not self._alone:
            self._sampler.leave()
        block = self._sampler.block(order)
        counts = self.collected.add(block, watch() if watch is not None else ())
        self.elapsed_s += clock() - start
        if counts and self.collected.kept in LOOKS:
            self.width = self.collected.half_width()
        return counts

    @property
    def status(self) -> Status:
        return "converged" if self.width is not None and self.width <= self._target else "budget"


def measure(
    baseline: Arm,
    variant: Arm,
    plan: Plan,
    *,
    clock: Clock = time.perf_counter,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
    between_blocks: WatchBlocks | None = None,
) -> dict[str, Run]:
    """Measure one pair of arms: warm-up, then ABBA blocks until its interval is narrow enough or the budget is spent.

    The A/A control is this with `plan.for_control()`, a second instance of the baseline as the variant, and another
    seed.

    Args:
        baseline: arm A.
        variant: arm B.
        plan: durations, headline and target.
        clock: as in `measure_together`.
        seed: decides the order within each block.
        progress: called after every block.
        between_blocks: as in `measure_together`.

    Returns:
        Method name → its run. All methods have the same blocks and the headline's status.

    Raises:
        SelabError: a call took no time by the arm's clock.
        ValueError: the arms' methods differ, or the plan's headline is none of them.
    """
    pair = ("baseline", "variant")
    runs = measure_together(
        dict(zip(pair, (baseline, variant), strict=True)),
        [pair],
        plan,
        clock=clock,
        seed=seed,
        progress=progress,
        between_blocks=between_blocks,
    )
    return runs[pair]


def measure_together(
    arms: Mapping[str, Arm],
    pairs: Sequence[tuple[str, str]],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
    between_blocks: WatchBlocks | None = None,
) -> dict[tuple[str, str], dict[str, Run]]:
    """Measure pairs of arms in one run: warm-up of all arms in turn, then rounds with one ABBA block of every pair.

    Machine noise affects all pairs equally, so that their ratios can be compared. In each round the order of the pairs
    is drawn anew, and within a pair the order of the block. The widths are looked at after 10, 14, 20, 28, 40 … rounds
    and at no other time. The run ends when every interval was narrow enough at the last look, or when the budget is
    spent and there are 20 pairs of samples; pairs that are narrow enough go on until then. Neither a ratio nor its
    distance from one can end a run.

    Args:
        arms: by their names; all of them are warmed up.
        pairs: of names, the baseline first.
        plan: durations, headline and target; its budget is that of one pair.
        clock: seconds, monotone; times the warm-up and the budget.
        seed: decides the order of the pairs, and that of each block.
        progress: called after every block; its count is that of the pair with the fewest, its width the widest.
        between_blocks: called after every block: what to flag, or that the block is discarded. A discarded block is run
            again in the same order before its round ends.

    Returns:
        Pair → method name → its run. Of one pair, the run's time is the whole time, which the budget is held
        against; of several, that of its own blocks.

    Raises:
        SelabError: a call took no time by the arm's clock.
        ValueError: there is no pair, a pair names no arm, the arms' methods differ, or the plan's headline is none of
            them.
    """
    unknown = {name for pair in pairs for name in pair} - set(arms)
    if unknown or not pairs:
        raise ValueError(f"pairs: {sorted(unknown) or 'none'}; the arms are {sorted(arms)}")
    names = list(arms)
    draw, coin = Random(f"pairs {seed}"), orders(seed)
    budget = replace(plan, budget_s=plan.budget_s * len(pairs))
    with gc_disabled():
        warm = warm_up(list(arms.values()), plan, clock)
        timed = {name: (arms[name], warm.calls_s[names.index(name)]) for name in names}
        running = {pair: _Pair(timed[pair[0]], timed[pair[1]], plan, alone=len(pairs) == 1) for pair in pairs}
        due: list[tuple[tuple[str, str], Order]] = []
        start = clock()
        while True:
            if not due:
                due = [(pair, next(coin)) for pair in draw.sample(list(pairs), len(pairs))]
            pair, order = due.pop(0)
            if not running[pair].block(order, clock, between_blocks):
                due.append((pair, order))
            elapsed = clock() - start
            kept = min(one.collected.kept for one in running.values())
            if progress is not None:
                width = _widest(running.values())
                progress(Progress(blocks=kept, half_width=width, elapsed_s=elapsed, budget_s=budget.budget_s))
            narrow = not due and all(one.status == "converged" for one in running.values())
            if narrow or _is_spent(budget, elapsed, kept):
                break
    taken = {pair: elapsed if len(pairs) == 1 else one.elapsed_s for pair, one in running.items()}
    return {
        pair: one.collected.runs(warm, calls=one.calls, seed=seed, status=one.status, elapsed_s=taken[pair])
        for pair, one in running.items()
    }


def _widest(pairs: Iterable[_Pair]) -> float | None:
    """Return the widest half-width at the last look; None before the first."""
    widths = [one.width for one in pairs]
    known = [width for width in widths if width is not None]
    return max(known) if len(known) == len(widths) else None
