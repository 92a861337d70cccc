"""Folders of images, one folder a class: decoded once, kept as bytes in the user's cache folder, mapped from there.

A file of the cache is the images, uint8 `[N, C, H, W]`, then a JSON index of the files that they come from, then a
footer: a mark with the format's version, the length of the index in bytes and its SHA-256.  It is named by the folder
and the settings, and by the names, sizes and times of the files, so what has changed is found under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NamedTuple, TypeVar

from pydantic import Field

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import REPORT_EVERY, Report
from dltrain.data.files import LARGEST, Files
from dltrain.errors import DataError, OutputError
from dltrain.lazy import torch
from dltrain.registry import PositiveInt, register

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Fit = Literal["crop", "pad", "stretch"]
Shape = tuple[int, int, int]  # channels, height, width

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # what a file may be, whatever its name says: Pillow reads far more
TEST_FOLDERS = ("test", "val", "valid")  # the first of them that lies beside train/ is the test split
MOST_PIXELS = (1 << 28) // 3  # of one image, as Pillow has it: 256 MiB of RGB
MARK = b"dltrain1"  # the last character is the version of the format
FOOTER = struct.Struct("<8sQ32s")
PART_IMAGES, PART_BYTES = 16, 1 << 24  # the most that a thread does at a time


class Listed(NamedTuple):
    """An image file: its name under the folder, with slashes, its size in bytes, its time, and its class's number."""

    name: str
    size: int
    mtime_ns: int
    label: int


class Row(NamedTuple):
    """What the index says of an image in the cache; height and width are those of the file, as it is to be seen."""

    name: str
    size: int
    mtime_ns: int
    sha256: str
    height: int
    width: int
    gray: bool


class Unreadable(NamedTuple):
    """In place of a result: why an image has none."""

    reason: str


@dataclass(frozen=True)
class Cache:
    """Images uint8 `[N, C, H, W]`, mapped from a file.

    columns: of each field of a Row, what it is for each image: 60,000 rows of their own would take long to make
    unreadable: the files that are not there, and why
    """

    images: np.ndarray
    columns: dict[str, list[Any]]
    unreadable: dict[str, str]

    def rows(self) -> list[Row]:
        return [Row(*row) for row in zip(*self.columns.values(), strict=True)]


@dataclass(frozen=True)
class Look:
    """How files become images of one shape; None: as the files have it."""

    size: tuple[int, int] | None  # height, width
    fit: Fit
    channels: Literal[1, 3] | None


