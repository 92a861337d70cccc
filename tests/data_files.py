"""Writes small data sets in their publishers' formats.  The images are noise with a bright stripe for each class."""

from __future__ import annotations

import bz2
import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_NAMES = {
    "fine": tuple(f"kind_{kind}" for kind in range(100)),
    "coarse": tuple(f"group_{group}" for group in range(20)),
}


class Written(NamedTuple):
    """Images uint8 [N, C, H, W] and labels [N] as they were written."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def write_mnist(
    root: Path, n_train: int = 200, n_test: int = 50, seed: int = 0, gz: bool = False, folder: str = "MNIST"
) -> Written:
    """folder: also FashionMNIST or KMNIST"""
    made = _make(n_train, n_test, seed, (1, 28, 28), 10)
    for name, images, labels in (("train", made[0], made[1]), ("t10k", made[2], made[3])):
        write_file(root / folder / "raw" / f"{name}-images-idx3-ubyte", idx(images[:, 0]), gz)
        write_file(root / folder / "raw" / f"{name}-labels-idx1-ubyte", idx(labels), gz)
    return made


def emnist_files(split: str, classes: int, n_train: int = 80, n_test: int = 70, seed: int = 0) -> dict[str, bytes]:
    """Name -> content, where letters count from 1 and images lie by columns."""
    made = _make(n_train, n_test, seed, (1, 28, 28), classes)
    first = 1 if split == "letters" else 0
    files = {}
    for name, images, labels in (("train", made[0], made[1]), ("test", made[2], made[3])):
        files[f"emnist-{split}-{name}-images-idx3-ubyte"] = idx(images[:, 0].swapaxes(1, 2))
        files[f"emnist-{split}-{name}-labels-idx1-ubyte"] = idx(labels + first)
    return files


def write_svhn(
    root: Path, n_train: int = 30, n_test: int = 20, n_extra: int = 0, seed: int = 0, compressed: bool = True
) -> Written:
    """The extra images have the seed after this one; they are not among those returned."""
    from scipy.io import savemat

    made = _make(n_train, n_test, seed, (3, 32, 32), 10)
    parts = [("train", made[0], made[1]), ("test", made[2], made[3])]
    if n_extra:
        extra = _make(n_extra, 1, seed + 1, (3, 32, 32), 10)
        parts.append(("extra", extra[0], extra[1]))
    root.mkdir(parents=True, exist_ok=True)
    for name, images, labels in parts:
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        arrays = {"X": images.transpose(2, 3, 1, 0), "y": y}
        savemat(root / f"{name}_32x32.mat", arrays, do_compression=compressed)
    return made


def write_usps(root: Path, n_train: int = 30, n_test: int = 20, seed: int = 0) -> Written:
    """The images' levels are multiples of 15, so that the six decimals of their values give them back."""
    made = _make(n_train, n_test, seed, (1, 16, 16), 10)
    made = made._replace(train_images=made[0] // 15 * 15, test_images=made[2] // 15 * 15)
    for name, images, labels in (("usps.bz2", made[0], made[1]), ("usps.t.bz2", made[2], made[3])):
        write_file(root / name, bz2.compress(libsvm(images / 127.5 - 1, labels + 1)))
    return made


def libsvm(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Lines `label 1:value 2:value … `, as LIBSVM's data sets have them."""
    rows = images.reshape(len(images), -1)
    lines = [
        f"{label} " + "".join(f"{at}:{value:.6g} " for at, value in enumerate(row, 1))
        for label, row in zip(labels, rows, strict=True)
    ]
    return "\n".join([*lines, ""]).encode()


def write_cifar10(
    root: Path,
    n_train: int = 50,
    n_test: int = 20,
    seed: int = 0,
    layout: Literal["python", "binary"] = "python",
) -> Written:
    """The training images, at least five, are spread over the five batches."""
    made = _make(n_train, n_test, seed, (3, 32, 32), 10)
    parts = [(f"data_batch_{batch + 1}", made[0][batch::5], made[1][batch::5]) for batch in range(5)]
    parts.append(("test_batch", made[2], made[3]))
    for name, images, labels in parts:
        if layout == "python":
            write_file(root / "cifar-10-batches-py" / name, python2_pickle(_batch(images, labels=labels)))
        else:
            write_file(root / "cifar-10-batches-bin" / f"{name}.bin", _records(images, labels))
    if layout == "python":
        meta = {b"num_cases_per_batch": n_train // 5, b"label_names": _bytes(CIFAR10_NAMES), b"num_vis": 3072}
        write_file(root / "cifar-10-batches-py" / "batches.meta", python2_pickle(meta))
    else:
        write_file(root / "cifar-10-batches-bin" / "batches.meta.txt", b"\n".join(_bytes(CIFAR10_NAMES)) + b"\n\n")
    order = np.concatenate([np.arange(n_train)[batch::5] for batch in range(5)])
    return made._replace(train_images=made.train_images[order], train_labels=made.train_labels[order])


def write_cifar100(
    root: Path,
    n_train: int = 200,
    n_test: int = 100,
    seed: int = 0,
    layout: Literal["python", "binary"] = "python",
) -> Written:
    """The labels are fine ones; kind k belongs to group k // 5."""
    made = _make(n_train, n_test, seed, (3, 32, 32), 100)
    for name, images, fine in (("train", made[0], made[1]), ("test", made[2], made[3])):
        if layout == "python":
            batch = _batch(images, fine_labels=fine, coarse_labels=fine // 5)
            write_file(root / "cifar-100-python" / name, python2_pickle(batch))
        else:
            write_file(root / "cifar-100-binary" / f"{name}.bin", _records(images, fine // 5, fine))
    if layout == "python":
        meta = {f"{kind}_label_names".encode(): _bytes(names) for kind, names in CIFAR100_NAMES.items()}
        write_file(root / "cifar-100-python" / "meta", python2_pickle(meta))
    else:
        for kind, names in CIFAR100_NAMES.items():
            write_file(root / "cifar-100-binary" / f"{kind}_label_names.txt", b"\n".join(_bytes(names)) + b"\n")
    return made


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes: magic number, each dimension as a big-endian 32-bit integer, the elements."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_file(path: Path, content: bytes, gz: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if gz:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content, mtime=0)
    path.write_bytes(content)
    return path


class _Python2Pickler(pickle._Pickler):
    """Bytes as Python 2's 8-bit strings, NumPy under its old name: what the published batches are."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(value)]) if short else pickle.BINSTRING + struct.pack("<i", len(value))
        )
        self.write(value)
        self.memoize(value)

    dispatch[bytes] = save_bytes

    def save_str(self, value: str) -> None:
        self.save_bytes(value.encode("ascii"))

    dispatch[str] = save_str

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global


def python2_pickle(value: Any) -> bytes:
    out = io.BytesIO()
    _Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def _make(n_train: int, n_test: int, seed: int, shape: tuple[int, int, int], classes: int) -> Written:
    random = np.random.default_rng(seed)
    made = []
    for count in (n_train, n_test):
        labels = random.permutation(np.arange(count) % classes)
        images = random.integers(0, 100, (count, *shape), dtype=np.uint8)
        columns = np.arange(shape[2]) == (labels * shape[2] // classes)[:, None]  # [count, W]
        images[np.broadcast_to(columns[:, None, None, :], images.shape)] += 150
        made += [images, labels]
    return Written(*made)


def _batch(images: np.ndarray, **labels: np.ndarray) -> dict[bytes, Any]:
    return {
        b"batch_label": b"a small batch",
        **{name.encode(): values.tolist() for name, values in labels.items()},
        b"data": images.reshape(len(images), -1),
        b"filenames": [f"{number}.png".encode() for number in range(len(images))],
    }


def _records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    columns = [values.astype(np.uint8)[:, None] for values in labels]
    return np.concatenate([*columns, images.reshape(len(images), -1)], axis=1).tobytes()


def _bytes(names: tuple[str, ...]) -> list[bytes]:
    return [name.encode() for name in names]
