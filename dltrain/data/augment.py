"""Augmentations: a batch of training images -> the same images, changed at random, each in its own way.

Images are uint8 `[B, C, H, W]` in 0..255 and stay so.  The batch is changed as a whole, on its device, and never in
place; every random number is drawn there from `random`, so that nothing waits for the device.

Here are those that move, mirror, cut and blank; warp.py has rotations, colour.py colours, policy.py whole policies.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from dltrain.data.random import Random
from dltrain.lazy import F, torch
from dltrain.registry import Fraction, PositiveInt, register

Level = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=1, allow_inf_nan=False)]

TRIES = 10  # boxes drawn for each image until one fits, as torchvision does


@register("augmentation")
def flip(images: torch.Tensor, random: Random, *, probability: Fraction = 0.5) -> torch.Tensor:
    """Mirrors left and right.

    probability: share of the images that are mirrored
    """
    return _mirror(images, random.uniform(len(images)) < probability, dim=3)


@register("augmentation")
def vertical_flip(images: torch.Tensor, random: Random, *, probability: Fraction = 0.5) -> torch.Tensor:
    """Mirrors top and bottom.

    probability: share of the images that are mirrored
    """
    return _mirror(images, random.uniform(len(images)) < probability, dim=2)


@register("augmentation")
def alternating_flip(images: torch.Tensor, random: Random) -> torch.Tensor:
    """Mirrors half of the images left and right, and in the next epoch the other half (Jordan 2024, section 3.6).

    So two epochs show each image both ways.  Which half depends on the seed and each image's place in its split.
    """
    coin = _hash(_hash(random.index) ^ (random.seed & 0xFFFFFFFF)) & 1
    return _mirror(images, coin == random.epoch % 2, dim=3)


@register("augmentation", "crop")  # two names that people look it up by
@register("augmentation")
def translate(
    images: torch.Tensor, random: Random, *, pixels: PositiveInt, pad: Literal["zero", "reflect"] = "zero"
) -> torch.Tensor:
    """Random crop: pads by `pixels` on every side and crops back to the image's size at a random place.

    This shifts the image by whole pixels, down or up and right or left.

    pixels: the farthest shift each way; every shift up to it is equally likely
    pad: what comes in at the border: zero (black), or reflect (the image mirrored in its outermost pixels)

    Raises ValueError where the images are too small to be reflected so far.
    """
    batch, _, height, width = images.shape
    if pad == "reflect":
        if pixels >= min(height, width):
            raise ValueError(
                f"images of {height}x{width} can be reflected by {min(height, width) - 1} pixels at most, "
                f"got {pixels}: lower pixels, or set pad: zero"
            )
        padded = _reflect(_reflect(images, pixels, dim=2), pixels, dim=3)
    else:
        padded = F.pad(images, (pixels, pixels, pixels, pixels))
    down, right = random.integers(2 * pixels + 1, 2, batch)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, 2 pixels + 1, 2 pixels + 1, H, W]
    return crops[torch.arange(batch, device=images.device), :, down, right]


@register("augmentation")
def resized_crop(
    images: torch.Tensor, random: Random, *, min_scale: Share = 0.08, max_scale: Share = 1.0, ratio: Ratio = 4 / 3
) -> torch.Tensor:
    """Crops a box of random size, shape and place and enlarges it to the image's size (Szegedy et al. 2015, section 6).

    Enlarging is bilinear; the crop that enlarges nothing is `crop`.

    min_scale: smallest share of the image's area that is kept
    max_scale: largest share of the image's area that is kept
    ratio: width / height of the box is between 1 / ratio and ratio, its logarithm being uniform; 1: squares

    Boxes are drawn as torchvision's RandomResizedCrop draws them: up to ten for each image until one lies within it,
    else the largest box of an allowed shape is taken.  Raises ValueError where min_scale is above max_scale.
    """
    batch, _, height, width = images.shape
    tall, wide, fits = _box(images, random, min_scale, max_scale, ratio)
    tall = torch.where(fits, tall, min(height, round(width * ratio)))
    wide = torch.where(fits, wide, min(width, round(height * ratio)))
    y = _source(height, tall, random)[:, :, None].expand(batch, height, width)
    x = _source(width, wide, random)[:, None, :].expand(batch, height, width)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), 3)  # -1 and 1: the image's borders
    found = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return found.round_().to(torch.uint8)


@register("augmentation")
def cutout(images: torch.Tensor, random: Random, *, size: PositiveInt, fill: Level = 128) -> torch.Tensor:
    """Blanks a square whose centre may be any pixel, clipped at the border (DeVries & Taylor 2017).

    size: side of the square in pixels
    fill: what the square is filled with, 0 (black) to 255 (white)
    """
    batch, _, height, width = images.shape
    top = random.integers(height, batch) - size // 2
    left = random.integers(width, batch) - size // 2
    return _blank(images, top, left, size, size, fill)


@register("augmentation")
def random_erasing(
    images: torch.Tensor,
    random: Random,
    *,
    probability: Fraction = 0.5,
    min_scale: Share = 0.02,
    max_scale: Share = 0.33,
    ratio: Ratio = 10 / 3,
    fill: Level = 128,
) -> torch.Tensor:
    """Blanks a box of random size, shape and place within the image (Zhong et al. 2020, with one level as the filling).

    probability: share of the images that lose a box
    min_scale: smallest share of the image's area that is blanked
    max_scale: largest share of the image's area that is blanked
    ratio: width / height of the box is between 1 / ratio and ratio, its logarithm being uniform; 1: squares
    fill: what the box is filled with, 0 (black) to 255 (white)

    Up to ten boxes are drawn for each image until one lies within it; where none does, the image stays.  Raises
    ValueError where min_scale is above max_scale.
    """
    _, _, height, width = images.shape
    tall, wide, fits = _box(images, random, min_scale, max_scale, ratio)
    tall = tall * (fits & (random.uniform(len(images)) < probability))
    return _blank(images, _start(height, tall, random), _start(width, wide, random), tall, wide, fill)


def _mirror(images: torch.Tensor, chosen: torch.Tensor, dim: int) -> torch.Tensor:
    """Those images mirrored that `chosen` (bool `[B]`) names."""
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)


def _hash(number: torch.Tensor) -> torch.Tensor:
    """int64 in 0..2^32-1 -> the same, where each bit depends on all of those given.

    Mueller's integer hash (stackoverflow.com/a/12996028); its products stay below 2^59.
    """
    for _ in range(2):
        number = ((number >> 16) ^ number) * 0x45D9F3B & 0xFFFFFFFF
    return (number >> 16) ^ number


def _reflect(images: torch.Tensor, pixels: int, dim: int) -> torch.Tensor:
    """Pads both ends of `dim` by mirroring in the outermost pixels, as F.pad does for floats on every device."""
    length = images.shape[dim]
    before = images.narrow(dim, 1, pixels).flip(dim)
    after = images.narrow(dim, length - 1 - pixels, pixels).flip(dim)
    return torch.cat((before, images, after), dim)


def _box(
    images: torch.Tensor, random: Random, min_scale: float, max_scale: float, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image a box's height and width in pixels (float32 `[B]`), and whether it fits (bool `[B]`)."""
    batch, _, height, width = images.shape
    if min_scale > max_scale:
        raise ValueError(f"min_scale {min_scale:g} is above max_scale {max_scale:g}: exchange them")
    area = random.uniform(TRIES, batch, low=min_scale, high=max_scale) * (height * width)
    stretch = random.uniform(TRIES, batch, low=-math.log(ratio), high=math.log(ratio)).exp()
    tall, wide = (area / stretch).sqrt().round(), (area * stretch).sqrt().round()
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    first = fits.byte().argmax(0, keepdim=True)  # argmax takes the first of equals
    return tall.gather(0, first)[0], wide.gather(0, first)[0], fits.any(0)


