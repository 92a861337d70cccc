"""MNIST and the data sets in its format (IDX) and size: Fashion-MNIST, KMNIST, EMNIST."""

from __future__ import annotations

import gzip
import string
import zipfile
from math import prod
from typing import Literal

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import File
from dltrain.data.files import Files, Layout, Published, Size, Source, expand
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import register

SIDE = 28  # pixels
DIGITS = tuple(string.digits)


def _layout(folder: str, counts: dict[str, int], *sha256: str) -> Layout:
    """The IDX files of images and labels of each split, uncompressed.

    counts: the splits' names in the files' -> images; sha256: of the files in their order, where it is published
    """
    sizes: dict[str, int] = {}
    for name, count in counts.items():
        sizes |= {f"{name}-images-idx3-ubyte": 16 + SIDE * SIDE * count, f"{name}-labels-idx1-ubyte": 8 + count}
    digests = sha256 or (None,) * len(sizes)
    return Layout(folder, tuple(File(*file, digest) for file, digest in zip(sizes.items(), digests, strict=True)))


MNIST = Published(
    title="MNIST",
    train=60_000,
    test=10_000,
    layouts=(
        _layout(
            "MNIST/raw",
            {"train": 60_000, "t10k": 10_000},
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    download=9_912_422 + 28_881 + 1_648_877 + 4_542,
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

# SHA-256 of what the files unzip to whose MD5 the publisher gives (https://github.com/zalandoresearch/fashion-mnist)
FASHION_MNIST = Published(
    title="Fashion-MNIST",
    train=60_000,
    test=10_000,
    layouts=(
        _layout(
            "FashionMNIST/raw",
            {"train": 60_000, "t10k": 10_000},
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    download=26_421_880 + 29_515 + 4_422_102 + 5_148,
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
)
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# Digests are published of the gzipped files only (tensorflow_datasets/url_checksums), so those are what is kept.
KMNIST_GZIPPED = Layout(
    "KMNIST/raw",
    (
        File(
            "train-images-idx3-ubyte.gz",
            18_165_135,
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        ),
        File("train-labels-idx1-ubyte.gz", 29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        File(
            "t10k-images-idx3-ubyte.gz", 3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"
        ),
        File("t10k-labels-idx1-ubyte.gz", 5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
    ),
)
KMNIST = Published(
    title="KMNIST",
    train=60_000,
    test=10_000,
    layouts=(KMNIST_GZIPPED, _layout("KMNIST/raw", {"train": 60_000, "t10k": 10_000})),
    download=18_165_135 + 29_497 + 3_041_136 + 5_120,
    mirrors=("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    gunzip=False,
)
KMNIST_CLASSES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

# A digest is published of the archive only (tensorflow_datasets/url_checksums), so that is what is kept and read.
EMNIST_ZIP = Layout(
    "EMNIST/raw",
    (File("gzip.zip", 561_753_746, "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e"),),
)
EMNIST = {
    split: Published(
        title=f"EMNIST {split}",
        train=train,
        test=test,
        layouts=(EMNIST_ZIP, _layout("EMNIST/raw", {f"emnist-{split}-train": train, f"emnist-{split}-test": test})),
        download=561_753_746,
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        gunzip=False,
    )
    for split, train, test in (
        ("byclass", 697_932, 116_323),
        ("bymerge", 697_932, 116_323),
        ("balanced", 112_800, 18_800),
        ("letters", 124_800, 20_800),
        ("digits", 240_000, 40_000),
        ("mnist", 60_000, 10_000),
    )
}
# The small letters that do not look like their capitals: Cohen et al. 2017 (arXiv 1702.05373), table II
MERGED = (*DIGITS, *string.ascii_uppercase, *"abdefghnqrt")
EMNIST_CLASSES = {
    "byclass": (*DIGITS, *string.ascii_uppercase, *string.ascii_lowercase),
    "bymerge": MERGED,
    "balanced": MERGED,
    "letters": tuple(string.ascii_lowercase),
    "digits": DIGITS,
    "mnist": DIGITS,
}


@register("data", published=MNIST)
def mnist(files: Files) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, gray, 28x28.

    Raises DataError where the files are missing, broken, or not the published ones.
    """
    return _dataset(files.open(MNIST), ("train", "t10k"), DIGITS)


@register("data", published=FASHION_MNIST)
def fashion_mnist(files: Files) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 pictures of ten kinds of clothes, gray, 28x28.

    Raises DataError as `mnist` does.  https://github.com/zalandoresearch/fashion-mnist
    """
    return _dataset(files.open(FASHION_MNIST), ("train", "t10k"), FASHION_CLASSES)


@register("data", published=KMNIST)
def kmnist(files: Files) -> Dataset:
    """KMNIST: 60,000 + 10,000 cursive hiragana, one of each row of the table, gray, 28x28.

    Raises DataError as `mnist` does.  http://codh.rois.ac.jp/kmnist
    """
    return _dataset(files.open(KMNIST), ("train", "t10k"), KMNIST_CLASSES)


@register("data", published=EMNIST["balanced"])
def emnist(
    files: Files, *, split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced"
) -> Dataset:
    """EMNIST: handwritten letters and digits, gray, 28x28, in six selections.

    split: byclass: 62 classes, 697,932 + 116,323 images; bymerge: 47, letters whose small form looks like the capital
        being one; balanced: these 47, 112,800 + 18,800; letters: 26, 124,800 + 20,800; digits: 240,000 + 40,000;
        mnist: 60,000 + 10,000 digits

    Raises DataError as `mnist` does.  https://www.nist.gov/itl/products-and-services/emnist-dataset
    """
    first = 1 if split == "letters" else 0  # the label of the first class: the letters count from 1
    names = (f"emnist-{split}-train", f"emnist-{split}-test")
    dataset = _dataset(files.open(EMNIST[split]), names, EMNIST_CLASSES[split], first)
    for images in (dataset.train.images, dataset.test.images):
        for block in images.split(4096):  # they are stored by columns; turned in place, as there may be 550 MB of them
            block.copy_(block.mT.clone())
    return dataset


def _dataset(source: Source, names: tuple[str, str], classes: tuple[str, ...], first: int = 0) -> Dataset:
    train, test = (_split(source, name, classes, first) for name in names)
    return Dataset(train, test, classes, source.sha256, source.verified)


def _split(source: Source, name: str, classes: tuple[str, ...], first: int) -> Split:
    images, path = _idx(source, f"{name}-images-idx3-ubyte", 3)
    labels, where = _idx(source, f"{name}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path}: expected images of {SIDE}x{SIDE}, found {images.shape[1]}x{images.shape[2]}")
    if len(labels) != len(images):
        raise DataError(f"{where}: expected {len(images)} labels, one for each image, found {len(labels)}")
    last = first + len(classes) - 1
    if labels.min() < first or labels.max() > last:
        found = labels.max() if labels.max() > last else labels.min()
        raise DataError(f"{where}: expected labels {first}..{last}, found {found}")
    return Split(images.unsqueeze(1), labels.to(torch.int64) - first)


def _idx(source: Source, name: str, dimensions: int) -> tuple[torch.Tensor, str]:
    """The array in an IDX file of bytes, and what to call that file in an error.

    The file: a magic number, each dimension's size, then the elements.  All numbers are big-endian 32-bit integers;
    the magic number is 0x0800 + the number of dimensions (http://yann.lecun.com/exdb/mnist).
    """
    start = 4 + 4 * dimensions
    shape: list[int] = []
    where = _where(source, name)

    def size(header: bytes) -> int:
        if len(header) < start:
            raise DataError(f"{where}: expected a header of {start} bytes, found {len(header)}")
        magic, *sizes = (int.from_bytes(header[at : at + 4], "big") for at in range(0, start, 4))
        if magic != 0x0800 + dimensions:
            raise DataError(f"{where}: expected magic number {0x0800 + dimensions}, found {magic}")
        if not prod(sizes):
            raise DataError(f"{where}: expected images, found none: its header says {sizes}")
        shape.extend(sizes)
        return start + prod(shape)

    content = _read(source, name, where, size)
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape), where


def _where(source: Source, name: str) -> str:
    if source.layout is EMNIST_ZIP:
        return f"{source.path('gzip.zip')}: gzip/{name}.gz"
    return str(source.path(f"{name}.gz" if source.layout is KMNIST_GZIPPED else name))


def _read(source: Source, name: str, where: str, size: Size) -> bytearray:
    """The uncompressed bytes of an IDX file in the layout that was found."""
    if source.layout is EMNIST_ZIP:
        with source.opened("gzip.zip") as opened:
            if not source.verified:  # a stranger's zip may hold anything in any size
                raise DataError(f"{source.path('gzip.zip')}: not the published file: only that zip is read; extract it")
            with zipfile.ZipFile(opened) as archive, archive.open(f"gzip/{name}.gz") as member:
                return expand(where, gzip.GzipFile(fileobj=member), size)
    if source.layout is KMNIST_GZIPPED:
        with source.opened(f"{name}.gz") as opened:
            return expand(where, gzip.GzipFile(fileobj=opened), size)
    return source.read(name, size)
