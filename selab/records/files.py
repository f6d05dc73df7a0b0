"""Files on disk: the one writer of everything that selab writes, and readers with a bound on what they take in.

A regular file is replaced as a whole: its content is written to a temporary file in the same folder, forced to the disk
and renamed. A symbolic link stays a link, and its target is replaced. A terminal, a pipe or another character device is
written to as it is. Everything else is refused.
"""

import errno
import os
import re
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from selab.errors import RecordError

MOST_BYTES = 1 << 30
"""The largest file that is read into memory as text: 1 GiB."""

# The name does not depend on the target's, which may be as long as a file system allows; no reader takes it.
_TEMPORARY = re.compile(r"\.selab-[0-9a-f]{16}\.tmp")
_INHERITED = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
# Where the file system has no locks, a temporary file of this age is taken for a left one.
_OLD_S = 24 * 3600.0
_CHUNK = 1 << 20
_STREAMS = (1, 2)
# Folders that this process has cleaned.
_cleaned: set[str] = set()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file: a reader sees the old content or the new one, and the new one is on the disk on return.

    A new file gets the permissions that the umask leaves, an existing file keeps its own. Folders that are missing are
    made. What an earlier process left in the folder when it was killed is removed.

    Args:
        path: a regular file, a link to one, or a new name. A character device or a pipe is written to as it is.
        content: the whole file.

    Raises:
        RecordError: the file cannot be written, or its disk is full; a regular file is as it was.
    """
    try:
        status = _status(path)
        if status is not None and not stat.S_ISREG(status.st_mode):
            _check_kind(path, status)
            _write_through(path, content)
        elif status is not None and (stream := _stream_of(status)) is not None:
            _write_stream(stream, content)
        else:
            _replace(Path(os.path.realpath(path)), status, content)
    except (OSError, ValueError) as error:
        raise RecordError(f"{shown(path)}: cannot be written: {_reason(error)}; the file is as it was") from None


def check_writable(path: Path, *, replace: bool) -> None:
    """Check beforehand that a file can be written; create nothing.

    Raises:
        RecordError: it exists and may not be replaced, it is no file, or its folder cannot be written.
    """
    try:
        status = _status(path)
        if status is not None:
            _check_kind(path, status)
            if not stat.S_ISREG(status.st_mode) or _stream_of(status) is not None:
                return
            if not replace:
                raise RecordError(
                    f"{shown(path)}: exists; use --replace to overwrite it, or name another place with --out"
                )
            if not os.access(path, os.W_OK):
                raise RecordError(f"{shown(path)}: is read-only; make it writable, or name another file")
        target = Path(os.path.realpath(path))
        # A folder that is missing is made, so its name is tried as well.
        existing = next(parent for parent in target.parents if _status(parent) is not None)
    except (OSError, ValueError) as error:
        raise RecordError(f"{shown(path)}: cannot be written: {_reason(error)}; name another file") from None
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecordError(
            f"{shown(path.parent)}: cannot be written: {_reason(error)}; choose a writable folder"
        ) from None


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file; pipes and devices, which may never end, are refused at once.

    A pipe that this process has open already is read to its end: `/dev/stdin`, and what a shell's `<(command)` gives.

    Args:
        path: of the file.
        most: bytes.

    Raises:
        RecordError: it cannot be read, is no regular file, or is larger.
    """
    check_regular(path)
    try:
        inherited = _is_inherited(path)
        # A pipe that has taken the file's place meanwhile must not let the program wait for a writer.
        waiting = 0 if inherited else getattr(os, "O_NONBLOCK", 0)
        file = os.open(path, os.O_RDONLY | waiting | getattr(os, "O_CLOEXEC", 0))
        try:
            if stat.S_ISFIFO(os.fstat(file).st_mode) and not inherited:
                raise OSError(errno.ESPIPE, "is a pipe")
            parts, size = [], 0
            while size <= most and (part := os.read(file, min(_CHUNK, most + 1 - size))):
                parts.append(part)
                size += len(part)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise RecordError(f"{shown(path)}: cannot be read: {_reason(error)}") from None
    if size > most:
        raise RecordError(f"{shown(path)}: cannot be read: larger than {most:,} bytes")
    return b"".join(parts)


def _is_inherited(path: Path) -> bool:
    """Return True for the name of a file that this process has open: a pipe of that name has or had its writer."""
    return _INHERITED.fullmatch(str(path)) is not None


