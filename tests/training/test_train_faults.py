"""What stops a training, and a folder that holds another one or a broken one."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from tiny_training import (
    OPTIONS,
    At,
    images,
    interrupt,
    same,
)

from selab.errors import DeviceError, InsertionError, ModelError, RecordError, SelabError
from selab.training import run as run_files
from selab.training.evaluate import NotFiniteError
from selab.training.run import opened
from selab.training.train import DivergedError, TrainingError, TrainingStoppedError

# --------------------------------------------------------------------------------------------------------------- faults


def test_a_full_disk(run, tmp_path, monkeypatch):
    written = run_files.write_atomically

    def full(path, content):
        if path.name == "checkpoint.pt" and path.exists():
            monkeypatch.setattr("os.fsync", fails)
        return written(path, content)

    def fails(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        monkeypatch.setattr(run_files, "write_atomically", full)
        fsync = os.fsync
        with pytest.raises(
            RecordError, match=r"checkpoint\.pt: cannot be written: No space left on device; the file is"
        ):
            run("lively", checkpoint_s=0.0)
        patched.undo()
        monkeypatch.setattr("os.fsync", fsync)
        monkeypatch.setattr(run_files, "write_atomically", written)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert same(run("lively"), run("lively", folder="whole"))


@pytest.mark.parametrize(("lr", "what"), [(1e12, "the loss is (nan|inf)"), (1e38, "weights are not finite|loss is")])
def test_a_training_that_diverges(run, tmp_path, lr, what):
    with pytest.raises(DivergedError, match=f"plain, epoch . of 3, step .*{what}.*smaller learning rate") as raised:
        run(lr=lr, checkpoint_s=0.0)
    written = (tmp_path / "run" / "checkpoint.pt").exists()
    assert ("(the last checkpoint is intact)" in str(raised.value)) == written
    assert ("(no checkpoint was written yet)" in str(raised.value)) != written
    if written:
        saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["tensors"]["model"]
        assert all(value.isfinite().all() for value in saved.values())


def test_a_training_that_diverges_in_the_last_step_of_an_epoch(run, monkeypatch):
    def overflowing(*_, **__):
        raise NotFiniteError("logits of 3 of 30 images are not finite")

    monkeypatch.setattr("selab.training.engine.evaluate", overflowing)
    with pytest.raises(
        DivergedError, match=r"epoch 1 of 3, step 6 of 6: logits of test images .*: the training has di"
    ):
        run()


class Vanishing:
    """Data of which nothing is left after some batches."""

    def __init__(self, error, after):
        self.data, self.error, self.after = images(), error, after

    def __getattr__(self, name):
        return getattr(self.data, name)

    def train_batches(self, plan, **asked):
        for number, batch in enumerate(self.data.train_batches(plan, **asked)):
            if plan.epoch == 1 and number == self.after:
                if self.error is None:
                    return
                raise self.error
            yield batch


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "/data/x.bin"), TrainingError,
         "plain, epoch 2 of 3, step 3 of 6: /data/x.bin: No such file or directory; solve this, then the same command"),
        (SelabError("train/x.jpg: is gone"), SelabError, "train/x.jpg: is gone"),
        (None, TrainingError, "plain, epoch 2 of 3, step 3 of 6: tiny gave no more images"),
    ],
    ids=["file", "folder", "end"],
)  # fmt: skip
def test_data_that_vanishes(run, error, kind, message):
    with pytest.raises(kind, match=message):
        run(data=Vanishing(error, 3), checkpoint_s=0.0)
    assert same(run(), run(folder="whole"))


def test_a_network_that_fails(run):
    with pytest.raises(ModelError, match="broken, epoch 1 of 3, step 0 of 6: the network fails: the toy is broken"):
        run("broken")
    with pytest.raises((ModelError, InsertionError), match="se_plain"):
        run("se_plain", folder="narrow", data=Narrow())


class Narrow:
    """Data of another image size than the network can take."""

    def __init__(self):
        self.data = images()

    input_chw = (3, 4, 4)

    def __getattr__(self, name):
        return getattr(self.data, name)


def test_out_of_memory_says_how_to_split(run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(F, "cross_entropy", full)
    with pytest.raises(SelabError, match="out of memory with 16 images per step; split it: --accumulate 4"):
        run(accumulate=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "a batch of 16 cannot be divided among 1 process by 3 micro-batches"),
        ({"accumulate": 0}, "a batch of 16 cannot be divided"),
        ({"batch": 128}, "tiny: holds 100 training images, less than a batch of 128"),
    ],
)
def test_impossible_batches(run, changes, message):
    with pytest.raises(TrainingError, match=message):
        run(options=msgspec.structs.replace(OPTIONS, **changes))


def test_data_for_evaluation_alone(run):
    data = images()
    alone = replace(data, train_images=data.train_images[:0], train_labels=data.train_labels[:0])
    with pytest.raises(TrainingError, match="holds no training images; name a data set that does"):
        run(data=alone)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seeds(run, seed):
    with pytest.raises(SelabError, match=rf"seed: {seed}; allowed are 0 to 2\^64 - 1"):
        run(seed=seed)


def test_the_greatest_seed(run):
    assert run(seed=2**64 - 1, epochs=1).seed == 2**64 - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(run):
    with pytest.raises(DeviceError, match="--device cuda: torch finds no CUDA device here; use --device cpu"):
        run(device="cuda")


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, "its recipe.lr is 0.05, not 0.2; name another folder, or delete this one"),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"name": "lively"}, "its arch is plain, not lively"),
        ({"accumulate": 2}, "its options.accumulate is 1, not 2"),
        ({"epochs": 4}, "its recipe.epochs is 3, not 4"),
        ({"data": images(classes=5)}, "its data.num_classes is 4, not 5"),
    ],
)
def test_another_request_is_refused_by_the_field(run, changes, message):
    run()
    with pytest.raises(TrainingError, match=f"run: holds the training of another request: {message}"):
        run(**changes)


def test_what_decides_nothing_is_no_other_request(run):
    finished = run()
    assert run(title="Another title", checkpoint_s=1.0, threads=2, epochs=3) == finished


def test_a_finished_training_returns_from_its_files(run, tmp_path, monkeypatch):
    finished = run()
    monkeypatch.setattr("selab.training.engine.build", None)
    (tmp_path / "run").rename(tmp_path / "moved")
    again = run(folder="moved", report=None)
    assert again == msgspec.structs.replace(finished, weights=str(tmp_path / "moved" / "weights.safetensors"))


def test_files_that_are_broken_or_gone(run, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        run(checkpoint_s=0.0, report=At(1, 2, interrupt()))
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        TrainingError, match=r"checkpoint\.pt: cannot be read .*; restore it, or delete it to start over"
    ):
        run()
    (folder / "checkpoint.pt").write_bytes(whole)
    asked = (folder / "run.json").read_text()
    (folder / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"run\.json: .*missing required field .*; restore it, or name another"):
        run()
    (folder / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"run\.json: is missing, so the request of this training is unknown"):
        run()
    (folder / "run.json").write_text(asked)
    finished = run()
    Path(finished.weights).unlink()
    with pytest.raises(TrainingError, match=r"weights\.safetensors: is missing; restore it, or .*training\.json"):
        run()
    (folder / "training.json").unlink()
    assert run().test == finished.test


def test_one_process_at_a_time(run, tmp_path):
    messages = []

    def again():
        with pytest.raises(TrainingError, match="another process is training here") as caught:
            run()
        messages.append(str(caught.value))

    run(checkpoint_s=0.0, report=At(1, 1, again))
    assert messages
    run()  # and the lock is gone


def test_a_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run: cannot be created: Not a directory; name another folder"):
        run(folder="file/run")


def test_what_a_killed_writer_left_is_cleared(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".checkpoint.pt.x1y2").write_bytes(b"half")
    (folder / ".own.notes").write_text("the user's")
    run()
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {".own.notes"}
    assert opened.__doc__
