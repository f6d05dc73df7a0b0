"""Trainings that start from weights in a file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import images

from selab.models.weights_file import WeightsError
from selab.training.run import TrainingError


def test_a_training_starts_from_weights(run, family, tmp_path):
    first = run(folder="first")
    start = Path(first.weights)
    other = run(folder="other", seed=1, weights=start, epochs=1, lr=1e-9)
    # So small a step leaves the weights where they began, whatever the seed.
    before, after = load_file(first.weights), load_file(other.weights)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-6)
    assert len(other.start_sha256) == 64
    assert first.start_sha256 == ""
    config = json.loads((tmp_path / "other" / "run.json").read_text())
    assert config["start_sha256"] == other.start_sha256


def test_the_start_is_a_part_of_the_request(run, tmp_path):
    first = run(folder="first")
    again = tmp_path / "again.safetensors"
    # Another order of the same tensors is the same start.
    save_file(dict(reversed(load_file(first.weights).items())), again)
    run(folder="other", weights=Path(first.weights), epochs=1)
    run(folder="other", weights=again, epochs=1)
    with pytest.raises(TrainingError, match="start_sha256"):
        run(folder="other", epochs=1)


def test_a_classifier_of_another_number_of_classes_is_left_out(run, tmp_path):
    first = run(folder="first", epochs=1)
    said = []
    found = run(folder="other", data=images(classes=3), weights=Path(first.weights), epochs=1, lr=1e-9, say=said.append)
    assert len(said) == 1
    assert "8.weight" in said[0]
    assert "3 classes" in said[0]
    before, after = load_file(first.weights), load_file(found.weights)
    torch.testing.assert_close(after["0.weight"], before["0.weight"], rtol=1e-5, atol=1e-6)
    assert after["8.weight"].shape[0] == 3


def test_weights_that_do_not_fit_are_refused_before_the_training(run, tmp_path):
    first = run("se_plain", folder="first", epochs=1)
    with pytest.raises(WeightsError, match="se_plain"):
        run("plain", folder="other", weights=Path(first.weights), epochs=1)
    assert not (tmp_path / "other").exists()
