"""Images with boxes as data, and detectors that are trained and tested on them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pycocotools", reason="average precision needs pycocotools or faster-coco-eval")

from selab.errors import ModelError, SelabError
from selab.experiments.compare import loaded
from selab.models import catalog
from selab.models.build import build
from selab.training.batches import BatchPlan
from selab.training.coco import grouped_order, open_coco
from selab.training.evaluate import check_network, evaluate
from selab.training.image_listing import FolderError
from selab.training.recipe import BoxRecipe, adapted, find_recipe, read_box_recipe
from selab.training.record import Options
from selab.training.shapes import write_shapes
from selab.training.train import TrainingError, train

CPU = torch.device("cpu")
NOTHING = SimpleNamespace(crop_pad=0, flip=False, cutout=0)
PLAIN = BoxRecipe(min_size=128, max_size=128, flip=False, frozen_stages=0, frozen_norms=False)

# A detector of one's own, without torchvision: a box and the logits of the classes for each of 8 x 8 cells.
DETECTOR = """
import torch
import torch.nn.functional as F
from torch import nn

class Cells(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        widths = (3, 8, 16, 32, 32)
        layers = []
        for less, more in zip(widths, widths[1:]):
            layers += [nn.Conv2d(less, more, 3, stride=2, padding=1), nn.BatchNorm2d(more), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(32, num_classes + 4, 1)

    def forward(self, images, targets=None):
        maps = self.head(self.body(torch.stack(list(images))))
        logits, sides = maps[:, 4:], maps[:, :4].exp().clamp(max=100) * 16
        side = logits.shape[-1]
        centre = (torch.arange(side, device=maps.device) + 0.5) * 16
        x, y = centre[None, :].expand(side, side), centre[:, None].expand(side, side)
        boxes = torch.stack([x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]], dim=-1)
        if self.training:
            return self.losses(logits, boxes, targets)
        scores, labels = logits.softmax(1)[:, 1:].max(1)
        return [
            {"boxes": b.reshape(-1, 4), "labels": n.reshape(-1) + 1, "scores": s.reshape(-1)}
            for b, n, s in zip(boxes, labels, scores)
        ]

    def losses(self, logits, boxes, targets):
        wanted = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.int64, device=logits.device)
        distance = logits.sum() * 0
        for number, one in enumerate(targets):
            for box, label in zip(one["boxes"], one["labels"]):
                column, row = (int(v // 16) for v in ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
                wanted[number, min(row, 7), min(column, 7)] = label
                distance = distance + F.smooth_l1_loss(boxes[number, min(row, 7), min(column, 7)], box) / 16
        return {"class": F.cross_entropy(logits, wanted), "box": distance / len(targets)}

def cells(num_classes=4):
    return Cells(num_classes)

def classifier(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, num_classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("coco") / "shapes", train_size=20, val_size=7)


@pytest.fixture
def data(folder):
    return open_coco(folder, name="coco", boxes=PLAIN, workers=0)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    file = tmp_path_factory.mktemp("network") / "cells.py"
    file.write_text(DETECTOR)
    return file


RECIPE = msgspec.structs.replace(
    find_recipe("shapes"), name="cells", lr=0.01, boxes=PLAIN, epochs=2, warmup_epochs=0.0, warmup_lr=0.0
)
OPTIONS = Options(threads=1, checkpoint_s=0.0)


def trained(data, detector, folder, *, recipe=RECIPE, options=OPTIONS, report=lambda _: None, name="cells"):
    variant = catalog.find(f"{detector}:{name}")
    return train(variant, data, recipe, seed=0, folder=folder, options=options, report=report)


# ---------------------------------------------------------------------------------------------------------------- data
def test_batches_are_tall_or_wide_and_hold_each_image_once():
    sizes = np.array([(480, 640)] * 21 + [(640, 480)] * 13)
    order = grouped_order(sizes, batch=4, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(34))
    tall = sizes[order[:32], 0].reshape(-1, 4) == 640
    # 5 wide and 3 tall batches are full of one kind; what is left, one of each, is in none.
    assert sorted(tall.sum(1).tolist()) == [0] * 5 + [4] * 3
    others = [
        grouped_order(sizes, batch=4, seed=seed, epoch=epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert others[0] == order.tolist()
    assert others[1] != others[0] != others[2]
    # Three wide and three tall images are left over: they share a batch.
    assert len(grouped_order(sizes[3:31], batch=4, seed=0, epoch=0)) == 28


def test_boxes_follow_the_mirrored_image(folder):
    flipped = open_coco(folder, name="coco", boxes=msgspec.structs.replace(PLAIN, flip=True), workers=0)
    plain = open_coco(folder, name="coco", boxes=PLAIN, workers=0)
    asked = BatchPlan(batch=20, seed=0, epoch=0)
    ((pixels, targets),) = flipped.train_batches(asked, device=CPU, augmentation=NOTHING)
    ((others, unchanged),) = plain.train_batches(asked, device=CPU, augmentation=NOTHING)
    mirrored = 0
    for one, other, boxes, before in zip(pixels, others, targets, unchanged, strict=True):
        assert (one.dtype, one.shape, float(one.max()) <= 1) == (torch.float32, (3, 128, 128), True)
        assert torch.equal(boxes["labels"], before["labels"])
        if torch.equal(one, other):
            assert torch.equal(boxes["boxes"], before["boxes"])
        else:
            mirrored += 1
            assert torch.equal(one.flip(2), other)
            x1, y1, x2, y2 = before["boxes"].unbind(1)
            assert torch.equal(boxes["boxes"], torch.stack([128 - x2, y1, 128 - x1, y2], dim=1))
    assert 4 <= mirrored <= 16


def test_ranks_workers_and_resumed_runs_see_the_same_images(folder, data):
    def seen(one, **plan):
        plan = BatchPlan(batch=4, seed=3, epoch=1, **plan)
        found = one.train_batches(plan, device=CPU, augmentation=NOTHING)
        return [pixels for batch, _ in found for pixels in batch]

    whole = seen(data)
    assert len(whole) == 20
    assert all(map(torch.equal, whole[8:], seen(data, first=2)))
    halves = [seen(data, rank=rank, world=2) for rank in (0, 1)]
    joined = [one for start in range(0, 10, 2) for half in halves for one in half[start : start + 2]]
    assert all(map(torch.equal, whole, joined))
    assert all(map(torch.equal, whole, seen(open_coco(folder, name="coco", boxes=PLAIN, workers=1))))


def test_what_cannot_be_decoded_is_replaced_in_training_and_left_out_of_tests(tmp_path):
    root = write_shapes(tmp_path / "shapes", train_size=8, val_size=4)
    for name in ("train/000002.bmp", "val/000001.bmp"):
        (root / name).write_bytes(b"no image")
    # An image that has another size than its annotations say has its boxes somewhere else.
    (root / "val/000003.bmp").write_bytes((root / "train/000001.bmp").read_bytes())
    annotations = json.loads((root / "annotations/instances_val.json").read_text())
    annotations["images"][3]["width"] = 64
    (root / "annotations/instances_val.json").write_text(json.dumps(annotations))
    told = []
    data = open_coco(root, name="coco", boxes=PLAIN, workers=0, report=told.append)
    plan = BatchPlan(batch=8, seed=0, epoch=0)
    ((images, _),) = data.train_batches(plan, device=CPU, augmentation=NOTHING)
    assert len(images) == 8
    kept = [int(index) for _, indices in data.test_batches(batch=2, device=CPU) for index in indices]
    assert kept == [0, 2]
    assert data.skipped == ("val/000001.bmp", "val/000003.bmp")
    assert data.problems.unreadable == 3
    assert "val/000003.bmp: cannot be used: has 128 x 128 pixels, its annotations 64 x 128" in told
    assert any(sentence.startswith("train/000002.bmp: cannot be decoded: is of no known") for sentence in told)


def test_a_part_is_held_back_for_tuning(data):
    held = data.held_out(0.2)
    assert (held.train_size, held.test_size, held.judged) == (16, 4, "held-back")
    assert held.sha256 != data.sha256
    assert len(held.truth.boxes) == held.truth.starts[-1] > 0


def test_shapes_are_made_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "selab.training.shapes.write_shapes", lambda folder: write_shapes(folder, train_size=4, val_size=2)
    )
    told = []
    made = open_coco(tmp_path, name="shapes", workers=0, report=told.append)
    assert told == [f"{tmp_path / 'shapes'}: written", "4 training images, 2 test images, 3 categories"]
    again = open_coco(tmp_path, name="shapes", workers=0)
    assert (made.sha256, made.title, made.num_classes) == (again.sha256, "shapes", 4)


# ------------------------------------------------------------------------------------------------------------ training
def test_a_detector_of_ones_own_is_trained_and_resumes_to_the_bit(data, detector, tmp_path):
    class StopError(Exception):
        pass

    def stop(state):
        if (state.epoch, state.step) == (2, 2):
            raise StopError

    whole = trained(data, detector, tmp_path / "whole")
    assert whole.test.precision is not None
    assert (whole.test.images, whole.test.top1_correct, whole.test.loss) == (7, None, None)
    assert [epoch.test_ap_pct for epoch in whole.epochs][-1] == whole.test.precision.ap_pct
    assert whole.epochs[1].train_loss < whole.epochs[0].train_loss
    assert whole.epochs[0].train_top1_pct is None
    assert "AP" in whole.epochs[0].score_words
    with pytest.raises(StopError):
        trained(data, detector, tmp_path / "parts", report=stop)
    resumed = trained(data, detector, tmp_path / "parts")
    ours, theirs = (load_file(one.weights) for one in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.test == whole.test


def test_micro_batches_add_up(data, detector, tmp_path):
    recipe = msgspec.structs.replace(RECIPE, epochs=1, clip_norm=None)
    whole = trained(data, detector, tmp_path / "one", recipe=recipe)
    split = trained(
        data, detector, tmp_path / "two", recipe=recipe, options=msgspec.structs.replace(OPTIONS, accumulate=2)
    )
    # Batch norm sees parts of a batch.
    assert split.epochs[0].train_loss == pytest.approx(whole.epochs[0].train_loss, rel=0.2)


def test_gradients_are_clipped(data, detector, tmp_path):
    recipe = msgspec.structs.replace(RECIPE, epochs=1, clip_norm=1e-6, momentum=0.0, weight_decay=0.0)
    done = trained(data, detector, tmp_path / "run", recipe=recipe)
    before = catalog.find(f"{detector}:cells")
    start = build(msgspec.structs.replace(before, num_classes=4), seed=0).model
    moved = [float((load_file(done.weights)[key] - value.detach()).norm()) for key, value in start.named_parameters()]
    # Five steps, each at most lr times the norm.
    assert 0 < sum(one**2 for one in moved) ** 0.5 <= 5 * recipe.lr * 1e-6 * 1.01


def test_weights_are_tested_as_they_were_trained(data, detector, tmp_path):
    done = trained(data, detector, tmp_path / "run")
    variant = catalog.find(f"{detector}:cells")

    assert read_box_recipe(Path(done.weights)) == PLAIN
    found = evaluate(loaded(variant, data, Path(done.weights)), data, batch=2)
    assert found == done.test


def test_networks_that_are_no_detectors_are_refused(data, detector, tmp_path):
    with pytest.raises(
        ModelError, match=r"classifier: fails with images and boxes: .*a detector returns a dictionary of losses"
    ):
        trained(data, detector, tmp_path / "run", name="classifier")
    model = torch.nn.Identity()
    with pytest.raises(ModelError, match="returned a list, not boxes, labels, scores of each image"):
        check_network(model, data)
    with pytest.raises(TrainingError, match="--compile: detectors choose boxes by their scores"):
        trained(data, detector, tmp_path / "b", options=msgspec.structs.replace(OPTIONS, compiled=True))


def test_random_weights_are_not_frozen(data, detector, tmp_path):
    with pytest.raises(TrainingError, match=r"cells: coco_1x keeps parts of the backbone.*compare --weights NAME=FILE"):
        trained(data, detector, tmp_path / "run", recipe=adapted(find_recipe("coco_1x"), batch=4))


def test_what_training_needs(tmp_path, detector):
    root = write_shapes(tmp_path / "shapes", train_size=4, val_size=2)
    (root / "train").rename(root / "elsewhere")
    data = open_coco(root, name="coco", boxes=PLAIN, workers=0)
    with pytest.raises(SelabError, match="holds no training images"):
        trained(data, detector, tmp_path / "run")
    with pytest.raises(FolderError, match="holds no training images; put annotations/"):
        next(data.train_batches(BatchPlan(batch=2, seed=0, epoch=0), device=CPU, augmentation=NOTHING))


# ------------------------------------------------------------------------------------------------------------ commands
def in_two(*words, cwd):
    """Runs the program in two processes."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    head += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "selab"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*head, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


RECIPES = """
[recipes.cells]
title = "For this test"
source = "this test"
where = "above"
lr = 0.01
weight_decay = 0
batch = 4
epochs = 1
schedule = "constant"
boxes = { min_size = 128, max_size = 128, frozen_stages = 0, frozen_norms = false }
"""


@pytest.fixture
def place(folder, detector, tmp_path, monkeypatch):
    """The folder in which commands run, with two networks and a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells.py").write_text(detector.read_text())
    (tmp_path / "recipes.toml").write_text(RECIPES)
    (tmp_path / "shapes").symlink_to(folder)
    return tmp_path


COMMON = ("--data", "coco", "--data-dir", "shapes", "--workers", 0, "--threads", 1)


def test_two_networks_are_compared_by_their_average_precision(place, selab):
    words = ("cells.py:cells", "cells.py:cells+sites=body.11,reduction=4", "--recipe", "recipes.toml", "--no-latency")
    status, out, error = selab("compare", *words, *COMMON, "--seeds", 2, "--jobs", 2)
    assert status == 0, error
    assert "AP at 0.50" in out
    assert "top-1" not in out
    (file,) = (place / "results").glob("*/accuracy/*.json")
    record = json.loads(file.read_text())
    assert record["data"]["task"] == "detection"
    assert all(one["baseline"]["test"]["precision"]["ap_pct"] >= 0 for one in record["seeds"])
    table = ("table", "accuracy", "--profiles", file.parents[1])
    for command in (table, ("plot", "curves", "--record", file, "--out", "curves.svg")):
        status, _, error = selab(*command)
        assert status == 0, error


def test_train_and_eval_say_the_average_precision(place, selab):
    status, out, error = selab("train", "--arch", "cells.py:cells", "--recipe", "recipes.toml", *COMMON)
    assert status == 0, error
    assert "cells.py:cells: AP " in out
    (weights,) = (place / "results/runs").glob("*/weights.safetensors")
    words = ("eval", "--arch", "cells.py:cells", "--weights", weights, *COMMON[:-2])
    status, out, error = selab(*words)
    assert status == 0, error
    assert "images: shorter side 128, longer side up to 128 (as trained)" in out
    assert "AP at 0.75" in out
    _, out, _ = selab(*words, "--json", "-")
    assert json.loads(out)["precision"]["ap50_pct"] >= 0


def test_two_processes_train_and_test_what_one_does(place, selab):
    words = ("train", "--arch", "cells.py:cells", "--recipe", "recipes.toml", *COMMON)
    status, _, error = selab(*words, "--out", "one", "--json", "one.json")
    assert status == 0, error
    both = in_two(*words, "--out", "two", "--json", "two.json", cwd=place)
    assert both.returncode == 0, both.stderr
    one, two = (json.loads((place / name).read_text()) for name in ("one.json", "two.json"))
    assert two["world"] == 2
    assert two["test"]["images"] == 7
    # Batch norm takes its statistics over each process's part.
    assert two["epochs"][0]["train_loss"] == pytest.approx(one["epochs"][0]["train_loss"], rel=0.2)


PAIR = ("compare", "cells.py:cells", "cells.py:cells+sites=body.11", "--recipe", "recipes.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--arch", "resnet18"), "resnet18 is none; on it as the backbone: faster_rcnn_resnet18_fpn"),
        (("train", "--arch", "cells.py:cells", "--recipe", "cifar_short"), "is for classifiers; for images with boxes"),
        ((*PAIR, "--equal-time"), "leave it out for detectors"),
        ((*PAIR, "--weights", "x=y"), "must be NAME=FILE"),
        (
            ("gates", "--arch", "se_small_cnn", "--weights", "w.safetensors"),
            "only train, eval and compare take detectors",
        ),
    ],
)
def test_what_does_not_go_together(place, selab, words, message):
    (place / "w.safetensors").write_bytes(b"")
    status, _, error = selab(*words, *(COMMON if words[0] != "gates" else COMMON[:4]))
    assert status != 0
    assert message in " ".join(error.split())
    assert "Traceback" not in error


@pytest.mark.usefixtures("place")
def test_a_comparison_is_refused_before_anything_is_trained(selab):
    words = ("--recipe", "coco_1x", "--batch", 4)
    status, _, error = selab("compare", "cells.py:cells", "cells.py:cells+sites=body.11", *words, *COMMON)
    assert status != 0
    assert "cells.py:cells: coco_1x keeps parts of the backbone as they are" in " ".join(error.split())
    assert "training 1 of" not in error


def test_weights_of_a_backbone_are_for_every_network_on_it():
    from selab.cli.comparing import _weights_of

    names = ("faster_rcnn_resnet18_fpn", "retinanet_resnet18_fpn", "faster_rcnn_se_resnet18_fpn")
    one, other, se = map(catalog.find, names)
    found = _weights_of(["resnet18=a", f"{se.name}=b"], [(other, one), (se, one)])
    assert found == {one.name: Path("a"), other.name: Path("a"), se.name: Path("b")}
