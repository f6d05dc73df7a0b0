"""What a folder holds, how its classes are numbered and its images ordered."""

import io
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from selab.errors import SelabError
from selab.training import file_images, image_listing
from selab.training.file_images import share
from selab.training.image_decode import decode
from selab.training.image_folder import epoch_order, open_folder
from selab.training.image_listing import FolderError, find_images
from selab.training.problems import Found, Problems
from selab.training.recipe import ImageRecipe


def jpeg(mode="RGB", size=(40, 30), **options):
    """The bytes of a JPEG of a few colours."""
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint32).reshape(size[1], size[0], 3) * 7 % 256
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, "jpeg", **options)
    return file.getvalue()


@pytest.fixture
def grow(tmp_path):
    """Makes files below a new folder: `grow("a/1.jpg", "b/1.jpg")` → the folder."""

    def make(*files, where="images", content=b"image"):
        for file in files:
            path = tmp_path / where / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / where

    return make


def labels_of(split):
    return {file.decode(): int(label) for file, label in zip(split.files, split.labels, strict=True)}


# --------------------------------------------------------------------------------------------------------------- files


def test_train_and_val_number_the_sorted_folders_of_train(grow):
    data_dir = grow("train/b/1.JPEG", "train/a/2.jpg", "train/c/x.png", "val/c/1.jpg", "val/a/1.jpg", "val/a/notes.txt")
    found = find_images(data_dir, name="folder")
    assert found.classes == ("a", "b", "c")
    assert labels_of(found.train) == {"a/2.jpg": 0, "b/1.JPEG": 1, "c/x.png": 2}
    assert labels_of(found.val) == {"a/1.jpg": 0, "c/1.jpg": 2}
    assert found.assumed == ("classes are numbered by their sorted folders, 0 to 2",)


def test_class_folders_alone_are_for_evaluation(grow):
    data_dir = grow("b/1.jpg", "a/deep/er/1.jpg", ".hidden/1.jpg", "a/.1.jpg")
    found = find_images(data_dir, name="folder")
    assert found.train is None
    assert labels_of(found.val) == {"a/deep/er/1.jpg": 0, "b/1.jpg": 1}
    assert "for evaluation alone" in found.assumed[0]


def test_part_of_imagenet_keeps_the_numbers_of_the_whole(grow, tmp_path):
    data_dir = grow("val/n00000007/1.JPEG", "val/n00000990/1.JPEG")
    wnids = "".join(f"n{number:08}\n" for number in range(1000))
    (tmp_path / "list.txt").write_text(wnids)
    given = find_images(data_dir, name="imagenet", classes_file=tmp_path / "list.txt")
    assert labels_of(given.val) == {"n00000007/1.JPEG": 7, "n00000990/1.JPEG": 990}
    assert len(given.classes) == 1000
    (data_dir / "imagenet_wnids.txt").write_text(wnids)
    beside = find_images(data_dir, name="imagenet")
    assert labels_of(beside.val) == labels_of(given.val)
    assert beside.assumed[-1].endswith("imagenet_wnids.txt; 2 of them have folders")


def test_part_of_imagenet_without_a_list_says_that_its_numbers_are_its_own(grow):
    data_dir = grow("n00000007/1.JPEG", "n00000990/1.JPEG")
    assert "not ImageNet's numbers" in find_images(data_dir, name="folder").assumed[-1]
    with pytest.raises(
        FolderError, match=r"folders of 2 classes, not ImageNet's 1,000; give a file .* as --classes-file"
    ):
        find_images(data_dir, name="imagenet")


def test_a_list_beside_other_classes_is_left_alone(grow):
    data_dir = grow("cat/1.jpg", "dog/1.jpg")
    (data_dir / "classes.txt").write_text("1 dog\n2 cat\n")
    assert find_images(data_dir, name="folder").classes == ("cat", "dog")


