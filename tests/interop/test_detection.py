"""Detectors and segmenters: torchvision's numbers and outputs, and work that does not depend on weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import selab
from selab.cost.count import count
from selab.errors import ModelError
from selab.models import backbone, catalog, key_maps
from selab.models.build import build
from selab.models.checkpoint import convert, load
from selab.records.store import read_record

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
detection = pytest.importorskip("selab.models.detection")

SIZE = (160, 224)
# Ours, torchvision's, and what its documentation gives with frozen BatchNorms (0.27, num_params): those of the ResNet's
# 53 BatchNorms, two for each of 26,560 channels, are no parameters there.
_FROZEN = 2 * 26_560
NETWORKS = [
    ("faster_rcnn_resnet50_v1_5_fpn", "fasterrcnn_resnet50_fpn", 41_755_286 + _FROZEN),
    ("retinanet_resnet50_v1_5_fpn", "retinanet_resnet50_fpn", 34_014_999 + _FROZEN),
    ("deeplabv3_resnet50_v1_5", "deeplabv3_resnet50", 42_004_074),
]


def theirs(name):
    arguments = {"aux_loss": True} if name.startswith("deeplab") else {}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, **arguments)


@pytest.mark.parametrize(("name", "other", "params"), NETWORKS)
def test_parameters_are_those_that_torchvision_publishes(name, other, params):
    ours = build(catalog.find(name), device="meta").model
    assert sum(one.numel() for one in ours.parameters()) == params
    assert sum(one.numel() for one in theirs(other).parameters()) == params


def test_macs_of_deeplab_are_those_that_torchvision_publishes():
    # 178.722 G at 520 x 520 (torchvision 0.27, DeepLabV3_ResNet50_Weights, _ops).
    assert round(selab.count("deeplabv3_resnet50_v1_5").macs.conv_linear / 1e9, 3) == 178.722


@pytest.mark.parametrize(("name", "other"), [one[:2] for one in NETWORKS])
def test_outputs_are_torchvision_s_with_the_same_weights(name, other):
    ours, reference = selab.build(name, seed=1), theirs(other)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    # Both hold the same tensors in the same order.
    state = dict(zip(reference.state_dict(), ours.state_dict().values(), strict=True))
    reference.load_state_dict(state)
    ours.eval(), reference.eval()
    image = torch.rand(3, *SIZE)
    given = image[None] if name.startswith("deeplab") else [image]
    with torch.no_grad():
        found, expected = ours(given), reference(given)
    for one, two in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("port", key_maps.DETECTORS, ids=lambda port: port.arch)
def test_weights_of_torchvision_are_converted(port, tmp_path):
    torch.manual_seed(0)
    reference = theirs(port.model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(reference.state_dict(), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", source=port.source, arch=port.arch)
    ours = selab.build(port.arch)
    load(ours, tmp_path / "ours.safetensors", variant=catalog.find(port.arch))
    image = torch.rand(3, *SIZE)
    given = image[None] if port.model.startswith("deeplab") else [image]
    with torch.no_grad():
        found, expected = ours.eval()(given), reference.eval()(given)
    for one, two in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["faster_rcnn_resnet18_fpn", "retinanet_resnet18_fpn", "ssdlite_mobilenet_v3_small"])
def test_training_gives_torchvision_s_losses_for_a_list_and_for_a_batch(name):
    model = selab.build(name).train()
    size = (320, 320) if name.startswith("ssd") else SIZE
    batch = torch.rand(2, 3, *size)
    losses = model(batch)
    targets = detection.fixed_targets(2, size, model.num_classes, batch.device)
    assert losses.keys() == model(list(batch), targets).keys()
    assert all(one.isfinite() and one.requires_grad for one in losses.values())
    sum(losses.values()).backward()
    assert all(one.grad is not None for one in model.backbone.parameters())
    with pytest.raises(AssertionError, match="targets should not be none"):
        model(list(batch))


# ---------------------------------------------------------------------------------------------------------- fixed work
@pytest.mark.parametrize("name", ["faster_rcnn_resnet18_fpn", "retinanet_resnet18_fpn"])
def test_the_work_on_a_batch_does_not_depend_on_weights_or_pixels(name):
    shapes = set()
    for seed in (0, 1):
        model = selab.build(name, seed=seed).eval()
        with torch.no_grad():
            output = model(seed * torch.randn(1, 3, *SIZE))
        shapes.add(tuple(tuple(one.shape) for one in torch.utils._pytree.tree_leaves(output)))
    assert len(shapes) == 1


def test_fixed_proposals_are_pooled_as_torchvision_pools_them():
    model = selab.build("faster_rcnn_resnet18_fpn").eval()
    images = detection._padded(torch.randn(2, 3, 200, 331))
    with torch.no_grad():
        maps = model.backbone(images.tensors)
        found = model._pool(maps, images)
        boxes = torch.from_numpy(detection.fixed_boxes(200, 331, 1000))
        expected = model.roi_heads.box_roi_pool(maps, [boxes, boxes], images.image_sizes)
    # Ours are ordered by level, and within it by image; boxes are ordered by size, so that levels rise.
    levels = model.roi_heads.box_roi_pool.map_levels([boxes])
    assert levels.diff().min() == 0
    per_level = torch.bincount(levels).tolist()
    assert len(per_level) >= 2
    first, second = (one.split(per_level) for one in expected.split(1000))
    torch.testing.assert_close(found, torch.cat([part for pair in zip(first, second, strict=True) for part in pair]))


def test_fixed_boxes_lie_in_the_image_and_have_the_sizes_of_the_anchors():
    boxes = detection.fixed_boxes(800, 1333, 1000)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 1333).all()
    assert (boxes[:, 3] <= 800).all()
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) ** 0.5
    assert {round(float(one)) for one in sides} >= {32, 64, 128, 256, 512}


def test_a_batch_with_targets_of_one_s_own_uses_those():
    model = selab.build("retinanet_resnet18_fpn").train()
    batch = torch.rand(1, 3, *SIZE)
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert model(batch, empty)["bbox_regression"].item() == 0
    assert model(batch)["bbox_regression"].item() > 0


# ------------------------------------------------------------------------------------------------- blocks, fuse, names
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("faster_rcnn_se_resnet50_fpn", 16),
        ("retinanet_se_resnext50_32x4d_fpn", 16),
        ("ssdlite_mobilenet_v3_large", 8),
        ("deeplabv3_se_resnet18", 8),
        ("faster_rcnn_se_mobilenet_fpn", 13),
        ("faster_rcnn_regnet_y_400mf_fpn", 16),
        ("ssdlite_se_shufflenet_v2_x1_0", 16),
    ],
)
def test_se_stands_in_the_backbone_as_in_its_network(name, blocks):
    variant = catalog.find(name)
    made = build(variant, device="meta")
    trunk = build(catalog.find(variant.arguments["trunk"]), device="meta")
    assert [one.path for one in made.insertions] == [f"backbone.body.{one.path}" for one in trunk.insertions]
    assert len(made.insertions) == blocks
    base = build(catalog.baseline_of(variant), device="meta").model
    added = sum(one.numel() for one in made.model.parameters()) - sum(one.numel() for one in base.parameters())
    assert added == sum(one.params for one in made.insertions)


def test_variant_and_baseline_share_the_values_of_their_common_layers():
    one, two = selab.build("ssdlite_se_mobilenet_0_25", seed=3), selab.build("ssdlite_mobilenet_0_25", seed=3)
    state = one.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in two.state_dict().items())


def test_blocks_of_one_s_own_on_a_detector():
    one = build(catalog.find("retinanet_resnet18_fpn+reduction=8,stages=4-5"), device="meta")
    assert [found.path for found in one.insertions] == [
        f"backbone.body.{path}" for path in ("stage4.0", "stage4.1", "stage5.0", "stage5.1")
    ]
    auto = build(catalog.find("retinanet_resnet18_fpn+sites=auto,bias=true"), device="meta")
    assert len(auto.insertions) == 8


@pytest.mark.parametrize("name", ["faster_rcnn_se_resnet18_fpn", "deeplabv3_se_resnet18", "ssdlite_mobilenet_v3_large"])
def test_a_fused_detector_computes_the_same(name):
    model = selab.build(name).eval()
    fused = copy.deepcopy(model)
    shape = (1, 3, 320, 320)
    fusion = selab.fuse(fused, input_nchw=shape)
    assert len(fusion.blocks) == 8
    assert not [one for one in fusion.blocks if one.reason]
    images = torch.randn(shape)
    with torch.no_grad():
        for one, two in zip(*(torch.utils._pytree.tree_leaves(each(images)) for each in (model, fused)), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
        if not name.startswith("deeplab"):
            assert fused([images[0]])[0].keys() == {"boxes", "labels", "scores"}


def test_auto_and_fuse_on_a_detector_of_one_s_own():
    torch.manual_seed(0)
    model = theirs("fasterrcnn_resnet50_fpn").eval()
    example = ([torch.rand(3, 96, 128)],)
    inserted = selab.insert_se(model, "auto", inputs=example, on="cpu")
    assert len(inserted) == 16
    assert all(one.path.startswith("backbone.body.layer") for one in inserted)
    with torch.no_grad():
        before = model(*example)
        fusion = selab.fuse(model, inputs=example, on="cpu")
        after = model(*example)
    assert len(fusion.blocks) == 16
    for key, value in before[0].items():
        torch.testing.assert_close(after[0][key], value, rtol=1e-3, atol=1e-3)


def test_a_backbone_without_the_asked_maps_says_what_it_has():
    with pytest.raises(ModelError, match=r"CIFARResNet: has no feature map 3; it has 0 \(stride 1, 16 channels\)"):
        selab.build("faster_rcnn_resnet20_cifar_fpn")


# ------------------------------------------------------------------------------------------------ others' own backbones
@pytest.mark.parametrize("name", ["seresnet50", "mobilenetv3_large_100", "regnety_008", "resnext50_32x4d"])
def test_maps_are_timm_s_features(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    features = timm.create_model(name, pretrained=False, features_only=True).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    trunk = backbone(model, input_nchw=(1, 3, 224, 224)).eval()
    assert list(trunk.channels) == features.feature_info.channels()
    assert list(trunk.strides) == features.feature_info.reduction()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for one, two in zip(trunk(image), features(image), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dilate"), [("resnet50", True), ("resnet50", False)])
def test_maps_and_dilation_are_torchvision_s(name, dilate):
    from torchvision.models._utils import IntermediateLayerGetter

    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None).eval()
    stepped = torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=[False, dilate, dilate])
    stepped.load_state_dict(plain.state_dict())
    getter = IntermediateLayerGetter(stepped.eval(), {f"layer{i}": str(i) for i in range(1, 5)})
    trunk = backbone(plain, (1, 2, 3, 4), input_nchw=(1, 3, 224, 224), output_stride=8 if dilate else None).eval()
    # In double precision: single precision rounds differently in other kernels and numbers of threads.
    trunk, getter = trunk.double(), getter.double()
    image = torch.randn(1, 3, 128, 160, dtype=torch.float64)
    with torch.no_grad():
        for one, two in zip(trunk(image), getter(image).values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_table_of_the_paper_in_the_docs_is_rendered():
    from pathlib import Path

    from selab.cost.count import count
    from selab.report import pages

    text = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    costs = {}
    for name in pages.costs_needed("paper-7"):
        variant = catalog.find(name)
        costs[name] = count(build(variant, device="meta").model, (1, *variant.input_chw))
    body = pages.page("paper-7", pages.named_tables("paper-7", costs), ())
    assert pages.spliced(text, "paper-7", body, where="docs/detection.md") == text


RECORDS = Path(__file__).parents[2] / "profiles"


@pytest.mark.parametrize("name", ["faster_rcnn_se_resnet50_fpn", "ssdlite_mobilenet_v3_large"])
def test_the_costs_of_its_records_are_those_of_today(name):
    files = [file for file in RECORDS.glob(f"*/{name}.*.json") if "-fp32-" in file.name]
    assert files
    for file in files:
        record = read_record(file)
        for arch, stored in ((record.arch, record.cost), (record.baseline, record.baseline_cost)):
            model = build(catalog.find(arch), device="meta").model
            found = count(model, (record.workload.batch, *record.workload.input_chw))
            for field in ("params", "macs", "macs_backward", "flops", "bytes", "activations"):
                assert getattr(found, field) == getattr(stored, field), f"{file.name}: {arch}: {field}"
