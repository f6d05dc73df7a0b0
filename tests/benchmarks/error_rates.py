"""How often `selab profile` is wrong on this machine: the command itself, run again and again as a user runs it.

* `same`: a network against itself, with `--quick`. Every verdict other than "no difference" is false.
* `planted`: a network against itself made 2 % slower by work of a known duration, with `--quick`.
* `default`: SE against its baseline. The grand mean of all runs stands for the truth; an interval should hold it.

Every run is a line of the journal as soon as it is done, and one that is there is not run again: interrupt it and go on
at any time. `--minutes` ends it after a while. Nothing is asserted: a noisy machine is allowed to look noisy.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import planted
import torch

from selab.bench.machine import machine, threads_and_affinity
from selab.experiments.job import Request, resolve
from selab.models.build import build
from selab.records.estimate import LEAST_PROCESSES
from selab.records.store import read_records
from selab.records.types import Latency

HERE = Path(__file__).parent
SLOWER = 0.02
PLANTED_ARCH = "mobilenet"
SAME, PLANTED, DEFAULT = "same", "planted", "default"
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    SAME: (("small_cnn", "mobilenet", "resnet18"), 34),
    DEFAULT: (("se_mobilenet", "se_small_cnn"), 10),
    PLANTED: ((PLANTED_ARCH,), 30),
}
"""Kind → its networks, and the runs of each."""


@dataclass(frozen=True)
class Run:
    """One run of the command."""

    kind: str
    arch: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.arch} {self.number}"

    def words(self, extra: Sequence[str]) -> list[str]:
        if self.kind == SAME:
            what = ["--arch", self.arch, "--baseline", self.arch, "--quick"]
        elif self.kind == PLANTED:
            # The command stands in the journal, where a path of this machine says nothing.
            file = os.path.relpath(HERE / "planted.py")
            what = ["--arch", f"{file}:Slower", "--baseline", f"{file}:Plain", "--quick"]
            what += ["--phase", "forward", "--threads", "1"]
        else:
            what = ["--arch", self.arch]
        # Processes are numbered from the seed on.
        return [*what, "--seed", str(100 * self.number), *extra]


def runs(kinds: Sequence[str], times: int | None) -> Iterator[Run]:
    """Yield all runs, kinds and networks in turn, so that a part of them is of all."""
    most = max(number for _, number in KINDS.values()) if times is None else times
    for number in range(most):
        for kind in kinds:
            archs, wanted = KINDS[kind]
            if number < (wanted if times is None else times):
                yield from (Run(kind, arch, number) for arch in archs)


def repeats_of(arch: str, share: float) -> tuple[int, float]:
    """Return how many multiplications last this share of a forward pass on one thread, and what share they last."""
    workload = resolve(Request(arch=arch)).workload
    network = build(resolve(Request(arch=arch)).variant).model.eval()
    x, matrix = torch.randn(1, *workload.input_chw), torch.ones(planted.SIZE, planted.SIZE)

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(matrix, matrix)
        return time.perf_counter() - start

    def call_s() -> float:
        start = time.perf_counter()
        network(x)
        return time.perf_counter() - start

    with threads_and_affinity(1), torch.inference_mode():
        whole = min(call_s() for _ in range(50))
        repeats = max(1, round(share * whole / (min(seconds(200) for _ in range(50)) / 200)))
        return repeats, min(seconds(repeats) for _ in range(50)) / whole


def measured(run: Run, extra: Sequence[str], environment: dict[str, str]) -> dict[str, object]:
    """Run the command and return its figures."""
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        words = [sys.executable, "-m", "selab", "profile", *run.words(extra), "--out", out]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)
        seconds = time.monotonic() - began
        if done.returncode:
            raise SystemExit(f"{run.name}: {done.stderr.strip().splitlines()[-1]}")
        (record,) = read_records(Path(out) / machine().name)
    rows = {f"{one.phase} {one.threads}": one for one in (*record.latency.values(), *record.latency_all_cores.values())}
    return {
        "run": run.name,
        "command": record.command,
        "seconds": round(seconds, 1),
        "figures": {name: _figures(one) for name, one in rows.items()},
    }


def _figures(one: Latency) -> list[object]:
    return [one.ratio, one.ratio_low, one.ratio_high, one.noise_floor, one.verdict_kind, len(one.runs)]


def lines_of(journal: Path) -> list[dict[str, object]]:
    """Return the lines of a journal; the last one may be cut off."""
    found = []
    for text in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def table(lines: Sequence[dict[str, object]]) -> str:
    """Return what the runs show, as Markdown."""
    rows = ["| | runs | intervals | too noisy | wrong or missed | median half-width |", "|---|---|---|---|---|---|"]
    for kind, (archs, _) in KINDS.items():
        for arch in archs:
            here = [line for line in lines if str(line["run"]).startswith(f"{kind} {arch} ")]
            if here:
                rows.append(_row(kind, arch, here))
    return "\n".join(rows)


def _row(kind: str, arch: str, lines: Sequence[dict[str, object]]) -> str:
    figures: dict[str, list[list[object]]] = {}
    for line in lines:
        for name, values in line["figures"].items():  # type: ignore[attr-defined]
            figures.setdefault(name, []).append(values)
    noisy = sum(one[4] == "no_result" for ones in figures.values() for one in ones)
    every = [(name, one) for name, ones in figures.items() for one in ones if one[1] is not None]
    half = statistics.median(math.log(high / low) / 2 for _, (_, low, high, *_) in every)  # type: ignore[operator]
    if kind == DEFAULT:
        means = {
            name: statistics.fmean(math.log(one[0]) for one in ones if one[0] is not None)  # type: ignore[arg-type]
            for name, ones in figures.items()
        }
        out = sum(not one[1] <= math.exp(means[name]) <= one[2] for name, one in every)  # type: ignore[operator]
        words = f"{out} do not hold the grand mean ({100 * out / len(every):.1f} %)"
    elif kind == SAME:
        out = sum(one[4] in ("slower", "faster") for _, one in every)
        said = len(every) - sum(one[4] == "no_result" for _, one in every)
        words = f"{out} of {said} verdicts are false ({100 * out / said:.1f} %)"
    else:
        out = sum(one[4] != "slower" for _, one in every)
        words = f"{out} not found ({100 * out / len(every):.1f} %)"
    return f"| {kind}: {arch} | {len(lines)} | {len(every)} | {noisy} | {words} | ±{100 * half:.2f} % |"


def main() -> None:
    """Make the runs that are not in the journal yet, then print what all of them show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journal", type=Path, required=True, help="a line for each run")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these kinds")
    parser.add_argument("--runs", type=int, help="of each network, instead of the usual number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run begins after so many")
    parser.add_argument("--dry-run", action="store_true", help="as short as possible: nothing is learned from it")
    options = parser.parse_args()
    extra = ["--budget", "1", "--processes", str(LEAST_PROCESSES), "--phase", "forward"] if options.dry_run else []

    end = time.monotonic() + 60 * options.minutes
    lines = lines_of(options.journal)
    done = {line["run"] for line in lines}
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    planned = [run for run in runs(options.kind or list(KINDS), options.runs) if run.name not in done]
    environment = {}
    if any(run.kind == PLANTED for run in planned):
        # Half the time of a dry run would be that of this network.
        arch = "mobilenet_0_25" if options.dry_run else PLANTED_ARCH
        repeats, share = repeats_of(arch, SLOWER)
        print(f"planted: {repeats} multiplications, {100 * share:.2f} % of a forward pass", flush=True)
        environment = {planted.NAME: arch, planted.REPEATS: str(repeats)}
    for run in planned:
        if time.monotonic() > end:
            break
        line = measured(run, extra, environment if run.kind == PLANTED else {})
        with options.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(f"{line['seconds']:6} s  {run.name}", flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
