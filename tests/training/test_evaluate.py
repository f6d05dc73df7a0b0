import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selab.errors import DeviceError, ModelError, SelabError
from selab.training.evaluate import evaluate


class Numbered:
    """Test images that carry their own number, and the labels that belong to them."""

    title = "numbered"
    input_chw = (1, 1, 1)
    train_size = 0

    def __init__(self, labels, num_classes, breaks_at=None):
        self.labels = torch.tensor(labels)
        self.num_classes = num_classes
        self.test_size = len(labels)
        self.breaks_at = breaks_at
        self.asked = []

    def test_batches(self, *, batch, device, rank=0, world=1):
        self.asked.append(batch)
        part = batch // world
        for start in range(0, self.test_size, batch):
            here = range(start, min(start + batch, self.test_size))[rank * part : (rank + 1) * part]
            if self.breaks_at in here:
                raise SelabError(f"image {self.breaks_at} cannot be read")
            numbers = torch.tensor(list(here), dtype=torch.int64)
            yield numbers.float().view(-1, 1, 1, 1).to(device), self.labels[numbers].to(device)


class Known(nn.Module):
    """Answers an image's number with a row of logits."""

    def __init__(self, rows):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, images):
        return self.rows[images.flatten().long()] * self.scale


def ranked(label, place, classes=8):
    """Logits with this label at that place, counted from 0, of the falling order classes - 1, …, 1, 0."""
    others = [number for number in range(classes) if number != label]
    others.insert(place, label)
    row = [0.0] * classes
    for position, number in enumerate(others):
        row[number] = float(classes - 1 - position)
    return row


PLACES = [0, 0, 1, 4, 5, 7, 0, 3, 2, 6, 0]
LABELS = [0, 7, 3, 3, 1, 2, 5, 6, 4, 4, 0]
# A label at place p has the logit 7 - p, its cross entropy is the logarithm of the sum of e^0..e^7, less that.
LOSS = math.log(sum(math.exp(logit) for logit in range(8))) - sum(7 - place for place in PLACES) / 11


def case(**fields):
    model = Known([ranked(label, place) for label, place in zip(LABELS, PLACES, strict=True)])
    return model, Numbered(LABELS, 8, **fields)


@pytest.mark.parametrize("batch", [1, 4, 11, 500])
def test_counts_and_loss_by_hand_whatever_the_batch(batch):
    found = evaluate(*case(), batch=batch)
    # Four labels stand first, and eight within the first five: the places 0 to 4.
    assert (found.images, found.top1_correct, found.top5_correct) == (11, 4, 8)
    assert found.loss == pytest.approx(LOSS, rel=1e-12)
    assert found.skipped == ()
    assert found.top1_pct == pytest.approx(400 / 11)
    assert found.top5_pct == pytest.approx(800 / 11)


def test_top5_says_nothing_below_six_classes():
    rows = [ranked(0, 0, classes=5), ranked(1, 3, classes=5)]
    found = evaluate(Known(rows), Numbered([0, 1], 5))
    assert (found.top1_correct, found.top5_correct, found.top5_pct, found.top5_interval_pct) == (1, None, None, None)
    assert evaluate(Known([ranked(0, 4, classes=6)]), Numbered([0], 6)).top5_correct == 1
    assert evaluate(Known([[1.0, 0.0], [1.0, 0.0]]), Numbered([0, 1], 2)).top1_correct == 1


def test_a_network_that_always_says_the_same_is_right_once_in_ten():
    found = evaluate(Known([[0.0] * 10] * 10), Numbered(list(range(10)), 10))
    assert (found.top1_correct, found.top5_correct) == (1, 5)
    assert found.loss == pytest.approx(math.log(10), rel=1e-15)


def test_sums_are_float64():
    # A float32 has seven digits.
    count = 50_000
    model, data = Known([[0.0] * 10]), Numbered([3] * count, 10)
    model.forward = lambda images: torch.zeros(len(images), 10)
    assert evaluate(model, data, batch=1000).loss == pytest.approx(math.log(10), rel=1e-13)


def test_everything_is_left_as_it_was_found():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 8))
    model[1].eval()
    model[3].weight.grad = torch.full_like(model[3].weight, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    graphs = []
    model[3].register_forward_hook(lambda _module, _args, output: graphs.append(output.requires_grad))
    _, data = case()
    first, second = evaluate(model, data), evaluate(model, data)
    # Dropout is off, so that it is the same each time.
    assert first == second
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[3].weight.grad, torch.full((8, 1), 2.0))
    assert model[3].bias.grad is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert graphs == [False, False]
    assert torch.is_grad_enabled()


def test_modes_come_back_after_a_failure_too():
    model, data = case(breaks_at=5)
    with pytest.raises(SelabError, match="image 5 cannot be read"):
        evaluate(model, data, batch=2)
    assert model.training


def test_memory_format_and_precision_reach_the_network():
    seen = []

    class Watching(nn.Module):
        def forward(self, images):
            seen.append((images.is_contiguous(memory_format=torch.channels_last), images.is_contiguous()))
            return images.mean((2, 3)) @ torch.ones(2, 8)

    class Images(Numbered):
        def test_batches(self, **asked):
            for images, labels in super().test_batches(**asked):
                yield images.expand(-1, 2, 3, 3).contiguous(), labels

    data = Images(LABELS, 8)
    plain = evaluate(Watching(), data)
    assert evaluate(Watching(), data, channels_last=True) == plain
    assert seen == [(False, True), (True, False)]
    dtypes = []
    model, data = case()
    model.forward = lambda images: dtypes.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype) or torch.zeros(11, 8)
    evaluate(model, data)
    evaluate(model, data, amp="bf16")
    assert dtypes == [torch.float32, torch.bfloat16]


