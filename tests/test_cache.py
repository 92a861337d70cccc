"""The cache of decoded images: made once, kept up to date, and never believed when it is damaged."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import draw, first, noise, pets, read_pets, same
from PIL import Image

from dltrain.data import cache as module
from dltrain.errors import DataError, OutputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, a new one for each test."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "dltrain" / "folders"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded."""
    names = []
    load = module._load

    def watched(path: Path, *rest: Any) -> Any:
        names.append(path.name)
        return load(path, *rest)

    monkeypatch.setattr(module, "_load", watched)
    return names


def images_in(cache):
    return sorted(path.name for path in cache.glob("*.images"))


def test_what_is_unchanged_is_decoded_once(tmp_path, cache, decoded):
    pets(tmp_path)
    notes = []
    made = read_pets(tmp_path, notes.append)
    assert len(decoded) == 8
    assert notes == [f"{tmp_path}/pets: decoding 8 image files once, to be kept in {cache}"]
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert same(read_pets(tmp_path, notes.append), made)
    assert len(decoded) == 8
    assert len(notes) == 1
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert sorted(path.suffix for path in before) == [".images", ".lock"]


def test_writing_into_a_split_does_not_change_the_cache(tmp_path):
    pets(tmp_path)
    before = first(read_pets(tmp_path)).copy()
    read_pets(tmp_path).train.images.zero_()
    assert before.any()
    assert np.array_equal(first(read_pets(tmp_path)), before)


def test_a_folder_that_moves_keeps_its_images(tmp_path, decoded):
    pets(tmp_path)
    made = read_pets(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pets").rename(tmp_path / "elsewhere/pets")
    assert same(read_pets(tmp_path / "elsewhere"), made)
    assert len(decoded) == 8


def test_channels_are_one_where_every_file_is_gray(tmp_path):
    pets(tmp_path, channels=1)
    assert read_pets(tmp_path).shape == (1, 6, 4)
    gray = first(read_pets(tmp_path))
    three = read_pets(tmp_path, channels=3)
    assert np.array_equal(first(three), np.repeat(gray, 3, 0))
    draw(tmp_path / "pets/test/dog/0.png", noise(0))
    assert read_pets(tmp_path).shape == (3, 6, 4)
    one = read_pets(tmp_path, channels=1)
    luma = noise(0) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision
    assert np.abs(one.test.images[2, 0].numpy() - luma).max() <= 0.51
    (tmp_path / "pets/test/dog/0.png").unlink()
    assert read_pets(tmp_path).shape == (1, 6, 4)


def test_files_of_different_sizes_need_a_size(tmp_path):
    pets(tmp_path)
    draw(tmp_path / "pets/train/dog/1.png", noise(0, 20, 30))
    with pytest.raises(ValueError, match=r"train/cat/0.png is 6x4, train/dog/1.png is 20x30; set size, .*size: 32"):
        read_pets(tmp_path)
    assert read_pets(tmp_path, size=5).shape == (3, 5, 5)
    assert read_pets(tmp_path, size=[5, 7]).shape == (3, 5, 7)


# What changed


def age(path):
    os.utime(path, ns=(0, 0))


def change(pictures):
    draw(pictures / "train/dog/1.png", noise(50))
    return ["1.png"]


def touch(pictures):
    age(pictures / "train/dog/1.png")
    return ["1.png"]


def add(pictures):
    draw(pictures / "train/cat/new.png", noise(51))
    return ["new.png"]


def remove(pictures):
    (pictures / "train/cat/0.png").unlink()
    return []


def rename(pictures):
    (pictures / "train/cat/0.png").rename(pictures / "train/cat/other.png")
    return ["other.png"]


def move_to_another_class(pictures):
    (pictures / "train/cat/0.png").rename(pictures / "train/dog/0a.png")
    return ["0a.png"]


@pytest.mark.parametrize("edit", [change, touch, add, remove, rename, move_to_another_class])
def test_what_changed_is_noticed_and_only_that_is_decoded(tmp_path, cache, decoded, monkeypatch, edit):
    pets(tmp_path)
    before = read_pets(tmp_path)
    old = images_in(cache)
    decoded.clear()
    expected = edit(tmp_path / "pets")
    after = read_pets(tmp_path)
    assert decoded == expected
    assert len(images_in(cache)) == 1, "the old cache is removed"
    assert images_in(cache) != old
    assert (after.files == before.files) == (edit is touch), "the digest is that of the files' content and names"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "new")
    assert same(read_pets(tmp_path), after)


