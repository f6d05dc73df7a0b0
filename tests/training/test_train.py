import errno
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from selab.errors import DeviceError, InsertionError, ModelError, RecordError, SelabError
from selab.experiments import compare
from selab.models import checkpoint as models_checkpoint
from selab.models.build import build
from selab.models.spec import read_family
from selab.training import recipe as training_recipe
from selab.training import run as run_files
from selab.training.batches import BatchPlan
from selab.training.data import Augmentation, ImageSet
from selab.training.evaluate import NotFiniteError, evaluate
from selab.training.optim import Average, draw_he, optimizer_of
from selab.training.problems import Found, Problems
from selab.training.recipe import ImageRecipe, Recipe, lr_at
from selab.training.run import opened
from selab.training.train import DivergedError, Options, TrainingError, TrainingStoppedError, train

FAMILY = """
family = "tiny"
source = "this test"
builder = "tiny_networks:build"
input_chw = [3, 8, 8]
num_classes = 7
[variants.plain]
title = "Without normalisation and dropout, so that a step is the mean of its images' steps"
[variants.se_plain]
title = "The same with SE"
baseline = "plain"
se = { sites = ["0", "3"], reduction = 2, bias = true }
[variants.lively]
title = "With batch norm and dropout"
arguments = { lively = true }
[variants.broken]
title = "That fails in its forward pass"
arguments = { broken = true }
"""

NETWORKS = """
from torch import nn

class Break(nn.Module):
    def forward(self, x):
        raise RuntimeError("the toy is broken")

def build(num_classes, lively=False, broken=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if lively else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.Dropout(0.3) if lively else nn.Identity(), nn.ReLU(),
        nn.Flatten(), Break() if broken else nn.Identity(), nn.Linear(8 * 4 * 4, num_classes),
    )
"""

RECIPE = Recipe(
    name="tiny",
    title="Tiny",
    source="this test",
    where="above",
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-3,
    batch=16,
    epochs=3,
    schedule="cosine",
    crop_pad=1,
    flip=True,
)
OPTIONS = Options(threads=1)
# 100 images make 6 steps of 16 in an epoch, and 4 that are left out.
TRAIN, TEST, STEPS = 100, 30, 6


def images(*, classes=4):
    draw = np.random.default_rng(0)
    return ImageSet(
        name="tiny",
        title="tiny",
        sha256="0" * 64,
        official=False,
        num_classes=classes,
        train_images=torch.from_numpy(draw.integers(0, 256, (TRAIN, 3, 8, 8), np.uint8)),
        train_labels=torch.from_numpy(draw.integers(0, classes, TRAIN)),
        test_images=torch.from_numpy(draw.integers(0, 256, (TEST, 3, 8, 8), np.uint8)),
        test_labels=torch.from_numpy(draw.integers(0, classes, TEST)),
        mean=(127.5,) * 3,
        std=(64.0,) * 3,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    (folder / "tiny_networks.py").write_text(NETWORKS)
    (folder / "tiny.toml").write_text(FAMILY)
    yield read_family(folder / "tiny.toml")
    sys.modules.pop("tiny_networks", None)


@pytest.fixture
def run(family, tmp_path):
    """Trains a network of the family: (name, changes of recipe and options) → its Training."""

    def run(name="plain", *, folder="run", data=None, seed=0, report=lambda _: None, options=OPTIONS, **changes):
        known = {key: changes.pop(key) for key in ("clock", "patience_s") if key in changes}
        chosen = {key: changes.pop(key) for key in list(changes) if key in Options.__struct_fields__}
        return train(
            family[name],
            data or images(),
            msgspec.structs.replace(RECIPE, **changes),
            seed=seed,
            folder=tmp_path / folder,
            options=msgspec.structs.replace(options, **chosen),
            report=report,
            **known,
        )

    return run


def tensors(training):
    return load_file(training.weights)


def same(first, second):
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_times(epochs):
    return [msgspec.structs.replace(epoch, seconds=0.0, images_per_s=0.0) for epoch in epochs]


def lines_without_times(folder):
    lines = [json.loads(line) for line in (Path(folder) / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


# ------------------------------------------------------------------------------------------------------ what is trained


def test_it_is_the_plain_loop(run, family):
    """A training loop written by hand, with torch's unfused SGD, ends at the same weights."""
    training = run(decay_norm_and_bias=False)
    data = images()
    model = build(msgspec.structs.replace(family["plain"], num_classes=4), seed=0).model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-3}, {"params": others}],
        lr=0.05, momentum=0.9, nesterov=True, foreach=False,
    )  # fmt: skip
    cpu, augmentation = torch.device("cpu"), Augmentation(crop_pad=1, flip=True)
    for epoch in range(3):
        total = 0.0
        batches = data.train_batches(BatchPlan(batch=16, seed=0, epoch=epoch), device=cpu, augmentation=augmentation)
        for step, (x, y) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(RECIPE, epoch + step / STEPS)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        assert training.epochs[epoch].train_loss == pytest.approx(total / STEPS, rel=1e-6)
    torch.testing.assert_close(tensors(training), dict(model.state_dict()))
    measured = evaluate(model, data, batch=TEST)
    assert training.epochs[-1].test_loss == pytest.approx(measured.loss, rel=1e-5)
    assert training.test.top1_correct == measured.top1_correct
    assert training.epochs[-1].test_top1_pct == training.test.top1_pct
    assert training.epochs[-1].lr == lr_at(RECIPE, 2 + 5 / STEPS)
    assert [epoch.epoch for epoch in training.epochs] == [1, 2, 3]


