"""Images drawn from a seed: shapes filled with textures, for smoke tests and speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files, Published
from dltrain.data.random import generator
from dltrain.lazy import torch
from dltrain.registry import NonNegativeInt, register

Drawing = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
SHAPES: dict[str, Drawing] = {  # which points u, v are inside, where the shape fits in the circle u² + v² = 1
    "disc": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: u.abs().maximum(v.abs()) < 0.7,
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "triangle": lambda u, v: (v < 0.5) & (u.abs() < 0.577 * (v + 1)),  # equilateral: 0.577 is tan 30 degrees
    "ring": lambda u, v: ((u * u + v * v).sqrt() - 0.8).abs() < 0.2,
    "cross": lambda u, v: (u.abs().minimum(v.abs()) < 0.3) & (u.abs().maximum(v.abs()) < 0.95),
}
TEXTURES: dict[str, Drawing] = {  # which points are filled, of those in every other row and every other column
    "plain": lambda rows, columns: torch.ones_like(rows),
    "rows": lambda rows, columns: rows,
    "columns": lambda rows, columns: columns,
    "checks": lambda rows, columns: rows ^ columns,
}
CLASSES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
Count = Annotated[int, Field(gt=0, le=10**9)]
SYNTHETIC = Published(title="synthetic", train=10_000, test=2_000)
BLOCK = 1 << 18  # pixels that are drawn at once: few enough for the processor's cache
CONTRAST = 80  # levels of 0..255 between a shape and what is around it


@register("data", published=SYNTHETIC)
def synthetic(
    files: Files,
    *,
    train: Count = 10_000,
    test: Count = 2_000,
    class_count: Annotated[int, Field(ge=2, le=len(CLASSES))] = 10,
    size: Annotated[int, Field(ge=16, le=4096)] = 32,
    channels: Literal[1, 3] = 3,
    noise: Annotated[float, Field(ge=0, le=255)] = 20.0,
    seed: NonNegativeInt = 0,
) -> Dataset:
    """Drawn shapes with textures, any number in any size; no download, and the same from the same seed.

    Place, size and both colours are drawn for each image, so that single pixels tell little of the class.

    train: training images
    test: test images
    class_count: the first so many of six plain shapes, then of the six with rows, with columns, with checks
    size: height and width in pixels
    channels: 3: colour; 1: gray
    noise: standard deviation of the noise in each pixel, in levels of 0..255
    seed: what is drawn; the run's own seed does not change it

    Raises ValueError where the images do not fit in memory.
    """
    made = []
    for name, count in (("train", train), ("test", test)):
        random = generator("synthetic", name, seed)
        try:
            images = torch.empty(count, channels, size, size, dtype=torch.uint8)
            labels = torch.randperm(count, generator=random) % class_count  # as many of each class
        except RuntimeError:
            raise ValueError(f"{name}: {count} images of {size}x{size} do not fit in memory") from None
        step = max(1, BLOCK // (size * size))
        for at in range(0, count, step):
            images[at : at + step] = _drawn(labels[at : at + step], channels, size, noise, random)
        made.append(Split(images, labels))
    return Dataset(made[0], made[1], CLASSES[:class_count])


def _drawn(labels: torch.Tensor, channels: int, size: int, noise: float, random: torch.Generator) -> torch.Tensor:
    """float32 `[B, channels, size, size]` in 0..255, one image for each label."""
    count = len(labels)
    radius, x, y = torch.rand(3, count, 1, 1, generator=random)
    radius = (0.25 + 0.15 * radius) * size  # of the circle that the shape fits in
    along = torch.arange(size) + 0.5
    u = (along - radius - x * (size - 2 * radius)) / radius  # -1..1 inside the shape, [B, 1, size]
    v = (along.view(-1, 1) - radius - y * (size - 2 * radius)) / radius  # [B, size, 1]
    phase = torch.randint(size, (2, count, 1, 1), generator=random)
    stripe = max(1, size // 16)  # its width in pixels
    rows = (torch.arange(size).view(-1, 1) + phase[0]) // stripe % 2 == 0  # [B, size, 1]
    columns = (torch.arange(size) + phase[1]) // stripe % 2 == 0  # [B, 1, size]
    inside = torch.empty(count, size, size, dtype=torch.bool)
    for label, (texture, shape) in enumerate(itertools.product(TEXTURES.values(), SHAPES.values())):
        index = (labels == label).nonzero().squeeze(1)
        inside[index] = shape(u[index], v[index]) & texture(rows[index], columns[index])
    ground = 255 * torch.rand(count, channels, 1, 1, generator=random)
    shift = CONTRAST + (255 - 2 * CONTRAST) * torch.rand(count, channels, 1, 1, generator=random)
    shift = torch.where(ground + shift > 255, -shift.minimum(ground), shift)
    images = torch.empty(count, channels, size, size).normal_(std=noise, generator=random)
    images += torch.where(inside.unsqueeze(1), ground + shift, ground)
    return images.round_().clamp_(0, 255)
