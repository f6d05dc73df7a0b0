"""Training images that are held back to choose by."""

import numpy as np
import pytest
import torch
from tiny_training import images

from selab.errors import SelabError
from selab.training.data import synthetic_set
from selab.training.holdout import split
from selab.training.image_folder import open_folder

LABELS = np.array([0] * 50 + [1] * 30 + [2] * 2 + [3])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.01, 0.99])
def test_every_image_is_on_one_side_and_every_class_trains(share):
    trains, held = split(LABELS, share, title="toy")
    assert sorted([*trains, *held]) == list(range(len(LABELS)))
    assert set(LABELS[trains]) == {0, 1, 2, 3}
    # At least one image of each class that has two.
    assert set(LABELS[held]) == {0, 1, 2}
    again = split(LABELS, share, title="toy")
    assert all(np.array_equal(one, other) for one, other in zip((trains, held), again, strict=True))


def test_of_each_class_the_share():
    _, held = split(LABELS, 0.1, title="toy")
    assert [int((LABELS[held] == label).sum()) for label in range(4)] == [5, 3, 1, 0]


def test_a_class_of_one_image_each_holds_nothing_back():
    with pytest.raises(SelabError, match="toy: no class has two training images"):
        split(np.arange(5), 0.1, title="toy")


def test_a_set_in_memory_is_divided_and_its_test_images_are_not_touched():
    whole = images()
    part = whole.held_out(0.1)
    assert part.train_size + part.test_size == whole.train_size
    assert part.num_classes == whole.num_classes
    assert part.sha256 != whole.sha256
    assert not part.official
    every = {one.numpy().tobytes() for one in whole.train_images}
    assert {one.numpy().tobytes() for one in (*part.train_images, *part.test_images)} == every
    trains = {one.numpy().tobytes() for one in part.train_images}
    assert not trains & {one.numpy().tobytes() for one in part.test_images}
    # A part is a set like any other, and moves to a device on its own.
    ((batch, labels),) = part.test_batches(batch=part.test_size, device=torch.device("cpu"))
    assert torch.equal(labels, part.test_labels.to(torch.int64))
    assert len(batch) == part.test_size


def test_another_share_is_another_set():
    whole = synthetic_set(train_size=100, test_size=10)
    assert whole.held_out(0.1).sha256 != whole.held_out(0.2).sha256
    assert whole.held_out(0.1).sha256 == whole.held_out(0.1).sha256


def test_a_folder_is_divided(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for kind, number in (("train", 10), ("val", 3)):
        for label in ("a", "b"):
            folder = tmp_path / kind / label
            folder.mkdir(parents=True)
            for place in range(number):
                image.new("RGB", (8, 8), (place * 20, 0, 0)).save(folder / f"{place}.png")
    whole = open_folder(tmp_path, name="folder", workers=0)
    part = whole.held_out(0.2)
    assert (part.train_size, part.test_size) == (16, 4)
    assert part.classes == whole.classes
    labels = torch.cat([labels for _, labels in part.test_batches(batch=3, device=torch.device("cpu"))])
    assert labels.tolist() == [0, 0, 1, 1]
    assert part.sha256 != whole.sha256


def test_a_folder_without_training_images_cannot_be_divided(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "val" / "a").mkdir(parents=True)
    image.new("RGB", (8, 8)).save(tmp_path / "val" / "a" / "x.png")
    with pytest.raises(SelabError, match="there is no folder train beside it"):
        open_folder(tmp_path, name="folder", workers=0).held_out(0.1)
