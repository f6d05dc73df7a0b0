"""Detectors and segmenters by name: a method, and one of the other networks as its backbone.

`faster_rcnn_se_resnet50_fpn` is a Faster R-CNN on the network `se_resnet50`. Any network with such a name can be the
backbone, with blocks of one's own too: `faster_rcnn_resnet50_fpn+reduction=8`. torchvision builds them
(`selab.models.detection`); names and configurations need neither it nor torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from selab.models.spec import Variant

_BUILDERS = "selab.models.detection"
_COCO_CLASSES = 91
_VOC_CLASSES = 21


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to detect or segment with the feature maps of a network.

    Attributes:
        prefix: of its names; `suffix` ends them.
        title: of the method.
        source: where it was published.
        input_chw: the images that it is usually measured on.
        num_classes: with the background, of the data set that it is usually trained on.
    """

    prefix: str
    suffix: str = ""
    title: str
    source: str
    input_chw: tuple[int, int, int]
    num_classes: int

    def name_of(self, trunk: str) -> str:
        """Return the name of the method on a network."""
        return f"{self.prefix}_{trunk}{self.suffix}"


METHODS = (
    Method(
        prefix="faster_rcnn",
        suffix="_fpn",
        title="Faster R-CNN with FPN",
        source="Ren et al., arXiv 1506.01497; Lin et al., arXiv 1612.03144",
        input_chw=(3, 800, 1333),
        num_classes=_COCO_CLASSES,
    ),
    Method(
        prefix="retinanet",
        suffix="_fpn",
        title="RetinaNet",
        source="Lin et al., arXiv 1708.02002",
        input_chw=(3, 800, 1333),
        num_classes=_COCO_CLASSES,
    ),
    Method(
        prefix="ssdlite",
        title="SSDLite",
        source="Sandler et al., arXiv 1801.04381, section 6.2",
        input_chw=(3, 320, 320),
        num_classes=_COCO_CLASSES,
    ),
    Method(
        prefix="deeplabv3",
        title="DeepLabV3",
        source="Chen et al., arXiv 1706.05587",
        input_chw=(3, 520, 520),
        num_classes=_VOC_CLASSES,
    ),
)
FAMILIES = ("detection", "segmentation")


def find(name: str, trunk_of: Callable[[str], Variant]) -> Variant | None:
    """Return the variant of a detector's or segmenter's name; None for other names.

    The SE blocks are those of the backbone, at the same places. The baseline has the backbone's baseline.

    Args:
        name: as the user gave it.
        trunk_of: gives the variant of a backbone's name.

    Raises:
        UnknownNameError: as `trunk_of`.
    """
    for method in METHODS:
        found = re.fullmatch(f"{method.prefix}_(.+){method.suffix}", name)
        if found is not None:
            return _variant(method, trunk_of(found[1]))
    return None


def is_one(variant: Variant) -> bool:
    """Return whether a variant is a detector or segmenter of this module."""
    return variant.family in FAMILIES and variant.builder.startswith(_BUILDERS)


def _variant(method: Method, trunk: Variant) -> Variant:
    bare = msgspec.structs.replace(trunk, se=None)
    return Variant(
        name=method.name_of(trunk.name),
        family=FAMILIES[method.prefix == "deeplabv3"],
        title=f"{method.title} on {trunk.title}",
        source=method.source,
        builder=f"{_BUILDERS}:{method.prefix}",
        # The hash is part of what determines the network.
        arguments={"trunk": trunk.name, "trunk_hash": bare.facts_hash},
        input_chw=method.input_chw,
        num_classes=method.num_classes,
        baseline=None if trunk.baseline is None else method.name_of(trunk.baseline),
        se=trunk.se,
        published=(),
        note=trunk.note,
        origin=method.source,
        file="",
    )
