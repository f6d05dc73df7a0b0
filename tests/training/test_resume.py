"""Training checkpoints by mutation: whatever is wrong in one is refused in one line, and nothing is overwritten."""

import contextlib
import copy
import json
import os
import pickle
import signal
import sys

import msgspec
import numpy as np
import pytest
import torch

from selab.models.spec import read_family
from selab.training.data import ImageSet
from selab.training.recipe import Recipe
from selab.training.record import Options
from selab.training.train import TrainingError, TrainingStoppedError, train

FAMILY = """
family = "little"
source = "this test"
builder = "little_networks:build"
input_chw = [3, 4, 4]
num_classes = 7
[variants.little]
title = "With batch norm, and a layer that has no gradients"
"""
NETWORKS = """
from torch import nn

class Little(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self[3](self[2](self[1](self[0](x))))

def build(num_classes):
    return Little(num_classes)
"""
SGD = Recipe(
    name="little", title="Little", source="this test", where="above", lr=0.05, momentum=0.9, nesterov=True,
    batch=8, epochs=3, schedule="step", milestones=(2.0,), weight_decay=1e-3, ema=0.9, decay_norm_and_bias=False,
)  # fmt: skip
RMSPROP = msgspec.structs.replace(SGD, optimizer="rmsprop", nesterov=False, lr=1e-3, ema=None)
ADAM = msgspec.structs.replace(RMSPROP, optimizer="adam")
# 30 images make 3 steps of 8 in an epoch.
STEPS = 3


