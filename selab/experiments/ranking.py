"""Judge each block of a trained network: what is lost without its gate, and what is saved without it."""

import sys
from contextlib import redirect_stdout

import msgspec
import numpy as np

from selab.bench.machine import machine
from selab.bench.progress import Report
from selab.cost.count import count
from selab.experiments.job import Job
from selab.experiments.judged import Judged
from selab.experiments.prices import prices, without
from selab.judging.folding import Size
from selab.judging.loss import Loss, loss_of
from selab.judging.ranking import BlockWorth, Ranking
from selab.judging.worth import both, changes
from selab.models.build import build
from selab.records.types import Cost
from selab.units import counted


def rank(network: Judged, *, report: Report) -> Ranking:
    """Return what each block is worth, and its counted costs; nothing is timed.

    Args:
        network: with its images.
        report: called with what is done.

    Raises:
        InsertionError: the network has no gated block.
        SelabError: it does not run; there are no images.
    """
    report("looking at the gates", None)
    seen = network.gates(network.batches())
    repeated = network.repeated(seen)
    blocks = [one for one in seen.blocks if one.path not in repeated]
    means = {one.path: np.array(one.mean) for one in blocks}
    ones = {path: np.ones(len(mean)) for path, mean in means.items()}
    report(f"answers without each of {counted(len(means), 'gate')}", None)
    arms = [network.model, *(network.arm({path: kind[path]}) for kind in (means, ones) for path in means)]
    losses: list[Loss | None] = [None] * (len(arms) - 1)
    if network.seen.classes:
        (own, *others), errors = both(network.batches, arms)
        losses = [loss_of(own, one) for one in others]
    else:
        errors = changes(network.batches, arms)
    number = len(means)
    report("counting", None)
    sizes = _sizes(network, list(means))
    return Ranking(
        arch=network.name,
        weights=network.weights,
        data=network.seen.words,
        images=seen.images,
        blocks=tuple(
            BlockWorth(
                path=one.path,
                channels=one.channels,
                spread=one.spread,
                loss_mean=losses[place],
                loss_one=losses[number + place],
                error_mean=errors[place],
                error_one=errors[number + place],
                params=sizes[one.path].params,
                macs=sizes[one.path].macs,
                bytes=sizes[one.path].bytes,
            )
            for place, one in enumerate(blocks)
        ),
        remarks=tuple(f"{path}: left out, its block runs more than once" for path in sorted(repeated)),
    )


def _sizes(network: Judged, paths: list[str]) -> dict[str, Size]:
    """Return parameters, MACs and bytes of each block: what the network has less without it."""

    def counted_cost(path: str) -> Cost:
        with redirect_stdout(sys.stderr):
            model = build(network.variant, device="meta", input_chw=network.image).model
            return count(without(model, path) if path else model, (1, *network.image))

    whole = counted_cost("")
    found = {}
    for path in paths:
        less = counted_cost(path)
        found[path] = Size(
            params=whole.params - less.params,
            macs=whole.macs.all - less.macs.all,
            bytes=whole.bytes - less.bytes,
        )
    return found


def priced(ranking: Ranking, job: Job, *, report: Report) -> Ranking:
    """Return a ranking with the time of each block.

    Args:
        ranking: of a network.
        job: that measures the same network, forward.
        report: called with what is done.

    Raises:
        SelabError: as `prices`.
    """
    found, remarks = prices(job, [one.path for one in ranking.blocks], report)
    return msgspec.structs.replace(
        ranking,
        blocks=tuple(msgspec.structs.replace(one, latency=found.get(one.path)) for one in ranking.blocks),
        runtime=job.workload.runtime,
        machine=machine(job.workload.device).name,
        threads=job.workload.threads,
        remarks=(*ranking.remarks, *remarks),
    )
