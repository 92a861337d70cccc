"""Image files: which of them a folder holds."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from dltrain.errors import DataError
from dltrain.text import shown

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


class Listed(NamedTuple):
    """An image file: its name under the folder, with slashes, its size in bytes and its time."""

    name: str
    size: int
    mtime_ns: int


class Entries(NamedTuple):
    """What a folder holds: the names of folders, sorted, the image files, and how many other files."""

    folders: list[str]
    images: list[Listed]
    others: int


def below(inside: str, name: str) -> str:
    """The name under the folder of what lies `inside` a folder of it; "" is the folder itself."""
    return f"{inside}/{name}" if inside else name


def entries(where: Path, inside: str = "") -> Entries:
    """What where/inside holds; the images' names are under `where`.  Hidden files and folders are passed over.

    Raises DataError where it cannot be read.
    """
    folders, images, others = [], [], 0
    try:
        with os.scandir(where / inside) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing, or to itself
                    others += 1
                    continue
                if stat.S_ISDIR(status.st_mode):
                    folders.append(entry.name)
                elif stat.S_ISREG(status.st_mode) and entry.name.lower().endswith(EXTENSIONS):
                    images.append(Listed(below(inside, entry.name), status.st_size, status.st_mtime_ns))
                else:
                    others += 1
    except OSError as error:
        raise DataError(f"{shown(where / inside)}: cannot be read: {error.strerror}") from None
    return Entries(sorted(folders), images, others)


def all_below(where: Path, inside: str = "", seen: set[str] | None = None) -> tuple[list[Listed], int]:
    """The images of where/inside and the folders below it, sorted by name, and how many other files there are.

    Links are followed; a folder that several lead to is read once.

    seen: the real paths of folders that are not to be read
    """
    images, others = [], 0
    seen = set(seen or ())
    waiting = [inside]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(where / folder)
        if real not in seen:
            seen.add(real)
            found = entries(where, folder)
            images += found.images
            others += found.others
            waiting += [below(folder, name) for name in found.folders]
    return sorted(images), others
