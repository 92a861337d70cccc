from __future__ import annotations

import bz2

import numpy as np
import pytest
from data_files import libsvm, write_file, write_usps
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import usps as usps_module
from dltrain.data.files import Files
from dltrain.data.usps import USPS, usps
from dltrain.errors import DataError
from dltrain.registry import find


def terms(root, **changes):
    return Files(root, **{"verify": False, "download": False} | changes)


def test_images_and_labels_are_those_in_the_files(tmp_path):
    written = write_usps(tmp_path, 31, 12)
    dataset = usps(terms(tmp_path))
    assert np.array_equal(dataset.train.images.numpy(), written.train_images)
    assert np.array_equal(dataset.train.labels.numpy(), written.train_labels)
    assert np.array_equal(dataset.test.images.numpy(), written.test_images)
    assert np.array_equal(dataset.test.labels.numpy(), written.test_labels)
    assert (dataset.shape, dataset.classes) == ((1, 16, 16), tuple("0123456789"))
    assert set(dataset.files) == {"usps.bz2", "usps.t.bz2"}
    assert not dataset.verified


def test_torchvision_reads_the_same_within_its_rounding_down(tmp_path):
    from torchvision import datasets

    write_usps(tmp_path)
    values = np.linspace(-1, 1, 3 * 256).reshape(3, 16, 16)
    write_file(tmp_path / "usps.t.bz2", bz2.compress(libsvm(values, np.array([1, 7, 10]))))
    theirs, ours = datasets.USPS(tmp_path, train=False), usps(terms(tmp_path)).test
    assert ours.labels.tolist() == theirs.targets == [0, 6, 9]
    difference = ours.images[:, 0].numpy().astype(int) - theirs.data
    assert set(np.unique(difference)) == {0, 1}


def test_the_nearest_level_is_taken(tmp_path):
    write_usps(tmp_path)
    values = np.full((1, 16, 16), -1.0)
    values[0, 0, :5] = [1, 0.5, 0.01, -0.01, -0.995]  # of 127.5 levels each, from level 127.5: 191.25, 128.775, 126.225
    write_file(tmp_path / "usps.bz2", bz2.compress(libsvm(values, np.array([1]))))
    images = usps(terms(tmp_path)).train.images
    assert images[0, 0, 0, :6].tolist() == [255, 191, 129, 126, 1, 0]


def test_the_published_files_are_asked_for(tmp_path):
    assert find("usps", "data").facts["published"] is USPS
    write_usps(tmp_path)
    with pytest.raises(DataError, match=r"usps\.bz2: not the published file: expected SHA-256 3771e9dd"):
        usps(terms(tmp_path, verify=True))


GOOD = libsvm(np.zeros((2, 16, 16)), np.array([1, 10]))
LINES = "expected lines of a label and 256 pairs pixel:value"
BROKEN = {
    "not bzip2": (b"1 1:0", "not readable bzip2"),
    "nothing": (b"", "not readable bzip2: Compressed file ended"),
    "cut short": (bz2.compress(GOOD)[:-5], "not readable bzip2"),
    "no line": (bz2.compress(b"\n \n"), "expected lines of text"),
    "colons": (bz2.compress(b":::"), "expected lines of text"),
    "words": (bz2.compress(b"one 1:-1\n"), LINES),
    "not text": (bz2.compress(b"\xff\xfe\0"), LINES),
    "ragged": (bz2.compress(GOOD + b"1 1:0\n"), LINES),
    "few pixels": (
        bz2.compress(libsvm(np.zeros((2, 15, 16)), np.array([1, 2]))),
        r"expected a label and the pixels 1\.\.256",
    ),
    "other pixels": (bz2.compress(GOOD.replace(b" 7:", b" 8:")), r"expected a label and the pixels 1\.\.256"),
    "label 0": (bz2.compress(GOOD.replace(b"10 1:", b"0 1:")), r"expected labels 1\.\.10, found 0"),
    "label 11": (bz2.compress(GOOD.replace(b"10 1:", b"11 1:")), r"expected labels 1\.\.10, found 11"),
    "half a label": (bz2.compress(GOOD.replace(b"10 1:", b"1.5 1:")), r"expected labels 1\.\.10, found 1\.5"),
    "large": (bz2.compress(GOOD.replace(b" 7:0", b" 7:1.25")), r"expected values -1\.\.1, found 1\.25"),
    "nan": (bz2.compress(GOOD.replace(b" 7:0", b" 7:nan")), r"expected values -1\.\.1, found nan"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, case):
    content, message = BROKEN[case]
    write_usps(tmp_path)
    path = write_file(tmp_path / "usps.t.bz2", content)
    with pytest.raises(DataError, match=message) as caught:
        usps(terms(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_more_than_such_a_file_holds_is_inflated(tmp_path, monkeypatch):
    write_usps(tmp_path)
    monkeypatch.setattr(usps_module, "TEXT", len(GOOD))
    write_file(tmp_path / "usps.bz2", bz2.compress(GOOD))
    write_file(tmp_path / "usps.t.bz2", bz2.compress(GOOD + bytes(10**7)))
    asked = []

    class Counting(bz2.BZ2File):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(usps_module.bz2, "BZ2File", Counting)
    with pytest.raises(DataError, match=rf"usps\.t\.bz2: .*at most {len(GOOD)} bytes uncompressed, found more"):
        usps(terms(tmp_path))
    assert asked == [len(GOOD) + 1] * 2


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    at=st.integers(0, len(GOOD)),
    removed=st.integers(0, 5),
    inserted=st.binary(max_size=5) | st.sampled_from([b"\n", b":", b" ", b"-", b"e999", b"inf", b"_", b"0x1", b"\0"]),
    broken=st.booleans(),
)
def test_only_data_errors_come_out_of_arbitrary_files(tmp_path_factory, at, removed, inserted, broken):
    root = tmp_path_factory.mktemp("root")
    write_usps(root, 1, 1)
    content = bz2.compress(GOOD) if broken else GOOD
    at %= len(content) + 1
    content = content[:at] + inserted + content[at + removed :]
    write_file(root / "usps.bz2", content if broken else bz2.compress(content))
    try:
        dataset = usps(terms(root))
    except DataError:
        return
    assert dataset.train.images.shape == (len(dataset.train), 1, 16, 16)
