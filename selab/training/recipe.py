"""Training recipes: read strictly from TOML, and the learning rate schedules they define.

A recipe states what a paper or a repository says about training, with its source. The network, the data, the seed and
the device are not part of it.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from selab.errors import SpecError, UnknownNameError, nearest
from selab.records.toml import converted, parse_tables, read_package, read_tables
from selab.records.types import Frozen

Optimizer = Literal["sgd", "rmsprop", "adam"]
Schedule = Literal["step", "cosine", "inverse", "constant"]
Warmup = Literal["linear", "constant"]
Initial = Literal["he", "builder"]
Fill = Literal["black", "edge"]
Scaling = Literal["channel", "unit"]
Task = Literal["classification", "detection"]
"""What a network is trained for; a data set says which. Detectors have an average precision, and no accuracy."""
_Positive = Annotated[float, Meta(gt=0)]
_NotNegative = Annotated[float, Meta(ge=0)]
_Share = Annotated[float, Meta(ge=0, lt=1)]
_Count = Annotated[int, Meta(ge=1)]
_Pixels = Annotated[int, Meta(ge=0)]


class ImageRecipe(Frozen, frozen=True, kw_only=True):
    """How an image is prepared: random crop, mirror, rotation, jitter in training; resize and centre crop in tests.

    By default all that the authors' release of the SENets names. The paper's own text (Sec. 5) names crop and mirror
    alone, and 299 crops of images resized to 352 for the Inception-ResNets; the release and timm evaluate SENet-154 at
    224 of 256. Of its 320 crops the paper does not say how the images are resized: 366 keeps the ratio of 224 to 256.

    Attributes:
        train_size: side of the square that a training crop is resized to, in pixels.
        scale: least and greatest part of the image's area that a training crop covers.
        ratio: least and greatest width of a training crop over its height.
        flip: mirror half of the training images.
        rotation_deg: training crops are rotated by up to so many degrees either way; the corners become black. (The
            release leaves the order and the corners open.)
        pixel_jitter: a number up to so large either way, of 255, is added to each value of each pixel on its own.
        test_resize: the shorter side of an image in evaluation.
        test_crop: side of its centre crop.
        interpolation: of all resizing and rotating.
        mean: of each colour, of 1, taken off; the paper and torchvision do.
        std: of each colour; torchvision divides by it, the paper does not: (1, 1, 1) then.
        balanced: each class is drawn equally often, not each image.

    Source: arXiv 1709.01507, Sec. 5; README.md of github.com/hujie-frank/SENet, table "Augmentation", and its issue 38
        (the jitter is drawn per value); arXiv 1512.05830, "class-aware sampling", which the paper's conference version
        cites for balancing; mean and std: torchvision.
    """

    train_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rotation_deg: float = 10
    pixel_jitter: int = 20
    test_resize: int = 256
    test_crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    balanced: bool = False

    @property
    def test_words(self) -> str:
        """`resize 256, crop 224, bilinear, mean 0.485 0.456 0.406, std 1 1 1`."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resize {self.test_resize}, crop {self.test_crop}, {self.interpolation}, mean {mean}, std {std}"

    def __post_init__(self) -> None:
        # A ValueError becomes a message with the key's path where a recipe is read from a TOML.
        for key in ("train_size", "test_resize", "test_crop"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.test_crop > self.test_resize:
            raise ValueError(f"test_crop: {self.test_crop} does not fit into test_resize, {self.test_resize}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {list(self.scale)}; two parts of an area, the smaller first, above 0 and up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: {list(self.ratio)}; two ratios above 0, the smaller first")
        if not 0 <= self.rotation_deg <= 180:
            raise ValueError(f"rotation_deg: {self.rotation_deg}; must be 0 to 180")
        if not 0 <= self.pixel_jitter <= 255:
            raise ValueError(f"pixel_jitter: {self.pixel_jitter}; must be 0 to 255")
        if min(self.std) <= 0:
            raise ValueError(f"std: {list(self.std)}; must be above 0")


class BoxRecipe(Frozen, frozen=True, kw_only=True):
    """How images with boxes are prepared, and which parts of a detector's backbone stay as they are.

    By default as most publications on COCO do.

    Attributes:
        min_size: the shorter side of an image in the network, in pixels.
        max_size: of the longer one; the image is then made smaller than `min_size`.
        flip: half of the training images are mirrored.
        frozen_stages: of the backbone, up to this number of its feature maps; 2 is the stem and the first stage of a
            ResNet.
        frozen_norms: whether the backbone's BatchNorms keep their statistics, scales and shifts.
        sampled: boxes per image that the second stage of a Faster R-CNN is trained on.
        proposals: boxes per image that its second stage looks at in tests.

    Source: FREEZE_AT = 2, AffineChannel, FAST_RCNN.BATCH_SIZE_PER_IM = 512 and TEST.RPN_POST_NMS_TOP_N = 1000 of
    Detectron; `trainable_layers=3` and FrozenBatchNorm2d of torchvision.
    """

    min_size: int = 800
    max_size: int = 1333
    flip: bool = True
    frozen_stages: int = 2
    frozen_norms: bool = True
    sampled: int = 512
    proposals: int = 1000

    @property
    def test_words(self) -> str:
        """`shorter side 800, longer side up to 1333`."""
        return f"shorter side {self.min_size}, longer side up to {self.max_size}"

    @property
    def freezes(self) -> bool:
        """Whether parts of the backbone stay as they are, which is for trained weights."""
        return bool(self.frozen_stages or self.frozen_norms)

    def __post_init__(self) -> None:
        # A ValueError becomes a message with the key's path where a recipe is read from a TOML.
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size: {self.min_size}; must be at least 1 and at most max_size, {self.max_size}")
        for key in ("sampled", "proposals"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.frozen_stages < 0:
            raise ValueError(f"frozen_stages: {self.frozen_stages}; must be 0 or more")


class Recipe(Frozen, frozen=True, kw_only=True):
    """How a network is trained, whatever network it is.

    Attributes:
        where: the place in the source.
        note: what the source leaves open, and what is done about it here.
        families: of networks, which this recipe is the default for.
        optimizer: `sgd`; or `rmsprop` or `adam` with the constants of Keras 2 (0.9 and 0.999 for the mean square, 1e-7
            for epsilon).
        momentum: of `sgd` and `rmsprop`.
        nesterov: of `sgd` with momentum.
        beta1: of `adam`, the decay of its mean gradient.
        weight_decay: its L2 form, added to the gradient.
        decay_norm_and_bias: whether it also acts on biases and on the scales and shifts of normalisation layers.
        batch: images per step, over all devices.
        schedule: `step` multiplies by `factor` at each of the `milestones`; `cosine` falls to zero along half a cosine,
            from the end of the warm-up on; `inverse` divides by 1 + `decay` * epochs.
        milestones: in epochs.
        warmup_epochs: how long the learning rate rises from `warmup_lr` to `lr` (`linear`) or stays there (`constant`).
        clip_norm: the gradients of a step are made smaller where their norm, over all parameters, is above it.
        ema: decay per step of the weights' moving average, which is then what is tested and kept; None for none.
        init: `he` draws all weights anew after arXiv 1502.01852, eq. 10; `builder` keeps those of the network's code.
        crop_pad: training images are padded by so many pixels on each side and cropped back at a random place; this and
            the next four are for images in memory, which have one size.
        fill: what they are padded with: black pixels, or the pixel at the edge repeated.
        scaling: of training and test images: by `channel`, to mean 0 and deviation 1 over the training images; or to
            the `unit` interval, 0 to 1.
        flip: half of the training images are mirrored.
        cutout: a square of this side is blanked at a random place of each training image.
        image: what is done to images in folders instead; None for data in memory.
        boxes: what is done to images with boxes; None for classifiers.
    """

    name: str
    title: str
    source: str
    where: str
    note: str = ""
    families: tuple[str, ...] = ()
    optimizer: Optimizer = "sgd"
    lr: _Positive
    momentum: _Share = 0.0
    nesterov: bool = False
    beta1: _Share = 0.9
    weight_decay: _NotNegative
    decay_norm_and_bias: bool = True
    batch: _Count
    epochs: _Count
    schedule: Schedule
    milestones: tuple[_Positive, ...] = ()
    factor: _Positive = 0.1
    decay: _NotNegative = 0.0
    warmup_epochs: _NotNegative = 0.0
    warmup: Warmup = "linear"
    warmup_lr: _NotNegative = 0.0
    label_smoothing: _Share = 0.0
    clip_norm: _Positive | None = None
    ema: Annotated[float, Meta(gt=0, lt=1)] | None = None
    init: Initial = "builder"
    crop_pad: _Pixels = 0
    fill: Fill = "black"
    scaling: Scaling = "channel"
    flip: bool = False
    cutout: _Pixels = 0
    image: ImageRecipe | None = None
    boxes: BoxRecipe | None = None

    def suits(self, *, in_memory: bool, task: Task = "classification") -> bool:
        """Return whether its augmentation is for such data: in memory, in a folder, or with boxes."""
        if task == "detection" or self.boxes is not None:
            return task == "detection" and self.boxes is not None
        augments = bool(self.crop_pad or self.flip or self.cutout or self.scaling != "channel")
        return (self.image is None or augments) if in_memory else not augments


# Fields that describe a recipe and change nothing in a training.
TELLING = ("name", "title", "source", "where", "note", "families")
# Fields that recipes did not always have, and what they meant then: hashes leave them out where they mean it still.
LATER: dict[str, object] = {"fill": "black", "scaling": "channel", "beta1": 0.9, "boxes": None, "clip_norm": None}


def recipe_hash(recipe: Recipe) -> str:
    """Return twelve hex digits over the fields that decide a training, without names, sources and notes."""
    facts = {
        key: value
        for key, value in msgspec.to_builtins(recipe).items()
        if key not in TELLING and (key not in LATER or LATER[key] != value)
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:12]


def lr_at(recipe: Recipe, epoch_fraction: float) -> float:
    """Return the learning rate at a moment of the training.

    Args:
        recipe: the schedule.
        epoch_fraction: epochs since the start; 1.5 is the middle of the second one.
    """
    if epoch_fraction < recipe.warmup_epochs:
        rising = recipe.warmup == "linear"
        share = epoch_fraction / recipe.warmup_epochs if rising else 0.0
        return recipe.warmup_lr + share * (recipe.lr - recipe.warmup_lr)
    match recipe.schedule:
        case "step":
            passed = sum(epoch_fraction >= milestone for milestone in recipe.milestones)
            return recipe.lr * recipe.factor**passed
        case "cosine":
            done = (epoch_fraction - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
            return recipe.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
        case "inverse":
            return recipe.lr / (1 + recipe.decay * epoch_fraction)
    return recipe.lr


def adapted(recipe: Recipe, *, epochs: int | None = None, batch: int | None = None) -> Recipe:
    """Return the recipe for another budget: its schedule in fewer or more epochs, or another batch.

    Milestones keep their share of the whole; the warm-up shrinks with it and never grows. The learning rate stays. A
    batch that does not fit into memory is better split (`accumulate`); a different batch deserves a recipe of its own.

    Raises:
        SpecError: fewer than one epoch, or an empty batch.
    """
    for key, value in (("epochs", epochs), ("batch", batch)):
        if value is not None and value < 1:
            raise SpecError(f"--{key} {value}: must be at least 1")
    if epochs is not None and epochs != recipe.epochs:
        share = epochs / recipe.epochs
        recipe = msgspec.structs.replace(
            recipe,
            epochs=epochs,
            milestones=tuple(milestone * share for milestone in recipe.milestones),
            warmup_epochs=recipe.warmup_epochs * min(1.0, share),
        )
    return recipe if batch is None else msgspec.structs.replace(recipe, batch=batch)


# Keys that mean nothing where a recipe has `boxes`.
_OF_CLASSIFIERS = ("label_smoothing", "init", "crop_pad", "fill", "scaling", "flip", "cutout", "image")


# Of a recipe's learning rate, for weights that it has trained already.
_FINE = 0.1


def finetuning(recipe: Recipe, epochs: int) -> Recipe:
    """Return how weights that a recipe has trained are trained further: a cosine from a tenth of its learning rate."""
    return msgspec.structs.replace(
        recipe,
        name=f"{recipe.name}-finetune",
        lr=recipe.lr * _FINE,
        epochs=epochs,
        schedule="cosine",
        milestones=(),
        warmup_epochs=0.0,
        warmup_lr=0.0,
        ema=None,
        init="builder",
    )


# ------------------------------------------------------------------------------------------------------------- reading
@cache
def recipes() -> dict[str, Recipe]:
    """Return all recipes in `selab.training.recipes` by name, files in alphabetical order.

    Raises:
        SpecError: a file is malformed, or two files use one name.
    """
    return read_package("selab.training.recipes", parse_recipes, header="recipes")


def find_recipe(word: str, *, option: str = "--recipe") -> Recipe:
    """Look up a recipe by its name, or in a user's own file as `path/to/file.toml[:NAME]`.

    Args:
        word: what the user wrote.
        option: where it was given, for the message.

    Raises:
        UnknownNameError: nothing has this name; the message lists the nearest ones.
        SpecError: the file cannot be read, is malformed, or has several recipes and none was named.
    """
    file = re.fullmatch(r"(.+\.toml)(?::(\w+))?", word)
    known = recipes() if file is None else _of_file(Path(file[1]))
    name = word if file is None else file[2]
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name is None:
        raise SpecError(f"{word}: has {len(known)} recipes; name one as {word}:NAME{nearest('', known)}")
    if name not in known:
        raise UnknownNameError(f"{option} {word}: no such recipe{nearest(name, known)}")
    return known[name]


# Data sets that have one recipe for all networks.
_OWN_RECIPES = {"places365": "places365_senet", "coco": "coco_1x", "shapes": "shapes"}


def default_recipe(family: str, *, in_memory: bool, data: str = "") -> Recipe:
    """Return the recipe that a family uses by default, else the general one for such data; some have one for all.

    Args:
        family: of networks.
        in_memory: whether the data lie in memory; else in a folder of images.
        data: the data set's name.
    """
    if data in _OWN_RECIPES:
        return recipes()[_OWN_RECIPES[data]]
    suiting = [recipe for recipe in recipes().values() if recipe.suits(in_memory=in_memory)]
    general = recipes()["cifar_short" if in_memory else "imagenet_senet"]
    return next((recipe for recipe in suiting if family in recipe.families), general)


def check_suits(recipe: Recipe, data: str, *, in_memory: bool, task: Task = "classification") -> None:
    """Check that a recipe's augmentation is for this kind of data.

    Args:
        recipe: the facts.
        data: the data set's name, for the message.
        in_memory: whether the data lie in memory; else in a folder of images.
        task: what networks are trained for on these data.

    Raises:
        SpecError: it is for another kind; the message names the recipes for this one.
    """
    if recipe.suits(in_memory=in_memory, task=task):
        return
    kind, other = ("images in memory", "image folders") if in_memory else ("image folders", "images in memory")
    kind = "images with boxes" if task == "detection" else kind
    other = "images with boxes" if recipe.boxes is not None else "classifiers" if task == "detection" else other
    fitting = ", ".join(name for name, one in recipes().items() if one.suits(in_memory=in_memory, task=task))
    raise SpecError(f"--recipe {recipe.name}: is for {other}; for {kind}, such as {data}, use one of {fitting}")


def _of_file(path: Path) -> dict[str, Recipe]:
    return {name: _recipe(name, table, str(path)) for name, table in read_tables(path, "recipes").items()}


def parse_recipes(text: str, *, origin: str) -> dict[str, Recipe]:
    """Read a TOML of `[recipes.NAME]` tables.

    Args:
        text: the file's content.
        origin: the file's name, for messages.

    Raises:
        SpecError: malformed TOML, unknown key, wrong type, value out of its range, or missing source; the message names
            the file and the key.
    """
    return {name: _recipe(name, table, origin) for name, table in parse_tables(text, "recipes", origin=origin).items()}


def _recipe(name: str, table: object, origin: str) -> Recipe:
    place = f"{origin}: recipes.{name}"
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise SpecError(f"{place}: a recipe's name is lower-case letters, digits and _")
    recipe = converted(table, Recipe, place=place, name=name)
    if not recipe.source.strip() or not recipe.where.strip():
        raise SpecError(f"{place}: source and where must say where the recipe is from")
    if recipe.optimizer == "adam" and recipe.momentum:
        raise SpecError(f"{place}.momentum: is of sgd and rmsprop; adam has beta1, by default 0.9")
    if recipe.optimizer != "adam" and recipe.beta1 != LATER["beta1"]:
        raise SpecError(f"{place}.beta1: is of adam; {recipe.optimizer} has momentum, by default 0")
    if recipe.nesterov and not (recipe.optimizer == "sgd" and recipe.momentum):
        raise SpecError(f"{place}.nesterov: is of sgd with momentum; leave it out")
    if list(recipe.milestones) != sorted(set(recipe.milestones)) or max(recipe.milestones, default=0) >= recipe.epochs:
        raise SpecError(
            f"{place}.milestones: {list(recipe.milestones)}: must rise, and end before epoch {recipe.epochs}"
        )
    others = [key for key in _OF_CLASSIFIERS if isinstance(table, dict) and key in table]
    if recipe.boxes is not None and others:
        raise SpecError(f"{place}: {', '.join(others)}: for classifiers; leave out, or see the keys of boxes")
    if recipe.warmup_epochs >= recipe.epochs:
        raise SpecError(
            f"{place}.warmup_epochs: {recipe.warmup_epochs:g}: must be fewer than the {recipe.epochs} epochs"
        )
    return recipe


# What the metadata of weights say of how images are prepared for them.
PREPARATION = ("image", "scaling", "boxes")


def scaling_of(metadata: Mapping[str, str], *, place: str) -> Scaling:
    """Return how images in memory were scaled that weights were trained on; `channel` if their metadata do not say.

    Args:
        metadata: of the file.
        place: its path, for the message.

    Raises:
        WeightsError: no such scaling.
    """
    from selab.models.checkpoint import WeightsError

    told = metadata.get("scaling", "channel")
    found: Scaling | None = next((one for one in get_args(Scaling) if one == told), None)
    if found is None:
        allowed = ", ".join(get_args(Scaling))
        raise WeightsError(f"{place}: its metadata's scaling: {told[:40]!r}; allowed: {allowed}; get the file again")
    return found


def read_image_recipe(path: Path) -> ImageRecipe | None:
    """Return how the images were prepared that a file's weights were trained on; None if the file does not say.

    Raises:
        WeightsError: the file cannot be read, or its metadata is malformed.
    """
    return _told(path, "image", ImageRecipe)


def read_box_recipe(path: Path) -> BoxRecipe | None:
    """Return how the images were prepared that a detector was trained on; None if its file does not say.

    Raises:
        WeightsError: the file cannot be read, or its metadata is malformed.
    """
    return _told(path, "boxes", BoxRecipe)


_Kind = TypeVar("_Kind", ImageRecipe, BoxRecipe)


def _told(path: Path, key: str, kind: type[_Kind]) -> _Kind | None:
    # Imported late: recipes are read without torch.
    from selab.models.checkpoint import WeightsError, line, read_metadata

    told = read_metadata(path).get(key)
    try:
        return None if told is None else msgspec.json.decode(told, type=kind)
    except msgspec.DecodeError as error:
        raise WeightsError(f"{path}: its metadata's {key}: {line(error)}; get the file again") from None
