"""What each block of a network costs in time: the network without that block over the network with all of them."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from random import Random

import msgspec
from torch import Tensor, nn

from selab.attention.insert import take_out
from selab.bench.interleaved import Pair, measure_networks
from selab.bench.machine import CpuReading, machine, read_cpu
from selab.bench.progress import Progress, Report
from selab.bench.runner import check_device
from selab.deploy.target import scratch, target
from selab.errors import InsertionError
from selab.experiments.children import Found, Started, Turn, child, in_processes
from selab.experiments.exporting import calibration_of, is_exported, write_network
from selab.experiments.job import Job
from selab.experiments.schedule import Schedule, effort_of, expectation
from selab.experiments.tax_exported import network_of
from selab.experiments.tax_gathered import Gathered, TaxFound
from selab.experiments.tax_record import AGAIN, BASELINE
from selab.fusion.fuse import fuse
from selab.graphs.baseline import without_blocks
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.models.build import build
from selab.records.types import Frozen, Latency


class PriceOrder(Frozen, frozen=True, kw_only=True):
    """The order of a fresh process.

    Attributes:
        paths: of the blocks.
        seed: of the orders.
        seconds: of sampling of each pair.
        files: of networks for another runtime: path of the block that is left out → file; all of them under `baseline`.
    """

    job: Job
    paths: tuple[str, ...]
    seed: int
    seconds: float
    files: dict[str, str] = msgspec.field(default_factory=dict)


def prices(job: Job, paths: Sequence[str], report: Report) -> tuple[dict[str, Latency], tuple[str, ...]]:
    """Return for each block the time of the network without it over that of the network with all blocks, forward.

    All networks alternate in each of several fresh processes.

    Args:
        job: of one phase; its baseline is not looked at.
        paths: of the blocks, as `selab.judging.watch.gated_blocks` or `selab.graphs.blocks.find_blocks` names them.
        report: called with what is done.

    Returns:
        Path → figures, and what must be known of them.

    Raises:
        SelabError: the network cannot be built, written or measured.
    """
    check_device(job.workload.device, job.workload.dtype, runtime=job.workload.runtime)
    began, before = time.monotonic(), read_cpu()
    remarks: list[str] = []
    with ExitStack() as kept, redirect_stdout(sys.stderr):
        files: dict[str, str] = {}
        if is_exported(job):
            files = _written(job, paths, kept.enter_context(scratch()), remarks, report)
            began = time.monotonic()
        gathered = Gathered(job=job, pairs=_pairs(paths))
        _measure(job, paths, files, gathered, report, began=began, before=before)
    found = {pair.variant: pair.latency for pair in gathered.summaries() if pair.variant != AGAIN}
    return found, (*remarks, *gathered.deaths)


def _pairs(paths: Sequence[str]) -> list[Pair]:
    return [(BASELINE, AGAIN), *((BASELINE, path) for path in paths)]


def _measure(
    job: Job,
    paths: Sequence[str],
    files: Mapping[str, str],
    gathered: Gathered,
    report: Report,
    *,
    began: float,
    before: CpuReading | None,
) -> None:
    schedule = Schedule(
        began=began, effort=effort_of(job.request), runs=len(gathered.pairs), clock=time.monotonic, control_share=0.0
    )
    here = machine(job.workload.device)
    report(expectation(schedule, before, device=job.workload.device, cores=here.cores), None)

    def order_of(turn: Turn) -> PriceOrder:
        seed = job.request.seed + turn.number
        return PriceOrder(job=job, paths=tuple(paths), seed=seed, seconds=turn.sampling_s, files=dict(files))

    for event in in_processes(schedule, __name__, order_of, TaxFound):
        if isinstance(event, Started):
            report(f"{event.where}: {len(paths)} blocks", None)
        elif isinstance(event, Found):
            gathered.add(event.number, event.what)
        elif event.died:
            gathered.drop(event.number, event.remark)
            report(event.remark, None)


def without(model: nn.Module, path: str) -> nn.Module:
    """Return a network without one block; a network in PyTorch is changed, an ONNX network copied.

    Raises:
        InsertionError: there is no such block.
    """
    if not isinstance(model, OnnxNetwork):
        take_out(model, path)
        return model
    chosen = [block for block in find_blocks(Graph(model.model)) if block.name == path]
    if not chosen:
        raise InsertionError(f"{model.place}: has no block {path}")
    return OnnxNetwork(without_blocks(model.model, chosen), model.place)


def _made(job: Job, path: str) -> nn.Module:
    """Return the network without the block of a path, or with all of them."""
    model = build(job.variant, seed=job.request.seed, input_chw=job.workload.input_chw).model
    if path not in (BASELINE, AGAIN):
        model = without(model, path)
    if job.workload.fused:
        fuse(model, input_nchw=(job.workload.batch, *job.workload.input_chw))
    return model


def _written(job: Job, paths: Sequence[str], folder: Path, remarks: list[str], report: Report) -> dict[str, str]:
    to = target(job.workload.runtime)
    images: Sequence[Tensor] = ()
    if job.workload.dtype == "int8":
        images, said = calibration_of(job)
        remarks.append(said)
    files = {}
    for place, path in enumerate((BASELINE, *paths)):
        report(f"exporting {'the network' if path == BASELINE else f'it without {path}'}", None)
        file = folder / f"{place}{to.suffix}"
        write_network(_made(job, path), to, job.workload, file, name=job.variant.name, images=images)
        files[path] = str(file)
    return {**files, AGAIN: files[BASELINE]}


def child_main() -> None:
    """Run the program of a process."""
    child(PriceOrder, _short_run)


def _short_run(order: PriceOrder, ready: Callable[[], object]) -> Iterator[TaxFound]:
    unsaid = [ready]

    def report(_label: str, state: Progress | None) -> None:
        # The first block says that all networks are ready; later ones must not write between samples.
        if state is not None and unsaid:
            unsaid.pop()()

    others = [AGAIN, *order.paths]
    # The order in which they are made decides where they lie in memory.
    names = [BASELINE, *Random(f"prices {order.seed}").sample(others, len(others))]
    job = order.job
    networks = {
        name: partial(network_of, job, order.files[name]) if order.files else partial(_made, job, name)
        for name in names
    }
    plan = job.plan.short(order.seconds)
    pairs = _pairs(order.paths)
    found = measure_networks(networks, pairs, job.workload, "forward", plan, report, seed=order.seed)
    yield TaxFound(
        runs=tuple((method, *pair, run) for method, runs in found.runs.items() for pair, run in runs.items()),
        failed=tuple((*where, why) for where, why in found.failed.items()),
        saved={},
        remarks={},
    )
