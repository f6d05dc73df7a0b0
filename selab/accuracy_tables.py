"""Accuracy records → tables: what a network costs and what it buys, side by side, with the uncertainty of both."""

from collections.abc import Callable
from statistics import mean

from selab import units
from selab.accuracy_record import AccuracyRecord, Outcome
from selab.accuracy_verdict import Comparison, compare_verdict
from selab.grid import NONE, Grid
from selab.record import Cost, Latency
from selab.tables import change_words


def comparison_grid(record: AccuracyRecord, costs: dict[str, Cost], latency: Latency | None = None) -> Grid:
    """The table of `selab compare`: cost, accuracy over the seeds, and what training took.

    Args:
        record: both networks, trained.
        costs: of both, by name, for one image of the data's size.
        latency: forward, variant against baseline, if it was measured.
    """
    base, variant = costs[record.baseline], costs[record.arch]
    verdict = compare_verdict(record)
    rows = [
        _cost_row("parameters", base.params, variant.params),
        _cost_row("MACs, paper", base.macs.paper, variant.macs.paper),
    ]
    if latency is not None and latency.baseline_s is not None and latency.variant_s is not None:
        times = (units.seconds(latency.baseline_s), units.seconds(latency.variant_s))
        rows.append(("forward, batch 1", *times, change_words(latency)))
    rows.append(_level_row("top-1 accuracy", verdict.top1))
    if verdict.top5 is not None:
        rows.append(_level_row("top-5 accuracy", verdict.top5))
    rows.append(_level_row("loss", verdict.loss))
    rows += [
        _trained("training, images/s", record, lambda one: one.images_per_s, lambda value: f"{value:,.0f}"),
        _trained("training, time", record, lambda one: one.seconds, units.seconds),
    ]
    notes = [f"{name}: {one.difference.text}" for name, one in (("top-1", verdict.top1), ("loss", verdict.loss))]
    done = sum(one.variant is not None and one.baseline is not None for one in record.seeds)
    epochs = f"{record.recipe.epochs} epoch{'s' if record.recipe.epochs > 1 else ''}"
    place = f"{record.machine.gpu or record.machine.cpu}, torch {record.machine.libraries.get('torch', '')}"
    notes.append(
        f"{record.data.title}, recipe {record.recipe.name}, {epochs}, batch {record.recipe.batch}; {done} of "
        f"{len(record.seeds)} seeds; ± is one deviation over seeds, of a difference its 95 % interval. {place}."
    )
    if not record.data.official:
        notes.append(f"{record.data.title} is not the published set: do not compare these figures with published ones.")
    return Grid(
        title=f"{record.arch} against {record.baseline} on {record.data.title}",
        columns=("", "base", "variant", "difference"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def seeds_grid(record: AccuracyRecord) -> Grid:
    """Every seed: top-1 accuracy and loss of both networks, and their difference."""
    rows = tuple(
        (str(one.seed), *_seed_cells(one.baseline, one.variant)) for one in record.seeds if one.baseline or one.variant
    )
    columns = ("seed", "base top-1", "variant top-1", "points", "base loss", "variant loss")
    return Grid(title="By seed", columns=columns, rows=rows)


def _seed_cells(base: Outcome | None, variant: Outcome | None) -> tuple[str, ...]:
    top1 = [NONE if one is None else f"{one.test.top1_pct:.2f} %" for one in (base, variant)]
    loss = [NONE if one is None else f"{one.test.loss:.4f}" for one in (base, variant)]
    points = f"{variant.test.top1_pct - base.test.top1_pct:+.2f}" if base is not None and variant is not None else NONE
    return (*top1, points, *loss)


def _cost_row(label: str, base: float, variant: float) -> tuple[str, ...]:
    return (label, units.count(base), units.count(variant), units.percent(variant / base - 1))


def _level_row(label: str, one: Comparison) -> tuple[str, ...]:
    levels = [NONE if level is None else level.text for level in (one.baseline, one.variant)]
    difference = one.difference
    if difference.mean is None:
        return (label, *levels, NONE)
    decimals = 4 if one.metric == "loss" else 2
    shown = f"{difference.mean:+.{decimals}f}"
    return (
        label,
        *levels,
        shown if difference.half_width is None else f"{shown} ± {difference.half_width:.{decimals}f}",
    )


def _trained(
    label: str, record: AccuracyRecord, value: Callable[[Outcome], float], show: Callable[[float], str]
) -> tuple[str, ...]:
    found = [
        [value(outcome) for one in record.seeds if (outcome := getattr(one, arm)) is not None]
        for arm in ("baseline", "variant")
    ]
    if not all(found):
        return (label, NONE, NONE, NONE)
    base, variant = (mean(values) for values in found)
    return (label, show(base), show(variant), units.percent(variant / base - 1))
