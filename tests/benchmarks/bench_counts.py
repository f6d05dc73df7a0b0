"""How long counting takes: ours beside fvcore and thop, on SE-ResNet-152, in one interleaved run.

    python tests/benchmarks/bench_counts.py [rounds]

The other two run as their documentation shows, on a CPU model and a CPU image. thop runs on the meta device too. fvcore
cannot (torch 2.13 loses the convolutions of a trace there), except as `selab.measure.counters` runs it.
"""

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

from selab.build import build
from selab.catalog import find
from selab.measure.counters import fvcore_counter
from selab.measure.counts import count, trace
from selab.probe import meta_twin

BATCHES = (1, 4, 16, 64, 256)


def image(batch: int) -> tuple[int, ...]:
    return (batch, 3, 224, 224)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(rounds: int) -> None:
    # fvcore 0.1.5 warns of torch.jit and of operators that it does not know; thop 0.1.1 of distutils.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import thop
    from fvcore.nn import FlopCountAnalysis

    model = build(find("se_resnet152")).model.eval()
    twin = meta_twin(model)
    pixels = torch.randn(image(1))
    meta_pixels = pixels.to("meta")
    traced = trace(model, image(1), details=True)
    calls: dict[str, Callable[[], object]] = {
        **{f"selab, batch {batch}": lambda batch=batch: count(model, image(batch)) for batch in BATCHES},
        "selab, batch 1, model on meta": lambda: count(twin, image(1)),
        "fvcore, CPU": lambda: FlopCountAnalysis(model, pixels).total(),
        "thop, CPU": lambda: thop.profile(model, (pixels,), verbose=False),
        "thop, meta": lambda: thop.profile(twin, (meta_pixels,), verbose=False),
        "fvcore, meta, as selab runs it": lambda: fvcore_counter(model, image(1), traced),
    }
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            taken[name].append(seconds(calls[name]))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ours = medians["selab, batch 1"]
    print(f"SE-ResNet-152, torch {torch.__version__}, {torch.get_num_threads()} threads, median of {rounds}")
    for name, median in medians.items():
        print(f"{name:32} {1e3 * median:8.1f} ms {median / ours:7.2f}x")
    fastest = min(medians["fvcore, CPU"], medians["thop, CPU"])
    print(f"the fastest of the others as documented / ours: {fastest / ours:.2f}")
    flat = [medians[f"selab, batch {batch}"] / ours for batch in BATCHES]
    print(f"ours, batch {BATCHES[0]} to {BATCHES[-1]}: {min(flat):.3f} to {max(flat):.3f} of batch 1")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
