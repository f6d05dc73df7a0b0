"""Networks cut into backbones: the maps that they give, their keys, dilation and freezing."""

import copy

import pytest
import torch
from torch import nn

import selab
from selab.errors import ModelError, SelabError, UnknownNameError
from selab.models import backbone, catalog
from selab.models.build import build
from selab.models.checkpoint import WeightsError

# Network, channels and strides of all its maps; as published: the tables of each paper's architecture.
NETWORKS = [
    ("se_resnet18", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
    ("se_resnet50", (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)),
    ("se_resnext50_32x4d", (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)),
    ("senet154", (128, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)),
    ("se_mobilenet", (64, 128, 256, 512, 1024), (2, 4, 8, 16, 32)),
    ("se_mobilenet_v2", (16, 24, 32, 96, 320), (2, 4, 8, 16, 32)),
    ("mobilenet_v3_large", (16, 24, 40, 112, 160), (2, 4, 8, 16, 32)),
    ("mobilenet_v3_small", (16, 16, 24, 48, 96), (2, 4, 8, 16, 32)),
    ("se_shufflenet", (24, 24, 240, 480, 960), (2, 4, 8, 16, 32)),
    ("se_shufflenet_v2_x1_0", (24, 24, 116, 232, 464), (2, 4, 8, 16, 32)),
    ("regnet_y_400mf", (32, 48, 104, 208, 440), (2, 4, 8, 16, 32)),
    ("se_densenet121", (64, 128, 256, 512, 1024), (2, 4, 8, 16, 32)),
    ("se_vgg16", (64, 128, 256, 512, 512, 512), (1, 2, 4, 8, 16, 32)),
    ("se_resnet20_cifar", (16, 32, 64), (1, 2, 4)),
    ("se_small_cnn", (32, 64, 64), (1, 2, 4)),
]


@pytest.mark.parametrize(("name", "channels", "strides"), NETWORKS, ids=[one[0] for one in NETWORKS])
def test_maps_have_the_channels_and_strides_of_the_network_s_stages(name, channels, strides):
    variant = catalog.find(name)
    trunk = backbone(build(variant, device="meta").model, input_nchw=(1, *variant.input_chw))
    assert (trunk.channels, trunk.strides) == (channels, strides)


@pytest.mark.parametrize("name", ["se_resnet18", "se_mobilenet_0_25", "se_small_cnn", "se_shufflenet_cifar"])
def test_maps_are_what_the_network_computes_under_its_own_keys(name):
    whole = selab.build(name, seed=3).eval()
    size = (2, *catalog.find(name).input_chw)
    seen = {}
    trunk = backbone(name, seed=3).eval()
    for one in trunk.feature_info:
        # Cloned: an activation behind it may work in place.
        whole.get_submodule(one.path).register_forward_hook(
            lambda _m, _a, output, path=one.path: seen.update({path: output.clone()})
        )
    images = torch.randn(size)
    with torch.no_grad():
        whole(images)
        maps = trunk(images)
    assert [tuple(one.shape[:2]) for one in maps] == [(2, channels) for channels in trunk.channels]
    for one, found in zip(trunk.feature_info, maps, strict=True):
        assert torch.equal(found, seen[one.path])
    state = whole.state_dict()
    assert trunk.state_dict().keys() < state.keys()
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())


def test_only_what_the_wanted_maps_need_is_kept():
    trunk = backbone("se_resnet18", (1, 2))
    assert [name for name, _ in trunk.named_children()] == ["stem", "stage2", "stage3"]
    assert [one.stride for one in trunk.available] == [2, 4, 8]
    assert len(trunk(torch.zeros(1, 3, 64, 64))) == 2


def test_a_copy_and_a_fused_copy_compute_the_same():
    trunk = backbone("se_resnet18", (2, 4)).eval()
    fused = copy.deepcopy(trunk)
    fusion = selab.fuse(fused, input_nchw=(1, 3, 96, 96))
    assert len(fusion.blocks) == 8
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for one, two in zip(trunk(images), fused(images), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_blocks_go_into_a_backbone_by_the_groups_of_its_network():
    trunk = backbone("resnet18", (1, 2))
    assert trunk.site_groups() == {"residual": ["stage2.0", "stage2.1", "stage3.0", "stage3.1"]}
    inserted = selab.insert_se(trunk, "residual", input_nchw=(1, 3, 64, 64))
    assert len(inserted) == 4
    assert len(selab.insert_se(backbone("resnet18", (1, 2)), "auto", input_nchw=(1, 3, 64, 64))) == 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            (1, 5),
            r"se_small_cnn: has no feature map 5; it has 0 \(stride 1, 32 channels\), 1 \(stride 2, 64 channels\), "
            r"2 \(stride 4, 64 channels\)",
        ),
        ((True,), "has no feature map True"),
        ((-1,), "has no feature map -1"),
        ((2, 1), r"out_indices \[2, 1\]: name feature maps in rising order"),
        ((1, 1), "in rising order"),
        ((), r"out_indices: name at least one feature map; it has"),
        (3, r"out_indices 3: give a list of numbers; it has"),
    ],
)
def test_a_map_that_is_not_there_says_what_is(wanted, message):
    with pytest.raises(ModelError, match=message):
        backbone("se_small_cnn", wanted)


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.one(-x) + self.two(x.abs())


