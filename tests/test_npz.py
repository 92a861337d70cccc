from __future__ import annotations

import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import npz as npz_module
from dltrain.data.files import Files
from dltrain.data.npz import npz
from dltrain.errors import ConfigError, DataError
from dltrain.registry import component, find

RANDOM = np.random.default_rng(0)


def images(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def labels(count):
    return np.arange(count) % 3


def arrays(**changes):
    """Six training and three test images, gray."""
    made = {"x_train": images(6, 8, 9), "y_train": labels(6), "x_test": images(3, 8, 9), "y_test": labels(3)}
    return {name: value for name, value in (made | changes).items() if value is not None}


def read(root, written, **settings):
    np.savez(root / "data.npz", **written)
    return npz(Files(root), path="data.npz", **settings)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("absolute", [True, False])
def test_images_and_labels_are_those_in_the_file(tmp_path, save, absolute):
    written = arrays()
    save(tmp_path / "data.npz", **written)
    path = str(tmp_path / "data.npz") if absolute else "data.npz"
    dataset = npz(Files(tmp_path / "absent" if absolute else tmp_path), path=path)
    assert np.array_equal(dataset.train.images[:, 0].numpy(), written["x_train"])
    assert np.array_equal(dataset.test.images[:, 0].numpy(), written["x_test"])
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test.labels.tolist() == [0, 1, 2]
    assert dataset.classes == ("0", "1", "2")
    assert dataset.verified
    digest = hashlib.sha256((tmp_path / "data.npz").read_bytes()).hexdigest()
    assert dataset.files == {path: f"sha256:{digest}"}


def test_a_changed_file_has_another_digest(tmp_path):
    first, second = read(tmp_path, arrays()), read(tmp_path, arrays())
    assert first.files != second.files
    assert npz(Files(tmp_path), path="data.npz").files == second.files  # from memory


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((5, 8, 9), None, (1, 8, 9)),
        ((5, 8, 9, 3), None, (3, 8, 9)),
        ((5, 8, 9, 1), None, (1, 8, 9)),
        ((5, 4, 8, 9), None, (4, 8, 9)),
        ((5, 3, 9, 3), "nhwc", (3, 3, 9)),
        ((5, 3, 9, 3), "nchw", (3, 9, 3)),
        ((5, 8, 9, 2), "nhwc", (2, 8, 9)),
    ],
)
def test_channels_are_where_the_shape_or_the_layout_says(tmp_path, shape, layout, expected):
    x = images(*shape)
    dataset = read(tmp_path, {"x": x, "y": labels(5)}, test=1, layout=layout)
    assert dataset.shape == expected
    both = torch.cat([dataset.train.images, dataset.test.images])
    channels_first = (
        x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if shape[-1] == expected[0] != shape[1] else x
    )
    if layout == "nhwc":
        channels_first = x.transpose(0, 3, 1, 2)
    assert sorted(image.numpy().tobytes() for image in both) == sorted(image.tobytes() for image in channels_first)


def test_images_with_channels_first_are_not_copied():
    for x in (images(2, 3, 8, 9), images(2, 8, 9)):
        assert npz_module._images("data.npz", "x", x, None).data_ptr() == x.ctypes.data


@pytest.mark.parametrize(("test", "count"), [(0.25, 5), (7, 7), (0.01, 0), (20, 20)])
def test_x_and_y_are_split_once_and_for_all(tmp_path, test, count):
    x, y = images(20, 8, 9), RANDOM.integers(0, 9, 20)
    if not 0 < count < 20:
        with pytest.raises(ValueError, match=f"test: {test} of 20 images leaves an empty split"):
            read(tmp_path, {"x": x, "y": y}, test=test)
        return
    dataset = read(tmp_path, {"x": x, "y": y}, test=test)
    assert (len(dataset.test), len(dataset.train)) == (count, 20 - count)
    pairs = [
        (image.numpy().tobytes(), int(label))
        for split in (dataset.train, dataset.test)
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    assert sorted(pairs) == sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))
    again = npz(Files(tmp_path), path="data.npz", test=test)
    assert torch.equal(again.test.images, dataset.test.images)
    assert [pairs.index(pair) for pair in pairs] == list(range(20))  # no two images are alike
    assert not np.array_equal(dataset.train.images[:, 0].numpy(), x[: 20 - count])  # drawn, not the last ones


def test_labels_may_stand_in_a_column_and_classes_have_names(tmp_path):
    dataset = read(tmp_path, arrays(y_train=labels(6)[:, None].astype(np.int16)), class_names=["a", "b", "c", "none"])
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.classes == ("a", "b", "c", "none")


