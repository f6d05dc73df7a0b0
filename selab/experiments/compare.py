"""Trains a variant and its baseline from several seeds, one training after the other; what is finished stays."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from torch import nn

from selab._version import __version__
from selab.bench.machine import machine
from selab.cost.count import count
from selab.errors import RecordError, SpecError
from selab.experiments.compared import Compared
from selab.experiments.job import Request, job_of, resolve
from selab.experiments.profiling import Profile
from selab.models import catalog
from selab.models.build import build
from selab.models.checkpoint import load
from selab.models.provenance import address, is_stale, variants_of
from selab.models.spec import Variant
from selab.records.store import check_writable, file_name, partial_path, save
from selab.records.types import Frozen, Machine, Phase, Record
from selab.training.data import Data
from selab.training.distributed import join
from selab.training.evaluate import check_network
from selab.training.progress import TrainingProgress
from selab.training.recipe import Recipe, adapted
from selab.training.record import (
    FOLDER,
    AccuracyRecord,
    DataSpec,
    Options,
    Outcome,
    Seed,
    accuracy_path,
    read_accuracy_record,
    read_accuracy_records,
    save_accuracy_record,
    warnings_of,
)
from selab.training.run import differences, request_key, run_config
from selab.training.train import DivergedError, Training, train

Report = Callable[[str, TrainingProgress | None], object]
Say = Callable[[str], object]

# What two comparisons must have in common to be one; the rest of a record tells how it came about.
_DECIDING = ("facts_hash", "baseline_facts_hash", "data", "recipe", "options")


class Plan(Frozen, frozen=True, kw_only=True):
    """What is compared, on what, and how often.

    Attributes:
        baseline: None for the variant's own.
        recipe: as it is named; the options may change its epochs and its batch.
        seeds: trained one after the other, each for both networks.
        command: the command line that asks for the same again.
    """

    arch: str
    baseline: str | None
    recipe: Recipe
    options: Options
    seeds: tuple[int, ...]
    command: str


def pair(arch: str, baseline: str | None) -> tuple[Variant, Variant]:
    """The variant and what it is compared with, its own baseline if none is named.

    Raises:
        SpecError: there is no baseline.
        UnknownNameError: no such name.
    """
    variant = catalog.find(arch)
    other = catalog.find(baseline) if baseline is not None else catalog.baseline_of(variant)
    if other is None:
        raise SpecError(f"{arch}: is a baseline itself; name both: selab compare BASELINE VARIANT")
    if other.name == variant.name:
        raise SpecError(f"{arch}: is compared with itself; name a baseline and a variant")
    return variant, other


def folder_of(variant: Variant, data: Data, recipe: Recipe, options: Options, seed: int, *, out: Path) -> Path:
    """Where one training keeps its files, on whatever machine it goes on: `OUT/runs/<name>.<key>`.

    What decides its result is in the key: another network, recipe, data set or option has another folder, another
    number of threads has not.
    """
    config = run_config(variant, data, recipe, seed=seed, options=options)
    name = file_name(f"{variant.name}.{data.name}.{recipe.name}")
    return out / "runs" / f"{name}.e{config.recipe.epochs}.s{seed}.{request_key(config)}"


def fitted(variant: Variant, data: Data | DataSpec) -> Variant:
    """The variant for these images: their classes and their size."""
    return msgspec.structs.replace(variant, num_classes=data.num_classes, input_chw=data.input_chw)


def loaded(variant: Variant, data: Data, weights: Path) -> nn.Module:
    """A variant with trained weights, for these images; what is not of this network is refused and nothing loaded.

    Raises:
        SelabError: as `selab.build.build` and `selab.weights.load`.
    """
    fitting = fitted(variant, data)
    model = build(fitting).model
    load(model, weights, variant=variant, fitted=fitting)
    return model


class Comparison:
    """A comparison while it grows; `record()` gives what there is at any moment.

    Started by `torchrun`, each process has one, takes over and runs; files are those of rank 0, and what it reads in
    them is known to all, so that all train the same.

    Attributes:
        group: the processes; everything but `take_over` and `run` is for the first one alone.
        exists: whether a complete record has all that was asked for; `take_over` finds out.
    """

    def __init__(self, plan: Plan, data: Data, *, out: Path) -> None:
        self.plan = plan
        self.data = data
        self.group = join(plan.options.device)
        self.facts = msgspec.convert(data, DataSpec, from_attributes=True)
        self.out = out
        self.variant, self.baseline = pair(plan.arch, plan.baseline)
        self.own = catalog.baseline_of(self.variant) == self.baseline
        self.recipe = adapted(plan.recipe, epochs=plan.options.epochs, batch=plan.options.batch)
        self.machine = machine(plan.options.device)
        self.seeds: dict[int, Seed] = {seed: Seed(seed=seed) for seed in plan.seeds}
        self.exists = False

    @property
    def path(self) -> Path:
        """Where its record goes."""
        return accuracy_path(
            self.out,
            machine=self.machine.name,
            arch=self.variant.name,
            against=None if self.own else self.baseline.name,
            data=self.facts.name,
            recipe=f"{self.recipe.name}-e{self.recipe.epochs}",
        )

    def take_over(self, *, replace: bool = False) -> int:
        """Takes what is finished of the same comparison; returns how many seeds that is.

        It stands in the record, which more seeds than it has extend, and in the partial one that an interruption left.

        Args:
            replace: the record is made anew; what is in the partial one and in the trainings' folders is taken over.

        Raises:
            RecordError: a record is there and is of something else, or it cannot be written.
        """
        self.seeds, self.exists = self.group.on_first(lambda: self._with_finished(replace=replace))
        return self._finished

    @property
    def _finished(self) -> int:
        return sum(one.settled for one in self.seeds.values())

    def _with_finished(self, *, replace: bool) -> tuple[dict[int, Seed], bool]:
        """The seeds with what the records have of them, and whether the complete one has all that was asked for."""
        check_writable(self.path, replace=True)
        seeds = {seed: Seed(seed=seed) for seed in self.plan.seeds}
        if self.path.exists() and not replace:
            then = "give --replace to write over it, or name another folder with --out"
            there = self._seeds_in(self.path, "exists: a comparison", then)
            if there.keys() >= seeds.keys():
                return there, True
            seeds = dict(sorted((seeds | there).items()))
        partial = partial_path(self.path)
        if partial.exists():
            left = self._seeds_in(partial, "an unfinished comparison", "finish it with the command in it, or delete it")
            seeds = {number: seed if seed.settled else left.get(number, seed) for number, seed in seeds.items()}
        return seeds, False

    def _seeds_in(self, path: Path, what: str, then: str) -> dict[int, Seed]:
        """The seeds of a record, which must be of this comparison."""
        found = read_accuracy_record(path)
        for key, there, here in differences(found, self.record()):
            if key.partition(".")[0] in _DECIDING:
                raise RecordError(f"{path}: {what} whose {key} is {there}, not {here}; {then}")
        return {seed.seed: seed for seed in found.seeds}

    def run(self, report: Report, say: Say = lambda _: None) -> None:
        """Trains what is not trained yet; after each training the record is on disk.

        A training that diverges is a result too: it is noted, and the others go on.

        Args:
            report: told which training begins, and how far it is.
            say: told in one line what is finished already, where a training goes on, and that one has diverged.

        Raises:
            SelabError: as `selab.accuracy.train.train`; what is finished is in the partial record.
        """
        if self._finished:
            say(f"{self.variant.name}: {self._finished} of {len(self.seeds)} seeds are finished already")
        for seed in self.plan.seeds:
            for arm, variant in (("baseline", self.baseline), ("variant", self.variant)):
                if getattr(self.seeds[seed], arm) is not None or getattr(self.seeds[seed], f"{arm}_diverged"):
                    continue
                label = f"seed {seed}, {variant.name}"
                report(label, None)
                found: dict[str, Any]
                try:
                    found = {arm: _outcome(self._train(variant, seed, label, report, say))}
                except DivergedError as error:
                    say(f"seed {seed}, {error}")
                    found = {f"{arm}_diverged": str(error)}
                self.seeds[seed] = msgspec.structs.replace(self.seeds[seed], **found)
                self._save()
        # What was begun with more seeds may have left all of these, and nothing to train.
        self._save()

    def _save(self) -> None:
        self.group.on_first(lambda: save_accuracy_record(self.record(), self.path))

    def _train(self, variant: Variant, seed: int, label: str, report: Report, say: Say) -> Training:
        plan = self.plan
        return train(
            variant,
            self.data,
            plan.recipe,
            seed=seed,
            folder=folder_of(variant, self.data, plan.recipe, plan.options, seed, out=self.out),
            options=plan.options,
            report=lambda state: report(label, state),
            say=lambda text: say(f"{label}: {text}"),
        )

    def measure(self, report: Callable[[str, Any], object]) -> None:
        """Times what `requests_of` asks for and no record has yet, or only one of other facts or another torch.

        Each goes to a record of its own.

        Raises:
            SelabError: a network cannot be timed, or a record that lies there cannot be read.
        """
        for request in requests_of(self.record()).values():
            job = resolve(request)
            there = job.stored(self.out, self.machine.name)
            if there is None or not _holds_today(there, self.machine):
                profile = Profile(job)
                profile.run(report)
                save(profile.record(), profile.path(self.out))

    def record(self) -> AccuracyRecord:
        """What has been trained so far."""
        plan = self.plan
        seeds = tuple(self.seeds.values())
        return AccuracyRecord(
            selab=__version__,
            arch=self.variant.name,
            baseline=self.baseline.name,
            origin=self.variant.file,
            baseline_origin=self.baseline.file,
            facts_hash=self.variant.facts_hash,
            baseline_facts_hash=self.baseline.facts_hash,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=plan.command,
            complete=all(one.settled for one in seeds),
            data=self.facts,
            recipe=self.recipe,
            options=plan.options,
            machine=self.machine,
            seeds=seeds,
            warnings=warnings_of(seeds, self.facts),
        )


def left_of(comparisons: Sequence[Comparison], *, replace: bool) -> list[Comparison]:
    """Takes over what is finished of each, and returns those of which something is left to train.

    Raises:
        RecordError: as `Comparison.take_over`.
        ModelError: a network is none for these images; it is found out before the first one is trained.
    """
    for one in comparisons:
        one.take_over(replace=replace)
    left = [one for one in comparisons if not one.exists]
    for variant in {network.name: network for one in left for network in (one.baseline, one.variant)}.values():
        check_network(build(fitted(variant, left[0].data)).model, left[0].data)
    return left


def _outcome(done: Training) -> Outcome:
    return Outcome(
        test=done.test,
        seconds=done.seconds,
        images_per_s=median(epoch.images_per_s for epoch in done.epochs),
        epochs=done.epochs,
        torch=done.torch,
    )


# ------------------------------------------------------------------------------------- what accuracies are read beside
def requests_of(record: AccuracyRecord) -> dict[Phase, Request]:
    """What is measured beside a comparison: one image forward, and one batch forward and backward, as it was trained.

    The latter is missing under automatic mixed precision, which a profile has not.
    """
    options = record.options
    size = record.data.input_chw
    variant, baseline = variants_of(record)
    own = variant is None or baseline == catalog.baseline_of(variant)
    common = Request(
        arch=address(record.arch, record.origin),
        baseline=None if own else address(record.baseline, record.baseline_origin),
        device=options.device,
        input_chw=None if variant is not None and variant.input_chw == size else size,
        quick=True,
        threads=1,
        phases=("forward",),
    )
    if options.amp != "off":
        return {"forward": common}
    step = msgspec.structs.replace(
        common,
        batch=max(1, record.recipe.batch // options.accumulate),
        memory_format="channels_last" if options.channels_last else "contiguous",
        compiled=options.compiled,
        threads=options.threads or record.machine.cores,
        phases=("forward_backward",),
    )
    return {"forward": common, "forward_backward": step}


def _holds_today(profile: Record, here: Machine) -> bool:
    """Whether a profile's times are those that measuring again would give."""
    torches = {one.libraries.get("torch") for one in (profile.machine, here)}
    return profile.complete and not is_stale(profile) and len(torches) == 1


