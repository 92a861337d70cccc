"""The files of a data set: where they lie, whether they are the published bytes, and what they hold.

Data sets lie under one root in their publishers' layouts, as torchvision keeps them too, gzipped or not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from dltrain.data.download import CHUNK, File, Report, fetch, fetch_members
from dltrain.errors import DataError
from dltrain.registry import Entry

REMEMBERED = ".dltrain-verified.json"  # under the root: digests of the files read so far
HEADER = 16  # bytes given to the `size` argument of `Source.read`
LARGEST = 1 << 30  # bytes: the most that a file may expand to, or have where its header does not say how many
Size = Callable[[bytes], int]
NEEDS_NO_DOWNLOAD = "configs/digits_mlp.yaml and configs/digits_cnn.yaml need no download"


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is published: the files that it needs in one folder under the root.

    folder: "" is the root itself
    """

    folder: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Published:
    """What is known of a data set without reading it; registered as the fact `published`.

    train, test: numbers of images
    layouts: any one of these is the data set; the first is what is downloaded; none: it needs no files
    download: bytes to download
    mirrors: URLs of folders that hold the archive, or each file of the first layout
    archive: the tar.gz of the first layout, where it is not served file by file
    gunzip: the mirrors hold each file as NAME.gz, which is stored uncompressed
    """

    title: str
    train: int
    test: int
    layouts: tuple[Layout, ...] = ()
    download: int = 0
    mirrors: tuple[str, ...] = ()
    archive: File | None = None
    gunzip: bool = True


class State(StrEnum):
    EMBEDDED = "embedded"
    OWN = "your own"
    PRESENT = "present"
    INCOMPLETE = "incomplete"
    ABSENT = "absent"


class Presence(NamedTuple):
    """Whether a data set is there, and the folder where it is or belongs (None where it needs no files)."""

    state: State
    folder: Path | None


def data_root(root: str | None = None) -> Path:
    """Where data sets lie: `root` (`data.root` of the config), else $DLTRAIN_DATA, else the user's cache folder."""
    given = root or os.environ.get("DLTRAIN_DATA")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("dltrain") / "data"


def state(entry: Entry, root: Path) -> Presence:
    """Whether the files of a registered data set are under `root`, from their names alone."""
    published: Published | None = entry.facts.get("published")
    if published is None:
        return Presence(State.OWN, None)
    if not published.layouts:
        return Presence(State.EMBEDDED, None)
    some = None
    for layout in published.layouts:
        missing = _missing(root, layout)
        if not missing:
            return Presence(State.PRESENT, root / layout.folder)
        if len(missing) < len(layout.files):
            some = some or layout
    if some:
        return Presence(State.INCOMPLETE, root / some.folder)
    return Presence(State.ABSENT, root / published.layouts[0].folder)


def _silent(note: str) -> None:
    pass


