from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import functional

from dltrain import registry
from dltrain.data import folder as module
from dltrain.data.dataset import Dataset
from dltrain.data.files import Files
from dltrain.data.folder import folder
from dltrain.errors import DataError, OutputError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


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


def noise(seed, height=6, width=4, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def draw(path, pixels, **options):
    """Writes an image; pixels: an array [H, W, C], an image, or the bytes of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if isinstance(pixels, bytes):
        path.write_bytes(pixels)
    else:
        pixels.save(path, **options)
    return path


def pets(root, *splits, each=2, channels=3):
    """A folder of cats and dogs; returns each file's pixels, [C, H, W], by name."""
    drawn = {}
    for number, name in enumerate(
        f"{split}{kind}/{number}.png"
        for split in splits or ("train/", "test/")
        for kind in ("dog", "cat")
        for number in range(each)
    ):
        drawn[name] = noise(number, channels=channels)
        draw(root / "pets" / name, drawn[name])
    return {name: pixels.transpose(2, 0, 1) for name, pixels in drawn.items()}


def read(root, report: Callable[[str], None] = lambda note: None, recheck=False, **changes) -> Dataset:
    return folder(Files(root, report=report, recheck=recheck), **{"path": "pets"} | changes)


def first(dataset):
    """The first training image, [C, H, W]."""
    return dataset.train.images[0].numpy()


def alone(root, pixels, name="one.png", **options):
    """Puts the image where it is read first, in a folder with three others of that size."""
    shutil.rmtree(root / "pets", ignore_errors=True)
    path = draw(root / "pets/train/a" / name, pixels, **options)
    for place in ("train/b", "test/a", "test/b"):
        (root / "pets" / place).mkdir(parents=True)
        shutil.copy(path, root / "pets" / place)


# Layouts


@pytest.mark.parametrize("held_out", ["test", "val", "valid"])
def test_the_images_are_those_of_the_files_with_the_numbers_of_their_classes(tmp_path, held_out):
    drawn = pets(tmp_path, "train/", f"{held_out}/")
    dataset = read(tmp_path)
    assert dataset.classes == ("cat", "dog")
    for split, below in ((dataset.train, "train"), (dataset.test, held_out)):
        names = [f"{below}/{kind}/{number}.png" for kind in ("cat", "dog") for number in (0, 1)]
        assert np.array_equal(split.images.numpy(), np.stack([drawn[name] for name in names]))
        assert split.labels.tolist() == [0, 0, 1, 1]


def test_test_goes_before_val_and_what_is_not_used_is_said(tmp_path):
    drawn = pets(tmp_path, "train/", "test/", "val/")
    notes = []
    dataset = read(tmp_path, notes.append)
    assert np.array_equal(dataset.test.images[0].numpy(), drawn["test/cat/0.png"])
    assert notes[0] == f"{tmp_path}/pets: trains on train, tests on test; not used: val"


def test_an_absolute_path_needs_no_root(tmp_path):
    pets(tmp_path)
    assert len(read(tmp_path / "elsewhere", path=str(tmp_path / "pets")).train) == 4


def test_folders_within_a_class_belong_to_it(tmp_path):
    pets(tmp_path)
    extra = noise(99)
    draw(tmp_path / "pets/train/cat/deep/er/0.png", extra)
    dataset = read(tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(dataset.train.images[2].numpy(), extra.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["one.png", "one.PNG", "one.jpg", "one.JPEG", "one.bmp", "one.webp", "one.gif"])
def test_every_kind_of_file_is_read(tmp_path, name):
    alone(tmp_path, Image.new("RGB", (4, 6), (200, 40, 40)), name)
    pixel = first(read(tmp_path))[:, 3, 2].astype(int)
    assert np.abs(pixel - (200, 40, 40)).max() <= 3  # what JPEG and WebP lose


def test_a_name_may_say_another_format(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (4, 6), RED).save(content, "PNG")
    alone(tmp_path, content.getvalue(), "one.jpg")
    assert first(read(tmp_path))[:, 0, 0].tolist() == list(RED)


def test_a_format_that_pillow_knows_and_we_do_not_is_refused(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (4, 6)).save(content, "TIFF")
    alone(tmp_path, content.getvalue())
    with pytest.raises(DataError, match=r"one.png: not a readable image: not one of PNG, JPEG, BMP, WEBP, GIF \(and 3"):
        read(tmp_path)


def test_hidden_files_are_passed_over_and_others_counted(tmp_path):
    pets(tmp_path)
    for name in ("train/.cache/x.png", "train/cat/.hidden.png", "train/cat/Thumbs.db", "test/notes.txt", "loose.png"):
        draw(tmp_path / "pets" / name, b"no image")
    (tmp_path / "pets/train/dog/nowhere.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "pets/train/dog/round.png").symlink_to(tmp_path / "pets/train/dog/round.png")
    os.mkfifo(tmp_path / "pets/train/dog/pipe.png")  # to open it would wait for ever
    notes = []
    assert len(read(tmp_path, notes.append).train) == 4
    assert notes[0] == (
        f"{tmp_path}/pets: 5 files ignored: not images (.png, .jpg, .jpeg, .bmp, .webp, .gif), or in no class's folder"
    )


def test_links_are_followed_and_end(tmp_path):
    drawn = pets(tmp_path)
    outside = draw(tmp_path / "outside/x.png", noise(7)).parent
    cats = tmp_path / "pets/train/cat"
    (cats / "linked").symlink_to(outside)
    (cats / "again").symlink_to(outside)
    (cats / "round").symlink_to(cats)
    (cats / "up").symlink_to(tmp_path / "pets/train")
    (outside / "top").symlink_to(tmp_path / "pets")
    (tmp_path / "pets/train/dog/2.png").symlink_to(cats / "0.png")
    dataset = read(tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(dataset.train.images[5].numpy(), drawn["train/cat/0.png"])


def test_names_may_be_any_bytes(tmp_path, capfd):
    for split in (b"train", b"test"):
        for kind in (b"caf\xe9", b"new\nline"):
            path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pets/" + split + b"/" + kind + b"/\xff\n.png"))
            draw(path, noise(0))
    for _ in range(2):
        assert read(tmp_path).classes == ("caf\\udce9", "new\\nline")
    path.write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert f"{tmp_path}/pets/test/new\\nline/\\udcff\\n.png: not a readable image" in str(caught.value)
    print(caught.value)  # can be encoded


@pytest.mark.parametrize("names", [("test", "val"), ("plane", "train")])
def test_a_class_may_have_a_splits_name(tmp_path, names):
    numbered(tmp_path, **dict.fromkeys(names, 4))
    dataset = read(tmp_path, test=0.5)
    assert dataset.classes == names
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 1, 1]


BROKEN_LAYOUTS = {
    "expected a folder for each class, <class>/…, found no folders": [],
    "expected a folder for each class, <class>/…, found images that are in no class's folder": ["a.png", "b.png"],
    "expected two classes or more, found one: cat": ["cat/a.png", "cat/b.png"],
    "pets/dog: no images": ["cat/a.png", "dog/notes.txt"],
    "pets/train: expected a folder for each class, <class>/…, found images that": ["train/a.png", "test/cat/a.png"],
    "train and test must have the same classes: cow is in train alone, and 1 more are in one alone": [
        *("train/cat/a.png", "train/cow/a.png", "train/dog/a.png", "test/cat/a.png"),
    ],
    "train and test must have the same classes: yak is in test alone": [
        *("train/cat/a.png", "train/cow/a.png", "test/cat/a.png", "test/cow/a.png", "test/yak/a.png"),
    ],
}


@pytest.mark.parametrize("message", BROKEN_LAYOUTS)
def test_a_folder_that_is_laid_out_otherwise_is_refused(tmp_path, message):
    (tmp_path / "pets").mkdir()
    for name in BROKEN_LAYOUTS[message]:
        draw(tmp_path / "pets" / name, b"x")
    with pytest.raises(DataError) as caught:
        read(tmp_path, test=0.5)
    assert message in str(caught.value)
    assert str(tmp_path / "pets") in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "absent",
            "{root}/absent: there is no such folder; give an absolute path, or one under the data root, {root} ",
        ),
        ("/absent\n", "/absent\\n: there is no such folder"),
        ("file", "{root}/file: is not a folder"),
        ("a\0b", "{root}/a\\x00b: there is no such folder"),
        ("x" * 300, "{root}/xxx"),
    ],
)
def test_a_folder_that_is_not_there_is_named(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as caught:
        read(tmp_path, path=path)
    assert message.format(root=tmp_path) in str(caught.value)
    assert "data.root: ." in str(caught.value)


def test_a_home_is_found(tmp_path, monkeypatch):
    pets(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(read(tmp_path, path="~/pets").train) == 4


# Splits


def split_names(root, **changes):
    """The names of the training and of the test images, which hold their numbers as pixels."""
    dataset = read(root, **changes)
    return [
        [f"{dataset.classes[label]}/{image[0, 0, 0]}" for image, label in zip(split.images, split.labels, strict=True)]
        for split in (dataset.train, dataset.test)
    ]


def numbered(root, **classes):
    for kind, count in classes.items():
        for number in range(count):
            draw(root / "pets" / kind / f"{number}.png", np.full((1, 1, 1), number, np.uint8))


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (0.26, {"cat": 10, "dog": 2, "cow": 1}),  # 13 of 50: 10.4, 1.56, 1.04
        (7, {"cat": 5, "dog": 1, "cow": 1}),  # 5.6, 0.84, 0.56, each at least one
        (12, {"cat": 10, "dog": 1, "cow": 1}),  # 9.6, 1.44, 0.96: the one short goes to the largest rest
        (3, {"cat": 1, "dog": 1, "cow": 1}),
        (47, {"cat": 39, "dog": 5, "cow": 3}),
        (0.5, {"cat": 20, "dog": 3, "cow": 2}),
    ],
)
def test_each_class_gives_its_share_to_the_test_split(tmp_path, test, expected):
    numbered(tmp_path, cat=40, dog=6, cow=4)
    train, held_out = split_names(tmp_path, test=test)
    assert Counter(name.split("/")[0] for name in held_out) == expected
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == 50
    assert held_out == sorted(held_out, key=lambda name: (name.split("/")[0], f"{name}.png"))  # in the files' order


