"""Download a published archive: resumable, checked against its checksum, unpacked whole or not at all.

Archives are not trusted: only expected members are written, as files of the expected size.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from selab.errors import SelabError

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
# Members of unknown size are short texts.
_MOST_UNKNOWN = 1 << 20


class DownloadError(SelabError):
    """A file cannot be downloaded, or is not the published one; the message names the address or the file."""


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        file: name of the file.
        done_bytes: downloaded so far, with what an earlier attempt left.
        total_bytes: size of the file; None if the server does not say.
    """

    file: str
    done_bytes: int
    total_bytes: int | None


def fetch(url: str, path: Path, *, md5: str, progress: Callable[[DownloadProgress], object] | None = None) -> None:
    """Download to `path.part` and rename it once its checksum matches.

    An earlier call's part is continued, if the server supports HTTP Range; if the checksum then fails, the file is
    downloaded again, once. A broken connection is retried as long as each attempt receives something.

    Args:
        url: where it is published.
        path: the file to write, whole or not at all.
        md5: the published checksum, hexadecimal.
        progress: called as bytes arrive.

    Raises:
        DownloadError: the server cannot be reached, answers with an error, breaks off, or has another file; the file
            cannot be written.
    """
    part = path.with_name(path.name + ".part")
    fresh = not _size(part)
    while True:
        had = _size(part)
        try:
            _transfer(url, part, file=path.name, progress=progress)
        except _BrokenOffError as error:
            if _size(part) > had:
                continue
            kept = f"; {had:,} bytes of it are kept" if had else ""
            raise DownloadError(f"{url}: cannot be fetched ({error}){kept}") from None
        try:
            if digest(part) == md5:
                part.replace(path)
                return
            part.unlink()
        except OSError as error:
            raise DownloadError(f"{part}: cannot be written: {error.strerror}; choose a writable folder") from None
        if fresh:
            raise DownloadError(f"{url}: is not the published file: its MD5 is not {md5}")
        fresh = True


def digest(path: Path) -> str:
    """A file's MD5, hexadecimal: against damage, as it is what was published; it does not keep out a forger.

    Raises:
        DownloadError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DownloadError(f"{path}: cannot be read: {error.strerror}; put the published file there") from None


def unpack(archive: Path, folder: Path, *, members: Mapping[str, int | None]) -> None:
    """Writes the expected members of a .tar.gz below a folder, each with its size; passes over other files.

    Args:
        archive: the .tar.gz.
        folder: exists; see `whole_folder`.
        members: path in the archive → its bytes, or None for a text of any length up to 1 MiB.

    Raises:
        DownloadError: the archive is broken, lacks a member or has it in another size, or holds what no data set does:
            a link, a device, a path out of the folder.
    """
    missing = set(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                tarfile.data_filter(member, str(folder))  # refuses paths out of the folder, and devices
                if not (member.isreg() or member.isdir()):
                    raise DownloadError(f"{archive}: is refused: {member.name} in it is a link; get the archive again")
                name = str(PurePosixPath(member.name))
                if member.isdir() or name not in members:
                    continue
                expected = members[name]
                if member.size != expected and (expected is not None or member.size > _MOST_UNKNOWN):
                    raise DownloadError(
                        f"{archive}: is refused: {name} in it has {member.size:,} bytes, expected "
                        f"{expected or 'at most ' + format(_MOST_UNKNOWN, ',')}; get the archive again"
                    )
                tar.extract(member, folder, filter="data")
                missing.discard(name)
    except tarfile.FilterError as error:
        raise DownloadError(f"{archive}: is refused: {error}; get the archive again") from None
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DownloadError(f"{archive}: is broken or no .tar.gz ({error}); get it again") from None
    except OSError as error:
        raise DownloadError(f"{archive}: cannot be unpacked into {folder}: {error.strerror or error}") from None
    if missing:
        raise DownloadError(f"{archive}: lacks {', '.join(sorted(missing))}; get the archive again")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; at the end its subfolder of the same name becomes `folder`, whole or not at all.

    Raises:
        DownloadError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be written: {error.strerror}; choose a writable folder") from None
    try:
        yield temporary
        try:
            (temporary / folder.name).replace(folder)
        except OSError as error:
            raise DownloadError(f"{folder}: cannot be written: {error.strerror}; move it away") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Run the body while no other process does so for this folder, where the system has `flock`.

    Raises:
        DownloadError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".selab.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be written: {error.strerror}; choose a writable folder") from None
    try:
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise DownloadError(f"{folder}: cannot be locked: {error.strerror}; name a local folder") from None
        yield
    finally:
        os.close(lock)


# ------------------------------------------------------------------------------------------------------------ transfer
class _BrokenOffError(Exception):
    """The connection failed or ended early; the message is the reason."""


def _transfer(url: str, part: Path, *, file: str, progress: Callable[[DownloadProgress], object] | None) -> None:
    """Send one request; return once the server has nothing more to send."""
    had = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and had:
            return  # nothing is left: the checksum decides whether it is complete
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _BrokenOffError(_reason(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_reason(error)) from None
    with response:
        done = had if _continues(response, had) else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None and length.isdecimal() else None
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab" if done else "wb") as target:
                for chunk in _chunks(response):
                    target.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(DownloadProgress(file=file, done_bytes=done, total_bytes=total))
        except OSError as error:
            raise DownloadError(f"{part}: cannot be written: {error.strerror}; choose a writable folder") from None
    if total is not None and done < total:
        raise _BrokenOffError(f"after {done:,} of {total:,} bytes")


def _continues(response: http.client.HTTPResponse, had: int) -> bool:
    """Return whether a response continues after `had` bytes; a server without Range sends the whole file again."""
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {had}-")
    return response.status == http.HTTPStatus.PARTIAL_CONTENT and begins


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenOffError(_reason(error)) from None
        if not chunk:
            return
        yield chunk


def _reason(error: object) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(told).partition("\n")[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
