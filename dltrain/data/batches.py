"""Batches, cut by index and made ready on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from dltrain.data.dataset import Split
from dltrain.data.prefetch import Stream
from dltrain.data.prepare import Normalisation
from dltrain.data.random import Random, generator
from dltrain.lazy import torch
from dltrain.registry import Component
from dltrain.tasks import Task, shares


class Normalise:
    """uint8 `[B, C, H, W]` in 0..255 -> float32 of mean 0 and standard deviation 1 over the training images."""

    def __init__(self, normalisation: Normalisation, device: torch.device, memory_format: torch.memory_format) -> None:
        self.mean = torch.tensor(normalisation.mean, device=device)[:, None, None] * 255
        self.scale = 1 / (torch.tensor(normalisation.std, device=device)[:, None, None] * 255)
        self.memory_format = memory_format
        self._whole = self.scale[None], (-self.mean * self.scale)[None]  # [1, C, H, W] of the images seen last

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._whole[0].shape[1:] != images.shape[1:]:
            shift = self._as_image(-self.mean * self.scale, images.shape)
            self._whole = self._as_image(self.scale, images.shape), shift
        scale, shift = self._whole
        images = images.contiguous(memory_format=self.memory_format)  # on bytes: a quarter of the traffic
        pixels = images.float()  # one that is given bytes makes two copies as floats on a CPU
        return torch.addcmul(shift, pixels, scale, out=pixels)

    def _as_image(self, numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """float32 `[1, C, H, W]` of a number a channel: a CPU is up to five times faster by it with channels last."""
        return numbers.expand(1, *shape[1:]).contiguous(memory_format=self.memory_format)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Back to pixels in 0..1, for people to look at."""
        return (images / self.scale + self.mean).div(255).clamp(0, 1)


class Batches:
    """The training batches of a run.

    Derived, not restored: the order of an epoch is a function of (seed, epoch), the augmentation of a micro-batch of
    (seed, epoch, step, its place in the step).  So a position in a run is two integers.

    Of several processes each has a part of every step's images, in the step's order, and draws what is drawn for its
    images as one process would that has them all; mixings mix the images of one process.
    """

    def __init__(
        self,
        split: Split,
        normalise: Normalise,
        *,
        task: Task,
        seed: int,
        step_size: int,
        micro_size: int,
        augment: Sequence[Component],
        classes: int,
        balance: bool,
        resident: bool,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """resident: keep the images on the device, else where they are; the batches are the same

        rank, world: which process this is, counted from 0, and of how many
        """
        self.labels = split.labels.to(device)
        self.images = len(split)  # in an epoch
        self.normalise = normalise
        self.task = task
        self.seed = seed
        self.step_size = step_size
        self.micro_size = micro_size
        self.augment = augment
        self.classes = classes
        self.device = device
        self.odds = class_odds(split.labels) if balance else None
        self.rank, self.world = rank, world
        self.own_size = part_size(step_size, rank, world)  # of the images of a step
        self.pixels = split.images.to(device) if resident else Stream(split.images, self.own_size, micro_size, device)
        self._epoch = -1
        self._drawn = self._order = self._ordered_labels = torch.empty(0)

    @property
    def steps(self) -> int:
        """Steps in an epoch; the last one takes the images that are left."""
        return -(-self.images // self.step_size)

    def images_before(self, step: int) -> int:
        """Images that the steps before this one take."""
        return min(step * self.step_size, self.images)

    def images_in(self, step: int) -> int:
        return self.images_before(step + 1) - self.images_before(step)

    def own_images_in(self, step: int) -> int:
        """Of a step's images, those of this process."""
        return part_size(self.images_in(step), self.rank, self.world)

    def step(self, epoch: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """The step's micro-batches: images float32 `[B, C, H, W]`, the task's targets, share of the step's images."""
        # kept here: a step of another epoch may be asked for between two parts
        order, on_host, labels = self.order(epoch), self._drawn, self._ordered_labels
        whole = self.images_in(step)
        first = step * self.own_size
        end = min(first + self.own_size, len(order))
        for place, start in enumerate(range(first, end, self.micro_size)):
            part = slice(start, min(start + self.micro_size, end))
            index, targets = order[part], labels[part]
            images = self._cut(epoch, on_host, start, index)
            draw = partial(Random, step, place, seed=self.seed, epoch=epoch, index=index, device=self.device)
            if self.world > 1:
                others = [self._others(whole, place, ranks) for ranks in self._ranks_around]
                draw = partial(draw, before=others[0], after=others[1])
            if self.augment:
                images, targets = self._augmented(images, targets, draw())
            inputs, targets = self.task.batch(images, targets, self.normalise, draw)
            yield inputs, targets, len(index) / whole

    @property
    def _ranks_around(self) -> tuple[range, range]:
        return range(self.rank), range(self.rank + 1, self.world)

    def _others(self, whole: int, place: int, ranks: range) -> int:
        """Images of these processes' micro-batches at that place of a step of so many images."""
        left = (part_size(whole, rank, self.world) - place * self.micro_size for rank in ranks)
        return sum(min(max(images, 0), self.micro_size) for images in left)

    def _augmented(
        self, images: torch.Tensor, targets: torch.Tensor, random: Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for augmentation in self.augment:
            if augmentation.kind == "mixing":
                images, targets = augmentation.build(images, shares(targets, self.classes), random)
            else:
                images = augmentation.build(images, random)
        return images, targets

    def _cut(self, epoch: int, order: torch.Tensor, start: int, index: torch.Tensor) -> torch.Tensor:
        """The images uint8 `[B, C, H, W]` of a micro-batch, on the device."""
        if isinstance(self.pixels, Stream):
            return self.pixels.cut(epoch, order, start)
        return self.pixels.index_select(0, index)  # copies whole images; [index] goes byte by byte

    def order(self, epoch: int) -> torch.Tensor:
        """This process's images in the epoch's order: int64 `[N]`, drawn on the CPU, the same for every device."""
        if epoch != self._epoch:
            random = generator("order", self.seed, epoch)
            if self.odds is None:
                self._drawn = torch.randperm(len(self.labels), generator=random)
            else:
                self._drawn = torch.multinomial(self.odds, len(self.labels), replacement=True, generator=random)
            if self.world > 1:
                self._drawn = torch.cat([self._part(step) for step in self._drawn.split(self.step_size)])
            self._order, self._epoch = self._drawn.to(self.device), epoch
            self._ordered_labels = self.labels.index_select(0, self._order)  # once, and not a little in each step
        return self._order

    def _part(self, images: torch.Tensor) -> torch.Tensor:
        before = sum(part_size(len(images), rank, self.world) for rank in range(self.rank))
        return images[before : before + part_size(len(images), self.rank, self.world)]


def part_size(images: int, rank: int, world: int) -> int:
    """How many of a step's images the process of that rank has: the same for all, and one more for the first ones."""
    return images // world + (rank < images % world)


def class_odds(labels: torch.Tensor) -> torch.Tensor:
    """float64 `[N]`: what makes every class equally likely when an image of labels int64 `[N]` is drawn."""
    return 1 / labels.bincount().double()[labels]
