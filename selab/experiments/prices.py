"""What several networks take over one, all in turns: a network without each of its blocks, or other networks.

All of them alternate in each of several fresh processes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from selab.models.catalog import find
from selab.records.types import Frozen, Latency
from selab.units import counted


class PriceOrder(Frozen, frozen=True, kw_only=True):
    """The order of a fresh process.

    Attributes:
        names: paths of the blocks that are left out, or other networks as `--arch` takes them.
        others: whether they are other networks.
        seed: of the orders.
        seconds: of sampling of each pair.
        files: of networks for another runtime: name → file; that of the job's own network under `baseline`.
    """

    job: Job
    names: tuple[str, ...]
    others: bool
    seed: int
    seconds: float
    files: dict[str, str] = msgspec.field(default_factory=dict)


def prices(job: Job, paths: Sequence[str], report: Report) -> tuple[dict[str, Latency], tuple[str, ...]]:
    """Return for each block the time of the network without it over that of the network with all blocks, forward.

    Args:
        job: of one phase; its baseline is not looked at.
        paths: of the blocks, as `selab.judging.watch.gated_blocks` or `selab.graphs.blocks.find_blocks` names them.
        report: called with what is done.

    Returns:
        Path → figures, and what must be known of them.

    Raises:
        SelabError: the network cannot be built, written or measured.
    """
    return _times(job, paths, report, others=False)


def times(job: Job, archs: Sequence[str], report: Report) -> tuple[dict[str, Latency], tuple[str, ...]]:
    """Return for each other network its time over that of the job's network, forward.

    Args:
        job: of one phase; its baseline is not looked at.
        archs: the other networks, as `--arch` takes them.
        report: called with what is done.

    Returns:
        Network → figures, and what must be known of them.

    Raises:
        SelabError: a network cannot be built, written or measured.
    """
    return _times(job, archs, report, others=True)


def _times(
    job: Job, names: Sequence[str], report: Report, *, others: bool
) -> tuple[dict[str, Latency], tuple[str, ...]]:
    check_device(job.workload.device, job.workload.dtype, runtime=job.workload.runtime)
    began, before = time.monotonic(), read_cpu()
    remarks: list[str] = []
    order = PriceOrder(job=job, names=tuple(names), others=others, seed=job.request.seed, seconds=0.0)
    with ExitStack() as kept, redirect_stdout(sys.stderr):
        if is_exported(job):
            files = _written(order, kept.enter_context(scratch()), remarks, report)
            order, began = msgspec.structs.replace(order, files=files), time.monotonic()
        gathered = Gathered(job=job, pairs=_pairs(names))
        _measure(order, gathered, report, began=began, before=before)
    found = {pair.variant: pair.latency for pair in gathered.summaries() if pair.variant != AGAIN}
    return found, (*remarks, *gathered.deaths)


def _pairs(names: Sequence[str]) -> list[Pair]:
    return [(BASELINE, AGAIN), *((BASELINE, name) for name in names)]


def _measure(
    first: PriceOrder,
    gathered: Gathered,
    report: Report,
    *,
    began: float,
    before: CpuReading | None,
) -> None:
    job = first.job
    schedule = Schedule(
        began=began, effort=effort_of(job.request), runs=len(gathered.pairs), clock=time.monotonic, control_share=0.0
    )
    here = machine(job.workload.device)
    report(expectation(schedule, before, device=job.workload.device, cores=here.cores), None)

    def order_of(turn: Turn) -> PriceOrder:
        return msgspec.structs.replace(first, seed=first.seed + turn.number, seconds=turn.sampling_s)

    for event in in_processes(schedule, __name__, order_of, TaxFound):
        if isinstance(event, Started):
            report(f"{event.where}: {counted(len(first.names), 'network' if first.others else 'block')}", None)
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


def _made(order: PriceOrder, name: str) -> nn.Module:
    """Return the job's network, that without the block of a path, or another network."""
    job, own = order.job, name in (BASELINE, AGAIN)
    variant = find(name) if order.others and not own else job.variant
    model = build(variant, seed=job.request.seed, input_chw=job.workload.input_chw).model
    if not order.others and not own:
        model = without(model, name)
    if job.workload.fused:
        fuse(model, input_nchw=(job.workload.batch, *job.workload.input_chw))
    return model


def _written(order: PriceOrder, folder: Path, remarks: list[str], report: Report) -> dict[str, str]:
    job = order.job
    to = target(job.workload.runtime)
    images: Sequence[Tensor] = ()
    if job.workload.dtype == "int8":
        images, said = calibration_of(job)
        remarks.append(said)
    files = {}
    for place, name in enumerate((BASELINE, *order.names)):
        what = "the network" if name == BASELINE else name if order.others else f"it without {name}"
        report(f"exporting {what}", None)
        file = folder / f"{place}{to.suffix}"
        write_network(_made(order, name), to, job.workload, file, name=job.variant.name, images=images)
        files[name] = str(file)
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

    others = [AGAIN, *order.names]
    # The order in which they are made decides where they lie in memory.
    names = [BASELINE, *Random(f"prices {order.seed}").sample(others, len(others))]
    job = order.job
    networks = {
        name: partial(network_of, job, order.files[name]) if order.files else partial(_made, order, name)
        for name in names
    }
    plan = job.plan.short(order.seconds)
    pairs = _pairs(order.names)
    found = measure_networks(networks, pairs, job.workload, "forward", plan, report, seed=order.seed)
    yield TaxFound(
        runs=tuple((method, *pair, run) for method, runs in found.runs.items() for pair, run in runs.items()),
        failed=tuple((*where, why) for where, why in found.failed.items()),
        saved={},
        remarks={},
    )
