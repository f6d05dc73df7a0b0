"""Places365 in the layouts in which it is distributed."""

import msgspec
import pytest
from PIL import Image
from safetensors.torch import load_file

from selab.models import catalog
from selab.training.image_folder import open_folder
from selab.training.image_listing import FolderError
from selab.training.places365 import CLASSES, find_places365, title_of
from selab.training.recipe import ImageRecipe, default_recipe, find_recipe, recipes
from selab.training.record import Options
from selab.training.train import train

# Three real categories, so that the order of the easy layout's folders is that of the numbers.
NAMES = ["airfield", "apartment_building/outdoor", "zen_garden"]
NAMES[1:1] = [f"b{number:03d}" for number in range(CLASSES - 3)]
NAMES = sorted(NAMES)


def category(number):
    return f"/{NAMES[number][0]}/{NAMES[number]}"


@pytest.fixture
def image(tmp_path):
    def make(*files):
        for number, file in enumerate(files):
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (256, 256), (number % 256, 0, 0)).save(path, "jpeg")

    return make


@pytest.fixture
def lists(tmp_path, image):
    """The official lists and folders, of a few images."""
    last = CLASSES - 1
    (tmp_path / "categories_places365.txt").write_text(
        "".join(f"{category(number)} {number}\n" for number in range(CLASSES))
    )
    trains = [(f"{category(number)}/0000000{place}.jpg", number) for number in (0, 1, last) for place in (1, 2)]
    vals = [(f"Places365_val_0000000{place}.jpg", number) for place, number in enumerate((last, 0, 1))]
    (tmp_path / "places365_train_standard.txt").write_text("".join(f"{name} {label}\n" for name, label in trains))
    (tmp_path / "places365_val.txt").write_text("".join(f"{name} {label}\n" for name, label in vals))
    image(*(f"data_256{name}" for name, _ in trains), *(f"val_256/{name}" for name, _ in vals))
    return tmp_path


def test_official_lists_give_the_classes(lists):
    found = find_places365(lists)
    assert len(found.classes) == CLASSES
    assert found.classes[1] == "apartment_building-outdoor"
    train = {file.decode(): int(label) for file, label in zip(found.train.files, found.train.labels, strict=True)}
    assert train["a/apartment_building/outdoor/00000002.jpg"] == 1
    assert train["z/zen_garden/00000001.jpg"] == CLASSES - 1
    assert len(train) == 6
    assert found.val.labels.tolist() == [CLASSES - 1, 0, 1]
    assert found.assumed == (f"classes are numbered by {lists / 'categories_places365.txt'}",)


def test_class_folders_have_the_same_numbers(tmp_path, image):
    folders = [name.replace("/", "-") for name in NAMES]
    image(*(f"{split}/{folder}/1.jpg" for split in ("train", "val") for folder in folders))
    found = find_places365(tmp_path)
    assert found.classes == tuple(folders)
    assert found.val.labels.tolist() == list(range(CLASSES))
    categories = tmp_path / "categories_places365.txt"
    categories.write_text("".join(f"{category(number)} {number}\n" for number in range(CLASSES)))
    assert find_places365(tmp_path).classes == tuple(folders)
    categories.write_text(categories.read_text().replace("/z/zen_garden", "/z/zoo"))
    with pytest.raises(FolderError, match=r"categories_places365\.txt: zen_garden differs"):
        find_places365(tmp_path)


def test_batches_are_read_from_both_folders(lists):
    said = []
    data = open_folder(lists, name="places365", workers=0, report=said.append)
    assert (data.num_classes, data.train_size, data.test_size) == (CLASSES, 6, 3)
    assert data.title == "Places365, 6 training and 3 test images"
    batches = [labels.tolist() for _, labels in data.test_batches(batch=2, device=__import__("torch").device("cpu"))]
    assert batches == [[CLASSES - 1, 0], [1]]
    assert said[-1] == "6 training images, 3 test images, 365 classes"


def test_missing_images_are_counted_named_and_left_out(lists):
    (lists / "data_256/z/zen_garden/00000002.jpg").unlink()
    found = find_places365(lists)
    assert len(found.train.files) == 5
    assert found.assumed[-1] == (
        f"{lists / 'data_256'}: 1 image of places365_train_standard.txt missing and left out: z/zen_garden/00000002.jpg"
    )


