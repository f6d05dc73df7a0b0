"""Record a network's timeline, and write it where TensorBoard and Perfetto read it."""

from pathlib import Path

from selab.bench.machine import machine
from selab.bench.profiler import Recorded, record_steps
from selab.experiments.job import Job
from selab.models.build import build
from selab.records.store import check_writable, file_name, replacing
from selab.records.types import Phase

LOGS = "timeline"
"""The folder that TensorBoard is pointed at, under a machine's folder."""


def trace_path(job: Job, phase: Phase, out: Path) -> Path:
    """Return `OUT/<machine>/timeline/<arch>.<workload>.<phase>/selab.pt.trace.json`.

    Each trace has a folder, which TensorBoard shows as a run.
    """
    run = f"{file_name(job.variant.name)}.{job.workload.slug}.{phase}"
    return out / machine(job.workload.device).name / LOGS / run / "selab.pt.trace.json"


def recorded(job: Job, phase: Phase, *, steps: int) -> Recorded:
    """Build the network and record some of its steps.

    Raises:
        SelabError: the network cannot be built, or fails.
    """
    workload, seed = job.workload, job.request.seed
    built = build(job.variant, input_chw=workload.input_chw, seed=seed)
    return record_steps(built.model, workload, phase, steps=steps, native=built.native, seed=seed)


def write_trace(found: Recorded, path: Path, *, replace: bool) -> None:
    """Write the trace whole or not at all.

    Raises:
        RecordError: it exists and may not be replaced, or cannot be written.
    """
    check_writable(path, replace=replace)
    with replacing(path) as temporary:
        found.export(temporary)
