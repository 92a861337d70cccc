from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from data_files import write_file, write_svhn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from dltrain.data import svhn as svhn_module
from dltrain.data.files import Files
from dltrain.data.svhn import SVHN, SVHN_EXTRA, svhn
from dltrain.errors import DataError
from dltrain.registry import find

TRAIN = "train_32x32.mat"
COMPRESSED = pytest.mark.parametrize("compressed", [True, False])


def terms(root, **changes):
    return Files(root, **{"verify": False, "download": False} | changes)


@COMPRESSED
def test_images_and_labels_are_those_in_the_files(tmp_path, compressed):
    written = write_svhn(tmp_path, 31, 22, compressed=compressed)
    dataset = svhn(terms(tmp_path))
    assert np.array_equal(dataset.train.images.numpy(), written.train_images)
    assert np.array_equal(dataset.train.labels.numpy(), written.train_labels)
    assert np.array_equal(dataset.test.images.numpy(), written.test_images)
    assert np.array_equal(dataset.test.labels.numpy(), written.test_labels)
    assert (dataset.shape, dataset.classes) == ((3, 32, 32), tuple("0123456789"))
    assert not dataset.verified
    assert list(dataset.files) == [TRAIN, "test_32x32.mat"]
    dataset.train.images.view(-1).zero_()  # in one piece, and ours to write to


def test_torchvision_reads_the_same(tmp_path, monkeypatch):
    from torchvision import datasets

    write_svhn(tmp_path)
    digest = hashlib.md5((tmp_path / TRAIN).read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "train", ["", TRAIN, digest])
    theirs, ours = datasets.SVHN(tmp_path, "train"), svhn(terms(tmp_path)).train
    assert np.array_equal(ours.images.numpy(), theirs.data)
    assert np.array_equal(ours.labels.numpy(), theirs.labels)


def test_a_matrix_stored_as_bytes_is_read_whatever_its_class(tmp_path):
    """MATLAB keeps a matrix of doubles as bytes where they suffice; so may these labels be kept."""
    write_svhn(tmp_path, 30, compressed=False)
    content = bytearray((tmp_path / TRAIN).read_bytes())
    flags = content.index(struct.pack("<II", 6, 8), 3072 * 30) + 8  # of the second array
    assert content[flags] == 9  # mxUINT8_CLASS
    content[flags] = 6  # mxDOUBLE_CLASS
    write_file(tmp_path / TRAIN, content)
    assert np.array_equal(loadmat(tmp_path / TRAIN)["y"][:, 0] % 10, svhn(terms(tmp_path)).train.labels.numpy())


