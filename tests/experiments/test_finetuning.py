"""Training a folded network further."""

import sys
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from tiny_training import FAMILY, NETWORKS, images

from selab.attention.se import SqueezeExcitation
from selab.errors import SelabError
from selab.experiments import finetuning
from selab.experiments.compare import fitted
from selab.experiments.folding import Rule, files_of, fold, save, write
from selab.experiments.judged import Seen, judged
from selab.judging.folding import read_folding
from selab.models.build import build
from selab.models.catalog import find
from selab.models.checkpoint import read_metadata
from selab.report.folding import folding_tables
from selab.report.table import render
from selab.training.recipe import find_recipe, lr_at, scaling_of
from selab.training.recipe import finetuning as recipe_of


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A tiny network of random weights whose first gate is constant, on 30 test images."""
    (tmp_path / "tiny_networks.py").write_text(NETWORKS)
    (tmp_path / "tiny.toml").write_text(FAMILY)
    monkeypatch.chdir(tmp_path)
    variant = find("tiny.toml:se_plain")
    data = images()
    model = build(fitted(variant, data), seed=1).model
    first = next(module for module in model.modules() if isinstance(module, SqueezeExcitation))
    with torch.no_grad():
        first.fc2.weight.zero_()
    safetensors.torch.save_file(model.state_dict(), "w.safetensors", {"recipe": "cifar_short"})
    yield judged(variant, Seen(data=data, batch=16), weights=Path("w.safetensors"))
    sys.modules.pop("tiny_networks", None)


def folded_files(network, out):
    done = fold(network, Rule(points=0), report=lambda *_: None)
    assert done.record.folded
    files = files_of(network, out, replace=True, finetune=True)
    write(done, network, files)
    return done, files


def small(network, epochs):
    return msgspec.structs.replace(finetuning.recipe_for(network, epochs), batch=16, crop_pad=1, cutout=0)


def test_both_networks_are_trained_and_compared(network, tmp_path):
    done, files = folded_files(network, tmp_path / "out")
    tuned = finetuning.finetuned(done, network, files, small(network, 1), lambda *_: None)
    save(tuned, files)
    record = read_folding(files.record)
    more = record.finetuned
    assert more == tuned.record.finetuned
    assert (more.epochs, more.recipe) == (1, "cifar_short-finetune")
    # The images that report are those that did not decide; both comparisons share the trained network without a fold.
    assert more.loss.images == more.alone.images == record.reported_on == 10
    assert more.loss.before == more.alone.after
    assert record.files == ("se_plain.safetensors", "se_plain.toml", "se_plain.finetuned.safetensors")
    shown = " ".join(render(folding_tables(record), "markdown").split())
    assert "accuracy, 1 epoch later" in shown
    assert "That alone changes the network as it was by" in shown
    # The file holds the trained network: another one than before, that its description builds.
    state = safetensors.torch.load_file(files.finetuned)
    made = build(find(files.arch)).model
    made.load_state_dict(state)
    before = safetensors.torch.load_file(files.network)
    assert any(not torch.equal(state[key], before[key]) for key in state)


def test_what_is_trained_is_the_folded_network(network, tmp_path):
    done, files = folded_files(network, tmp_path / "out")
    recipe = small(network, 1)
    # So small steps change no answer: the networks start from their own weights, not from random ones.
    tuned = finetuning.finetuned(
        done, network, files, msgspec.structs.replace(recipe, lr=1e-12, weight_decay=0), lambda *_: None
    )
    more = tuned.record.finetuned
    assert more.loss == done.record.loss
    assert more.alone.worse == more.alone.better == 0


def test_a_second_time_nothing_is_trained(network, tmp_path):
    done, files = folded_files(network, tmp_path / "out")
    recipe, said = small(network, 1), []
    first = finetuning.finetuned(done, network, files, recipe, lambda *_: None, said.append)
    assert said == []
    done, files = folded_files(network, tmp_path / "out")
    again = finetuning.finetuned(done, network, files, recipe, lambda *_: None, said.append)
    assert again.record.finetuned == first.record.finetuned
    assert len(said) == 2
    assert all("already finished" in one for one in said)


def test_the_recipe_is_the_end_of_the_one_that_trained(network):
    recipe = finetuning.recipe_for(network, 4)
    base = find_recipe("cifar_short")
    assert recipe == recipe_of(base, 4)
    assert lr_at(recipe, 0) == pytest.approx(base.lr / 10)
    assert lr_at(recipe, 4) == pytest.approx(0, abs=1e-12)
    assert recipe.weight_decay == base.weight_decay
    assert recipe.crop_pad == base.crop_pad


def test_what_is_made_of_weights_knows_how_their_images_are_prepared(network, tmp_path, monkeypatch):
    state = safetensors.torch.load_file("w.safetensors")
    told = {"recipe": "keras_cifar10_cnn", "scaling": "unit", "seed": "0"}
    safetensors.torch.save_file(state, "u.safetensors", told)
    weights = tmp_path / "u.safetensors"
    # Wherever the program runs.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = judged(find(f"{tmp_path / 'tiny.toml'}:se_plain"), Seen(data=images(), batch=16), weights=weights)
    recipe = small(again, 1)
    assert (recipe.optimizer, recipe.scaling) == ("rmsprop", "unit")
    done, files = folded_files(again, tmp_path / "out")
    assert scaling_of(read_metadata(files.network), place="it") == "unit"
    finetuning.finetuned(done, again, files, recipe, lambda *_: None)
    assert scaling_of(read_metadata(files.finetuned), place="it") == "unit"


def test_images_without_labels_train_nothing(network, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    without = judged(find("tiny.toml:se_plain"), Seen(folder=photos), weights=None)
    with pytest.raises(SelabError, match="--finetune: needs images with labels"):
        finetuning.recipe_for(without, 1)