def compared(record: AccuracyRecord, folder: Path) -> Compared:
    """A comparison's record with its costs, and with the profiles of both networks that this machine's folder has."""
    variant, baseline = variants_of(record)
    if variant is None or baseline is None:
        return Compared(record=record)
    costs = {}
    for one in (variant, baseline):
        built = build(fitted(one, record.data), device="meta")
        costs[one.name] = count(built.model, (1, *record.data.input_chw), se_blocks=built.native)
    profiles = {}
    for phase, request in requests_of(record).items():
        found = job_of(request, variant, baseline).stored(folder.parent, folder.name)
        if found is not None:
            profiles[phase] = found
    return Compared(record=record, costs=costs, forward=profiles.get("forward"), step=profiles.get("forward_backward"))


def read_compared(folder: Path) -> list[Compared]:
    """Every finished comparison in a machine's folder; none where it holds none.

    Raises:
        RecordError: no such folder, the folder above those of machines, or a record that cannot be trusted.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder}: is no folder; name that of one machine's records")
    below = sorted(path.parent.name for path in folder.glob(f"*/{FOLDER}") if path.is_dir())
    if below and not (folder / FOLDER).is_dir():
        raise RecordError(f"{folder}: holds no comparisons; there are some in its folders {', '.join(below)}")
    return [compared(record, folder) for record in read_accuracy_records(folder)]