def test_without_training_images_it_is_for_evaluation(lists):
    (lists / "places365_train_standard.txt").unlink()
    found = find_places365(lists)
    assert found.train is None
    assert "used for evaluation alone" in found.assumed[-1]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "places365_val.txt",
            "a.jpg 1\nb.jpg\n",
            r"places365_val\.txt, line 2: 'b\.jpg': expected an image and a class",
        ),
        ("places365_val.txt", "../a.jpg 3\n", r"line 1: '\.\./a\.jpg 3': leads out of val_256"),
        ("places365_val.txt", "a.jpg 365\n", r"line 1: 'a\.jpg 365': .*from 0 to 364"),
        ("places365_val.txt", "a.jpg 1\n", r"val_256: holds none of the 1 images of places365_val\.txt"),
        ("categories_places365.txt", "airfield 0\n", r"line 1: 'airfield 0': expected a category and its number"),
        ("categories_places365.txt", "/a/airfield 0\n", r"names 1 of 365 categories; the first missing number is 1"),
    ],
)
def test_malformed_lists_are_refused_with_the_line(lists, file, text, message):
    (lists / file).write_text(text)
    with pytest.raises(FolderError, match=message):
        find_places365(lists)


def test_other_folders_are_refused(lists, tmp_path):
    (tmp_path / "places365_train_challenge.txt").write_text("")
    with pytest.raises(FolderError, match=r"holds places365_train_standard\.txt and places365_train_challenge\.txt"):
        find_places365(tmp_path)
    (tmp_path / "places365_train_challenge.txt").unlink()
    (tmp_path / "categories_places365.txt").unlink()
    with pytest.raises(FolderError, match=r"categories_places365\.txt: is missing beside places365_val\.txt"):
        find_places365(tmp_path)
    with pytest.raises(FolderError, match="is no folder"):
        find_places365(tmp_path / "none")
    (tmp_path / "few/val/airfield").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "few/val/airfield/1.jpg")
    with pytest.raises(FolderError, match=r"has 1 class folder, and Places365 has 365; .*--data folder"):
        find_places365(tmp_path / "few")
    with pytest.raises(FolderError, match=r"--classes-file .*: Places365 names its classes itself"):
        open_folder(tmp_path, name="places365", classes_file=tmp_path / "x")


def test_whole_sets_have_their_names():
    assert title_of(1_803_460, 36_500) == "Places365-Standard"
    assert title_of(8_026_628, 36_500) == "Places365-Challenge"
    assert title_of(0, 36_500) == "Places365"
    assert title_of(5, 36_500) == "Places365, 5 training and 36,500 test images"


def test_the_paper_s_recipe_is_the_default():
    assert default_recipe("resnet", in_memory=False, data="places365") is recipes()["places365_senet"]
    assert recipes()["places365_senet"].image.balanced


def test_a_layout_that_is_not_whole_is_named(lists, tmp_path):
    (lists / "places365_train_standard.txt").unlink()
    found = open_folder(lists, name="places365", workers=0)
    assert "has no places365_train_standard.txt or places365_train_challenge.txt" in found._listing.assumed[1]
    assert found.wanted == "put places365_train_standard.txt and data_256 beside places365_val.txt"
    (lists / "places365_val.txt").unlink()
    with pytest.raises(FolderError, match=r"places365_val\.txt: is missing; it lists the images of val_256"):
        find_places365(lists)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FolderError, match=r"empty: holds neither train and val with a folder per class, nor places365"):
        find_places365(empty)


def test_a_number_that_no_category_has(lists):
    file = lists / "categories_places365.txt"
    file.write_text(file.read_text() + "/x/extra 365\n")
    with pytest.raises(FolderError, match=r"gives extra the number 365; expected 0 to 364"):
        find_places365(lists)


def test_it_is_trained_on(lists, tmp_path):
    small = ImageRecipe(train_size=32, test_resize=36, test_crop=32, rotation_deg=0, pixel_jitter=0, balanced=True)
    recipe = msgspec.structs.replace(find_recipe("places365_senet"), epochs=1, batch=2, milestones=(), image=small)
    data = open_folder(lists, name="places365", image=small, workers=0)
    done = train(
        catalog.find("resnet20_cifar"), data, recipe, seed=0, folder=tmp_path / "run", options=Options(threads=1),
        report=lambda _: None,
    )  # fmt: skip
    assert (done.test.images, done.data) == (3, "places365")
    assert load_file(done.weights)["head.fc.weight"].shape[0] == CLASSES
