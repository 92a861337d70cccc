"""MNIST, in the IDX format of its publisher."""

from __future__ import annotations

from math import prod

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import File
from dltrain.data.files import Files, Layout, Published, Source
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import register

SIDE = 28  # pixels
CLASSES = tuple("0123456789")

# The digests are those of the uncompressed files, however they are gzipped.
FILES = (
    File("train-images-idx3-ubyte", 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    File("train-labels-idx1-ubyte", 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    File("t10k-images-idx3-ubyte", 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    File("t10k-labels-idx1-ubyte", 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)
MNIST = Published(
    title="MNIST",
    train=60_000,
    test=10_000,
    layouts=(Layout("MNIST/raw", FILES),),
    download=9_912_422 + 28_881 + 1_648_877 + 4_542,
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)


@register("data", published=MNIST)
def mnist(files: Files) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, gray, 28x28.

    Raises DataError where the files are missing, broken, or not the published ones.
    """
    source = files.open(MNIST)
    train, test = _split(source, "train"), _split(source, "t10k")
    return Dataset(train, test, CLASSES, source.sha256, source.verified)


def _split(source: Source, name: str) -> Split:
    images = _idx(source, f"{name}-images-idx3-ubyte", 3)
    labels = _idx(source, f"{name}-labels-idx1-ubyte", 1)
    where = source.path(f"{name}-labels-idx1-ubyte")
    if images.shape[1:] != (SIDE, SIDE):
        path = source.path(f"{name}-images-idx3-ubyte")
        raise DataError(f"{path}: expected images of {SIDE}x{SIDE}, found {images.shape[1]}x{images.shape[2]}")
    if len(labels) != len(images):
        raise DataError(f"{where}: expected {len(images)} labels, one for each image, found {len(labels)}")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{where}: expected labels 0..{len(CLASSES) - 1}, found {labels.max()}")
    return Split(images.unsqueeze(1), labels.to(torch.int64))


def _idx(source: Source, name: str, dimensions: int) -> torch.Tensor:
    """The array in an IDX file of bytes: a magic number, each dimension's size, then the elements.

    All numbers are big-endian 32-bit integers; the magic number is 0x0800 + the number of dimensions
    (http://yann.lecun.com/exdb/mnist).
    """
    start = 4 + 4 * dimensions
    shape: list[int] = []

    def size(header: bytes) -> int:
        path = source.path(name)
        if len(header) < start:
            raise DataError(f"{path}: expected a header of {start} bytes, found {len(header)}")
        magic, *sizes = (int.from_bytes(header[at : at + 4], "big") for at in range(0, start, 4))
        if magic != 0x0800 + dimensions:
            raise DataError(f"{path}: expected magic number {0x0800 + dimensions}, found {magic}")
        if not prod(sizes):
            raise DataError(f"{path}: expected images, found none: its header says {sizes}")
        shape.extend(sizes)
        return start + prod(shape)

    content = source.read(name, size)
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)