@dataclass(frozen=True)
class Files:
    """Where a data set finds its files, and on what terms.

    root: the data root
    verify: refuse files whose bytes are not the published ones
    download: fetch what is missing
    report: called with a line of text for each note and now and then while downloading
    recheck: read and hash files even where they are remembered as unchanged
    """

    root: Path
    verify: bool = True
    download: bool = True
    report: Report = field(default=_silent)
    recheck: bool = False

    def open(self, published: Published) -> Source:
        """The files of a data set, downloaded where they are missing.

        Raises DataError where they are missing and cannot be had, OutputError where a download cannot be stored.
        """
        found = [layout for layout in published.layouts if not _missing(self.root, layout)]
        if not found:
            self._fetch(published)
        return Source(self, published, found[0] if found else published.layouts[0])

    def _fetch(self, published: Published) -> None:
        layout = published.layouts[0]
        try:
            if not self.download:
                raise DataError("downloads are switched off")
            if published.archive:
                urls = [mirror + published.archive.name for mirror in published.mirrors]
                fetch_members(urls, self.root, published.archive, layout.folder, layout.files, report=self.report)
            else:
                for file in _missing(self.root, layout):
                    served = f"{file.name}.gz" if published.gunzip else file.name
                    urls = [mirror + served for mirror in published.mirrors]
                    fetch(urls, self.root / layout.folder, file, gunzip=published.gunzip, report=self.report)
        except DataError as error:
            names = ", ".join(file.name for file in _missing(self.root, layout))
            by_hand = ", gzipped or not" if published.gunzip else ""
            if published.archive:
                by_hand = f", or {published.archive.name} in {self.root}"
            raise DataError(
                f"{published.title}: {names} not found in {self.root / layout.folder}: {error}; put the files there"
                f"{by_hand}, or name another folder as data.root or $DLTRAIN_DATA; {NEEDS_NO_DOWNLOAD}"
            ) from None

    @contextlib.contextmanager
    def own(self, name: str) -> Iterator[tuple[IO[bytes], str]]:
        """A file of the user's own, open for reading, and "sha256:…" of its bytes.

        name: its path, absolute or under the root

        Raises DataError where it cannot be read.
        """
        path = self.root / os.path.expanduser(name)  # noqa: PTH111  # Path's raises where it finds no home
        with _reading(path) as opened:
            digest = self.digest(name, os.fstat(opened.fileno()), lambda: _hash(opened))
            opened.seek(0)
            yield opened, f"sha256:{digest}"

    def digest(
        self, key: str, status: os.stat_result | None, hashed: Callable[[], str], expected: str | None = None
    ) -> str:
        """SHA-256 of a file: what is remembered of one that has not changed, else what `hashed` returns.

        key: what it is remembered by; status: what it was like before it was hashed, None where it has changed since
        expected: another digest than this is never taken from memory
        """
        found = None if self.recheck or status is None else _recall(self.root, key, status)
        if found is None or expected not in (None, found):  # nothing is refused from memory
            found = hashed()
            if status is not None:
                _remember(self.root, key, status, found)
        return found


class Source:
    """The files of one data set in the layout that was found.

    sha256: name under the root -> "sha256:…" of the uncompressed bytes, for each file read so far
    verified: every file read so far has the published checksum
    """

    def __init__(self, files: Files, published: Published, layout: Layout) -> None:
        self.layout = layout
        self.sha256: dict[str, str] = {}
        self.verified = True
        self._files = files
        self._title = published.title

    def path(self, name: str) -> Path:
        """Where the file lies; uncompressed, where it lies there both ways, as that is faster to read."""
        plain = self._files.root / self.layout.folder / name
        return plain if plain.is_file() else _gzipped(plain)

    def read(self, name: str, size: Size | None = None) -> bytearray:
        """The whole file, uncompressed.

        size: given the first 16 bytes, how many the whole file must have; it may raise DataError

        Raises DataError where the file cannot be read, has another size, expands to more than it should, or is not
        the published one and must be.
        """
        file = self._file(name)
        path = self.path(name)
        published = self._files.verify and file.sha256 is not None
        with _reading(path) as opened:
            status = os.fstat(opened.fileno())
            if path.suffix == ".gz":
                content = expand(path, gzip.GzipFile(fileobj=opened), size, file.limit if published else LARGEST)
            else:
                content = _load(path, opened, status.st_size, size)
            unchanged = _version(os.fstat(opened.fileno())) == _version(status)
        self._check(file, path, status if unchanged else None, lambda: hashlib.sha256(content).hexdigest())
        return content

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """The file as it lies, for what is too large to load: verified first, a mebibyte at a time.

        Raises DataError as `read` does, also for what goes wrong while it is open.
        """
        path = self.path(name)
        with _reading(path) as opened:
            if self._key(name) not in self.sha256:
                self._check(self._file(name), path, os.fstat(opened.fileno()), lambda: _hash(opened))
                opened.seek(0)
            yield opened

    def _file(self, name: str) -> File:
        return next(file for file in self.layout.files if file.name == name)

    def _key(self, name: str) -> str:
        return str(PurePosixPath(self.layout.folder, name))

    def _check(self, file: File, path: Path, status: os.stat_result | None, hashed: Callable[[], str]) -> None:
        expected = file.sha256 if self._files.verify else None
        digest = self._files.digest(self._key(path.name), status, hashed, expected)
        self.sha256[self._key(file.name)] = f"sha256:{digest}"
        if digest == file.sha256:
            return
        if file.sha256 is None:
            note = "has no published checksum: its structure is checked, not its contents"
        elif self._files.verify:
            raise DataError(
                f"{path}: not the published file: expected SHA-256 {file.sha256}, found {digest}; "
                "delete it to download it again; data.verify: false accepts another copy"
            )
        else:
            note = "not the published file, accepted because data.verify is false"
        if self.verified:  # once for the data set is enough
            self._files.report(f"{self._title}: {path}: {note}")
        self.verified = False


