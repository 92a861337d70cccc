from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest
from data_files import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    python2_pickle,
    write_cifar10,
    write_cifar100,
    write_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.cifar import cifar10, cifar100
from dltrain.data.files import Files
from dltrain.errors import DataError

BATCH = "cifar-10-batches-py/data_batch_3"
LAYOUTS = pytest.mark.parametrize("layout", ["python", "binary"])


def terms(root, **changes):
    return Files(root, **{"verify": False, "download": False} | changes)


def assert_holds(dataset, written, labels=lambda fine: fine):
    assert np.array_equal(dataset.train.images.numpy(), written.train_images)
    assert np.array_equal(dataset.test.images.numpy(), written.test_images)
    assert np.array_equal(dataset.train.labels.numpy(), labels(written.train_labels))
    assert np.array_equal(dataset.test.labels.numpy(), labels(written.test_labels))


@LAYOUTS
def test_cifar10_images_labels_and_names_are_those_in_the_files(tmp_path, layout):
    written = write_cifar10(tmp_path, n_train=33, n_test=12, layout=layout)
    dataset = cifar10(terms(tmp_path))
    assert_holds(dataset, written)
    assert dataset.classes == CIFAR10_NAMES
    assert dataset.shape == (3, 32, 32)
    assert not dataset.verified
    dataset.test.images.zero_()  # what was read is ours to write to


@LAYOUTS
@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_cifar100_has_fine_and_coarse_labels(tmp_path, layout, labels):
    written = write_cifar100(tmp_path, n_train=120, n_test=110, layout=layout)
    dataset = cifar100(terms(tmp_path), labels=labels)
    assert_holds(dataset, written, lambda fine: fine if labels == "fine" else fine // 5)
    assert dataset.classes == CIFAR100_NAMES[labels]


def test_the_pickled_layout_is_preferred_and_the_binary_one_suffices(tmp_path):
    write_cifar10(tmp_path, seed=1, layout="binary")
    pickled = write_cifar10(tmp_path, seed=2)
    assert_holds(cifar10(terms(tmp_path)), pickled)
    (tmp_path / BATCH).unlink()
    binary = write_cifar10(tmp_path, seed=1, layout="binary")
    notes = []
    dataset = cifar10(terms(tmp_path, verify=True, report=notes.append))
    assert_holds(dataset, binary)
    assert not dataset.verified
    assert len(notes) == 1
    assert "has no published checksum" in notes[0]


def test_another_copy_is_refused_unless_it_may_be_one(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"not the published file: .*data\.verify: false accepts another copy"):
        cifar10(terms(tmp_path, verify=True))


def array_batch(**changes):
    batch = {b"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), b"labels": [3, 9]}
    return batch | {name.encode(): value for name, value in changes.items()}


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(array_batch(), protocol=protocol) for protocol in (3, 4)),
        *(pickle.dumps({key.decode(): value for key, value in array_batch().items()}, protocol=p) for p in (3, 4)),
        python2_pickle(array_batch(data=np.asfortranarray(array_batch()[b"data"]))),
    ],
    ids=["protocol 3", "protocol 4", "text keys, protocol 3", "text keys, protocol 4", "by columns"],
)
def test_copies_that_numpy_wrote_otherwise_hold_the_same(tmp_path, content):
    write_cifar10(tmp_path)
    write_file(tmp_path / "cifar-10-batches-py" / "test_batch", content)
    test = cifar10(terms(tmp_path)).test
    assert np.array_equal(test.images.numpy().reshape(2, -1), array_batch()[b"data"])
    assert test.labels.tolist() == [3, 9]


