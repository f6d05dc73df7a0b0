"""Names of detectors and segmenters, which need neither torch nor torchvision."""

import subprocess
import sys

import pytest

from selab.errors import SpecError, UnknownNameError
from selab.models import catalog, composed
from selab.models.build import build


@pytest.mark.parametrize(
    ("name", "baseline", "input_chw", "family"),
    [
        ("faster_rcnn_se_resnet50_fpn", "faster_rcnn_resnet50_fpn", (3, 800, 1333), "detection"),
        ("retinanet_se_resnet101_fpn", "retinanet_resnet101_fpn", (3, 800, 1333), "detection"),
        ("ssdlite_mobilenet_v3_large", "ssdlite_mobilenet_v3_large_no_se", (3, 320, 320), "detection"),
        ("deeplabv3_se_resnet50", "deeplabv3_resnet50", (3, 520, 520), "segmentation"),
    ],
)
def test_the_baseline_has_the_baseline_of_the_backbone(name, baseline, input_chw, family):
    variant = catalog.find(name)
    assert (variant.baseline, variant.input_chw, variant.family) == (baseline, input_chw, family)
    trunk = catalog.find(variant.arguments["trunk"])
    assert variant.se == trunk.se
    base = catalog.baseline_of(variant)
    assert (base.name, base.baseline, base.se) == (baseline, None, None)
    assert composed.is_one(variant)
    assert not composed.is_one(trunk)


def test_the_hash_covers_the_method_and_the_backbone():
    names = ("faster_rcnn_se_resnet50_fpn", "retinanet_se_resnet50_fpn", "faster_rcnn_se_resnet50_v1_5_fpn")
    hashes = {catalog.find(name).facts_hash for name in names}
    hashes.add(catalog.find("faster_rcnn_resnet50_fpn").facts_hash)
    assert len(hashes) == 4


def test_changed_blocks_start_from_those_of_the_backbone_s_variant():
    changed = catalog.find("faster_rcnn_resnet50_fpn+reduction=8")
    assert changed.baseline == "faster_rcnn_resnet50_fpn"
    assert changed.se.reduction == 8
    assert changed.se.sites == catalog.find("se_resnet50").se.sites


def test_a_network_that_is_not_there_is_named():
    with pytest.raises(
        UnknownNameError,
        match=r"--arch faster_rcnn_resnet51_fpn: resnet51: no such architecture; did you mean resnet50",
    ):
        catalog.find("faster_rcnn_resnet51_fpn")
    with pytest.raises(UnknownNameError, match=r"ssdlite_mobilenet_v3: mobilenet_v3: .*mobilenet_v3_large"):
        catalog.find("ssdlite_mobilenet_v3")


def test_names_are_read_without_torch():
    code = (
        "import sys; from selab.models import catalog; catalog.find('faster_rcnn_se_resnet50_fpn'); "
        "assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_torchvision_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "selab.models.detection", raising=False)
    with pytest.raises(SpecError, match=r"faster_rcnn_resnet18_fpn: torchvision .*pip install 'selab\[detection\]'"):
        build(catalog.find("faster_rcnn_resnet18_fpn"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("faster_rcnn_se_resnet50", "faster_rcnn_se_resnet50_fpn, "),
        ("fasterrcnn_resnet50_fpn", "faster_rcnn_resnet50_fpn, "),
        ("ssdlite320_mobilenet_v3_large", "ssdlite_mobilenet_v3_large, "),
    ],
)
def test_detectors_are_suggested(name, meant):
    with pytest.raises(UnknownNameError, match=f"{name}: no such architecture; did you mean {meant}"):
        catalog.find(name)


def test_a_detector_is_no_backbone_of_another():
    with pytest.raises(UnknownNameError, match="ssdlite_resnet18: no such architecture; did you mean se_resnet18"):
        catalog.find("faster_rcnn_ssdlite_resnet18_fpn")
