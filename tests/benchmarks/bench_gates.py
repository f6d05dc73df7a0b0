"""How long looking at gates takes: a pass over images with the gates read, against a plain pass, by paired measurement.

`python tests/benchmarks/bench_gates.py --out FILE` measures `selab.gates` against a pass of the same network over the
same images that only counts right answers; prints the ratios and writes them with their raw samples.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from selab.bench.machine import machine, threads_and_affinity
from selab.bench.sampler import Plan, WallArm, measure
from selab.judging.look import gates
from selab.models.build import build
from selab.models.catalog import find
from selab.records import verdict
from selab.records.files import write_atomically

ARCHES = {"se_resnet20_cifar": (100, 32), "se_mobilenet": (8, 224)}
"""Network → images of a batch, and their size."""
BATCHES = 8
"""In a pass: what is computed once, at its end, is not a cost of each image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of sampling for each network")
    options = parser.parse_args()

    plan = replace(Plan.for_cpu(), target_half_width=0.01, budget_s=options.budget)
    threads = torch.get_num_threads()
    found = {}
    with threads_and_affinity(threads):
        for arch, (batch, size) in ARCHES.items():
            model = build(find(arch)).model.eval()
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, 3, size, size, generator=generator)
            labels = torch.randint(10, (batch,), generator=generator)

            def plain(model=model, images=images, labels=labels) -> int:
                with torch.no_grad():
                    return sum(int((model(images).argmax(1) == labels).sum()) for _ in range(BATCHES))

            def looking(model=model, images=images, labels=labels) -> object:
                return gates(model, [(images, labels)] * BATCHES)

            control = measure(WallArm(call=plain), WallArm(call=plain), plan, seed=1)["wall"]
            run = measure(WallArm(call=plain), WallArm(call=looking), plan)["wall"]
            found[arch] = verdict.summarise(
                phase="forward",
                method="wall",
                statistic="floor",
                threads=threads,
                mode="eval",
                runs=[run],
                controls=[control],
                target_half_width=plan.target_half_width,
            )
    for name, one in found.items():
        print(f"{name:20} {one.ratio:6.3f} [{one.ratio_low:.3f}, {one.ratio_high:.3f}]  {one.verdict_kind}")
    result = {
        "kind": "counting",
        "arch": ", ".join(found),
        "machine": msgspec.to_builtins(machine()),
        "comparisons": {name: msgspec.to_builtins(one) for name, one in found.items()},
    }
    write_atomically(options.out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
