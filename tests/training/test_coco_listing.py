"""Annotation files in the format of COCO: what is read, and what is left out, counted and named."""

import json

import numpy as np
import pytest
from PIL import Image

from selab.training.coco_listing import find_coco
from selab.training.image_listing import FolderError
from selab.training.shapes import CLASSES, write_shapes

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]


def image(number, name=None, width=40, height=30):
    return {"id": number, "file_name": name or f"{number}.png", "width": width, "height": height}


def box(number, of, bbox, category=1, **more):
    return {"id": number, "image_id": of, "category_id": category, "bbox": bbox, "area": 7.0, "iscrowd": 0} | more


@pytest.fixture
def write(tmp_path):
    """Writes the annotation file of a split, and its images unless told not to."""

    def make(split, images, annotations, *, categories=CATEGORIES, missing=()):
        folder = tmp_path / split
        folder.mkdir(exist_ok=True)
        for one in images:
            if one["file_name"] not in missing:
                (folder / one["file_name"]).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (one["width"], one["height"])).save(folder / one["file_name"])
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_boxes_are_corners_in_the_order_of_the_files(write):
    folder = write(
        "val2017",
        [image(9, "b.png"), image(4, "a.png"), image(5, "c.png")],
        [
            box(1, 9, [1, 2, 10, 20], 3, iscrowd=1),
            box(2, 4, [0, 0, 5, 5]),
            box(3, 9, [3.5, 4, 2, 2], area=4.5, extra="x"),
        ],
    )
    found = find_coco(folder)
    assert found.categories == {1: "cat", 3: "dog"}
    assert found.num_classes == 4
    assert found.train is None
    val = found.val
    assert [one.decode() for one in val.files] == ["a.png", "b.png", "c.png"]
    assert val.ids.tolist() == [4, 9, 5]
    assert val.sizes.tolist() == [[30, 40]] * 3
    assert [val.boxes[val.of(i)].tolist() for i in range(3)] == [[[0, 0, 5, 5]], [[1, 2, 11, 22], [3.5, 4, 5.5, 6]], []]
    assert (val.labels.tolist(), val.crowd.tolist(), val.areas.tolist()) == (
        [1, 3, 1],
        [False, True, False],
        [7, 7, 4.5],
    )
    assert found.assumed == (f"{folder} has no training images with annotations and is used for evaluation alone",)


def test_what_is_broken_is_counted_named_and_left_out(write):
    folder = write(
        "val",
        [image(1), image(2), image(3), image(4, width=0) | {"width": 1}],
        [
            box(10, 1, [0, 0, 5, 5]),
            box(11, 8, [0, 0, 5, 5]),
            box(12, 1, [0, 0, 5, 5], 2),
            box(13, 1, [0, 0, 0, 5]),
            box(14, 1, [50, 0, 5, 5]),
            box(15, 1, [35, 25, 10, 10]),
            box(16, 1, [-0.4, 0, 5, 5]),
            box(17, 1, [1, 2, 3]),
            {"id": 18},
            box(19, 2, [0, 0, 5, 5]),
        ],
        missing=("2.png",),
    )
    found = find_coco(folder)
    assert found.val.boxes.tolist() == [[0, 0, 5, 5], [35, 25, 40, 30], [0, 0, pytest.approx(4.6), 5]]
    assert found.val.ids.tolist() == [1, 3, 4]
    said = [one.removeprefix("annotations/instances_val.json: ") for one in found.assumed]
    assert said[:-1] == [
        "malformed annotations, left out: 2 (annotations[7], annotations[8])",
        "images that are not in val, left out: 1 (2.png)",
        "annotations of images that it does not list, left out: 1 (id 11)",
        "annotations of a category that it does not list, left out: 1 (id 12: 2)",
        "boxes without an area, left out: 1 (id 13)",
        "boxes outside their image, left out: 1 (id 14)",
        "boxes that leave their image, cut: 1 (id 15)",
    ]


def test_images_without_boxes_are_evaluated_and_not_trained_on(write):
    images, boxes = [image(1), image(2), image(3)], [box(1, 2, [0, 0, 5, 5]), box(2, 3, [0, 0, 5, 5], iscrowd=1)]
    write("train", images, boxes)
    found = find_coco(write("val", images, boxes))
    assert found.train.ids.tolist() == [2]
    assert found.val.ids.tolist() == [1, 2, 3]
    assert found.assumed == (
        "annotations/instances_train.json: images without boxes, not trained on: 2 (1.png, 3.png)",
    )


