"""Each declared pair of networks computes the same: theirs and ours, converted by the product, give equal logits."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from selab.models import key_maps
from selab.models.build import build
from selab.models.catalog import installed
from selab.models.checkpoint import convert, load

# Networks that end in a pooling of a fixed size, or shrink their input too much, get the one that they were made for.
OWN_SIZE = {"inceptionresnetv2": 299, "inception_resnet_v2": 139}


def name(port):
    return f"{port.source}-{port.model}-{port.arch}"


def input_of(port):
    own = 224 if port.source == "cadene" else 96
    side = OWN_SIZE.get(port.model, own)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def randomise(model, x):
    """Weights under which every tensor matters: no zero scale or bias, and statistics that are nobody's default.

    The running statistics are first those of the input, so that a deep network neither explodes nor dies out, and then
    moved away from them.
    """
    torch.manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for key, value in model.named_parameters():
        if value.dim() == 1:
            nn.init.normal_(value, std=0.1)
            if key.endswith("weight"):
                nn.init.uniform_(value, 0.5, 1.5)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
    return model.eval()


def logits_of_both(port, foreign_model, folder):
    """Theirs, and ours with their weights, of the same images.

    In double precision: in single, a hundred layers with SE make 6e-5 of the rounding of two orders of summation.
    """
    x = input_of(port)
    theirs = randomise(foreign_model(port.source, port.model), x)
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    convert(folder / "theirs.pth", folder / "ours.safetensors", source=port.source, arch=port.arch)
    variant = installed()[port.arch]
    ours = build(variant).model.eval()
    load(ours, folder / "ours.safetensors", variant=variant)
    with torch.no_grad():
        return theirs.double()(x.double()), ours.double()(x.double())


def difference(one, other):
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("port", key_maps.PORTS, ids=name)
def test_equal(port, foreign_model, tmp_path):
    theirs, ours = logits_of_both(port, foreign_model, tmp_path)
    assert difference(theirs[:1], theirs[1:]) > 1e-2, "the logits say nothing about the image"
    # A bias that is folded into a mean is rounded once more, to single precision.
    assert difference(theirs, ours) < (1e-5 if port.folds_bias else 1e-10)


@pytest.mark.parametrize("port", key_maps.UNEQUAL, ids=name)
def test_unequal_although_every_tensor_fits(port, foreign_model, tmp_path, monkeypatch):
    monkeypatch.setattr(key_maps, "PORTS", (replace(port, unequal=""),))
    monkeypatch.setattr(key_maps, "UNEQUAL", ())
    theirs, ours = logits_of_both(port, foreign_model, tmp_path)
    assert difference(theirs, ours) > 1e-4
