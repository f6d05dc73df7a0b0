"""The commands that convert weights."""

import json

import pytest
import safetensors.torch
import torch

from selab.training.data import synthetic_set


@pytest.fixture
def listing(root):
    """Key → shape of torchvision's mobilenet_v3_small."""
    text = (root / "tests" / "data" / "foreign_keys.txt").read_text()
    shapes = {}
    for line in text.partition("[torchvision mobilenet_v3_small]\n")[2].partition("[")[0].splitlines():
        module, size = line.split()
        shape = tuple(map(int, size.removesuffix("+").split("x")))
        if len(shape) == 1:
            names = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{module}.{name}": shape for name in names} | {f"{module}.num_batches_tracked": ()}
        else:
            shapes |= {f"{module}.weight": shape} | ({f"{module}.bias": shape[:1]} if size.endswith("+") else {})
    return shapes


class TestWeights:
    def test_the_list_says_what_is_called_how(self, selab):
        status, out, _ = selab("weights", "list", "--json", "-")
        found = {(one["arch"], one["source"]): one["model"] for one in json.loads(out)}
        assert status == 0
        assert found["resnet50_v1_5", "torchvision"] == "resnet50"
        assert found["se_resnet50", "cadene"] == "se_resnet50"
        assert ("resnet50", "torchvision") not in found

    def test_another_network_of_the_same_shapes_is_refused(self, selab, tmp_path, one_line):
        source = tmp_path / "resnet50.safetensors"
        safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, source)
        target = tmp_path / "ours.safetensors"
        status, _, error = selab("weights", "convert", source, target, "--from", "torchvision", "--arch", "resnet50")
        assert status == 1
        assert "strides" in one_line(error)
        assert not target.exists()

    def test_a_state_dict_of_something_else_loads_nothing(self, selab, tmp_path, one_line):
        source = tmp_path / "odd.safetensors"
        safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, source)
        target = tmp_path / "ours.safetensors"
        status, _, error = selab("weights", "convert", source, target, "--from", "torchvision", "--arch", "resnet18")
        assert status == 1
        assert "missing" in one_line(error)
        assert not target.exists()

    def test_what_was_taken_is_said(self, selab, tmp_path):
        from selab.models.build import build
        from selab.models.catalog import find

        state = build(find("se_small_cnn"), seed=1).model.state_dict()
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        averaged = {f"module.{key}": value for key, value in state.items()}
        torch.save({"state_dict": other, "state_dict_ema": averaged, "epoch": 3}, tmp_path / "in.pth.tar")
        words = ["eval", "--arch", "se_small_cnn", "--weights", tmp_path / "in.pth.tar", "--data", "synthetic"]
        status, _, error = selab(*words)
        assert status == 0
        assert "taken from state_dict_ema, an average of the weights (EMA); prefix module. removed" in error
        status, plain, error = selab(*words, "--no-ema", "--json", "-")
        assert status == 0
        assert "taken from state_dict; left out: state_dict_ema, epoch; --ema takes the average" in error
        # Ten equal logits: the loss is that of guessing, ln 10.
        assert abs(json.loads(plain)["loss"] - 2.302585) < 1e-4

    def test_another_number_of_classes(self, selab, tmp_path, one_line, listing):
        source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
        state = {key: torch.zeros(shape, dtype=None if shape else torch.long) for key, shape in listing.items()}
        state |= {"classifier.3.weight": torch.zeros(10, 1024), "classifier.3.bias": torch.zeros(10)}
        torch.save(state, source)
        words = ["weights", "convert", source, target, "--from", "torchvision", "--arch", "mobilenet_v3_small"]
        status, _, error = selab(*words)
        assert status == 1
        assert "--head drop" in one_line(error)
        assert not target.exists()
        status, _, error = selab(*words, "--head", "drop")
        assert status == 0
        assert "classifier dropped, initialised anew: head.fc.weight, head.fc.bias" in error
        written = safetensors.torch.load_file(target)
        assert written["head.fc.weight"].shape == (1000, 1024)
        assert written["head.fc.weight"].abs().sum() > 0
        assert written["stem.conv.weight"].abs().sum() == 0

    def test_a_classifier_of_other_data_is_converted_with_it(self, selab, tmp_path, one_line, listing):
        source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
        state = {key: torch.zeros(shape, dtype=None if shape else torch.long) for key, shape in listing.items()}
        state |= {key: torch.ones_like(value) for key, value in state.items() if key.endswith("running_var")}
        state |= {"classifier.3.weight": torch.zeros(10, 1024), "classifier.3.bias": torch.arange(10.0)}
        torch.save(state, source)
        words = ["weights", "convert", source, target, "--from", "torchvision", "--arch", "mobilenet_v3_small"]
        status, _, error = selab(*words)
        assert status == 1
        assert "--num-classes 10, or --head drop" in one_line(error)
        status, _, error = selab(*words, "--num-classes", 10)
        assert status == 0, error
        tested = ["eval", "--arch", "mobilenet_v3_small", "--weights", target, "--json", "-"]
        # Converted for images of 224 pixels; the network takes others too.
        status, out, error = selab(*tested, "--data", "synthetic")
        assert status == 0, error
        found = json.loads(out)
        # The last class has the greatest logit for every image.
        assert found["top1_correct"] == int((synthetic_set().test_labels == 9).sum())
        status, _, error = selab(*tested, "--data", "cifar100", "--data-dir", tmp_path, "--no-download")
        assert status == 1
        other = tmp_path / "other.safetensors"
        status, _, error = selab(*words[:3], other, *words[4:], "--num-classes", 11)
        assert status == 1
        assert "has 10 classes, and mobilenet_v3_small has 11" in one_line(error)
        assert not other.exists()
