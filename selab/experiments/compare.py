"""A variant and its baseline, trained from several seeds: what is finished, what is left, and the record."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import nn

from selab._version import __version__
from selab.bench.machine import machine
from selab.cost.count import count
from selab.errors import RecordError, SelabError, SpecError
from selab.experiments.compared import Compared
from selab.experiments.job import Request, job_of, resolve
from selab.experiments.profiling import Profile
from selab.models import catalog
from selab.models.build import build
from selab.models.checkpoint import load
from selab.models.provenance import address, is_stale, variants_of
from selab.models.spec import Variant
from selab.records.files import check_writable
from selab.records.store import OnBroken, file_name, partial_path, save
from selab.records.types import Frozen, Machine, Phase, Record
from selab.training.data import Data
from selab.training.distributed import join
from selab.training.evaluate import check_network
from selab.training.progress import TrainingProgress
from selab.training.recipe import Recipe, adapted
from selab.training.record import (
    AccuracyRecord,
    DataSpec,
    Options,
    Seed,
    SeedOutcome,
    accuracy_path,
    read_accuracy_record,
    read_accuracy_records,
    save_accuracy_record,
    task_of,
    warnings_of,
)
from selab.training.run import differences, request_key, run_config, start_of
from selab.training.train import check_request

Report = Callable[[str, TrainingProgress | None], object]
Say = Callable[[str], object]
Arm = Literal["baseline", "variant"]
ARMS: tuple[Arm, ...] = ("baseline", "variant")

# Two records with these in common are of one comparison.
_DECIDING = (
    "facts_hash",
    "baseline_facts_hash",
    "data",
    "recipe",
    "variant_recipe",
    "options",
    "start_sha256",
    "baseline_start_sha256",
)


class ComparisonPlan(Frozen, frozen=True, kw_only=True):
    """Which networks are compared, how they are trained, and how often.

    Attributes:
        recipe: as named; the options may change its epochs and its batch.
        variant_recipe: of the variant, where each network has values of its own; of the same epochs.
        seeds: trained one after the other, each for both networks.
        command: the command line that asks for the same again.
        remarks: what a reader must know of this pair.
        weights: the file that a network's trainings start from, by its name; random weights where it has none.
    """

    variant: Variant
    baseline: Variant
    recipe: Recipe
    options: Options
    seeds: tuple[int, ...]
    command: str
    variant_recipe: Recipe | None = None
    remarks: tuple[str, ...] = ()
    weights: dict[str, Path] = msgspec.field(default_factory=dict)


def pair(arch: str, baseline: str | None) -> tuple[Variant, Variant]:
    """Look up a variant and what it is compared with: its own baseline, if none is named.

    Raises:
        SpecError: there is no baseline.
        UnknownNameError: no such name.
    """
    variant = catalog.find(arch, option="compare")
    other = catalog.find(baseline, option="compare") if baseline is not None else catalog.baseline_of(variant)
    if other is None:
        raise SpecError(f"{arch}: is a baseline itself; name both: selab compare BASELINE VARIANT")
    if other.name == variant.name:
        raise SpecError(f"{arch}: is compared with itself; name a baseline and a variant")
    return variant, other


def unlike(variant: Variant, baseline: Variant) -> str:
    """Return in words what differs between a variant and its baseline besides blocks; empty if nothing does.

    The order of the two is said as well, where the baseline is the one with blocks.
    """
    own, base = (catalog.baseline_of(one) or one for one in (variant, baseline))
    if own != base and variant.baseline is not None:
        return (
            f"{variant.name}: its own baseline is {own.name}, not {baseline.name}; what is compared is not the blocks "
            "alone"
        )
    if own == base == variant:
        return f"{baseline.name} is the baseline here, as the first name; the usual order is {variant.name} first"
    return ""


# A network for images so many times as wide has lost most of a small image's detail after its first layers.
_TOO_SMALL = 4


def too_small(comparison: "Comparison") -> list[str]:
    """Return a line for each network of a comparison that is made for much larger images."""
    if task_of(comparison.data) == "detection":
        # A detector takes images of any size.
        return []
    side = comparison.data.input_chw[-1]
    return [
        f"{one.name}: is made for images of {one.input_chw[-1]} pixels, those of {comparison.facts.title} have {side}; "
        "`selab archs` lists networks for small images"
        for one in (comparison.baseline, comparison.variant)
        if one.input_chw[-1] >= _TOO_SMALL * side
    ]


def folder_of(
    variant: Variant,
    data: Data,
    recipe: Recipe,
    options: Options,
    seed: int,
    *,
    out: Path,
    weights: Path | None = None,
) -> Path:
    """Return where one training keeps its files, on whatever machine it resumes: `OUT/runs/<name>.<key>`.

    The key depends on what decides the result: another network, recipe, data set or option has another folder; another
    number of threads has the same.
    """
    config = run_config(variant, data, recipe, seed=seed, options=options, weights=weights)
    name = file_name(f"{variant.name}.{data.name}.{recipe.name}")
    return out / "runs" / f"{name}.e{config.recipe.epochs}.s{seed}.{request_key(config)}"


def fitted(variant: Variant, data: Data | DataSpec) -> Variant:
    """Return the variant with the number of classes and the input size of these images."""
    return msgspec.structs.replace(variant, num_classes=data.num_classes, input_chw=data.input_chw)


def loaded(
    variant: Variant, data: Data, weights: Path, *, ema: bool | None = None, say: Say = lambda _: None
) -> nn.Module:
    """Return a variant with trained weights, for these images. Weights of another network are refused as a whole.

    Args:
        variant: what the weights are of.
        data: its classes and image size are those of the network.
        weights: a file.
        ema: whether to take the moving average of the weights; None for the average if the file has one.
        say: called with one line about what was taken out of the file, unless it holds nothing else.

    Raises:
        SelabError: as `selab.models.build.build` and `selab.models.checkpoint.load`.
    """
    fitting = fitted(variant, data)
    model = build(fitting).model
    try:
        done = load(model, weights, variant=variant, fitted=fitting, ema=ema)
    except SelabError as error:
        if getattr(data, "image", None) is None or "its classifier has" not in str(error):
            raise
        raise SelabError(
            f"{error}; for a folder that has only some of its classes, name all: --classes-file"
        ) from error
    if done.words:
        say(f"{weights}: {done.words}")
    if task_of(data) == "detection":
        from selab.training.detection import configure

        configure(model, data.boxes)  # type: ignore[attr-defined]
    return model


class Comparison:
    """A comparison while it is trained; `record()` returns what is finished at any moment.

    `selab.experiments.trainings.run_all` runs the trainings. Under `torchrun` each process has a comparison; rank 0
    reads and writes the files and tells the others, so that all train the same.

    Args:
        plan: what to compare.
        data: what to train and test on.
        out: the folder of all results.

    Attributes:
        group: the processes; all other methods are for the first one alone.
        exists: whether a complete record has everything that was asked for; set by `take_over`.
    """

    def __init__(self, plan: ComparisonPlan, data: Data, *, out: Path) -> None:
        self.plan = plan
        self.data = data
        self.group = join(plan.options.device)
        self.facts = msgspec.convert(data, DataSpec, from_attributes=True)
        self.out = out
        self.variant, self.baseline = plan.variant, plan.baseline
        self.own = catalog.baseline_of(self.variant) == self.baseline
        changes = {"epochs": plan.options.epochs, "batch": plan.options.batch}
        self.recipe = adapted(plan.recipe, **changes)
        self.variant_recipe = None if plan.variant_recipe is None else adapted(plan.variant_recipe, **changes)
        self.machine = machine(plan.options.device)
        self.seeds: dict[int, Seed] = {seed: Seed(seed=seed) for seed in plan.seeds}
        self.exists = False
        self.starts = {name: start_of(file) for name, file in plan.weights.items()}

    @property
    def path(self) -> Path:
        """Path of its record."""
        return accuracy_path(
            self.out,
            machine=self.machine.name,
            arch=self.variant.name,
            against=None if self.own else self.baseline.name,
            data=self.facts.name,
            recipe=f"{self.recipe.name}-e{self.recipe.epochs}",
        )

    def take_over(self, *, replace: bool = False) -> int:
        """Take over the finished seeds of the same comparison.

        They are in the record, which further seeds extend, and in the partial record of an interruption.

        Args:
            replace: ignore the record; still take over the partial one and the trainings' folders.

        Returns:
            How many seeds are finished.

        Raises:
            RecordError: the record is of something else, or cannot be written.
        """
        self.seeds, self.exists = self.group.on_first(lambda: self._with_finished(replace=replace))
        return self.finished

    @property
    def finished(self) -> int:
        """Return how many seeds are finished."""
        return sum(one.settled for one in self.seeds.values())

    def _with_finished(self, *, replace: bool) -> tuple[dict[int, Seed], bool]:
        """Return the seeds with what the records have of them, and whether the complete one has all."""
        check_writable(self.path, replace=True)
        seeds = {seed: Seed(seed=seed) for seed in self.plan.seeds}
        if self.path.exists() and not replace:
            then = "use --replace to overwrite it, or name another folder with --out"
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
        """Return the seeds of a record of this comparison."""
        found = read_accuracy_record(path)
        for key, there, here in differences(found, self.record()):
            if key.partition(".")[0] in _DECIDING:
                raise RecordError(f"{path}: {what} whose {key} is {there}, not {here}; {then}")
        return {seed.seed: seed for seed in found.seeds}

    def network_of(self, arm: Arm) -> Variant:
        """Return one of the two networks."""
        return self.baseline if arm == "baseline" else self.variant

    def recipe_of(self, arm: Arm) -> Recipe:
        """Return how one of the two networks is trained."""
        own = self.variant_recipe if arm == "variant" else None
        return own or self.recipe

    def check(self) -> None:
        """Check that both networks can be trained as planned.

        Raises:
            TrainingError: as `selab.training.train.check_request`.
        """
        for arm in ARMS:
            network = self.network_of(arm)
            started = network.name in self.plan.weights
            recipe, options, world = self.recipe_of(arm), self.plan.options, self.group.world
            check_request(network.name, recipe, options, self.data, started=started, world=world)

    def left(self) -> list[tuple[int, Arm]]:
        """Return the trainings that are left, in order: seed, and which of the two networks."""
        return [
            (seed, arm)
            for seed in self.plan.seeds
            for arm in ARMS
            if getattr(self.seeds[seed], arm) is None and not getattr(self.seeds[seed], f"{arm}_diverged")
        ]

    def settle(self, seed: int, arm: Arm, found: SeedOutcome | str) -> None:
        """Note how a training ended, and write the record.

        Args:
            seed: of the training.
            arm: which of the two networks.
            found: its result, or why it diverged.
        """
        changes: dict[str, Any] = {f"{arm}_diverged": found} if isinstance(found, str) else {arm: found}
        self.seeds[seed] = msgspec.structs.replace(self.seeds[seed], **changes)
        self.save()

    def save(self) -> None:
        """Write the record, a partial one while trainings are left.

        Raises:
            RecordError: it cannot be written.
        """
        self.group.on_first(lambda: save_accuracy_record(self.record(), self.path))

    def measure(self, report: Callable[[str, Any], object]) -> None:
        """Measure the latencies of `requests_of`, each into a record of its own.

        A record of the same facts and the same torch is kept.

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
        """Return the record of what has been trained so far."""
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
            warnings=(*plan.remarks, *warnings_of(seeds, self.facts)),
            variant_recipe=self.variant_recipe,
            start_sha256=self.starts.get(self.variant.name, ""),
            baseline_start_sha256=self.starts.get(self.baseline.name, ""),
        )