UNFIT = {
    "floats": (
        arrays(x_train=images(6, 8, 9) / 255),
        r"x_train: expected uint8 images, found float64; multiply .* 255",
    ),
    "int32": (arrays(x_test=images(3, 8, 9).astype(np.int32)), "x_test: expected uint8 images, found int32$"),
    "objects": (arrays(x_train=np.array([None] * 6)), "Object arrays cannot be loaded.*; save arrays of numbers"),
    "objects as labels": (arrays(y_train=np.array([1, None])), "Object arrays cannot be loaded"),
    "flat": (arrays(x_train=images(6, 72)), r"x_train: expected images \[N, H, W\].*found \(6, 72\)"),
    "empty": (arrays(x_train=images(0, 8, 9), y_train=labels(0)), r"expected images .*found \(0, 8, 9\)"),
    "a number": (arrays(x_train=np.uint8(3)), r"found \(\)"),
    "text labels": (arrays(y_train=np.array(["cat"] * 6)), "y_train: expected whole numbers"),
    "float labels": (arrays(y_train=labels(6) / 1), "y_train: expected whole numbers .* found float64"),
    "one-hot labels": (
        arrays(y_train=np.eye(6, dtype=int)),
        r"y_train: expected whole numbers .* found int64 \(6, 6\)",
    ),
    "no labels": (arrays(y_train=labels(0)), "y_train: expected whole numbers"),
    "label for none": (arrays(y_train=np.int64(1)), "expected a label for each image, found 6 x_train|whole numbers"),
    "negative label": (arrays(y_train=labels(6) - 1), "y_train: expected labels from 0 to 99999, found -1"),
    "huge label": (
        arrays(y_test=np.array([0, 1, 2**64 - 1], np.uint64)),
        "y_test: expected labels .* 18446744073709551615",
    ),
    "too few labels": (arrays(y_train=labels(5)), "expected a label for each image, found 6 x_train and 5 y_train"),
    "other size": (arrays(x_test=images(3, 9, 8)), "training and test images differ in size"),
    "no test labels": (arrays(y_test=None), "expected arrays x_train, y_train, x_test, y_test, or x and y, found"),
    "other names": ({"images": images(2, 8, 9)}, "or x and y, found none"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path, case):
    written, message = UNFIT[case]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "settings", "message"),
    [
        (arrays(), {"test": 2}, "data.npz has x_test and y_test: leave out test"),
        ({"x": images(6, 8, 9), "y": labels(6)}, {}, "data.npz has x and y alone: set test, e.g. to 0.2"),
        (arrays(), {"class_names": ["a", "b"]}, r"class_names: 2 names, but data.npz has labels 0\.\.2"),
        (
            {"x": images(6, 3, 9, 3), "y": labels(6)},
            {"test": 2},
            r"x \(6, 3, 9, 3\) does not tell .*set layout: nhwc or nchw",
        ),
        ({"x": images(6, 8, 9, 2), "y": labels(6)}, {"test": 2}, r"does not tell where its channels are"),
    ],
)
def test_settings_that_do_not_fit_the_arrays_are_the_configs_mistake(tmp_path, written, settings, message):
    np.savez(tmp_path / "data.npz", **written)
    chosen = component(find("npz", "data"), {"path": "data.npz", **settings})
    with pytest.raises(ConfigError, match=message):
        chosen.build(Files(tmp_path))


def test_a_missing_file_is_named_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/data\.npz: cannot be read: .*No such file"):
        npz(Files(tmp_path), path="data.npz")
    with pytest.raises(DataError, match=r"~no-such-user/data\.npz: cannot be read"):
        npz(Files(tmp_path), path="~no-such-user/data.npz")


def npy(array, **header):
    written = io.BytesIO()
    np.lib.format.write_array(written, array)
    content = written.getvalue()
    for old, new in header.items():
        content = content.replace(old.encode(), new.encode())
    return content


def zip_of(**members):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an npz file"),
        (b"PK\3\4 nothing more", "not an npz file"),
        (npy(images(6, 8, 9)), "not an npz file"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ttouch ran\x85R.", "not an npz file"),
        (zip_of(**{"x": b"no array", "y.npy": npy(labels(6))}), "x: expected uint8 images"),
        (zip_of(**{"x.npy": npy(images(6, 8, 9)), "y.npy": npy(labels(6))[:-1]}), "not an npz file"),
        (
            zip_of(**{"x.npy": npy(images(6, 8, 9)).replace(b"(6, 8, 9)", b"(1" + b"0" * 15 + b",)"), "y.npy": b""}),
            "do not fit in memory|not an npz file",
        ),
    ],
)
def test_what_is_no_npz_file_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=f"data.npz: .*{message}"):
        npz(Files(tmp_path), path="data.npz", test=2)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    at=st.integers(0, 10_000),
    removed=st.integers(0, 4),
    inserted=st.binary(max_size=4) | st.sampled_from([b"|O", b"<f8", b"9", b"-", b"True", b"\xff" * 4]),
    layout=st.sampled_from([None, "nchw"]),
)
def test_only_data_errors_come_out_of_arbitrary_files(tmp_path_factory, at, removed, inserted, layout):
    root = tmp_path_factory.mktemp("root")
    good = zip_of(**{"x.npy": npy(images(2, 3, 2, 2)), "y.npy": npy(labels(2))})
    at %= len(good)
    (root / "data.npz").write_bytes(good[:at] + inserted + good[at + removed :])
    try:
        dataset = npz(Files(root), path="data.npz", test=1, layout=layout)
    except DataError:
        return
    assert len(dataset.train) + len(dataset.test) == 2
