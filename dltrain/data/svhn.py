"""SVHN, in the MATLAB files of its publisher."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from math import prod
from typing import IO, NamedTuple

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import CHUNK, File
from dltrain.data.files import Files, Layout, Published, Source
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import register

SHAPE = (32, 32, 3)  # height, width, channels
TRAIN, TEST, EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
COUNTS = {TRAIN: 73_257, TEST: 26_032, EXTRA: 531_131}

# The digests are those of tensorflow_datasets/url_checksums.
FILES = (
    File(TRAIN, 182_040_794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
    File(TEST, 64_275_384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
)
EXTRA_FILE = File(EXTRA, 1_329_278_602, "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3")
SVHN = Published(
    title="SVHN",
    train=COUNTS[TRAIN],
    test=COUNTS[TEST],
    layouts=(Layout("", FILES),),
    download=sum(file.limit for file in FILES),
    mirrors=("https://ufldl.stanford.edu/housenumbers/",),
    gunzip=False,
)
SVHN_EXTRA = replace(SVHN, layouts=(Layout("", (*FILES, EXTRA_FILE)),))


@register("data", published=SVHN)
def svhn(files: Files, *, extra: bool = False) -> Dataset:
    """SVHN: 73,257 + 26,032 digits of house numbers, photographed, colour, 32x32.

    extra: train on the 531,131 easier images of extra_32x32.mat too: 1.3 GB to download, 4 GB of memory to read

    Raises DataError where the files are missing, broken, or not the published ones.  Netzer et al. 2011;
    http://ufldl.stanford.edu/housenumbers
    """
    source = files.open(SVHN_EXTRA if extra else SVHN)
    train, test = _split(source, TRAIN), _split(source, TEST)
    if extra:
        more = _split(source, EXTRA)
        train = Split(torch.cat([train.images, more.images]), torch.cat([train.labels, more.labels]))
    return Dataset(train, test, tuple("0123456789"), source.sha256, source.verified)


def _split(source: Source, name: str) -> Split:
    path = source.path(name)
    with source.opened(name) as opened:
        try:
            arrays = _arrays(opened, prod(SHAPE) * COUNTS[name])
        except (ValueError, struct.error, zlib.error) as error:
            raise DataError(f"{path}: not a MATLAB 5 file as SVHN's publisher has them: {error}") from None
    if not {"X", "y"} <= arrays.keys():
        raise DataError(f"{path}: expected arrays X and y, found {', '.join(arrays) or 'none'}")
    x, y = arrays["X"], arrays["y"]
    count = x.shape[-1]
    if x.shape != (*SHAPE, count) or y.shape != (count, 1):
        raise DataError(f"{path}: expected X [32, 32, 3, N] and y [N, 1], found {list(x.shape)} and {list(y.shape)}")
    labels = y.elements.to(torch.int64)
    if labels.min() < 1 or labels.max() > 10:
        raise DataError(f"{path}: expected labels 1..10, found {labels.max() if labels.max() > 10 else labels.min()}")
    images = x.elements.view(count, 3, 32, 32)  # MATLAB has the last dimension outermost: N, channels, width, height
    for block in images.split(4096):  # in place: the extra images have 1.6 GB
        block.copy_(block.mT.clone())
    return Split(images, labels % 10)  # 10 is the digit 0


class _Array(NamedTuple):
    """A MATLAB array: its shape, and its elements uint8 with the last dimension outermost."""

    shape: tuple[int, ...]
    elements: torch.Tensor


MATRIX, COMPRESSED, UINT8 = 14, 15, 2  # types of data elements


def _arrays(opened: IO[bytes], largest: int) -> dict[str, _Array]:
    """The arrays of bytes in a MATLAB 5 file, by name.

    largest: elements in the largest array; nothing larger is read or inflated

    Raises ValueError, struct.error or zlib.error where the file is broken.  SciPy's reader takes whatever size a file
    claims.  The format: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf, chapter 1.
    """
    if opened.read(128)[124:] != b"\x00\x01IM":
        raise ValueError("expected a header of 128 bytes that ends in version 5, little-endian")
    limit = largest + 1024  # for what precedes the elements
    arrays: dict[str, _Array] = {}
    while tag := opened.read(8):
        kind, size = struct.unpack("<II", tag)
        if kind == COMPRESSED:
            content = _inflated(opened, size, limit)
        elif kind == MATRIX and size <= limit:
            content = bytearray(tag + opened.read(size))
            if len(content) < 8 + size:
                raise ValueError("an array is cut short")
        else:
            raise ValueError(f"expected arrays of at most {limit} bytes, found type {kind} of {size}")
        name, array = _array(content)
        arrays[name] = array
    return arrays


def _inflated(opened: IO[bytes], size: int, limit: int) -> bytearray:
    inflater = zlib.decompressobj()
    content = bytearray()
    while size > 0 and (chunk := opened.read(min(CHUNK, size))):
        size -= len(chunk)
        content += inflater.decompress(chunk, limit + 1 - len(content))
        if len(content) > limit:
            raise ValueError(f"an array expands to more than {limit} bytes")
    if not inflater.eof:
        raise ValueError("a compressed array is cut short")
    return content


def _array(content: bytearray) -> tuple[str, _Array]:
    """A matrix: its flags, dimensions, name and elements, each with a tag of its own."""
    matrix, _, _, at = _element(content, 0)
    if matrix != MATRIX:
        raise ValueError(f"expected an array (type {MATRIX}), found type {matrix}")
    _, _, _, at = _element(content, 8)
    _, start, size, at = _element(content, at)
    shape = struct.unpack_from(f"<{size // 4}i", content, start)
    _, start, size, at = _element(content, at)
    name = content[start : start + size].decode("ascii", "replace")[:80]
    kind, start, size, _ = _element(content, at)
    if kind != UINT8 or not shape or min(shape) < 1 or size != prod(shape):
        raise ValueError(
            f"expected uint8 (type {UINT8}) {list(shape)[:8]} for {name!r}, found type {kind}, {size} bytes"
        )
    return name, _Array(shape, torch.frombuffer(content, dtype=torch.uint8, count=size, offset=start))


def _element(content: bytearray, at: int) -> tuple[int, int, int, int]:
    """(type, start, size, where the next one is) of a data element; one of up to 4 bytes may share its tag's 8."""
    kind, size = struct.unpack_from("<II", content, at)
    if kind >> 16:
        kind, start, size = kind & 0xFFFF, at + 4, kind >> 16
        end = at + 8
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        start = at + 8
        end = start + size + -size % 8
    if start + size > len(content):
        raise ValueError(f"an element of {size} bytes is cut short")
    return kind, start, size, end