def _start(length: int, size: torch.Tensor, random: Random) -> torch.Tensor:
    """Where each of the boxes of these sizes (float32 `[B]`) begins within `length`: float32 `[B]`, whole numbers."""
    return (random.uniform(len(size)) * (length - size + 1)).floor()


def _source(length: int, size: torch.Tensor, random: Random) -> torch.Tensor:
    """Where in the image each place of the enlarged box lies: float32 `[B, length]`, in pixels, within the box."""
    start, size = _start(length, size, random)[:, None], size[:, None]
    place = (torch.arange(length, device=size.device) + 0.5) * (size / length) - 0.5
    return start + torch.minimum(place.clamp_(min=0), size - 1)


def _blank(
    images: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    tall: torch.Tensor | int,
    wide: torch.Tensor | int,
    fill: int,
) -> torch.Tensor:
    """The images with a box of each filled; all but `fill` are in pixels, numbers or `[B]`."""
    _, _, height, width = images.shape
    rows = _span(height, top, tall)
    columns = _span(width, left, wide)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], fill)  # [B, 1, H, W]


def _span(length: int, start: torch.Tensor, size: torch.Tensor | int) -> torch.Tensor:
    """bool `[B, length]`: the `size` places from `start` on, as far as they lie within."""
    place = torch.arange(length, device=start.device)[:, None] - start
    return ((place >= 0) & (place < size)).T
