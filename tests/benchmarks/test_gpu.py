"""The steps for a CUDA device: what runs, what is taken up again, and the same steps on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

SCRIPT = Path(gpu.__file__)


def step(name, code, most_s=60.0, group=""):
    return gpu.Step(name=name, words=(sys.executable, "-c", code), most_s=most_s, group=group)


def run(steps, journal, *, seconds=60.0, jobs=1):
    return gpu.run(steps, journal, end=gpu.time.monotonic() + seconds, jobs=jobs)


def statuses(journal):
    return {line["step"]: line["status"] for line in map(json.loads, journal.read_text().splitlines())}


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path):
    journal, made = tmp_path / "gpu.jsonl", tmp_path / "made"
    steps = [step("good", f"open({str(made)!r}, 'a').write('x')"), step("bad", "raise SystemExit(3)")]
    assert run(steps, journal) == ["bad"]
    assert statuses(journal) == {"good": 0, "bad": 3}
    journal.write_text(journal.read_text() + '{"step": "cut o')
    assert run([*steps, step("new", "pass")], journal) == ["bad"]
    assert made.read_text() == "x"


def test_a_step_that_lasts_too_long_may_keep_what_it_has(tmp_path):
    kept = tmp_path / "kept"
    code = (
        "import signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(kept)!r}, 'w').write('kept'), sys.exit(5)))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w')\n"
        "signal.pause()"
    )
    assert run([step("long", code, most_s=1.5)], tmp_path / "gpu.jsonl") == ["long"]
    assert kept.read_text() == "kept"


def test_without_time_nothing_begins(tmp_path, capsys):
    journal = tmp_path / "gpu.jsonl"
    assert run([step("late", "pass")], journal, seconds=-1) == []
    assert not journal.exists()
    assert "left: late" in capsys.readouterr().out


def test_every_step_has_a_name_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True, cwd=tmp_path)
    names = [line.partition(": -m")[0] for line in done.stdout.splitlines()]
    assert len(set(names)) == len(names) > 40
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dry_run(tmp_path):
    words = [sys.executable, SCRIPT, "--dry-run", "--budget", "0.1", "--only", "profile", "--only", "roofline"]
    done = subprocess.run([*words, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(statuses(tmp_path / "gpu.dry-run.jsonl").values()) == {0}
    assert "se_resnet18 cpu-b1-64-fp32-held-t1 forward wall:" in done.stdout
    (roofline,) = tmp_path.glob("roofline*.json")
    assert json.loads(roofline.read_text())
