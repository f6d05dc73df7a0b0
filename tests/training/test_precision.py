"""Average precision against values by hand, and the two libraries against each other."""

import sys

import numpy as np
import pytest

from selab.errors import SelabError
from selab.training.coco_listing import find_coco
from selab.training.precision import average_precision
from selab.training.shapes import write_shapes

LIBRARIES = ["faster_coco_eval", "pycocotools"]


def hide(monkeypatch, *libraries):
    for name in [*libraries, *(one for one in sys.modules if one.startswith(tuple(f"{each}." for each in libraries)))]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """Leaves one of the libraries."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    hide(monkeypatch, *(set(LIBRARIES) - {request.param}))
    return request.param


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return find_coco(write_shapes(tmp_path_factory.mktemp("shapes"), train_size=1, val_size=8))


def detections(truth, *, score=0.9, shift=0.0, keep=slice(None)):
    """Every box as a detection, moved to the right by a share of its width."""
    owners = np.repeat(truth.ids, np.diff(truth.starts))
    boxes = truth.boxes.astype(float)
    size = boxes[:, 2:] - boxes[:, :2]
    moved = np.concatenate([boxes[:, :1] + shift * size[:, :1], boxes[:, 1:2], size], axis=1)
    return np.concatenate([owners[:, None], moved, np.full((len(boxes), 1), score), truth.labels[:, None]], axis=1)[
        keep
    ]


def test_the_boxes_themselves_have_100_percent(library, shapes):
    found = average_precision(shapes.val, shapes.categories, detections(shapes.val))
    assert (found.ap_pct, found.ap50_pct, found.ap75_pct) == (100, 100, 100)
    assert found.large_pct is None


def test_nothing_found_has_none(library, shapes):
    found = average_precision(shapes.val, shapes.categories, np.zeros((0, 7)))
    assert (found.ap_pct, found.ap50_pct) == (0, 0)


def test_boxes_moved_by_a_quarter_pass_the_thresholds_below_their_overlap(library, shapes):
    # (1 - 0.25) / (1 + 0.25) = 0.6: the thresholds 0.50 and 0.55 of ten, and 0.60 where rounding lets it.
    found = average_precision(shapes.val, shapes.categories, detections(shapes.val, shift=0.249))
    assert found.ap_pct == pytest.approx(30, abs=1e-6)
    assert (found.ap50_pct, found.ap75_pct) == (pytest.approx(100), 0)


def test_a_false_detection_costs_only_where_it_outranks_true_ones(library, shapes):
    true = detections(shapes.val)
    false = true[:1].copy()
    false[:, 3:5] = 1
    below, above = false.copy(), false.copy()
    below[:, 5], above[:, 5] = 0.1, 0.99
    assert average_precision(shapes.val, shapes.categories, np.concatenate([true, below])).ap50_pct == pytest.approx(
        100
    )
    assert average_precision(shapes.val, shapes.categories, np.concatenate([true, above])).ap50_pct < 100


def test_values_that_are_not_finite_are_a_divergence(shapes):
    broken = detections(shapes.val)
    broken[0, 1] = np.nan
    with pytest.raises(SelabError, match="not finite; the training has diverged"):
        average_precision(shapes.val, shapes.categories, broken)


def test_without_a_library_one_line_says_what_to_install(monkeypatch, shapes):
    hide(monkeypatch, *LIBRARIES)
    with pytest.raises(SelabError, match=r"pip install 'selab\[detection\]'"):
        average_precision(shapes.val, shapes.categories, np.zeros((0, 7)))


def test_without_a_box_there_is_nothing_to_find(shapes):
    import dataclasses

    empty = dataclasses.replace(
        shapes.val, boxes=np.zeros((0, 4), dtype=np.float32), starts=np.zeros(9, dtype=np.int64)
    )
    with pytest.raises(SelabError, match="holds no boxes to find"):
        average_precision(empty, shapes.categories, np.zeros((0, 7)))
