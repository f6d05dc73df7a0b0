"""Detectors and segmenters of torchvision on any network; importing this needs torchvision.

Each takes what torchvision's take: a list of images, and targets in training. Each also takes a batch of images as one
tensor, and then does work that depends on neither weights nor pixels, so that two networks can be compared:

* In eval mode, up to the raw outputs of all heads. What follows, thresholds and non-maximum suppression, takes as long
  as there are boxes that pass, which random weights decide.
* The second stage of Faster R-CNN reads 1,000 fixed proposals per image instead of those of the first stage, whose
  heads run as always.
* In training mode, torchvision's own losses of fixed targets, seven boxes per image as in COCO, sampled from fixed
  proposals.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from selab.attention.sites import declared_groups
from selab.models import catalog
from selab.models.backbones import Backbone, backbone
from selab.models.build import construct

_FPN_CHANNELS = 256
# Heights and widths are padded to a multiple of it, as torchvision's transform does.
_MULTIPLE = 32
# Boxes per image: COCO has 7.3 on average (Lin et al., arXiv 1405.0312, section 5).
_OBJECTS = 7
# As torchvision's Faster R-CNN keeps, in eval and in train mode; in train mode 512 of them are sampled.
_PROPOSALS = {False: 1000, True: 2000}
# Sides of fixed boxes where the shorter side of the image has 800 pixels, and their ratios: those of an FPN's anchors.
_SIDES = (32, 64, 128, 256, 512)
_RATIOS = (0.5, 1.0, 2.0)
_SHORTER = 800
_ROI_SIZE, _ROI_SAMPLES = 7, 2
# An FPN reads a box at the level that a box of ImageNet's 224 pixels has at stride 16 (arXiv 1612.03144, eq. 1).
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4

Outputs = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- fixed work
@cache
def fixed_boxes(height: int, width: int, count: int, seed: int = 0) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return boxes (count, 4) as x1, y1, x2, y2 that depend on the size of an image alone, the smallest first."""
    draw = random.Random(seed)
    scale = min(height, width) / _SHORTER
    boxes = []
    for number in range(count):
        side, ratio = _SIDES[number % len(_SIDES)] * scale, _RATIOS[number // len(_SIDES) % len(_RATIOS)]
        tall, wide = min(height, side * math.sqrt(ratio)), min(width, side / math.sqrt(ratio))
        x, y = draw.uniform(0, width - wide), draw.uniform(0, height - tall)
        boxes.append((x, y, x + wide, y + tall))
    boxes.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return np.array(boxes, dtype=np.float32)


def fixed_targets(images: int, size: tuple[int, int], classes: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return the same boxes and labels for each image, as torchvision's detectors take them."""
    boxes = torch.from_numpy(fixed_boxes(*size, _OBJECTS, seed=1)).to(device)
    labels = (torch.arange(_OBJECTS, device=device) % (classes - 1)) + 1
    return [{"boxes": boxes.clone(), "labels": labels.clone()} for _ in range(images)]


class _Transform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's, which can be told to leave images as they are."""

    as_given = False

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        if not self.as_given:
            return super().forward(images, targets)  # type: ignore[no-any-return]
        return _padded(torch.stack(images)), targets


class _RPN(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, which can be told to propose fixed boxes."""

    as_given = False

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[tuple[int, int]], num_anchors_per_level: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.as_given:
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)  # type: ignore[no-any-return]
        count = _PROPOSALS[self.training]
        boxes = [torch.from_numpy(fixed_boxes(*size, count)).to(proposals) for size in image_shapes]
        return boxes, [one.new_ones(count) for one in boxes]


def _padded(batch: Tensor) -> ImageList:
    height, width = batch.shape[-2:]
    padded = F.pad(batch, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
    return ImageList(padded, [(height, width)] * len(batch))


class _FixedWork(nn.Module):
    """A detector that also takes a batch as one tensor, and then does work that is the same for all weights.

    Attributes:
        num_classes: with the background.
    """

    num_classes: int
    backbone: nn.Module
    head: nn.Module

    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        # The next class is torchvision's detector.
        super().__init__(*args, num_classes=num_classes, **kwargs)
        self.num_classes = num_classes
        self.transform.__class__ = _Transform
        for module in self.modules():
            if type(module) is RegionProposalNetwork:
                module.__class__ = _RPN

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: the groups of the backbone's network."""
        return _groups_below(self)

    def forward(self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return torchvision's losses or detections for a list; losses or raw outputs for a tensor (N, 3, H, W)."""
        if not isinstance(images, Tensor):
            return super().forward(images, targets)
        if not self.training:
            return self.raw(_padded(images))
        if targets is None:
            size = (images.shape[-2], images.shape[-1])
            targets = fixed_targets(len(images), size, self.num_classes, images.device)
        with self._as_given():
            return super().forward(list(images), targets)

    def raw(self, images: ImageList) -> Outputs:
        """Return the outputs of all heads, before boxes are decoded and chosen."""
        outputs: Outputs = self.head(list(self.backbone(images.tensors).values()))
        return outputs

    @contextmanager
    def _as_given(self) -> Iterator[None]:
        parts = [one for one in self.modules() if isinstance(one, (_Transform, _RPN))]
        for one in parts:
            one.as_given = True
        try:
            yield
        finally:
            for one in parts:
                one.as_given = False


# ------------------------------------------------------------------------------------------------------------ detectors
class FasterRCNN(_FixedWork, detection.FasterRCNN):  # type: ignore[misc]
    """torchvision's Faster R-CNN; see `_FixedWork`."""

    backbone: nn.Module
    rpn: Any
    roi_heads: Any

    def raw(self, images: ImageList) -> Outputs:
        """See `_FixedWork.raw`; the second stage reads fixed proposals."""
        maps = self.backbone(images.tensors)
        objectness, deltas = self.rpn.head(list(maps.values()))
        logits, regression = self.roi_heads.box_predictor(self.roi_heads.box_head(self._pool(maps, images)))
        return {
            "objectness": objectness,
            "rpn_bbox_regression": deltas,
            "cls_logits": logits,
            "bbox_regression": regression,
        }

    def _pool(self, maps: dict[str, Tensor], images: ImageList) -> Tensor:
        """Return (N * proposals, C, 7, 7): from each level those of its size, as MultiScaleRoIAlign chooses them."""
        size, count = images.image_sizes[0], len(images.image_sizes)
        boxes = fixed_boxes(*size, _PROPOSALS[False])
        levels = self.roi_heads.box_roi_pool.featmap_names
        sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        wanted = np.floor(_CANONICAL_LEVEL + np.log2(sides / _CANONICAL_SIDE + 1e-6)) - 2
        level_of = np.clip(wanted, 0, len(levels) - 1).astype(int)
        pooled = []
        for number, name in enumerate(levels):
            some = boxes[level_of == number]
            first = np.repeat(np.arange(count, dtype=np.float32), len(some))[:, None]
            rois = torch.from_numpy(np.concatenate([first, np.tile(some, (count, 1))], axis=1))
            scale = 2.0 ** round(math.log2(maps[name].shape[-1] / images.tensors.shape[-1]))
            pooled.append(
                roi_align(maps[name], rois.to(maps[name]), _ROI_SIZE, spatial_scale=scale, sampling_ratio=_ROI_SAMPLES)
            )
        return torch.cat(pooled)


class RetinaNet(_FixedWork, detection.RetinaNet):  # type: ignore[misc]
    """torchvision's RetinaNet; see `_FixedWork`."""


class SSD(_FixedWork, detection.ssd.SSD):  # type: ignore[misc]
    """torchvision's SSD; see `_FixedWork`."""


class DeepLabV3(segmentation.DeepLabV3):  # type: ignore[misc]
    """torchvision's DeepLabV3."""

    def site_groups(self) -> dict[str, list[str]]:
        """Name where a channel gate can stand: the groups of the backbone's network."""
        return _groups_below(self)


def _groups_below(model: nn.Module) -> dict[str, list[str]]:
    body = model.get_submodule("backbone.body")
    return {name: [f"backbone.body.{path}" for path in paths] for name, paths in declared_groups(body).items()}


# ------------------------------------------------------------------------------------------------------------ backbones
class _Pyramid(nn.Module):
    """A network with torchvision's FPN on top."""

    def __init__(self, body: Backbone, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(body.channels), _FPN_CHANNELS, extra_blocks=extra)
        self.out_channels = _FPN_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict(_numbered(self.body(images))))
        return maps


class _SSDMaps(nn.Module):
    """The two smallest maps of a network, and four smaller ones of depthwise separable convolutions."""

    def __init__(self, body: Backbone, norm: Any) -> None:
        super().__init__()
        self.body = body
        widths = (body.channels[-1], 512, 256, 256, 128)
        self.extra = nn.ModuleList(_smaller(*pair, norm) for pair in pairwise(widths))
        for one in self.extra.modules():
            if isinstance(one, nn.Conv2d):
                nn.init.normal_(one.weight, std=0.03)
        self.out_channels = (*body.channels, *widths[1:])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict(_numbered(maps))


class _DeepLabMaps(nn.Module):
    """The smallest map of a network, and the one before its last stage for the auxiliary classifier."""

    def __init__(self, body: Backbone) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        aux, out = self.body(images)
        return {"out": out, "aux": aux}


def _numbered(maps: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(str(number), one) for number, one in enumerate(maps)]


def _smaller(channels: int, made: int, norm: Any) -> nn.Sequential:
    layer = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.ReLU6)
    middle = made // 2
    return nn.Sequential(
        layer(channels, middle, kernel_size=1),
        layer(middle, middle, kernel_size=3, stride=2, groups=middle),
        layer(middle, made, kernel_size=1),
    )


def _trunk(trunk: str, strides: Sequence[int], output_stride: int | None = None) -> Backbone:
    """Return a network without blocks as a backbone with the maps of these strides, with random weights."""
    variant = msgspec.structs.replace(catalog.find(trunk), se=None)
    model = construct(variant)
    image = (1, *variant.input_chw)
    every = backbone(model, input_nchw=image).strides
    # A stride that it does not have becomes a number beyond its maps, for the message that lists them.
    wanted = [every.index(one) if one in every else len(every) for one in strides]
    return backbone(model, wanted, input_nchw=image, output_stride=output_stride)


# ------------------------------------------------------------------------------------------------------------- builders
def faster_rcnn(*, num_classes: int, trunk: str, trunk_hash: str = "") -> FasterRCNN:
    """Build a Faster R-CNN with an FPN on the maps of strides 4 to 32, as torchvision's `fasterrcnn_resnet50_fpn`.

    Args:
        num_classes: with the background.
        trunk: a network's name.
        trunk_hash: not read; it lets the hash of a detector change with its backbone.
    """
    del trunk_hash
    body = _Pyramid(_trunk(trunk, (4, 8, 16, 32)), LastLevelMaxPool())
    return FasterRCNN(body, num_classes=num_classes)


def retinanet(*, num_classes: int, trunk: str, trunk_hash: str = "") -> RetinaNet:
    """Build a RetinaNet on the maps of strides 8 to 32 and two smaller ones, as torchvision's `retinanet_resnet50_fpn`.

    Args:
        num_classes: with the background.
        trunk: a network's name.
        trunk_hash: as in `faster_rcnn`.
    """
    del trunk_hash
    body = _Pyramid(_trunk(trunk, (8, 16, 32)), LastLevelP6P7(_FPN_CHANNELS, _FPN_CHANNELS))
    return RetinaNet(body, num_classes=num_classes)


def ssdlite(*, num_classes: int, trunk: str, trunk_hash: str = "") -> SSD:
    """Build an SSDLite for images of 320 x 320 on the maps of strides 16 and 32 and four smaller ones.

    As torchvision's `ssdlite320_mobilenet_v3_large`, but for the map of stride 16: there it is taken inside a block,
    after its expansion.

    Args:
        num_classes: with the background.
        trunk: a network's name.
        trunk_hash: as in `faster_rcnn`.
    """
    del trunk_hash
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    body = _SSDMaps(_trunk(trunk, (16, 32)), norm)
    anchors = DefaultBoxGenerator([[2, 3]] * len(body.out_channels), min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(list(body.out_channels), anchors.num_anchors_per_location(), num_classes, norm)
    return SSD(
        body,
        anchors,
        (320, 320),
        num_classes=num_classes,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        head=head,
        score_thresh=0.001,
        nms_thresh=0.55,
        detections_per_img=300,
        topk_candidates=300,
    )


def deeplabv3(*, num_classes: int, trunk: str, trunk_hash: str = "") -> DeepLabV3:
    """Build a DeepLabV3 of output stride 8 with an auxiliary classifier, as torchvision's `deeplabv3_resnet50`.

    Args:
        num_classes: with the background.
        trunk: a network's name.
        trunk_hash: as in `faster_rcnn`.
    """
    del trunk_hash
    body = _trunk(trunk, (16, 32), output_stride=8)
    return DeepLabV3(
        _DeepLabMaps(body), DeepLabHead(body.channels[1], num_classes), FCNHead(body.channels[0], num_classes)
    )
