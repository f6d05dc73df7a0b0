"""Data sets: found, checked, told apart; batches that follow from (seed, epoch, number) alone, held against loops."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from selab.errors import SelabError, UnknownNameError
from selab.training import augment, synthetic
from selab.training.batches import BatchPlan
from selab.training.cifar import LAYOUTS, DataError
from selab.training.data import Augmentation, ImageSet, open_data, synthetic_set
from selab.training.download import DownloadError
from selab.training.recipe import ImageRecipe

CPU = torch.device("cpu")
ALL = Augmentation(crop_pad=4, flip=True, cutout=16)


# ------------------------------------------------------------------------------------------------------- CIFAR's files

SMALL = {
    "cifar10": replace(
        LAYOUTS["cifar10"], train={f"data_batch_{i}.bin": 4 for i in range(1, 6)}, test={"test_batch.bin": 3}
    ),
    "cifar100": replace(LAYOUTS["cifar100"], train={"train.bin": 20}, test={"test.bin": 3}),
}


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """The published layouts with a few images, and nowhere to fetch them."""
    monkeypatch.setenv("no_proxy", "*")
    small = {name: replace(one, url=f"http://127.0.0.1:1/{one.archive}") for name, one in SMALL.items()}
    monkeypatch.setattr("selab.training.data.LAYOUTS", small)
    return small


def rows_of(name, seed=0):
    """File → random images with their labels before them."""
    rng = np.random.default_rng(seed)
    layout = SMALL[name]
    return {
        file: np.concatenate(
            [rng.integers(classes, size=(count, 1), dtype=np.uint8) for classes in layout.labels]
            + [rng.integers(256, size=(count, 3072), dtype=np.uint8)],
            axis=1,
        )
        for file, count in layout.files.items()
    }


def write(folder, name, seed=0):
    folder.mkdir(parents=True)
    rows = rows_of(name, seed)
    for file, content in rows.items():
        content.tofile(folder / file)
    return rows


def archive(path, name, seed=0):
    """Writes a set as it is published; returns its MD5."""
    layout = SMALL[name]
    contents = {file: content.tobytes() for file, content in rows_of(name, seed).items()}
    with tarfile.open(path, "w:gz") as tar:
        for file, content in {**contents, **dict.fromkeys(layout.texts, b"names\n"), "readme.html": b"hello"}.items():
            info = tarfile.TarInfo(f"{layout.folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def published(tmp_path, no_server):
    """Puts archives on a server; its list of what was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(self.path)

    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, layout in SMALL.items():
            url = f"http://127.0.0.1:{running.server_port}/{layout.archive}"
            no_server[name] = replace(layout, url=url, md5=archive(folder / layout.archive, name))
        yield asked
        running.shutdown()
        thread.join()


def test_published_layouts_have_their_published_sizes():
    """50,000 and 10,000 images of 3 * 32 * 32 bytes and one label, or two. Source: cs.toronto.edu/~kriz/cifar.html."""
    for name, labels in (("cifar10", 1), ("cifar100", 2)):
        layout = LAYOUTS[name]
        assert sum(layout.train.values()) == 50_000
        assert sum(layout.test.values()) == 10_000
        assert layout.row_bytes == labels + 3072
    assert next(iter(LAYOUTS["cifar10"].files)) == "data_batch_1.bin"
    assert LAYOUTS["cifar10"].archive == "cifar-10-binary.tar.gz"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [True, False])
