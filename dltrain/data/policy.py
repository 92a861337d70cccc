"""Policies: operations drawn at random for each image from a list of fourteen, torchvision's and the papers'.

An operation for some images alone would have to know, and so to wait for, which drew it.  Instead each family of
operations is done to the whole batch by parameters for each image, which change nothing where another was drawn: one
affine map, one change of saturation and one of sharpness, one table of 256 levels for each channel.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from dltrain.data.augment import Level
from dltrain.data.colour import grey, has_colours
from dltrain.data.random import Random
from dltrain.data.warp import warp
from dltrain.lazy import torch
from dltrain.registry import PositiveInt, register

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "colour", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
LEVELS = 30  # magnitudes are 0..30


@register("augmentation")
def rand_augment(
    images: torch.Tensor,
    random: Random,
    *,
    operations: PositiveInt = 2,
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9,
    fill: Level = 0,
) -> torch.Tensor:
    """RandAugment: a few random operations on each image, all equally strong (Cubuk et al. 2020).

    operations: how many operations each image undergoes, one after another; each is drawn from fourteen (none, shear
        and shift each way, rotation, brightness, saturation, contrast, sharpness, posterize, solarize, autocontrast,
        equalize)
    magnitude: how strong they are, 0 (nothing to see for most) to 30
    fill: what comes in at the border, 0 (black) to 255 (white)

    Operations and their ranges are those of torchvision's RandAugment.  Raises ValueError for images of neither one
    nor three channels.
    """
    batch, _, height, width = images.shape
    level = torch.full((batch,), magnitude / LEVELS, device=images.device)
    shift = (150 / 331 * width, 150 / 331 * height)
    for _ in range(operations):
        drawn, sign = random.integers(len(OPERATIONS), batch), _sign(batch, random)
        images = _operate(images, drawn, level, sign, shear=0.3, shift=shift, degrees=30, factor=0.9, bits=4, fill=fill)
    return images


@register("augmentation")
def trivial_augment(images: torch.Tensor, random: Random, *, fill: Level = 0) -> torch.Tensor:
    """TrivialAugment: one random operation on each image, of random strength (Müller & Hutter 2021; the wide ranges).

    fill: what comes in at the border, 0 (black) to 255 (white)

    Operations are those of `rand_augment`, the ranges those of torchvision's TrivialAugmentWide.  Raises ValueError
    for images of neither one nor three channels.
    """
    batch = len(images)
    drawn, sign = random.integers(len(OPERATIONS), batch), _sign(batch, random)
    level = random.integers(LEVELS + 1, batch) / LEVELS
    return _operate(images, drawn, level, sign, shear=0.99, shift=(32, 32), degrees=135, factor=0.99, bits=6, fill=fill)


def _sign(batch: int, random: Random) -> torch.Tensor:
    return random.integers(2, batch) * 2 - 1


def _operate(
    images: torch.Tensor,
    drawn: torch.Tensor,
    level: torch.Tensor,
    sign: torch.Tensor,
    *,
    shear: float,
    shift: tuple[float, float],
    degrees: float,
    factor: float,
    bits: int,
    fill: int,
) -> torch.Tensor:
    """One operation for each image: uint8 `[B, C, H, W]` -> the same.

    drawn: int64 `[B]`, places in OPERATIONS; level: float32 `[B]` in 0..1; sign: `[B]`, -1 or 1
    The rest are the ranges, what level 1 stands for: slope; pixels right and down; degrees; what is added to factors
    of 1; bits that posterize takes away.
    """
    chosen = {name: drawn == place for place, name in enumerate(OPERATIONS)}  # bool [B] each
    signed = level * sign
    images = _warped(images, chosen, signed, shear, shift, degrees, fill)
    luma, factors = grey(images), 1 + factor * signed
    tables = _tables(images, luma, chosen, level, factors, bits)
    return _look_up(_blended(images, luma, chosen, factors), tables)


Chosen = dict[str, "torch.Tensor"]


def _warped(
    images: torch.Tensor,
    chosen: Chosen,
    signed: torch.Tensor,
    shear: float,
    shift: tuple[float, float],
    degrees: float,
    fill: int,
) -> torch.Tensor:
    """Shears about the upper left corner, shifts by whole pixels and rotates about the centre."""
    _, _, height, width = images.shape
    angle = signed * chosen["rotate"] * math.radians(degrees)
    slope_x, slope_y = (signed * chosen[name] * shear for name in ("shear_x", "shear_y"))
    right = (signed * chosen["translate_x"] * shift[0]).trunc()
    down = (signed * chosen["translate_y"] * shift[1]).trunc()
    cos, sin = angle.cos(), angle.sin()
    x = (cos, slope_x - sin, slope_x * (height / 2) - right)
    y = (slope_y + sin, cos, slope_y * (width / 2) - down)
    return warp(images, x, y, "nearest", fill)


def _blended(images: torch.Tensor, luma: torch.Tensor, chosen: Chosen, factors: torch.Tensor) -> torch.Tensor:
    """Saturation, the distance from grey times a factor, and sharpness, the distance from the smoothed image.

    Smoothed is 5/13 of a pixel and 1/13 of each of its eight neighbours, as PIL and torchvision have it; the outermost
    pixels are not sharpened.
    """
    pixels = images.float()
    if has_colours(images):
        pixels += (luma - pixels) * _where(chosen["colour"], 1 - factors)
    levels = images.short()
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    square = rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:]  # sums of 3x3
    inside = pixels[:, :, 1:-1, 1:-1]
    smooth = (square + 4 * levels[:, :, 1:-1, 1:-1]) / 13
    inside += (smooth - inside) * _where(chosen["sharpness"], 1 - factors)
    return pixels.clamp_(0, 255).round_().to(torch.uint8)


def _where(chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`[B, 1, 1, 1]`: the share where it was chosen, else 0."""
    return (share * chosen)[:, None, None, None]


