"""A network against itself, and against itself made 2 % slower, measured live: how far the method can be trusted here.

`python tests/benchmarks/aa.py --out FILE` runs 20 trials of 4 s of the first kind and 10 of the second, prints what
they show, and writes every ratio with its interval. Nothing is asserted: a noisy machine is allowed to look noisy.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from selab.bench.machine import contention_flags, machine, read_cpu, threads_and_affinity
from selab.bench.runner import phase_call, prepare
from selab.bench.sampler import Plan, WallArm, measure
from selab.experiments.job import Request, resolve
from selab.models.build import build
from selab.models.catalog import find
from selab.records import estimate, verdict
from selab.records.files import write_atomically
from selab.units import percent

SLOWER = 0.02


def calibrated_work(call_s: float, *, share: float) -> tuple[int, float]:
    """How many multiplications of small matrices last this share of a call, and how long they last."""
    matrix = torch.ones(48, 48)

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(matrix, matrix)
        return time.perf_counter() - start

    each = min(seconds(200) for _ in range(50)) / 200
    repeats = max(1, round(share * call_s / each))
    return repeats, min(seconds(repeats) for _ in range(50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    # A millisecond a call: a trial of seconds then has samples of several calls, as the acceptance figures assume.
    parser.add_argument("--arch", default="small_cnn")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()

    variant = find(options.arch)
    workload = resolve(Request(arch=options.arch)).workload
    plan = replace(Plan.for_cpu(), target_half_width=0.001, budget_s=options.seconds - 1)
    before = read_cpu()
    with threads_and_affinity(1):
        arms = []
        for _ in range(2):
            prepared = prepare(build(variant).model, workload)
            arms.append(WallArm(call=phase_call(prepared, "forward")))
        same = [measure(*arms, plan, seed=seed)["wall"] for seed in range(options.trials)]

        call_s = estimate.estimate(same[:1], "floor").baseline_s
        repeats, extra_s = calibrated_work(call_s, share=SLOWER)
        matrix, plain = torch.ones(48, 48), arms[1].call

        def slower() -> None:
            plain()
            for _ in range(repeats):
                torch.mm(matrix, matrix)

        slowed = []
        for seed in range(options.trials // 2):
            control = measure(*arms, plan.for_control(), seed=100 + seed)["wall"]
            run = measure(arms[0], WallArm(call=slower), plan, seed=seed)["wall"]
            slowed.append((run, control))

    ratios = [estimate.estimate([run], "floor") for run in same]
    errors = sorted(abs(one.ratio - 1) for one in ratios)
    holding = sum(one.ratio_low <= 1 <= one.ratio_high for one in ratios)
    found = [
        verdict.summarise(
            phase="forward", method="wall", statistic="floor", threads=1, mode="eval", runs=[run], controls=[control]
        )
        for run, control in slowed
    ]
    detected = sum(one.verdict_kind == "slower" for one in found)
    flags = contention_flags(before, read_cpu(), threads=1, cores=machine().cores)
    p95 = errors[min(len(errors) - 1, round(0.95 * len(errors)) - 1)]
    result = {
        "kind": "aa",
        "machine": json.loads(_json(machine())),
        "arch": options.arch,
        "trials": options.trials,
        "seconds_per_trial": options.seconds,
        "median_error": statistics.median(errors),
        "p95_error": p95,
        "intervals_holding_one": holding,
        "slower_by_calibration": extra_s / call_s,
        "slower_detected": detected,
        "slower_trials": len(found),
        "flags": [json.loads(_json(flag)) for flag in flags],
        "same": [[one.ratio, one.ratio_low, one.ratio_high] for one in ratios],
        "slowed": [[one.ratio, one.ratio_low, one.ratio_high, one.noise_floor, one.verdict_kind] for one in found],
    }
    write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"A/A, {options.trials} trials of {options.seconds:g} s: median error {percent(result['median_error'])},")
    print(f"p95 {percent(p95)}, {holding} of {len(ratios)} intervals hold 1")
    print(f"{percent(extra_s / call_s)} slower by calibration: seen in {detected} of {len(found)} trials")
    for flag in flags:
        print(f"flag {flag.name}: {flag.detail}")


def _json(value: object) -> bytes:
    import msgspec

    return msgspec.json.encode(value)


if __name__ == "__main__":
    main()
