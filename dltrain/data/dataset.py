"""What a data set is once it is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from dltrain.errors import DataError
from dltrain.lazy import torch


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]` in 0..255 and labels int64 `[N]` in 0..classes-1, both on the CPU as read.

    Of lines of symbols, labels are int64 `[N, L]`, with -1 after a line's end.

    mapped: the images are mapped from a file, and read as they are used
    """

    images: torch.Tensor
    labels: torch.Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> Split:
        """The images that `index` (int64 `[M]`) names, in its order."""
        return Split(self.images.index_select(0, index), self.labels[index])  # [index] copies byte by byte


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of their classes.

    files: where each file came from and what was in it: name under the data root -> "sha256:…" of its bytes
    verified: every file was compared with its published checksum
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    verified: bool = True

    def __post_init__(self) -> None:
        for name, split in (("training", self.train), ("test", self.test)):
            images, labels = split.images, split.labels
            if images.ndim != 4 or images.dtype != torch.uint8:
                raise DataError(f"{name} images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
            if len(labels) != len(images) or labels.ndim not in (1, 2) or labels.dtype != torch.int64:
                raise DataError(
                    f"{name} labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
                )
            if not len(labels):
                raise DataError(f"the {name} split holds no images")
            low, high = int(labels.min()), int(labels.max())
            if low < (0 if labels.ndim == 1 else -1) or high >= len(self.classes):
                raise DataError(f"{name} labels: expected 0..{len(self.classes) - 1}, found {low if low < 0 else high}")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            shapes = f"{list(self.train.images.shape[1:])} and {list(self.test.images.shape[1:])}"
            raise DataError(f"training and test images differ in size: {shapes}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width
