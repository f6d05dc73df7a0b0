"""The command `compare`: networks with SE and without, trained from several seeds."""

import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab.cli.console import (
    StoppedError,
    check_outputs,
    following,
    open_console,
    print_note,
    print_tables,
    reporting,
)
from selab.cli.data_options import DataOptions, TrainOptions
from selab.cli.measure import RESULTS
from selab.cli.options import (
    OUTPUT,
    TIME,
    TRAINING,
    WHAT,
    Format,
    Json,
    Out,
    natural,
    option,
    with_options,
)
from selab.cli.training import open_images, options_of, print_problems, recipe_of, trainable
from selab.errors import SelabError
from selab.records.bounds import MOST_PROCESSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selab.cli.options import Look
    from selab.experiments.compare import Comparison, ComparisonPlan
    from selab.models.spec import Variant
    from selab.training.data import Data
    from selab.training.recipe import Recipe
    from selab.training.record import AccuracyRecord, Options


@dataclass(kw_only=True)
class CompareOptions:
    """What is compared beside two networks in one recipe, and how often."""

    seeds: Annotated[
        int,
        natural("--seeds", TIME, "Trainings per network; more extend a record.", most=MOST_PROCESSES),
    ] = 3
    equal_time: Annotated[
        bool,
        option("--equal-time", WHAT, "Also against the baseline, wider and deeper until it is as slow as the variant."),
    ] = False
    tune: Annotated[
        int,
        natural(
            "--tune",
            WHAT,
            "Also each network at its best of N trials of learning rate and weight decay.",
            least=0,
            most=MOST_PROCESSES,
        ),
    ] = 0
    tune_epochs: Annotated[
        int | None,
        natural("--tune-epochs", TIME, "Epochs of a trial; by default a third of the training's.", show_default=False),
    ] = None
    jobs: Annotated[
        int | None,
        natural(
            "--jobs",
            TIME,
            "Trainings at once, each on its share of the cores, or on a GPU of its own.",
            most=MOST_PROCESSES,
            show_default=False,
        ),
    ] = None
    latency: Annotated[
        bool,
        option("--latency/--no-latency", TIME, "Also time both networks, as `profile`."),
    ] = True
    weights: Annotated[
        list[str] | None,
        option(
            "--weights",
            TRAINING,
            "Weights that a network starts from; of a detector its backbone's.",
            metavar="NAME=FILE",
        ),
    ] = None