def test_the_names_of_coco_s_years_and_minival(write):
    folder = write("val2014", [image(1)], [box(1, 1, [0, 0, 5, 5])])
    (folder / "annotations/instances_val2014.json").rename(folder / "annotations/instances_minival2014.json")
    write("train2017", [image(1)], [box(1, 1, [0, 0, 5, 5])])
    found = find_coco(folder)
    assert (found.val.root.name, found.train.root.name) == ("val2014", "train2017")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {"images": []}, r"instances_val\.json: .*categories"),
        (lambda content: content | {"categories": []}, "lists no categories"),
        (
            lambda content: content | {"categories": [*CATEGORIES, CATEGORIES[0]]},
            "gives the number 1 to two categories",
        ),
        (lambda content: content | {"categories": [{"id": 0, "name": "cat"}]}, "the category cat has the number 0"),
        (
            lambda content: content | {"images": [image(1, "none.png")]},
            r"none of its images can be used: images that are not in val, left out: 1 \(none\.png\)",
        ),
        (
            lambda content: content | {"images": [image(1) | {"width": "wide"}]},
            r"none of its images can be used: malformed images, left out: 1 \(images\[0\]\)",
        ),
        (lambda content: [], "expected"),
    ],
)
def test_files_that_are_something_else_are_refused(write, change, message):
    folder = write("val", [image(1)], [box(1, 1, [0, 0, 5, 5])])
    file = folder / "annotations/instances_val.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(FolderError, match=message):
        find_coco(folder)


def test_folders_that_are_something_else_are_refused(write, tmp_path):
    with pytest.raises(FolderError, match="is no folder"):
        find_coco(tmp_path / "none")
    with pytest.raises(FolderError, match=r"expected one of instances_val2017\.json, instances_minival2014\.json"):
        find_coco(tmp_path)
    folder = write("val", [image(1)], [])
    write("train", [image(1)], [box(1, 1, [0, 0, 5, 5])], categories=[{"id": 1, "name": "cow"}])
    with pytest.raises(FolderError, match=r"the categories of train and val differ, first in number 1 \(cat\)"):
        find_coco(folder)
    (folder / "annotations/instances_val.json").write_text("{")
    with pytest.raises(FolderError, match=r"instances_val\.json"):
        find_coco(folder)


# -------------------------------------------------------------------------------------------------------------- shapes
def test_shapes_are_where_their_boxes_say(tmp_path):
    found = find_coco(write_shapes(tmp_path, train_size=3, val_size=5))
    assert found.categories == CLASSES
    assert found.assumed == ()
    assert (len(found.train), len(found.val)) == (3, 5)
    for index, file in enumerate(found.val.files):
        pixels = np.array(Image.open(tmp_path / "val" / file.decode()))
        # Shapes are brighter than any noise; each touches the four edges of its box.
        bright = (pixels >= 128).all(axis=2)
        seen = np.zeros_like(bright)
        for x1, y1, x2, y2 in found.val.boxes[found.val.of(index)].astype(int):
            part = bright[y1:y2, x1:x2]
            assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
            seen[y1:y2, x1:x2] = True
        assert not bright[~seen].any()


def test_shapes_are_the_same_each_time_and_others_with_another_seed(tmp_path):
    hashes = [
        find_coco(write_shapes(tmp_path / str(number), train_size=2, val_size=2, seed=seed)).sha256
        for number, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_entries_that_are_twice_there_malformed_or_elsewhere_are_left_out(write, tmp_path):
    folder = write(
        "val", [image(1), image(2)], [box(1, 1, [0, 0, 5, 5]), box(1, 1, [0, 0, 9, 9]), box(2, 2, [1, 1, 2, 2])]
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "outside.png")
    file = folder / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["images"] += [
        image(1, "2.png"),
        {"id": 7},
        image(8, "../outside.png"),
        image(9, str(tmp_path / "outside.png")),
    ]
    content["annotations"].append(box(3, 1, [1, float("nan"), 2, 2]))
    # As Python writes it, which is not JSON.
    file.write_text(json.dumps(content))
    assert "NaN" in file.read_text()
    found = find_coco(folder)
    assert found.val.ids.tolist() == [1, 2]
    assert found.val.boxes.tolist() == [[0, 0, 5, 5], [1, 1, 3, 3]]
    told = "\n".join(found.assumed)
    for kind in (
        "images with the number of an earlier one, left out: 1 (id 1)",
        "annotations with the number of an earlier one, left out: 1 (id 1)",
        "malformed images, left out: 1 (images[3])",
        "images outside val, left out: 2 (../outside.png, ",
        "boxes without an area, left out: 1 (id 3)",
    ):
        assert kind in told


def test_what_is_no_json_is_said_so(write):
    folder = write("val", [image(1)], [])
    (folder / "annotations/instances_val.json").write_text("hello")
    with pytest.raises(FolderError, match=r"instances_val\.json: JSON is malformed: .*; get it again"):
        find_coco(folder)
