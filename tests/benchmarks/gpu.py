"""Everything that needs a CUDA device, ordered by value, in one go that may be cut off at any moment.

`python tests/benchmarks/gpu.py --minutes 25` runs the tests of the device, measures SE-ResNet-50 and what SE costs
however it is written, the kernels' share of the memory's bandwidth, trains pairs on CIFAR-10, and compares operators
with the roofline. Every step is a command of its own whose record is on disk when it ends; `OUT/gpu.jsonl` says which
steps are done, and the same command goes on with the others. `--only PART` chooses parts, `--list` shows the commands,
and `--dry-run` runs the same steps on a CPU, with tiny sizes and images.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PARTS = ("tests", "profile", "tax", "kernels", "train", "roofline")
SELAB = (sys.executable, "-m", "selab")
# Batch, dtype, memory format, compiled: the experiment of arXiv 1709.01507, Sec. 4, whose ResNet-50 takes 190 ms and
# SE-ResNet-50 209 ms for forward and backward of a batch of 256 on eight GPUs, 32 images each.
PROFILES = (
    (32, "fp32", "contiguous", False),
    (32, "bf16", "channels_last", False),
    (256, "bf16", "channels_last", False),
    (32, "tf32", "contiguous", False),
    (256, "tf32", "channels_last", False),
    (256, "tf32", "contiguous", False),
    (32, "bf16", "channels_last", True),
    (256, "bf16", "channels_last", True),
    (256, "fp32", "contiguous", False),
    (256, "bf16", "contiguous", False),
    (32, "tf32", "channels_last", False),
    (32, "bf16", "contiguous", False),
    (256, "fp32", "channels_last", False),
    (32, "fp32", "channels_last", False),
)
# Network, batch, dtype, phase, compiled.
TAXED = (
    ("se_resnet50", 256, "bf16", "forward_backward", False),
    ("se_resnet50", 1, "bf16", "forward", False),
    ("se_resnet50", 32, "bf16", "forward", False),
    ("se_mobilenet", 256, "bf16", "forward", False),
    ("se_resnet50", 32, "bf16", "forward", True),
    ("se_resnet50", 32, "tf32", "forward_backward", False),
    ("se_mobilenet", 256, "bf16", "forward_backward", False),
    ("timm:seresnet50", 256, "bf16", "forward_backward", False),
)
IMPLEMENTATIONS = ("reference", "torchvision", "timm", "fused")
# Baseline, variants, recipe, epochs (None: the recipe's), seeds.
TRAINED = (
    ("small_cnn", ("se_small_cnn", "se_small_cnn+init=identity"), "keras_cifar10_cnn", 25, 5),
    ("resnet20_cifar", ("se_resnet20_cifar", "se_resnet20_cifar+init=identity"), "cifar_resnet", None, 3),
    ("resnet56_cifar", ("se_resnet56_cifar", "se_resnet56_cifar+init=identity"), "cifar_resnet", None, 3),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with a name.

    Attributes:
        most_s: it is interrupted after so many seconds.
        group: steps of one group run side by side, at most `--jobs` at a time; others run alone.
    """

    name: str
    words: tuple[str, ...]
    most_s: float
    group: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Run the steps that are not done yet, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="folder of the records")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is, or is downloaded to")
    parser.add_argument("--minutes", type=float, default=25, help="no step begins that may end later")
    parser.add_argument("--budget", type=float, default=45, help="seconds of a profile or a tax")
    parser.add_argument("--jobs", type=int, default=min(6, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run, in this order")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on a CPU, as small as possible")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    if options.minutes <= 0 or options.budget <= 0 or options.jobs < 1:
        parser.error("--minutes, --budget and --jobs must be above 0")

    steps = [one for part in options.only or PARTS for one in steps_of(part, options)]
    if options.list:
        print("\n".join(f"{one.name}: {' '.join(one.words[1:])}" for one in steps))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    journal = options.out / ("gpu.dry-run.jsonl" if options.dry_run else "gpu.jsonl")
    failed = run(steps, journal, end=time.monotonic() + 60 * options.minutes, jobs=options.jobs)
    print(table(options.out))
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}; their outputs are in {journal.with_suffix('')}/\n")


