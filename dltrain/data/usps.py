"""USPS, in the text format of LIBSVM."""

from __future__ import annotations

import bz2
import io

from dltrain.data.dataset import Dataset, Split
from dltrain.data.download import File
from dltrain.data.files import Files, Layout, Published, Source
from dltrain.errors import DataError
from dltrain.lazy import torch
from dltrain.registry import register

SIDE = 16  # pixels
PIXELS = SIDE * SIDE
TEXT = 1 << 26  # bytes: the most that a file may expand to; the 7,291 images take 256 values of some 12 letters each

# SHA-256 of the files whose MD5 torchvision publishes: ec16c51db3855ca6c91edd34d0e9b197 (usps.bz2) and
# 8ea070ee2aca1ac39742fdd1ef5ed118 (usps.t.bz2).
USPS = Published(
    title="USPS",
    train=7_291,
    test=2_007,
    layouts=(
        Layout(
            "",
            (
                File("usps.bz2", 6_579_383, "3771e9dd6ba685185f89867b6e249233dd74652389f263963b3b741e994b034f"),
                File("usps.t.bz2", 1_831_726, "a9c0164e797d60142a50604917f0baa604f326e9a689698763793fa5d12ffc4e"),
            ),
        ),
    ),
    download=6_579_383 + 1_831_726,
    mirrors=("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",),
    gunzip=False,
)


@register("data", published=USPS)
def usps(files: Files) -> Dataset:
    """USPS: 7,291 + 2,007 handwritten digits of postal codes, gray, 16x16.

    Raises DataError where the files are missing, broken, or not the published ones.  Hull 1994 (IEEE PAMI 16(5));
    https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html#usps
    """
    source = files.open(USPS)
    train, test = _split(source, "usps.bz2"), _split(source, "usps.t.bz2")
    return Dataset(train, test, tuple("0123456789"), source.sha256, source.verified)


def _split(source: Source, name: str) -> Split:
    """A line an image: its label 1..10, which is the digit + 1, then `pixel:value` for pixels 1..256, values -1..1."""
    import numpy

    path = source.path(name)
    content = source.read(name)
    try:
        text = bz2.BZ2File(io.BytesIO(content)).read(TEXT + 1).replace(b":", b" ")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not readable bzip2: {error}") from None
    if not text.strip() or len(text) > TEXT:
        found = "more" if text.strip() else "none"
        raise DataError(f"{path}: expected lines of text, at most {TEXT} bytes uncompressed, found {found}")
    try:
        lines = numpy.loadtxt(io.BytesIO(text), dtype=numpy.float32, comments=None, ndmin=2)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: expected lines of a label and {PIXELS} pairs pixel:value: {reason}") from None
    if lines.shape[1] != 1 + 2 * PIXELS or (lines[:, 1::2] != numpy.arange(1, PIXELS + 1)).any():
        raise DataError(f"{path}: expected a label and the pixels 1..{PIXELS} on each line, found others")
    labels, values = lines[:, 0], lines[:, 2::2]
    for what, low, high, wrong in (
        ("labels", 1, 10, labels[~numpy.isin(labels, range(1, 11))]),
        ("values", -1, 1, values[~(abs(values) <= 1)]),  # NaN is among them
    ):
        if len(wrong):
            raise DataError(f"{path}: expected {what} {low}..{high}, found {wrong[0]:g}")
    images = torch.from_numpy((values + 1) * 127.5).round().to(torch.uint8)
    return Split(images.view(-1, 1, SIDE, SIDE), torch.from_numpy(labels).to(torch.int64) - 1)
