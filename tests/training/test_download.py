"""Archives: fetched whole from servers that can, cannot or will not; unpacked without trusting them."""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import re
import tarfile
import threading
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from selab.training import download
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


# ------------------------------------------------------------------------------------------------------ hostile servers


@pytest.fixture
def hostile(monkeypatch):
    """Start a server whose answers a function writes; returns its address and how often it was asked."""
    monkeypatch.setenv("no_proxy", "*")
    running, asked = [], []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                asked.append(self.path)
                self.close_connection = True
                with contextlib.suppress(OSError):
                    answer(self)

            def log_message(self, *words):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def redirecting(to):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", to(handler) if callable(to) else to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def refused(url, path, words, **options):
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(url, path, md5=MD5, **options)
    assert "\n" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("to", ["/same", lambda handler: f"/{len(handler.path)}{handler.path[1:]}"])
def test_endless_redirects_are_given_up(hostile, path, to):
    """The second kind leads to a new address each time."""
    address, asked = hostile(redirecting(to))
    refused(f"{address}/set", path, "redirects more than 5 times; get the file in another way")
    assert len(asked) == 6
    assert not path.parent.exists()


def test_a_few_redirects_are_followed(hostile, path):
    def answer(handler):
        if len(handler.path) < 5:
            return redirecting(handler.path + "x")(handler)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        return handler.wfile.write(CONTENT)

    address, _ = hostile(answer)
    fetch(f"{address}/x", path, md5=MD5)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["file", "ftp", "data", "gopher"])
def test_redirects_elsewhere_are_refused(hostile, path, tmp_path, kind):
    (tmp_path / "secret").write_bytes(CONTENT)
    to = {"file": f"file://{tmp_path}/secret", "ftp": "ftp://127.0.0.1:1/x", "data": "data:,x", "gopher": "gopher://x/"}
    address, _ = hostile(redirecting(to[kind]))
    refused(f"{address}/set", path, f"redirects to an address of the kind '{kind}'; only http and https")


def test_a_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://example.org/set")
    with pytest.raises(DownloadError, match="redirects from https to http"):
        download._Redirects(request.full_url).http_error_302(request, io.BytesIO(), 302, "", {"Location": "http://x/"})


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "no address"])
def test_other_kinds_of_addresses_are_refused(path, url):
    refused(url, path, "cannot be fetched")


def endless(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")


def test_an_endless_answer_is_given_up_and_not_kept(hostile, path):
    address, _ = hostile(endless)
    refused(f"{address}/set", path, "it has no end, allowed are 1,000,000 bytes", most_bytes=1_000_000)
    assert left(path) == []


def test_a_file_that_says_it_is_too_long_is_not_begun(hostile, path):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**15))
        handler.end_headers()

    address, _ = hostile(answer)
    refused(f"{address}/set", path, "it has 1,000,000,000,000,000 bytes, allowed are 1,073,741,824 bytes")
    assert not path.parent.exists()


def test_a_slow_answer_is_given_up_and_kept(hostile, path):
    """A byte now and then never lets a connection time out."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        for byte in CONTENT:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    address, asked = hostile(answer)
    times = itertools.count(step=61.0)
    refused(f"{address}/set", path, "sends less than 65,536 bytes in 60 s; .* kept", clock=lambda: next(times))
    assert len(asked) == 1
    assert left(path) == ["set.tar.gz.part"]


def test_a_server_that_always_breaks_off_is_given_up(hostile, path):
    def answer(handler):
        begin = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(CONTENT) - begin))
        handler.end_headers()
        handler.wfile.write(CONTENT[begin : begin + 1])

    address, asked = hostile(answer)
    refused(f"{address}/set", path, r"cannot be fetched \(after 50 of 10,240 bytes\); 50 bytes of it are kept")
    assert len(asked) == 50


@pytest.mark.parametrize("length", ["-5", "many", "9" * 400, "10"])
def test_a_wrong_length_gives_no_file(hostile, path, length):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(CONTENT[:100])

    address, _ = hostile(answer)
    refused(f"{address}/set", path, "cannot be fetched|is not the published file")


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_a_part_that_is_no_file_of_its_own_is_not_written_to(server, path, tmp_path, kind):
    _, url = server
    other = tmp_path / "precious"
    other.write_text("precious")
    path.parent.mkdir()
    part = path.with_name("set.tar.gz.part")
    make = {
        "link": lambda: part.symlink_to(other),
        "dangling link": lambda: part.symlink_to(tmp_path / "new"),
        "hard link": lambda: part.hardlink_to(other),
        "pipe": lambda: os.mkfifo(part),
        "folder": part.mkdir,
    }
    make[kind]()
    refused(url, path, r"set\.tar\.gz\.part: is (another name of a file|a link, a folder or a device), .* delete it")
    assert other.read_text() == "precious"
    assert not (tmp_path / "new").exists()


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
