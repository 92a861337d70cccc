"""Image folders: which files are found, and how they are split."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from image_files import draw, noise, pets, read_pets
from PIL import Image
from pydantic import ValidationError

from dltrain import registry
from dltrain.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, a new one for each test."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "dltrain" / "folders"


# Layouts


@pytest.mark.parametrize("held_out", ["test", "val", "valid"])
def test_the_images_are_those_of_the_files_with_the_numbers_of_their_classes(tmp_path, held_out):
    drawn = pets(tmp_path, "train/", f"{held_out}/")
    dataset = read_pets(tmp_path)
    assert dataset.classes == ("cat", "dog")
    for split, below in ((dataset.train, "train"), (dataset.test, held_out)):
        names = [f"{below}/{kind}/{number}.png" for kind in ("cat", "dog") for number in (0, 1)]
        assert np.array_equal(split.images.numpy(), np.stack([drawn[name] for name in names]))
        assert split.labels.tolist() == [0, 0, 1, 1]


def test_test_goes_before_val_and_what_is_not_used_is_said(tmp_path):
    drawn = pets(tmp_path, "train/", "test/", "val/")
    notes = []
    dataset = read_pets(tmp_path, notes.append)
    assert np.array_equal(dataset.test.images[0].numpy(), drawn["test/cat/0.png"])
    assert notes[0] == f"{tmp_path}/pets: trains on train, tests on test; not used: val"


def test_an_absolute_path_needs_no_root(tmp_path):
    pets(tmp_path)
    assert len(read_pets(tmp_path / "elsewhere", path=str(tmp_path / "pets")).train) == 4


def test_folders_within_a_class_belong_to_it(tmp_path):
    pets(tmp_path)
    extra = noise(99)
    draw(tmp_path / "pets/train/cat/deep/er/0.PNG", extra)
    dataset = read_pets(tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(dataset.train.images[2].numpy(), extra.transpose(2, 0, 1))


def test_hidden_files_are_passed_over_and_others_counted(tmp_path):
    pets(tmp_path)
    for name in (
        "train/.cache/x.png",
        "train/cat/.hidden.png",
        "train/cat/Thumbs.db",
        "test/notes.txt",
        "top.png",
        "test/x.png",
    ):
        draw(tmp_path / "pets" / name, b"no image")
    (tmp_path / "pets/train/dog/nowhere.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "pets/train/dog/round.png").symlink_to(tmp_path / "pets/train/dog/round.png")
    os.mkfifo(tmp_path / "pets/train/dog/pipe.png")  # to open it would wait for ever
    notes = []
    assert len(read_pets(tmp_path, notes.append).train) == 4
    assert notes[0] == (
        f"{tmp_path}/pets: 7 files ignored: not images (.png, .jpg, .jpeg, .bmp, .webp, .gif), or in no class's folder"
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
    dataset = read_pets(tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(dataset.train.images[5].numpy(), drawn["train/cat/0.png"])


def test_names_may_be_any_bytes(tmp_path, capfd):
    for split in (b"train", b"test"):
        for kind in (b"caf\xe9", b"new\nline"):
            path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pets/" + split + b"/" + kind + b"/\xff\n.png"))
            draw(path, noise(0))
    for _ in range(2):
        assert read_pets(tmp_path).classes == ("caf\\udce9", "new\\nline")
    path.write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        read_pets(tmp_path)
    assert f"{tmp_path}/pets/test/new\\nline/\\udcff\\n.png: not a readable image" in str(caught.value)
    print(caught.value)  # can be encoded


@pytest.mark.parametrize("names", [("test", "val"), ("plane", "train")])
def test_a_class_may_have_a_splits_name(tmp_path, names):
    numbered(tmp_path, **dict.fromkeys(names, 4))
    dataset = read_pets(tmp_path, test=0.5)
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
        read_pets(tmp_path, test=0.5)
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
        read_pets(tmp_path, path=path)
    assert message.format(root=tmp_path) in str(caught.value)
    assert "data.root: ." in str(caught.value)


def test_a_home_is_found(tmp_path, monkeypatch):
    pets(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(read_pets(tmp_path, path="~/pets").train) == 4


# Splits


def split_names(root, **changes):
    """The names of the training and of the test images, which hold their numbers as pixels."""
    dataset = read_pets(root, **changes)
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
        read_pets(tmp_path, test=test)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    numbered(tmp_path, cat=9, dog=1)
    with pytest.raises(ValueError, match="the smallest of 1 images"):
        read_pets(tmp_path, test=3)


def test_test_is_needed_where_there_is_no_test_split_and_only_there(tmp_path):
    pets(tmp_path)
    with pytest.raises(ValueError, match=r"test: 0\.5 is not needed: .*/pets has a test split; leave it out"):
        read_pets(tmp_path, test=0.5)
    shutil.rmtree(tmp_path / "pets")
    pets(tmp_path, "")
    with pytest.raises(ValueError, match=r"/pets has no folders train and test.* such as test: 0\.2"):
        read_pets(tmp_path)


# Files that cannot be read


def test_an_unreadable_image_is_named_and_left_out_when_told_to(tmp_path):
    pets(tmp_path)
    (tmp_path / "pets/train/cat/0.png").write_bytes(b"")
    whole = (tmp_path / "pets/train/dog/1.png").read_bytes()
    (tmp_path / "pets/train/dog/1.png").write_bytes(whole[:-30])
    with pytest.raises(DataError) as caught:
        read_pets(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/pets/train/cat/0.png: not a readable image: not one of PNG, JPEG, BMP, WEBP, GIF "
        "(and 1 more files); mend or remove it, or leave out what cannot be read by unreadable: skip"
    )
    notes = []
    dataset = read_pets(tmp_path, notes.append, unreadable="skip")
    assert notes == [f"{tmp_path}/pets: 2 of 8 files skipped: train/cat/0.png, train/dog/1.png"]
    assert dataset.train.labels.tolist() == [0, 1]
    assert np.array_equal(dataset.train.images[1].numpy(), noise(0).transpose(2, 0, 1))
    assert np.array_equal(dataset.test.images[0].numpy(), noise(6).transpose(2, 0, 1))


def test_of_many_skipped_files_three_are_named(tmp_path):
    pets(tmp_path, each=5)
    for path in (tmp_path / "pets/test/dog").glob("[1-4].png"):
        path.write_bytes(b"")
    notes = []
    read_pets(tmp_path, notes.append, unreadable="skip")
    names = ", ".join(f"test/dog/{number}.png" for number in (1, 2, 3))
    assert notes[-1] == f"{tmp_path}/pets: 4 of 20 files skipped: {names}, …"


def test_what_pillow_passes_over_is_not_warned_of(tmp_path, recwarn):
    pets(tmp_path)
    claims = Image.new("1", (10_000, 10_000))  # more pixels than Pillow thinks safe
    draw(tmp_path / "pets/train/cat/0.png", claims)
    with pytest.raises(DataError, match=r"cat/0\.png: not a readable image: 10,000 x 10,000 pixels"):
        read_pets(tmp_path, size=8)
    assert not recwarn.list


@pytest.mark.parametrize(("kind", "which"), [("train", "training"), ("test", "test")])
def test_a_class_that_none_can_be_read_of_is_an_error(tmp_path, kind, which):
    pets(tmp_path)
    for number in (0, 1):
        (tmp_path / f"pets/{kind}/dog/{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"no {which} image of class dog can be read: not one of PNG, "):
        read_pets(tmp_path, unreadable="skip")


@pytest.mark.parametrize("content", [b"", "cut off"])
def test_a_folder_of_broken_files_is_an_error(tmp_path, content):
    pets(tmp_path)
    for path in (tmp_path / "pets").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30] if content else b"")
    with pytest.raises(DataError, match=r"train/cat/0\.png: not a readable image: .* \(and 7 more files\)"):
        read_pets(tmp_path, unreadable="skip")


# What the program sees


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