def left_of(comparisons: Sequence[Comparison], *, replace: bool) -> list[Comparison]:
    """Take over what is finished of each comparison; return those with something left to train.

    Raises:
        RecordError: as `Comparison.take_over`.
        ModelError: a network does not fit these images; checked before the first training.
    """
    for one in comparisons:
        one.take_over(replace=replace)
    left = [one for one in comparisons if not one.exists]
    for one in left:
        one.check()
    for variant in {network.name: network for one in left for network in (one.baseline, one.variant)}.values():
        check_network(build(fitted(variant, left[0].data)).model, left[0].data)
    return left


# --------------------------------------------------------------------------------------------------- costs and times
def requests_of(record: AccuracyRecord) -> dict[Phase, Request]:
    """Return what is measured for a comparison: one image forward; one training batch forward and backward.

    The latter is missing under automatic mixed precision, which a profile does not offer.
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
    """Return whether a profile is complete, not stale, and measured with this torch."""
    torches = {one.libraries.get("torch") for one in (profile.machine, here)}
    return profile.complete and not is_stale(profile) and len(torches) == 1


def compared(record: AccuracyRecord, folder: Path, *, on_broken: OnBroken = None) -> Compared:
    """Return a comparison's record with its costs and with the profiles in this machine's folder."""
    variant, baseline = variants_of(record)
    if variant is None or baseline is None:
        return Compared(record=record)
    costs = {}
    for one in (variant, baseline):
        built = build(fitted(one, record.data), device="meta")
        costs[one.name] = count(built.model, (1, *record.data.input_chw), se_blocks=built.native)
    profiles = {}
    for phase, request in requests_of(record).items():
        try:
            found = job_of(request, variant, baseline).stored(folder.parent, folder.name)
        except RecordError as error:
            if on_broken is None:
                raise
            on_broken(error)
            continue
        if found is not None:
            profiles[phase] = found
    return Compared(record=record, costs=costs, forward=profiles.get("forward"), step=profiles.get("forward_backward"))


def read_compared(folder: Path, *, on_broken: OnBroken = None) -> list[Compared]:
    """Return every finished comparison in a machine's folder.

    Args:
        folder: the machine's.
        on_broken: as in `Store.read_folder`.

    Raises:
        RecordError: no such folder, the folder above those of machines, or a record that cannot be trusted.
    """
    records = read_accuracy_records(folder, on_broken=on_broken)
    return [compared(record, folder, on_broken=on_broken) for record in records]
