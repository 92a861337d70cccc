"""The digits that come with scikit-learn: real data that needs no download."""

from __future__ import annotations

from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files, Published
from dltrain.lazy import torch
from dltrain.registry import register

DIGITS = Published(title="digits", train=1_438, test=359)


@register("data", published=DIGITS)
def digits(files: Files) -> Dataset:
    """Digits: 1,438 + 359 handwritten digits, gray, 8x8; comes with scikit-learn, no download.

    The test split is every fifth image.  https://archive.ics.uci.edu/dataset/80
    """
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)  # 0..16, [1797, 64] and 0..9, [1797]
    images = torch.from_numpy(data).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).to(torch.int64)
    held_out = torch.arange(len(targets)) % 5 == 4
    return Dataset(
        Split(images[~held_out], targets[~held_out]),
        Split(images[held_out], targets[held_out]),
        tuple("0123456789"),
    )
