"""Batches, cut by index from images in memory and made ready on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dltrain.data.dataset import Split
from dltrain.data.prepare import Normalisation
from dltrain.data.random import Random, generator
from dltrain.lazy import torch
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
        device: torch.device,
    ) -> None:
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.normalise = normalise
        self.seed = seed
        self.step_size = step_size
        self.micro_size = micro_size
        self.augment = augment
        self.device = device
        self._epoch = -1
        self._order = torch.empty(0)

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
        """The step's micro-batches: images float32 `[B, C, H, W]`, labels int64 `[B]`, share of the step's images."""
        index = self.order(epoch)[step * self.step_size : (step + 1) * self.step_size]
        for place, part in enumerate(index.split(self.micro_size)):
            images = self.images.index_select(0, part)  # whole images are copied; [part] goes byte by byte
            if self.augment:
                random = generator("augment", self.seed, epoch, step, place, device=self.device)
                for augmentation in self.augment:
                    images = augmentation(images, random)
            yield self.normalise(images), self.labels[part], len(part) / len(index)

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's order: int64 `[N]`, drawn on the CPU so that every device trains in the same one."""
        if epoch != self._epoch:
            order = torch.randperm(len(self.labels), generator=generator("order", self.seed, epoch))
            self._order, self._epoch = order.to(self.device), epoch
        return self._order
