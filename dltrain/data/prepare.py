"""From a data set as published to what a run trains on: classes kept, images held out, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dltrain.data.dataset import Dataset, Split
from dltrain.data.random import generator
from dltrain.errors import ConfigError
from dltrain.lazy import torch


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel of the training images, of pixels in 0..1."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Prepared:
    """The splits of a run; `val` is None where nothing is held out."""

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    normalisation: Normalisation
    files: dict[str, str]
    verified: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def splits(self) -> dict[str, Split]:
        """By name: train, val where images are held out, test."""
        return {"train": self.train, **({"val": self.val} if self.val else {}), "test": self.test}

    def split(self, name: str) -> Split:
        """Raises ConfigError where the run holds no images out."""
        if name not in self.splits:
            raise ConfigError("this run has no val split: its config holds no images out (data.val: 0)")
        return self.splits[name]


def prepare(
    dataset: Dataset,
    *,
    seed: int,
    val: float = 0,
    classes: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> Prepared:
    """Keeps the classes, then `limit` of the training images, then holds `val` of those out.

    Which images is a function of the seed; they stay in the files' order.  Raises ConfigError where too little is left.
    """
    train, test, names = dataset.train, dataset.test, dataset.classes
    if classes is not None:
        if train.labels.ndim != 1:
            raise ConfigError("data.classes: each image of this data set has several labels: leave it out")
        numbers = [_class_number(each, names) for each in classes]
        if len(set(numbers)) != len(numbers):
            raise ConfigError(f"data.classes: {list(classes)} names a class twice")
        train, test = (_keep(split, numbers) for split in (train, test))
        if not len(train) or not len(test):
            which = "test" if len(train) else "training"
            raise ConfigError(f"data.classes: the {which} split has no image of {list(classes)}")
        names = tuple(names[number] for number in numbers)
    if limit is not None:
        if limit > len(train):
            raise ConfigError(f"data.limit: {limit} images asked for, the training split has {len(train)}")
        drawn = torch.randperm(len(train), generator=generator("limit", seed))[:limit]
        train = train.subset(drawn.sort().values)
    held_out = round(val * len(train)) if isinstance(val, float) else val
    if held_out >= len(train) or (val and not held_out):
        raise ConfigError(f"data.val: {val} of {len(train)} training images leaves an empty split")
    kept_out = None
    if held_out:
        order = torch.randperm(len(train), generator=generator("val", seed))
        kept_out = train.subset(order[:held_out].sort().values)
        train = train.subset(order[held_out:].sort().values)
    return Prepared(
        train, kept_out, test, names, measure_normalisation(train.images), dict(dataset.files), dataset.verified
    )


def _class_number(which: int | str, names: Sequence[str]) -> int:
    if isinstance(which, str) and which in names:
        return list(names).index(which)
    if isinstance(which, int) and which < len(names):
        return which
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:10]))
    more = ", …" if len(names) > 10 else ""
    raise ConfigError(f"data.classes: no class {which!r}; there is {shown}{more}")


def _keep(split: Split, numbers: Sequence[int]) -> Split:
    renumbered = torch.full((max(int(split.labels.max()), *numbers) + 1,), -1)
    renumbered[list(numbers)] = torch.arange(len(numbers))
    labels = renumbered[split.labels]
    index = (labels >= 0).nonzero().squeeze(1)
    return Split(split.images[index], labels[index])


def measure_normalisation(images: torch.Tensor) -> Normalisation:
    """Per-channel mean and standard deviation of uint8 images `[N, C, H, W]`, from exact integer sums.

    A channel of one value has standard deviation 1 here, so that it is moved and not divided by zero.
    """
    mean, std = [], []
    for channel in range(images.shape[1]):
        total = squares = 0
        for block in images[:, channel].split(4096):
            values = block.to(torch.int32)
            total += int(values.sum())
            squares += int((values * values).sum())
        count = images[:, channel].numel()
        variance = (squares * count - total * total) / count**2  # integers until here
        mean.append(total / count / 255)
        std.append((variance**0.5 / 255) or 1.0)
    return Normalisation(mean, std)