class Functional(nn.Module):
    """Its stages are a chain up to a function."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.three = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        return self.three(self.two(self.one(x)).relu_())


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x)


def test_a_network_is_cut_where_its_modules_are_no_chain():
    trunk = backbone(Functional(), input_nchw=(1, 3, 32, 32))
    assert [one.path for one in trunk.feature_info] == ["one", "two"]
    with pytest.raises(
        ModelError, match=r"it has 0 .*1 \(stride 4, 8 channels\); behind two its modules do not form a"
    ):
        backbone(Functional(), (2,), input_nchw=(1, 3, 32, 32))
    with pytest.raises(ModelError, match="Branched: its modules do not form a chain"):
        backbone(Branched(), input_nchw=(1, 3, 32, 32))
    with pytest.raises(ModelError, match=r"takes no image \(N, C, H, W\)"):
        backbone(Vector(), input_nchw=(1, 3))


def test_names_and_modules_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match=r"backbone se_resnet5: no such architecture; did you mean"):
        backbone("se_resnet5")
    with pytest.raises(ModelError, match="a module needs `input_nchw`"):
        backbone(nn.Conv2d(3, 4, 3))
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises((WeightsError, SelabError), match=r"weights\.safetensors"):
        backbone("small_cnn", weights=tmp_path / "weights.safetensors")


def test_weights_of_another_number_of_classes_are_loaded_without_the_classifier(tmp_path):
    import safetensors.torch

    state = build(catalog.find("small_cnn"), seed=7).model.state_dict()
    head = [key for key in state if key.startswith("head.")][-2:]
    state |= {key: torch.zeros(5, *state[key].shape[1:]) for key in head}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    trunk = backbone("small_cnn", weights=str(tmp_path / "w.safetensors"), seed=1)
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- dilation
def test_dilation_keeps_what_each_convolution_sees():
    trunk = backbone("resnet50_v1_5", (3, 4), output_stride=8)
    assert trunk.strides == (8, 8)
    steps = {path: (m.stride[0], m.dilation[0]) for path, m in trunk.named_modules() if isinstance(m, nn.Conv2d)}
    threes = {path: found for path, found in steps.items() if path.startswith(("stage4", "stage5")) and "conv2" in path}
    # As torchvision's replace_stride_with_dilation: the first block of a stage is dilated as the stage before it.
    assert list(threes.values()) == [(1, 1)] + [(1, 2)] * 5 + [(1, 2)] + [(1, 4)] * 2, threes
    assert {one[0] for path, one in steps.items() if path.startswith(("stage4", "stage5"))} == {1}


def test_every_second_pixel_of_a_dilated_network_s_map_is_that_of_the_network():
    plain, dilated = (backbone("resnet18", (4,), seed=1, output_stride=one).eval() for one in (None, 16))
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        (small,), (large,) = plain(images), dilated(images)
    assert small.shape[2:] == (4, 4)
    torch.testing.assert_close(large[:, :, ::2, ::2], small)


def test_what_cannot_be_dilated_stays_as_it_was():
    model = build(catalog.find("bn_inception"), device="meta").model
    before = {path: str(one) for path, one in model.named_modules()}
    with pytest.raises(ModelError, match="output_stride 16: something other than convolutions"):
        backbone(model, input_nchw=(1, 3, 224, 224), output_stride=16)
    assert {path: str(one) for path, one in model.named_modules()} == before
    with pytest.raises(ModelError, match="output_stride 5: its maps have strides 1, 2, 4"):
        backbone("small_cnn", output_stride=5)


# ------------------------------------------------------------------------------------------------------------- freezing
def test_frozen_stages_and_norms_stay_while_the_rest_is_trained():
    trunk = backbone("se_resnet18").freeze(stages=2, norms=True)
    trained = {name.partition(".")[0] for name, one in trunk.named_parameters() if one.requires_grad}
    assert trained == {"stage3", "stage4", "stage5"}
    trunk.train()
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    optimizer = torch.optim.SGD([one for one in trunk.parameters() if one.requires_grad], lr=0.1)
    sum(one.square().mean() for one in trunk(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in trunk.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    norms = [path for path, one in trunk.named_modules() if isinstance(one, nn.BatchNorm2d)]
    assert not [key for key in changed if key.startswith(("stem", "stage2")) or key.rpartition(".")[0] in norms]
    assert not any(one.training for one in trunk.modules() if isinstance(one, nn.BatchNorm2d))
    assert copy.deepcopy(trunk).train().state_dict().keys() == before.keys()
    with pytest.raises(ModelError, match="stages=6: the network has 5"):
        trunk.freeze(stages=6)
