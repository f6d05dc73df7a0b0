"""The networks of a tax in another runtime: the blocks in each spelling, and where they cost least."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import msgspec
from torch import Tensor, nn

from selab.attention.insert import remove_se, take_out
from selab.attention.inserted import inserted_blocks
from selab.bench.interleaved import Pair
from selab.bench.progress import Report
from selab.deploy.spelling import SPELLINGS
from selab.deploy.target import target
from selab.errors import InsertionError, SelabError
from selab.experiments.exporting import calibration_of, variant_of, write_network
from selab.experiments.job import Job
from selab.experiments.tax_record import AGAIN, AS_IT_IS, BASELINE, LATE, TaxRecord
from selab.graphs.baseline import without_blocks
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.models.build import build
from selab.records.types import Insertion
from selab.records.verdict import not_excluded

SPELLED = (*SPELLINGS, LATE)
OF_FILES = (AS_IT_IS, LATE)
"""What an ONNX file is measured as: its blocks stay in the operators that they are written in."""
# Maps of a 16th of the input's height and less: 14x14 and 7x7 of 224.
_LATE = 16


def pairs_of(names: Sequence[str]) -> list[Pair]:
    """Return the pairs to time: each over the baseline."""
    return [(BASELINE, AGAIN), *((BASELINE, name) for name in names)]


def write_arms(
    job: Job, names: Sequence[str], blocks: Sequence[Insertion], baseline: nn.Module, folder: Path, report: Report
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Write the baseline and the network in each spelling for the runtime of a job.

    Args:
        job: its variant has SE blocks.
        names: of `SPELLED`, or of `OF_FILES` for an ONNX network.
        blocks: of the network.
        baseline: the network without them.
        folder: for the files.
        report: called with what is done.

    Returns:
        Name → file; name → why there is none; and what must be known of them.

    Raises:
        SelabError: the baseline cannot be written.
    """
    workload, to = job.workload, target(job.workload.runtime)
    images: Sequence[Tensor] = ()
    remarks: list[str] = []
    if workload.dtype == "int8":
        images, said = calibration_of(job)
        remarks.append(said)
    write = partial(write_network, to=to, images=images)
    files, failed = {}, {}
    with redirect_stdout(sys.stderr):
        report("exporting the baseline", None)
        path = folder / f"{BASELINE}{to.suffix}"
        write(baseline, workload=workload, path=path, name=BASELINE)
        files[BASELINE] = files[AGAIN] = str(path)
        for name in names:
            report(f"exporting {name}", None)
            path = folder / f"{name}{to.suffix}"
            spelled = workload if name not in SPELLINGS else msgspec.structs.replace(workload, spelling=name)
            try:
                model = build(job.variant, seed=job.request.seed, input_chw=workload.input_chw).model
                if name == LATE:
                    model = _only_late(model, blocks, workload.input_chw[1])
                written = write(model, workload=spelled, path=path, name=job.variant.name)
            except SelabError as error:
                failed[name] = str(error)
                continue
            if name in SPELLINGS and not written.respelled:
                failed[name] = "none of its blocks can be spelled otherwise"
                continue
            files[name] = str(path)
    return files, failed, tuple(remarks)


def _only_late(model: nn.Module, blocks: Sequence[Insertion], height: int) -> nn.Module:
    """Return a network with the blocks on small maps only.

    Raises:
        InsertionError: none is, or all are.
    """
    early = [one for one in blocks if one.height * _LATE > height]
    if not early or len(early) == len(blocks):
        which = "all" if not early else "none"
        raise InsertionError(f"{which} of its blocks have maps of at most {height // _LATE} rows")
    if isinstance(model, OnnxNetwork):
        gone = {one.path for one in early}
        chosen = [block for block in find_blocks(Graph(model.model)) if block.name in gone]
        return OnnxNetwork(without_blocks(model.model, chosen), model.place)
    # A site that a block was inserted at holds the network's own module too; a block of the network's own is alone.
    sites = {site for site, _ in inserted_blocks(model).values()}
    if at_sites := [one.path for one in early if one.path in sites]:
        remove_se(model, at_sites)
    for one in early:
        if one.path not in sites:
            take_out(model, one.path)
    return model


def network_of(job: Job, file: str) -> nn.Module:
    """Return the network in a file that was written for a job's runtime."""
    return build(variant_of(Path(file), job.workload), input_chw=job.workload.input_chw).model


def advice(record: TaxRecord) -> str:
    """Return which spelling to use, in words; empty where none has a figure that may be quoted.

    Those whose interval reaches below the best one's estimate cannot be told from it.
    """
    method = record.methods[0]
    found = {}
    for name in record.implementations:
        latency = record.latency(name, method=method)
        # A hard gate is another network.
        if name in SPELLINGS and not SPELLINGS[name].gate and latency is not None and latency.ratio is not None:
            found[name] = latency
    found = {name: one for name, one in found.items() if one.verdict_kind != "undecided"}
    if not found:
        return ""
    where = f"Spelling to use in {record.workload.runtime}"
    found = {name: one for name, one in found.items() if one.verdict_kind != "no_result"}
    if not found:
        return f"{where}: the runtime's own; these figures are too noisy to choose by."
    best = min(found, key=lambda name: found[name].ratio or 0.0)
    close = []
    for name, latency in found.items():
        bounds = not_excluded(latency)
        if name != best and bounds is not None and 1 + bounds[0] <= (found[best].ratio or 0.0):
            close.append(name)
    others = f"; {', '.join(close)} cannot be told from it" if close else ""
    return f"{where}: {best}{others}."
