"""Bar charts of the SE overhead by implementation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selab.errors import RecordError
from selab.experiments.tax_record import AGAIN, IMPLEMENTATIONS, TaxRecord, least, words_of
from selab.models.provenance import name_of
from selab.records import verdict as records_verdict
from selab.records.types import TORCH
from selab.report.figures.bars import draw_bar, draw_interval, set_bars
from selab.report.figures.base import LeftOut, circumstances_of
from selab.report.figures.style import FAINT, FILLS, NOT_RESOLVED, left_out_note, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class TaxBar:
    """One implementation's tax, as a fraction of the baseline's time.

    Attributes:
        tax: None where no difference is shown.
        interval: what the measurement does not exclude; None where there is no result.
    """

    name: str
    tax: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TaxBars:
    """Implementations over their baseline, or runtimes; `least` is what the bytes alone would cost, if it is known."""

    title: str
    circumstances: str
    bars: tuple[TaxBar, ...]
    least: float | None
    left_out: tuple[LeftOut, ...] = ()


def tax_bars(record: TaxRecord, *, method: str | None = None) -> TaxBars:
    """Return what each implementation adds to the baseline's time.

    Args:
        record: of one network.
        method: one of the record's; by default its headline's.

    Raises:
        RecordError: the baseline was not measured.
    """
    method = method or record.methods[0]
    control = record.latency(AGAIN, method=method)
    if control is None or control.baseline_s is None:
        raise RecordError(f"plot tax: {record.arch}: the baseline was not measured; measure again with `selab tax`")
    bars, left_out = [], []
    names = IMPLEMENTATIONS if record.workload.runtime == TORCH else record.implementations
    for name in names:
        latency = record.latency(name, method=method)
        if latency is None or latency.ratio is None:
            left_out.append(LeftOut(name=words_of(name), why="not asked for" if latency is None else "failed"))
            continue
        interval = records_verdict.not_excluded(latency)
        said = interval is not None and latency.verdict_kind != "undecided"
        bars.append(TaxBar(name=words_of(name), tax=latency.ratio - 1 if said else None, interval=interval))
    what = record.phase.replace("_", " and ") + (" passes" if "_" in record.phase else " pass")
    return TaxBars(
        title=f"The SE tax of {name_of(record)}: what a {what} takes longer",
        circumstances=circumstances_of(record) + ("" if method == "wall" else f", {method}"),
        bars=tuple(bars),
        least=least(record).seconds / control.baseline_s,
        left_out=tuple(left_out),
    )


_TALL_BAR = 0.6


def tax_figure(shown: TaxBars) -> "Figure":
    """Draw the overhead of each implementation."""
    from matplotlib.patches import Patch

    notes = ["Whiskers and brackets: 95 % intervals."]
    if shown.least is not None:
        notes.insert(0, "Least: the bytes that SE must move, at the bandwidth of copies.")
    if any(bar.tax is None and bar.interval is not None for bar in shown.bars):
        notes.append(NOT_RESOLVED)
    notes += left_out_note(shown.left_out, len(shown.bars))
    fills = [FILLS["time of a forward pass"], FILLS["bytes moved"]]
    handles = [
        Patch(facecolor=fill, edgecolor=FAINT, linewidth=0.5, label=name)
        for fill, name in zip(fills, ("measured", "least"), strict=True)
        if name == "measured" or shown.least is not None
    ]
    names = [*(bar.name for bar in shown.bars), *(["least"] if shown.least is not None else [])]
    left_in = 0.3 + 0.075 * max(map(len, names))
    figure, axes = new_figure(shown, plot_in=0.25 + 0.34 * len(names), left_in=left_in, handles=handles, notes=notes)
    for index, bar in enumerate(shown.bars):
        draw_interval(axes, index, bar.tax, bar.interval, fills[0], height=_TALL_BAR)
    if shown.least is not None:
        draw_bar(axes, len(shown.bars), shown.least, fills[1], height=_TALL_BAR)
    ends = [shown.least or 0.0, *(end for bar in shown.bars for end in (bar.tax or 0.0, *(bar.interval or ())))]
    set_bars(axes, ends, names)
    axes.set_xlabel("added by SE (% of the baseline's time)")
    return figure
