"""How long the cost of the whole zoo takes: fvcore and thop against ours, network by network, in one run.

`python tests/benchmarks/bench_tables.py --out FILE` counts every variant of the catalog with each of the three. One
network is one ABBA block (ours, theirs, theirs, ours, or reversed), so the ratio is the median over networks with its
exact interval. Networks are built beforehand; ours and thop count on the meta device, fvcore on the CPU (torch 2.13
loses the convolutions of its trace on meta). Prints the totals too, and this process's peak memory.
"""

import argparse
import copy
import gc
import json
import logging
import random
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from selab.bench.machine import machine, threads_and_affinity
from selab.cost.count import count
from selab.models.build import build
from selab.models.catalog import installed
from selab.records import verdict
from selab.records.files import write_atomically
from selab.records.types import ABBABlock, Latency, Order, Run

Call = Callable[[], object]


def abba_block(ours: Call, theirs: Call, order: Order) -> ABBABlock:
    """Four calls, each timed alone: one network is counted once in its life, so nothing is repeated to warm up."""
    samples = []
    for arm in order:
        call = ours if arm == "A" else theirs
        gc.collect()
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    four = (samples[0], samples[1], samples[2], samples[3])
    return ABBABlock(order=order, floor=four, typical=four, mean=four)


def run_of(quads: list[ABBABlock], elapsed_s: float) -> Run:
    """All networks as one run."""
    return Run(
        calls_per_sample=1,
        warmup_calls=0,
        warmup_s=0.0,
        seed=0,
        steady=True,
        status="converged",
        elapsed_s=elapsed_s,
        quads=tuple(quads),
    )


def total(quads: list[ABBABlock], arm: str) -> float:
    """Seconds for all networks, once each."""
    return sum(s for q in quads for s, letter in zip(q.floor, q.order, strict=True) if letter == arm) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, help="only so many networks")
    options = parser.parse_args()

    # fvcore 0.1.5 warns of torch.jit and of operators that it does not know; thop 0.1.1 of distutils.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import thop
    from fvcore.nn import FlopCountAnalysis

    variants = list(installed().values())[: options.first]
    coin = random.Random(0)
    quads: dict[str, list[ABBABlock]] = {"ours again": [], "thop, meta": [], "fvcore, CPU": []}
    begin = time.monotonic()
    with threads_and_affinity(1):
        for index, variant in enumerate(variants):
            shape = (1, *variant.input_chw)
            model = build(variant, device="meta").model.eval()
            for_thop = copy.deepcopy(model)  # it leaves buffers behind
            on_cpu = build(variant).model.eval()
            pixels = torch.randn(shape)
            meta_pixels = pixels.to("meta")

            def ours(model: torch.nn.Module = model, shape: tuple[int, ...] = shape) -> object:
                return count(model, shape)

            def by_thop(model: torch.nn.Module = for_thop, x: torch.Tensor = meta_pixels) -> object:
                return thop.profile(model, (x,), verbose=False)

            def by_fvcore(model: torch.nn.Module = on_cpu, x: torch.Tensor = pixels) -> object:
                return FlopCountAnalysis(model, x).total()

            if index == 0:
                for call in (ours, by_thop, by_fvcore):
                    call()
            for name, call in zip(quads, (ours, by_thop, by_fvcore), strict=True):
                quads[name].append(abba_block(ours, call, coin.choice(("ABBA", "BAAB"))))
    elapsed = time.monotonic() - begin
    control = run_of(quads["ours again"], elapsed)
    found: dict[str, Latency] = {}
    for name in ("thop, meta", "fvcore, CPU"):
        found[name] = verdict.summarise(
            phase="forward",
            method="wall",
            statistic="floor",
            threads=1,
            mode="eval",
            runs=[run_of(quads[name], elapsed)],
            controls=[control],
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{len(variants)} networks, one thread; peak memory of this process {peak / 1e9:.2f} GB")
    print(f"{'ours':12} {total(quads['ours again'], 'A'):7.1f} s in all")
    for name, one in found.items():
        times = f"{one.ratio:.3f} [{one.ratio_low:.3f}, {one.ratio_high:.3f}] times ours"
        print(f"{name:12} {total(quads[name], 'B'):7.1f} s in all; a network takes {times}, {one.verdict_kind}")
    result = {
        "kind": "counting",
        "arch": f"the whole zoo, {len(variants)} networks",
        "machine": msgspec.to_builtins(machine()),
        "comparisons": {name: msgspec.to_builtins(one) for name, one in found.items()},
    }
    write_atomically(options.out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