def test_images_and_labels_are_those_of_the_files(tmp_path, name, inside):
    layout = SMALL[name]
    rows = write(tmp_path / layout.folder, name)
    data = open_data(name, data_dir=tmp_path / layout.folder if inside else tmp_path)
    train = np.concatenate([rows[file] for file in layout.train])
    test = np.concatenate([rows[file] for file in layout.test])
    label = len(layout.labels) - 1  # CIFAR-100 has the coarse label first
    for found, labels, expected in (
        (data.train_images, data.train_labels, train),
        (data.test_images, data.test_labels, test),
    ):
        assert np.array_equal(found.numpy().reshape(len(expected), -1), expected[:, label + 1 :])
        assert np.array_equal(labels.numpy(), expected[:, label])
    assert (data.train_size, data.test_size, data.num_classes) == (20, 3, layout.labels[-1])
    assert data.input_chw == (3, 32, 32)
    assert data.sha256 == hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()
    assert (data.title, data.official) == (f"{layout.title} (unverified copy)", False)


def test_known_copy_has_its_name(tmp_path, monkeypatch):
    write(tmp_path / "cifar-10-batches-bin", "cifar10")
    sha256 = open_data("cifar10", data_dir=tmp_path).sha256
    monkeypatch.setattr("selab.training.cifar._COPIES", {sha256: "some copy"})
    data = open_data("cifar10", data_dir=tmp_path)
    assert (data.title, data.official) == ("CIFAR-10 (some copy)", False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_downloaded_set_is_the_official_one_until_it_is_changed(tmp_path, published, name):
    layout = SMALL[name]
    told = []
    data = open_data(name, data_dir=tmp_path / "data", report=told.append)
    assert (data.title, data.official) == (layout.title, True)
    size = (tmp_path / "server" / layout.archive).stat().st_size / 1e3
    assert told[-1] == f"{layout.archive}: {size:.1f} kB of {size:.1f} kB"
    assert sorted(one.name for one in (tmp_path / "data").iterdir()) == [".selab.lock", layout.folder]
    again = open_data(name, data_dir=tmp_path / "data", download=False)
    assert (again.sha256, again.official, len(published)) == (data.sha256, True, 1)

    file = tmp_path / "data" / layout.folder / next(iter(layout.train))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = open_data(name, data_dir=tmp_path / "data")
    assert (changed.title, changed.official) == (f"{layout.title} (unverified copy)", False)
    assert changed.sha256 != data.sha256


def test_archive_that_lies_there_is_unpacked_and_kept(tmp_path, published):
    (tmp_path / "server" / "cifar-10-binary.tar.gz").rename(tmp_path / "cifar-10-binary.tar.gz")
    data = open_data("cifar10", data_dir=tmp_path, download=False)
    assert data.official
    assert published == []
    assert (tmp_path / "cifar-10-binary.tar.gz").exists()


def test_archive_of_something_else_is_refused(tmp_path):
    archive(tmp_path / "cifar-10-binary.tar.gz", "cifar10", seed=1)
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz: is broken, or not the published one \(MD5 c32a1d4a"):
        open_data("cifar10", data_dir=tmp_path)
    assert not (tmp_path / "cifar-10-batches-bin").exists()


def test_folder_in_the_place_of_the_archive_is_named(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").mkdir()
    with pytest.raises(DownloadError, match=r"cifar-10-binary.tar.gz: cannot be read: Is a directory; put the pub"):
        open_data("cifar10", data_dir=tmp_path)


def test_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.exists", closed)
    with pytest.raises(DataError, match=r"data: cannot be read: Permission denied; choose a readable folder"):
        open_data("cifar10", data_dir=tmp_path / "data")


def test_two_that_want_it_at_once_fetch_it_once(tmp_path, published):
    pytest.importorskip("fcntl", reason="the system has no flock")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(open_data("cifar10", data_dir=tmp_path / "data")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data.official for data in found] == [True] * 4
    assert len(published) == 1


@pytest.mark.parametrize(
    ("download", "why"),
    [
        (True, r"cannot be downloaded: http://127.0.0.1:1/cifar-10-binary.tar.gz: cannot be fetched \(.*\)"),
        (False, "downloading is off"),
    ],
)
def test_offline_says_in_one_line_what_to_put_where(tmp_path, download, why):
    with pytest.raises(DataError, match=why) as caught:
        open_data("cifar10", data_dir=tmp_path / "data", download=download)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'data'}: holds no CIFAR-10")
    assert "put cifar-10-binary.tar.gz there" in told
    # The published checksum is the archive's: of a folder nobody can tell.
    assert "unpacked by hand, the folder cifar-10-batches-bin works too, but is called an unverified copy" in told
    assert "\n" not in told


def test_pickles_are_not_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nabort\n(tR.")  # would end the process
    with pytest.raises(
        DataError, match=r"but cifar-10-batches-py, which is pickled and never read.*; put cifar-10-bin"
    ):
        open_data("cifar10", data_dir=tmp_path, download=False)
    with pytest.raises(DataError, match=r"cifar-10-batches-py: is CIFAR-10 for Python, .*; get the binary version"):
        open_data("cifar10", data_dir=folder)


def test_pickles_beside_it_do_not_hinder_the_download(tmp_path, published):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    assert open_data("cifar10", data_dir=tmp_path / "data").official


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 12,291 bytes, expected 12,292"),  # 4 * 3073
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 12,293 bytes, expected 12,292"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, expected 12,292"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(bytes(2 * 3073) + b"\x0a" + bytes(2 * 3073 - 1)), "image 2 has the label 10, "),
    ],
)
def test_damaged_file_is_named(tmp_path, damage, told):
    write(tmp_path / "cifar-10-batches-bin", "cifar10")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    damage(path)
    with pytest.raises(DataError, match=told) as caught:
        open_data("cifar10", data_dir=tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_coarse_label_is_checked_too(tmp_path):
    rows = write(tmp_path / "cifar-100-binary", "cifar100")
    rows["test.bin"][1, 0] = 20
    rows["test.bin"].tofile(tmp_path / "cifar-100-binary" / "test.bin")
    with pytest.raises(DataError, match=r"test.bin: image 1 has the label 20, allowed are 0 to 19"):
        open_data("cifar100", data_dir=tmp_path)


@pytest.mark.parametrize("marker", ["", "{", "[]", "1", '{"md5": 1}', '{"md5": "x", "sha256": "y"}'])
def test_marker_of_someone_else_proves_nothing(tmp_path, marker):
    write(tmp_path / "cifar-10-batches-bin", "cifar10")
    (tmp_path / "cifar-10-batches-bin" / "selab.json").write_text(marker)
    assert not open_data("cifar10", data_dir=tmp_path).official


@pytest.mark.slow
def test_jpeg_copy(tmp_path, root, monkeypatch):
    """The real images, packed as JPEG: known by name, as many of each class as published, colours as recipes say."""
    script = Path(os.environ.get("SELAB_SHARED", root.parent / "shared")) / "data" / "make_cifar10.py"
    if not script.exists():
        pytest.skip("the packed copy of CIFAR-10 is not beside the checkout")
    pytest.importorskip("PIL", reason="pillow is not installed")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    monkeypatch.setattr("selab.training.data.LAYOUTS", LAYOUTS)
    data = open_data("cifar10", data_dir=tmp_path, download=False)
    assert (data.title, data.official) == ("CIFAR-10 (JPEG copy)", False)
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        pixels = data.train_images[:, channel].float()
        assert pixels.mean(dtype=torch.float64).item() == pytest.approx(mean, abs=0.5)
        assert pixels.std().item() == pytest.approx(std, abs=0.5)


# ----------------------------------------------------------------------------------------------------- batches in order


@pytest.fixture(scope="module")
def numbered():
    """101 training and 23 test images; each label is the number of its image."""
    pixels = torch.randint(0, 256, (124, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(
        name="numbered",
        title="numbered",
        sha256="",
        official=False,
        num_classes=124,
        train_images=pixels[:101],
        train_labels=torch.arange(101),
        test_images=pixels[101:],
        test_labels=torch.arange(23),
        mean=(125.0, 123.0, 114.0),
        std=(63.0, 62.0, 67.0),
    )


def batches(data, *, batch=8, seed=1, epoch=0, device=CPU, augmentation=ALL, **share):
    plan = BatchPlan(batch=batch, seed=seed, epoch=epoch, **share)
    return data.train_batches(plan, device=device, augmentation=augmentation)


def labels_of(found):
    return torch.cat([labels for _, labels in found]).tolist()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_are_normalised_floats_and_whole_labels(numbered):
    images, labels = next(batches(numbered, augmentation=Augmentation()))
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((8,), torch.int64)
    mean, std = (torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (numbered.mean, numbered.std))
    expected = (numbered.train_images[labels].double() - mean) / std
    assert torch.allclose(images.double(), expected, rtol=0, atol=1e-6)


def test_an_epoch_shows_each_image_once_but_for_the_last_incomplete_batch(numbered):
    shown = labels_of(batches(numbered))
    assert len(shown) == 96  # 12 batches of 8 of 101
    assert len(set(shown)) == 96
    assert sorted(labels_of(batches(numbered, batch=101))) == list(range(101))


def test_order_is_that_of_seed_and_epoch(numbered):
    orders = {tuple(labels_of(batches(numbered, seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert labels_of(batches(numbered, seed=2, epoch=1)) == labels_of(batches(numbered, seed=2, epoch=1))


def test_batches_depend_on_nothing_that_was_drawn_before(numbered):
    whole = list(batches(numbered))
    assert_same(list(batches(numbered, first=7)), whole[7:])
    assert list(batches(numbered, first=12)) == []
    one, other = batches(numbered), batches(numbered, seed=5)
    mixed = []
    for found in one:
        mixed.append(found)
        next(other, None)
        torch.rand(3)
    assert_same(mixed, whole)


def test_nothing_is_drawn_from_the_callers_generator(numbered):
    before = torch.get_rng_state()
    list(batches(numbered))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_have_the_batches_of_one(numbered, world):
    parts = [list(batches(numbered, rank=rank, world=world)) for rank in range(world)]
    together = [
        (torch.cat([images for images, _ in ranks]), torch.cat([labels for _, labels in ranks]))
        for ranks in zip(*parts, strict=True)
    ]
    assert_same(together, list(batches(numbered)))
    assert {len(labels) for part in parts for _, labels in part} == {8 // world}


def test_threads_do_not_change_a_bit(numbered):
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(list(batches(numbered, batch=96)))
    torch.set_num_threads(threads)
    assert_same(*found)


@pytest.mark.parametrize("batch", [1, 4, 8, 23, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_test_image_is_dropped_or_doubled(numbered, batch, world):
    batch *= world
    parts = [list(numbered.test_batches(batch=batch, device=CPU, rank=rank, world=world)) for rank in range(world)]
    assert sorted(label for part in parts for label in labels_of(part or [(None, torch.empty(0))])) == list(range(23))
    for part in parts:
        for images, labels in part:
            assert 1 <= len(labels) <= batch // world
            mean, std = (torch.tensor(one).view(3, 1, 1) for one in (numbered.mean, numbered.std))
            assert torch.allclose(images, (numbered.test_images[labels] - mean) / std, rtol=0, atol=1e-6)


def test_batches_are_the_callers_to_change(numbered):
    for images, labels in numbered.test_batches(batch=23, device=CPU):
        images.zero_()
        labels.zero_()
    for images, labels in batches(numbered):
        images.zero_()
        labels.zero_()
    assert labels_of(numbered.test_batches(batch=23, device=CPU)) == list(range(23))
    assert sorted(labels_of(batches(numbered, batch=101))) == list(range(101))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"batch": 9, "world": 2}, "batch: 9 images cannot be shared by 2 processes; give a multiple of 2"),
        ({"batch": 0}, "batch: 0 images"),
        ({"rank": 2, "world": 2}, "rank: 2; allowed are 0 to 1"),
        ({"batch": 102}, "numbered: has 101 training images; a batch of 102 needs more"),
        ({"seed": -1}, "seed: -1; allowed are 0 to"),
    ],
)
def test_impossible_batches_are_refused_at_once(numbered, asked, told):
    with pytest.raises(SelabError, match=re.escape(told)):
        batches(numbered, **asked)
    if not {"seed"} & set(asked) and asked.get("batch") != 102:
        with pytest.raises(SelabError, match=re.escape(told)):
            numbered.test_batches(**{"batch": 8, "device": CPU, **asked})


# --------------------------------------------------------------------------------------------------------- augmentation


def decide(size=64, augmentation=ALL, **changed):
    asked = {"size": size, "input_hw": (32, 32), "seed": 1, "epoch": 2, "number": 3, **changed}
    return augment.decide(augmentation, **asked)


@pytest.mark.parametrize("pad", [1, 4, 7])
def test_crop_is_a_window_of_the_image_with_black_around_it(pad):
    images = torch.randint(1, 256, (64, 3, 20, 32), dtype=torch.uint8)
    top, left = decide(augmentation=Augmentation(crop_pad=pad))[:, :2].unbind(1)
    found = augment.crop(images, top, left, pad=pad).numpy()
    for image, y, x, one in zip(images.numpy(), top.tolist(), left.tolist(), found, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        assert np.array_equal(one, padded[:, y : y + 20, x : x + 32])


def test_flip_mirrors_some():
    images = torch.randint(0, 256, (64, 3, 20, 32), dtype=torch.uint8)
    mirrored = decide()[:, 2]
    found = augment.flip(images, mirrored).numpy()
    for image, mirror, one in zip(images.numpy(), mirrored.tolist(), found, strict=True):
        assert np.array_equal(one, image[:, :, ::-1] if mirror else image)


@pytest.mark.parametrize("side", [1, 8, 15, 16, 80])
def test_hole_is_a_square_that_may_stick_out(side):
    row, column = decide()[:, 3:].unbind(1)
    found = augment.cut(torch.ones(64, 3, 32, 32), row, column, side=side)
    for y, x, one in zip(row.tolist(), column.tolist(), found, strict=True):
        expected = torch.ones(3, 32, 32)
        y, x = y - side // 2, x - side // 2
        expected[:, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = 0
        assert torch.equal(one, expected)


def test_all_together_in_the_order_of_the_recipes(numbered):
    images, labels = next(batches(numbered, seed=1, epoch=2, augmentation=ALL))
    top, left, mirrored, row, column = decide(8, number=0).unbind(1)
    expected = augment.crop(numbered.train_images[labels], top, left, pad=4)
    expected = augment.flip(expected, mirrored)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (numbered.mean, numbered.std))
    expected = augment.cut(augment.normalise(expected, mean, std), row, column, side=16)
    assert torch.equal(images, expected)


def test_decisions_cover_all_that_is_allowed_equally():
    decided = decide(90_000)
    for column, choices in enumerate((9, 9, 2, 32, 32)):
        counts = decided[:, column].bincount(minlength=choices).double()
        assert len(counts) == choices
        expected = 90_000 / choices
        # Each count is binomial: within five of its standard deviations.
        assert (counts - expected).abs().max() < 5 * (expected * (1 - 1 / choices)) ** 0.5


def test_columns_and_neighbours_have_nothing_to_do_with_each_other():
    decided = [decide(10_000, **changed) for changed in ({}, {"seed": 2}, {"epoch": 3}, {"number": 4})]
    columns = torch.cat([one.double() for one in decided], 1).T
    correlation = columns.corrcoef() - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / 10_000**0.5


def test_decisions_do_not_depend_on_what_is_wanted():
    assert torch.equal(decide(augmentation=ALL), decide(augmentation=Augmentation(crop_pad=4)))


@pytest.mark.parametrize("name", ["crop_pad", "cutout"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(SelabError, match=f"{name}: -1; allowed are 0"):
        Augmentation(**{name: -1})


def philox(counter, key):
    """Philox 4x64 with 10 rounds, as its authors define it: four words of four words and two."""
    mask = 2**64 - 1
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 64) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_random_words_are_those_of_the_published_generator():
    # Source: Random123's known answers, philox4x64 10, all zeros.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([0] * 4, [0, 0]) == known
    expected = philox([1, 5, 3, 0], [7, 2]) + philox([2, 5, 3, 0], [7, 2])
    assert augment.words(8, purpose=2, seed=7, epoch=3, number=5).tolist() == expected


@pytest.mark.cuda
def test_gpu_has_the_same_batches_to_the_bit(numbered):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda")
    found = [(images.cpu(), labels.cpu()) for images, labels in batches(numbered, device=device)]
    assert_same(found, list(batches(numbered)))
    found = [(images.cpu(), labels.cpu()) for images, labels in numbered.test_batches(batch=8, device=device)]
    assert_same(found, list(numbered.test_batches(batch=8, device=CPU)))


# ------------------------------------------------------------------------------------------------------------ synthetic


def test_synthetic_images_are_those_of_the_seed():
    data, again, other = (synthetic_set(train_size=30, test_size=20, seed=seed) for seed in (1, 1, 2))
    assert (data.name, data.official, data.num_classes, data.input_chw) == ("synthetic", False, 10, (3, 32, 32))
    assert (data.train_size, data.test_size) == (30, 20)
    assert data.sha256 == again.sha256 != other.sha256
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images[:20], data.test_images)


def test_larger_synthetic_set_begins_with_the_smaller_one():
    small, _ = synthetic.make(train_size=1200, test_size=0, seed=0)
    large, _ = synthetic.make(train_size=2100, test_size=0, seed=0)
    assert np.array_equal(large.images[:1200], small.images)
    assert np.array_equal(large.labels[:1200], small.labels)
    assert np.bincount(large.labels, minlength=10).min() > 2100 / 10 - 5 * (2100 * 0.09) ** 0.5


def test_synthetic_images_are_learned_by_a_small_network():
    data = synthetic_set(train_size=3000, test_size=500)
    torch.manual_seed(0)
    layers = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in islice(batches(data, batch=64, augmentation=Augmentation()), 40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test_batches(batch=250, device=CPU))
    assert right / 500 > 0.5  # chance: 0.1


# -------------------------------------------------------------------------------------------------------------- opening


def test_synthetic_is_opened_by_name(tmp_path):
    assert open_data("synthetic", data_dir=tmp_path / "none").train_size == 10_000


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_folders_are_opened_by_their_own_module(tmp_path, monkeypatch, name):
    module = SimpleNamespace(open_folder=lambda data_dir, **asked: (data_dir, asked))
    monkeypatch.setitem(sys.modules, "selab.training.image_folder", module)
    image = ImageRecipe(train_size=160)
    asked = {"image": image, "workers": 3, "classes_file": tmp_path / "list.txt", "report": print}
    assert open_data(name, data_dir=tmp_path, **asked) == (tmp_path, {"name": name, **asked})


def test_a_set_in_memory_numbers_its_classes_itself(tmp_path):
    with pytest.raises(SelabError, match=r"--classes-file list\.txt: is for image folders; synthetic numbers"):
        open_data("synthetic", data_dir=tmp_path, classes_file=Path("list.txt"))


def test_folder_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
    for name in ("image_folder", "image_decode"):
        monkeypatch.delitem(sys.modules, f"selab.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SelabError, match=r"imagenet: pillow is not installed; pip install 'selab\[imagenet\]'"):
        open_data("imagenet", data_dir=tmp_path)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="cifar-10: no such data set; did you mean cifar10, cifar100"):
        open_data("cifar-10", data_dir=Path())
