"""Learning curves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from selab import units
from selab.errors import RecordError
from selab.records import stats
from selab.report.figures.style import new_figure
from selab.training.record import AccuracyRecord
from selab.training.verdict import compare_verdict

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


def curves(record: AccuracyRecord) -> Curves:
    """Test accuracy after each epoch, of both networks, over the seeds that are finished.

    Raises:
        RecordError: none is.
    """
    verdict = compare_verdict(record)
    done = [one.pair for one in record.seeds if one.pair]
    if not done:
        then = f"{verdict.diverged}; compare with another recipe" if verdict.diverged else "go on with the comparison"
        raise RecordError(f"plot curves: {record.arch}: no seed is finished for both networks; {then}")
    found = []
    for name, outcomes in zip((record.baseline, record.arch), zip(*done, strict=True), strict=True):
        by_epoch = list(zip(*([epoch.test_top1_pct for epoch in one.epochs] for one in outcomes), strict=True))
        found.append(
            Curve(
                name=name,
                mean=tuple(stats.mean(values) for values in by_epoch),
                low=tuple(min(values) for values in by_epoch),
                high=tuple(max(values) for values in by_epoch),
            )
        )
    seeds = units.counted(len(done), "seed")
    machine = record.machine.gpu or record.machine.cpu
    recipe = f"recipe {record.recipe.name}, batch {record.recipe.batch}"
    return Curves(
        title=f"Top-1 accuracy by epoch: {record.arch} and {record.baseline}",
        circumstances=f"{record.data.title}, {recipe}, {seeds}; {machine}",
        label="top-1 accuracy on the test images (%)",
        curves=tuple(found),
        notes=(
            "Lines: means over the seeds; bands: from the least to the greatest of them.",
            f"At the end: {verdict.top1.difference.text}.",
            *([f"{verdict.diverged}; drawn are the others."] if verdict.diverged else []),
        ),
    )


# Base and variant, told apart in grey too: by shade, and by the dashes of the base.
_CURVE_STYLES: tuple[tuple[str, Literal["--", "-"]], ...] = (("#6b6b6b", "--"), ("#08519c", "-"))


def curves_figure(shown: Curves) -> "Figure":
    """Draw learning curves."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = [
        Line2D([], [], color=colour, linestyle=dashes, label=curve.name)
        for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=True)
    ]
    figure, axes = new_figure(shown, plot_in=3.2, left_in=0.85, handles=handles, notes=shown.notes)
    for curve, (colour, dashes) in zip(shown.curves, _CURVE_STYLES, strict=True):
        epochs = range(1, len(curve.mean) + 1)
        axes.fill_between(epochs, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(epochs, curve.mean, color=colour, linestyle=dashes, marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(shown.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
