"""Decoded images, kept as bytes in the user's cache folder and mapped from there.

A file of the cache is the images, uint8 `[N, C, H, W]`, then a JSON index of the files that they come from, then a
footer: a mark with the format's version, the length of the index in bytes and its SHA-256.  It is named by the folder
and the settings, and by the names, sizes and times of the files, so what has changed is found under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from dltrain.data.download import Report
from dltrain.data.files import Files
from dltrain.data.listing import Listed
from dltrain.data.lock import alone
from dltrain.data.pictures import (
    Fit,
    Header,
    Shape,
    Unreadable,
    attempt,
    decode,
    fitted,
    in_parallel,
    read,
    read_header,
)
from dltrain.errors import DataError, OutputError
from dltrain.text import shown

if TYPE_CHECKING:
    import numpy as np

MARK = b"dltrain1"  # the last character is the version of the format
FOOTER = struct.Struct("<8sQ32s")
PART_IMAGES, PART_BYTES = 16, 1 << 24  # the most that a thread does at a time


@dataclass(frozen=True)
class Look:
    """How files become images of one shape; None: as the files have it."""

    size: tuple[int, int] | None  # height, width
    fit: Fit
    channels: Literal[1, 3] | None


class Row(NamedTuple):
    """What the index says of an image: its file as it was listed, and what was in it."""

    name: str
    size: int
    mtime_ns: int
    sha256: str
    height: int
    width: int
    gray: bool


@dataclass(frozen=True)
class Cache:
    """Images uint8 `[N, C, H, W]`, mapped from a file.

    columns: of each field of a Row, what it is for each image: 60,000 rows of their own would take long to make
    unreadable: the files that are not there, and why
    """

    images: np.ndarray[Any, Any]
    columns: dict[str, list[Any]]
    unreadable: dict[str, str]

    def known(self) -> dict[Listed, tuple[int, Row]]:
        """Each image's number and row, by its file."""
        rows = [Row(*row) for row in zip(*self.columns.values(), strict=True)]
        return {Listed(*row[:3]): (number, row) for number, row in enumerate(rows)}


def cached(where: Path, listed: Sequence[Listed], look: Look, apart: Any, files: Files) -> Cache:
    """The images of the files `listed` in the folder `where`, in that order; those that cannot be read are left out.

    They come from the cache, which is made or brought up to date where it must be: of what has not changed it keeps the
    images.  One process makes it; others that want the same wait.

    apart: what, besides the folder and the look, has a cache of its own; JSON-able

    Raises DataError where none can be read, ValueError where they differ in size and the look has none, OutputError
    where the cache cannot be written.
    """
    import platformdirs

    home = platformdirs.user_cache_path("dltrain") / "folders"
    settings = [look.size, look.fit, look.channels, apart]
    key = digest([MARK.decode(), settings, listed])[:32]
    place = digest([str(where), settings])[:16]
    path = home / f"{place}-{key}.images"

    def usable(found: Cache | None) -> bool:
        """Files that could not be read are tried again: their rights or their disk may be mended."""
        if found is None or files.recheck:
            return False
        shape = found.images.shape[1:]
        again = [attempt(lambda name: decode(read(where / name), shape), name) for name in found.unreadable]
        return all(isinstance(each, Unreadable) for each in again)

    # another place's: the folder was moved, or is a copy
    for other in (path, *home.glob(f"*-{key}.images")):
        if (found := _open(other)) and usable(found):
            return found
    waiting, cannot = "decoding the same folder", "the cache of decoded images cannot be kept there"
    with alone(home / f"{place}.lock", waiting, cannot, files.report):
        if (found := _open(path)) and usable(found):  # another process has made it meanwhile
            return found
        old = None
        if not files.recheck:
            old = next(filter(None, map(_open, home.glob(f"{place}-*.images"))), None)
        _store(path, home / f"{place}.part", where, listed, look, old, files.report)
        for other in home.glob(f"{place}-*.images"):
            if other != path:
                with contextlib.suppress(OSError):  # Windows refuses while another process has it mapped
                    other.unlink()
    made = _open(path)
    if made is None:
        raise OutputError(f"{path}: was written and cannot be read back")
    return made


