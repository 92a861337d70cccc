"""Films of moving digits, made from MNIST's images by a seeded recipe: the frames lie where the channels of a colour
image do."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files
from dltrain.data.mnist import MNIST, SIDE, mnist
from dltrain.data.random import generator
from dltrain.lazy import F, torch
from dltrain.registry import NonNegativeInt, PositiveInt, register

DIGIT = SIDE // 2  # pixels of a side of the moving digit
SPEED = 1.0, 3.0  # pixels from one frame to the next, drawn evenly in between
PUBLISHED = dataclasses.replace(MNIST, title="moving MNIST (made from MNIST)")
BLOCK = 4096  # films that are drawn at once: bounds the memory that their places take


@register("data", published=PUBLISHED)
def moving_mnist(
    files: Files,
    *,
    frames: Annotated[int, Field(ge=1, le=64)] = 8,
    size: Annotated[int, Field(ge=DIGIT, le=256)] = 28,
    train: PositiveInt = 20_000,
    test: PositiveInt = 10_000,
    seed: NonNegativeInt = 0,
) -> Dataset:
    """MNIST's digits at half their size, each on a straight way that bounces off the edges: gray, frames x 28x28.

    As the moving digits of Srivastava et al. 2015 (arXiv 1502.04681), one in each film.  Where a digit
    starts, its direction and its speed (1 to 3 pixels a frame) depend on the seed, the split and its place there alone.

    frames: in each film; they are what `channels` are of other images
    size: height and width of a frame in pixels
    train: films of the first so many training images, or of all where there are fewer; a film takes frames x size^2
        bytes of memory
    test: films of the first so many test images
    seed: what the ways are drawn from; the run's own seed does not change them

    Raises DataError as `mnist` does, ValueError where the films do not fit in memory.
    """
    digits = mnist(files)
    splits = {}
    for name, split, most in (("train", digits.train, train), ("test", digits.test, test)):
        count = min(most, len(split))
        ways = torch.rand(count, 4, generator=generator("moving_mnist", name, seed))  # four numbers a film, in turn
        try:
            films = torch.empty(count, frames, size, size, dtype=torch.uint8)
        except RuntimeError:
            raise ValueError(f"{name}: {count} films of {frames}x{size}x{size} do not fit in memory") from None
        for at in range(0, count, BLOCK):
            part = slice(at, min(at + BLOCK, count))
            films[part] = _filmed(split.images[part], ways[part], frames, size)
        splits[name] = Split(films, split.labels[:count])
    return Dataset(splits["train"], splits["test"], digits.classes, digits.files, digits.verified)


def _filmed(images: torch.Tensor, ways: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """uint8 `[B, frames, size, size]` of images uint8 `[B, 1, 28, 28]`.

    ways: float32 `[B, 4]` in 0..1: start down and across, direction, speed
    """
    count = len(images)
    small = F.avg_pool2d(images.float(), 2).round_().byte()[:, 0]  # [B, 14, 14]
    down, across, direction, speed = ways.T[:, :, None]  # [B, 1] each
    direction = direction * 2 * torch.pi
    step = (SPEED[0] + (SPEED[1] - SPEED[0]) * speed) * torch.arange(frames)  # [B, frames]: pixels gone
    room = size - DIGIT  # that the digit's corner has
    top = _bounced(down * room + step * direction.sin(), room)
    left = _bounced(across * room + step * direction.cos(), room)
    films = torch.zeros(count, frames, size, size, dtype=torch.uint8)
    inside = torch.arange(DIGIT)
    rows = (top[:, :, None] + inside)[:, :, :, None]  # [B, frames, 14, 1]
    columns = (left[:, :, None] + inside)[:, :, None, :]  # [B, frames, 1, 14]
    films[torch.arange(count)[:, None, None, None], torch.arange(frames)[:, None, None], rows, columns] = small[:, None]
    return films


def _bounced(way: torch.Tensor, room: int) -> torch.Tensor:
    """The whole pixel in 0..room at which something is that went so far and turned around at either end."""
    folded = way.remainder(2 * room) if room else way * 0
    return torch.where(folded > room, 2 * room - folded, folded).round().long()
