"""Augmentations: a batch of training images -> the same images, changed at random, each in its own way.

Images are uint8 `[B, C, H, W]` in 0..255 and stay so.  The batch is changed as a whole, on its device, and never in
place; every random number is drawn there from `random`, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dltrain.data.random import Random
from dltrain.lazy import F, torch
from dltrain.registry import Fraction, PositiveInt, register


@register("augmentation")
def flip(images: torch.Tensor, random: Random, *, probability: Fraction = 0.5) -> torch.Tensor:
    """Mirrors left and right.

    probability: share of the images that are mirrored
    """
    mirrored = random.uniform(len(images)) < probability  # [B]
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


@register("augmentation")
def translate(
    images: torch.Tensor, random: Random, *, pixels: PositiveInt, pad: Literal["zero", "reflect"] = "zero"
) -> torch.Tensor:
    """Shifts by whole pixels, down or up and right or left: the same as padding, then cropping at random.

    pixels: the farthest shift each way; every shift up to it is equally likely
    pad: what comes in at the border: zero (black), or reflect (the image mirrored in its outermost pixels)

    Raises ValueError where the images are too small to be reflected so far.
    """
    batch, _, height, width = images.shape
    if pad == "reflect":
        if pixels >= min(height, width):
            raise ValueError(
                f"translate: images of {height}x{width} can be reflected by {min(height, width) - 1} pixels at most, "
                f"got {pixels}: lower pixels, or set pad: zero"
            )
        padded = _reflect(_reflect(images, pixels, dim=2), pixels, dim=3)
    else:
        padded = F.pad(images, (pixels, pixels, pixels, pixels))
    down, right = random.integers(2 * pixels + 1, 2, batch)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, 2 pixels + 1, 2 pixels + 1, H, W]
    return crops[torch.arange(batch, device=images.device), :, down, right]


@register("augmentation")
def cutout(
    images: torch.Tensor, random: Random, *, size: PositiveInt, fill: Annotated[int, Field(ge=0, le=255)] = 128
) -> torch.Tensor:
    """Blanks a square whose centre may be any pixel, clipped at the border (DeVries & Taylor 2017).

    size: side of the square in pixels
    fill: what the square is filled with, 0 (black) to 255 (white)
    """
    batch, _, height, width = images.shape
    rows = _span(batch, height, size, random)
    columns = _span(batch, width, size, random)
    square = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    return images.masked_fill(square, fill)


def _span(batch: int, length: int, size: int, random: Random) -> torch.Tensor:
    """bool `[B, length]`: the `size` places around a centre drawn for each image, as far as they lie within."""
    centre = random.integers(length, batch, 1)
    place = torch.arange(length, device=random.device) - centre + size // 2
    return (place >= 0) & (place < size)


def _reflect(images: torch.Tensor, pixels: int, dim: int) -> torch.Tensor:
    """Pads both ends of `dim` by mirroring in the outermost pixels, as F.pad does for floats on every device."""
    length = images.shape[dim]
    before = images.narrow(dim, 1, pixels).flip(dim)
    after = images.narrow(dim, length - 1 - pixels, pixels).flip(dim)
    return torch.cat((before, images, after), dim)