def test_the_same_call_gives_the_same_bits_and_leaves_no_trace(run):
    torch.manual_seed(5)
    random_state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    benchmark = torch.backends.cudnn.benchmark
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    first = run("lively", folder="a")
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert torch.backends.cudnn.benchmark == benchmark
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    torch.manual_seed(6)
    second = run("lively", folder="b")
    assert same(first, second)
    assert without_times(first.epochs) == without_times(second.epochs)
    assert not same(first, run("lively", folder="c", seed=1))


def test_a_variant_and_its_baseline_begin_alike(run, family):
    """A learning rate of nothing shows the first weights; those of SE's own layers are as `build` makes them."""
    for init in ("builder", "he"):
        bare, se = (
            tensors(run(name, folder=name + init, init=init, lr=1e-30, weight_decay=0.0, epochs=1))
            for name in ("plain", "se_plain")
        )
        # Zeros have moved by a learning rate of nothing.
        torch.testing.assert_close({key: se[key] for key in bare}, bare, rtol=0, atol=1e-20)
        built = build(msgspec.structs.replace(family["se_plain"], num_classes=4), seed=0).model.state_dict()
        own = se.keys() - bare.keys()
        assert own
        torch.testing.assert_close({key: se[key] for key in own}, {key: built[key] for key in own}, rtol=0, atol=1e-20)
        assert torch.equal(bare["0.weight"], built["0.weight"]) == (init == "builder")


