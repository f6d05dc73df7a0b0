"""Record a network's timeline, and write it where TensorBoard and Perfetto read it."""

import tempfile
from pathlib import Path

import msgspec

from selab.bench.machine import machine
from selab.bench.profiler import Recorded, record_steps
from selab.errors import RecordError
from selab.experiments.job import Job
from selab.meta import first_line
from selab.models.build import build
from selab.records.files import check_writable, write_atomically
from selab.records.store import file_name
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
        RecordError: it exists and may not be replaced, or cannot be written, or torch could not write all of it.
    """
    check_writable(path, replace=replace)
    write_atomically(path, _content(found))


def _content(found: Recorded) -> bytes:
    """Return the trace as torch writes it; it reports no error where the disk is full, so the content is checked."""
    try:
        with tempfile.TemporaryDirectory(prefix="selab-") as folder:
            file = Path(folder) / "trace.json"
            found.export(file)
            content = file.read_bytes()
            msgspec.json.decode(content, type=msgspec.Raw)
    except (OSError, RuntimeError, msgspec.DecodeError) as error:
        place = tempfile.gettempdir()
        raise RecordError(
            f"the trace is incomplete: {first_line(error)}; make room in {place}, or set TMPDIR to another folder"
        ) from None
    return content