def test_the_split_is_a_function_of_the_names_and_is_drawn(tmp_path):
    for root in (tmp_path, tmp_path / "other"):
        numbered(root, cat=30, dog=30)
    held_out = split_names(tmp_path, test=20)[1]
    assert split_names(tmp_path / "other", test=20, channels=3)[1] == held_out
    cats, dogs = ({name[4:] for name in held_out if name.startswith(kind)} for kind in ("cat", "dog"))
    assert len(cats) == 10
    assert cats != dogs
    assert cats != {str(number) for number in range(10)}
    numbered(tmp_path, cat=31, dog=31)  # one more of each
    assert len(set(split_names(tmp_path, test=20)[1]) & set(held_out)) >= 18


@pytest.mark.parametrize("test", [0.01, 2, 8, 0.99])
def test_a_test_split_that_loses_a_class_is_refused(tmp_path, test):
    numbered(tmp_path, cat=4, dog=4, cow=2)
    text = f"test: {test} does not leave an image of every class in each split; there are 10 images, 3 classes"
    with pytest.raises(ValueError, match=text):
        read(tmp_path, test=test)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    numbered(tmp_path, cat=9, dog=1)
    with pytest.raises(ValueError, match="the smallest of 1 images"):
        read(tmp_path, test=3)


def test_test_is_needed_where_there_is_no_test_split_and_only_there(tmp_path):
    pets(tmp_path)
    with pytest.raises(ValueError, match=r"test: 0\.5 is not needed: .*/pets has a test split; leave it out"):
        read(tmp_path, test=0.5)
    shutil.rmtree(tmp_path / "pets")
    pets(tmp_path, "")
    with pytest.raises(ValueError, match=r"/pets has no folders train and test.* such as test: 0\.2"):
        read(tmp_path)