def digest(value: Any) -> str:
    """SHA-256 of what is JSON-able."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _open(path: Path) -> Cache | None:
    """The cache in a file; None where it is not there, cut off, damaged or of another format."""
    import numpy as np

    try:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(-FOOTER.size, os.SEEK_END)
            mark, length, expected = FOOTER.unpack(opened.read(FOOTER.size))
            if mark != MARK or length > size - FOOTER.size:
                return None
            opened.seek(size - FOOTER.size - length)
            text = opened.read(length)
            if hashlib.sha256(text).digest() != expected:
                return None
            index = json.loads(text)
            columns = index["columns"]
            shape = (len(columns["name"]), *index["shape"])
            if prod(shape) + length + FOOTER.size != size:
                return None
            # copy on write: who writes into a split, as into one in memory, does not write into the file
            images = np.memmap(opened, dtype=np.uint8, mode="c", shape=shape)
    except OSError:
        return None
    return Cache(images, columns, index["unreadable"])


def _store(
    path: Path, part: Path, where: Path, listed: Sequence[Listed], look: Look, old: Cache | None, report: Report
) -> None:
    """Writes the cache whole under `path`, or leaves nothing; `part` is ours alone: the lock is held."""
    try:
        try:
            with part.open("wb") as out:
                _write(out, path, where, listed, look, old, report)
                out.flush()
                os.fsync(out.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:  # of the cache: what goes wrong with an image is Unreadable
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write(
    out: BinaryIO, path: Path, where: Path, listed: Sequence[Listed], look: Look, old: Cache | None, report: Report
) -> None:
    """Writes what `_open` reads, later under `path`: of the old cache what has not changed, else from the files."""
    known = old.known() if old else {}
    unreadable: dict[str, str] = {}
    headers = {each: Header(*row[4:]) for each, (_, row) in known.items()}
    new = [each for each in listed if each not in known]
    if new:
        report(f"{shown(where)}: decoding {len(new):,} image files once, to be kept in {shown(path.parent)}")
    found = in_parallel(lambda each: read_header(where / each.name), new, PART_IMAGES, "reading", report)
    for each, header in zip(new, found, strict=True):
        if isinstance(header, Unreadable):
            unreadable[each.name] = header.reason
        else:
            headers[each] = header
    readable = [each for each in listed if each in headers]
    if not readable:
        raise not_readable(where, unreadable)
    shape = _shape(where, {each.name: headers[each] for each in readable}, look)
    needed, free = len(readable) * prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{path}: needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free")

    def load(each: Listed) -> tuple[str, bytes]:
        if old and each in known and old.images.shape[1:] == shape:
            number, row = known[each]
            return row.sha256, old.images[number].tobytes()
        return _load(where / each.name, shape, look)

    rows = []
    loaded = in_parallel(load, readable, max(1, min(PART_IMAGES, PART_BYTES // prod(shape))), "decoding", report)
    for each, one in zip(readable, loaded, strict=True):
        if isinstance(one, Unreadable):
            unreadable[each.name] = one.reason
        else:
            sha256, content = one
            out.write(content)
            rows.append(Row(*each, sha256, *headers[each]))
    if not rows:
        raise not_readable(where, unreadable)
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    text = json.dumps({"shape": shape, "columns": columns, "unreadable": unreadable}).encode()
    out.write(text + FOOTER.pack(MARK, len(text), hashlib.sha256(text).digest()))


def _shape(where: Path, headers: Mapping[str, Header], look: Look) -> Shape:
    """(channels, height, width) of the images, from the headers of the files."""
    if look.size:
        height, width = look.size
    else:
        sizes: dict[tuple[int, int], str] = {}
        for name, header in headers.items():
            sizes.setdefault((header.height, header.width), name)
        if len(sizes) > 1:
            one, other = [f"{shown(name)} is {high}x{wide}" for (high, wide), name in list(sizes.items())[:2]]
            mend = "set size, in pixels (size: 32, or size: [height, width])"
            raise ValueError(f"{shown(where)}: images differ in size (height x width): {one}, {other}; {mend}")
        ((height, width),) = sizes
    gray = all(header.gray for header in headers.values())
    return look.channels or (1 if gray else 3), height, width


def _load(path: Path, shape: Shape, look: Look) -> tuple[str, bytes]:
    """SHA-256 of the file, and its image uint8 `[C, H, W]` as bytes."""
    content = read(path)
    image = decode(content, shape)
    _, height, width = shape
    if look.size is None and image.size != (width, height):
        raise ValueError(f"{image.height}x{image.width}, where its first bytes say {height}x{width}")
    return hashlib.sha256(content).hexdigest(), fitted(image, shape, look.fit).tobytes()


def not_readable(where: Path, reasons: Mapping[str, str]) -> DataError:
    """Names the first of the files in the folder `where`, and says why it cannot be read."""
    name, reason = next(iter(reasons.items()))
    others = f" (and {len(reasons) - 1:,} more files)" if len(reasons) > 1 else ""
    mend = "mend or remove it, or leave out what cannot be read by unreadable: skip"
    return DataError(f"{shown(where / name)}: not a readable image: {reason}{others}; {mend}")