def test_the_order_of_a_list_is_the_numbering(grow, tmp_path):
    (tmp_path / "list.txt").write_text("dog\ncat\n\nhen\n")
    found = find_images(grow("cat/1.jpg", "dog/1.jpg"), name="folder", classes_file=tmp_path / "list.txt")
    assert labels_of(found.val) == {"cat/1.jpg": 1, "dog/1.jpg": 0}
    assert found.classes == ("dog", "cat", "hen")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.jpg"], "has the folder train and no val"),
        (["val/1.jpg", "val/2.jpg"], "val: holds 2 images and no class folders"),
        (["val/readme"], "val: holds no class folders"),
        (["val/a/readme"], "hold no images; known are .bmp"),
        (["train/cat/1.jpg", "val/cats/1.jpg"], "cats: no such class in the folder train; did you mean cat?"),
    ],
)
def test_layouts_that_are_none(grow, files, message):
    with pytest.raises(FolderError, match=message.replace("?", r"\?")):
        find_images(grow(*files), name="folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no classes"),
        ("a\nb\na\n", "names a twice"),
        ("a\n", r"val: b: no such class in .*list\.txt"),
        ("n00000001\nn00000000\n" + "".join(f"n{n:08}\n" for n in range(2, 1000)), "classes out of order"),
    ],
)
def test_lists_that_are_none(grow, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(FolderError, match=message):
        find_images(grow("val/a/1.jpg", "val/b/1.jpg"), name="folder", classes_file=tmp_path / "list.txt")


def test_no_folder_and_no_list(tmp_path, grow):
    with pytest.raises(FolderError, match="is no folder"):
        find_images(tmp_path / "nowhere", name="folder")
    with pytest.raises(SelabError, match=r"list\.txt: cannot be read: No such file"):
        find_images(grow("a/1.jpg"), name="folder", classes_file=tmp_path / "list.txt")


# ------------------------------------------------------------------------------------------------------------ identity


def test_identity_is_that_of_names_sizes_and_sampled_content(grow):
    files = [f"val/{kind}/{number:03}.jpg" for kind in "ab" for number in range(64)]  # every second one is sampled
    one = find_images(grow(*files, where="one"), name="folder").sha256
    assert find_images(grow(*reversed(files), where="two"), name="folder").sha256 == one
    assert find_images(grow(*files, where="three") / "val", name="folder").sha256 == one, "alone"

    def changed(where, file, content):
        data_dir = grow(*files, where=where)
        (data_dir / "val" / file).write_bytes(content)
        return find_images(data_dir, name="folder").sha256

    assert changed("sampled", "a/000.jpg", b"IMAGE") != one
    assert changed("unsampled", "a/001.jpg", b"IMAGE") == one, "documented: not every file's content is read"
    assert changed("longer", "a/001.jpg", b"images") != one
    assert changed("more", "a/more.jpg", b"image") != one


def test_identity_is_that_of_the_numbering(grow, tmp_path):
    data_dir = grow("a/1.jpg", "b/1.jpg")
    (tmp_path / "list.txt").write_text("b\na\n")
    plain = find_images(data_dir, name="folder").sha256
    assert find_images(data_dir, name="folder", classes_file=tmp_path / "list.txt").sha256 != plain


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / "a" / "caf\udce9.jpg"
    path.parent.mkdir()
    try:
        path.write_bytes(b"image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = find_images(tmp_path, name="folder")
    assert found.val.files.tolist() == [b"a/caf\xe9.jpg"]
    assert image_listing.printable("caf\udce9.jpg") == r"caf\xe9.jpg"


# --------------------------------------------------------------------------------------------------------------- order


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    labels = np.zeros(100, dtype=np.int64)
    orders = [epoch_order(labels, seed=seed, epoch=epoch, balanced=False) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert (epoch_order(labels, seed=0, epoch=0, balanced=False) == orders[0]).all()


def test_balanced_sampling_draws_classes_equally_and_images_of_a_class_equally():
    sizes = {0: 50, 2: 6, 5: 4}  # 60 images of 3 classes: 20 of each class
    labels = np.repeat(list(sizes), list(sizes.values()))
    order = epoch_order(labels, seed=0, epoch=0, balanced=True)
    assert len(order) == 60
    for start in range(0, 60, 3):
        assert sorted(labels[order[start : start + 3]]) == [0, 2, 5], "every class before any for the second time"
    drawn = np.bincount(order, minlength=60)
    assert drawn[:50].max() == 1  # 20 different ones of 50
    assert sorted(drawn[50:56]) == [3, 3, 3, 3, 4, 4]  # 20 = 3 * 6 + 2
    assert drawn[56:].tolist() == [5, 5, 5, 5]  # 20 = 5 * 4
    assert (order != epoch_order(labels, seed=0, epoch=1, balanced=True)).any()


def test_balanced_sampling_of_fewer_images_than_classes_takes():
    labels = np.array([3, 1, 2, 2, 2])  # 5 draws of 3 classes
    order = epoch_order(labels, seed=3, epoch=0, balanced=True)
    assert sorted(labels[order[:3]]) == [1, 2, 3]
    assert len(order) == 5


@pytest.mark.parametrize(("world", "last"), [(1, [5]), (2, [4, 1]), (4, [2, 2, 1, 0])])
def test_shares_are_disjoint_complete_and_in_order(world, last):
    def shares(number):
        return [share(21, batch=8, number=number, rank=rank, world=world) for rank in range(world)]

    assert [place for number in range(3) for one in shares(number) for place in one] == list(range(21))
    assert [len(one) for one in shares(0)] == [8 // world] * world
    assert [len(one) for one in shares(2)] == last


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(("mode", "kind"), [("RGB", None), ("L", "grey"), ("CMYK", "cmyk")])
def test_every_mode_becomes_rgb(mode, kind):
    image, found, reason = decode(jpeg(mode))
    assert (image.mode, image.size, found, reason) == ("RGB", (40, 30), kind, "")


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA"])
def test_palettes_and_alpha_become_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (4, 3)).save(file, "png")
    image, found, _ = decode(file.getvalue())
    assert (image.mode, found) == ("RGB", "other")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (jpeg()[:-300], "truncated"),
        (jpeg()[:40], "truncated"),
        (b"", "corrupt"),
        (b"no image at all", "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "corrupt"),
    ],
    ids=["end", "header", "empty", "text", "png"],
)
def test_what_cannot_be_decoded_is_told(content, kind):
    image, found, reason = decode(content)
    assert (image, found) == (None, kind)
    assert reason
    assert "0x" not in reason, "a reason names no place in memory"


def test_the_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    turned, _, _ = decode(jpeg(exif=exif))
    plain, _, _ = decode(jpeg())
    assert turned.size == (40, 30)
    assert turned.tobytes() == plain.tobytes()


# -------------------------------------------------------------------------------------------------------------- recipe


def test_the_recipe_is_that_of_the_release():
    # The table "Augmentation" of github.com/hujie-frank/SENet, and the caption of its Table 1.
    recipe = ImageRecipe()
    assert recipe.scale == (0.08, 1.0)
    assert recipe.ratio == (3 / 4, 4 / 3)
    assert (recipe.flip, recipe.rotation_deg, recipe.pixel_jitter) == (True, 10, 20)
    assert (recipe.train_size, recipe.test_resize, recipe.test_crop) == (224, 256, 224)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_size", 0),
        ("test_crop", 257),
        ("scale", (0.5, 0.1)),
        ("scale", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("rotation_deg", -1),
        ("pixel_jitter", 256),
        ("std", (1.0, 0.0, 1.0)),
        ("interpolation", "nearby"),
        ("test_size", 224),
    ],
)
def test_an_impossible_recipe_names_its_key(key, value):
    with pytest.raises(msgspec.ValidationError, match=key):
        msgspec.convert({key: value}, ImageRecipe)


def test_pillow_is_all_that_a_folder_needs(grow):
    """In a process of its own, in which torchvision cannot be imported."""
    grow("train/a/1.jpg", "train/a/2.jpg", "val/a/1.jpg", content=jpeg())
    root = grow()
    code = f"""
import sys
sys.modules["torchvision"] = None
from pathlib import Path
import torch
from selab.training.batches import BatchPlan
from selab.training.data import Augmentation, open_data
data = open_data("folder", data_dir=Path({str(root)!r}), workers=0)
cpu = torch.device("cpu")
(images, labels), = data.train_batches(BatchPlan(batch=2, seed=0, epoch=0), device=cpu, augmentation=Augmentation())
(tests, _), = data.test_batches(batch=2, device=cpu)
print(tuple(images.shape), labels.tolist(), tuple(tests.shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 3, 224, 224) [0, 0] (1, 3, 224, 224)"


# ------------------------------------------------------------------------------------------------------------ problems


@pytest.fixture
def opened(grow):
    """Two good images, one that is none and one grey one, opened."""
    root = grow("val/a/1.jpg", "val/a/2.jpg", content=jpeg())
    grow("val/b/no.jpg")
    grow("val/b/grey.jpg", content=jpeg("L"))
    return open_folder(root, name="folder", image=ImageRecipe(test_resize=16, test_crop=16), workers=0)


def test_all_processes_hear_of_what_each_has_found(opened, monkeypatch):
    assert sum(len(labels) for _, labels in opened.test_batches(batch=2, device=torch.device("cpu"))) == 3
    assert opened.share_problems() == opened.problems
    others = {kind: set() for kind in Problems.__struct_fields__} | {"grey": {"val/b/grey.jpg", "val/a/3.jpg"}}

    def gather(told, own):
        told[:] = [own, others]

    monkeypatch.setattr(file_images.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(file_images.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(file_images.dist, "all_gather_object", gather)
    found = opened.share_problems()
    assert (found.corrupt.first, found.grey.first) == (("val/b/no.jpg",), ("val/a/3.jpg", "val/b/grey.jpg"))
    assert found.words == "1 left out (val/b/no.jpg), 2 grey, 0 CMYK"


def test_many_problems_are_counted_and_five_named():
    corrupt = Found(count=1_200, first=tuple(f"train/b/{number}.jpg" for number in range(5)))
    problems = Problems(corrupt=corrupt, truncated=Found(count=1, first=("train/a/x.jpg",)), other=Found(count=2))
    names = "train/a/x.jpg, train/b/0.jpg, train/b/1.jpg, train/b/2.jpg, train/b/3.jpg"
    assert problems.words == f"1,201 left out ({names} and 1,196 more), 0 grey, 0 CMYK, 2 of other colours"
    assert Problems().words == "0 left out, 0 grey, 0 CMYK"


@pytest.mark.parametrize(
    ("cores", "local", "workers"), [(64, None, 8), (6, None, 6), (64, "8", 8), (8, "4", 2), (1, "4", 1)]
)
def test_the_usual_workers_share_the_cores(monkeypatch, cores, local, workers):
    monkeypatch.setattr(file_images, "cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert file_images.usual_workers() == workers