def test_he_is_a_normal_distribution_of_two_over_fan_in():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(300, 200))
    keys = model.state_dict().keys()
    draw_he(model, seed=3, only=keys)
    # 36,864 and 60,000 draws: the deviation is known to about half a percent.
    assert model[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model[1].weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert not model[1].bias.any()
    kept = model[1].weight.clone()
    draw_he(model, seed=4, only=["0.weight"])
    assert torch.equal(model[1].weight, kept)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(run, parts):
    whole, split = run(folder="whole"), run(folder="split", accumulate=parts)
    torch.testing.assert_close(tensors(whole), tensors(split), rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.epochs, split.epochs, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
        assert other.train_top1_pct == one.train_top1_pct


def test_epochs_and_batch_of_the_options(run):
    training = run(epochs=1, batch=50)
    assert (training.recipe.epochs, training.recipe.batch, len(training.epochs)) == (1, 50, 1)


def test_weights_know_what_they_are_of(run, family):
    training = run("se_plain")
    fitting = msgspec.structs.replace(family["se_plain"], num_classes=4)
    model = build(fitting, seed=9).model
    models_checkpoint.load(model, Path(training.weights), variant=fitting)
    assert evaluate(model, images(), batch=TEST).top1_correct == training.test.top1_correct
    told = models_checkpoint.read_metadata(Path(training.weights))
    assert (told["arch"], told["facts_hash"], told["seed"]) == ("se_plain", fitting.facts_hash, "0")
    assert training.facts_hash == family["se_plain"].facts_hash != fitting.facts_hash


def test_weights_are_loaded_for_the_images_that_they_were_trained_on(run, family):
    training = run()
    path, variant = Path(training.weights), family["plain"]
    found = evaluate(compare.loaded(variant, images(), path), images(), batch=TEST)
    assert found.top1_correct == training.test.top1_correct
    # Of the size of an image the tensors know nothing where they fit.
    compare.loaded(variant, SimpleNamespace(num_classes=4, input_chw=(3, 9, 9)), path)
    here, of = f"{path}: is of plain", "with 4 classes, 3×8×8"
    changed = msgspec.structs.replace(variant, arguments={"lively": False})
    for one, data, message in (
        (
            variant,
            images(classes=5),
            f"{here} {of}, not 5 classes, 3×8×8; give the data that it was trained on",
        ),
        (family["se_plain"], images(), f"{here} {of}, not of se_plain"),
        (changed, images(), f"{here} {of}, in an earlier configuration; train it again"),
    ):
        with pytest.raises(models_checkpoint.WeightsError) as caught:
            compare.loaded(one, data, path)
        assert str(caught.value) == message


def test_weights_of_a_folder_know_how_its_images_were_prepared(run):
    plain = run(folder="plain", epochs=1)
    assert training_recipe.read_image_recipe(Path(plain.weights)) is None
    assert plain.problems is None
    data, image = images(), ImageRecipe(std=(1.0, 1.0, 1.0), test_resize=352, test_crop=299)
    problems = Problems(grey=Found(count=1, first=("val/a/1.jpg",)))
    for name, value in (("image", image), ("share_problems", lambda: problems)):
        object.__setattr__(data, name, value)
    training = run(data=data, epochs=1)
    assert training_recipe.read_image_recipe(Path(training.weights)) == image
    assert training.problems == problems
    assert run(data=data, epochs=1) == training


def test_tests_of_a_folder_take_few_images_at_a_time(run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "selab.training.engine.evaluate", lambda *things, **how: asked.append(how["batch"]) or evaluate(*things, **how)
    )
    monkeypatch.setattr("selab.training.engine._FOLDER_TEST_BATCH", 8)
    data = images()
    run(folder="memory", data=data, epochs=1)
    object.__setattr__(data, "image", ImageRecipe())
    run(folder="files", data=data, epochs=1)
    assert asked == [64, 8]


def test_channels_last_and_half_precision(run, family):
    plain = run(folder="plain")
    torch.testing.assert_close(tensors(plain), tensors(run(folder="nhwc", channels_last=True)), rtol=1e-4, atol=1e-5)
    for amp in ("bf16", "fp16"):
        half = run(folder=amp, amp=amp)
        # Eight bits of mantissa in bf16: a percent or so, over 18 steps.
        assert half.epochs[-1].train_loss == pytest.approx(plain.epochs[-1].train_loss, rel=0.03)
        assert not same(plain, half)
        # It is tested as it was trained.
        model = build(msgspec.structs.replace(family["plain"], num_classes=4)).model
        models_checkpoint.load(model, Path(half.weights))
        assert half.test == evaluate(model, images(), batch=64, amp=amp)
        assert half.test.loss != evaluate(model, images(), batch=64).loss


@pytest.mark.slow
def test_compiled(run):
    torch.testing.assert_close(
        tensors(run(folder="eager")), tensors(run(folder="compiled", compiled=True)), rtol=1e-3, atol=1e-5
    )


def test_label_smoothing_enters_the_loss_that_is_trained(run):
    # Of a network that does not move: the loss with smoothing s is (1 - s) * plain + s * mean over classes.
    changes = {"lr": 1e-30, "weight_decay": 0.0, "epochs": 1}
    none, all_of_it = (
        run(folder=str(amount), label_smoothing=amount, **changes).epochs[0].train_loss for amount in (0.0, 0.999999)
    )
    half = run(folder="half", label_smoothing=0.5, **changes).epochs[0].train_loss
    assert half == pytest.approx((none + all_of_it) / 2, rel=1e-4)


class TestOptimizers:
    def test_decay_spares_norm_and_bias(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        for parameter in model.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = optimizer_of(model, msgspec.structs.replace(RECIPE, decay_norm_and_bias=False, nesterov=False))
        optimizer.step()
        # 1 - lr * decay * 1
        torch.testing.assert_close(model[0].weight, torch.full_like(model[0].weight, 1 - 0.05 * 1e-3))
        assert all((parameter == 1).all() for parameter in (model[0].bias, model[1].weight, model[1].bias))

    def test_rmsprop_has_the_constants_of_keras(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        model.weight.grad = torch.full((1, 1), 3.0)
        recipe = msgspec.structs.replace(
            RECIPE, optimizer="rmsprop", lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0
        )
        optimizer_of(model, recipe).step()
        # keras/optimizers.py: a = 0.9 a + 0.1 g^2; p -= lr g / (sqrt(a) + 1e-7)
        assert model.weight.item() == pytest.approx(1 - 0.1 * 3 / ((0.1 * 9) ** 0.5 + 1e-7))

    def test_the_average_of_weights(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        average = Average(model, 0.75)
        for value in (4.0, 8.0):
            nn.init.constant_(model.weight, value)
            average.update()
        # 0.25 * 4 = 1, then 0.75 * 1 + 0.25 * 8 = 2.75
        assert average.state["weight"].item() == 2.75
        with average.in_place():
            assert model.weight.item() == 2.75
        assert model.weight.item() == 8.0


def test_the_average_is_what_is_tested_and_kept(run, family):
    training = run("lively", ema=0.9)
    model = build(msgspec.structs.replace(family["lively"], num_classes=4), seed=1).model
    models_checkpoint.load(model, Path(training.weights))
    assert evaluate(model, images(), batch=TEST) == training.test
    assert not same(training, run("lively", folder="without"))


# -------------------------------------------------------------------------------------------------------- interruptions


@dataclass
class At:
    """A report that does something once, at one step."""

    epoch: int
    step: int
    do: object
    done: bool = False

    def __call__(self, progress):
        if (progress.epoch, progress.step) == (self.epoch, self.step) and not self.done:
            self.done = True
            self.do()


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "accumulate": 2},
        {"optimizer": "rmsprop", "nesterov": False, "momentum": 0.0, "lr": 1e-3},
        {"amp": "fp16", "channels_last": True, "decay_norm_and_bias": False},
    ],
    ids=["sgd", "average", "rmsprop", "fp16"],
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
import test_train
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
    read_family(Path(toml))["lively"], test_train.images(), test_train.RECIPE, seed=0, folder=folder,
    options=test_train.Options(threads=1, checkpoint_s=0.0), report=lambda p: print(p.epoch, p.step, flush=True),
)
"""


def test_killed_at_any_moment_and_called_again_it_ends_at_the_same_bits(run, family, tmp_path):
    """Killed by another process wherever it happens to be, and by itself just before and just after a rename."""
    draw = random.Random(0)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    for renames, when in ((0, ""), (draw.randint(2, 6), "before"), (draw.randint(2, 6), "after"), (0, "")):
        words = [sys.executable, script, Path(__file__).parent, family["lively"].file, tmp_path / "run", renames, when]
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


def points(folder):
    """What TensorBoard shows of a training: by tag, (epoch, value) in the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "images_per_s"]
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags}


