"""Average precision of detections, as COCO's benchmark computes it, by faster-coco-eval or pycocotools.

Source: cocodataset.org, "Detection evaluation"; Lin et al., arXiv 1405.0312.
"""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selab.errors import SelabError
from selab.training.coco_listing import BoxedImages
from selab.training.record import Precision

COLUMNS = 7
"""Of a detection: the image's number; x, y, width and height in pixels; score; the category's number."""


def average_precision(truth: BoxedImages, categories: dict[int, str], found: NDArray[np.float64]) -> Precision:
    """Compare detections with the boxes of all images.

    Args:
        truth: the images and their boxes.
        categories: names by number.
        found: (D, 7), see `COLUMNS`; at most 100 of an image count.

    Raises:
        SelabError: there is no box to find, a score or a box is not finite, or neither library is installed.
    """
    if not len(truth.boxes) or truth.crowd.all():
        raise SelabError(f"{truth.root}: holds no boxes to find; evaluate on images with annotations")
    if not np.isfinite(found).all():
        raise SelabError("detections hold values that are not finite; the training has diverged")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluated(_annotations(truth, categories), found.reshape(-1, COLUMNS))
    shares = [None if one < 0 else 100 * float(one) for one in evaluation.stats[:6]]
    return Precision(
        ap_pct=shares[0] or 0.0,
        ap50_pct=shares[1] or 0.0,
        ap75_pct=shares[2] or 0.0,
        small_pct=shares[3],
        medium_pct=shares[4],
        large_pct=shares[5],
    )


def _annotations(truth: BoxedImages, categories: dict[int, str]) -> dict[str, Any]:
    owners = np.repeat(truth.ids, np.diff(truth.starts))
    corners = truth.boxes.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    rows = zip(owners.tolist(), boxes.tolist(), truth.labels.tolist(), truth.areas, truth.crowd, strict=True)
    return {
        "info": {},
        "images": [
            {"id": number, "height": height, "width": width}
            for number, (height, width) in zip(truth.ids.tolist(), truth.sizes.tolist(), strict=True)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "annotations": [
            {"id": i, "image_id": of, "bbox": box, "category_id": label, "area": float(area), "iscrowd": int(crowd)}
            for i, (of, box, label, area, crowd) in enumerate(rows, 1)
        ],
    }


def _evaluated(annotations: dict[str, Any], found: NDArray[np.float64]) -> Any:
    """Return the evaluation of one of the libraries, accumulated and summarised."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        truth, evaluate = COCO(annotations), COCOeval_faster
    except ModuleNotFoundError:
        try:
            from pycocotools import coco, cocoeval
        except ModuleNotFoundError:
            raise SelabError(
                "average precision needs faster-coco-eval or pycocotools; pip install 'selab[detection]'"
            ) from None
        truth, evaluate = coco.COCO(), cocoeval.COCOeval
        truth.dataset = annotations
        truth.createIndex()
    # Both refuse an empty array.
    nothing = np.array([[annotations["images"][0]["id"], 0, 0, 0, 0, 0, annotations["categories"][0]["id"]]])
    evaluation = evaluate(truth, truth.loadRes(found if len(found) else nothing), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation
