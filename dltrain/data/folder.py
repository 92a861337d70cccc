"""Folders of images, one folder a class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dltrain.data.cache import Look, cached, digest, not_readable
from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import Report
from dltrain.data.files import Files
from dltrain.data.listing import EXTENSIONS, Listed, all_below, below, entries
from dltrain.data.pictures import Fit
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import PositiveInt, register
from dltrain.text import shown

TEST_FOLDERS = ("test", "val", "valid")  # the first of them that lies beside train/ is the test split
Classes = dict[str, list[Listed]]  # sorted by name: the place of a class is its number


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
    train, held_out = _list(where, files.report)
    if held_out is None:
        train, held_out = _hold_out(where, train, test)
    elif test is not None:
        raise ValueError(f"test: {test} is not needed: {shown(where)} has a test split; leave it out")
    listed = [*_all(train), *_all(held_out)]
    look = Look((size, size) if isinstance(size, int) else (size[0], size[1]) if size else None, fit, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that it passes over
        cache = cached(where, listed, look, test, files)
    if cache.unreadable:
        if unreadable == "error":
            raise not_readable(where, cache.unreadable)
        names = ", ".join(shown(name) for name in list(cache.unreadable)[:3])
        more = ", …" if len(cache.unreadable) > 3 else ""
        files.report(f"{shown(where)}: {len(cache.unreadable):,} of {len(listed):,} files skipped: {names}{more}")
    train_labels = _labels(where, "training", train, cache.unreadable)
    test_labels = _labels(where, "test", held_out, cache.unreadable)
    images = torch.from_numpy(cache.images)
    content = digest([cache.columns["name"], cache.columns["sha256"]])
    return Dataset(
        Split(images[: len(train_labels)], train_labels, mapped=True),
        Split(images[len(train_labels) :], test_labels, mapped=True),
        tuple(shown(name) for name in train),
        {shown(Path(path).name or where.name): f"sha256:{content}"},
    )


def _labels(where: Path, which: str, classes: Classes, unreadable: Mapping[str, str]) -> torch.Tensor:
    """int64 `[N]`: the class of each file that could be read; raises DataError where a class has none."""
    labels = []
    for label, (name, of) in enumerate(classes.items()):
        readable = [each for each in of if each.name not in unreadable]
        if not readable:
            text = f"no {which} image of class {shown(name)} can be read: {unreadable[of[0].name]}"
            raise DataError(f"{shown(where)}: {text}; remove the class")
        labels += [label] * len(readable)
    return torch.tensor(labels)


def _all(classes: Classes) -> Iterable[Listed]:
    return (each for of in classes.values() for each in of)


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
    raise DataError(f"{shown(where)}: {found}; {mend}, {shown(root)} (data.root: . is the current folder)")


def _list(where: Path, report: Report) -> tuple[Classes, Classes | None]:
    """The training and the test images; no test images where the folder has no such split."""
    top = entries(where)
    test = next((name for name in TEST_FOLDERS if name in top.folders), None) if "train" in top.folders else None
    if test is None:
        train, ignored = _classes(where, "")
        held_out = None
    else:
        (train, ignored), (held_out, more) = _classes(where, "train"), _classes(where, test)
        ignored += more + top.others + len(top.images)
        if differ := sorted(train.keys() ^ held_out.keys()):
            alone = f"{shown(differ[0])} is in {'train' if differ[0] in train else test} alone"
            others = f", and {len(differ) - 1} more are in one alone" if len(differ) > 1 else ""
            raise DataError(f"{shown(where)}: train and {test} must have the same classes: {alone}{others}")
        if unused := [shown(name) for name in top.folders if name not in ("train", test)]:
            report(f"{shown(where)}: trains on train, tests on {test}; not used: {', '.join(unused)}")
    if len(train) < 2:
        raise DataError(
            f"{shown(where)}: expected two classes or more, found one: {shown(next(iter(train)))}; "
            "expected train/<class>/… and test/<class>/…, or <class>/…"
        )
    if ignored:
        kinds = ", ".join(EXTENSIONS)
        report(f"{shown(where)}: {ignored:,} files ignored: not images ({kinds}), or in no class's folder")
    return train, held_out


def _classes(where: Path, inside: str) -> tuple[Classes, int]:
    """The images of each class, whose folders are those of where/inside, and how many files are no images."""
    top = entries(where, inside)
    ignored = top.others + len(top.images)
    if not top.folders:
        found = "images that are in no class's folder" if top.images else "no folders"
        raise DataError(f"{shown(where / inside)}: expected a folder for each class, <class>/…, found {found}")
    above = {os.path.realpath(where), os.path.realpath(where / inside)}  # a link to them goes in circles
    classes = {}
    for name in top.folders:
        classes[name], others = all_below(where, below(inside, name), above)
        ignored += others
        if not classes[name]:
            kinds = ", ".join(EXTENSIONS)
            raise DataError(f"{shown(where / inside / name)}: no images ({kinds}); remove the folder, or fill it")
    return classes, ignored


def _hold_out(where: Path, classes: Classes, test: float | None) -> tuple[Classes, Classes]:
    """The training and the test images: in each class the files with the lowest hashes of their names are held out.

    So a file that is added or removed moves few others, and none where the numbers stay the same.
    """
    if test is None:
        mend = "set test to a number of images, or a fraction, such as test: 0.2"
        raise ValueError(f"{shown(where)} has no folders train and test, and so no test split: {mend}")
    train, held_out = {}, {}
    for (name, of), share in zip(classes.items(), _shares([len(of) for of in classes.values()], test), strict=True):
        chosen = {each.name for each in sorted(of, key=lambda each: _place(each.name))[:share]}
        train[name] = [each for each in of if each.name not in chosen]
        held_out[name] = [each for each in of if each.name in chosen]
    return train, held_out


def _shares(counts: list[int], test: float) -> list[int]:
    """How many of each class's images are held out: its share, rounded so that the numbers add up.

    Each class has at least one image in each split; raises ValueError where that cannot be.
    """
    images = sum(counts)
    total = round(test * images) if isinstance(test, float) else int(test)
    if not len(counts) <= total <= images - len(counts) or min(counts) < 2:
        found = f"{images:,} images, {len(counts)} classes, the smallest of {min(counts):,} images"
        raise ValueError(f"test: {test} does not leave an image of every class in each split; there are {found}")
    shares = [max(total * count // images, 1) for count in counts]
    missing = total - sum(shares)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):  # to the class that is furthest from its share
        free = [number for number, count in enumerate(counts) if 1 <= shares[number] + step < count]
        shares[max(free, key=lambda number: step * (total * counts[number] - shares[number] * images))] += step
    return shares


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), person=b"dltrain test").digest()
