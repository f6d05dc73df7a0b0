"""How long counting takes: fvcore and thop against ours, on SE-ResNet-152, by the project's own paired measurement.

`python tests/benchmarks/bench_counts.py --out FILE` measures each of the others, and ours at other batches, against
ours at batch 1; prints the ratios and writes them with their raw samples. The other two run as their documentation
shows, on a CPU model and a CPU image; thop on the meta device too (fvcore cannot: torch 2.13 loses the convolutions of
a trace there).
"""

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from selab.bench.machine import machine, threads_and_affinity
from selab.bench.sampler import Plan, WallArm, measure
from selab.cost.count import count
from selab.meta import meta_twin
from selab.models.build import build
from selab.models.catalog import find
from selab.records import verdict
from selab.records.files import write_atomically

ARCH = "se_resnet152"


def image(batch: int) -> tuple[int, ...]:
    return (batch, 3, 224, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of sampling for each comparison")
    options = parser.parse_args()

    # fvcore 0.1.5 warns of torch.jit and of operators that it does not know; thop 0.1.1 of distutils.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import thop
    from fvcore.nn import FlopCountAnalysis

    model = build(find(ARCH)).model.eval()
    for_thop = copy.deepcopy(model)  # it leaves buffers behind
    twin = meta_twin(model)
    pixels = torch.randn(image(1))
    meta_pixels = pixels.to("meta")

    def ours(batch: int) -> WallArm:
        return WallArm(call=lambda: count(model, image(batch)))

    def other(call: Callable[[], object]) -> WallArm:
        return WallArm(call=call)

    arms = {
        "thop, CPU": other(lambda: thop.profile(for_thop, (pixels,), verbose=False)),
        "thop, meta": other(lambda: thop.profile(twin, (meta_pixels,), verbose=False)),
        "fvcore, CPU": other(lambda: FlopCountAnalysis(model, pixels).total()),
        **{f"ours, batch {batch}": ours(batch) for batch in (4, 16, 64, 256)},
    }
    plan = replace(Plan.for_cpu(), target_half_width=0.01, budget_s=options.budget)
    threads = torch.get_num_threads()
    found = {}
    with threads_and_affinity(threads):
        control = measure(ours(1), ours(1), plan, seed=1)["wall"]
        for name, arm in arms.items():
            run = measure(ours(1), arm, plan)["wall"]
            found[name] = verdict.summarise(
                phase="forward",
                method="wall",
                statistic="floor",
                threads=threads,
                mode="eval",
                runs=[run],
                controls=[control],
                target_half_width=plan.target_half_width,
            )
    print(f"counting {ARCH}, time over ours at batch 1 ({1e3 * found['thop, CPU'].baseline_s:.1f} ms)")
    for name, one in found.items():
        print(f"{name:16} {one.ratio:6.3f} [{one.ratio_low:.3f}, {one.ratio_high:.3f}]  {one.verdict_kind}")
    result = {
        "kind": "counting",
        "arch": ARCH,
        "machine": msgspec.to_builtins(machine()),
        "comparisons": {name: msgspec.to_builtins(one) for name, one in found.items()},
    }
    write_atomically(options.out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