@with_options
def compare(
    archs: Annotated[
        list[str],
        typer.Argument(help="A baseline and its variants, or one variant for its own baseline.", metavar="NAME"),
    ],
    more: CompareOptions,
    data: DataOptions,
    options: TrainOptions,
    out: Out = RESULTS,
    replace: Annotated[
        bool,
        option("--replace", OUTPUT, "Make the record again; finished trainings in OUT/runs are kept."),
    ] = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Train networks with SE and without, several seeds each (hours)."""
    from selab.bench.heap import keep_freed
    from selab.experiments.compare import Comparison
    from selab.experiments.expected import training_s
    from selab.experiments.trainings import run_all
    from selab.training.distributed import join, leave
    from selab.training.record import read_accuracy_record
    from selab.training.verdict import nothing_compared

    networks = _pairs(archs)
    chosen = recipe_of(options.recipe, networks[0][1], data)
    how = options_of(options, boxed=data.boxed)
    weights = _weights_of(more.weights or [], networks)
    keep_freed(how.device)
    group = join(how.device)
    group.on_first(lambda: check_outputs(json_to))
    _check(more, how, world=group.world, boxed=data.boxed)
    images = open_images(data, chosen.image, chosen.boxes)
    slow = group.on_first(lambda: _as_slow(networks, images, out)) if more.equal_time else []
    networks += [pair for pair, _ in slow]
    remarks = {(one.name, base.name): (words,) for (one, base), words in slow}
    ways: list[tuple[Variant, Variant, dict[str, Any]]] = [(one, base, {"recipe": chosen}) for one, base in networks]
    if more.tune:
        ways += _at_their_best(networks, images, chosen, how, more, out, weights)
    seeds = tuple(range(more.seeds))
    common: dict[str, Any] = {"options": how, "seeds": seeds, "command": _command(), "weights": weights}
    comparisons = [Comparison(one, images, out=out) for one in _plans(ways, remarks, common)]
    left = _left_of(comparisons, replace=replace)
    at_once = {} if group.world > 1 else _at_once(left, more.jobs, data)
    with following(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        run_all(left, report, report.say, **{"expects": training_s, **at_once})
    # Nothing else may run on the machine while networks are timed.
    leave()
    if not group.first:
        return
    records = [read_accuracy_record(one.path) for one in comparisons]
    if json_to is not None:
        _write_records(records, json_to)
    if str(json_to) != "-":
        _show_comparisons(comparisons, records, out, look, timed=more.latency)
        print_problems(getattr(images, "problems", None))
    if nothing := nothing_compared(records):
        raise SelabError(nothing)


def _pairs(archs: "Sequence[str]") -> "list[tuple[Variant, Variant]]":
    """Return the variants, each with its baseline, and tell where more than blocks differs."""
    for one in archs:
        trainable(one, option="compare")
    from selab.experiments.compare import pair, unlike

    names = [(None, archs[0])] if len(archs) == 1 else [(archs[0], one) for one in dict.fromkeys(archs[1:])]
    pairs = [pair(variant, baseline) for baseline, variant in names]
    for words in dict.fromkeys(unlike(variant, baseline) for variant, baseline in pairs):
        if words:
            print_note(words)
    return pairs


def _weights_of(given: "Sequence[str]", networks: "Sequence[tuple[Variant, Variant]]") -> dict[str, Path]:
    """Return the file that each network starts from, by its name; a backbone's name is of all networks on it.

    Raises:
        BadParameter: an entry is not NAME=FILE, or NAME is none of the networks, nor the backbone of one.
    """
    known: dict[str, list[str]] = {}
    for one in (each for pair in networks for each in pair):
        for key in {one.name, str(one.arguments.get("trunk", one.name))}:
            known.setdefault(key, []).append(one.name)
    found: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or name not in known:
            allowed = ", ".join(known)
            raise typer.BadParameter(f"{text}: must be NAME=FILE, NAME one of {allowed}", param_hint="--weights")
        found |= dict.fromkeys(known[name], Path(file))
    return found


def _plans(
    ways: "Sequence[tuple[Variant, Variant, dict[str, Any]]]",
    remarks: "Mapping[tuple[str, str], tuple[str, ...]]",
    common: dict[str, Any],
) -> "list[ComparisonPlan]":
    """Return a plan of each pair and its recipes, with the remarks on the pair by its names."""
    from selab.experiments.compare import ComparisonPlan

    return [
        ComparisonPlan(variant=one, baseline=base, remarks=remarks.get((one.name, base.name), ()), **common, **way)
        for one, base, way in ways
    ]


def _check(more: CompareOptions, options: "Options", *, world: int, boxed: bool) -> None:
    """Refuse what cannot be asked for together.

    Raises:
        BadParameter: an option that another one needs is missing.
        SelabError: there are not so many GPUs or cores, or torchrun already shares them.
    """
    from selab.experiments.at_once import check_jobs

    if more.equal_time and boxed:
        raise SelabError("--equal-time: makes classifiers wider and deeper; leave it out for detectors")
    if more.tune_epochs is not None and not more.tune:
        raise typer.BadParameter("is for --tune N; leave it out, or give both", param_hint="--tune-epochs")
    if more.tune and world > 1:
        raise SelabError("--tune: searches in one process; run it without torchrun first, the trainings are kept")
    if more.jobs is not None and more.jobs > 1 and world > 1:
        raise SelabError(f"--jobs {more.jobs}: torchrun trains one network on all processes; leave out one of them")
    check_jobs(options.device, more.jobs)


def _at_once(left: "Sequence[Comparison]", jobs: int | None, data: DataOptions) -> dict[str, Any]:
    """Return how `run_all` runs the trainings that are left: several at once, or one after the other."""
    from selab.experiments.at_once import Source, places_of, runs_at_once
    from selab.experiments.expected import training_s
    from selab.experiments.trainings import schedule_of

    if not left:
        return {}
    plan = left[0].plan
    trainings = len(schedule_of(left).pending)
    options: dict[str, Any] = {"threads": plan.options.threads, "in_memory": data.in_memory}
    places = places_of(plan.options.device, jobs, trainings=trainings, **options)
    if len(places) == 1:
        return {}
    source = Source(
        name=data.data,
        data_dir=str(data.data_dir),
        classes_file=None if data.classes_file is None else str(data.classes_file),
        workers=data.workers,
        image=left[0].recipe.image,
        boxes=left[0].recipe.boxes,
    )
    expects = partial(training_s, threads=places[0].threads)
    return {"at_once": len(places), "runs": runs_at_once(places, source), "expects": expects}


def _command() -> str:
    return shlex.join(["selab", *sys.argv[1:]])


def _left_of(comparisons: "Sequence[Comparison]", *, replace: bool) -> "list[Comparison]":
    """Return the comparisons with something left to train, and tell of the others."""
    from selab.experiments.compare import left_of, too_small

    with redirect_stdout(sys.stderr):
        left = left_of(comparisons, replace=replace)
    for words in dict.fromkeys(words for one in left for words in too_small(one)):
        print_note(words)
    for finished in comparisons:
        if finished not in left:
            print_note(f"{finished.path}: already finished; more --seeds extend it, --replace trains again")
    return left


# A trial takes a third of the epochs of a training, by default.
_TUNE_SHARE = 3


def _at_their_best(
    networks: "Sequence[tuple[Variant, Variant]]",
    images: "Data",
    recipe: "Recipe",
    options: "Options",
    more: CompareOptions,
    out: Path,
    weights: "Mapping[str, Path]",
) -> "list[tuple[Variant, Variant, dict[str, Any]]]":
    """Search values for each network; return every pair with the recipes of both."""
    from selab.experiments.expected import seconds_of
    from selab.experiments.tuning import optuna_for, searching, tuned
    from selab.training.recipe import adapted

    epochs = more.tune_epochs or max(1, adapted(recipe, epochs=options.epochs).epochs // _TUNE_SHARE)
    found = {}
    each = list({one.name: one for pair in networks for one in reversed(pair)}.values())
    short = adapted(recipe, epochs=epochs, batch=options.batch)
    optuna_for("--tune")
    print_note(searching([seconds_of(one, images, short, options) for one in each], more.tune, epochs))
    with following(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        for network in each:
            how: dict[str, Any] = {"trials": more.tune, "epochs": epochs, "out": out}
            how["weights"] = weights.get(network.name)
            found[network.name] = tuned(network, images, recipe, options, **how, report=report, say=report.say)
    return [(one, base, {"recipe": found[base.name], "variant_recipe": found[one.name]}) for one, base in networks]


# Seconds of measuring wider and deeper networks; the search between the nearest ones takes half as long again.
_EQUAL_TIME_S = 80.0


def _as_slow(
    networks: "Sequence[tuple[Variant, Variant]]", images: "Data", out: Path
) -> "list[tuple[tuple[Variant, Variant], str]]":
    """Return each variant with each network that takes as long as it does, its baseline wider or deeper; and times."""
    from selab.experiments.compare import fitted
    from selab.experiments.equal_time import equal_time

    options: dict[str, Any] = {"out": out, "budget_s": _EQUAL_TIME_S, "say": print_note}
    try:
        with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
            return [
                ((variant, other), words)
                for variant, baseline in networks
                for other, words in equal_time(
                    fitted(variant, images), fitted(baseline, images), report=report, **options
                )
            ]
    except KeyboardInterrupt:
        raise StoppedError(
            "interrupted before networks that are equally slow were found; nothing was trained yet, and the same "
            "command looks for them again"
        ) from None


def _show_comparisons(
    comparisons: "Sequence[Comparison]", records: "Sequence[AccuracyRecord]", out: Path, look: "Look", *, timed: bool
) -> None:
    """Time each comparison's networks if asked, and print its tables."""
    from selab.experiments.compare import compared
    from selab.report import accuracy

    for growing, record in zip(comparisons, records, strict=True):
        if timed:
            _measure(growing)
        joined = compared(record, out / record.machine.name)
        print_tables([accuracy.comparison_table(joined), accuracy.seeds_table(record)], look)
        typer.echo(f"record: {growing.path}", err=look != "rich")
    for sentence in accuracy.both_ways(records):
        typer.echo(sentence, err=look != "rich")


def _write_records(records: "list[AccuracyRecord]", to: Path) -> None:
    """Write one record as it is on disk, several in a list."""
    from selab.records.files import write_atomically
    from selab.training.record import to_json

    each = [to_json(record) for record in records]
    content = each[0] if len(each) == 1 else b"[\n" + b",\n".join(each) + b"]\n"
    if str(to) == "-":
        sys.stdout.buffer.write(content)
    else:
        write_atomically(to, content)


def _measure(growing: "Comparison") -> None:
    try:
        with reporting(open_console(stderr=True)) as report:
            growing.measure(report)
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; the comparison is in {growing.path}, times are missing: the same command measures them, "
            f"`selab table accuracy --profiles {growing.path.parents[1]}` shows what there is"
        ) from None