def test_a_change_of_channels_or_size_that_others_bring_decodes_all(tmp_path, decoded):
    pets(tmp_path, channels=1)
    read_pets(tmp_path)
    decoded.clear()
    draw(tmp_path / "pets/train/cat/0.png", noise(8))
    dataset = read_pets(tmp_path)
    assert len(decoded) == 8
    assert np.array_equal(first(dataset), noise(8).transpose(2, 0, 1))


def test_each_setting_has_a_cache_of_its_own(tmp_path, cache, decoded):
    pets(tmp_path)
    for _ in range(2):
        for changes in ({}, {"size": 5}, {"size": 5, "fit": "pad"}, {"channels": 1}, {"unreadable": "skip"}):
            read_pets(tmp_path, **changes)
    assert len(decoded) == 4 * 8
    assert len(images_in(cache)) == 4


def test_each_way_to_split_has_a_cache_of_its_own(tmp_path, cache, decoded):
    pets(tmp_path, "", each=4)
    for _ in range(2):
        for test in (2, 0.5):
            read_pets(tmp_path, test=test)
    assert len(decoded) == 2 * 8
    assert len(images_in(cache)) == 2


def test_other_bytes_of_the_same_size_and_time_are_noticed_by_a_recheck(tmp_path, decoded):
    pets(tmp_path)
    path = draw(tmp_path / "pets/train/cat/0.bmp", noise(20))
    age(path)
    before = read_pets(tmp_path)
    draw(path, noise(21))
    age(path)
    assert same(read_pets(tmp_path), before)
    decoded.clear()
    after = read_pets(tmp_path, recheck=True)
    assert len(decoded) == 9
    assert not torch.equal(after.train.images, before.train.images)
    assert after.files != before.files
    assert same(read_pets(tmp_path), after)