def images():
    draw = np.random.default_rng(0)

    def some(count):
        return torch.from_numpy(draw.integers(0, 256, (count, 3, 4, 4), np.uint8)), torch.arange(count) % 6

    (train_images, train_labels), (test_images, test_labels) = some(30), some(12)
    return ImageSet(
        name="little",
        title="little",
        sha256="0" * 64,
        official=False,
        num_classes=6,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        mean=(127.5,) * 3,
        std=(64.0,) * 3,
    )


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    (folder / "little_networks.py").write_text(NETWORKS)
    (folder / "little.toml").write_text(FAMILY)
    yield read_family(folder / "little.toml")["little"]
    for name in [name for name in sys.modules if name.startswith("little_networks")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(variant):
    def run(folder, recipe=SGD, *, report=lambda _: None, amp="off"):
        options = Options(threads=1, checkpoint_s=0.0, amp=amp)
        return train(variant, images(), recipe, seed=0, folder=folder, options=options, report=report)

    return run


def stopped_at(run, folder, epoch, step, **options):
    """Train until a moment; return the checkpoint that this leaves."""

    def stop(progress):
        if (progress.epoch, progress.step) == (epoch, step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStoppedError):
        run(folder, report=stop, **options)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """(folder, checkpoint) in the second epoch, by recipe."""
    found = {}
    ways = {"sgd": {}, "rmsprop": {"recipe": RMSPROP}, "adam": {"recipe": ADAM}, "fp16": {"amp": "fp16"}}
    for name, options in ways.items():
        folder = tmp_path_factory.mktemp("runs") / name
        found[name] = folder, stopped_at(run, folder, 2, 2, **options), options
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(run, folder, checkpoint, words=(), **options):
    """Write a checkpoint; resuming fails in one line and overwrites nothing."""
    file = folder / "checkpoint.pt"
    original = contents(folder)
    try:
        torch.save(checkpoint, file)
        before = contents(folder)
        with pytest.raises(TrainingError) as caught:
            run(folder, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 800
        assert str(file) in message
        assert "restore it, or delete it to start over" in message
        for word in [words] if isinstance(words, str) else words:
            assert word in message
        assert contents(folder) == before
    finally:
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        for name, content in original.items():
            (folder / name).write_bytes(content)


def changed(checkpoint, path, value):
    """A copy of a checkpoint with another value at a path; `del` takes the value away."""
    copied = copy.deepcopy(checkpoint)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if value == "del":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


def leaves(value, path=()):
    """Every value of a checkpoint by its path, containers too."""
    if path:
        yield path, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def mutations(path, value):
    """Values of other kinds, shapes, types and ranges than one of a checkpoint."""
    for other in (None, [], {}, "text", -1, 1.5, True, torch.zeros(2, 3)):
        same = type(other) is type(value) and not isinstance(value, torch.Tensor) and other == value
        if not same and not (path[-1] in ("lr", "scale") and type(other) is float):
            yield other
    if isinstance(value, torch.Tensor):
        yield value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        yield value.to(torch.complex64)
        yield value.reshape(-1)[:-1].clone() if value.numel() > 1 else value.repeat(3)
        yield value.unsqueeze(0)
        yield torch.zeros(value.shape, dtype=value.dtype, device="meta")
        yield torch.empty(0, dtype=value.dtype)
        if value.is_floating_point():
            yield torch.full_like(value, torch.nan)
            yield torch.full_like(value, torch.inf)
        if value.dim():
            yield value.to_sparse()
    elif isinstance(value, dict | list):
        yield {**value, "more": 1} if isinstance(value, dict) else [*value, 1]
    yield "del"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"), [("sgd", None), ("rmsprop", "optimizer"), ("adam", "optimizer"), ("fp16", "scaler")]
)
def test_every_value_of_another_kind_is_refused(run, saved, name, part):
    folder, checkpoint, options = saved[name]
    count, taken = 0, []
    for path, value in leaves(checkpoint):
        if part not in (None, *path[1:2]):
            continue
        # Torch's version decides which keys a group of parameters has; ours is used.
        in_groups = path[:3] == ("tensors", "optimizer", "param_groups")
        for other in mutations(path, value):
            deleted = isinstance(other, str) and other == "del"
            optional = in_groups and len(path) == 5 and path[-1] not in ("lr", "params") and deleted
            more = in_groups and len(path) == 4 and isinstance(other, dict) and "more" in other
            if not optional and not more:
                with contextlib.suppress(AssertionError, pytest.fail.Exception):
                    refused(run, folder, changed(checkpoint, path, other), **options)
                    count += 1
                    continue
                taken.append((path, other))
    assert not taken
    assert count > {None: 500, "optimizer": 200, "scaler": 30}[part]


def test_the_facts_of_other_kinds_and_ranges_are_refused(run, saved):
    folder, checkpoint, _ = saved["sgd"]
    facts, taken = json.loads(checkpoint["facts"]), []
    for path, value in leaves(facts):
        for other in (None, [], {}, "text", -1, -0.5, 10**9, 1e308, True, "del"):
            skipped = path[-1] in ("seconds", "epoch_s", "images_per_s", "skipped") and other in (10**9, 1e308, [])
            # Losses of steps may be anything that is finite, and sums of floats may be whole.
            skipped |= path[0] == "sums" and path[-1] == 0 and len(path) == 3 and other in (10**9, 1e308)
            skipped |= path[-1] == "train_loss" and other in (10**9, 1e308)
            skipped |= path[-1] == "skipped" and other == "del"
            if (type(other) is type(value) and other == value) or skipped:
                continue
            with contextlib.suppress(AssertionError, pytest.fail.Exception):
                refused(run, folder, {**checkpoint, "facts": json.dumps(changed(facts, path, other))})
                continue
            taken.append((path, other))
    assert not taken


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": -1}, "epoch: is -1, expected 0 to 3"),
        ({"epoch": 4}, "epoch: is 4, expected 0 to 3"),
        ({"epoch": 2}, "epochs: are 1, in epoch 2"),
        ({"epoch": 0}, "epochs: are 1, in epoch 0"),
        ({"step": 3}, "step: is 3, expected 0 to 2"),
        ({"step": 0}, "sums: "),
        ({"sums": []}, "sums: are of 0 processes, expected 1 to 8"),
        ({"sums": [[1.0, 17.0]]}, "together at most 16 after step 2"),
        ({"sums": [[1.0, 9.0], [1.0, 9.0]]}, "together at most 16 after step 2"),
        ({"sums": [[1.0, 0.5]]}, "right answers are whole numbers"),
        ({"sums": [[-1.0, 0.0]]}, "losses are finite and not negative"),
        ({"seconds": -1.0}, "seconds: is -1.0"),
        ({"test": None}, "test: is missing in epoch 1"),
    ],
)
def test_what_is_wrong_is_named(run, saved, change, words):
    folder, checkpoint, _ = saved["sgd"]
    refused(run, folder, {**checkpoint, "facts": json.dumps(json.loads(checkpoint["facts"]) | change)}, words)


def test_a_momentum_buffer_of_another_shape_is_refused_and_not_read_past_its_end(run, saved):
    folder, checkpoint, _ = saved["sgd"]
    path = ("tensors", "optimizer", "state", 0, "momentum_buffer")
    words = "state[0] (0.weight).momentum_buffer: is float32 of shape (1,), expected float32 of shape (4, 3, 3, 3)"
    refused(run, folder, changed(checkpoint, path, torch.zeros(1)), words)


def test_a_missing_buffer_of_a_trained_parameter_is_refused_and_of_an_untrained_one_is_right(run, saved, tmp_path):
    folder, checkpoint, _ = saved["sgd"]
    state = checkpoint["tensors"]["optimizer"]["state"]
    names = {0: "0.weight", 1: "3.weight", 2: "unused.weight"}  # matrices are the first group
    assert 2 not in state, "the unused layer has no gradients"
    for index in (0, 1):
        words = f"optimizer.state: lacks {index} ({names[index]}), which has been trained"
        refused(run, folder, changed(checkpoint, ("tensors", "optimizer", "state", index), "del"), words)
    refused(run, folder, changed(checkpoint, ("tensors", "optimizer", "state"), {}), "lacks 0 (0.weight)")


