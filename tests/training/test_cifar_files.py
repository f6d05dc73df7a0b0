"""The files of CIFAR: found, downloaded, unpacked, checked, and told apart."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from selab.training.cifar import LAYOUTS, DataError
from selab.training.data import open_data
from selab.training.download import DownloadError

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


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_files_of_the_other_set_are_recognised(tmp_path, folder):
    write(tmp_path / "data" / folder, "cifar100")
    with pytest.raises(
        DataError, match=r"holds the files of CIFAR-100, not of CIFAR-10; give --data cifar100"
    ) as found:
        open_data("cifar10", data_dir=tmp_path / "data")
    assert str(found.value).startswith(f"{tmp_path / 'data' / folder}: ")


def test_images_of_the_other_set_under_these_names_are_recognised(tmp_path):
    write(tmp_path / "cifar-10-batches-bin", "cifar10")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(bytes(4 * 3074))
    told = r"has 12,296 bytes, as many as images of CIFAR-100 have, expected 12,292; take cifar-10-batches-bin away"
    with pytest.raises(DataError, match=f"{told}, and put cifar-10-binary.tar.gz in its place or let it be downloaded"):
        open_data("cifar10", data_dir=tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(DataError, match=f"{told}: it is unpacked anew from cifar-10-binary.tar.gz beside it"):
        open_data("cifar10", data_dir=tmp_path)


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


@pytest.mark.parametrize(
    ("content", "there"),
    [
        ("{}\n\n", True),
        (None, False),
        ("one\ntwo\n", False),  # of another set
        ("same\n" * 10, False),
        ("\0" + "{}", False),
        ("x" * 100_000, False),
    ],
)
def test_classes_have_the_names_that_lie_beside_the_files(tmp_path, content, there):
    """`batches.meta.txt`, one name a line and an empty line at the end, as it is published."""
    layout = SMALL["cifar10"]
    folder = tmp_path / layout.folder
    write(folder, "cifar10")
    names = [f"class{number}" for number in range(10)]
    if content is not None:
        (folder / layout.texts[-1]).write_text(content.format("\n".join(names)) if "{}" in content else content)
    found = open_data("cifar10", data_dir=tmp_path)
    assert found.classes == (tuple(names) if there else ())
