"""Archives: fetched whole from servers that can, cannot or will not; unpacked without trusting them."""

import gzip
import hashlib
import io
import re
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from selab.training.download import DownloadError, alone, fetch, unpack, whole_folder

CONTENT = bytes(range(256)) * 40  # 10,240 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    ranges: bool = True
    most: int | None = None  # bytes of an answer after which it breaks off
    status: int = 200
    asked: list = field(default_factory=list)


@pytest.fixture
def server(monkeypatch):
    """(behaviour, address) of a server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            behaviour.asked.append(asked)
            if behaviour.status != 200:
                self.send_error(behaviour.status)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and behaviour.ranges else 0
            if start and start >= len(behaviour.content):
                self.send_error(416)
                return
            rest = behaviour.content[start:]
            self.send_response(206 if start else 200)
            if start:
                whole = len(behaviour.content)
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: behaviour.most])

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield behaviour, f"http://127.0.0.1:{running.server_port}/set.tar.gz"
        running.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "set.tar.gz"


def left(path):
    return sorted(one.name for one in path.parent.iterdir())


# ------------------------------------------------------------------------------------------------------------ fetching


def test_file_is_fetched_whole_and_progress_is_told(server, path):
    behaviour, url = server
    seen = []
    fetch(url, path, md5=MD5, progress=seen.append)
    assert path.read_bytes() == CONTENT
    assert left(path) == ["set.tar.gz"]
    assert behaviour.asked == [None]
    assert (seen[-1].file, seen[-1].done_bytes, seen[-1].total_bytes) == ("set.tar.gz", 10_240, 10_240)


def test_what_an_earlier_call_left_is_gone_on_with(server, path):
    behaviour, url = server
    path.parent.mkdir()
    path.with_name("set.tar.gz.part").write_bytes(CONTENT[:4000])
    seen = []
    fetch(url, path, md5=MD5, progress=seen.append)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=4000-"]
    assert {one.total_bytes for one in seen} == {10_240}


def test_server_without_range_sends_all_again(server, path):
    behaviour, url = server
    behaviour.ranges = False
    path.parent.mkdir()
    path.with_name("set.tar.gz.part").write_bytes(CONTENT[:4000])
    fetch(url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=4000-"]


def test_broken_connections_are_gone_on_with_at_once(server, path):
    behaviour, url = server
    behaviour.most = 4000
    fetch(url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked == [None, "bytes=4000-", "bytes=8000-"]


def test_server_that_breaks_off_at_the_same_place_is_given_up_and_what_came_is_kept(server, path):
    behaviour, url = server
    behaviour.most, behaviour.ranges = 4000, False
    with pytest.raises(DownloadError, match=r"cannot be fetched \(after 4,000 of 10,240 bytes\); 4,000 bytes .* kept"):
        fetch(url, path, md5=MD5)
    assert left(path) == ["set.tar.gz.part"]
    behaviour.most, behaviour.ranges = None, True
    fetch(url, path, md5=MD5)
    assert path.read_bytes() == CONTENT


def test_complete_part_is_only_checked(server, path):
    behaviour, url = server
    path.parent.mkdir()
    path.with_name("set.tar.gz.part").write_bytes(CONTENT)
    fetch(url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=10240-"]


@pytest.mark.parametrize("rubbish", [b"x" * 4000, b"x" * 20_000])
def test_part_of_another_file_is_thrown_away_once(server, path, rubbish):
    behaviour, url = server
    path.parent.mkdir()
    path.with_name("set.tar.gz.part").write_bytes(rubbish)
    fetch(url, path, md5=MD5)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked == [f"bytes={len(rubbish)}-", None]


@pytest.mark.parametrize("earlier", [b"", b"x" * 4000])
def test_wrong_checksum_leaves_nothing(server, path, earlier):
    _, url = server
    path.parent.mkdir()
    if earlier:
        path.with_name("set.tar.gz.part").write_bytes(earlier)
    with pytest.raises(DownloadError, match=f"set.tar.gz: is not the published file: its MD5 is not {'0' * 32}"):
        fetch(url, path, md5="0" * 32)
    assert left(path) == []


def test_error_of_the_server_is_told(server, path):
    behaviour, url = server
    behaviour.status = 404
    with pytest.raises(DownloadError, match=r"set.tar.gz: the server answers 404 Not Found$"):
        fetch(url, path, md5=MD5)
    assert not path.parent.exists()


def test_no_server_is_told(server, path, tmp_path):
    with pytest.raises(DownloadError, match=r"cannot be fetched \(Connection refused\)$"):
        fetch("http://127.0.0.1:1/set.tar.gz", path, md5=MD5)
    assert not path.parent.exists()


def test_folder_that_is_a_file_is_told(server, tmp_path):
    _, url = server
    (tmp_path / "data").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(url, tmp_path / "data" / "set.tar.gz", md5=MD5)


# ----------------------------------------------------------------------------------------------------------- unpacking


def archive_of(path, members):
    """Writes a .tar.gz of (name, content) or ready TarInfo."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


