"""A folder of images as input."""

import numpy as np
import pytest
import torch

from selab.errors import SelabError
from selab.experiments.images import batches, read_images

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def save(path, colour, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_images_of_all_folders_normalised(tmp_path):
    save(tmp_path / "b" / "red.png", (255, 0, 0))
    save(tmp_path / "a.png", (0, 0, 0))
    black, red = read_images(tmp_path, (3, 16, 24), 8)
    assert black.shape == red.shape == (1, 3, 16, 24)
    assert black.dtype == torch.float32
    np.testing.assert_allclose(black[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)
    np.testing.assert_allclose(red[0, 0], (1 - 0.485) / 0.229, rtol=1e-6)


def test_they_are_spread_over_the_folder(tmp_path):
    for place in range(10):
        save(tmp_path / f"{place}.png", (place, place, place))
    found = read_images(tmp_path, (3, 8, 8), 5)
    values = [round(float(one[0, 0, 0, 0]) * 0.229 * 255 + 0.485 * 255) for one in found]
    assert values == [0, 2, 4, 6, 8]


def test_the_middle_of_the_image(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    # Of 64 pixels the outer 4 on each side are cut off.
    pixels[:3] = pixels[-3:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (found,) = read_images(tmp_path, (3, 56, 56), 1)
    assert float(found.max()) < 0


def test_a_broken_image_is_skipped(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    save(tmp_path / "b.png", (9, 9, 9))
    assert len(read_images(tmp_path, (3, 8, 8), 4)) == 1


@pytest.mark.parametrize(
    ("folder", "image", "said"),
    [
        ("missing", (3, 8, 8), "missing: is no folder"),
        ("", (1, 8, 8), "the network takes 1 channels, images have 3"),
        ("", (3, 8, 8), "holds no image that can be decoded"),
    ],
)
def test_what_is_refused(tmp_path, folder, image, said):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(SelabError, match=said):
        read_images(tmp_path / folder, image, 4)


def test_batches_are_filled_up():
    ones = [torch.full((1, 1), float(place)) for place in range(3)]
    assert [one.flatten().tolist() for one in batches(ones, 2)] == [[0, 1], [2, 0]]
    assert [one.flatten().tolist() for one in batches(ones, 1)] == [[0], [1], [2]]
