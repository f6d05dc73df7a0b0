"""Timings that a runtime's own benchmark tool printed, on a phone or elsewhere, as a record.

Each run of the tool is one network alone, so the two networks are compared run by run: the first run of the baseline
with the first run of the variant, and so on. Runs that were made in turn share the state of the device.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selab.errors import RecordError
from selab.records import stats
from selab.records.files import read_text, write_atomically
from selab.records.frozen import Frozen
from selab.records.store import Store
from selab.records.types import decoded, lined_json

SCHEMA = "selab.imported/1"
FOLDER = "imported"
LEAST_PAIRS = 3
"""So many runs of each have an interval."""
_MOST_S = 3600.0


class ToolRun(Frozen, frozen=True, kw_only=True):
    """One run of a benchmark tool.

    Attributes:
        mean_s: of one inference, without those that warm up.
        median_s: None where the tool tells none.
        inferences: how many; None where the tool does not tell.
    """

    mean_s: float
    median_s: float | None = None
    inferences: int | None = None

    @property
    def typical_s(self) -> float:
        """The median if there is one, else the mean."""
        return self.mean_s if self.median_s is None else self.median_s


class Imported(Frozen, frozen=True, kw_only=True):
    """Runs of a network and of its baseline on one device.

    Attributes:
        device: what the user calls it.
        ratio: the geometric mean of the pairs' ratios, variant over baseline.
        ratio_low: of the 95 % interval, Student's t over the pairs; None for fewer than three pairs.
    """

    schema: str = SCHEMA
    selab: str
    arch: str
    baseline: str
    device: str
    runtime: str
    dtype: str
    threads: int
    baseline_runs: tuple[ToolRun, ...]
    variant_runs: tuple[ToolRun, ...]
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


def ratio_of(baseline: Sequence[ToolRun], variant: Sequence[ToolRun]) -> tuple[float, float | None, float | None]:
    """Return the ratio of the pairs and its interval.

    Raises:
        RecordError: not as many runs of one as of the other, or none.
    """
    if not baseline or len(baseline) != len(variant):
        raise RecordError(
            f"{len(baseline)} runs of the baseline and {len(variant)} of the network: give as many of each, in the "
            "order in which they were made"
        )
    changes = [math.log(two.typical_s / one.typical_s) for one, two in zip(baseline, variant, strict=True)]
    ratio = math.exp(stats.mean(changes))
    found = stats.paired_t_interval(changes) if len(changes) >= LEAST_PAIRS else None
    if found is None:
        return ratio, None, None
    centre, half = found
    return ratio, math.exp(centre - half), math.exp(centre + half)


# ---------------------------------------------------------------------------------------------------- what tools print
_NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"


def _litert(text: str) -> ToolRun | None:
    """Read `benchmark_model` of LiteRT: microseconds."""
    summary = re.search(rf"Inference timings in us: .*Inference \(avg\): {_NUMBER}", text)
    if summary is None:
        return None
    # The last line of counts is that of the timed runs; those before it warm up.
    counts = re.findall(r"count=(\d+)", text)
    medians = re.findall(rf"\bmedian={_NUMBER}", text)
    return ToolRun(
        mean_s=float(summary[1]) * 1e-6,
        median_s=float(medians[-1]) * 1e-6 if medians else None,
        inferences=int(counts[-1]) if counts else None,
    )


def _onnxruntime(text: str) -> ToolRun | None:
    """Read `onnxruntime_perf_test`: milliseconds on average, seconds in percentiles."""
    mean = re.search(rf"Average inference time cost(?: total)?: ?{_NUMBER} ms", text)
    median = re.search(rf"P50 Latency(?: is|:) ?{_NUMBER} s", text)
    number = re.search(r"Total inference requests: ?(\d+)", text)
    if mean is None:
        return None
    return ToolRun(
        mean_s=float(mean[1]) * 1e-3,
        median_s=float(median[1]) if median else None,
        inferences=int(number[1]) if number else None,
    )


def _openvino(text: str) -> ToolRun | None:
    """Read `benchmark_app` of OpenVINO: milliseconds."""
    mean = re.search(rf"Average:\s+{_NUMBER} ms", text)
    median = re.search(rf"Median:\s+{_NUMBER} ms", text)
    number = re.search(r"Count:\s+(\d+) iterations", text)
    if mean is None:
        return None
    return ToolRun(
        mean_s=float(mean[1]) * 1e-3,
        median_s=float(median[1]) * 1e-3 if median else None,
        inferences=int(number[1]) if number else None,
    )


def _executorch(text: str) -> ToolRun | None:
    """Read `executor_runner`: milliseconds of all runs together."""
    found = re.search(rf"Model executed successfully (\d+) time\(s\) in {_NUMBER} ms", text)
    if found is None or int(found[1]) < 1:
        return None
    return ToolRun(mean_s=float(found[2]) * 1e-3 / int(found[1]), inferences=int(found[1]))


TOOLS: dict[str, tuple[str, Callable[[str], ToolRun | None]]] = {
    "litert": ("benchmark_model", _litert),
    "onnxruntime": ("onnxruntime_perf_test", _onnxruntime),
    "openvino": ("benchmark_app", _openvino),
    "executorch": ("executor_runner --num_executions N", _executorch),
}
"""Runtime → its tool, and what reads the tool's output."""


