"""Downloads: https only, several mirrors in turn, verified, and under their name only when whole.

Everything arrives under a temporary name beside its destination, is compared with its checksum, flushed to the disk and
then renamed.  A lock beside the destination lets several processes that want the same file fetch it once.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import socket
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import dltrain
from dltrain.data.lock import alone
from dltrain.errors import DataError, OutputError

TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 20  # bytes
SLOWEST = 1024  # bytes per second, averaged over the time-out: slower is a stall
REPORT_EVERY = 5.0  # seconds

Report = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """A file of a data set, or an archive of such files.

    limit: the published file is not longer, in bytes (uncompressed)
    sha256: of its bytes (uncompressed); None where nobody publishes it
    """

    name: str
    limit: int
    sha256: str | None = None


class _Failed(Exception):
    """One mirror did not give the file; the text says why."""


def fetch(
    urls: Sequence[str],
    folder: Path,
    file: File,
    *,
    gunzip: bool = False,
    timeout: float = TIMEOUT,
    report: Report,
) -> None:
    """Downloads `file` into `folder` from the first mirror that has it, unless it is there already.

    urls: where it is, best first; only https is used, also after redirects
    gunzip: what is served is gzipped: it is stored, limited and verified uncompressed
    timeout: seconds without an answer, or with less than a trickle of data, until the next mirror is tried

    Raises DataError with each mirror and why it failed; OutputError where the folder cannot be written.
    """
    destination = folder / file.name
    with _alone(destination, report):
        if not destination.is_file():
            _fetch(urls, destination, file, gunzip, timeout, report)


def fetch_members(
    urls: Sequence[str],
    root: Path,
    archive: File,
    folder: str,
    files: Sequence[File],
    *,
    timeout: float = TIMEOUT,
    report: Report,
) -> None:
    """Downloads a tar.gz into `root` and takes from it those of `files` that are not under `root/folder` yet.

    The members are looked up as `folder/name` and written under our own names; nothing else in the archive is.  An
    archive that lies under `root` is used in place of a download, and stays; a downloaded one is removed.

    Raises DataError and OutputError as `fetch` does, and DataError where the archive does not hold what it should.
    """
    with _alone(root / archive.name, report):
        missing = {f"{folder}/{file.name}": file for file in files if not (root / folder / file.name).is_file()}
        if not missing:
            return
        downloaded = not (root / archive.name).is_file()
        if downloaded:
            _fetch(urls, root / archive.name, archive, False, timeout, report)
        _take_members(root, archive, missing, verified=downloaded)
        if downloaded:
            (root / archive.name).unlink()


def _alone(destination: Path, report: Report) -> AbstractContextManager[None]:
    """Makes the folder and holds the lock beside `destination`."""
    lock = destination.parent / f".{destination.name}.lock"
    return alone(lock, f"fetching {destination.name}", "cannot store a download there", report)


def _fetch(urls: Sequence[str], destination: Path, file: File, gunzip: bool, timeout: float, report: Report) -> None:
    failures = []
    for url in urls:
        report(f"downloading {file.name} from {url}")
        # what does not shrink takes a little more room gzipped
        body = _body(url, file.limit + CHUNK if gunzip else file.limit, timeout, report)
        try:
            _store(_inflate(body, file.limit) if gunzip else body, destination, file)
            return
        except _Failed as failure:
            report(f"{url}: {failure}")
            failures.append(f"{url}: {failure}")
        finally:
            body.close()
    raise DataError(f"{file.name} could not be downloaded: {'; '.join(failures) or 'it has no known source'}")


def _store(chunks: Iterable[bytes], destination: Path, file: File) -> None:
    """Writes a file whole and verified, or leaves nothing."""
    part = destination.with_name(destination.name + ".part")  # ours alone: the lock is held
    digest = hashlib.sha256()
    try:
        try:
            with part.open("wb") as out:
                for chunk in chunks:
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            found = digest.hexdigest()
            if file.sha256 not in (None, found):
                raise _Failed(f"wrong bytes: expected SHA-256 {file.sha256}, found {found}")
            part.replace(destination)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:  # of the disk: what goes wrong on the network arrives as _Failed
        raise OutputError(f"{destination}: cannot be written: {error.strerror or error}") from None


class _Steady(io.RawIOBase):
    """What a server sends, headers and all; raises _Failed where that is little, though some of it comes in time."""

    def __init__(self, raw: io.RawIOBase, timeout: float) -> None:
        self.raw = raw
        self.timeout = timeout
        self.received = 0
        self.began = time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        count: int | None = self.raw.readinto(buffer)
        self.received += count or 0
        seconds = time.monotonic() - self.began
        if seconds >= self.timeout:
            if self.received < SLOWEST * seconds:
                raise _Failed(f"less than {SLOWEST} bytes per second")
            self.received, self.began = 0, time.monotonic()
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **settings: Any) -> None:
        super().__init__(sock, *args, **settings)
        self.fp.close()
        self.fp = io.BufferedReader(_Steady(sock.makefile("rb", buffering=0), sock.gettimeout() or TIMEOUT))


class _Connection(http.client.HTTPSConnection):
    response_class = _Response


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != "https":
            fp.close()
            raise _Failed(f"redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _body(url: str, limit: int, timeout: float, report: Report) -> Generator[bytes, None, None]:
    """The bytes served at `url`; raises _Failed, also where they are more than `limit` or end early."""
    opener = urllib.request.OpenerDirector()  # no handler for http, ftp, file or data
    for handler in (
        urllib.request.ProxyHandler(),
        _Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _HttpsRedirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": f"dltrain/{dltrain.__version__}"})
    try:
        with opener.open(request, timeout=timeout) as response:
            announced: int | None = response.length
            if announced is not None and announced > limit:
                raise _Failed(f"{announced} bytes announced, expected at most {limit}")
            received = 0
            reported = time.monotonic()
            while chunk := response.read1(CHUNK):  # returns what has come, so that a trickle is seen
                received += len(chunk)
                if received > limit:
                    raise _Failed(f"more than {limit} bytes")
                yield chunk
                now = time.monotonic()
                if now - reported >= REPORT_EVERY:
                    reported = now
                    total = f" of {announced / 1e6:.1f}" if announced else ""
                    report(f"{url.rsplit('/', 1)[-1]}: {received / 1e6:.1f}{total} MB")
            if announced is not None and received != announced:
                raise _Failed(f"cut off: {received} of {announced} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Failed(_reason(error, timeout)) from None


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        cause: object = f"HTTP {error.code} {error.reason}"
    else:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer for {timeout:g} s"
    return " ".join(str(cause).split()) or type(cause).__name__


def _inflate(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """What the gzipped bytes hold; raises _Failed rather than inflate more than `limit` + 1 bytes."""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)  # + 16: a gzip header, and its CRC is checked
    size = 0
    for chunk in chunks:
        try:
            inflated = inflater.decompress(chunk, limit + 1 - size)
        except zlib.error as error:
            raise _Failed(f"not gzip: {error}") from None
        size += len(inflated)
        if size > limit:
            raise _Failed(f"expands to more than {limit} bytes")
        yield inflated
    if not inflater.eof:
        raise _Failed("cut off inside the gzip stream")


def _take_members(root: Path, archive: File, missing: dict[str, File], *, verified: bool) -> None:
    path = root / archive.name
    try:
        with path.open("rb") as opened:
            if not verified:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
                if found != archive.sha256:
                    raise _Failed(f"expected SHA-256 {archive.sha256}, found {found}; delete it to download it again")
                opened.seek(0)
            with tarfile.open(fileobj=opened, mode="r:gz") as tar:
                _store_members(tar, root, dict(missing))
    except _Failed as failure:
        raise DataError(f"{path}: {failure}") from None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable tar.gz: {error}") from None


def _store_members(tar: tarfile.TarFile, root: Path, missing: dict[str, File]) -> None:
    for member in tar:
        file = missing.pop(member.name, None)
        if file is None:
            continue
        if not member.isreg():
            raise _Failed(f"{member.name} is not a regular file")
        if member.size > file.limit:
            raise _Failed(f"{member.name} has {member.size} bytes, expected at most {file.limit}")
        destination = root / member.name
        try:
            destination.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{destination.parent}: cannot be made: {error.strerror or error}") from None
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        try:
            _store(_read(content), destination, file)
        except _Failed as failure:
            raise _Failed(f"{member.name}: {failure}") from None
        if not missing:
            return
    raise _Failed(f"does not hold {', '.join(missing)}")


def _read(content: IO[bytes]) -> Iterator[bytes]:
    try:
        while chunk := content.read(CHUNK):
            yield chunk
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise _Failed(str(error)) from None