def _tables(
    images: torch.Tensor, luma: torch.Tensor, chosen: Chosen, level: torch.Tensor, factors: torch.Tensor, bits: int
) -> torch.Tensor:
    """What becomes of each level of each channel: uint8 `[B, C, 256]`, for the operations that look at levels alone."""
    batch, channels, _, _ = images.shape
    chosen = {name: each[:, None, None] for name, each in chosen.items()}
    level, factors = level[:, None, None], factors[:, None, None]
    value = torch.arange(256, device=images.device, dtype=torch.int32)
    pivot = luma.mean((1, 2, 3))[:, None, None] * chosen["contrast"]  # brightness: black
    table = torch.where(chosen["brightness"] | chosen["contrast"], pivot + (value - pivot) * factors, value)
    off = (level * bits).round().int() * chosen["posterize"]
    table = torch.where(chosen["posterize"], value >> off << off, table)
    table = torch.where(chosen["solarize"] & (value >= 255 * (1 - level)), 255 - value, table)
    low, high = (each.flatten(2).to(torch.float32) for each in (images.amin((2, 3), True), images.amax((2, 3), True)))
    stretched = (value - low) * (255 / (high - low).clamp(min=1))
    table = torch.where(chosen["autocontrast"] & (high > low), stretched, table)
    count = _histogram(images)
    table = torch.where(chosen["equalize"], _equalized(count, value), table)
    return table.expand(batch, channels, 256).clamp(0, 255).round_().to(torch.uint8)


def _histogram(images: torch.Tensor) -> torch.Tensor:
    """How many pixels of each channel have each level: int32 `[B, C, 256]`."""
    batch, channels, _, _ = images.shape
    start = torch.arange(batch * channels, device=images.device, dtype=torch.int32)[:, None] * 256
    place = (images.reshape(batch * channels, -1) + start).view(-1)
    one = torch.ones(1, device=images.device, dtype=torch.int32)
    counts = torch.zeros(batch * channels * 256, device=images.device, dtype=torch.int32)
    return counts.index_add_(0, place, one.expand(len(place))).view(batch, channels, 256)


def _equalized(count: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PIL's table of equalize from a histogram `[B, C, 256]`; a channel of one level, or nearly so, stays."""
    until = count.cumsum(2, dtype=torch.int32)
    highest = ((count > 0) * value).amax(2, keepdim=True).long()  # level that some pixel has
    step = (until[:, :, -1:] - count.gather(2, highest)) // 255
    below = until - count
    return torch.where(step > 0, (below + step // 2) // step.clamp(min=1), value)


def _look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Each level replaced by what its channel's table `[B, C, 256]` says."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)
