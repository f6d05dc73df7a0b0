"""The commands that convert weights."""

import json

import safetensors.torch
import torch


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
