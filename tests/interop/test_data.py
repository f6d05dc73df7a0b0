"""Our batches of images are torchvision's images, one by one, where both do the same to them."""

import warnings

import pytest
import torch

from selab.training.augment import Augmentation, augment, crop, decide, flip, normalise

PAD = 4
WANTED = Augmentation(crop_pad=PAD, flip=True)
# CIFAR-10's, of 255.
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@pytest.fixture(scope="module")
def theirs():
    """torchvision's functional transforms; skips where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchvision", reason="torchvision is not installed")
        from torchvision.transforms import functional
    return functional


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decided():
    return decide(WANTED, size=200, input_hw=(32, 32), seed=1, epoch=2, number=3)


def cropped_and_mirrored(theirs, image, decided):
    top, left, mirrored = decided[:3].tolist()
    image = theirs.crop(theirs.pad(image, [PAD]), top, left, 32, 32)
    return theirs.hflip(image) if mirrored else image


def test_crops_and_mirror_images_are_the_same_bytes(theirs, images, decided):
    expected = [cropped_and_mirrored(theirs, *one) for one in zip(images, decided, strict=True)]
    top, left, mirrored = decided[:, :3].unbind(1)
    assert torch.equal(flip(crop(images, top, left, pad=PAD), mirrored), torch.stack(expected))


def test_normalised_values_are_the_same_but_for_rounding(theirs, images):
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
    expected = theirs.normalize(images.float() / 255, [one / 255 for one in MEAN], [one / 255 for one in STD])
    assert torch.allclose(normalise(images, mean, std), expected, rtol=0, atol=1e-6)


def test_a_whole_batch_is_that_of_their_pipeline_of_pictures(theirs, images, decided):
    """As datasets.CIFAR10 gives them to RandomCrop, RandomHorizontalFlip, ToTensor and Normalize."""
    expected = []
    for image, one in zip(images, decided, strict=True):
        picture = cropped_and_mirrored(theirs, theirs.to_pil_image(image), one)
        scales = [value / 255 for value in MEAN], [value / 255 for value in STD]
        expected.append(theirs.normalize(theirs.to_tensor(picture), *scales))
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
    found = augment(images, decided, WANTED, mean=mean, std=std)
    assert torch.allclose(found, torch.stack(expected), rtol=0, atol=1e-6)