# --------------------------------------------------------------------------------------------------------------- steps
def steps_of(part: str, options: argparse.Namespace) -> Iterator[Step]:
    """Yield the steps of a part, the most valuable first."""
    dry = options.dry_run
    make = {
        "tests": _tests,
        "profile": _profiles,
        "tax": _taxes,
        "kernels": _kernels,
        "train": _trainings,
        "roofline": _rooflines,
    }[part]
    yield from make(options, dry)


def _tests(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    chosen = ("tests/kernels/test_ops.py", "-k", "formula") if dry else ("-m", "cuda", "tests")
    yield Step(name="tests", words=(sys.executable, "-m", "pytest", "-q", "--no-header", *chosen), most_s=400)


def _workload(batch: int, dtype: str, layout: str, compiled: bool, options: argparse.Namespace) -> list[str]:
    if options.dry_run:
        device = ["--device", "cpu", "--threads", "1", "--batch", "1", "--resolution", "64", "--processes", "1"]
        dtype = "fp32" if dtype == "tf32" else dtype
    else:
        device = ["--device", "cuda", "--batch", str(batch)]
    words = [*device, "--dtype", dtype, "--memory-format", layout, "--budget", str(options.budget)]
    return [*words, *(["--compile"] if compiled and not options.dry_run else [])]


def _profiles(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    for batch, dtype, layout, compiled in PROFILES[: 1 if dry else None]:
        words = ("profile", "--arch", "se_resnet18" if dry else "se_resnet50")
        chosen = _workload(batch, dtype, layout, compiled, options)
        name = f"profile b{batch} {dtype} {layout}{' compiled' if compiled else ''}"
        yield Step(name=name, words=(*SELAB, *words, *chosen, *_out(options)), most_s=300)


def _taxes(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    for arch, batch, dtype, phase, compiled in TAXED[: 1 if dry else None]:
        words = ["tax", "--arch", "se_resnet18" if dry else arch, "--phase", phase]
        words += [word for name in IMPLEMENTATIONS for word in ("--impl", name)]
        chosen = _workload(batch, dtype, "channels_last", compiled, options)
        name = f"tax {arch} b{batch} {dtype} {phase}{' compiled' if compiled else ''}"
        yield Step(name=name, words=(*SELAB, *words, *chosen, *_out(options)), most_s=300)


def _kernels(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    if dry:
        return  # Triton's kernels have no bandwidth without a device.
    words = (sys.executable, "tests/benchmarks/bench_kernels.py", "--out", str(options.out), "--repeats", "30")
    yield Step(name="kernels", words=words, most_s=120)


def _trainings(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    data = ("synthetic",) if dry else ("cifar10", "--data-dir", str(options.data_dir))
    device = ("--threads", "1") if dry else ("--device", "cuda", "--cuda-graph", "--channels-last")
    for base, variants, recipe, epochs, seeds in TRAINED[: 1 if dry else None]:
        chosen = ["--recipe", recipe, "--data", *data, *device, "--out", str(options.out)]
        epochs = 1 if dry else epochs
        chosen += [] if epochs is None else ["--epochs", str(epochs)]
        if dry:
            seeds, chosen = 1, [*chosen, "--batch", "512"]
        for seed in range(seeds):
            for arch in (base, *variants):
                words = (*SELAB, "train", "--arch", arch, "--seed", str(seed), *chosen)
                single = {"OMP_NUM_THREADS": "1"}
                yield Step(name=f"train {arch} {seed}", words=words, most_s=1500, group="train", environment=single)
        # Makes the records of what is trained already.
        words = (*SELAB, "compare", base, *variants, "--seeds", str(seeds), "--no-latency", "--replace", *chosen)
        yield Step(name=f"compare {base}", words=words, most_s=1500)


def _rooflines(options: argparse.Namespace, dry: bool) -> Iterator[Step]:
    for batch, dtype in ((256, "bf16"), (1, "fp32"))[: 1 if dry else None]:
        words = ("roofline", "--arch", "se_resnet18" if dry else "se_resnet50")
        device = ("--device", "cpu", "--resolution", "32") if dry else ("--device", "cuda", "--batch", str(batch))
        out = options.out / f"roofline.b{batch}.{dtype}.json"
        words = (*SELAB, *words, *device, "--dtype", "fp32" if dry else dtype, "--channels-last", "--json", str(out))
        yield Step(name=f"roofline b{batch} {dtype}", words=words, most_s=120)


def _out(options: argparse.Namespace) -> tuple[str, ...]:
    return "--out", str(options.out), "--replace"


# ------------------------------------------------------------------------------------------------------------- running
def run(steps: Sequence[Step], journal: Path, *, end: float, jobs: int) -> list[str]:
    """Run what the journal does not have as done, until the time is over; return the names of failed steps."""
    done = {one["step"] for one in _lines(journal) if one["status"] == 0}
    left = [step for step in steps if step.name not in done]
    logs = journal.with_suffix("")
    logs.mkdir(exist_ok=True)
    failed: list[str] = []
    spent: dict[str, float] = {}
    running: list[tuple[Step, subprocess.Popen[bytes], float]] = []
    while left or running:
        for one in list(running):
            step, process, began = one
            if process.poll() is None and time.monotonic() > min(began + step.most_s, end):
                _interrupt(process)
            if process.poll() is not None:
                running.remove(one)
                spent[_part(step)] = time.monotonic() - began
                _note(journal, step, process.returncode, spent[_part(step)])
                failed += [step.name] if process.returncode else []
        # The last step of the same part says how long the next one takes.
        if left and time.monotonic() + (0 if left[0].group else spent.get(_part(left[0]), 0)) > end:
            print(f"out of time; left: {', '.join(step.name for step in left)}", flush=True)
            left = []
        together = bool(left) and bool(left[0].group) and all(step.group == left[0].group for step, *_ in running)
        if left and (not running or (together and len(running) < jobs)):
            step = left.pop(0)
            with (logs / f"{step.name.replace(' ', '_').replace(':', '_')}.log").open("wb") as log:
                process = subprocess.Popen(
                    step.words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | step.environment
                )
            running.append((step, process, time.monotonic()))
        else:
            time.sleep(0.05)
    return failed


def _part(step: Step) -> str:
    return step.name.partition(" ")[0]


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    """End a process so that it can keep what it has; one that does not end is killed."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _note(journal: Path, step: Step, status: int, seconds: float) -> None:
    line = json.dumps({"step": step.name, "status": status, "seconds": round(seconds, 1), "command": step.words[1:]})
    with journal.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(f"{seconds:6.1f} s  {'done' if status == 0 else f'status {status}':10} {step.name}", flush=True)


def _lines(journal: Path) -> list[dict[str, object]]:
    """Return the journal's lines; one that was cut off is not one."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


# --------------------------------------------------------------------------------------------------------------- table
def table(out: Path) -> str:
    """Return one line per measured ratio in the records of this folder."""
    from selab import units
    from selab.records.store import read_record

    lines = []
    for path in sorted(out.glob("*/*.json")):
        record = read_record(path)
        for phase, latency in record.latency.items():
            for method, one in (record.gpu_methods.get(phase) or {"wall": latency}).items():
                base = "" if one.baseline_s is None else f"{units.seconds(one.baseline_s)} "
                lines.append(f"{record.arch} {record.workload.slug} {phase} {method}: {base}{one.verdict or one.error}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
