"""The command about sites that deserve a block: place."""

import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab.cli.console import builtins, check_outputs, following, open_console, print_note, print_tables, write_json
from selab.cli.data_options import DataOptions, TrainOptions
from selab.cli.options import (
    OUTPUT,
    TIME,
    WHAT,
    WORKLOAD,
    Arch,
    Format,
    Insert,
    Json,
    Replace,
    Se,
    natural,
    option,
    seconds,
    with_options,
)
from selab.cli.training import open_images, options_of, recipe_of, trainable
from selab.records.bounds import MOST_PROCESSES
from selab.records.types import TORCH

if TYPE_CHECKING:
    from selab.experiments.placing import PlaceRequest
    from selab.judging.placement import Limit
    from selab.training.recipe import Recipe
    from selab.training.record import Options

_MOST_RATIO = 10.0
_PICTURE = "placement.svg"
# Of the epochs of a training, for one that chooses.
_SEARCH_SHARE, _LEAST_SEARCH = 4, 2


def _limit(text: str) -> "Limit":
    """Parse `latency=1.02`.

    Raises:
        typer.BadParameter: it is written otherwise, or out of range.
    """
    from selab.judging.placement import QUANTITIES, Limit

    quantity, _, ratio = text.partition("=")
    for one in QUANTITIES:
        if quantity == one:
            try:
                found = float(ratio)
            except ValueError:
                break
            if 1 < found <= _MOST_RATIO:
                return Limit(quantity=one, ratio=found)
    raise typer.BadParameter(
        f"{text[:40]!r}: is written QUANTITY=RATIO, such as latency=1.02; quantities: {', '.join(QUANTITIES)}; a ratio "
        f"above 1, up to {_MOST_RATIO:g}",
        param_hint="--budget",
    )


@dataclass(kw_only=True)
class PlaceOptions:
    """How sites are searched."""

    budget: Annotated[
        str,
        option(
            "--budget",
            WHAT,
            "What blocks may cost: latency=1.02, params=1.05 or macs=1.01 times the network.",
            metavar="QUANTITY=RATIO",
        ),
    ]
    se: Se = None
    insert: Insert = None
    trials: Annotated[int, natural("--trials", TIME, "Networks that the search tries.", most=MOST_PROCESSES)] = 20
    search_epochs: Annotated[
        int | None,
        natural(
            "--search-epochs",
            TIME,
            "Epochs of a trial; a quarter of --epochs by default, and two at least.",
            show_default=False,
        ),
    ] = None
    seeds: Annotated[int, natural("--seeds", TIME, "Trainings of each network at the end.", most=MOST_PROCESSES)] = 3
    runtime: Annotated[str, option("--runtime", WORKLOAD, "That the times are of.", metavar="NAME")] = TORCH
    measure: Annotated[float, seconds("--measure", TIME, "Seconds of each of the two timings.", least=1)] = 60

    def request(self, arch: str, recipe: "Recipe", options: "Options") -> "PlaceRequest":
        """Return what is asked for.

        Raises:
            SelabError: the runtime is not there, or the budget is written otherwise.
        """
        from selab.bench.backends import backend
        from selab.experiments.placing import PlaceRequest
        from selab.training.recipe import adapted

        backend(self.runtime)
        epochs = adapted(recipe, epochs=options.epochs).epochs
        return PlaceRequest(
            arch=arch,
            limit=_limit(self.budget),
            se=self.se,
            insert=tuple(self.insert or ()),
            recipe=recipe,
            options=options,
            search_epochs=self.search_epochs or min(epochs, max(_LEAST_SEARCH, epochs // _SEARCH_SHARE)),
            trials=self.trials,
            seeds=self.seeds,
            runtime=self.runtime,
            budget_s=self.measure,
            command=shlex.join(["selab", *sys.argv[1:]]),
        )


@with_options
def place(
    arch: Arch,
    search: PlaceOptions,
    data: DataOptions,
    options: TrainOptions,
    out: Annotated[Path, option("--out", OUTPUT, "Folder of everything that is written.", metavar="FOLDER")] = Path(
        "placed"
    ),
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Search the sites that deserve a block, within a budget (hours)."""
    _limit(search.budget)
    variant = trainable(arch)
    check_outputs(json_to)
    from selab.experiments.placing import Placing
    from selab.report.figures import registry
    from selab.report.figures.placement import placement_front
    from selab.report.placement import placement_tables

    recipe = recipe_of(options.recipe, variant, data)
    request = search.request(arch, recipe, options_of(options))
    images = open_images(data, recipe.image)
    with redirect_stdout(sys.stderr):
        placing = Placing(request, images, out)
        placing.take_over(replace=replace)
        print_note(placing.expectation())
        with following(open_console(stderr=True)) as report:
            placing.run(report, report.say)
    picture = out / _PICTURE
    registry.draw(placement_front(placing.record), picture)
    if json_to is not None:
        write_json(builtins(placing.record), json_to)
    if str(json_to) != "-":
        written = f"written: {placing.path}, {placing.networks} (--arch {placing.networks}:placed), {picture}"
        print_tables(placement_tables(placing.record), look, written)
