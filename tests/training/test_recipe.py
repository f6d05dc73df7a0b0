import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from selab.errors import SpecError, UnknownNameError
from selab.models.catalog import installed
from selab.training.optim import optimizer_of
from selab.training.recipe import (
    TELLING,
    Recipe,
    adapted,
    check_suits,
    default_recipe,
    find_recipe,
    lr_at,
    parse_recipes,
    recipe_hash,
    recipes,
)

GOOD = """
[recipes.toy]
title = "Toy"
source = "a paper"
where = "Sec. 1"
lr = 0.4
momentum = 0.9
weight_decay = 1e-4
batch = 8
epochs = 10
schedule = "step"
milestones = [4, 8]
[recipes.toy.image]
rotation_deg = 0
"""


def toy(**changes):
    return msgspec.structs.replace(parse_recipes(GOOD, origin="toy.toml")["toy"], **changes)


@dataclass(frozen=True)
class Stated:
    """What a source prints."""

    lr: float
    batch: int
    epochs: int
    momentum: float = 0.9


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        # arXiv 1709.01507, Sec. 5.1: momentum 0.9, minibatch 1024, 0.6 divided by 10 every 30 epochs, 100 epochs.
        ("imagenet_senet", Stated(lr=0.6, batch=1024, epochs=100)),
        # hujie-frank/SENet, README.md: a mini-batch of 256 and an initial learning rate of 0.1.
        ("imagenet_release", Stated(lr=0.1, batch=256, epochs=100)),
        # arXiv 1709.01507, Sec. 6, footnote 2: 270 epochs, reduced at 125, 200 and 250.
        ("imagenet_senet_270", Stated(lr=0.1, batch=256, epochs=270)),
        # arXiv 1512.03385, Sec. 4.2: 0.1, minibatch 128, 64k iterations of 390 steps per epoch.
        ("cifar_resnet", Stated(lr=0.1, batch=128, epochs=64_000 // (50_000 // 128))),
        # arXiv 1605.07146, Sec. 3: 0.1, minibatch 128, 200 epochs.
        ("cifar_wrn", Stated(lr=0.1, batch=128, epochs=200)),
        # github.com/xgastaldi/shake-shake, README.md: -LR 0.2 -batchSize 128 -nEpochs 1800.
        ("cifar_shake_shake", Stated(lr=0.2, batch=128, epochs=1800)),
        # keras-team/keras, examples/cifar10_cnn.py: lr=0.0001, batch_size = 32, epochs = 100.
        ("keras_cifar10_cnn", Stated(lr=1e-4, batch=32, epochs=100, momentum=0.0)),
    ],
)
def test_what_the_sources_print(name, stated):
    recipe = find_recipe(name)
    assert Stated(lr=recipe.lr, batch=recipe.batch, epochs=recipe.epochs, momentum=recipe.momentum) == stated


def test_every_recipe_has_a_source_and_a_learning_rate_above_zero_until_its_end():
    for recipe in recipes().values():
        assert recipe.source
        assert recipe.where
        assert all(lr_at(recipe, epoch) > 0 for epoch in range(recipe.epochs))


def test_senet_divides_by_ten_every_thirty_epochs():
    recipe = find_recipe("imagenet_senet")
    for epoch, lr in ((0, 0.6), (29.99, 0.6), (30, 0.06), (60, 0.006), (90, 0.0006), (99.9, 0.0006)):
        assert lr_at(recipe, epoch) == pytest.approx(lr)


def test_resnet110_takes_400_steps_at_a_tenth():
    recipe = find_recipe("cifar_resnet110")
    steps = 50_000 // recipe.batch
    rates = [lr_at(recipe, step / steps) for step in range(500)]
    assert rates == [0.01] * 400 + [0.1] * 100


