"""Batches, cut by index from images in memory and made ready on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dltrain.data.dataset import Split
from dltrain.data.prepare import Normalisation
from dltrain.data.random import Random, generator
from dltrain.lazy import F, torch
from dltrain.registry import Component


class Normalise:
    """uint8 `[B, C, H, W]` in 0..255 -> float32 of mean 0 and standard deviation 1 over the training images."""

    def __init__(self, normalisation: Normalisation, device: torch.device, memory_format: torch.memory_format) -> None:
        self.mean = torch.tensor(normalisation.mean, device=device)[:, None, None] * 255
        self.scale = 1 / (torch.tensor(normalisation.std, device=device)[:, None, None] * 255)
        self.memory_format = memory_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=self.memory_format)  # on bytes: a quarter of the traffic
        return torch.sub(images, self.mean).mul_(self.scale)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Back to pixels in 0..1, for people to look at."""
        return (images / self.scale + self.mean).div(255).clamp(0, 1)


class Batches:
    """The training batches of a run.

    Derived, not restored: the order of an epoch is a function of (seed, epoch), the augmentation of a micro-batch of
    (seed, epoch, step, its place in the step).  So a position in a run is two integers.
    """

    def __init__(
        self,
        split: Split,
        normalise: Normalise,
        *,
        seed: int,
        step_size: int,
        micro_size: int,
        augment: Sequence[Component],
        classes: int,
        balance: bool,
        device: torch.device,
    ) -> None:
        self.pixels = split.images.to(device)
        self.labels = split.labels.to(device)
        self.normalise = normalise
        self.seed = seed
        self.step_size = step_size
        self.micro_size = micro_size
        self.augment = augment
        self.classes = classes
        self.device = device
        self.odds = class_odds(split.labels) if balance else None
        self._epoch = -1
        self._order = torch.empty(0)

    @property
    def images(self) -> int:
        """Images in an epoch."""
        return len(self.labels)

    @property
    def steps(self) -> int:
        """Steps in an epoch; the last one takes the images that are left."""
        return -(-len(self.labels) // self.step_size)

    def images_before(self, step: int) -> int:
        """Images that the steps before this one take."""
        return min(step * self.step_size, len(self.labels))

    def images_in(self, step: int) -> int:
        return self.images_before(step + 1) - self.images_before(step)

    def step(self, epoch: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """The step's micro-batches: images float32 `[B, C, H, W]`, targets, share of the step's images.

        Targets are the labels, int64 `[B]`, or after a mixing shares of the classes, float32 `[B, classes]`.
        """
        index = self.order(epoch)[step * self.step_size : (step + 1) * self.step_size]
        for place, part in enumerate(index.split(self.micro_size)):
            images = self.pixels.index_select(0, part)  # whole images are copied; [part] goes byte by byte
            targets = self.labels[part]
            random = Random(step, place, seed=self.seed, epoch=epoch, index=part, device=self.device)
            for augmentation in self.augment:
                if augmentation.kind == "mixing":
                    images, targets = augmentation.build(images, shares(targets, self.classes), random)
                else:
                    images = augmentation.build(images, random)
            yield self.normalise(images), targets, len(part) / len(index)

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's order: int64 `[N]`, drawn on the CPU so that every device trains in the same one."""
        if epoch != self._epoch:
            random = generator("order", self.seed, epoch)
            if self.odds is None:
                order = torch.randperm(len(self.labels), generator=random)
            else:
                order = torch.multinomial(self.odds, len(self.labels), replacement=True, generator=random)
            self._order, self._epoch = order.to(self.device), epoch
        return self._order


def class_odds(labels: torch.Tensor) -> torch.Tensor:
    """float64 `[N]`: what makes every class equally likely when an image of labels int64 `[N]` is drawn."""
    return 1 / labels.bincount().double()[labels]


def shares(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """Targets as shares of the classes, float32 `[B, classes]`: labels int64 `[B]` as ones; shares as they are."""
    return targets if targets.is_floating_point() else F.one_hot(targets, classes).float()


def labels_of(targets: torch.Tensor) -> torch.Tensor:
    """The class with the largest share, int64 `[B]`; labels as they are."""
    return targets.argmax(1) if targets.is_floating_point() else targets
