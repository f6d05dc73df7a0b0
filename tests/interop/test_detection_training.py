"""torchvision's detectors are trained and tested on images in COCO's format."""

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)

from selab.experiments.compare import loaded
from selab.models import catalog
from selab.models.build import build
from selab.training.coco import open_coco
from selab.training.data import open_data
from selab.training.detection import configure, start_from
from selab.training.evaluate import evaluate
from selab.training.recipe import BoxRecipe, find_recipe
from selab.training.record import Options
from selab.training.shapes import write_shapes
from selab.training.train import train

SMALL = {"min_size": 64, "max_size": 64, "sampled": 16, "proposals": 20}
OPTIONS = Options(threads=torch.get_num_threads())


def boxed(**changes):
    return BoxRecipe(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("coco") / "shapes", train_size=4, val_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn_resnet18_fpn", "faster_rcnn_se_resnet18_fpn+init=identity"])
def test_a_detector_learns_shapes_in_minutes(name, tmp_path):
    data = open_data("shapes", data_dir=tmp_path, boxes=find_recipe("shapes").boxes)
    recipe = msgspec.structs.replace(find_recipe("shapes"), epochs=3)
    done = train(
        catalog.find(name), data, recipe, seed=0, folder=tmp_path / "run", options=OPTIONS, report=lambda _: None
    )
    assert done.test.images == 64
    assert done.test.precision.ap_pct > 50
    assert done.test.precision.ap50_pct > 80


@pytest.mark.parametrize(
    "name", ["faster_rcnn_se_resnet18_fpn", "retinanet_resnet18_fpn", "ssdlite_mobilenet_v3_small"]
)
def test_from_a_classifier_s_weights_only_what_is_not_frozen_moves(name, folder, tmp_path):
    variant = catalog.find(name)
    trunk = msgspec.structs.replace(catalog.find(variant.arguments["trunk"]), num_classes=7)
    weights = tmp_path / "trunk.safetensors"
    classifier = build(trunk, seed=1).model
    save_file(classifier.state_dict(), weights)
    # SSDLite reads two maps alone; its first frozen one is of stride 16.
    stages = 1 if name.startswith("ssdlite") else 2
    data = open_coco(folder, name="coco", boxes=boxed(frozen_stages=stages), workers=0)
    recipe = msgspec.structs.replace(find_recipe("coco_1x"), epochs=1, batch=2, milestones=(), boxes=data.boxes)
    said = []
    done = train(
        variant, data, recipe, seed=0, folder=tmp_path / "run", options=OPTIONS, report=lambda _: None,
        weights=weights, say=said.append,
    )  # fmt: skip
    assert done.start_sha256
    assert "left out, a detector has heads of its own" in said[0]
    trained, start = load_file(done.weights), classifier.state_dict()
    body = {key.removeprefix("backbone.body."): value for key, value in trained.items() if "backbone.body." in key}
    model = build(msgspec.structs.replace(variant, num_classes=4)).model
    body_of = model.backbone.body.freeze(stages=stages, norms=True)
    frozen = {key for key, one in body_of.named_parameters() if not one.requires_grad}
    frozen |= {key for key, _ in body_of.named_buffers() if "running" in key}
    assert frozen
    assert {key for key in body if "running" in key} <= frozen
    assert all(torch.equal(body[key], start[key]) for key in frozen)
    moved = [key for key in body if key not in frozen and not torch.equal(body[key], start[key])]
    assert moved
    # A detector's own weights are taken as well.
    again = train(
        variant, data, recipe, seed=0, folder=tmp_path / "again", options=OPTIONS, report=lambda _: None,
        weights=tmp_path / "run/weights.safetensors",
    )  # fmt: skip
    assert again.start_sha256 != done.start_sha256
    # Of another number of classes, all but the layers of the classes.
    other = build(msgspec.structs.replace(variant, num_classes=9), seed=2).model
    save_file(other.state_dict(), tmp_path / "nine.safetensors")
    fitted = msgspec.structs.replace(variant, num_classes=4)
    dropped = start_from(model, tmp_path / "nine.safetensors", variant, fitted)
    values, nine = model.state_dict(), other.state_dict()
    assert dropped
    assert all(nine[key].shape != values[key].shape for key in dropped)
    assert all(torch.equal(values[key], nine[key]) for key in values if key not in dropped)


def test_the_test_is_of_what_the_detector_returns(folder, tmp_path):
    data = open_coco(folder, name="coco", boxes=boxed(frozen_stages=0, frozen_norms=False), workers=0)
    variant = catalog.find("faster_rcnn_resnet18_fpn")
    model = build(msgspec.structs.replace(variant, num_classes=4), seed=0).model
    configure(model, data.boxes)
    assert model.transform.min_size == (64,)
    assert model.rpn.post_nms_top_n() == 2000
    assert model.eval().rpn.post_nms_top_n() == 20
    weights = tmp_path / "w.safetensors"
    save_file(model.state_dict(), weights)
    found = evaluate(loaded(variant, data, weights), data, batch=2)
    assert found == evaluate(model, data, batch=3)
    assert found.precision.ap_pct < 5