@pytest.mark.parametrize(("name", "square"), [("rmsprop", "square_avg"), ("adam", "exp_avg_sq")])
def test_a_negative_mean_square_or_variance_is_refused(run, saved, name, square):
    folder, checkpoint, options = saved[name]
    path = ("tensors", "optimizer", "state", 0)
    value = checkpoint["tensors"]["optimizer"]["state"][0][square]
    refused(run, folder, changed(checkpoint, (*path, square), -value - 1), f"{square}: is negative", **options)
    refused(run, folder, changed(checkpoint, (*path, "step"), torch.tensor(-1.0)), "step: is negative", **options)
    variance = torch.tensor([-1.0, 1, 1, 1])
    words = "model.1.running_var: is negative"
    refused(run, folder, changed(checkpoint, ("tensors", "model", "1.running_var"), variance), words, **options)


def test_buffers_that_overlap_in_memory_are_separated(run, saved, tmp_path):
    """A file may hold one storage for several buffers, or a view that repeats one value: the training is the same."""
    whole = run(tmp_path / "whole")
    checkpoint = stopped_at(run, tmp_path / "parts", 2, 2)
    state = checkpoint["tensors"]["optimizer"]["state"]
    buffers = [entry["momentum_buffer"] for entry in state.values()]
    storage = torch.cat([buffer.flatten() for buffer in buffers])
    begin = 0
    for index, buffer in zip(state, buffers, strict=True):
        view = storage[begin : begin + buffer.numel()].view(buffer.shape)
        state[index]["momentum_buffer"] = view if view.dim() != 2 else view.T.contiguous().T
        begin += buffer.numel()
    torch.save(checkpoint, tmp_path / "parts" / "checkpoint.pt")
    parts = run(tmp_path / "parts")
    assert [one.train_loss for one in parts.epochs] == [one.train_loss for one in whole.epochs]
    assert parts.test == whole.test


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(run, saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "created"), "w")

    folder, checkpoint, _ = saved["sgd"]
    pickle.loads(pickle.dumps(Evil())).close()
    (tmp_path / "created").unlink()
    refused(run, folder, {**checkpoint, "more": Evil()}, "cannot be read")
    refused(run, folder, changed(checkpoint, ("tensors", "model"), Evil()), "cannot be read")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("content", [[], "text", 3, {"schema": "selab.checkpoint/1"}, torch.zeros(3), None])
def test_other_contents_are_refused(run, saved, content):
    folder, _, _ = saved["sgd"]
    refused(run, folder, content, "cannot be read")


@pytest.mark.parametrize("name", ["checkpoint.pt", "training.json", "run.json"])
def test_what_is_not_a_regular_file_is_refused(run, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    os.mkfifo(folder / name)
    if name != "run.json":
        # The request is known, so that the other files are looked at.
        (folder / name).unlink()
        stopped_at(run, folder, 1, 1)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    with pytest.raises(TrainingError, match=f"{name}: is not a regular file"):
        run(folder)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


class TestFinished:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda found: found.update(epochs=[]), "epochs: are 0, expected 3"),
            (lambda found: found["epochs"].reverse(), "epochs[0].epoch: is 3, expected 1"),
            (lambda found: found["test"].update(top1_correct=99), "test.top1_correct: is 99"),
            (lambda found: found["test"].update(images=0, top1_correct=0, top5_correct=0), "test.images: is 0"),
            (lambda found: found["test"].update(loss=0.125), "the last test gave 0.125"),
            (lambda found: found["epochs"][0].update(test_top1_pct=-3.0), "epochs[0].test_top1_pct: is -3.0"),
            (lambda found: found["epochs"][0].update(images_per_s=-3.0), "epochs[0].images_per_s: is -3.0"),
            (lambda found: found.update(seconds=-1.0), "seconds: is -1.0"),
            (lambda found: found.update(seed=7), "seed: is 7, not 0"),
            (lambda found: found.update(world=0), "world: is 0"),
            (lambda found: found.update(facts_hash="0" * 12), "facts_hash"),
            (lambda found: found["recipe"].update(epochs=9), "recipe.epochs: is 9, not 3"),
        ],
    )
    def test_an_impossible_result_is_refused(self, run, finished, change, words):
        file = finished / "training.json"
        original = file.read_bytes()
        found = json.loads(original)
        change(found)
        try:
            file.write_text(json.dumps(found))
            before = contents(finished)
            with pytest.raises(TrainingError) as caught:
                run(finished)
            assert words in str(caught.value)
            assert "restore it, or delete it to train again" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert contents(finished) == before
        finally:
            file.write_bytes(original)
        run(finished)
