"""The figures by name, and how they are rendered to a file."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from selab.errors import SelabError, UnknownNameError, nearest
from selab.experiments.compared import Compared
from selab.records.files import write_atomically
from selab.records.types import Cost, Record
from selab.report.figures.axes import axis
from selab.report.figures.bars import Bars, bars, bars_figure
from selab.report.figures.curves import Curves, curves_figure
from selab.report.figures.gates import GateDepth, GatePanels, depth_figure, panels_figure
from selab.report.figures.lines import Lines, lines_figure
from selab.report.figures.placement import PlacementFront, placement_figure
from selab.report.figures.roofline import Roof, roof_figure
from selab.report.figures.runtimes import runtime_bars
from selab.report.figures.scatter import Scatter, points, scatter_figure
from selab.report.figures.style import STYLE
from selab.report.figures.tax import TaxBars, tax_figure

Picture = Scatter | Bars | Curves | Roof | Lines | TaxBars | GatePanels | GateDepth | PlacementFront
_AXES_OF = {"cost": ("macs", "latency"), "accuracy": ("macs", "top1_error")}
CURVES, TAX = "curves", "tax"
OF_ONE_RECORD = (CURVES, TAX)
RUNTIMES = "runtimes"
NAMES = (*_AXES_OF, "added", RUNTIMES, *OF_ONE_RECORD)


def axes_of(name: str, x: str | None = None, y: str | None = None) -> tuple[str, str] | None:
    """Return the axes of a figure by name; None for a figure without a choice of axes.

    Raises:
        UnknownNameError: there is no such picture, or no such quantity.
        SelabError: axes were asked for where there are none.
    """
    if name not in NAMES:
        raise UnknownNameError(f"plot {name}: no such picture{nearest(name, NAMES)}")
    if name not in _AXES_OF:
        if x is not None or y is not None:
            raise SelabError(f"plot {name}: has axes of its own; --x and --y are for {' and '.join(_AXES_OF)}")
        return None
    across, up = _AXES_OF[name]
    return axis(x or across, option="--x").name, axis(y or up, option="--y").name


def picture(
    name: str,
    *,
    x: str | None = None,
    y: str | None = None,
    records: Sequence[Record] = (),
    costs: Mapping[str, Cost] | None = None,
    archs: Sequence[str] = (),
    workload: str | None = None,
    compared: Sequence[Compared] = (),
) -> Picture:
    """Return a figure's data by name: `cost` and `accuracy` are scatters with a choice of axes, the others bars.

    Raises:
        SelabError: as `axes_of`, `points` and `bars`.
    """
    axes = axes_of(name, x, y)
    if name == RUNTIMES:
        return runtime_bars(records, archs=archs)
    if axes is None:
        return bars(records, archs=archs, workload=workload)
    return points(*axes, records=records, costs=costs, archs=archs, workload=workload, compared=compared)


ENDINGS = (".svg", ".png", ".pdf")


_PNG_DPI = 200


def check_file(path: Path) -> None:
    """Refuse a file whose ending is not that of a picture.

    Raises:
        SelabError: the message lists the endings.
    """
    if path.suffix.lower() not in ENDINGS:
        allowed = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise SelabError(f"--out {path}: {path.suffix or 'no ending'}; a picture ends in {allowed}")


def draw(shown: Picture, path: Path) -> None:
    """Write a picture whole or not at all, as SVG, PNG or PDF by the file's ending.

    Raises:
        SelabError: another ending.
        RecordError: the folder cannot be written.
    """
    check_file(path)
    write_atomically(path, rendered(shown, path.suffix.lower()))


def rendered(shown: Picture, ending: str) -> bytes:
    """Return a picture as the bytes of a file with one of `ENDINGS`; no date and no user's style enter."""
    # Nothing is shown on a screen, so the backend that the environment names, which may not exist, has no say.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib import style
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend

    with style.context(["default", STYLE]):
        match shown:
            case Scatter():
                figure = scatter_figure(shown)
            case Bars():
                figure = bars_figure(shown)
            case Curves():
                figure = curves_figure(shown)
            case Roof():
                figure = roof_figure(shown)
            case Lines():
                figure = lines_figure(shown)
            case TaxBars():
                figure = tax_figure(shown)
            case GatePanels():
                figure = panels_figure(shown)
            case GateDepth():
                figure = depth_figure(shown)
            case PlacementFront():
                figure = placement_figure(shown)
        file = io.BytesIO()
        if ending == ".svg":
            metadata = {"Title": shown.title, "Date": None, "Creator": None}
            figure.savefig(file, format="svg", metadata=metadata)
        elif ending == ".pdf":
            undated = dict.fromkeys(("CreationDate", "Creator", "Producer"))
            figure.savefig(file, format="pdf", metadata={"Title": shown.title, **undated})
        else:
            figure.savefig(file, format="png", dpi=_PNG_DPI, metadata={"Title": shown.title, "Software": None})
    return file.getvalue()