def test_progress_is_told():
    told = []
    evaluate(*case(), batch=4, report=lambda done, of: told.append((done, of)))
    assert told == [(4, 11), (8, 11), (11, 11)]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_no_accuracy(fault):
    model, data = case()
    model.rows[3, 2] = fault
    model.rows[9] = fault
    with pytest.raises(ModelError, match="logits of 2 of 11 images are not finite"):
        evaluate(model, data, batch=4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: torch.zeros(len(images), 10), "Known: has 10 classes, numbered has 8; build it with"),
        (lambda images: torch.zeros(len(images), 8, 1), r"its output is of shape \(11, 8, 1\), not one row of logits"),
        (lambda images: (images,), "its output is of type tuple, not one row"),
        (lambda images: images @ torch.zeros(3, 3), r"Known: forward fails on images of shape \(11, 1, 1, 1\): "),
    ],
)
def test_networks_that_do_not_fit_the_data(answer, message):
    model, data = case()
    model.forward = answer
    with pytest.raises(ModelError, match=message):
        evaluate(model, data)


def test_a_model_elsewhere():
    model, data = case()
    with pytest.raises(DeviceError, match="Known: is on meta, the images go to cpu"):
        evaluate(model.to("meta"), data)


def test_no_test_images():
    with pytest.raises(SelabError, match="numbered: holds no test images"):
        evaluate(Known([[0.0] * 8]), Numbered([], 8))


@pytest.mark.parametrize("told", [10, 12])
def test_every_image_is_counted_once(told):
    model, data = case()
    data.test_size, data.labels = told, torch.tensor([*LABELS, 0])
    data.test_batches = lambda **_: [(torch.arange(11.0).view(-1, 1, 1, 1), data.labels[:11])]
    with pytest.raises(SelabError, match=f"gave 11 test images of {told}"):
        evaluate(model, data)


def test_images_that_cannot_be_decoded_are_named():
    model, data = case()
    data.test_size, data.train_size = 14, 5
    data.test_batches = lambda **_: [(torch.arange(11.0).view(-1, 1, 1, 1), data.labels)]
    data.problems = SimpleNamespace(
        corrupt=SimpleNamespace(first=("train/a/1.jpg", "val/b/2.jpg")),
        truncated=SimpleNamespace(first=("val/a/9.jpg", "val/b/1.jpg")),
        unreadable=4,
    )
    found = evaluate(model, data)
    assert (found.images, found.skipped) == (11, ("val/a/9.jpg", "val/b/1.jpg", "val/b/2.jpg"))


# ------------------------------------------------------------------------------------------------------------ two ranks


def normed(shift):
    """A network whose answers depend on its running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1), nn.Linear(1, 8))
    model[1].running_mean.fill_(shift)
    return model


def as_rank(rank, folder):
    """What each of two processes does; answers go to a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    told = {}
    # Batches of 4 over 11 images: rank 0 gets 2 + 2 + 2, rank 1 gets 2 + 2 + 1. Of one image it gets nothing.
    for count in (11, 1):
        # The wrapper's own forward pass would wait for the rank that has nothing to pass forward.
        model = DistributedDataParallel(normed(3.0))
        model.module[1].running_mean.fill_(3.0 if rank == 0 else 100.0)
        data = Numbered(LABELS[:count], 8)
        found = evaluate(model, data, batch=3)
        told[str(count)] = [found.images, found.top1_correct, found.top5_correct, found.loss]
        told["asked"] = data.asked
        told["running_mean"] = model.module[1].running_mean.item()
        told["training"] = model.training and model.module.training
    for breaks_at in (0, 3):
        try:
            evaluate(normed(3.0), Numbered(LABELS, 8, breaks_at=breaks_at), batch=4)
        except SelabError as error:
            told[f"breaks at {breaks_at}"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    # One that leaves while the other still talks to it, or while a wrapper has the group, may abort.
    del model
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_the_images_and_agree(tmp_path):
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['as_rank'](int(sys.argv[2]), sys.argv[3])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        failures = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], failures
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for count in (11, 1):
        alone = evaluate(normed(3.0), Numbered(LABELS[:count], 8))
        assert told[0][str(count)] == told[1][str(count)]
        assert told[0][str(count)][:3] == [alone.images, alone.top1_correct, alone.top5_correct]
        assert told[0][str(count)][3] == pytest.approx(alone.loss, rel=1e-6)
    assert evaluate(normed(100.0), Numbered(LABELS, 8)).loss != pytest.approx(told[0]["11"][3], rel=1e-3)
    assert [each["running_mean"] for each in told] == [3.0, 100.0]
    assert all(each["training"] for each in told)
    # A batch of 3 cannot be halved: 4 are asked for.
    assert all(each["asked"] == [4] for each in told)
    assert [each["breaks at 0"] for each in told] == ["image 0 cannot be read", "rank 0: image 0 cannot be read"]
    assert [each["breaks at 3"] for each in told] == ["rank 1: image 3 cannot be read", "image 3 cannot be read"]