# Pixels


def gray16(values):
    return Image.fromarray(np.array(values, np.uint16))


def palette(colours, transparent=None):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def row(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


HALF_RED_ON_WHITE = (255, 127, 127)  # alpha 128: (1 - 128 / 255) * 255 = 127
MODES = {
    "1": (row("1", 0, 255), [[[0, 255]]]),
    "L": (row("L", 7, 200), [[[7, 200]]]),
    "L, one value transparent": (row("L", 7, 200), [[[255, 200]]]),
    "LA": (row("LA", (7, 255), (0, 0), (0, 51)), [[[7, 255, 204]]]),
    "I;16": (gray16([[0, 65535, 257 * 100, 257 * 100 + 129]]), [[[0, 255, 100, 101]]]),
    "P": (palette([RED, BLUE]), [[[255, 0]], [[0, 0]], [[0, 255]]]),
    "P, one colour transparent": (palette([RED, BLUE], transparent=0), [[[255, 0]], [[255, 0]], [[255, 255]]]),
    "RGB": (row("RGB", RED, GREEN), [[[255, 0]], [[0, 255]], [[0, 0]]]),
    "RGBA": (row("RGBA", (*RED, 128), (*GREEN, 255)), [[[255, 0]], [[127, 255]], [[127, 0]]]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_gray_or_rgb_on_white(tmp_path, mode):
    image, expected = MODES[mode]
    alone(tmp_path, image, **({"transparency": 7} if "one value" in mode else {}))
    assert first(read(tmp_path)).tolist() == expected


def test_cmyk_becomes_rgb(tmp_path):
    alone(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "one.jpg", quality=100)
    assert np.abs(first(read(tmp_path)).astype(int) - np.array(RED)[:, None, None]).max() <= 3


def test_of_a_film_the_first_picture_is_taken(tmp_path):
    pictures = [Image.new("RGB", (4, 6), colour) for colour in (RED, BLUE)]
    alone(tmp_path, pictures[0], "one.gif", save_all=True, append_images=pictures[1:])
    assert first(read(tmp_path))[:, 0, 0].tolist() == list(RED)


TURNS = {  # EXIF 2.32, 4.6.4, tag Orientation: which sides of what is seen the stored row 0 and column 0 are
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["one.png", "one.webp", "one.jpg"])
def test_images_are_turned_as_exif_says(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.kron(noise(3, 2, 3), np.ones((8, 8, 1), np.uint8))  # 16x24, of flat squares that JPEG keeps
    lossless = {"quality": 100} | ({"lossless": True} if name == "one.webp" else {"subsampling": 0})
    alone(tmp_path, stored, name, exif=exif, **({} if name == "one.png" else lossless))
    expected = TURNS[orientation](stored).transpose(2, 0, 1)
    found = first(read(tmp_path))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (5 if name == "one.jpg" else 0)


def test_channels_are_one_where_every_file_is_gray(tmp_path):
    pets(tmp_path, channels=1)
    assert read(tmp_path).shape == (1, 6, 4)
    gray = first(read(tmp_path))
    three = read(tmp_path, channels=3)
    assert np.array_equal(first(three), np.repeat(gray, 3, 0))
    draw(tmp_path / "pets/test/dog/0.png", noise(0))
    assert read(tmp_path).shape == (3, 6, 4)
    one = read(tmp_path, channels=1)
    luma = noise(0) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision
    assert np.abs(one.test.images[2, 0].numpy() - luma).max() <= 0.51
    (tmp_path / "pets/test/dog/0.png").unlink()
    assert read(tmp_path).shape == (1, 6, 4)


def test_files_of_different_sizes_need_a_size(tmp_path):
    pets(tmp_path)
    draw(tmp_path / "pets/train/dog/1.png", noise(0, 20, 30))
    with pytest.raises(ValueError, match=r"train/cat/0.png is 6x4, train/dog/1.png is 20x30; set size, .*size: 32"):
        read(tmp_path)
    assert read(tmp_path, size=5).shape == (3, 5, 5)
    assert read(tmp_path, size=[5, 7]).shape == (3, 5, 7)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (7, 9)])
@pytest.mark.parametrize("size", [[10, 20], [20, 10], [16, 16]])
def test_fit_agrees_with_cropping_or_padding_by_hand(tmp_path, height, width, size):
    image = Image.fromarray(noise(1, height, width))
    alone(tmp_path, image)
    found = {fit: first(read(tmp_path, size=size, fit=fit)) for fit in ("crop", "pad", "stretch")}
    high, wide = size

    def resized(part, high=high, wide=wide):
        return np.asarray(functional.resize(part, [high, wide])).transpose(2, 0, 1).astype(int)

    assert np.abs(found["stretch"] - resized(image)).max() <= 1
    by_hand = image.resize((wide, high), Image.Resampling.BILINEAR, box=middle(image, wide / high))
    assert np.array_equal(found["crop"], np.asarray(by_hand).transpose(2, 0, 1))
    scale = min(high / height, wide / width)
    inner = round(height * scale), round(width * scale)
    top, left = round((high - inner[0]) / 2), round((wide - inner[1]) / 2)
    padded = np.zeros((3, high, wide), int)
    padded[:, top : top + inner[0], left : left + inner[1]] = resized(image, *inner)
    assert np.abs(found["pad"] - padded).max() <= 1


def middle(image, ratio):
    """The largest box in the middle whose width is `ratio` times its height: left, upper, right, lower."""
    width, height = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
    return (
        (image.width - width) / 2,
        (image.height - height) / 2,
        (image.width + width) / 2,
        (image.height + height) / 2,
    )


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    smooth = Image.fromarray(noise(5, 4, 6)).resize((960, 640), Image.Resampling.BICUBIC)
    alone(tmp_path, smooth, "one.jpg", quality=95)
    content = (tmp_path / "pets/train/a/one.jpg").read_bytes()
    assert module._decode(content, 3, (16, 40)).size == (120, 80)
    assert module._decode(content, 3, (160, 160)).size == (480, 320)
    assert module._decode(content, 3, None).size == (960, 640)
    found = first(read(tmp_path, size=[16, 24])).astype(int)
    assert np.abs(found - np.asarray(smooth.resize((24, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)).max() <= 4


# The cache


def images_in(cache):
    return sorted(path.name for path in cache.glob("*.images"))


def same(one, other):
    """Two data sets hold the same."""
    return (one.classes, one.files) == (other.classes, other.files) and all(
        torch.equal(getattr(getattr(one, split), field), getattr(getattr(other, split), field))
        for split in ("train", "test")
        for field in ("images", "labels")
    )


def test_what_is_unchanged_is_decoded_once(tmp_path, cache, decoded):
    pets(tmp_path)
    notes = []
    made = read(tmp_path, notes.append)
    assert len(decoded) == 8
    assert notes == [f"{tmp_path}/pets: decoding 8 image files once, to be kept in {cache}"]
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert same(read(tmp_path, notes.append), made)
    assert len(decoded) == 8
    assert len(notes) == 1
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert sorted(path.suffix for path in before) == [".images", ".lock"]


def test_writing_into_a_split_does_not_change_the_cache(tmp_path):
    pets(tmp_path)
    before = first(read(tmp_path)).copy()
    read(tmp_path).train.images.zero_()
    assert before.any()
    assert np.array_equal(first(read(tmp_path)), before)


def test_a_folder_that_moves_keeps_its_images(tmp_path, decoded):
    pets(tmp_path)
    made = read(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pets").rename(tmp_path / "elsewhere/pets")
    assert same(read(tmp_path / "elsewhere"), made)
    assert len(decoded) == 8


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
    before = read(tmp_path)
    old = images_in(cache)
    decoded.clear()
    expected = edit(tmp_path / "pets")
    after = read(tmp_path)
    assert decoded == expected
    assert len(images_in(cache)) == 1, "the old cache is removed"
    assert images_in(cache) != old
    assert (after.files == before.files) == (edit is touch), "the digest is that of the files' content and names"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "new")
    assert same(read(tmp_path), after)


def test_a_change_of_channels_or_size_that_others_bring_decodes_all(tmp_path, decoded):
    pets(tmp_path, channels=1)
    read(tmp_path)
    decoded.clear()
    draw(tmp_path / "pets/train/cat/0.png", noise(8))
    dataset = read(tmp_path)
    assert len(decoded) == 8
    assert np.array_equal(first(dataset), noise(8).transpose(2, 0, 1))


def test_each_setting_has_a_cache_of_its_own(tmp_path, cache, decoded):
    pets(tmp_path)
    for _ in range(2):
        for changes in ({}, {"size": 5}, {"size": 5, "fit": "pad"}, {"channels": 1}, {"unreadable": "skip"}):
            read(tmp_path, **changes)
    assert len(decoded) == 4 * 8
    assert len(images_in(cache)) == 4


def test_other_bytes_of_the_same_size_and_time_are_noticed_by_a_recheck(tmp_path, decoded):
    pets(tmp_path)
    path = draw(tmp_path / "pets/train/cat/0.bmp", noise(20))
    age(path)
    before = read(tmp_path)
    draw(path, noise(21))
    age(path)
    assert same(read(tmp_path), before)
    decoded.clear()
    after = read(tmp_path, recheck=True)
    assert len(decoded) == 9
    assert not torch.equal(after.train.images, before.train.images)
    assert after.files != before.files
    assert same(read(tmp_path), after)


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
    made = read(tmp_path)
    path = the_cache(cache)
    content = path.read_bytes()
    path.unlink()  # cut off where it is mapped, it would stop this process
    path.write_bytes(DAMAGES[damage](content))
    assert same(read(tmp_path), made)
    assert len(decoded) == 16
    assert path.read_bytes() == content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_cache_does_more_than_change_pixels(tmp_path, cache, data):
    pets(tmp_path, each=1)
    made = read(tmp_path, recheck=True)
    path = the_cache(cache)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.sampled_from([0, len(content), len(content) // 2])) or len(content) :]
    path.unlink()
    path.write_bytes(content)
    found = read(tmp_path)
    assert found.files == made.files
    assert found.train.images.shape == made.train.images.shape
    assert found.train.labels.tolist() == made.train.labels.tolist()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, cache):
    pets(tmp_path)
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(OutputError, match=f"^{cache}: the cache of decoded images cannot be kept there: "):
        read(tmp_path)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, cache, monkeypatch):
    pets(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OutputError, match=r"folders/\w+-\w+\.images: cannot be written: No space left on device"):
        read(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 72 - 1))
    monkeypatch.setattr(module, "_load", None)  # nothing is decoded for a disk that has no room
    with pytest.raises(OutputError, match="needs 0 MB, the disk has 0 MB free"):
        read(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_overwritten(tmp_path, cache):
    pets(tmp_path)
    read(tmp_path)
    place = the_cache(cache).name.split("-")[0]
    (cache / f"{place}.part").write_bytes(bytes(10**6))
    add(tmp_path / "pets")
    assert len(read(tmp_path).train) == 5
    assert len(list(cache.iterdir())) == 2


def test_of_two_processes_one_decodes(tmp_path, cache, monkeypatch):
    pets(tmp_path)
    made = read(tmp_path)
    path = the_cache(cache)
    aside = path.rename(tmp_path / "aside")
    monkeypatch.setattr(module, "_load", None)
    waiting = threading.Event()
    notes = []

    def report(note: str) -> None:
        notes.append(note)
        waiting.set()

    found = []
    other = threading.Thread(target=lambda: found.append(read(tmp_path, report)), daemon=True)
    with FileLock(cache / f"{path.name.split('-')[0]}.lock"):
        other.start()
        assert waiting.wait(20)
        aside.rename(path)
    other.join(20)
    assert notes == ["waiting for another process that is decoding the same folder"]
    assert same(found[0], made)


# Files that cannot be read


def test_an_unreadable_image_is_named_and_left_out_when_told_to(tmp_path, decoded):
    pets(tmp_path)
    (tmp_path / "pets/train/cat/0.png").write_bytes(b"")
    whole = (tmp_path / "pets/train/dog/1.png").read_bytes()
    (tmp_path / "pets/train/dog/1.png").write_bytes(whole[:-30])
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            read(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}/pets/train/cat/0.png: not a readable image: not one of PNG, JPEG, BMP, WEBP, GIF "
            "(and 1 more files); mend or remove it, or leave out what cannot be read by unreadable: skip"
        )
    assert sorted(decoded) == ["0.png"] * 3 + ["1.png"] * 4
    notes = []
    dataset = read(tmp_path, notes.append, unreadable="skip")
    assert notes == [f"{tmp_path}/pets: 2 of 8 files skipped: train/cat/0.png, train/dog/1.png"]
    assert dataset.train.labels.tolist() == [0, 1]
    assert np.array_equal(dataset.train.images[1].numpy(), noise(0).transpose(2, 0, 1))
    assert len(decoded) == 7
    (tmp_path / "pets/train/dog/1.png").write_bytes(whole)
    assert read(tmp_path, unreadable="skip").train.labels.tolist() == [0, 1, 1]
    assert decoded[7:] == ["1.png"]


def test_what_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    """A mended disk, or rights, change neither a file's size nor its time."""
    pets(tmp_path)
    read_bytes = Path.read_bytes
    refused = True

    def refuse(path: Path) -> bytes:
        if refused and path.match("train/cat/0.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for _ in range(2):
        with pytest.raises(DataError, match=r"cat/0\.png: not a readable image: Permission denied; mend"):
            read(tmp_path)
    assert len(read(tmp_path, unreadable="skip").train) == 3
    refused = False
    assert len(read(tmp_path, unreadable="skip").train) == 4
    assert len(read(tmp_path).train) == 4


@pytest.mark.parametrize(("kind", "which"), [("train", "training"), ("test", "test")])
def test_a_class_that_none_can_be_read_of_is_an_error(tmp_path, kind, which):
    pets(tmp_path)
    for number in (0, 1):
        (tmp_path / f"pets/{kind}/dog/{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"no {which} image of class dog can be read: not one of PNG, "):
        read(tmp_path, unreadable="skip")


@pytest.mark.parametrize("content", [b"", "cut off"])
def test_a_folder_of_broken_files_is_an_error(tmp_path, content):
    pets(tmp_path)
    for path in (tmp_path / "pets").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30] if content else b"")
    with pytest.raises(DataError, match=r"train/cat/0\.png: not a readable image: .* \(and 7 more files\)"):
        read(tmp_path, unreadable="skip")


def claims(width, height):
    """A PNG whose header states that size."""
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content.getvalue()[24:29]
    return content.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content.getvalue()[33:]


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, size, recwarn):
    pets(tmp_path)
    draw(tmp_path / "pets/train/cat/0.png", claims(*size))
    with pytest.raises(DataError, match=r"cat/0\.png: not a readable image: .*pixels"):
        read(tmp_path, size=8)
    assert not recwarn.list


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    pets(tmp_path)
    with (tmp_path / "pets/train/cat/0.png").open("r+b") as opened:
        opened.truncate(2**40)  # a hole: takes no space
    with pytest.raises(DataError, match=r"cat/0\.png: not a readable image: 1,099,511,627,776 bytes, expected at most"):
        read(tmp_path)


def test_a_png_whose_turn_comes_after_its_pixels_is_not_read_as_if_upright(tmp_path):
    """Its size is told from its first bytes; with `size` set it is turned as it should be."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(noise(0)).save(content, "PNG", exif=exif)
    parts, rest = [], content.getvalue()[8:]
    while rest:
        length = 12 + int.from_bytes(rest[:4], "big")
        parts.append(rest[:length])
        rest = rest[length:]
    parts.sort(key=lambda part: {b"IHDR": 0, b"eXIf": 2, b"IEND": 3}.get(part[4:8], 1))
    alone(tmp_path, content.getvalue()[:8] + b"".join(parts))
    with pytest.raises(DataError, match="4x6, where its first bytes say 6x4"):
        read(tmp_path)
    assert np.array_equal(first(read(tmp_path, size=[4, 6])), TURNS[6](noise(0)).transpose(2, 0, 1))


def encoded(kind, **options):
    content = io.BytesIO()
    Image.fromarray(noise(0, 12, 12)).save(content, kind, **options)
    return content.getvalue()


WHOLE = [encoded("PNG"), encoded("JPEG"), encoded("JPEG", progressive=True), *map(encoded, ("BMP", "GIF", "WEBP"))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_images_end_in_an_image_or_a_data_error(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    if not (tmp_path / "pets").exists():
        pets(tmp_path, each=1)
    draw(tmp_path / "pets/train/cat/broken.png", bytes(content))
    skipped = read(tmp_path, size=8, unreadable="skip")
    assert len(skipped.train) in (2, 3)
    if len(skipped.train) == 3:
        assert same(read(tmp_path, size=8), skipped)
    else:
        with pytest.raises(DataError) as caught:
            read(tmp_path, size=8)
        assert str(caught.value).startswith(f"{tmp_path}/pets/train/cat/broken.png: not a readable image: ")
        assert "\n" not in str(caught.value)


# What the program sees


def test_progress_is_told_in_lines(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "REPORT_EVERY", 0)
    pets(tmp_path, each=5)
    notes = []
    read(tmp_path, notes.append)
    assert notes[1:] == [f"{what}: {done} of 20 images" for what in ("reading", "decoding") for done in (16, 20)]
    assert capfd.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "REPORT_EVERY", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    pets(tmp_path)
    notes = []
    read(tmp_path, notes.append)
    out, err = capfd.readouterr()
    assert out == ""
    assert "decoding" in err
    assert len(notes) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({}, {"path": 3}, {"size": 0}, {"size": [8]}, {"size": [8, 8, 8]}, {"size": [8, 0]}, {"size": "32"}),
        *({"channels": 2}, {"fit": "squash"}, {"test": 0}, {"test": 1.0}, {"test": -1}, {"unreadable": "ignore"}),
    ],
)
def test_settings_are_checked(wrong):
    entry = registry.find("folder", "data")
    registry.component(entry, {"path": "pets", "size": [8, 9], "channels": 1, "fit": "pad", "test": 0.5})
    with pytest.raises(ValidationError):
        registry.component(entry, {"path": "pets", **wrong} if wrong else {})


CONFIG = """
data: {name: folder, path: pets, PLACE, val: 2}
model: perceptron
descent: {batch_size: 2}
optim: {name: sgd, lr: 0.1}
train: {epochs: 1, device: cpu}
"""


def test_a_run_trains_on_a_folder_and_mistakes_have_their_exit_codes(dltrain: Run, tmp_path):
    def train(place):
        (tmp_path / "c.yaml").write_text(CONFIG.replace("PLACE", place))
        return dltrain("train", "c.yaml", "--quiet")

    pets(tmp_path)
    done = train("root: .")
    assert done.code == 0, done.err
    missing = train("root: elsewhere")
    assert (missing.code, len(missing.err.splitlines())) == (3, 1)
    draw(tmp_path / "pets/train/cat/0.png", noise(0, 9, 9))
    unequal = train("root: .")
    assert (unequal.code, len(unequal.err.splitlines())) == (2, 1)
    assert "data folder" in unequal.err
    assert "set size" in unequal.err
