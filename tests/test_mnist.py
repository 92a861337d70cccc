from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from data_files import idx, write_file, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.files import Files
from dltrain.data.mnist import MNIST, mnist
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


def test_torchvision_reads_the_same(tmp_path):
    from torchvision import datasets

    write_mnist(tmp_path)
    theirs = datasets.MNIST(tmp_path, train=False)
    ours = mnist(terms(tmp_path)).test
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_another_copy_is_refused_unless_it_may_be_one(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte: not the published file: expected SHA-256 ba89.*false"
    ):
        mnist(terms(tmp_path, verify=True))


def test_published_facts_agree_with_each_other():
    entry = find("mnist", "data")
    assert entry.facts["published"] is MNIST
    assert sum(file.limit for file in MNIST.layouts[0].files) == 28 * 28 * 70_000 + 70_000 + 2 * 16 + 2 * 8


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
    "content", [gzip.compress(IMAGES)[:-9], b"not gzip at all", gzip.compress(IMAGES) + b"tail", b""]
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
