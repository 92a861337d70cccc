from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zipfile
from dataclasses import replace
from string import ascii_lowercase, digits

import numpy as np
import pytest
import torch
from data_files import emnist_files, idx, write_file, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import files as files_module
from dltrain.data import mnist as mnist_module
from dltrain.data.download import File
from dltrain.data.files import Files, Layout
from dltrain.data.mnist import (
    EMNIST,
    EMNIST_CLASSES,
    FASHION_MNIST,
    KMNIST,
    MNIST,
    emnist,
    fashion_mnist,
    kmnist,
    mnist,
)
from dltrain.errors import DataError
from dltrain.registry import find

TRAIN_IMAGES = "MNIST/raw/train-images-idx3-ubyte"
TRAIN_LABELS = "MNIST/raw/train-labels-idx1-ubyte"


def terms(root, **changes):
    return Files(root, **{"verify": False, "download": False} | changes)


@pytest.mark.parametrize("gz", [False, True])
def test_images_and_labels_are_those_in_the_files(tmp_path, gz):
    written = write_mnist(tmp_path, n_train=31, n_test=7, gz=gz)
    dataset = mnist(terms(tmp_path))
    assert np.array_equal(dataset.train.images.numpy(), written.train_images)
    assert np.array_equal(dataset.train.labels.numpy(), written.train_labels)
    assert np.array_equal(dataset.test.images.numpy(), written.test_images)
    assert np.array_equal(dataset.test.labels.numpy(), written.test_labels)
    assert dataset.classes == tuple("0123456789")
    assert dataset.shape == (1, 28, 28)
    assert not dataset.verified
    dataset.train.images.zero_()  # what was read is ours to write to


