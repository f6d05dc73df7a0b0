"""Run hostile command lines, each in a process of its own that is forked off, and judge what they did.

`python tests/hostile/battery.py` runs all of them and lists the faults; `nox -s hostile` does that. A part of them is
in the ordinary suite.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
sys.path.insert(0, str(Path(__file__).parent))
import grammar
from grammar import Case

SECONDS = 120
_STATUSES = (0, 1, 2)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (minus a signal's number), and what it printed."""

    status: int
    out: str
    err: str


def prepare() -> None:
    """Import what the commands need, once; every case starts from here."""
    import selab
    from selab.experiments import job

    for module in pkgutil.walk_packages(selab.__path__, "selab."):
        # Modules that need what is not installed, and the program itself, stay where they are.
        if not module.name.endswith(("__main__", "triton", "cluster")):
            with suppress(ModuleNotFoundError):
                importlib.import_module(module.name)
    importlib.import_module("matplotlib.backends.backend_svg")

    patient = job._plan_of

    def quick(request):  # type: ignore[no-untyped-def]
        return replace(patient(request), warmup_least_s=0.0, warmup_most_s=0.02, sample_s=1e-4, budget_s=0.1)

    job._plan_of = quick
    job.Request.in_this_process = property(lambda request: request.processes in (None, 1))  # type: ignore[method-assign,assignment]


def run(case: Case, folder: Path, *, kill_at: int = 0) -> Ended:
    """Run a case in a folder, in a forked process; kill it at its `kill_at`-th step of writing, counted from 1."""
    streams = [folder / ".out", folder / ".err"]
    child = os.fork()
    if child == 0:
        _become(case, folder, streams, kill_at)
    _, status = os.waitpid(child, 0)
    out, err = (path.read_bytes().decode(errors="replace") for path in streams)
    for path in streams:
        path.unlink()
    return Ended(status=os.waitstatus_to_exitcode(status), out=out, err=err)


def _become(case: Case, folder: Path, streams: list[Path], kill_at: int) -> None:
    """Turn this process into the program, and end it."""
    status = 99
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, path in enumerate([Path(os.devnull), *streams]):
            opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.dup2(opened, number)
            os.close(opened)
        for number in (1, 2):
            name = ("stdout", "stderr")[number - 1]
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        signal.alarm(SECONDS)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        os.environ |= {"COLUMNS": "200", "SELAB_DEBUG": ""}
        sys.argv = ["selab", *case.words]
        from selab.cli.main import main

        if kill_at:
            _kill_at(kill_at)
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 98
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _kill_at(step: int) -> None:
    """Let the system kill this process at a step of writing: before and after each call that changes a file."""
    taken = 0

    def wrapped(call):  # type: ignore[no-untyped-def]
        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in ("write", "fsync", "replace", "chmod"):
        setattr(os, name, wrapped(getattr(os, name)))


WRITING = (
    ("count", "--arch", grammar.SE, "--out", "records", "--replace"),
    ("count", "--arch", grammar.SE, "--json", "records/cost.json"),
    ("table", "reduction", "--out", "records/table.md", "--replace"),
    ("new", "family", "mine", "--out", "records", "--replace"),
    ("plot", "cost", "--x", "params", "--y", "macs", "--arch", "se_resnet18", "--out", "records/a.svg", "--replace"),
    ("roofline", "--arch", grammar.SE, "--as", "h200", "--json", "records/roof.json"),
)