def test_milestones_of_resnet_are_its_iterations():
    recipe = find_recipe("cifar_resnet")
    steps = 50_000 // recipe.batch
    # 32k and 48k iterations, to the epoch.
    assert recipe.milestones == (32_000 // steps, 48_000 // steps)


def test_wide_resnet_multiplies_by_a_fifth():
    recipe = find_recipe("cifar_wrn")
    assert [lr_at(recipe, epoch) for epoch in (59, 60, 120, 160)] == pytest.approx([0.1, 0.02, 0.004, 0.0008])


def test_cosine_behind_a_linear_warm_up():
    recipe = toy(schedule="cosine", milestones=(), warmup_epochs=2.0, warmup_lr=0.1)
    # From 0.1 to 0.4 in two epochs; then half a cosine over the eight that are left.
    assert [lr_at(recipe, epoch) for epoch in (0, 1, 2)] == pytest.approx([0.1, 0.25, 0.4])
    assert lr_at(recipe, 6) == pytest.approx(0.2)
    assert lr_at(recipe, 4) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_at(recipe, 10) == pytest.approx(0.0)


def test_inverse_and_constant():
    recipe = find_recipe("keras_cifar10_cnn")
    # lr / (1 + decay * iterations) after ten epochs of 1562 steps.
    assert lr_at(recipe, 10) == pytest.approx(1e-4 / (1 + 1e-6 * 15_620))
    assert lr_at(toy(schedule="constant"), 9.9) == 0.4


def test_another_budget_keeps_the_shape_of_the_schedule():
    half = adapted(toy(warmup_epochs=1.0), epochs=5, batch=16)
    assert (half.milestones, half.warmup_epochs, half.batch, half.lr) == ((2.0, 4.0), 0.5, 16, 0.4)
    double = adapted(toy(warmup_epochs=1.0), epochs=20)
    assert (double.milestones, double.warmup_epochs) == ((8.0, 16.0), 1.0)
    assert adapted(toy()) == toy()
    with pytest.raises(SpecError, match="--epochs 0: must be at least 1"):
        adapted(toy(), epochs=0)


def test_the_hash_is_of_what_decides_a_training():
    assert recipe_hash(toy()) == recipe_hash(toy(name="other", title="Other", source="x", where="y", note="z"))
    assert recipe_hash(toy()) == recipe_hash(toy(families=("small_cnn",)))
    assert recipe_hash(toy()) != recipe_hash(toy(lr=0.5))
    assert recipe_hash(toy()) != recipe_hash(toy(image=None))


def test_the_hash_is_that_of_recipes_before_they_could_fill_and_scale():
    facts = {key: value for key, value in msgspec.to_builtins(toy()).items() if key not in TELLING}
    before = {
        key: value for key, value in facts.items() if key not in ("fill", "scaling", "beta1", "boxes", "clip_norm")
    }
    assert recipe_hash(toy()) == hashlib.sha256(msgspec.json.encode(before, order="sorted")).hexdigest()[:12]
    assert len({recipe_hash(toy(**one)) for one in ({}, {"fill": "edge"}, {"scaling": "unit"})}) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[recipes.toy]", "[recipes.toy", "toy.toml: not TOML"),
        (GOOD, "", "must hold .recipes.NAME. tables"),
        (GOOD, "lr = 1\n" + GOOD, r"must hold \[recipes.NAME\] tables, and nothing beside: lr"),
        ("recipes.toy]", "recipes.Toy]", "recipes.Toy: a recipe's name is lower-case"),
        ("lr = 0.4", "lr = 0", "recipes.toy.lr: expected float > 0.0"),
        ("lr = 0.4", 'lr = "high"', "recipes.toy.lr: expected float, got str"),
        ("lr = 0.4", "", "recipes.toy.lr: missing"),
        ("lr = 0.4", "lr = 0.4\nlearning = 1", "recipes.toy.learning: unknown key; allowed: title, source, where"),
        ('schedule = "step"', 'schedule = "linear"', "schedule: invalid enum value 'linear'; allowed: step, cosine"),
        ("lr = 0.4", "lr = inf", r"recipes.toy.lr: inf; must be a finite number"),
        ("rotation_deg = 0", "mean = [0.1, inf, 0.1]", r"recipes.toy.image.mean.1: inf; must be a finite number"),
        ("batch = 8", "batch = 0", "recipes.toy.batch: expected int >= 1"),
        ("milestones = [4, 8]", "milestones = [8, 4]", "must rise, and end before epoch 10"),
        ("milestones = [4, 8]", "milestones = [4, 10]", "must rise, and end before epoch 10"),
        ("epochs = 10", "epochs = 10\nwarmup_epochs = 10", "warmup_epochs: 10: must be fewer than the 10 epochs"),
        (
            "lr = 0.4",
            'lr = 0.4\noptimizer = "adam"',
            "recipes.toy.momentum: is of sgd and rmsprop; adam has beta1",
        ),
        (
            "momentum = 0.9",
            "momentum = 0.9\nbeta1 = 0.5",
            "recipes.toy.beta1: is of adam; sgd has momentum",
        ),
        ("momentum = 0.9", "nesterov = true", "recipes.toy.nesterov: is of sgd with momentum; leave it out"),
        ('where = "Sec. 1"', 'where = " "', "source and where must say where the recipe is from"),
        ("rotation_deg = 0", "rotation_deg = 200", "recipes.toy.image: rotation_deg: 200.0; must be 0 to 180"),
        ("rotation_deg = 0", "rotate = 1", "recipes.toy.image.rotate: unknown key; allowed: train_size, scale"),
    ],
)
def test_errors_name_file_and_key(old, new, message):
    assert old in GOOD
    with pytest.raises(SpecError, match=message):
        parse_recipes(GOOD.replace(old, new, 1), origin="toy.toml")


