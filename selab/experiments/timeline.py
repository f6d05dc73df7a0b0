"""A network's timeline: recorded, written where TensorBoard and Perfetto read it, and summed up in tables."""

from pathlib import Path

from selab.bench.machine import machine
from selab.bench.profiler import Recorded, record_steps
from selab.experiments.job import Request, workload_of
from selab.models import catalog
from selab.models.build import build
from selab.records.store import check_writable, file_name, replacing
from selab.records.types import Phase

LOGS = "timeline"
"""The folder that TensorBoard is pointed at, under a machine's folder."""


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