def read_run(path: Path, runtime: str) -> ToolRun:
    """Return what a runtime's benchmark tool printed into a file.

    Raises:
        RecordError: the file cannot be read, or is no such output.
    """
    tool, parse = TOOLS[runtime]
    try:
        run = parse(read_text(path))
    except ValueError:
        run = None
    if run is None:
        raise RecordError(f"{path}: is no output of {tool}; save what it prints, both streams, into the file")
    for name in ("mean_s", "median_s"):
        value = getattr(run, name)
        if value is not None and not 0 < value < _MOST_S:
            raise RecordError(f"{path}: {tool} says {value:g} s for an inference; measure again")
    return run


def record_of(base_files: Sequence[Path], files: Sequence[Path], *, runtime: str, **facts: Any) -> Imported:
    """Return the record of what a tool printed for a baseline and for a network.

    Args:
        base_files: of the baseline, in the order in which they were made.
        files: of the network, likewise, as many.
        runtime: whose tool.
        facts: the other fields.

    Raises:
        RecordError: a file cannot be read or is no such output; not as many of one as of the other; one is both.
    """
    for path in files:
        if path.resolve() in {one.resolve() for one in base_files}:
            raise RecordError(f"{path}: is given for the baseline and for the network; name two different files")
    runs = [tuple(read_run(path, runtime) for path in paths) for paths in (base_files, files)]
    ratio, low, high = ratio_of(*runs)
    return Imported(
        runtime=runtime,
        baseline_runs=runs[0],
        variant_runs=runs[1],
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        **facts,
    )


# --------------------------------------------------------------------------------------------------------------- files
def imported_path(out: Path, record: Imported) -> Path:
    """Return `OUT/<device>/imported/<arch>.<runtime>-<dtype>-t<threads>.json`."""
    device = re.sub(r"[^\w.]+", "-", record.device.lower()).strip("-.") or "device"
    parts = [f"{record.runtime}-{record.dtype}-t{record.threads}"]
    return IMPORTED.path(out, machine=device, arch=record.arch, against=record.baseline, parts=parts)


def save_imported(record: Imported, path: Path) -> None:
    """Write a record atomically.

    Raises:
        RecordError: the folder is not writable.
    """
    write_atomically(path, lined_json(record))


def read_imported(path: Path) -> Imported:
    """Read a record, and check that its ratio follows from its runs.

    Raises:
        RecordError: the file is not such a record; the message names the file and the field.
    """
    record = decoded(
        read_text(path).encode(), Imported, schema=SCHEMA, where=str(path), again="import again with `selab import`"
    )
    for wrong in _mistaken(record):
        raise RecordError(f"{path}: {wrong}; import again with `selab import`, or restore the file")
    return record


IMPORTED = Store(folder=FOLDER, title="imported timings", command="selab import", read=read_imported)
"""The imported timings on disk."""


def _mistaken(record: Imported) -> Iterator[str]:
    for name in ("baseline_runs", "variant_runs"):
        for place, run in enumerate(getattr(record, name)):
            if not 0 < run.typical_s < _MOST_S or not 0 < run.mean_s < _MOST_S:
                yield f"{name}[{place}]: is not between 0 and {_MOST_S:g} s"
                return
    try:
        found = ratio_of(record.baseline_runs, record.variant_runs)
    except RecordError as error:
        yield f"runs: {error}"
        return
    for name, value in zip(("ratio", "ratio_low", "ratio_high"), found, strict=True):
        stored = getattr(record, name)
        if (stored is None) != (value is None) or (value is not None and not math.isclose(stored, value, rel_tol=1e-9)):
            yield f"{name}: is {stored!r}, its runs give {value!r}"
