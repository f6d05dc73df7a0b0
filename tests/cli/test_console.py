"""What is said while networks are trained, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from selab.bench.progress import Progress
from selab.cli.console import following, measuring_words
from selab.training.progress import TrainingProgress
from selab.training.train import Epoch


def so_far(epoch, step, *, finished=0):
    """Of three epochs of ten steps each."""
    last = Epoch(
        epoch=finished,
        lr=0.1,
        train_loss=1.0,
        train_top1_pct=50.0,
        test_loss=1.0,
        test_top1_pct=60.0 + finished,
        test_top5_pct=None,
        seconds=5.0,
        images_per_s=1234.0,
    )
    return TrainingProgress(
        epoch=epoch,
        epochs=3,
        step=step,
        steps=10,
        images_per_s=1234.0,
        eta_s=120.0,
        loss=1.25,
        top1_pct=45.0,
        last=last if finished else None,
    )


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_has_a_line_per_epoch_and_otherwise_one_a_minute():
    written, clock = io.StringIO(), Clock()
    with following(Console(file=written, width=80), clock=clock) as report:
        report("seed 0, [net]", None)
        for clock.now, state in (
            (30.0, so_far(1, 3)),
            (60.0, so_far(1, 5)),
            (61.0, so_far(1, 6)),
            (90.0, so_far(1, 10, finished=1)),
            (91.0, so_far(2, 1, finished=1)),
            (149.0, so_far(2, 8, finished=1)),
            (150.0, so_far(2, 9, finished=1)),
        ):
            report("seed 0, [net]", state)
        report.say("seed 1, [net]: resuming at epoch 2: runs/net")
    words = "loss 1.2500, top-1 45.0 %, 1,234 images/s, 2 min left"
    assert written.getvalue().splitlines() == [
        "seed 0, [net] …",
        f"seed 0, [net]: epoch 1 of 3, step 5 of 10, {words}",
        f"seed 0, [net]: epoch 1 of 3, step 10 of 10, {words}; test top-1 61.00 %",
        f"seed 0, [net]: epoch 2 of 3, step 9 of 10, {words}; test top-1 61.00 %",
        "seed 1, [net]: resuming at epoch 2: runs/net",
    ]


def test_a_terminal_has_a_bar():
    written = io.StringIO()
    with following(Console(file=written, force_terminal=True, width=100, color_system=None)) as report:
        report("seed 0, net", None)
        report("seed 0, net", so_far(2, 5, finished=1))
        drawn = written.getvalue()
        assert "seed 0, net …" in drawn
        words = "epoch 2/3  1,234 images/s  2 min left  loss 1.25  top-1 45.0 %, test 61.0 %"
        (bar,) = {line for line in drawn.splitlines() if words in line}
        # Half of all epochs' steps are done; the bar takes what the words leave of the line.
        assert 0 < bar.count("━") <= (100 - len(words)) / 2 + 1
        report("seed 1, net", None)
        assert written.getvalue()[len(drawn) :].rstrip("\n\r\x1b[2K").endswith("seed 1, net …")


def test_a_terminal_has_a_bar_for_each_of_several_trainings():
    written = io.StringIO()
    labels = ["training 1 of 3 (seed 0, a)", "training 2 of 3 (seed 0, b)"]
    with following(Console(file=written, force_terminal=True, width=120, color_system=None)) as report:
        for label in (*labels, *labels):
            report(label, so_far(2, 5, finished=1))
        *_, first, second = [line for line in written.getvalue().splitlines() if "epoch 2/3" in line]
        assert "seed 0, a: epoch 2/3" in first
        assert "seed 0, b: epoch 2/3" in second
        drawn = len(written.getvalue())
        report(labels[0], so_far(3, 10, finished=3))
        report(labels[1], so_far(2, 6, finished=1))
        last = written.getvalue()[drawn:].splitlines()[-1]
        assert "epoch 2/3" in last
        assert "seed 0" not in last


@pytest.mark.parametrize("terminal", [True, False])
def test_one_of_a_job_s_processes_speaks(monkeypatch, terminal):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        written = io.StringIO()
        with following(Console(file=written, force_terminal=terminal)) as report:
            report("net", None)
            report("net", so_far(1, 10, finished=1))
            report.say("goes on")
        assert (written.getvalue() != "") == (rank == "0")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Progress(blocks=14, half_width=0.057, elapsed_s=3.2, budget_s=8.0), "28 pairs, ±5.70 %, 3 of 8 s"),
        (Progress(blocks=4, half_width=None, elapsed_s=0.4, budget_s=8.0), "8 pairs, 0 of 8 s"),
        # Sampling goes on beyond the budget while there are too few pairs: nothing is "24 of at most 8 s".
        (
            Progress(blocks=4, half_width=None, elapsed_s=24.0, budget_s=8.0),
            "8 pairs, 24 s (budget 8 s; 20 pairs are needed)",
        ),
        (Progress(blocks=20, half_width=0.01, elapsed_s=24.0, budget_s=8.0), "40 pairs, ±1.00 %, 24 s"),
    ],
)
def test_the_progress_of_a_measurement_is_true(state, words):
    assert measuring_words(state) == words