@register("data")
def folder(
    files: Files,
    *,
    path: str,
    size: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None,
    fit: Fit = "crop",
    channels: Literal[1, 3] | None = None,
    test: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None,
    unreadable: Literal["error", "skip"] = "error",
) -> Dataset:
    """Image files, a folder for each class: train/<class>/… and test/<class>/…, or <class>/… with `test`.

    PNG, JPEG, BMP, WebP and GIF (the first picture), of any size and mode, turned as EXIF says, transparency on white.
    They are decoded once and kept in the user's cache folder; files that have changed since are decoded anew.

    path: the folder, absolute or under the data root
    size: height and width of the images, in pixels, or one number for both; default: that of the files, if all have the
        same
    fit: how a file of another shape becomes that size: crop (its middle), pad (black bars), stretch
    channels: 1 or 3; default: 1 where every file is gray, else 3
    test: images (or a fraction) held out as the test split where the folder has none, some of every class; which is a
        function of the files' names
    unreadable: error, or skip: leave out image files that cannot be read, and say which

    Raises DataError where the folder is missing, is laid out otherwise or has a file that cannot be read; ValueError
    where `size` or `test` is needed, or `test` does not fit; OutputError where the cache cannot be written.
    """
    where = _find(files.root, path)
    classes, train, held_out = _list(where, files.report)
    if held_out is None:
        train, held_out = _hold_out(where, train, test)
    elif test is not None:
        raise ValueError(f"test: {test} is not needed: {_shown(where)} has a test split; leave it out")
    listed = train + held_out
    look = Look((size, size) if isinstance(size, int) else (size[0], size[1]) if size else None, fit, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that it passes over
        cache = _cached(where, listed, look, test, files)
    if cache.unreadable:
        if unreadable == "error":
            raise _unreadable(where, cache.unreadable)
        names = ", ".join(_shown(name) for name in list(cache.unreadable)[:3])
        more = ", …" if len(cache.unreadable) > 3 else ""
        files.report(f"{_shown(where)}: {len(cache.unreadable):,} of {len(listed):,} files skipped: {names}{more}")
    labels = [[each.label for each in split if each.name not in cache.unreadable] for split in (train, held_out)]
    for which, numbers in zip(("training", "test"), labels, strict=True):
        if lost := set(range(len(classes))) - set(numbers):
            text = f"no {which} image of class {classes[min(lost)]} can be read"
            raise DataError(f"{_shown(where)}: {text}: {next(iter(cache.unreadable.values()))}; remove the class")
    images = torch.from_numpy(cache.images)
    splits = [
        Split(part, torch.tensor(numbers))
        for part, numbers in zip(images.split([len(numbers) for numbers in labels]), labels, strict=True)
    ]
    digest = _digest([cache.columns["name"], cache.columns["sha256"]])
    key = _shown(Path(path).name or where.name)
    return Dataset(splits[0], splits[1], classes, {key: f"sha256:{digest}"})


def _shown(text: str | Path) -> str:
    """On one line and printable: names of files can be anything."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


# Which files there are


def _find(root: Path, path: str) -> Path:
    """The folder, without links; raises DataError where there is none."""
    where = root / os.path.expanduser(path)  # noqa: PTH111  # Path's raises where it finds no home
    try:
        if where.is_dir():
            return where.resolve()
        found = "is not a folder" if where.exists() else "there is no such folder"
    except OSError as error:  # a folder above it may not be searched
        found = error.strerror or str(error)
    mend = "give an absolute path, or one under the data root"
    raise DataError(f"{_shown(where)}: {found}; {mend}, {_shown(root)} (data.root: . is the current folder)")


def _list(where: Path, report: Report) -> tuple[tuple[str, ...], list[Listed], list[Listed] | None]:
    """The classes' names, the training and the test images; no test images where the folder has no such split."""
    below = _entries(where, "").folders
    test = next((name for name in TEST_FOLDERS if name in below), None) if "train" in below else None
    if test is None:
        classes, ignored = _classes(where, "")
        names = sorted(classes)
        splits = [classes]
    else:
        (training, ignored), (held_out, more) = _classes(where, "train"), _classes(where, test)
        names = sorted(training)
        if differ := sorted(training.keys() ^ held_out.keys()):
            alone = f"{_shown(differ[0])} is in {'train' if differ[0] in training else test} alone"
            others = f", and {len(differ) - 1} more are in one alone" if len(differ) > 1 else ""
            raise DataError(f"{_shown(where)}: train and {test} must have the same classes: {alone}{others}")
        splits = [training, held_out]
        ignored += more
        if unused := [_shown(name) for name in below if name not in ("train", test)]:
            report(f"{_shown(where)}: trains on train, tests on {test}; not used: {', '.join(unused)}")
    if len(names) < 2:
        raise DataError(
            f"{_shown(where)}: expected two classes or more, found one: {_shown(names[0])}; "
            "expected train/<class>/… and test/<class>/…, or <class>/…"
        )
    if ignored:
        report(
            f"{_shown(where)}: {ignored:,} files ignored: not images ({', '.join(EXTENSIONS)}), or in no class's folder"
        )
    found = [[each for name in names for each in split[name]] for split in splits]
    return tuple(_shown(name) for name in names), found[0], found[1] if test else None


def _classes(where: Path, below: str) -> tuple[dict[str, list[Listed]], int]:
    """The images of each class, sorted by name, and how many files are no images."""
    top = _entries(where, below)
    ignored = top.others + len(top.images)
    if not top.folders:
        found = "images that are in no class's folder" if top.images else "no folders"
        raise DataError(f"{_shown(where / below)}: expected a folder for each class, <class>/…, found {found}")
    classes = {}
    for label, name in enumerate(top.folders):
        parents = {os.path.realpath(where), os.path.realpath(where / below)}  # a link to them goes in circles
        classes[name], others = _images(where, f"{below}/{name}" if below else name, label, parents)
        ignored += others
        if not classes[name]:
            kinds = ", ".join(EXTENSIONS)
            raise DataError(f"{_shown(where / below / name)}: no images ({kinds}); remove the folder, or fill it")
    return classes, ignored


def _images(where: Path, below: str, label: int, seen: set[str]) -> tuple[list[Listed], int]:
    """As `_classes`, of one class.  Links are followed; a folder that several lead to is read once."""
    found, ignored = [], 0
    waiting = [below]
    while waiting:
        inside = waiting.pop()
        real = os.path.realpath(where / inside)
        if real not in seen:
            seen.add(real)
            entries = _entries(where, inside, label)
            found += entries.images
            ignored += entries.others
            waiting += [f"{inside}/{name}" for name in entries.folders]
    return sorted(found), ignored


class Entries(NamedTuple):
    """What a folder holds: the names of folders, sorted, the image files, and how many other files."""

    folders: list[str]
    images: list[Listed]
    others: int


def _entries(where: Path, inside: str, label: int = 0) -> Entries:
    """The images have the label; hidden files and folders are passed over."""
    folders, images, others = [], [], 0
    before = f"{inside}/" if inside else ""
    try:
        with os.scandir(where / inside) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing, or to itself
                    others += 1
                    continue
                if stat.S_ISDIR(status.st_mode):
                    folders.append(name)
                elif stat.S_ISREG(status.st_mode) and name.lower().endswith(EXTENSIONS):
                    images.append(Listed(before + name, status.st_size, status.st_mtime_ns, label))
                else:
                    others += 1
    except OSError as error:
        raise DataError(f"{_shown(where / inside)}: cannot be read: {error.strerror}") from None
    return Entries(sorted(folders), images, others)


def _hold_out(where: Path, listed: Sequence[Listed], test: float | None) -> tuple[list[Listed], list[Listed]]:
    """The training and the test images: in each class the files with the lowest hashes of their names are held out.

    So a file that is added or removed moves few others, and none where the numbers stay the same.  Each class gives its
    share, rounded so that the numbers add up, and at least one image to each split.
    """
    if test is None:
        mend = "set test to a number of images, or a fraction, such as test: 0.2"
        raise ValueError(f"{_shown(where)} has no folders train and test, and so no test split: {mend}")
    classes: dict[int, list[Listed]] = {}
    for each in listed:
        classes.setdefault(each.label, []).append(each)
    total = round(test * len(listed)) if isinstance(test, float) else int(test)
    if not len(classes) <= total <= len(listed) - len(classes) or min(map(len, classes.values())) < 2:
        fewest = min(classes.values(), key=len)
        counts = f"{len(listed):,} images, {len(classes)} classes, the smallest of {len(fewest):,} images"
        raise ValueError(f"test: {test} does not leave an image of every class in each split; there are {counts}")
    shares = {label: min(max(total * len(of) // len(listed), 1), len(of) - 1) for label, of in classes.items()}
    missing = total - sum(shares.values())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        free = [label for label, of in classes.items() if 1 <= shares[label] + step < len(of)]
        shares[max(free, key=lambda label: step * (total * len(classes[label]) - shares[label] * len(listed)))] += step
    held_out = set()
    for label, of in classes.items():
        held_out |= {each.name for each in sorted(of, key=lambda each: _place(each.name))[: shares[label]]}
    return [each for each in listed if each.name not in held_out], [each for each in listed if each.name in held_out]


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), person=b"dltrain test").digest()


# The cache


def _cached(where: Path, listed: Sequence[Listed], look: Look, test: float | None, files: Files) -> Cache:
    """The images from the cache, which is made or brought up to date where it must be."""
    import platformdirs

    home = platformdirs.user_cache_path("dltrain") / "folders"
    settings = [look.size, look.fit, look.channels, test]
    key = _digest([MARK.decode(), settings, listed])[:32]
    place = _digest([str(where), settings])[:16]
    path = home / f"{place}-{key}.images"

    def usable(found: Cache | None) -> bool:
        """Files that could not be read are tried again: their rights or their disk may be mended."""
        if found is None or files.recheck:
            return False
        return all(isinstance(_attempt(_try_again, where / name), Unreadable) for name in found.unreadable)

    # another place's: the folder was moved, or is a copy
    for other in (path, *home.glob(f"*-{key}.images")):
        if (found := _open(other)) and usable(found):
            return found
    with _alone(home / f"{place}.lock", files.report):
        if (found := _open(path)) and usable(found):  # another process has made it meanwhile
            return found
        old = None
        if not files.recheck:
            old = next(filter(None, map(_open, home.glob(f"{place}-*.images"))), None)
        part = home / f"{place}.part"  # ours alone: the lock is held
        try:
            try:
                with part.open("wb") as out:
                    _write(out, path, where, listed, look, old, files.report)
                    out.flush()
                    os.fsync(out.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:  # of the cache: what goes wrong with an image is Unreadable
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
        for other in home.glob(f"{place}-*.images"):
            if other != path:
                with contextlib.suppress(OSError):  # Windows refuses while another process has it mapped
                    other.unlink()
    made = _open(path)
    if made is None:
        raise OutputError(f"{path}: was written and cannot be read back")
    return made


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextlib.contextmanager
def _alone(path: Path, report: Report) -> Iterator[None]:
    """Makes the folder and holds the lock."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("waiting for another process that is decoding the same folder")
            lock.acquire()
    except OSError as error:
        text = "the cache of decoded images cannot be kept there"
        raise OutputError(f"{path.parent}: {text}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _open(path: Path) -> Cache | None:
    """The cache in a file; None where it is not there, cut off, damaged or of another format."""
    import numpy as np

    try:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(-FOOTER.size, os.SEEK_END)
            mark, length, digest = FOOTER.unpack(opened.read(FOOTER.size))
            if mark != MARK or length > size - FOOTER.size:
                return None
            opened.seek(size - FOOTER.size - length)
            text = opened.read(length)
            if hashlib.sha256(text).digest() != digest:
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


def _write(
    out: BinaryIO, path: Path, where: Path, listed: Sequence[Listed], look: Look, old: Cache | None, report: Report
) -> None:
    """Writes what `_open` reads, later under `path`: of the old cache what has not changed, else from the files."""
    known = {row[:3]: (row, number) for number, row in enumerate(old.rows())} if old else {}
    facts = {each.name: known[each[:3]][0][4:] for each in listed if each[:3] in known}
    new = [each for each in listed if each[:3] not in known]
    if new:
        report(f"{_shown(where)}: decoding {len(new):,} image files once, to be kept in {_shown(path.parent)}")
    unreadable: dict[str, str] = {}
    headers = _in_parallel(partial(_header, where), new, PART_IMAGES, "reading", report)
    for each, header in zip(new, headers, strict=True):
        if isinstance(header, Unreadable):
            unreadable[each.name] = header.reason
        else:
            facts[each.name] = header
    if not facts:
        raise _unreadable(where, unreadable)
    shape = _shape(where, facts, look)
    readable = [each for each in listed if each.name in facts]
    needed, free = len(readable) * prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{path}: needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free")

    def load(each: Listed) -> tuple[str, bytes]:
        if old and each[:3] in known and old.images.shape[1:] == shape:
            row, number = known[each[:3]]
            return row.sha256, old.images[number].tobytes()
        return _load(where / each.name, shape, look)

    rows = []
    images = _in_parallel(load, readable, max(1, min(PART_IMAGES, PART_BYTES // prod(shape))), "decoding", report)
    for each, loaded in zip(readable, images, strict=True):
        if isinstance(loaded, Unreadable):
            unreadable[each.name] = loaded.reason
        else:
            sha256, content = loaded
            out.write(content)
            rows.append(Row(*each[:3], sha256, *facts[each.name]))
    if not rows:
        raise _unreadable(where, unreadable)
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    text = json.dumps({"shape": shape, "columns": columns, "unreadable": unreadable}).encode()
    out.write(text + FOOTER.pack(MARK, len(text), hashlib.sha256(text).digest()))


def _shape(where: Path, facts: dict[str, tuple[int, int, bool]], look: Look) -> Shape:
    """(channels, height, width) of the images, from height, width and grayness of each file."""
    if look.size:
        height, width = look.size
    else:
        sizes: dict[tuple[int, int], str] = {}
        for name, (high, wide, _) in facts.items():
            sizes.setdefault((high, wide), name)
        if len(sizes) > 1:
            one, other = [f"{_shown(name)} is {high}x{wide}" for (high, wide), name in list(sizes.items())[:2]]
            mend = "set size, in pixels (size: 32, or size: [height, width])"
            raise ValueError(f"{_shown(where)}: images differ in size (height x width): {one}, {other}; {mend}")
        ((height, width),) = sizes
    gray = all(gray for _, _, gray in facts.values())
    return look.channels or (1 if gray else 3), height, width


def _unreadable(where: Path, reasons: dict[str, str]) -> DataError:
    name, reason = next(iter(reasons.items()))
    others = f" (and {len(reasons) - 1:,} more files)" if len(reasons) > 1 else ""
    mend = "mend or remove it, or leave out what cannot be read by unreadable: skip"
    return DataError(f"{_shown(where / name)}: not a readable image: {reason}{others}; {mend}")


# Decoding


def _in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], size: int, what: str, report: Report
) -> Iterator[_Result | Unreadable]:
    """`work` of each item, in order, `size` of them at a time in one of as many threads as there are processors.

    Pillow lets other threads run while it decodes.  On two processors two threads take half the time of one for JPEGs
    of 500x375, and about the same for 32x32, where two processes took half at best; but processes cannot be started
    from everywhere: a script that does not guard its main part would start itself again.
    """

    def several(part: Sequence[_Item]) -> list[_Result | Unreadable]:
        return [_attempt(work, each) for each in part]

    threads = os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[list[_Result | Unreadable]]] = deque()
    done = 0
    try:
        with _progress(what, len(items), report) as tell:
            for start in range(0, len(items) + 2 * threads * size, size):
                if start < len(items):
                    waiting.append(pool.submit(several, items[start : start + size]))
                if start >= 2 * threads * size:  # so what is ready and not yet written stays small
                    found = waiting.popleft().result()
                    yield from found
                    done += len(found)
                    tell(done)
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(work: Callable[[_Item], _Result], item: _Item) -> _Result | Unreadable:
    from PIL import UnidentifiedImageError

    try:
        return work(item)
    except UnidentifiedImageError:
        return Unreadable(f"not one of {', '.join(FORMATS)}")
    except Exception as error:  # a broken image makes Pillow raise almost anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return Unreadable(" ".join(reason.split()))


@contextlib.contextmanager
def _progress(what: str, total: int, report: Report) -> Iterator[Callable[[int], None]]:
    """Shows how many are done: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    reported = time.monotonic()

    def line(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= REPORT_EVERY:
            reported = time.monotonic()
            report(f"{what}: {done:,} of {total:,} images")

    yield line


def _header(where: Path, listed: Listed) -> tuple[int, int, bool]:
    """Height and width of the image as it is to be seen, and whether it is gray; its pixels are not decoded."""
    import PIL.Image

    if listed.size > LARGEST:
        raise ValueError(f"{listed.size:,} bytes, expected at most {LARGEST:,}")
    with PIL.Image.open(where / listed.name, formats=FORMATS) as image:
        _check_pixels(image)
        width, height = image.size
        # asked for EXIF that may come after the pixels, Pillow decodes a PNG
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
        gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        return (width, height, gray) if turned else (height, width, gray)


def _check_pixels(image: Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels, expected at most {MOST_PIXELS:,}")


def _try_again(path: Path) -> None:
    _decode(path.read_bytes(), 3, None)


def _load(path: Path, shape: Shape, look: Look) -> tuple[str, bytes]:
    """SHA-256 of the file, and its image uint8 `[C, H, W]` as bytes."""
    import numpy as np
    from PIL import ImageOps
    from PIL.Image import Resampling

    content = path.read_bytes()
    channels, height, width = shape
    image = _decode(content, channels, look.size)
    if look.size is None and image.size != (width, height):
        raise ValueError(f"{image.height}x{image.width}, where its first bytes say {height}x{width}")
    if look.fit == "crop":
        image = ImageOps.fit(image, (width, height), Resampling.BILINEAR)
    elif look.fit == "pad":
        image = ImageOps.pad(image, (width, height), Resampling.BILINEAR)
    else:
        image = image.resize((width, height), Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    return hashlib.sha256(content).hexdigest(), pixels.tobytes()


def _decode(content: bytes, channels: int, size: tuple[int, int] | None) -> Image:
    """The image, upright, gray or RGB; a JPEG may be decoded smaller, but not below twice `size`, where that is given.

    Transparent pixels are laid on white; 16 bits become 8 by value / 257, rounded.
    """
    import numpy as np
    import PIL.Image
    from PIL import ImageOps

    image: Image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    _check_pixels(image)
    if size:
        image.draft(None, (2 * max(size), 2 * max(size)))  # libjpeg skips frequencies: eight times smaller, at most
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")
