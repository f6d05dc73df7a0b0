"""The one writer: which targets are replaced, written through or refused, and what a killed process leaves."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import msgspec
import pytest

from selab.errors import RecordError
from selab.experiments.profiling import count_record
from selab.records import files
from selab.records.files import check_writable, clean, files_ending, read_bytes, read_text, write_atomically
from selab.records.store import read_records, save


@pytest.fixture(autouse=True)
def nothing_cleaned(monkeypatch):
    """A folder is cleaned once in a process; each test stands for a process of its own."""
    monkeypatch.setattr(files, "_cleaned", set())


@pytest.fixture
def umask():
    """Sets the umask for the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


class TestRegularFiles:
    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_a_new_file_has_what_the_umask_leaves(self, tmp_path, umask, mask, mode):
        umask(mask)
        write_atomically(tmp_path / "deep" / "er" / "new.json", b"x")
        assert mode_of(tmp_path / "deep" / "er" / "new.json") == mode

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
    def test_an_existing_file_keeps_its_mode(self, tmp_path, umask, mode):
        path = tmp_path / "old.json"
        path.write_bytes(b"old")
        path.chmod(mode)
        write_atomically(path, b"new")
        assert (path.read_bytes(), mode_of(path)) == (b"new", mode)
        assert names(tmp_path) == ["old.json"]

    def test_a_name_as_long_as_a_file_system_allows(self, tmp_path):
        path = tmp_path / ("n" * 250 + ".json")
        write_atomically(path, b"x")
        assert path.read_bytes() == b"x"

    @pytest.mark.parametrize("links", [1, 2])
    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path, links):
        target = tmp_path / "elsewhere" / "target.json"
        target.parent.mkdir()
        target.write_bytes(b"old")
        link = tmp_path / "link.json"
        link.symlink_to(target)
        if links == 2:
            link = tmp_path / "second.json"
            link.symlink_to("link.json")
        write_atomically(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"

    def test_a_link_to_nothing_makes_its_target(self, tmp_path):
        link = tmp_path / "link.json"
        link.symlink_to(tmp_path / "made" / "target.json")
        write_atomically(link, b"new")
        assert link.is_symlink()
        assert (tmp_path / "made" / "target.json").read_bytes() == b"new"

    def test_another_name_of_the_file_keeps_the_old_content(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b"old")
        os.link(tmp_path / "a.json", tmp_path / "b.json")
        write_atomically(tmp_path / "a.json", b"new")
        assert (tmp_path / "b.json").read_bytes() == b"old"


class TestOtherTargets:
    def test_a_device_stays_a_device(self, tmp_path):
        device = tmp_path / "null"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            device = type(tmp_path)(os.devnull)
        check_writable(device, replace=False)
        write_atomically(device, b"x")
        assert stat.S_ISCHR(device.stat().st_mode)

    def test_a_link_to_a_device_stays(self, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(os.devnull)
        write_atomically(link, b"x")
        assert link.is_symlink()
        assert stat.S_ISCHR(link.stat().st_mode)

    def test_a_full_device_is_an_error(self):
        with pytest.raises(RecordError, match="/dev/full: cannot be written: No space left on device"):
            write_atomically(files.Path("/dev/full"), b"x")

    def test_a_pipe_is_written_through(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        content = bytes(range(256)) * 1000
        got = []

        def read():
            while part := os.read(reader, 1 << 16):
                got.append(part)

        thread = threading.Thread(target=read)
        # The write side is open before the reader starts, else it would see the end at once.
        holder = os.open(pipe, os.O_WRONLY)
        thread.start()
        write_atomically(pipe, content)
        os.close(holder)
        thread.join()
        os.close(reader)
        assert b"".join(got) == content
        assert stat.S_ISFIFO(pipe.stat().st_mode)

    def test_a_pipe_that_nobody_reads_does_not_wait(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        check_writable(tmp_path / "pipe", replace=False)
        with pytest.raises(RecordError, match="no program reads from it"):
            write_atomically(tmp_path / "pipe", b"x")

    @pytest.mark.parametrize(
        "write", [lambda path: check_writable(path, replace=True), lambda p: write_atomically(p, b"")]
    )
    def test_refused(self, tmp_path, monkeypatch, write):
        with pytest.raises(RecordError, match="is a folder"):
            write(tmp_path)
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            with pytest.raises(RecordError, match="socket: is a socket"):
                write(tmp_path / "socket")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "file").write_bytes(b"")
        for name, reason in (
            ("loop", "Too many levels of symbolic links"),
            ("n" * 256, "File name too long"),
            ("nul\0", "null byte"),
            ("file/in/it", "Not a directory"),
        ):
            with pytest.raises(RecordError, match=f"cannot be written: .*{reason}") as caught:
                write(tmp_path / name)
            assert "\n" not in str(caught.value)
            assert "\0" not in str(caught.value)
        assert names(tmp_path) == ["file", "loop", "socket"]

    @pytest.mark.parametrize("redirect", ["> out.txt", ">> out.txt", "| cat > out.txt"])
    def test_standard_output_by_its_path(self, tmp_path, redirect):
        code = (
            "import sys; from pathlib import Path; from selab.records.files import write_atomically; "
            "print('before'); write_atomically(Path('/dev/stdout'), b'middle\\n'); sys.stdout.flush(); print('after')"
        )
        subprocess.run(
            f'"{sys.executable}" -c "$CODE" {redirect}',
            shell=True,
            cwd=tmp_path,
            check=True,
            env={**os.environ, "CODE": code},
        )
        assert sorted((tmp_path / "out.txt").read_text().split()) == ["after", "before", "middle"]


class TestFaults:
    def test_a_disk_that_fills_leaves_the_old_file(self, tmp_path):
        code = f"""
import resource, sys
from pathlib import Path
from selab.records.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path({str(tmp_path / "old.json")!r}), bytes(5000))
except Exception as error:
    print(type(error).__name__, error)
"""
        (tmp_path / "old.json").write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("RecordError ")
        assert "File too large; the file is as it was" in done.stdout
        assert (tmp_path / "old.json").read_bytes() == b"old"
        assert names(tmp_path) == ["old.json"]

    @pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_an_error_of_any_call_is_told_and_nothing_is_left(self, tmp_path, monkeypatch, call, old):
        path = tmp_path / "file.json"
        if old is not None:
            path.write_bytes(old)
        real = getattr(os, call)
        failed = []

        def fails(*args, **kwargs):
            if not failed and (call != "open" or ".selab-" in str(args[0])):
                failed.append(call)
                if call == "close":
                    real(*args)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        monkeypatch.setattr(files.os, call, fails)
        with pytest.raises(
            RecordError, match=r"file\.json: cannot be written: Input/output error; the file is as it was"
        ):
            write_atomically(path, b"new")
        monkeypatch.undo()
        assert failed == [call]
        assert names(tmp_path) == ([] if old is None else ["file.json"])
        assert old is None or path.read_bytes() == old

    def test_a_write_that_takes_a_part_goes_on(self, tmp_path, monkeypatch):
        real = os.write
        monkeypatch.setattr(files.os, "write", lambda file, content: real(file, content[:7]))
        write_atomically(tmp_path / "file", bytes(range(100)))
        assert (tmp_path / "file").read_bytes() == bytes(range(100))

    @pytest.mark.parametrize("call", ["write", "fsync", "close", "replace"])
    @pytest.mark.parametrize("late", [False, True])
    def test_a_kill_at_any_call_leaves_a_folder_that_loads(self, tmp_path, call, late):
        record = count_record("se_small_cnn", batch=2, counters=False)
        folder = tmp_path / "machine"
        save(record, folder / "a.json")
        (folder / "b.json").write_bytes(msgspec.json.encode(record))
        code = f"""
import os, signal, sys
from pathlib import Path
from selab.records import files
real = os.{call}
def kills(*args, **kwargs):
    if {late}:
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
content = Path({str(folder / "a.json")!r}).read_bytes()
os.{call} = kills
files.write_atomically(Path({str(folder / "b.json")!r}), content)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        assert [one.arch for one in read_records(folder)] == ["se_small_cnn"]
        files._cleaned.clear()
        write_atomically(folder / "c.txt", b"x")
        assert names(folder) == ["a.json", "b.json", "c.txt"]


class TestCleaning:
    def test_only_what_is_left_and_only_ours(self, tmp_path):
        left = tmp_path / ".selab-0123456789abcdef.tmp"
        kept = [".selab-0123456789abcdef.tmp.json", ".selab-0123.tmp", ".hidden.tmp", "selab-0123456789abcdef.tmp"]
        for each in [left, *(tmp_path / name for name in kept)]:
            each.write_bytes(b"x")
        (tmp_path / ".selab-aaaaaaaaaaaaaaaa.tmp").symlink_to("outside")
        (tmp_path / ".selab-bbbbbbbbbbbbbbbb.tmp").mkdir()
        clean(tmp_path)
        assert names(tmp_path) == sorted([*kept, ".selab-aaaaaaaaaaaaaaaa.tmp", ".selab-bbbbbbbbbbbbbbbb.tmp"])

    def test_a_file_that_is_being_written_stays(self, tmp_path):
        path, file, locked = files._temporary(tmp_path, 0o600)
        assert locked
        clean(tmp_path)
        assert path.exists()
        os.close(file)
        files._cleaned.clear()
        clean(tmp_path)
        assert not path.exists()

    def test_without_locks_only_old_files_go(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_lock", lambda _file: False)
        young, old = tmp_path / ".selab-0000000000000000.tmp", tmp_path / ".selab-1111111111111111.tmp"
        for each in (young, old):
            each.write_bytes(b"x")
        os.utime(old, (1e9, 1e9))
        clean(tmp_path)
        assert names(tmp_path) == [young.name]


class TestReading:
    def test_hidden_names_are_no_records(self, tmp_path):
        for name in ("b.json", "a.json", ".b.json.x1.json", ".json", "c.txt"):
            (tmp_path / name).write_bytes(b"{}")
        assert [path.name for path in files_ending(tmp_path, ".json")] == ["a.json", "b.json"]
        assert files_ending(tmp_path / "none", ".json") == []
        assert files_ending(tmp_path / "c.txt", ".json") == []

    def test_a_folder_that_cannot_be_read_is_not_an_empty_one(self, tmp_path, monkeypatch):
        def refuse(_folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(files.os, "scandir", refuse)
        with pytest.raises(RecordError, match="cannot be read: Permission denied"):
            files_ending(tmp_path, ".json")

    def test_what_may_never_end_is_refused_at_once(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("pipe")
        for path, kind in (("/dev/zero", "a device"), (tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a pipe")):
            with pytest.raises(RecordError, match=f"{path}: cannot be read: is {kind}; name a regular file"):
                read_bytes(files.Path(path), most=1000)
        with pytest.raises(RecordError, match="cannot be read: Is a directory"):
            read_bytes(tmp_path)

    @pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
    def test_a_pipe_that_is_open_already_is_read_to_its_end(self, folder):
        if not files.Path(folder).exists():
            pytest.skip(f"this system has no {folder}")
        content = b"x" * 200_000  # more than a pipe holds
        with subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdout.write('x' * 200_000)"], stdout=subprocess.PIPE
        ) as process:
            path = files.Path(f"{folder}/{process.stdout.fileno()}")
            assert read_bytes(path) == content

    def test_a_pipe_that_takes_a_file_s_place(self, tmp_path, monkeypatch):
        os.mkfifo(tmp_path / "pipe")
        monkeypatch.setattr(files, "check_regular", lambda _path: None)
        with pytest.raises(RecordError, match="cannot be read: is a pipe"):
            read_bytes(tmp_path / "pipe")

    def test_sizes(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 1000)
        with pytest.raises(RecordError, match="cannot be read: larger than 999 bytes"):
            read_bytes(tmp_path / "file", most=999)
        assert read_bytes(tmp_path / "file", most=1000) == b"x" * 1000

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("", "Is a directory"), ("none", "No such file"), ("nul\0", "null byte"), ("n" * 256, "File name too long")],
    )
    def test_what_cannot_be_read(self, tmp_path, name, reason):
        with pytest.raises(RecordError, match=f"cannot be read: .*{reason}") as caught:
            read_text(tmp_path / name)
        assert "\0" not in str(caught.value)

    def test_text(self, tmp_path):
        (tmp_path / "file").write_bytes("a\r\nb\rc\nü".encode())
        assert read_text(tmp_path / "file") == "a\nb\nc\nü"
        (tmp_path / "file").write_bytes(b"\xff")
        with pytest.raises(RecordError, match="not UTF-8 text"):
            read_text(tmp_path / "file")
