"""Learning curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from selab import units
from selab.errors import RecordError
from selab.records import stats
from selab.report.figures.style import new_figure
from selab.training.record import AccuracyRecord, SeedOutcome
from selab.training.verdict import AccuracyVerdict, compare_verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One network's figure after each epoch: the mean over its seeds, the least and the greatest of them."""

    name: str
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Learning curves of a comparison, base first; `notes` is what stands below."""

    title: str
    circumstances: str
    label: str
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]


def curves(record: AccuracyRecord, *others: AccuracyRecord) -> Curves:
    """Test accuracy after each epoch, of a baseline and its variants, over the seeds that all of them have finished.

    Args:
        record: of a comparison.
        others: of further variants of the same baseline, trained alike.

    Raises:
        RecordError: no seed is finished, or the records are not of one baseline, data set and recipe.
    """
    records = (record, *others)
    if len(records) >= MOST_CURVES:
        raise RecordError(f"plot curves: {len(records)} records; at most {MOST_CURVES - 1} can be told apart")
    _check_alike(records)
    verdicts = [compare_verdict(one) for one in records]
    diverged = [one.diverged for one in verdicts if one.diverged]
    pairs = [{seed.seed: seed.pair for seed in one.seeds if seed.pair} for one in records]
    common = sorted(set.intersection(*(set(one) for one in pairs)))
    if not common:
        then = f"{diverged[0]}; compare with another recipe" if diverged else "go on with the comparison"
        whose = " and ".join(one.arch for one in records)
        raise RecordError(
            f"plot curves: {whose}: no seed is finished for {'all' if others else 'both'} networks; {then}"
        )
    networks = [(record.baseline, [pairs[0][seed][0] for seed in common])]
    networks += [(one.arch, [pair[seed][1] for seed in common]) for one, pair in zip(records, pairs, strict=True)]
    machine = record.machine.gpu or record.machine.cpu
    recipe = f"recipe {record.recipe.name}, batch {record.recipe.batch}"
    names = ", ".join(one.arch for one in records)
    return Curves(
        title=f"Top-1 accuracy by epoch: {names} and {record.baseline}",
        circumstances=f"{record.data.title}, {recipe}, {units.counted(len(common), 'seed')}; {machine}",
        label=f"{'AP' if record.data.task == 'detection' else 'top-1 accuracy'} on the test images (%)",
        curves=tuple(_curve(name, outcomes) for name, outcomes in networks),
        notes=(
            "Lines: means over the seeds; bands: from the least to the greatest of them.",
            *(f"At the end: {_named(one.arch, verdict)}." for one, verdict in zip(records, verdicts, strict=True)),
            *(f"{one}; drawn are the others." for one in diverged),
        ),
    )


def _named(arch: str, verdict: AccuracyVerdict) -> str:
    text = verdict.score.difference.text
    return text if text.startswith(arch) else f"{arch}: {text}"


def _curve(name: str, outcomes: Sequence[SeedOutcome]) -> Curve:
    by_epoch = list(zip(*([epoch.score_pct for epoch in one.epochs] for one in outcomes), strict=True))
    return Curve(
        name=name,
        mean=tuple(stats.mean(values) for values in by_epoch),
        low=tuple(min(values) for values in by_epoch),
        high=tuple(max(values) for values in by_epoch),
    )


# What records of one picture have in common, and how it is named.
_ALIKE: dict[str, tuple[str, Callable[[AccuracyRecord], str]]] = {
    "baseline_facts_hash": ("baseline", lambda one: one.baseline),
    "data": ("data", lambda one: f"{one.data.name} of {one.data.train_size} images"),
    "recipe": ("recipe", lambda one: f"{one.recipe.name} of {one.recipe.epochs} epochs"),
}


def _check_alike(records: Sequence[AccuracyRecord]) -> None:
    """Refuse records that cannot share a baseline's curve."""
    first = records[0]
    for one in records[1:]:
        for key, (what, shown) in _ALIKE.items():
            if getattr(one, key) != getattr(first, key):
                there, here = shown(first), shown(one)
                other = f"another {here}" if here == there else here
                raise RecordError(
                    f"plot curves: the {what} of the records differs, {there} ({first.arch}, {first.created}) and "
                    f"{other} ({one.arch}, {one.created}); give the records of one comparison of several variants"
                )


# Base and variants, told apart in grey too: by shade, and by their dashes.
_CURVE_STYLES: tuple[tuple[str, Literal["--", "-", "-.", ":"]], ...] = (
    ("#6b6b6b", "--"),
    ("#08519c", "-"),
    ("#d95f0e", "-."),
    ("#41ab5d", ":"),
    ("#54278f", "-"),
    ("#000000", "-."),
)
MOST_CURVES = len(_CURVE_STYLES)
"""More lines cannot be told apart."""


def curves_figure(shown: Curves) -> "Figure":
    """Draw learning curves."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = [
        Line2D([], [], color=colour, linestyle=dashes, label=curve.name)
        for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=False)
    ]
    figure, axes = new_figure(shown, plot_in=3.2, left_in=0.85, handles=handles, notes=shown.notes)
    for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=False):
        epochs = range(1, len(curve.mean) + 1)
        axes.fill_between(epochs, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(epochs, curve.mean, color=colour, linestyle=dashes, marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(shown.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
