"""A network's timeline: recorded, written where TensorBoard and Perfetto read it, and summed up in tables."""

import shlex
from pathlib import Path

from selab import catalog, units
from selab.build import build
from selab.grid import Grid
from selab.measure.machine import machine
from selab.measure.timeline import Recorded, Timeline, record_steps
from selab.record import Phase
from selab.request import Request, workload_of
from selab.store import check_writable, file_name, replacing

LOGS = "timeline"
"""The folder that TensorBoard is pointed at, under a machine's folder."""
_SHOWN = 12


def trace_path(request: Request, phase: Phase, out: Path) -> Path:
    """`OUT/<machine>/timeline/<arch>.<workload>.<phase>/selab.pt.trace.json`; a folder is a run to TensorBoard."""
    variant = catalog.find(request.arch)
    run = f"{file_name(variant.name)}.{workload_of(request, variant).slug}.{phase}"
    return out / machine(request.device).name / LOGS / run / "selab.pt.trace.json"


def recorded(request: Request, phase: Phase, *, steps: int) -> Recorded:
    """Builds the network that is asked for and records some of its steps.

    Raises:
        SelabError: it cannot be built, or fails.
    """
    variant = catalog.find(request.arch)
    workload = workload_of(request, variant)
    built = build(variant, input_chw=workload.input_chw, seed=request.seed)
    return record_steps(built.model, workload, phase, steps=steps, native=built.native, seed=request.seed)


def write_trace(found: Recorded, path: Path, *, replace: bool) -> None:
    """Writes the trace whole or not at all.

    Raises:
        RecordError: it exists and may not be replaced, or cannot be written.
    """
    check_writable(path, replace=replace)
    with replacing(path) as temporary:
        found.export(temporary)


def how_to_look(path: Path) -> list[str]:
    """The commands that show a trace."""
    return [
        f"tensorboard --logdir {shlex.quote(str(path.parent.parent))}  # then http://localhost:6006/#pytorch_profiler",
        f"https://ui.perfetto.dev: Open trace file, {path}  # search for se.",
    ]


def timeline_grids(arch: str, found: Timeline) -> list[Grid]:
    """The tables of `selab timeline`: the operators that take longest, and the blocks by stage."""
    rows = tuple(
        (one.name, f"{one.calls:g}", units.seconds(one.self_s), units.share(one.self_s / found.total_s))
        for one in found.operators[:_SHOWN]
    )
    rest = found.operators[_SHOWN:]
    if rest:
        left = sum(one.self_s for one in rest)
        calls = f"{sum(one.calls for one in rest):g}"
        rows += ((f"{len(rest)} others", calls, units.seconds(left), units.share(left / found.total_s)),)
    operators = Grid(
        title=f"{arch}: operators of a step ({found.phase.replace('_', '+')}, {units.seconds(found.total_s)})",
        columns=("", "calls", "own time", "of the step"),
        rows=rows,
        notes=(
            f"Mean of {found.steps} step{'s' if found.steps > 1 else ''} under the profiler, which slows small "
            "operators more than large ones: this says where to look; how much it is, `selab profile` measures.",
        ),
    )
    return [operators, _stages_grid(found)] if found.blocks else [operators]


def _stages_grid(found: Timeline) -> Grid:
    lines = [*found.stages.items(), ("together", sum(found.stages.values()))]
    return Grid(
        title=f"The blocks by stage ({found.blocks} blocks)",
        columns=("", "own time", "of the step"),
        rows=tuple(
            (name, units.seconds(value), units.share(value / found.total_s, decimals=2)) for name, value in lines
        ),
    )