MEMBERS = {"set/a.bin": 5, "set/names.txt": None}
GOOD = [special("set", tarfile.DIRTYPE), ("set/a.bin", b"12345"), ("set/names.txt", b"one\n")]


def files_in(folder):
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if not one.is_dir())


def test_expected_members_are_written_and_others_are_not(tmp_path):
    archive = archive_of(tmp_path / "set.tar.gz", [*GOOD, ("set/readme.html", b"hello"), ("more.txt", b"x")])
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out", members=MEMBERS)
    assert files_in(tmp_path / "out") == ["set/a.bin", "set/names.txt"]
    assert (tmp_path / "out/set/a.bin").read_bytes() == b"12345"


@pytest.mark.parametrize(
    ("evil", "told"),
    [
        (("../escape", b"x"), "is refused"),
        (("set/../../escape", b"x"), "is refused"),
        (special("set/a.bin", tarfile.SYMTYPE, "/etc/passwd"), "is refused"),
        (special("set/a.bin", tarfile.SYMTYPE, "names.txt"), "a.bin in it is a link"),
        (special("set/a.bin", tarfile.LNKTYPE, "set/names.txt"), "a.bin in it is a link"),
        (special("set", tarfile.SYMTYPE, ".."), "is refused"),
        (special("set/a.bin", tarfile.FIFOTYPE), "is refused"),
        (special("set/a.bin", tarfile.CHRTYPE), "is refused"),
        (("set/a.bin", b"123456"), "has 6 bytes, expected 5"),
        (("set/names.txt", b"x" * (2**20 + 1)), "has 1,048,577 bytes, expected at most 1,048,576"),
    ],
)
def test_archive_with_what_no_data_set_holds_is_refused(tmp_path, evil, told):
    archive = archive_of(tmp_path / "set.tar.gz", [evil, *GOOD])
    (tmp_path / "out").mkdir()
    with pytest.raises(DownloadError, match=told) as caught:
        unpack(archive, tmp_path / "out", members=MEMBERS)
    assert str(caught.value).startswith(str(archive))
    assert "\n" not in str(caught.value)
    assert not files_in(tmp_path / "out")
    assert not (tmp_path / "escape").exists()


def test_absolute_path_is_not_written(tmp_path):
    archive = archive_of(tmp_path / "set.tar.gz", [(str(tmp_path / "escape"), b"x"), *GOOD])
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out", members=MEMBERS)
    assert files_in(tmp_path / "out") == ["set/a.bin", "set/names.txt"]
    assert not (tmp_path / "escape").exists()


def test_missing_member_is_named(tmp_path):
    archive = archive_of(tmp_path / "set.tar.gz", GOOD[:2])
    with pytest.raises(DownloadError, match=r"lacks set/names.txt"):
        unpack(archive, tmp_path, members=MEMBERS)


@pytest.mark.parametrize("damage", ["cut", "text", "inside"])
def test_broken_archive_is_told(tmp_path, damage):
    archive = archive_of(tmp_path / "set.tar.gz", [*GOOD, ("noise", hashlib.sha512(b"").digest() * 500)])
    content = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        archive.write_bytes(b"<html>no such file</html>")
    else:
        archive.write_bytes(gzip.compress(b"no tar at all" * 100))
    with pytest.raises(DownloadError, match=r"set.tar.gz: is broken or no .tar.gz"):
        unpack(archive, tmp_path, members=MEMBERS)


def test_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "data" / "set"

    def make(*, fails):
        with whole_folder(folder) as temporary:
            (temporary / "set").mkdir()
            (temporary / "set" / "a.bin").write_bytes(b"1")
            assert not folder.exists()
            if fails:
                raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        make(fails=True)
    assert list(folder.parent.iterdir()) == []
    make(fails=False)
    assert files_in(folder.parent) == ["set/a.bin"]


def test_folder_that_is_there_is_left_as_it_is(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"1")
    with pytest.raises(DownloadError, match=r"set: cannot be written: .*; move it away"), whole_folder(folder) as other:
        (other / "set").mkdir()
    assert files_in(tmp_path) == ["set/a.bin"]


def test_folder_is_locked_as_long_as_one_is_alone_in_it(tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="the system has no flock")
    file = tmp_path / "data" / ".selab.lock"
    with alone(file.parent), file.open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