@pytest.mark.parametrize(("factory", "folder"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST"), (kmnist, "KMNIST")])
def test_torchvision_reads_the_same(tmp_path, factory, folder):
    from torchvision import datasets

    write_mnist(tmp_path, folder=folder)
    theirs = getattr(datasets, folder)(tmp_path, train=False)
    ours = factory(terms(tmp_path))
    assert torch.equal(ours.test.images[:, 0], theirs.data)
    assert torch.equal(ours.test.labels, theirs.targets)
    assert ours.classes == tuple(name[:1] if folder == "MNIST" else name for name in theirs.classes)


@pytest.mark.parametrize("split", EMNIST)
def test_torchvision_reads_the_same_letters_lying_on_their_side(tmp_path, split):
    from torchvision import datasets

    for name, content in emnist_files(split, len(EMNIST_CLASSES[split])).items():
        write_file(tmp_path / "EMNIST" / "raw" / name, content)
    theirs = datasets.EMNIST(tmp_path, split, train=True)
    ours = emnist(terms(tmp_path), split=split)
    first = 1 if split == "letters" else 0
    assert torch.equal(ours.train.images[:, 0], theirs.data.transpose(1, 2))
    assert torch.equal(ours.train.labels, theirs.targets - first)
    assert list(ours.classes) == theirs.classes[first:]
    assert not ours.verified
    ours.train.images.view(-1)  # in one piece


def published(content, name):
    return File(name, len(content), hashlib.sha256(content).hexdigest())


def test_the_gzipped_kmnist_is_verified_as_it_lies(tmp_path, monkeypatch):
    written = write_mnist(tmp_path, 30, 10, folder="KMNIST", gz=True)
    raw = tmp_path / "KMNIST" / "raw"
    layout = Layout("KMNIST/raw", tuple(published(path.read_bytes(), path.name) for path in raw.iterdir()))
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz: not the published file: expected SHA-256 51467d"):
        kmnist(terms(tmp_path, verify=True))
    monkeypatch.setattr(mnist_module, "KMNIST_GZIPPED", layout)
    monkeypatch.setattr(mnist_module, "KMNIST", replace(KMNIST, layouts=(layout, *KMNIST.layouts[1:])))
    dataset = kmnist(terms(tmp_path, verify=True))
    assert dataset.verified
    assert dataset.files == {f"KMNIST/raw/{file.name}": f"sha256:{file.sha256}" for file in layout.files}
    assert np.array_equal(dataset.train.images.numpy(), written.train_images)
    assert np.array_equal(dataset.test.labels.numpy(), written.test_labels)
    content = (raw / "t10k-images-idx3-ubyte.gz").read_bytes()
    write_file(raw / "t10k-images-idx3-ubyte.gz", content[:-9])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: cannot be read"):
        kmnist(terms(tmp_path))


@pytest.fixture
def write_zip(tmp_path, monkeypatch):
    """Writes a zip of these members that counts as the published one."""

    def write(members):
        content = zip_of(members)
        write_file(tmp_path / "EMNIST" / "raw" / "gzip.zip", content)
        layout = Layout("EMNIST/raw", (published(content, "gzip.zip"),))
        sets = {split: replace(facts, layouts=(layout, *facts.layouts[1:])) for split, facts in EMNIST.items()}
        monkeypatch.setattr(mnist_module, "EMNIST_ZIP", layout)
        monkeypatch.setattr(mnist_module, "EMNIST", sets)

    return write


def zip_of(members):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def letters(**changes):
    """The members of a zip with the letters; `train_images="…"` puts other bytes in that place."""
    members = {f"gzip/{name}.gz": gzip.compress(content, 1) for name, content in emnist_files("letters", 26).items()}
    for name, content in changes.items():
        split, _, kind = name.partition("_")
        dimensions = 3 if kind == "images" else 1
        members[f"gzip/emnist-letters-{split}-{kind}-idx{dimensions}-ubyte.gz"] = content
    return members


def test_emnist_is_read_from_its_zip_and_nothing_is_extracted(tmp_path, write_zip, monkeypatch):
    write_zip({"../../outside": b"", "gzip/emnist-letters-mapping.txt": b"", **letters()})
    hashed = []
    monkeypatch.setattr(files_module, "_hash", lambda opened, real=files_module._hash: hashed.append(1) or real(opened))
    dataset = emnist(terms(tmp_path, verify=True, recheck=True), split="letters")
    plain = emnist_files("letters", 26)
    images = np.frombuffer(plain["emnist-letters-test-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(plain["emnist-letters-test-labels-idx1-ubyte"], np.uint8, offset=8)
    assert dataset.verified
    assert hashed == [1]  # once for its four members
    assert list(dataset.files) == ["EMNIST/raw/gzip.zip"]
    assert np.array_equal(dataset.test.images[:, 0].numpy(), images.swapaxes(1, 2))
    assert np.array_equal(dataset.test.labels.numpy(), labels - 1)
    assert dataset.classes == tuple(ascii_lowercase)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [files_module.REMEMBERED, "gzip.zip"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("content", [zip_of(letters()), b"", b"PK\5\6" + bytes(18)])
def test_a_zip_that_is_not_the_published_one_is_not_read(tmp_path, content, verify):
    write_file(tmp_path / "EMNIST" / "raw" / "gzip.zip", content)
    with pytest.raises(DataError, match=r"gzip\.zip: not the published file"):
        emnist(terms(tmp_path, verify=verify), split="letters")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": gzip.compress(idx(np.zeros((4, 28, 28))) + bytes(10**6), 1)},
            "train-images-idx3-ubyte.gz: expected at most 3152 bytes uncompressed, found more",
        ),
        (
            {"train_labels": gzip.compress(idx(np.arange(80) % 27))},
            r"labels-idx1-ubyte.gz: expected labels 1..26, found 0",
        ),
        ({"test_labels": gzip.compress(idx(np.arange(70) % 27 + 1))}, "expected labels 1..26, found 27"),
        ({"test_labels": b"not gzip"}, r"gzip\.zip: cannot be read: Not a gzipped file"),
    ],
)
def test_a_broken_member_of_the_zip_is_refused_by_name(tmp_path, write_zip, changes, message):
    write_zip(letters(**changes))
    with pytest.raises(DataError, match=message) as caught:
        emnist(terms(tmp_path), split="letters")
    assert str(tmp_path / "EMNIST" / "raw" / "gzip.zip") in str(caught.value)


def test_a_member_no_more_than_memory_allows_is_inflated(tmp_path, write_zip, monkeypatch):
    monkeypatch.setattr(files_module.expand, "__defaults__", (None, 10_000))
    write_zip(letters(train_images=gzip.compress(struct.pack(">4I", 2051, 10**6, 28, 28) + bytes(10**6), 1)))
    with pytest.raises(DataError, match="expected at most 10000 bytes uncompressed, found more"):
        emnist(terms(tmp_path), split="letters")


def test_another_copy_is_refused_unless_it_may_be_one(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte: not the published file: expected SHA-256 ba89.*false"
    ):
        mnist(terms(tmp_path, verify=True))


@pytest.mark.parametrize("published", [MNIST, FASHION_MNIST, KMNIST, *EMNIST.values()], ids=lambda each: each.title)
def test_published_facts_agree_with_each_other(published):
    count = published.train + published.test
    assert sum(file.limit for file in published.layouts[-1].files) == 28 * 28 * count + count + 2 * 16 + 2 * 8
    assert all(file.sha256 and len(file.sha256) == 64 for file in published.layouts[0].files)
    if not published.gunzip:
        assert published.download == sum(file.limit for file in published.layouts[0].files)


def test_each_data_set_is_registered_with_its_facts():
    facts = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST, "kmnist": KMNIST, "emnist": EMNIST["balanced"]}
    assert {name: find(name, "data").facts["published"] for name in facts} == facts


def test_emnist_has_the_classes_of_its_paper():
    """Cohen et al. 2017 (arXiv 1702.05373), table II."""
    counts = {split: len(names) for split, names in EMNIST_CLASSES.items()}
    assert counts == {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
    assert EMNIST_CLASSES["digits"] == tuple(digits)


IMAGES = idx(np.zeros((4, 28, 28)))
LABELS = idx(np.arange(4))
BROKEN = {
    "labels for images": (TRAIN_IMAGES, LABELS, "expected a header of 16 bytes, found 12"),
    "images for labels": (TRAIN_LABELS, IMAGES, "expected magic number 2049, found 2051"),
    "bad magic": (TRAIN_IMAGES, b"\x00\x00\x0c\x03" + IMAGES[4:], "expected magic number 2051, found 3075"),
    "empty": (TRAIN_IMAGES, b"", "expected a header of 16 bytes, found 0"),
    "short": (TRAIN_IMAGES, IMAGES[:-1], "expected 3152 bytes.*found 3151"),
    "trailing": (TRAIN_LABELS, LABELS + b"\x00", "expected 12 bytes.*found"),
    "no images": (TRAIN_IMAGES, idx(np.zeros((0, 28, 28))), r"found none: its header says \[0, 28, 28\]"),
    "absurd": (TRAIN_IMAGES, struct.pack(">4I", 2051, *3 * [2**32 - 1]), f"expected {(2**32 - 1) ** 3 + 16} bytes"),
    "wrong size": (TRAIN_IMAGES, idx(np.zeros((4, 28, 30))), "expected images of 28x28, found 28x30"),
    "too few labels": (TRAIN_LABELS, idx(np.arange(3)), "expected 4 labels, one for each image, found 3"),
    "label 10": (TRAIN_LABELS, idx(np.array([0, 9, 10, 1])), r"expected labels 0\.\.9, found 10"),
}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, case, gz):
    name, content, message = BROKEN[case]
    write_mnist(tmp_path, n_train=4)
    (tmp_path / name).unlink()
    path = write_file(tmp_path / name, content, gz)
    if gz and case in ("absurd", "trailing"):
        message = "expected"  # the plain sizes are not known before inflating
    with pytest.raises(DataError, match=message) as caught:
        mnist(terms(tmp_path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [gzip.compress(IMAGES, mtime=0)[:-9], b"not gzip at all", gzip.compress(IMAGES, mtime=0) + b"tail", b""]
)
def test_broken_gzip_is_refused(tmp_path, content):
    write_mnist(tmp_path, n_train=4)
    (tmp_path / TRAIN_IMAGES).unlink()
    write_file(tmp_path / f"{TRAIN_IMAGES}.gz", content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        mnist(terms(tmp_path))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    header=st.lists(st.sampled_from([0, 1, 3, 28, 2049, 2051, 2**32 - 1]) | st.integers(0, 2**32 - 1), max_size=5),
    body=st.binary(max_size=40),
    cut=st.integers(0, 60),
    gz=st.booleans(),
    name=st.sampled_from([TRAIN_IMAGES, TRAIN_LABELS]),
)
def test_only_data_errors_come_out_of_arbitrary_files(tmp_path_factory, header, body, cut, gz, name):
    root = tmp_path_factory.mktemp("root")
    write_mnist(root, n_train=1, n_test=1)
    content = (struct.pack(f">{len(header)}I", *header) + body)[: cut or None]
    (root / name).unlink()
    write_file(root / name, content, gz)
    try:
        dataset = mnist(terms(root))
    except DataError:
        return
    assert len(dataset.train) == len(dataset.train.images) == 1  # the other file has one
