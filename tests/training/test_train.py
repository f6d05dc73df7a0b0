"""What is trained, by which optimizer, and what is told of it."""

import signal
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import torch.nn.functional as F
from tiny_training import (
    RECIPE,
    STEPS,
    TEST,
    TRAIN,
    images,
    same,
    tensors,
    without_times,
)
from torch import nn

from selab.experiments import compare
from selab.models import checkpoint as models_checkpoint
from selab.models.build import build
from selab.training import recipe as training_recipe
from selab.training import run as run_files
from selab.training.batches import BatchPlan
from selab.training.data import Augmentation, scaled
from selab.training.evaluate import evaluate
from selab.training.optim import Average, draw_he, optimizer_of
from selab.training.problems import Found, Problems
from selab.training.recipe import ImageRecipe, lr_at, scaling_of

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


def test_weights_know_how_their_images_were_scaled(run, family):
    training = run("se_plain", scaling="unit")
    told = models_checkpoint.read_metadata(Path(training.weights))
    assert scaling_of(told, place="w") == "unit"
    model = compare.loaded(family["se_plain"], images(), Path(training.weights))
    assert evaluate(model, scaled(images(), "unit"), batch=TEST).top1_correct == training.test.top1_correct
    assert "scaling" not in models_checkpoint.read_metadata(Path(run(folder="other").weights))
    with pytest.raises(models_checkpoint.WeightsError, match=r"^w: its metadata's scaling: 'log'; allowed: channel, u"):
        scaling_of({"scaling": "log"}, place="w")


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


@pytest.mark.parametrize("channels_last", [False, True])
def test_through_fused_blocks(run, channels_last):
    plain, fused = (run("se_plain", folder=str(on), fused=on, channels_last=channels_last) for on in (False, True))
    assert tensors(plain).keys() == tensors(fused).keys()
    torch.testing.assert_close(tensors(plain), tensors(fused), rtol=1e-3, atol=1e-5)
    assert not same(plain, fused)


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

    def test_adam_has_the_constants_of_keras(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        recipe = msgspec.structs.replace(
            RECIPE, optimizer="adam", lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0
        )
        optimizer = optimizer_of(model, recipe)
        m = v = 0.0
        expected = 1.0
        for step, gradient in enumerate((3.0, -1.0), start=1):
            model.weight.grad = torch.full((1, 1), gradient)
            optimizer.step()
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            expected -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + 1e-7)
        assert model.weight.item() == pytest.approx(expected)

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
