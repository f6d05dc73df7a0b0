"""The gates of trained networks, on the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selab.judging.record import read_gates
from selab.models.build import build
from selab.models.catalog import find

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(build(find("se_small_cnn"), seed=3).model.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 256, (24, 24, 3), np.uint8)
        image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


def test_a_trained_network_on_its_test_images(selab, tmp_path, weights):
    words = ("gates", "--arch", "se_small_cnn", "--weights", weights, "--data", "synthetic", "--most", 250)
    status, out, err = selab(*words, "--json", tmp_path / "g.json", "--pictures", tmp_path / "p", "--classes", "0,7")
    assert status == 0, err
    said = " ".join(out.split())
    assert "The gates of se_small_cnn over 250 images of synthetic (test), 10 classes" in said
    record = read_gates(tmp_path / "g.json")
    assert (record.images, record.weights) == (250, "w.safetensors")
    assert [one.channels for one in record.blocks] == [32, 32, 64, 64]
    assert list(record.class_means) == ["0", "7"]
    assert record.blocks[0].specificity is not None
    for name in ("gates.svg", "depth.svg"):
        assert "se_small_cnn" in (tmp_path / "p" / name).read_text()


def test_an_onnx_file_over_a_folder_has_the_gates_of_its_network(selab, tmp_path, photos, weights):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    export = ("export", "--arch", "se_small_cnn", "--weights", weights, "--to", "onnx", "--batch", 5, "--out", path)
    status, _, err = selab(*export)
    assert status == 0, err
    found = []
    for words in (("--arch", path, "--batch", 5), ("--arch", "se_small_cnn", "--weights", weights)):
        status, out, err = selab("gates", *words, "--images", photos, "--input", "3x32x32", "--json", "-")
        assert status == 0, err
        found.append(json.loads(out))
    assert [one["images"] for one in found] == [5, 5]
    assert [one["classes"] for one in found] == [[], []]
    for graph, module in zip(*(one["blocks"] for one in found), strict=True):
        np.testing.assert_allclose(graph["mean"], module["mean"], rtol=1e-4)
        np.testing.assert_allclose(graph["deviation"], module["deviation"], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--arch", "se_small_cnn", "--data", "synthetic"), "se_small_cnn: has random weights"),
        (("--arch", "small_cnn", "--weights", "base", "--data", "synthetic"), "no block with one gate per channel"),
        (("--arch", "se_small_cnn", "--weights", "none.pt", "--data", "synthetic"), "none.pt"),
        (("--arch", "se_small_cnn", "--weights", "w", "--data", "synthetic", "--classes", "cat"), "no such class"),
        (("--arch", "se_small_cnn", "--weights", "w", "--images", "nowhere"), "nowhere: is no folder"),
        (("--arch", "se_resnet18", "--weights", "w", "--images", "photos"), "w.safetensors"),
    ],
)
def test_bad_input_is_one_line(selab, tmp_path, monkeypatch, weights, photos, words, said):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    save_file(build(find("small_cnn")).model.state_dict(), base)
    files = {"base": base, "w": weights}
    status, _, err = selab("gates", *(files.get(word, word) for word in words), "--json", "g.json")
    assert status != 0
    assert said in " ".join(err.split())
    assert err.count("error:") == 1
    assert not (tmp_path / "g.json").exists()