BROKEN = {
    "no data": ({b"labels": [1]}, r"data: expected an array uint8 \[N, 3072\], found none"),
    "data a list": (array_batch(data=[[1]]), r"data: expected an array uint8 \[N, 3072\], found none"),
    "float data": (array_batch(data=np.zeros((2, 3072), np.float32)), "found another type"),
    "object data": (array_batch(data=np.full((2, 3072), None)), "found another type"),
    "wide data": (array_batch(data=np.zeros((2, 3073), np.uint8)), "found another shape"),
    "flat data": (array_batch(data=np.zeros(6144, np.uint8)), "found another shape"),
    "no images": (array_batch(data=np.zeros((0, 3072), np.uint8), labels=[]), "N > 0"),
    "no labels": (array_batch(labels=None), "labels: expected a list of labels 0..9, found something else"),
    "a number of labels": (array_batch(labels=10**9), "labels: expected a list of labels 0..9"),
    "text labels": (array_batch(labels=[b"cat", b"dog"]), "labels: expected a list of labels 0..9"),
    "negative label": (array_batch(labels=[-1, 0]), "labels: expected a list of labels 0..9"),
    "label 10": (array_batch(labels=[0, 10]), r"expected labels 0\.\.9, found 10"),
    "too few labels": (array_batch(labels=[0]), "expected 2 labels, one for each image, found 1"),
    "a list": ([1, 2], "expected a pickled dict"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_batch_is_refused_by_name(tmp_path, case):
    value, message = BROKEN[case]
    write_cifar10(tmp_path)
    path = write_file(tmp_path / BATCH, python2_pickle(value))
    with pytest.raises(DataError, match=message) as caught:
        cifar10(terms(tmp_path))
    assert str(path) in str(caught.value)


NAMES = [name.encode() for name in CIFAR10_NAMES]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "expected 10 different class names, found 0, 0 different"),
        (b"abcdefghij", "expected 10 different class names, found 0, 0 different"),
        (NAMES[:9], "expected 10 different class names, found 9, 9 different"),
        ([*NAMES[:9], NAMES[0]], "expected 10 different class names, found 10, 9 different"),
        ([*NAMES[:9], b" "], "expected 10 different class names, found 10, 9 different"),
        ([*NAMES, b"person"], "expected 10 different class names, found 11, 11 different"),
        ([*NAMES, b"cat"], "expected 10 different class names, found 11, 10 different"),
        ([*NAMES[:9], b"\xff"], "expected class names in ASCII"),
        ([*NAMES[:9], 3], "expected class names in ASCII"),
    ],
)
def test_class_names_are_checked(tmp_path, names, message):
    write_cifar10(tmp_path)
    write_file(tmp_path / "cifar-10-batches-py" / "batches.meta", python2_pickle({b"label_names": names}))
    with pytest.raises(DataError, match=f"batches.meta: {message}"):
        cifar10(terms(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", b"", "expected one or more records of 3073 bytes, found 0 bytes"),
        ("test_batch.bin", bytes(3072), "expected one or more records of 3073 bytes, found 3072 bytes"),
        ("data_batch_5.bin", bytes(3074), "expected one or more records of 3073 bytes, found 3074 bytes"),
        ("data_batch_1.bin", b"\x0a" + bytes(3072), r"expected labels 0\.\.9, found 10"),
        ("batches.meta.txt", b"cat\ndog\n", "expected 10 different class names, found 2"),
        ("batches.meta.txt", b"\xff\n" * 10, "expected class names in ASCII"),
    ],
)
def test_a_broken_binary_file_is_refused_by_name(tmp_path, name, content, message):
    write_cifar10(tmp_path, layout="binary")
    path = write_file(tmp_path / "cifar-10-batches-bin" / name, content)
    with pytest.raises(DataError, match=message) as caught:
        cifar10(terms(tmp_path))
    assert str(path) in str(caught.value)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def nested_tuples(depth, use):
    """A tuple that takes 2**depth steps to hash, and what is done with it."""
    doubled = (pickle.BINGET + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2 + pickle.BINPUT + b"\0") * depth
    return b"\x80\x04K\x01q\0" + doubled + use + pickle.STOP


