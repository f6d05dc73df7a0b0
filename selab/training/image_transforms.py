"""Prepare decoded images with pillow: random crops for training, resize and centre crop for evaluation.

Sizes, roundings and the order of random numbers are those of `torchvision.transforms.v2`, so that accuracies published
with it are reproduced and a seed gives the crops that it gives there.

Source: github.com/pytorch/vision, torchvision/transforms/v2/_geometry.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selab.training.recipe import ImageRecipe

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Attempts to find a crop of the wanted area and ratio inside the image.
_ATTEMPTS = 10


@dataclass(frozen=True)
class TrainingTransform:
    """jitter(rotate(flip(resize(random_crop(image))))), each step as the recipe says.

    Attributes:
        recipe: sizes, ranges and interpolation.
    """

    recipe: ImageRecipe

    def __call__(self, image: Image.Image, seed: int | None) -> Tensor:
        """Transform an RGB image.

        Args:
            image: decoded, in RGB.
            seed: of all random numbers; None for 0.

        Returns:
            (3, train_size, train_size) uint8.
        """
        recipe, generator = self.recipe, torch.Generator().manual_seed(seed or 0)
        resampling = _RESAMPLING[recipe.interpolation]
        left, top, width, height = random_crop(image.size, recipe.scale, recipe.ratio, generator)
        image = image.crop((left, top, left + width, top + height))
        image = _resized(image, (recipe.train_size, recipe.train_size), resampling)
        if recipe.flip and torch.rand(1, generator=generator).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if recipe.rotation_deg:
            angle = _uniform(-recipe.rotation_deg, recipe.rotation_deg, generator)
            image = image.rotate(angle, resampling, fillcolor=(0, 0, 0))
        pixels = to_tensor(image)
        return jitter(pixels, recipe.pixel_jitter, generator) if recipe.pixel_jitter else pixels


@dataclass(frozen=True)
class EvaluationTransform:
    """centre_crop(resize(image)), without anything random.

    Attributes:
        recipe: sizes and interpolation.
    """

    recipe: ImageRecipe

    def __call__(self, image: Image.Image, _seed: int | None) -> Tensor:
        """Transform an RGB image to (3, test_crop, test_crop) uint8."""
        recipe, crop = self.recipe, self.recipe.test_crop
        image = _resized(image, shorter_side(image.size, recipe.test_resize), _RESAMPLING[recipe.interpolation])
        # Halves are rounded to even, as in torchvision.
        left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
        return to_tensor(image.crop((left, top, left + crop, top + crop)))


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop of a random area and aspect ratio: (left, top, width, height) in pixels.

    The ratio is drawn uniformly on a logarithmic scale. Where ten attempts do not fit into the image, the crop is the
    largest central one whose ratio is allowed.

    Args:
        size: width and height of the image.
        scale: least and greatest area, as a part of the image's.
        ratio: least and greatest width over height.
        generator: what to draw from.

    Source: arXiv 1409.4842, Sec. 6.
    """
    width, height = size
    # In float32, as in torchvision.
    low, high = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(_ATTEMPTS):
        area = width * height * _uniform(*scale, generator)
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = _below(height - h + 1, generator)
            return _below(width - w + 1, generator), top, w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def shorter_side(size: tuple[int, int], to: int) -> tuple[int, int]:
    """Return width and height of an image whose shorter side becomes `to`; the longer one is rounded down."""
    width, height = size
    return (to, int(to * height / width)) if width <= height else (int(to * width / height), to)


def to_tensor(image: Image.Image) -> Tensor:
    """Copy the pixels of an RGB image to a tensor (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jitter(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Add a random integer in [-most, most] to each value, clamped to 0 and 255.

    Shapes:
        pixels, result: (3, H, W) uint8.

    Source: README.md of github.com/hujie-frank/SENet, table "Augmentation", and its issue 38.
    """
    noise = torch.randint(-most, most + 1, pixels.shape, dtype=torch.int16, generator=generator)
    return (pixels + noise).clamp_(0, 255).to(torch.uint8)


def _resized(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resampling)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, end, (1,), generator=generator).item())
