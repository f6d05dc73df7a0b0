"""Batches and augmentation that follow from (seed, epoch, number) alone, held against loops; data sets by name."""

import re
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from selab.errors import SelabError, UnknownNameError
from selab.training import augment, synthetic
from selab.training.batches import BatchPlan
from selab.training.data import Augmentation, ImageSet, open_data, scaled, synthetic_set
from selab.training.recipe import ImageRecipe

CPU = torch.device("cpu")
ALL = Augmentation(crop_pad=4, flip=True, cutout=16)


# ----------------------------------------------------------------------------------------------------- batches in order


@pytest.fixture(scope="module")
def numbered():
    """101 training and 23 test images; each label is the number of its image."""
    pixels = torch.randint(0, 256, (124, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(
        name="numbered",
        title="numbered",
        sha256="",
        official=False,
        num_classes=124,
        train_images=pixels[:101],
        train_labels=torch.arange(101),
        test_images=pixels[101:],
        test_labels=torch.arange(23),
        mean=(125.0, 123.0, 114.0),
        std=(63.0, 62.0, 67.0),
    )


def batches(data, *, batch=8, seed=1, epoch=0, device=CPU, augmentation=ALL, **share):
    plan = BatchPlan(batch=batch, seed=seed, epoch=epoch, **share)
    return data.train_batches(plan, device=device, augmentation=augmentation)


def labels_of(found):
    return torch.cat([labels for _, labels in found]).tolist()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_are_normalised_floats_and_whole_labels(numbered):
    images, labels = next(batches(numbered, augmentation=Augmentation()))
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((8,), torch.int64)
    mean, std = (torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (numbered.mean, numbered.std))
    expected = (numbered.train_images[labels].double() - mean) / std
    assert torch.allclose(images.double(), expected, rtol=0, atol=1e-6)


def test_an_epoch_shows_each_image_once_but_for_the_last_incomplete_batch(numbered):
    shown = labels_of(batches(numbered))
    assert len(shown) == 96  # 12 batches of 8 of 101
    assert len(set(shown)) == 96
    assert sorted(labels_of(batches(numbered, batch=101))) == list(range(101))


def test_order_is_that_of_seed_and_epoch(numbered):
    orders = {tuple(labels_of(batches(numbered, seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert labels_of(batches(numbered, seed=2, epoch=1)) == labels_of(batches(numbered, seed=2, epoch=1))


def test_batches_depend_on_nothing_that_was_drawn_before(numbered):
    whole = list(batches(numbered))
    assert_same(list(batches(numbered, first=7)), whole[7:])
    assert list(batches(numbered, first=12)) == []
    one, other = batches(numbered), batches(numbered, seed=5)
    mixed = []
    for found in one:
        mixed.append(found)
        next(other, None)
        torch.rand(3)
    assert_same(mixed, whole)


def test_nothing_is_drawn_from_the_callers_generator(numbered):
    before = torch.get_rng_state()
    list(batches(numbered))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_have_the_batches_of_one(numbered, world):
    parts = [list(batches(numbered, rank=rank, world=world)) for rank in range(world)]
    together = [
        (torch.cat([images for images, _ in ranks]), torch.cat([labels for _, labels in ranks]))
        for ranks in zip(*parts, strict=True)
    ]
    assert_same(together, list(batches(numbered)))
    assert {len(labels) for part in parts for _, labels in part} == {8 // world}


def test_threads_do_not_change_a_bit(numbered):
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(list(batches(numbered, batch=96)))
    torch.set_num_threads(threads)
    assert_same(*found)


@pytest.mark.parametrize("batch", [1, 4, 8, 23, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_test_image_is_dropped_or_doubled(numbered, batch, world):
    batch *= world
    parts = [list(numbered.test_batches(batch=batch, device=CPU, rank=rank, world=world)) for rank in range(world)]
    assert sorted(label for part in parts for label in labels_of(part or [(None, torch.empty(0))])) == list(range(23))
    for part in parts:
        for images, labels in part:
            assert 1 <= len(labels) <= batch // world
            mean, std = (torch.tensor(one).view(3, 1, 1) for one in (numbered.mean, numbered.std))
            assert torch.allclose(images, (numbered.test_images[labels] - mean) / std, rtol=0, atol=1e-6)


def test_batches_are_the_callers_to_change(numbered):
    for images, labels in numbered.test_batches(batch=23, device=CPU):
        images.zero_()
        labels.zero_()
    for images, labels in batches(numbered):
        images.zero_()
        labels.zero_()
    assert labels_of(numbered.test_batches(batch=23, device=CPU)) == list(range(23))
    assert sorted(labels_of(batches(numbered, batch=101))) == list(range(101))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"batch": 9, "world": 2}, "batch: 9 images cannot be shared by 2 processes; give a multiple of 2"),
        ({"batch": 0}, "batch: 0 images"),
        ({"rank": 2, "world": 2}, "rank: 2; allowed are 0 to 1"),
        ({"batch": 102}, "numbered: has 101 training images; a batch of 102 needs more"),
        ({"seed": -1}, "seed: -1; allowed are 0 to"),
    ],
)
def test_impossible_batches_are_refused_at_once(numbered, asked, told):
    with pytest.raises(SelabError, match=re.escape(told)):
        batches(numbered, **asked)
    if not {"seed"} & set(asked) and asked.get("batch") != 102:
        with pytest.raises(SelabError, match=re.escape(told)):
            numbered.test_batches(**{"batch": 8, "device": CPU, **asked})


# --------------------------------------------------------------------------------------------------------- augmentation


def decide(size=64, augmentation=ALL, **changed):
    asked = {"size": size, "input_hw": (32, 32), "seed": 1, "epoch": 2, "number": 3, **changed}
    return augment.decide(augmentation, **asked)


@pytest.mark.parametrize("fill", ["black", "edge"])
@pytest.mark.parametrize("pad", [1, 4, 7])
def test_crop_is_a_window_of_the_image_with_black_or_its_edge_around_it(pad, fill):
    images = torch.randint(1, 256, (64, 3, 20, 32), dtype=torch.uint8)
    top, left = decide(augmentation=Augmentation(crop_pad=pad))[:, :2].unbind(1)
    found = augment.crop(images, top, left, pad=pad, fill=fill).numpy()
    for image, y, x, one in zip(images.numpy(), top.tolist(), left.tolist(), found, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge" if fill == "edge" else "constant")
        assert np.array_equal(one, padded[:, y : y + 20, x : x + 32])


def test_flip_mirrors_some():
    images = torch.randint(0, 256, (64, 3, 20, 32), dtype=torch.uint8)
    mirrored = decide()[:, 2]
    found = augment.flip(images, mirrored).numpy()
    for image, mirror, one in zip(images.numpy(), mirrored.tolist(), found, strict=True):
        assert np.array_equal(one, image[:, :, ::-1] if mirror else image)


@pytest.mark.parametrize("side", [1, 8, 15, 16, 80])
def test_hole_is_a_square_that_may_stick_out(side):
    row, column = decide()[:, 3:].unbind(1)
    found = augment.cut(torch.ones(64, 3, 32, 32), row, column, side=side)
    for y, x, one in zip(row.tolist(), column.tolist(), found, strict=True):
        expected = torch.ones(3, 32, 32)
        y, x = y - side // 2, x - side // 2
        expected[:, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = 0
        assert torch.equal(one, expected)


def test_images_of_a_recipe_may_lie_between_zero_and_one(numbered):
    unit = scaled(numbered, "unit")
    cpu = torch.device("cpu")
    found, labels = next(unit.test_batches(batch=8, device=cpu))
    assert torch.equal(labels, numbered.test_labels[:8])
    torch.testing.assert_close(found, numbered.test_images[:8] / 255)
    images, _ = next(batches(unit, augmentation=Augmentation()))
    assert images.min() >= 0
    assert images.max() <= 1
    assert scaled(numbered, "channel") is numbered
    other = object()
    assert scaled(other, "unit") is other


def test_all_together_in_the_order_of_the_recipes(numbered):
    images, labels = next(batches(numbered, seed=1, epoch=2, augmentation=ALL))
    top, left, mirrored, row, column = decide(8, number=0).unbind(1)
    expected = augment.crop(numbered.train_images[labels], top, left, pad=4)
    expected = augment.flip(expected, mirrored)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (numbered.mean, numbered.std))
    expected = augment.cut(augment.normalise(expected, mean, std), row, column, side=16)
    assert torch.equal(images, expected)


def test_decisions_cover_all_that_is_allowed_equally():
    decided = decide(90_000)
    for column, choices in enumerate((9, 9, 2, 32, 32)):
        counts = decided[:, column].bincount(minlength=choices).double()
        assert len(counts) == choices
        expected = 90_000 / choices
        # Each count is binomial: within five of its standard deviations.
        assert (counts - expected).abs().max() < 5 * (expected * (1 - 1 / choices)) ** 0.5


def test_columns_and_neighbours_have_nothing_to_do_with_each_other():
    decided = [decide(10_000, **changed) for changed in ({}, {"seed": 2}, {"epoch": 3}, {"number": 4})]
    columns = torch.cat([one.double() for one in decided], 1).T
    correlation = columns.corrcoef() - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / 10_000**0.5


def test_decisions_do_not_depend_on_what_is_wanted():
    assert torch.equal(decide(augmentation=ALL), decide(augmentation=Augmentation(crop_pad=4)))


@pytest.mark.parametrize("name", ["crop_pad", "cutout"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(SelabError, match=f"{name}: -1; allowed are 0"):
        Augmentation(**{name: -1})


def philox(counter, key):
    """Philox 4x64 with 10 rounds, as its authors define it: four words of four words and two."""
    mask = 2**64 - 1
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 64) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_random_words_are_those_of_the_published_generator():
    # Source: Random123's known answers, philox4x64 10, all zeros.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([0] * 4, [0, 0]) == known
    expected = philox([1, 5, 3, 0], [7, 2]) + philox([2, 5, 3, 0], [7, 2])
    assert augment.words(8, purpose=2, seed=7, epoch=3, number=5).tolist() == expected


@pytest.mark.cuda
def test_gpu_has_the_same_batches_to_the_bit(numbered):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda")
    found = [(images.cpu(), labels.cpu()) for images, labels in batches(numbered, device=device)]
    assert_same(found, list(batches(numbered)))
    found = [(images.cpu(), labels.cpu()) for images, labels in numbered.test_batches(batch=8, device=device)]
    assert_same(found, list(numbered.test_batches(batch=8, device=CPU)))


# ------------------------------------------------------------------------------------------------------------ synthetic


def test_synthetic_images_are_those_of_the_seed():
    data, again, other = (synthetic_set(train_size=30, test_size=20, seed=seed) for seed in (1, 1, 2))
    assert (data.name, data.official, data.num_classes, data.input_chw) == ("synthetic", False, 10, (3, 32, 32))
    assert (data.train_size, data.test_size) == (30, 20)
    assert data.sha256 == again.sha256 != other.sha256
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images[:20], data.test_images)


def test_larger_synthetic_set_begins_with_the_smaller_one():
    small, _ = synthetic.make(train_size=1200, test_size=0, seed=0)
    large, _ = synthetic.make(train_size=2100, test_size=0, seed=0)
    assert np.array_equal(large.images[:1200], small.images)
    assert np.array_equal(large.labels[:1200], small.labels)
    assert np.bincount(large.labels, minlength=10).min() > 2100 / 10 - 5 * (2100 * 0.09) ** 0.5


def test_synthetic_images_are_learned_by_a_small_network():
    data = synthetic_set(train_size=3000, test_size=500)
    torch.manual_seed(0)
    layers = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in islice(batches(data, batch=64, augmentation=Augmentation()), 40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test_batches(batch=250, device=CPU))
    assert right / 500 > 0.5  # chance: 0.1


# -------------------------------------------------------------------------------------------------------------- opening


def test_synthetic_is_opened_by_name(tmp_path):
    assert open_data("synthetic", data_dir=tmp_path / "none").train_size == 10_000


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_folders_are_opened_by_their_own_module(tmp_path, monkeypatch, name):
    module = SimpleNamespace(open_folder=lambda data_dir, **asked: (data_dir, asked))
    monkeypatch.setitem(sys.modules, "selab.training.image_folder", module)
    image = ImageRecipe(train_size=160)
    asked = {"image": image, "workers": 3, "classes_file": tmp_path / "list.txt", "report": print}
    assert open_data(name, data_dir=tmp_path, **asked) == (tmp_path, {"name": name, **asked})


def test_a_set_in_memory_numbers_its_classes_itself(tmp_path):
    with pytest.raises(SelabError, match=r"--classes-file list\.txt: is for image folders; synthetic numbers"):
        open_data("synthetic", data_dir=tmp_path, classes_file=Path("list.txt"))


def test_folder_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
    for name in ("image_folder", "image_decode"):
        monkeypatch.delitem(sys.modules, f"selab.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SelabError, match=r"imagenet: pillow is not installed; pip install 'selab\[imagenet\]'"):
        open_data("imagenet", data_dir=tmp_path)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="cifar-10: no such data set; did you mean cifar10, cifar100"):
        open_data("cifar-10", data_dir=Path())
