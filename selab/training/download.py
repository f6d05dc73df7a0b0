"""Download a published archive: resumable, checked against its checksum, unpacked whole or not at all.

Archives are not trusted: only expected members are written, as files of the expected size.
"""

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from selab.errors import RecordError, SelabError
from selab.records.files import check_regular

_CHUNK = 1 << 20
# Seconds for a connection, and for the next bytes of an answer.
_TIMEOUT_S = 30.0
# An answer must bring so many bytes in so many seconds.
_LEAST_BYTES, _PATIENCE_S = 1 << 16, 60.0
_MOST_REDIRECTS = 5
# Connections that break off after some bytes; each continues the one before.
_MOST_ATTEMPTS = 50
MOST_BYTES = 1 << 30
"""Size above which a file is not downloaded; the largest archive of a data set here has 170 MB."""
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


def fetch(
    url: str,
    path: Path,
    *,
    md5: str,
    progress: Callable[[DownloadProgress], object] | None = None,
    most_bytes: int = MOST_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Download to `path.part` and rename it once its checksum matches.

    An earlier call's part is continued, if the server supports HTTP Range; if the checksum then fails, the file is
    downloaded again, once. A broken connection is retried as long as each attempt receives something, 50 times at most.
    At most five redirects are followed, to http and https alone and never from https to http. A part that is a link, a
    pipe or another name of a file is not written to.

    Args:
        url: where it is published.
        path: the file to write, whole or not at all.
        md5: the published checksum, hexadecimal.
        progress: called as bytes arrive.
        most_bytes: a longer file is refused.
        clock: seconds since some moment.

    Raises:
        DownloadError: the server cannot be reached, answers with an error, breaks off, is too slow, redirects in
            circles or elsewhere, or has another file; the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    fresh, attempts = not _size(part), 0
    transfer = _Transfer(url, part, file=path.name, progress=progress, most_bytes=most_bytes, clock=clock)
    while True:
        had = _size(part)
        try:
            attempts += 1
            transfer.run()
        except _BrokenOffError as error:
            if _size(part) > had and attempts < _MOST_ATTEMPTS:
                continue
            had = _size(part)
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
        check_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except RecordError as error:
        raise DownloadError(f"{error}; put the published file there") from None
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
        lock = os.open(folder / ".selab.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, to http and https alone, and never from https to http.

    Args:
        url: the address that was asked for, for messages.
    """

    # The count below is smaller, and its message one line.
    max_repeats = max_redirections = 2 * _MOST_REDIRECTS

    def __init__(self, url: str) -> None:
        self._url, self._count = url, 0

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Check where a redirect leads before it is followed."""
        to = urllib.parse.urljoin(req.full_url, headers.get("Location") or headers.get("URI") or "")
        schemes = urllib.parse.urlsplit(req.full_url).scheme, urllib.parse.urlsplit(to).scheme
        self._count += 1
        problem = ""
        if self._count > _MOST_REDIRECTS:
            problem = f"redirects more than {_MOST_REDIRECTS} times"
        elif schemes[1] not in ("http", "https"):
            problem = f"redirects to an address of the kind {schemes[1][:20]!r}; only http and https are followed"
        elif schemes == ("https", "http"):
            problem = "redirects from https to http, where anybody could change the file"
        if problem:
            fp.close()
            raise DownloadError(f"{self._url}: {problem}; get the file in another way")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return what opens http and https addresses, and no files or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(url),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Bytes and time at the begin of a window in which an answer must bring enough."""

    bytes: int
    began: float


class _Transfer:
    """The transfer of one file; `run` sends one request, and returns once the server has nothing more to send."""

    def __init__(
        self,
        url: str,
        part: Path,
        *,
        file: str,
        progress: Callable[[DownloadProgress], object] | None,
        most_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._url, self._part, self._file = url, part, file
        self._progress, self._most_bytes, self._clock = progress, most_bytes, clock

    def run(self) -> None:
        had = _size(self._part)
        try:
            request = urllib.request.Request(self._url, headers={"Range": f"bytes={had}-"} if had else {})
            response = _opener(self._url).open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and had:
                return  # nothing is left: the checksum decides whether it is complete
            reason = str(error.reason).partition("\n")[0]
            raise DownloadError(f"{self._url}: the server answers {error.code} {reason}") from None
        except urllib.error.URLError as error:
            raise _BrokenOffError(_reason(error.reason)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _BrokenOffError(_reason(error)) from None
        with response:
            done = had if _continues(response, had) else 0
            length = response.headers.get("Content-Length")
            total = done + int(length) if length is not None and length.isdecimal() and len(length) < 20 else None
            if (total or 0) > self._most_bytes:
                raise self._too_long(f"{total:,} bytes")
            try:
                self._part.parent.mkdir(parents=True, exist_ok=True)
                with _opened(self._part, fresh=not done) as target:
                    done = self._receive(response, target, done, total)
            except OSError as error:
                raise DownloadError(
                    f"{self._part}: cannot be written: {error.strerror}; choose a writable folder"
                ) from None
        if total is not None and done < total:
            raise _BrokenOffError(f"after {done:,} of {total:,} bytes")

    def _receive(self, response: http.client.HTTPResponse, target: BinaryIO, done: int, total: int | None) -> int:
        """Write what arrives; return how many bytes the file then has."""
        pace = _Pace(bytes=done, began=self._clock())
        for chunk in _chunks(response):
            if done + len(chunk) > self._most_bytes:
                self._part.unlink()
                raise self._too_long("no end")
            target.write(chunk)
            done += len(chunk)
            if self._progress is not None:
                self._progress(DownloadProgress(file=self._file, done_bytes=done, total_bytes=total))
            now = self._clock()
            if done - pace.bytes >= _LEAST_BYTES:
                pace = _Pace(bytes=done, began=now)
            elif now - pace.began > _PATIENCE_S:
                raise DownloadError(
                    f"{self._url}: sends less than {_LEAST_BYTES:,} bytes in {_PATIENCE_S:.0f} s; {done:,} bytes of it "
                    "are kept: try again later"
                )
        return done

    def _too_long(self, size: str) -> DownloadError:
        return DownloadError(
            f"{self._url}: is not the published file: it has {size}, allowed are {self._most_bytes:,} bytes"
        )


@contextmanager
def _opened(part: Path, *, fresh: bool) -> Iterator[BinaryIO]:
    """Open a part to append to, or a new one; what is not an ordinary file of one name is never opened or followed."""
    if fresh:
        part.unlink(missing_ok=True)
    flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= os.O_CREAT | os.O_EXCL if fresh else os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(part, flags, 0o666), "wb" if fresh else "ab") as file:
        _check_ordinary(part, os.fstat(file.fileno()))
        yield file


def _check_ordinary(part: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        kind = "another name of a file" if stat.S_ISREG(found.st_mode) else "a link, a folder or a device"
        raise DownloadError(f"{part}: is {kind}, not the part of a download; delete it")


def _continues(response: http.client.HTTPResponse, had: int) -> bool:
    """Return whether a response continues after `had` bytes; a server without Range sends the whole file again."""
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {had}-")
    return response.status == http.HTTPStatus.PARTIAL_CONTENT and begins


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            # What is there, without waiting for more: a server may be slow.
            chunk = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenOffError(_reason(error)) from None
        if not chunk:
            return
        yield chunk


def _reason(error: object) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(told).partition("\n")[0]


def _size(part: Path) -> int:
    """Return the bytes of a part; 0 if there is none.

    Raises:
        DownloadError: it is a link, a pipe or another name of a file: writing there would change something else.
    """
    try:
        found = part.lstat()
    except OSError:
        return 0
    _check_ordinary(part, found)
    return found.st_size