def _gzipped(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _missing(root: Path, layout: Layout) -> Sequence[File]:
    paths = {file: root / layout.folder / file.name for file in layout.files}
    return [file for file, path in paths.items() if not (path.is_file() or _gzipped(path).is_file())]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    """The open file; what goes wrong with it while it is open becomes a DataError."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            raise DataError(f"{path}: not a file")
        with path.open("rb") as opened:
            yield opened
    except MemoryError:
        raise DataError(f"{path}: {path.stat().st_size} bytes do not fit in memory") from None
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises too
        raise DataError(f"{path}: cannot be read: {error}") from None


def _hash(opened: IO[bytes]) -> str:
    return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]  # every binary file will do


def _load(path: Path, opened: IO[bytes], found: int, size: Size | None) -> bytearray:
    expected = None if size is None else size(opened.read(HEADER))
    if expected not in (None, found):
        raise DataError(f"{path}: expected {expected} bytes, as its header has it, found {found}")
    if expected is None and found > LARGEST:
        raise DataError(f"{path}: expected at most {LARGEST} bytes, found {found}")
    content = bytearray(found)
    opened.seek(0)
    if opened.readinto(content) != found:  # type: ignore[attr-defined]  # every binary file has readinto
        raise DataError(f"{path}: expected {found} bytes; it was cut short while it was read")
    return content


def expand(where: object, stream: gzip.GzipFile, size: Size | None = None, limit: int = LARGEST) -> bytearray:
    """The whole of a gzip stream, of which no more is inflated than one byte over what it may hold.

    where: what an error calls it
    size: given the first 16 bytes, how many the whole must have; it may raise DataError
    limit: bytes that it may hold

    Raises DataError where it holds fewer or more; gzip's own errors where it is broken.
    """
    content = bytearray(stream.read(HEADER))
    expected = None if size is None else size(bytes(content))
    if expected is not None:
        limit = min(limit, expected)
    while len(content) <= limit and (chunk := stream.read(min(CHUNK, limit + 1 - len(content)))):
        content += chunk
    if len(content) > limit:
        raise DataError(f"{where}: expected at most {limit} bytes uncompressed, found more")
    if expected is not None and len(content) < expected:
        raise DataError(f"{where}: expected {expected} bytes uncompressed, as its header has it, found {len(content)}")
    return content


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _recall(root: Path, key: str, status: os.stat_result) -> str | None:
    """The digest of a file that has not changed since it was hashed, by its size and time."""
    entry = _remembered(root).get(key)
    if not isinstance(entry, dict) or (entry.get("size"), entry.get("mtime_ns")) != _version(status):
        return None
    digest = str(entry.get("sha256"))
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def _remembered(root: Path) -> dict[str, Any]:
    try:
        read = json.loads((root / REMEMBERED).read_bytes())
    except (OSError, ValueError, RecursionError):  # absent or broken: the files are hashed again
        return {}
    return read if isinstance(read, dict) else {}


def _remember(root: Path, key: str, status: os.stat_result, digest: str) -> None:
    size, time = _version(status)
    entries = _remembered(root) | {key: {"size": size, "mtime_ns": time, "sha256": digest}}
    part = root / f"{REMEMBERED}.{os.getpid()}"
    try:
        try:
            part.write_text(json.dumps(entries, indent=1))
            part.replace(root / REMEMBERED)
        finally:
            part.unlink(missing_ok=True)
    except OSError:  # a root that is not writable: the files are hashed again next time
        return