def check_regular(path: Path) -> None:
    """Refuse to read what is there but no regular file; opening a device or a pipe may wait for ever.

    Raises:
        RecordError: it is a folder, a pipe, a device or a socket; a file that does not exist is not looked at.
    """
    try:
        status = _status(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{shown(path)}: cannot be read: {_reason(error)}") from None
    if status is None or stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISFIFO(status.st_mode) and _is_inherited(path):
        return
    if stat.S_ISDIR(status.st_mode):
        raise RecordError(f"{shown(path)}: cannot be read: {os.strerror(errno.EISDIR)}")
    raise RecordError(f"{shown(path)}: cannot be read: is {_kind(status.st_mode)}; name a regular file")


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """Return a text file's content, with a line feed at the end of every line.

    Raises:
        RecordError: it cannot be read, is larger than `most` bytes, or is not UTF-8.
    """
    try:
        text = read_bytes(path, most=most).decode("utf-8")
    except UnicodeDecodeError:
        raise RecordError(f"{shown(path)}: cannot be read: not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def files_ending(folder: Path, ending: str) -> list[Path]:
    """Return the files of a folder whose names have this ending, in the order of their names; hidden ones are not read.

    Raises:
        RecordError: the folder cannot be read; a folder that does not exist is empty.
    """
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RecordError(f"{shown(folder)}: cannot be read: {_reason(error)}") from None
    return [folder / name for name in sorted(names) if name.endswith(ending) and not name.startswith(".")]


def shown(path: Path | str) -> str:
    """Return a path as a message shows it: one line, and not longer than a line can be."""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(path))
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}"


_SHOWN = 120


# ------------------------------------------------------------------------------------------------------- kinds of file
def _status(path: Path) -> os.stat_result | None:
    """Return the status of a file behind all links; None where nothing is there."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_kind(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise RecordError(f"{shown(path)}: is a folder; name a file in it")
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise RecordError(f"{shown(path)}: is {_kind(mode)}; name a file")


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISCHR(mode):
        return "a device"
    return "a block device" if stat.S_ISBLK(mode) else "a socket" if stat.S_ISSOCK(mode) else "not a file"


def _stream_of(status: os.stat_result) -> int | None:
    """Return the descriptor of standard output or error if a file is open there; replacing it would lose the rest."""
    for stream in _STREAMS:
        with suppress(OSError):
            if os.path.samestat(os.fstat(stream), status):
                return stream
    return None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "its name has a null byte" if "null" in str(error) else "its name is not valid"


# -------------------------------------------------------------------------------------------------------------- writing
def _write_through(path: Path, content: bytes) -> None:
    """Write to a device or pipe. A pipe that nobody reads is an error, where a plain open would wait for ever."""
    try:
        file = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "no program reads from it") from None
        raise
    try:
        os.set_blocking(file, True)
        _write_all(file, content)
    finally:
        os.close(file)


def _write_stream(stream: int, content: bytes) -> None:
    for one in (sys.stdout, sys.stderr):
        # What was printed before stands before it.
        if one is not None:
            one.flush()
    _write_all(stream, content)


def _write_all(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left[:_CHUNK]) :]


def _replace(target: Path, old: os.stat_result | None, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target.parent)
    temporary, file, locked = _temporary(target.parent, 0o666 if old is None else 0o600)
    # The lock lasts as long as one of the two descriptors, so that the first can be closed, which may fail.
    held = os.dup(file) if locked else None
    try:
        try:
            _write_all(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        if old is not None:
            with suppress(OSError, AttributeError):
                os.chown(temporary, old.st_uid, old.st_gid)
            temporary.chmod(stat.S_IMODE(old.st_mode) & 0o777)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        if held is not None:
            os.close(held)
    _sync_folder(target.parent)


def _temporary(folder: Path, mode: int) -> tuple[Path, int, bool]:
    """Create a temporary file in a folder, and lock it, which tells it from those that a killed process left.

    Returns:
        Its path, its descriptor, and whether it is locked.
    """
    while True:
        path = folder / f".selab-{secrets.token_hex(8)}.tmp"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)
        try:
            locked = _lock(file)
            # Another process may have taken it for a left one before it was locked.
            if path.exists():
                return path, file, locked
        except BlockingIOError:
            pass
        os.close(file)


def _lock(file: int) -> bool:
    """Lock a file without waiting; return whether the system has such locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system can."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def clean(folder: Path) -> None:
    """Remove what processes left in a folder when they were killed while they wrote; once for each folder.

    Only regular files with a name as `write_atomically` gives it are removed, and none that a process still writes.
    """
    if str(folder) in _cleaned:
        return
    _cleaned.add(str(folder))
    with suppress(OSError), os.scandir(folder) as entries:
        for each in entries:
            if _TEMPORARY.fullmatch(each.name) and each.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_left(Path(each.path))


def _remove_left(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not _lock(file):
            # The clock is the file system's, as the age of the file is.
            with tempfile.TemporaryFile(dir=path.parent) as now:
                if os.fstat(now.fileno()).st_mtime - os.fstat(file).st_mtime < _OLD_S:
                    return
        path.unlink()
    finally:
        os.close(file)
