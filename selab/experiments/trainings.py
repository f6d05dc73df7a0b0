"""The trainings of some comparisons: each of them once, whichever comparisons share it, seed by seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from selab import units
from selab.experiments.compare import Arm, Comparison, Report, Say, folder_of
from selab.models.spec import Variant
from selab.training.progress import TrainingProgress, duration
from selab.training.recipe import Recipe, recipe_hash
from selab.training.record import SeedOutcome
from selab.training.run import looks_finished
from selab.training.train import DivergedError, Training, train
from selab.training.verdict import LEAST_SEEDS

Expects = Callable[[Variant, Comparison], float | None]
"""Returns about how many seconds a training of a network takes; None where nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A training that is left.

    Attributes:
        label: what reports call it: `training 3 of 10 (seed 1, se_small_cnn)`.
        uses: the comparisons that wait for it, and which of their two networks it is of.
    """

    variant: Variant
    recipe: Recipe
    seed: int
    label: str
    uses: tuple[tuple[Comparison, Arm], ...]

    @property
    def comparison(self) -> Comparison:
        """Return the first comparison that waits for it: its data, options and folder are those of all."""
        return self.uses[0][0]

    @property
    def folder(self) -> Path:
        """Return where it keeps its files."""
        one = self.comparison
        options = one.plan.options
        return folder_of(self.variant, one.data, self.recipe, options, self.seed, out=one.out, weights=self.weights)

    @property
    def weights(self) -> Path | None:
        """Return the file that it starts from; None for random weights."""
        return self.comparison.plan.weights.get(self.variant.name)

    @property
    def finished(self) -> bool:
        """Whether its result lies in its folder, from another comparison or from `selab train`."""
        return looks_finished(self.folder)

    def settle(self, found: Training | DivergedError, *, at_once: int = 1) -> None:
        """Note its result in every comparison that waits for it, and write their records.

        Args:
            found: the result.
            at_once: trainings that ran at the same time.
        """
        outcome = str(found) if isinstance(found, DivergedError) else _outcome(found, at_once)
        for comparison, arm in self.uses:
            comparison.settle(self.seed, arm, outcome)


@dataclass(kw_only=True)
class Schedule:
    """The trainings that are left of some comparisons, and how long they take.

    Attributes:
        pending: in the order in which they are run. After each seed every comparison has a pair more.
        at_once: how many of them run at the same time.
    """

    pending: tuple[Pending, ...]
    at_once: int = 1
    _epoch_s: dict[str, float] = field(default_factory=dict, init=False)
    _left_s: dict[str, float] = field(default_factory=dict, init=False)
    _begun: set[str] = field(default_factory=set, init=False)

    def expected_s(self, expects: Expects) -> float | None:
        """Return about how many seconds all trainings take that are not finished; None where nobody knows."""
        of_network: dict[str, float | None] = {}
        unfinished = [one for one in self.pending if not one.finished]
        for one in unfinished:
            if one.variant.name not in of_network:
                of_network[one.variant.name] = expects(one.variant, one.comparison)
        each = [of_network[one.variant.name] for one in unfinished]
        return None if None in each else math.fsum(one for one in each if one is not None) / self.at_once

    def begin(self, one: Pending) -> None:
        """Note that a training begins."""
        self._begun.add(one.label)

    def end(self, one: Pending) -> None:
        """Note that a training has ended."""
        self._left_s.pop(one.label, None)

    def timed(self, one: Pending, state: TrainingProgress) -> TrainingProgress:
        """Return a training's state with the time until all are finished, once an epoch of one has been timed.

        Networks without a finished epoch are taken to need as long as this one.
        """
        if state.epoch_s is not None:
            self._epoch_s[one.variant.name] = state.epoch_s
        if state.eta_s is not None:
            self._left_s[one.label] = state.eta_s
        own = self._epoch_s.get(one.variant.name)
        waiting = [other for other in self.pending if other.label not in self._begun]
        if state.eta_s is None or own is None or not waiting:
            return state
        later = math.fsum(other.recipe.epochs * self._epoch_s.get(other.variant.name, own) for other in waiting)
        left = (math.fsum(self._left_s.values()) + later) / self.at_once
        return msgspec.structs.replace(state, total_eta_s=max(left, *self._left_s.values()))


def schedule_of(comparisons: Sequence[Comparison], *, at_once: int = 1) -> Schedule:
    """Return the trainings that are left of some comparisons, counted once each: they may share a baseline."""
    uses: dict[tuple[int, str, str, str], list[tuple[Comparison, Arm]]] = {}
    for one in comparisons:
        for seed, arm in one.left():
            network = one.network_of(arm)
            key = seed, network.name, network.facts_hash, recipe_hash(one.recipe_of(arm))
            uses.setdefault(key, []).append((one, arm))
    # Sorting is stable: the networks of a seed stay in their order.
    ordered = sorted(uses.items(), key=lambda item: item[0][0])
    recipes = {some[0][0].recipe_of(some[0][1]).name for some in uses.values()}
    pending = tuple(
        Pending(
            variant=some[0][0].network_of(some[0][1]),
            recipe=some[0][0].recipe_of(some[0][1]),
            seed=seed,
            label=f"training {number} of {len(ordered)} ({_which(seed, name, some[0], several=len(recipes) > 1)})",
            uses=tuple(some),
        )
        for number, ((seed, name, *_), some) in enumerate(ordered, start=1)
    )
    return Schedule(pending=pending, at_once=max(1, min(at_once, len(pending))))


def _which(seed: int, name: str, use: tuple[Comparison, Arm], *, several: bool) -> str:
    """Return `seed 1, se_small_cnn`; with the recipe where a schedule has several."""
    comparison, arm = use
    return f"seed {seed}, {name}" + (f", {comparison.recipe_of(arm).name}" if several else "")


Runs = Callable[[Schedule, Report, Say], None]
"""Runs all trainings of a schedule."""


def run_all(
    comparisons: Sequence[Comparison],
    report: Report,
    say: Say = lambda _: None,
    *,
    expects: Expects | None = None,
    at_once: int = 1,
    runs: Runs | None = None,
) -> None:
    """Run what is left of comparisons; say beforehand how many trainings and epochs that is, and how long it takes.

    The records are on disk after each training. A training that diverges is a result too: it is recorded, and the next
    one begins.

    Args:
        comparisons: those of `selab.experiments.compare.left_of`.
        report: called when a training begins, and with its progress and the time that all trainings take.
        say: called with one line for what is already finished, where a training resumes, and divergence.
        expects: as `selab.experiments.expected.training_s`; None to say nothing of the time.
        at_once: trainings that run at the same time; more than one needs `runs`.
        runs: runs the trainings of a schedule; None for one after the other in this process.

    Raises:
        SelabError: as `selab.training.train.train`; finished trainings are in the partial records.
    """
    schedule = schedule_of(comparisons, at_once=at_once)
    if schedule.pending:
        say(announcement(schedule, expects))
    for one in comparisons:
        if one.finished:
            counted = units.counted(len(one.seeds), "seed")
            say(f"{one.variant.name}: {one.finished} of {counted} already finished")
    (runs or one_by_one)(schedule, report, say)
    for one in comparisons:
        # Nothing is left to train where an earlier run with more seeds has finished these.
        one.save()


def announcement(schedule: Schedule, expects: Expects | None) -> str:
    """Return in words how many trainings there will be, how long they take, and how to interrupt them."""
    comparison = schedule.pending[0].comparison
    epochs = units.counted(comparison.recipe.epochs, "epoch")
    finished = sum(one.finished for one in schedule.pending)
    left = len(schedule.pending) - finished
    if not left:
        trained = f"all {finished} are" if finished > 1 else "it is"
        return (
            f"{units.counted(finished, 'training')} × {epochs} on {comparison.facts.title}: {trained} trained already"
        )
    kept = f", {finished} more trained already" if finished else ""
    together = f", {schedule.at_once} at once" if schedule.at_once > 1 else ""
    seconds = None if expects is None else schedule.expected_s(expects)
    about = "" if seconds is None else f", about {duration(seconds)} by a few steps of each"
    few = len(comparison.plan.seeds) < LEAST_SEEDS
    width = f"; an interval worth reading needs at least {LEAST_SEEDS} seeds" if few else ""
    return (
        f"{units.counted(left, 'training')} × {epochs} on {comparison.facts.title}{kept}{together}{about}"
        f"{width}; Ctrl-C saves everything, the same command resumes"
    )


def one_by_one(schedule: Schedule, report: Report, say: Say) -> None:
    """Run the trainings of a schedule in this process, one after the other.

    Raises:
        SelabError: as `selab.training.train.train`.
    """
    for one in schedule.pending:
        schedule.begin(one)
        report(one.label, None)
        try:
            one.settle(result_of(one, schedule, report, say))
        except DivergedError as error:
            say(f"{one.label}: {error}")
            one.settle(error)
        schedule.end(one)


def result_of(one: Pending, schedule: Schedule, report: Report, say: Say) -> Training:
    """Train, or return what is finished already.

    Args:
        one: the training.
        schedule: it is of.
        report: as in `run_all`.
        say: likewise.

    Raises:
        SelabError: as `selab.training.train.train`.
    """
    return train(
        one.variant,
        one.comparison.data,
        one.recipe,
        seed=one.seed,
        folder=one.folder,
        options=one.comparison.plan.options,
        report=lambda state: report(one.label, schedule.timed(one, state)),
        say=lambda text: say(f"{one.label}: {text}"),
        weights=one.weights,
    )


def _outcome(done: Training, at_once: int) -> SeedOutcome:
    return SeedOutcome(
        test=done.test,
        seconds=done.seconds,
        images_per_s=median(epoch.images_per_s for epoch in done.epochs),
        epochs=done.epochs,
        torch=done.torch,
        at_once=at_once,
    )