@pytest.mark.parametrize(
    ("family", "in_memory", "name"),
    [
        ("small_cnn", True, "cifar_short_plain"),
        ("vgg_cifar", True, "cifar_short"),
        ("small_cnn", False, "imagenet_senet"),
        ("resnet", False, "imagenet_senet"),
        ("inception_resnet_v2", False, "imagenet_senet_299"),
        ("inception_v3", False, "imagenet_senet_299"),
        ("inception_v4", False, "imagenet_senet_299"),
        ("inception_resnet_v2", True, "cifar_short"),
        ("timm", True, "cifar_short"),
    ],
)
def test_the_default_is_that_of_the_network_and_the_data(family, in_memory, name):
    assert default_recipe(family, in_memory=in_memory).name == name


def test_a_family_exists_and_has_one_default_for_each_kind_of_data():
    families = {variant.family for variant in installed().values()}
    for in_memory in (True, False):
        named = [
            family for recipe in recipes().values() if recipe.suits(in_memory=in_memory) for family in recipe.families
        ]
        assert set(named) <= families
        assert len(named) == len(set(named))


def test_a_recipe_is_for_images_in_memory_or_in_folders():
    with pytest.raises(
        SpecError,
        match=r"--recipe cifar_short: is for images in memory; for image folders, such as imagenet, use one "
        r"of imagenet_senet, imagenet_senet_299, imagenet_senet_270, imagenet_release, places365_senet, "
        r"places365_csail$",
    ):
        check_suits(find_recipe("cifar_short"), "imagenet", in_memory=False)
    with pytest.raises(SpecError, match=r"--recipe imagenet_senet: is for image folders; .* use one of cifar_res"):
        check_suits(find_recipe("imagenet_senet"), "cifar10", in_memory=True)
    assert not toy(image=None, scaling="unit").suits(in_memory=False)
    # One that asks for nothing is for both.
    for in_memory in (True, False):
        check_suits(toy(image=None), "any", in_memory=in_memory)


def test_inception_resnet_has_the_paper_recipe_but_for_the_size():
    own, paper = find_recipe("imagenet_senet_299"), find_recipe("imagenet_senet")
    assert (own.image.train_size, own.image.test_resize, own.image.test_crop) == (299, 352, 299)
    same = msgspec.structs.replace(own, image=paper.image)
    assert recipe_hash(same) == recipe_hash(paper)


def test_words(tmp_path):
    assert isinstance(find_recipe("cifar_short"), Recipe)
    with pytest.raises(UnknownNameError, match=r"--recipe cifar_shrot: no such recipe; did you mean .*cifar_short"):
        find_recipe("cifar_shrot")
    path = tmp_path / "own.toml"
    path.write_text(GOOD)
    assert find_recipe(str(path)) == find_recipe(f"{path}:toy") == toy()
    with pytest.raises(UnknownNameError, match="no such recipe; known: toy"):
        find_recipe(f"{path}:xyz")
    path.write_text(GOOD + GOOD.replace("recipes.toy", "recipes.joy"))
    with pytest.raises(SpecError, match=r"has 2 recipes; name one as .*own.toml:NAME; known: joy, toy"):
        find_recipe(str(path))
    with pytest.raises(SpecError, match=r"none\.toml: cannot be read: No such file"):
        find_recipe(str(tmp_path / "none.toml"))


def test_the_recipe_in_the_docs_is_complete():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```toml\n(\[recipes\..*?)```", page, flags=re.DOTALL)
    assert parse_recipes(block, origin="training.md")["mine"].momentum == 0.9
    rows = re.findall(r"^\| (`.*?`) \|", page.partition("| Key |")[2].partition("\n\n")[0], flags=re.MULTILINE)
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)} | {"milestones", "factor", "decay"}
    assert named == set(Recipe.__struct_fields__) - {"name", "note", "families"}


def test_adam_has_its_own_default():
    text = GOOD.replace("momentum = 0.9", 'optimizer = "adam"')
    found = parse_recipes(text, origin="toy.toml")["toy"]
    assert (found.beta1, found.momentum) == (0.9, 0.0)
    model = torch.nn.Linear(2, 2)
    assert optimizer_of(model, found).defaults["betas"] == (0.9, 0.999)


def test_keys_of_classifiers_are_refused_beside_boxes():
    text = GOOD.replace("[recipes.toy]", "[recipes.toy]\nboxes = {}\nflip = false")
    with pytest.raises(SpecError, match=r"toy.toml: recipes.toy: .*flip.*: for classifiers; leave out"):
        parse_recipes(text, origin="toy.toml")
    boxed = text.replace("flip = false\n", "").partition("[recipes.toy.image]")[0]
    assert parse_recipes(boxed, origin="toy.toml")["toy"].boxes is not None
