"""Batches of image folders: the same bits however they are loaded; bad files are reported."""

import io
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from selab.experiments import compare
from selab.models.spec import read_family
from selab.training import file_images, image_decode
from selab.training.batches import BatchPlan
from selab.training.evaluate import evaluate
from selab.training.image_folder import open_folder
from selab.training.image_listing import FolderError
from selab.training.recipe import ImageRecipe, Recipe, read_image_recipe
from selab.training.train import Options
from selab.training.train import train as train_network

CPU = torch.device("cpu")
NOTHING = SimpleNamespace(crop_pad=0, flip=False, cutout=0)
PLAIN = ImageRecipe(
    train_size=16,
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip=False,
    rotation_deg=0,
    pixel_jitter=0,
    test_resize=16,
    test_crop=16,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


def changed(recipe=PLAIN, **changes):
    return ImageRecipe(**{key: getattr(recipe, key) for key in recipe.__struct_fields__} | changes)


def picture(value, mode="RGB", side=16):
    """The bytes of a JPEG of one grey value, which JPEG keeps exactly."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).convert(mode).save(file, "jpeg", quality=100)
    return file.getvalue()


def fill(root, contents):
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Two workers, however many cores there are; torch warns where there are fewer."""
    monkeypatch.setattr(file_images, "cores", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


def train(data, **changes):
    asked = {"device": CPU, "augmentation": NOTHING}
    asked |= {key: changes.pop(key) for key in list(changes) if key in asked}
    return list(data.train_batches(BatchPlan(**{"batch": 32, "seed": 0, "epoch": 0} | changes), **asked))


def images_of(batches):
    return torch.cat([images for images, _ in batches])


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


# -------------------------------------------------------------------------------------------------------- real images


def test_every_image_of_the_sample(imagenet_sample):
    wnids_file = imagenet_sample / "imagenet_wnids.txt"
    told = []
    data = open_folder(imagenet_sample, name="imagenet", workers=2, report=told.append)
    assert (data.num_classes, data.train_size, data.test_size, data.input_chw) == (1000, 250, 250, (3, 224, 224))
    assert data.title == "ImageNet, 250 training and 250 test images"
    assert told == [
        f"classes are numbered by the 1,000 lines of {wnids_file}; 250 of them have folders",
        "250 training images, 250 test images, 1,000 classes",
    ]
    batches = list(data.test_batches(batch=64, device=CPU))
    assert [tuple(images.shape) for images, _ in batches] == [(64, 3, 224, 224)] * 3 + [(58, 3, 224, 224)]
    wnids = wnids_file.read_text().split()
    assert labels_of(batches) == [wnids.index(path.name) for path in sorted((imagenet_sample / "val").iterdir())]
    images = images_of(batches)
    assert images.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(data.image.mean, data.image.std, strict=True)):
        assert images[:, channel].min() >= -mean / std - 1e-6
        assert images[:, channel].max() <= (1 - mean) / std + 1e-6
        assert abs(images[:, channel].mean()) < 0.2, "the mean that is taken off is that of ImageNet"
    found = data.problems
    assert (found.unreadable, found.cmyk.count, found.other.count) == (0, 0, 0)
    grey = [f"val/{path.parent.name}/{path.name}" for path in imagenet_sample.glob("val/*/*") if mode_of(path) == "L"]
    assert found.grey.first == tuple(sorted(grey))
    assert data.skipped == ()


def test_an_epoch_is_the_same_however_it_is_loaded(imagenet_sample):
    alone = open_folder(imagenet_sample, name="imagenet", workers=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch = train(alone)
    assert len(epoch) == 250 // 32, "the incomplete batch is left out"
    assert images_of(epoch).shape == (224, 3, 224, 224)
    again = train(open_folder(imagenet_sample, name="imagenet", workers=2))
    assert torch.equal(images_of(again), images_of(epoch))
    assert labels_of(again) == labels_of(epoch)
    assert torch.equal(torch.get_rng_state(), before), "the training's own generator is left alone"
    assert len(set(labels_of(epoch))) == 224, "no image twice"


def test_ranks_share_the_batches_of_one_process(imagenet_sample):
    data = open_folder(imagenet_sample, name="imagenet", workers=0)
    whole, parts = train(data), [train(data, rank=rank, world=4) for rank in range(4)]
    for number, (images, labels) in enumerate(whole):
        together = [part[number] for part in parts]
        assert [len(part) for part, _ in together] == [8] * 4
        assert torch.equal(images_of(together), images)
        assert labels_of(together) == labels.tolist()
    wholes = list(data.test_batches(batch=64, device=CPU))
    shares = [list(data.test_batches(batch=64, device=CPU, rank=rank, world=4)) for rank in range(4)]
    # The last batch has 58 = 16 + 16 + 16 + 10.
    assert [[len(images) for images, _ in batches] for batches in shares] == [[16] * 4] * 3 + [[16] * 3 + [10]]
    assert sorted(label for batches in shares for label in labels_of(batches)) == sorted(labels_of(wholes))


def test_a_run_goes_on_anywhere_without_reading_what_was_before(imagenet_sample, monkeypatch):
    data = open_folder(imagenet_sample, name="imagenet", workers=0)
    whole = train(data, epoch=3)
    decoded = []
    plain = image_decode.decode
    monkeypatch.setattr(image_decode, "decode", lambda content: decoded.append(1) or plain(content))
    rest = train(data, epoch=3, first=5)
    assert torch.equal(images_of(rest), images_of(whole[5:]))
    assert len(decoded) == 2 * 32
    assert train(data, first=7) == []


# ------------------------------------------------------------------------------------------------- what is done to them


@pytest.fixture
def one_colour(tmp_path):
    """64 training images of one colour."""
    return fill(
        tmp_path, {f"{split}/a/{n:02}.jpg": picture(128, side=32) for split in ("train", "val") for n in range(64)}
    )


def test_pixel_jitter_is_drawn_for_each_value(one_colour):
    data = open_folder(one_colour, name="folder", image=changed(pixel_jitter=20), workers=0)
    images = images_of(train(data)) * 255
    values, counts = images.round().unique(return_counts=True)
    assert values.tolist() == list(range(108, 149))
    # 49152 values: a forty-first each is 1199, with a deviation of 34.
    assert counts.min() > 1199 - 6 * 34
    assert counts.max() < 1199 + 6 * 34
    assert (images[:, 0] != images[:, 1]).float().mean() > 0.9
    assert len({image.numpy().tobytes() for image in images}) == 64


def test_rotation_is_up_to_ten_degrees_either_way(one_colour):
    data = open_folder(one_colour, name="folder", image=changed(train_size=64, rotation_deg=10), workers=0)
    images = images_of(train(data)) * 255
    assert images[:, :, 32, 32].round().unique().tolist() == [128]
    # The middle of an edge stays; tan(10°) * 32 = 5.6 pixels of its ends become black, on either side of a corner.
    assert images[:, :, 8:-8, 8:-8].min().round() == 128
    black = images[:, 0] < 64
    assert (black[:, 0, 0]).float().mean() > 0.8
    along_top, along_side = black[:, 0, :32].sum(dim=1), black[:, :32, 0].sum(dim=1)
    assert (along_top > along_side).float().mean() > 0.25
    assert (along_side > along_top).float().mean() > 0.25


def test_mirrors_half_and_crops_the_part_asked_for(tmp_path):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "png")
    fill(tmp_path, {f"{split}/a/{n:02}.png": file.getvalue() for split in ("train", "val") for n in range(64)})
    data = open_folder(tmp_path, name="folder", image=changed(flip=True, scale=(0.25, 0.25)), workers=0)
    images = images_of(train(data))[:, 0, 8] * 255
    extent = images[:, -1] - images[:, 0]
    # A quarter of the area is 128 wide; between the middles of the 16 columns lie 15/16 of it.
    assert extent.abs().min() >= 118
    assert extent.abs().max() <= 122
    assert 16 < (extent < 0).sum() < 48, "64 coins: four deviations of 4 around 32"
    assert len(images[:, 0].unique()) > 20, "crops lie anywhere"


def test_epochs_and_seeds_differ(one_colour):
    data = open_folder(one_colour, name="folder", image=changed(pixel_jitter=20), workers=0)
    epochs = [train(data, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({images_of(epoch).numpy().tobytes() for epoch in epochs}) == 3


def test_balanced_epochs(tmp_path):
    sizes = {"a": 12, "b": 4}
    names = {f"train/{kind}/{n:02}.jpg": picture(10 * n) for kind, size in sizes.items() for n in range(size)}
    fill(tmp_path, names | {"val/a/0.jpg": picture(0), "val/b/0.jpg": picture(0)})
    data = open_folder(tmp_path, name="folder", image=changed(balanced=True), workers=0)
    for _, labels in data.train_batches(BatchPlan(batch=4, seed=0, epoch=0), device=CPU, augmentation=NOTHING):
        assert sorted(labels.tolist()) == [0, 0, 1, 1]


# ----------------------------------------------------------------------------------------------------- what is no good

GOOD = picture(200)
PLANTED = {
    "a/1.jpg": GOOD,
    "a/2.jpg": b"no image",
    "b/1.jpg": picture(100)[:-8],
    "b/2.jpg": picture(100),
    "c/1.jpg": picture(50, "L"),
    "c/2.jpg": picture(0, "CMYK"),
}


@pytest.fixture
def planted(tmp_path):
    return fill(
        tmp_path, {f"{split}/{name}": content for split in ("train", "val") for name, content in PLANTED.items()}
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_and_names_what_cannot_be_decoded(planted, workers):
    told = []
    data = open_folder(planted, name="folder", image=PLAIN, workers=workers, report=told.append)
    for _ in range(2):
        batches = list(data.test_batches(batch=2, device=CPU))
        assert labels_of(batches) == [0, 1, 2, 2]
        assert (images_of(batches).mean(dim=(1, 2, 3)) * 255).round().tolist() == [200, 100, 50, 0]
    assert data.skipped == ("val/a/2.jpg", "val/b/1.jpg")
    found = data.problems
    assert (found.corrupt.count, found.corrupt.first) == (1, ("val/a/2.jpg",))
    assert (found.truncated.count, found.truncated.first) == (1, ("val/b/1.jpg",))
    assert (found.grey.first, found.cmyk.first, found.other.count) == (("val/c/1.jpg",), ("val/c/2.jpg",), 0)
    assert found.unreadable == 2
    assert told[2] == "val/a/2.jpg: cannot be decoded: is of no known image format"
    assert told[3].startswith("val/b/1.jpg: cannot be decoded: image file is truncated (")
    assert len(told) == 4, "each file once"


def test_a_batch_of_nothing_is_left_out(tmp_path):
    fill(tmp_path, {"a/1.jpg": b"", "a/2.jpg": b"", "a/3.jpg": GOOD})
    data = open_folder(tmp_path, name="folder", image=PLAIN, workers=0)
    assert [len(labels) for _, labels in data.test_batches(batch=2, device=CPU)] == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_another_image_of_the_class(planted, workers):
    data = open_folder(planted, name="folder", image=PLAIN, workers=workers)
    batches = train(data, batch=6)
    assert sorted(labels_of(batches)) == [0, 0, 1, 1, 2, 2]
    levels = {0: {200}, 1: {100}, 2: {0, 50}}
    for image, label in zip(images_of(batches), labels_of(batches), strict=True):
        assert round(float(image.mean()) * 255) in levels[label]
    assert data.problems.corrupt.first == ("train/a/2.jpg",)
    assert data.skipped == (), "of training images none is left out"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_without_any_good_image_ends_the_training(planted, workers):
    (planted / "train/a/1.jpg").write_bytes(b"no image")
    data = open_folder(planted, name="folder", image=PLAIN, workers=workers)
    with pytest.raises(FolderError, match=r"^train/a: none of its 2 images can be decoded; get them again$"):
        train(data, batch=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_ends_the_run(planted, workers):
    data = open_folder(planted, name="folder", image=PLAIN, workers=workers)
    (planted / "val/b/2.jpg").unlink()
    with pytest.raises(
        FolderError, match=r"^val/b/2\.jpg: cannot be read: No such file or directory; it was there .*n$"
    ):
        list(data.test_batches(batch=2, device=CPU))
    assert not multiprocessing.active_children()


def test_an_epoch_that_is_left_leaves_no_process(planted):
    data = open_folder(planted, name="folder", image=PLAIN, workers=2)
    batches = data.test_batches(batch=2, device=CPU)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


def test_what_is_asked_must_be_possible(planted):
    data = open_folder(planted, name="folder", image=PLAIN, workers=0)
    for changes, message in (
        ({"batch": 7}, "holds 6 training images, less than a batch of 7"),
        ({"batch": 5, "world": 2}, "batch: 5 images cannot be shared by 2 processes"),
        ({"batch": 4, "world": 2, "rank": 2}, "rank: 2; allowed are 0 to 1"),
        ({"batch": 4, "augmentation": SimpleNamespace(crop_pad=4, flip=False, cutout=0)}, "are for images in memory"),
    ):
        with pytest.raises(FolderError, match=message):
            train(data, **changes)
    with pytest.raises(FolderError, match="holds no training images; put them into a folder named train"):
        train(open_folder(planted / "val", name="folder", image=PLAIN, workers=0))
    with pytest.raises(FolderError, match="workers: -1"):
        open_folder(planted, name="folder", workers=-1)


# ------------------------------------------------------------------------------------------------------------- training

FAMILY = """
family = "folder_tiny"
source = "this test"
builder = "folder_tiny_networks:build"
input_chw = [3, 16, 16]
num_classes = 10
[variants.folder_tiny]
title = "Tiny"
"""

NETWORKS = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, num_classes),
    )
"""

RECIPE = Recipe(
    name="folder_tiny",
    title="Tiny",
    source="this test",
    where="above",
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    batch=8,
    epochs=2,
    schedule="cosine",
    image=ImageRecipe(train_size=16, test_resize=24, test_crop=20, std=(1.0, 1.0, 1.0)),
)


class StopError(Exception):
    """What ends a training behind its first epoch."""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "folder_tiny_networks.py").write_text(NETWORKS)
    (tmp_path / "folder_tiny.toml").write_text(FAMILY)
    yield read_family(tmp_path / "folder_tiny.toml")["folder_tiny"]
    sys.modules.pop("folder_tiny_networks", None)


@pytest.fixture
def noisy(tmp_path):
    """Two classes of 20 training images and 12 test images, all different."""
    random = np.random.default_rng(0)
    for split, size in (("train", 20), ("val", 12)):
        for kind in ("a", "b"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for number in range(size):
                pixels = random.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / kind / f"{number:02}.png")
    return tmp_path / "images"


def test_a_training_that_was_stopped_ends_at_the_same_bits(tiny, noisy, tmp_path):
    def run(name, workers, report=lambda state: None):
        data = open_folder(noisy, name="folder", image=RECIPE.image, workers=workers)
        options = Options(threads=1)
        return train_network(tiny, data, RECIPE, seed=0, folder=tmp_path / name, options=options, report=report)

    def stop(state):
        if state.last is not None:
            raise StopError

    whole = run("whole", workers=2)
    with pytest.raises(StopError):
        run("stopped", workers=2, report=stop)
    again = run("stopped", workers=0)
    assert [epoch.train_loss for epoch in again.epochs] == [epoch.train_loss for epoch in whole.epochs]
    theirs, ours = load_file(whole.weights), load_file(again.weights)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert again.test == whole.test

    # Evaluated anew, and alone, as the weights themselves say that the images were prepared.
    own = read_image_recipe(Path(whole.weights))
    assert own == RECIPE.image
    data = open_folder(noisy / "val", name="folder", image=own, workers=0)
    assert data.input_chw == (3, 20, 20)
    assert evaluate(compare.loaded(tiny, data, Path(whole.weights)), data, batch=4 * 8) == whole.test