def test_curves_have_one_point_per_epoch(run, tmp_path):
    with pytest.raises(TrainingStoppedError):
        run(checkpoint_s=0.0, report=At(3, 2, interrupt()))
    training = run(checkpoint_s=0.0)
    shown = points(tmp_path / "run")
    # loss/train rather than train_loss, so that both lie in one picture group.
    assert set(shown) == {"lr", "loss/train", "top1_pct/train", "loss/test", "top1_pct/test"}
    assert [step for step, _ in shown["loss/test"]] == [1, 2, 3]
    assert shown["loss/test"][-1][1] == pytest.approx(training.epochs[-1].test_loss, rel=1e-6)


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
    with pytest.raises(TrainingError, match="holds no training images; put them into a folder named train"):
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


# ------------------------------------------------------------------------------------------------------------- progress


class Clock:
    """Each look at it is a tenth of a second after the last."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.1
        return self.now


def test_progress_is_told_in_the_units_of_the_clock(run):
    told = []
    training = run(clock=Clock(), report=told.append, checkpoint_s=1e9, batch=4, epochs=2)
    steps = TRAIN // 4
    assert {one.steps for one in told} == {steps}
    assert told[0].step == 1
    assert told[0].eta_s is None, "the first look has waited for compilers"
    # A step takes no time by this clock but for looking at it, so looks come ever later, at most twice as far apart.
    assert [one.step for one in told if one.epoch == 1] == [1, 3, 7, 15, steps, steps]
    # From one look to the next one the clock was read once: 4 images times 2, 4, 8 steps in a tenth of a second.
    assert [one.images_per_s for one in told[1:4]] == pytest.approx([80, 160, 320])
    assert told[-1].last == training.epochs[-1]
    assert told[-1].eta_s == 0
    assert 0 <= told[3].top1_pct <= 100
    assert training.epochs[0].seconds == pytest.approx(0.5)
    assert training.epochs[0].images_per_s == pytest.approx(100 / 0.5)
    assert training.seconds > sum(epoch.seconds for epoch in training.epochs)


def test_checkpoints_come_as_often_as_asked(run, monkeypatch):
    saved = []
    save = run_files.RunFolder.save

    def noted(self, checkpoint, content):
        saved.append((checkpoint.epoch, checkpoint.step))
        save(self, checkpoint, content)

    monkeypatch.setattr(run_files.RunFolder, "save", noted)
    run(folder="rare", epochs=2, checkpoint_s=1e9)
    assert saved == [(1, 0), (2, 0)]
    saved.clear()
    run(folder="often", epochs=2, checkpoint_s=0.0)
    assert saved == [(0, step) for step in range(1, 6)] + [(1, 0)] + [(1, step) for step in range(1, 6)] + [(2, 0)]