def test_what_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    """A mended disk, or rights, change neither a file's size nor its time."""
    pets(tmp_path)
    read = module.read
    refused = True

    def refuse(path: Path) -> bytes:
        if refused and path.match("train/cat/0.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(module, "read", refuse)
    for _ in range(2):
        with pytest.raises(DataError, match=r"cat/0\.png: not a readable image: Permission denied; mend"):
            read_pets(tmp_path)
    assert len(read_pets(tmp_path, unreadable="skip").train) == 3
    refused = False
    assert len(read_pets(tmp_path, unreadable="skip").train) == 4
    assert len(read_pets(tmp_path).train) == 4


def test_what_can_be_read_by_now_is_all_that_is_decoded(tmp_path, decoded):
    pets(tmp_path)
    path = tmp_path / "pets/train/dog/1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert read_pets(tmp_path, unreadable="skip").train.labels.tolist() == [0, 0, 1]
    read_pets(tmp_path, unreadable="skip")
    assert len(decoded) == 8
    path.write_bytes(whole)
    assert read_pets(tmp_path).train.labels.tolist() == [0, 0, 1, 1]
    assert decoded[8:] == ["1.png"]


def test_a_png_whose_turn_comes_after_its_pixels_is_not_read_as_if_upright(tmp_path):
    """Its size is told from its first bytes; with `size` set it is turned as it should be."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    content = io.BytesIO()
    Image.fromarray(noise(0)).save(content, "PNG", exif=exif)
    parts, rest = [], content.getvalue()[8:]
    while rest:
        length = 12 + int.from_bytes(rest[:4], "big")
        parts.append(rest[:length])
        rest = rest[length:]
    parts.sort(key=lambda part: {b"IHDR": 0, b"eXIf": 2, b"IEND": 3}.get(part[4:8], 1))
    pets(tmp_path)
    draw(tmp_path / "pets/train/cat/0.png", content.getvalue()[:8] + b"".join(parts))
    with pytest.raises(DataError, match=r"cat/0\.png: .* 4x6, where its first bytes say 6x4; mend"):
        read_pets(tmp_path)
    upright = noise(0).transpose(1, 0, 2)[:, ::-1]
    assert np.array_equal(first(read_pets(tmp_path, size=[4, 6])), upright.transpose(2, 0, 1))


# Damage


def the_cache(cache):
    (path,) = cache.glob("*.images")
    return path


DAMAGES = {
    "empty": lambda content: b"",
    "a few bytes": lambda content: content[-3:],
    "cut off": lambda content: content[:-1],
    "an image short": lambda content: content[72:],
    "an index byte flipped": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "another format": lambda content: content[:-48] + b"dltrain0" + content[-40:],
    "an index of all bytes and more": lambda content: content[:-40] + b"\xff" * 8 + content[-32:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path, cache, decoded, damage):
    pets(tmp_path)
    made = read_pets(tmp_path)
    path = the_cache(cache)
    content = path.read_bytes()
    path.unlink()  # cut off where it is mapped, it would stop this process
    path.write_bytes(DAMAGES[damage](content))
    assert same(read_pets(tmp_path), made)
    assert len(decoded) == 16
    assert path.read_bytes() == content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_cache_does_more_than_change_pixels(tmp_path, cache, data):
    pets(tmp_path, each=1)
    made = read_pets(tmp_path, recheck=True)
    path = the_cache(cache)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.sampled_from([0, len(content), len(content) // 2])) or len(content) :]
    path.unlink()
    path.write_bytes(content)
    found = read_pets(tmp_path)
    assert found.files == made.files
    assert found.train.images.shape == made.train.images.shape
    assert found.train.labels.tolist() == made.train.labels.tolist()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, cache):
    pets(tmp_path)
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(OutputError, match=f"^{cache}: the cache of decoded images cannot be kept there: "):
        read_pets(tmp_path)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, cache, monkeypatch):
    pets(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OutputError, match=r"folders/\w+-\w+\.images: cannot be written: No space left on device"):
        read_pets(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 72 - 1))
    monkeypatch.setattr(module, "_load", None)  # nothing is decoded for a disk that has no room
    with pytest.raises(OutputError, match="needs 0 MB, the disk has 0 MB free"):
        read_pets(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_overwritten(tmp_path, cache):
    pets(tmp_path)
    read_pets(tmp_path)
    place = the_cache(cache).name.split("-")[0]
    (cache / f"{place}.part").write_bytes(bytes(10**6))
    add(tmp_path / "pets")
    assert len(read_pets(tmp_path).train) == 5
    assert len(list(cache.iterdir())) == 2


def test_of_two_processes_one_decodes(tmp_path, cache, monkeypatch):
    pets(tmp_path)
    made = read_pets(tmp_path)
    path = the_cache(cache)
    aside = path.rename(tmp_path / "aside")
    written = aside.stat().st_mtime_ns
    monkeypatch.setattr(module, "_load", None)
    waiting = threading.Event()
    notes = []

    def report(note: str) -> None:
        notes.append(note)
        waiting.set()

    found = []
    other = threading.Thread(target=lambda: found.append(read_pets(tmp_path, report)), daemon=True)
    with FileLock(cache / f"{path.name.split('-')[0]}.lock"):
        other.start()
        assert waiting.wait(20)
        aside.rename(path)
    other.join(20)
    assert notes == ["waiting for another process that is decoding the same folder"]
    assert same(found[0], made)
    assert path.stat().st_mtime_ns == written