def test_the_extra_images_follow_the_training_images(tmp_path):
    write_svhn(tmp_path, 12, 5, n_extra=9, seed=3)
    plain, both = svhn(terms(tmp_path)), svhn(terms(tmp_path), extra=True)
    write_svhn(tmp_path / "extra", 9, 1, seed=4)
    alone = svhn(terms(tmp_path / "extra")).train
    assert torch.equal(both.train.images, torch.cat([plain.train.images, alone.images]))
    assert torch.equal(both.train.labels, torch.cat([plain.train.labels, alone.labels]))
    assert torch.equal(both.test.images, plain.test.images)
    assert set(both.files) == {TRAIN, "test_32x32.mat", "extra_32x32.mat"}
    (tmp_path / "extra_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"SVHN: extra_32x32\.mat not found"):
        svhn(terms(tmp_path), extra=True)


def test_published_facts(tmp_path):
    assert find("svhn", "data").facts["published"] is SVHN
    assert SVHN.download == 182_040_794 + 64_275_384
    assert [file.name for file in SVHN_EXTRA.layouts[0].files] == [TRAIN, "test_32x32.mat", "extra_32x32.mat"]
    write_svhn(tmp_path)
    with pytest.raises(DataError, match=r"train_32x32\.mat: not the published file: expected SHA-256 435e94d6"):
        svhn(terms(tmp_path, verify=True))


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(name, shape, elements, kind=2):
    parts = [(6, struct.pack("<II", 9, 0)), (5, struct.pack(f"<{len(shape)}i", *shape)), (1, name), (kind, elements)]
    return element(14, b"".join(element(*part) for part in parts))


def compressed(content):
    packed = zlib.compress(content)
    return struct.pack("<II", 15, len(packed)) + packed


IMAGES = matrix(b"X", (32, 32, 3, 2), bytes(6144))
LABELS = matrix(b"y", (2, 1), b"\x01\x0a")
BROKEN = {
    "nothing": (b"", "expected a header of 128 bytes"),
    "header alone": (HEADER, "expected arrays X and y, found none"),
    "other version": (HEADER[:124] + b"\x00\x02IM", "expected a header of 128 bytes"),
    "big-endian": (HEADER[:124] + b"\x01\x00MI" + IMAGES + LABELS, "expected a header of 128 bytes"),
    "no labels": (HEADER + IMAGES, "expected arrays X and y, found X"),
    "cut short": (HEADER + IMAGES + LABELS[:-8], ": an array is cut short"),
    "cut in a tag": (HEADER + IMAGES + LABELS + b"\x0e\0\0", "requires a buffer of 8 bytes"),
    "cut in compression": (HEADER + compressed(IMAGES)[:-4], "a compressed array is cut short"),
    "not zlib": (HEADER + element(15, b"garbage!"), "Error -3"),
    "a cell": (HEADER + element(1, b"x"), "expected arrays of at most .* found type 1 of 1"),
    "huge": (HEADER + struct.pack("<II", 14, 2**32 - 1), "expected arrays of at most .* found type 14 of 4294967295"),
    "compressed cell": (HEADER + compressed(element(1, b"x")), r"expected an array \(type 14\), found type 1"),
    "wider": (HEADER + matrix(b"X", (32, 33, 3, 2), bytes(6336)) + LABELS, r"found \[32, 33, 3, 2\] and \[2, 1\]"),
    "flat": (HEADER + matrix(b"X", (6144, 1), bytes(6144)) + LABELS, r"found \[6144, 1\]"),
    "labels in a row": (HEADER + IMAGES + matrix(b"y", (1, 2), b"\1\2"), r"and \[1, 2\]"),
    "too few labels": (HEADER + IMAGES + matrix(b"y", (1, 1), b"\1"), r"and \[1, 1\]"),
    "label 0": (HEADER + IMAGES + matrix(b"y", (2, 1), b"\1\0"), r"expected labels 1\.\.10, found 0"),
    "label 11": (HEADER + IMAGES + matrix(b"y", (2, 1), b"\1\x0b"), r"expected labels 1\.\.10, found 11"),
    "doubles": (
        HEADER + matrix(b"y", (2, 1), bytes(16), kind=9),
        r"expected uint8 \(type 2\) \[2, 1\] for 'y', found type 9",
    ),
    "fewer bytes than it says": (
        HEADER + matrix(b"y", (3, 1), b"\1\2"),
        r"expected uint8 .* \[3, 1\] for 'y', found .* 2 bytes",
    ),
    "negative shape": (HEADER + matrix(b"y", (-2, -1), b"\1\2"), r"expected uint8 .* \[-2, -1\]"),
    "no shape": (HEADER + matrix(b"y", (), b"\1"), r"expected uint8 .* \[\] for 'y'"),
    "small element of 5": (
        HEADER + element(14, element(6, bytes(8)) + struct.pack("<HH4s", 5, 5, b"")),
        "a small element of 5",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, case):
    content, message = BROKEN[case]
    write_svhn(tmp_path)
    path = write_file(tmp_path / TRAIN, content)
    with pytest.raises(DataError, match=message) as caught:
        svhn(terms(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_files_built_here_are_read_when_they_are_whole(tmp_path):
    write_svhn(tmp_path)
    write_file(tmp_path / TRAIN, HEADER + compressed(IMAGES) + matrix(b"other", (2, 1), b"\0\0") + LABELS)
    train = svhn(terms(tmp_path)).train
    assert train.labels.tolist() == [1, 0]
    assert train.images.shape == (2, 3, 32, 32)


def test_no_more_than_the_published_images_take_is_inflated(tmp_path, monkeypatch):
    write_svhn(tmp_path, 20)
    monkeypatch.setitem(svhn_module.COUNTS, TRAIN, 20)
    assert len(svhn(terms(tmp_path)).train) == 20
    bomb = matrix(b"X", (32, 32, 3, 10_000), bytes(10_000 * 3072))
    write_file(tmp_path / TRAIN, HEADER + compressed(bomb))
    inflated = []

    class Counting:
        def __init__(self):
            self.real = zlib.decompressobj()
            self.eof = False

        def decompress(self, data, limit):
            inflated.append(self.real.decompress(data, limit))
            return inflated[-1]

    class Zlib:
        error, decompressobj = zlib.error, Counting

    monkeypatch.setattr(svhn_module, "zlib", Zlib)
    with pytest.raises(DataError, match=f"an array expands to more than {20 * 3072 + 1024} bytes"):
        svhn(terms(tmp_path))
    assert sum(map(len, inflated)) == 20 * 3072 + 1025


@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.data())
def test_only_data_errors_come_out_of_arbitrary_files(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    write_svhn(root, 2, 1)
    arrays = IMAGES + LABELS
    structure = [*range(128 + 56), *range(128 + len(IMAGES), 128 + len(arrays))]  # what lies around the pixels
    good = HEADER + arrays
    at = data.draw(st.sampled_from(structure))
    inserted = data.draw(st.binary(max_size=9) | st.sampled_from([struct.pack("<I", 2**32 - 1), b"\0\0\0\x80"]))
    removed = data.draw(st.integers(0, 9))
    content = good[:at] + inserted + good[at + removed :]
    if data.draw(st.booleans()):
        content = content[:128] + compressed(content[128 : 128 + len(IMAGES)]) + content[128 + len(IMAGES) :]
    write_file(root / TRAIN, content)
    try:
        dataset = svhn(terms(root))
    except DataError:
        return
    assert dataset.train.images.shape[1:] == (3, 32, 32)


@COMPRESSED
def test_scipy_writes_names_of_every_length(tmp_path, compressed):
    """A name of up to four letters shares its tag's eight bytes, a longer one does not."""
    write_svhn(tmp_path)
    arrays = {
        "X": np.zeros((32, 32, 3, 1), np.uint8),
        "longer": np.ones((7, 1), np.uint8),
        "y": np.full((1, 1), 4, np.uint8),
    }
    savemat(tmp_path / TRAIN, arrays, do_compression=compressed)
    assert svhn(terms(tmp_path)).train.labels.tolist() == [4]