def kills(template: Path, scratch: Path, stride: int) -> list[str]:
    """Kill every writing command at every so manieth step; return what is wrong with the folder afterwards."""
    from selab.records.files import read_bytes
    from selab.records.store import PROFILES

    found = []
    for words in WRITING:
        case, step, times = Case(words=words, slow=False), 1 - stride, 0
        while True:
            step += stride
            folder = scratch / "case"
            fresh(template, folder)
            records = folder / "records"
            records.mkdir()
            record = read_bytes(template / "record.json")
            (records / "whole.json").write_bytes(record)
            (records / "se_tiny.json").write_bytes(record)
            ended = run(case, folder, kill_at=step)
            place = f"{' '.join(words[:2])}, step {step}"
            if b"" in [path.read_bytes() for path in records.iterdir() if not path.name.startswith(".")]:
                found.append(f"{place}: an empty file")
            found += [
                f"{place}: {path.name} is half a file"
                for path in PROFILES.files(records)
                if not _is_json(path.read_bytes())
            ]
            again = run(Case(words=(*WRITING[0][:4], "records", "--replace"), slow=False), folder)
            left = [path.name for path in records.iterdir() if path.name.startswith(".")]
            if again.status or left:
                found.append(f"{place}: the next run ends with {again.status} and leaves {left}: {_last(again.err)}")
            shutil.rmtree(folder)
            if ended.status != -signal.SIGKILL:
                break
            times += 1
        print(f"{' '.join(words[:2])}: killed at {times} steps", flush=True)
    return found


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def faults_of(case: Case, ended: Ended, folder: Path) -> list[str]:
    """Return what is wrong with how a command ended, a line for each kind."""
    found = []
    if ended.status not in _STATUSES:
        found.append("timed out" if ended.status == -signal.SIGALRM else f"status {ended.status}")
    for word in ("Traceback (most", "Exception ignored", "Segmentation", "Fatal Python", "Warning:"):
        if word in ended.err or word in ended.out:
            found.append(f"{word.split()[0]}: {_last(ended.err)}")
            break
    errors = re.findall(r"^error: ", ended.err, re.M)
    left_out = re.findall(r"^warning: left out ", ended.err, re.M)
    # What could be read is shown, with a warning for each file that could not.
    if ended.status == 1 and len(errors) != 1 and not (left_out and not errors) and case.words[:1] != ("sweep",):
        found.append(f"status 1 with {len(errors)} lines of an error")
    # A group without a command shows its help.
    if ended.status == 2 and len(errors) != 1 and not (not ended.err and "Usage:" in ended.out):
        found.append(f"status 2 with {len(errors)} lines of an error")
    if errors and ended.status == 2 and ended.err.count("\n") > 1 + ended.err.count("running code from "):
        found.append("status 2 with more than one line")
    if ended.status == 0 and errors:
        found.append("status 0 with an error")
    if any(len(line) > 3000 for line in ended.err.splitlines()):
        found.append("a line of more than 3,000 characters")
    found += [f"left {path.name}" for path in folder.rglob(".selab-*") if path.parent.name != "poisoned"]
    if (folder / "hacked").exists():
        found.append("a pickle was run")
    if ended.status and (folder / "old.svg").read_bytes() != b"old" and "--replace" not in case.words:
        found.append("a file was overwritten although the command failed")
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  ")]
    return lines[-1][:150] if lines else ""


def judged(cases: Iterable[Case], template: Path, scratch: Path) -> "Iterable[tuple[Case, Ended, list[str]]]":
    """Run cases, each in a fresh copy of a folder, and judge them."""
    for case in cases:
        folder = scratch / "case"
        fresh(template, folder)
        ended = run(case, folder)
        yield case, ended, faults_of(case, ended, folder)
        shutil.rmtree(folder)


def fresh(template: Path, folder: Path) -> None:
    """Copy the files; links, pipes and sockets are made anew."""
    folder.mkdir()
    for path in template.iterdir():
        target = folder / path.name
        if path.is_symlink():
            target.symlink_to(os.readlink(path))  # noqa: PTH115 - the text of the link
        elif path.is_fifo():
            os.mkfifo(target)
        elif path.is_dir():
            shutil.copytree(path, target)
        elif path.is_file():
            os.link(path, target) if path.suffix in (".py", ".json") else shutil.copyfile(path, target)


def main() -> None:
    """Run all cases, or those whose words contain a text; exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", default="", help="only cases with this in their name")
    parser.add_argument("--fast", action="store_true", help="leave out commands that measure and train")
    parser.add_argument("--kills", action="store_true", help="also kill commands at every step of writing")
    parser.add_argument("--stride", type=int, default=1, help="only every so manieth case, and step")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    chosen = parser.parse_args()
    every = [one for one in grammar.cases() if chosen.part in one.name and not (chosen.fast and one.slow)]
    every = every[chosen.start :: chosen.stride]
    prepare()
    kinds: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        template, scratch = Path(folder) / "template", Path(folder) / "scratch"
        template.mkdir()
        scratch.mkdir()
        grammar.make_files(template)
        for number, (case, ended, faults) in enumerate(judged(every, template, scratch), start=1):
            for fault in faults:
                kinds.setdefault(fault, []).append(case.name)
                print(f"FAULT {fault}: {case.name}: {_last(ended.err)}", flush=True)
            if number % 100 == 0:
                print(f"{number} of {len(every)} cases, {len(kinds)} kinds of faults", flush=True)
        for fault in kills(template, scratch, chosen.stride) if chosen.kills else []:
            kinds.setdefault("kill", []).append(fault)
            print(f"FAULT {fault}", flush=True)
    print(f"{len(every)} cases, {sum(map(len, kinds.values()))} faults of {len(kinds)} kinds")
    sys.exit(1 if kinds else 0)


if __name__ == "__main__":
    main()