def array_of_state(*state):
    """A batch whose array is given this state."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return b"\x80\x02}U\x06labels]K\x07asU\x04data" + array + python2_pickle(state)[2:-1] + b"bs."


def numpy_call(name, *arguments):
    return b"\x80\x02cnumpy\n%b\n" % name + python2_pickle(arguments)[2:-1] + pickle.REDUCE + pickle.STOP


HOSTILE = {
    "system": pickle.dumps(Call(os.system, "touch ran"), protocol=2),
    "system in a batch": pickle.dumps({b"data": Call(os.system, "touch ran")}, protocol=2),
    "eval": pickle.dumps(Call(eval, "open('ran', 'w')"), protocol=4),
    "old style": b"(S'touch ran'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch ran'\no.",
    "new object": b"\x80\x02cos\nsystem\n)\x81.",
    "numpy function": b"\x80\x02cnumpy\nfromfile\n(U\x0b/etc/passwdtR.",
    "numpy submodule": b"\x80\x02cnumpy\nlib.npyio.load\n(U\x01xtR.",
    "stacked name": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ttouch ran\x85R.",
    "persistent": b"\x80\x02U\x01aQ.",
    "extension": b"\x80\x02\x82\x01.",
    "call of text": b"\x80\x02U\x01a)R.",
    "state of a list": b"\x80\x02]}U\x01aU\x01bsb.",
    "long reason": b"\x80\x04cnumpy\ndtype\nN}X\xe8\x03\0\0" + b"a\nb\0" * 250 + b"Ns\x86b.",
    "huge array": numpy_call(b"ndarray", (2**31 - 1, 2**31 - 1)),
    "object type": numpy_call(b"dtype", b"O"),
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "many objects": b"\x80\x04(" + b"]" * 10**6 + b"l.",
    "many objects in a frame": b"\x80\x04\x95" + struct.pack("<Q", 10**6 + 1) + b"(" + b"]" * 10**6 + b"t.",
    "long frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x0fN.",
    "tuples as key": nested_tuples(60, b"}h\0K\x01s"),
    "tuples as keys": nested_tuples(60, b"}(h\0K\x01u"),
    "tuples as keys, old style": nested_tuples(60, b"(h\0K\x01d"),
    "tuples in a set": nested_tuples(60, b"\x8f(h\0\x90"),
    "short state": array_of_state(1, (1, 3072), np.dtype("u1"), False),
    "type that is none": array_of_state(1, (1, 3072), None, False, bytes(3072)),
    "type that is an array": array_of_state(1, (1, 3072), Call(np.ndarray, "u1"), False, bytes(3072)),
    "shape of text": array_of_state(1, b"cat", np.dtype("u1"), False, bytes(3072)),
    "negative shape": array_of_state(1, (-1, 3072), np.dtype("u1"), False, bytes(3072)),
    "huge shape": array_of_state(1, (2**62, 3072), np.dtype("u1"), False, bytes(3072)),
    "few pixels": array_of_state(1, (2, 3072), np.dtype("u1"), False, bytes(3072)),
    "many pixels": array_of_state(1, (1, 3072), np.dtype("u1"), False, bytes(3073)),
    "list of pixels": array_of_state(1, (1, 3072), np.dtype("u1"), False, [0] * 3072),
    "recursive list": b"\x80\x02]q\0h\0a.",
    "never ends": b"\x80\x02N",
    "nothing": b"",
    "no mark": b"\x80\x02u.",
    "empty stack": b"\x80\x02s.",
    "odd items": b"\x80\x02}(U\x01au.",
    "future": b"\x80\xff.",
    "not a pickle": b"PK\x03\x04 a zip",
}


def test_an_array_of_a_sound_state_is_read(tmp_path):
    write_cifar10(tmp_path)
    content = array_of_state(1, (1, 3072), np.dtype("u1"), False, b"\x05" * 3072)
    write_file(tmp_path / "cifar-10-batches-py" / "test_batch", content)
    test = cifar10(terms(tmp_path)).test
    assert (test.images == 5).all()
    assert test.labels.tolist() == [7]


@pytest.mark.parametrize("case", ["many objects", "many objects in a frame"])
def test_a_pickle_cannot_make_many_objects_of_few_bytes(tmp_path, case):
    write_cifar10(tmp_path)
    write_file(tmp_path / BATCH, HOSTILE[case])
    with pytest.raises(DataError, match="it has more opcodes than such a file needs"):
        cifar10(terms(tmp_path))


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_that_a_pickle_names_is_run(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    path = write_file(tmp_path / BATCH, HOSTILE[case])
    with pytest.raises(DataError) as caught:
        cifar10(terms(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()


def test_the_hostile_pickles_would_run_in_an_ordinary_unpickler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case in ("system", "old style", "object", "stacked name"):
        pickle.loads(HOSTILE[case])
        (tmp_path / "ran").unlink()


def test_a_globals_state_does_not_outlive_its_pickle(tmp_path):
    """`BUILD` on a global sets attributes of what stands for it."""
    write_cifar10(tmp_path)
    spoil = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\nN}\x8c\x04name\x8c\x06spoilss\x86b."
    write_file(tmp_path / BATCH, spoil)
    with pytest.raises(DataError):
        cifar10(terms(tmp_path))
    written = write_cifar10(tmp_path)
    assert_holds(cifar10(terms(tmp_path)), written)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(data=st.data())
def test_only_data_errors_come_out_of_arbitrary_pickles(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    write_cifar10(root, n_train=5, n_test=1)
    good = (root / BATCH).read_bytes()
    pixels = good.index(b"T\x00\x0c\x00\x00") + 5  # one image: what lies before and after it is structure
    at = data.draw(st.integers(0, len(good) - 3072 - 1))
    at += 3072 * (at > pixels)
    inserted = data.draw(st.binary(max_size=6) | st.sampled_from([bytes([code]) for code in pickle_opcodes()]))
    removed = data.draw(st.integers(0, 3))
    write_file(root / BATCH, good[:at] + inserted + good[at + removed :])
    try:
        dataset = cifar10(terms(root))
    except DataError:
        return
    assert len(dataset.train) == 5


def pickle_opcodes():
    import pickletools

    return [ord(opcode.code) for opcode in pickletools.opcodes]
