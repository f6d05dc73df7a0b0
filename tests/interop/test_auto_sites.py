"""Automatic sites in networks of torchvision and timm: how many of which kind, and what is left out."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from selab.attention.auto_sites import trace_ends
from selab.attention.insert import insert_se
from selab.attention.inserted import check_inserted
from selab.meta import passages
from selab.models import external
from selab.models.build import build

torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed: pip install 'selab[torchvision]'"
)
timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'selab[timm]'")

R, P, D, C, S = "residual", "parallel", "depthwise-separable", "concatenation", "stage"
# Counts follow from the papers' tables of blocks; the comment says how.
KINDS = {
    # 5 stages before the 5 poolings; 3 poolings.
    "torchvision:vgg11_bn": {S: 5},
    "torchvision:alexnet": {S: 3},
    # 4 dense blocks; 9 and 11 Inception modules; 8 Fire modules; 4 + 8 + 4 units.
    "torchvision:densenet121": {C: 4},
    "torchvision:googlenet": {C: 9},
    "torchvision:inception_v3": {C: 11},
    "torchvision:squeezenet1_0": {C: 8},
    "torchvision:shufflenet_v2_x0_5": {C: 16},
    # 3 in the stem, 4 A, 7 B, 3 C and 2 reductions.
    "timm:inception_v4": {C: 19},
    # 1 + 1 + 2 + 2 one-shot aggregations; with a shortcut in the second of a stage.
    "timm:vovnet39a": {C: 6},
    "timm:ese_vovnet39b": {C: 4, R: 2},
    # 4 one-shot aggregations, and the separable block of the stem that they do not concatenate.
    "timm:ese_vovnet19b_slim_dw": {C: 4, D: 1},
    # Inverted blocks: 1 + 2 with a shortcut, 4 at a new resolution.
    "timm:mobilevit_xxs": {R: 3, D: 4},
    # 3 + 4 + 12 + 3 dual-path blocks.
    "timm:dpn68": {C: 22},
    # 2 + 4 + 14 + 1 blocks behind the stem; 2 + 8 + 10 + 1 pairs.
    "timm:repvgg_a0": {P: 21},
    "timm:mobileone_s1": {D: 21},
    # 2 + 2 + 4 + 2 blocks of two branches, one of them a merged sum; a stem, 3 transitions and a last convolution.
    "timm:fastvit_t8": {P: 11, R: 10, D: 4},
    # 2 + 2 + 6 + 2 focal blocks of two branches each.
    "timm:focalnet_tiny_srf": {R: 24},
    # Positional encodings on maps, and tokens.
    "timm:davit_tiny": {},
    "timm:twins_svt_small": {},
    "timm:mvitv2_tiny": {},
    "timm:swin_tiny_patch4_window7_224": {},
}


def network(word):
    return build(external.find(word), device="meta").model


def shape(word):
    return (1, *external.find(word).input_chw)


def kinds(word):
    return Counter(end.kind for end in trace_ends(network(word), shape(word)).found)


@pytest.mark.parametrize("word", KINDS)
def test_the_number_of_sites_of_each_kind(word):
    assert kinds(word) == KINDS[word]


@pytest.mark.parametrize(
    ("word", "blocks"),
    [
        ("timm:efficientnet_b0", 16),
        ("timm:mixnet_s", 16),
        ("timm:tf_mixnet_s", 16),
        ("timm:repghostnet_050", 16),
    ],
)
def test_one_site_for_each_inverted_block(word, blocks):
    """Rows of the papers' tables: arXiv 1905.11946 (1), 1907.09595 (Fig. 5), 2211.06088 (8)."""
    assert sum(kinds(word).values()) == blocks


@pytest.mark.parametrize("word", [word for word, found in KINDS.items() if found])
def test_sites_are_feature_maps_and_can_be_gated(word):
    model, input_nchw = network(word), shape(word)
    found = [end.path for end in trace_ends(model, input_nchw).found]
    for passage in passages(model, found, input_nchw).values():
        batch, channels, height, width = passage.output_shape
        assert passage.calls == batch == 1
        assert min(channels, height, width) > 1
    # insert_se itself proves that each block runs once.
    assert len(insert_se(model, found, reduction=4, input_nchw=input_nchw)) == len(found)


@pytest.mark.parametrize(
    ("word", "outside"),
    [
        ("timm:hrnet_w18_small", "fuse_layers"),
        ("timm:mobilenetv4_conv_small", "pw_exp"),
        ("timm:hgnetv2_b0", "layers"),
        ("timm:focalnet_tiny_srf", "focal_layers"),
        ("timm:fastvit_t8", "conv_kxk"),
        ("timm:fastvit_t8", "conv_scale"),
        ("timm:mobilevitv2_050", "transformer"),
        ("timm:repghostnet_050", "cheap_operation"),
        ("timm:nasnetalarge", "comb_iter"),
    ],
)
def test_no_site_inside_a_block(word, outside):
    found = [end.path for end in trace_ends(network(word), shape(word)).found]
    assert found
    assert not [path for path in found if outside in path]


@pytest.mark.parametrize(
    ("name", "pixels", "dtype"),
    [
        ("repvgg_a0", 64, torch.float64),
        ("mobileone_s0", 64, torch.float64),
        ("fastvit_t8", 64, torch.float64),
        ("repghostnet_050", 64, torch.float64),
        ("shvit_s1", 64, torch.float64),
        ("iformer_t", 64, torch.float64),
        ("lcnetv2_small", 64, torch.float64),
        ("efficientvim_m1", 64, torch.float64),
        # What their `fuse` makes is single precision.
        ("efficientvit_m0", 224, torch.float32),
        ("repvit_m1", 64, torch.float32),
        ("levit_conv_128s", 224, torch.float32),
    ],
)
def test_re_parameterisation_keeps_every_block(name, pixels, dtype):
    """timm's `reparameterize_model` merges the branches; the blocks stay, and so does the output."""
    torch.manual_seed(0)
    model, size = timm.create_model(name).eval().to(dtype), (1, 3, pixels, pixels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.0)
    inserted = insert_se(model, [end.path for end in trace_ends(model, size).found], reduction=4, input_nchw=size)
    merged = timm.utils.model.reparameterize_model(copy.deepcopy(model)).eval()
    sites = check_inserted(merged, input_nchw=size, inserted=inserted)
    assert {one.path for one in inserted} <= set(sites)
    assert sum(one.numel() for one in merged.parameters()) < sum(one.numel() for one in model.parameters())
    x = torch.randn(size, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        rounding = {torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=rounding * float(expected.abs().max()))
