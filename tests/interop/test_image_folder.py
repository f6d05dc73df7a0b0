"""Image transforms held against torchvision's, pixel for pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from selab.training.image_folder import open_folder
from selab.training.image_transforms import EvaluationTransform, TrainingTransform
from selab.training.recipe import ImageRecipe

v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")

CPU = torch.device("cpu")


def images_of(batches):
    return torch.cat([images for images, _ in batches])


def generated(width, height, seed):
    """An RGB image with smooth parts and noise, through JPEG and back."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = (ramp + random.integers(0, 16, (height, width, 3))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return Image.open(file).convert("RGB")


# Wide, tall, square, smaller than the crop, and so narrow that no crop of an allowed ratio is found.
SIZES = [(500, 375), (375, 500), (300, 300), (60, 48), (700, 20), (21, 640)]
RECIPES = [
    ImageRecipe(pixel_jitter=0),
    ImageRecipe(pixel_jitter=0, interpolation="bicubic", train_size=160, test_resize=232),
    ImageRecipe(pixel_jitter=0, flip=False, rotation_deg=0, scale=(0.9, 1.0), ratio=(1.0, 1.0)),
    ImageRecipe(pixel_jitter=0, flip=True, rotation_deg=0, scale=(0.08, 0.2)),
]


def training_of(recipe):
    """The same steps from torchvision."""
    how = v2.InterpolationMode(recipe.interpolation)
    steps = [v2.RandomResizedCrop(recipe.train_size, scale=recipe.scale, ratio=recipe.ratio, interpolation=how)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.rotation_deg:
        steps.append(v2.RandomRotation(recipe.rotation_deg, interpolation=how))
    return v2.Compose([*steps, v2.PILToTensor()])


@pytest.mark.parametrize("recipe", RECIPES, ids=["default", "bicubic", "crop", "flip"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_images_are_torchvisions(size, recipe):
    theirs, ours = training_of(recipe), TrainingTransform(recipe)
    for seed in range(12):
        image = generated(*size, seed)
        torch.manual_seed(seed)
        assert torch.equal(theirs(image), ours(image, seed)), seed


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [*SIZES, (257, 256), (256, 301)], ids=str)
def test_evaluation_images_are_torchvisions(size, recipe):
    how = v2.InterpolationMode(recipe.interpolation)
    resize = v2.Resize(recipe.test_resize, interpolation=how)
    theirs = v2.Compose([resize, v2.CenterCrop(recipe.test_crop), v2.PILToTensor()])
    image = generated(*size, 0)
    assert torch.equal(theirs(image), EvaluationTransform(recipe)(image, None))


def test_training_images_of_the_sample_are_torchvisions(imagenet_sample):
    recipe = ImageRecipe(pixel_jitter=0)
    theirs, ours = training_of(recipe), TrainingTransform(recipe)
    paths = sorted(imagenet_sample.glob("val/*/*"))
    assert len(paths) == 250
    for seed, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        torch.manual_seed(seed)
        assert torch.equal(theirs(image), ours(image, seed)), path.name


def test_evaluation_sees_what_torchvisions_own_weights_see(imagenet_sample):
    from torchvision.models import ResNet50_Weights

    preset = ResNet50_Weights.IMAGENET1K_V1.transforms()
    data = open_folder(imagenet_sample, name="imagenet", workers=0)
    ours = images_of(data.test_batches(batch=50, device=CPU))
    for path, image in zip(sorted(imagenet_sample.glob("val/*/*")), ours, strict=True):
        with Image.open(path) as theirs:
            assert torch.equal(preset(theirs.convert("RGB")), image), path.name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_of_larger_crops(imagenet_sample, interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(crop_size=299, resize_size=352, interpolation=InterpolationMode(interpolation))
    recipe = ImageRecipe(test_resize=352, test_crop=299, interpolation=interpolation)
    data = open_folder(imagenet_sample / "val", name="part", image=recipe, workers=0)
    assert data.input_chw == (3, 299, 299)
    ours, _ = next(data.test_batches(batch=8, device=CPU))
    for path, image in zip(sorted(imagenet_sample.glob("val/*/*")), ours, strict=False):
        with Image.open(path) as theirs:
            assert torch.equal(preset(theirs.convert("RGB")), image), path.name
