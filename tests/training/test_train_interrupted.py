"""Trainings that are interrupted or killed end at the same bits when they are called again."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
import torch
from tiny_training import (
    At,
    interrupt,
    lines_without_times,
    points,
    same,
    without_times,
)

from selab.training.train import TrainingStoppedError


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "accumulate": 2},
        {"optimizer": "rmsprop", "nesterov": False, "momentum": 0.0, "lr": 1e-3},
        {"optimizer": "adam", "nesterov": False, "lr": 1e-3, "fill": "edge", "scaling": "unit"},
        {"amp": "fp16", "channels_last": True, "decay_norm_and_bias": False},
        {"fused": True, "channels_last": True},
    ],
    ids=["sgd", "average", "rmsprop", "adam", "fp16", "fused"],
)
def test_stopped_and_called_again_it_ends_at_the_same_bits(run, tmp_path, changes):
    whole = run("lively", folder="whole", **changes)
    # A checkpoint interval of nothing makes every step one that is looked at.
    for epoch, step, number in ((1, 2, signal.SIGINT), (2, 1, signal.SIGTERM), (2, 6, signal.SIGINT)):
        with pytest.raises(TrainingStoppedError, match=r"everything is saved in .*the same command resumes"):
            run("lively", checkpoint_s=0.0, report=At(epoch, step, interrupt(number)), **changes)
    assert len(lines_without_times(tmp_path / "run")) == 2
    parts = run("lively", checkpoint_s=0.0, **changes)
    assert same(whole, parts)
    assert without_times(whole.epochs) == without_times(parts.epochs)
    assert whole.test == parts.test
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "run")
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["tensors"] for name in ("whole", "run")]
    torch.testing.assert_close(*saved, rtol=0, atol=0)


def test_a_second_sigint_is_met_at_once_and_harms_nothing(run, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStoppedError, match=r"epoch 2 .*: interrupted; the same command resumes at the last"):
        run("lively", report=At(2, 3, twice), checkpoint_s=0.0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(run("lively"), run("lively", folder="whole"))
    with pytest.raises(TrainingStoppedError, match="interrupted; no checkpoint was written yet, so"):
        run("lively", folder="none", report=At(1, 1, twice), checkpoint_s=300.0)


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_training
from selab.training.train import train
from selab.models.spec import read_family

toml, folder, renames, when = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
replace, done = Path.replace, 0

def counted(self, target):
    global done
    done += 1
    if done == renames and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)
    if done == renames:
        os.kill(os.getpid(), signal.SIGKILL)

Path.replace = counted
train(
    read_family(Path(toml))["lively"], tiny_training.images(), tiny_training.RECIPE, seed=0, folder=folder,
    options=tiny_training.Options(threads=1, checkpoint_s=0.0), report=lambda p: print(p.epoch, p.step, flush=True),
)
"""


def test_killed_at_any_moment_and_called_again_it_ends_at_the_same_bits(run, family, tmp_path):
    """Killed by another process wherever it happens to be, and by itself just before and just after a rename."""
    draw = random.Random(0)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    for renames, when in ((0, ""), (draw.randint(2, 6), "before"), (draw.randint(2, 6), "after"), (0, "")):
        words = [
            sys.executable,
            script,
            Path(tiny_training.__file__).parent,
            family["lively"].file,
            tmp_path / "run",
            renames,
            when,
        ]
        with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE) as child:
            for _ in range(draw.randint(2, 6)):
                child.stdout.readline()
            if not renames:
                child.kill()
            child.stdout.read()
        assert child.returncode == -signal.SIGKILL
    progress = []
    parts = run("lively", report=progress.append, checkpoint_s=0.0)
    assert (progress[0].epoch, progress[0].step) != (1, 1), "it did not go on from a checkpoint"
    whole = run("lively", folder="whole")
    assert same(whole, parts)
    assert without_times(whole.epochs) == without_times(parts.epochs)
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert points(tmp_path / "run") == points(tmp_path / "whole")


def test_curves_have_one_point_per_epoch(run, tmp_path):
    with pytest.raises(TrainingStoppedError):
        run(checkpoint_s=0.0, report=At(3, 2, interrupt()))
    training = run(checkpoint_s=0.0)
    shown = points(tmp_path / "run")
    # loss/train rather than train_loss, so that both lie in one picture group.
    assert set(shown) == {"lr", "loss/train", "top1_pct/train", "loss/test", "top1_pct/test"}
    assert [step for step, _ in shown["loss/test"]] == [1, 2, 3]
    assert shown["loss/test"][-1][1] == pytest.approx(training.epochs[-1].test_loss, rel=1e-6)
