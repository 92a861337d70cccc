"""Augmentations that rotate, scale and shear, by one affine map for each image."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from dltrain.data.augment import Level
from dltrain.data.random import Random
from dltrain.lazy import F, torch
from dltrain.registry import Fraction, Positive, register

Interpolation = Literal["bilinear", "nearest"]
Degrees = Annotated[float, Field(ge=0, le=180)]
Shear = Annotated[float, Field(ge=0, lt=90)]


@register("augmentation")
def rotate(
    images: torch.Tensor,
    random: Random,
    *,
    degrees: Degrees,
    interpolation: Interpolation = "bilinear",
    fill: Level = 0,
) -> torch.Tensor:
    """Rotates about the centre.

    degrees: the largest angle either way; every angle up to it is equally likely
    interpolation: how a pixel is made of those around the place it comes from: bilinear, or nearest (the nearest one)
    fill: what comes in at the border, 0 (black) to 255 (white)
    """
    rotated: torch.Tensor = affine(images, random, degrees=degrees, interpolation=interpolation, fill=fill)
    return rotated


@register("augmentation")
def affine(
    images: torch.Tensor,
    random: Random,
    *,
    degrees: Degrees,
    translate: Fraction = 0.0,
    min_scale: Positive = 1.0,
    max_scale: Positive = 1.0,
    shear: Shear = 0.0,
    interpolation: Interpolation = "bilinear",
    fill: Level = 0,
) -> torch.Tensor:
    """Rotates, scales and shears about the centre, and shifts: torchvision's RandomAffine.

    degrees: the largest rotation either way; every angle up to it is equally likely
    translate: the farthest shift each way, as a share of the width and of the height; shifts are by whole pixels
    min_scale: smallest factor of the size; below 1 shrinks
    max_scale: largest factor of the size; above 1 enlarges
    shear: the largest angle, either way, by which upright edges lean, in degrees
    interpolation: how a pixel is made of those around the place it comes from: bilinear, or nearest (the nearest one)
    fill: what comes in at the border, 0 (black) to 255 (white)

    Raises ValueError where min_scale is above max_scale.
    """
    if min_scale > max_scale:
        raise ValueError(f"min_scale {min_scale:g} is above max_scale {max_scale:g}: exchange them")
    batch, _, height, width = images.shape
    angle, lean, right, down = random.uniform(4, batch, low=-1, high=1)
    scale = random.uniform(batch, low=min_scale, high=max_scale)
    angle, slope = angle * math.radians(degrees), (lean * math.radians(shear)).tan()
    right, down = (right * translate * width).round(), (down * translate * height).round()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # the inverse of: shear, scale, rotate, shift (as torchvision's _get_inverse_affine_matrix)
    a, b, c, d = cos - sin * slope, sin + cos * slope, -sin, cos
    return warp(images, (a, b, -a * right - b * down), (c, d, -c * right - d * down), interpolation, fill)


Row = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def warp(images: torch.Tensor, x: Row, y: Row, interpolation: Interpolation, fill: int) -> torch.Tensor:
    """Takes each pixel from where an affine map of its place points: uint8 `[B, C, H, W]` -> the same.

    Places are in pixels from the image's centre, right and down.  x = (a, b, c), each float32 `[B]`, says that the
    pixel at (right, down) comes from a * right + b * down + c pixels to the right; y the same for down.  What comes
    from outside is `fill`.
    """
    _, _, height, width = images.shape
    right = torch.arange(width, device=images.device) - (width - 1) / 2
    down = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2

    def place(row: Row, length: int) -> torch.Tensor:
        a, b, c = (each[:, None, None] * (2 / length) for each in row)  # -1 and 1: the image's borders
        return (a * right + c) + b * down  # [B, H, W]; no matrix product, which TF32 would blur

    grid = torch.stack((place(x, width), place(y, height)), 3)
    shifted = images.float() - fill  # so that grid_sample's zeros outside are the filling
    return F.grid_sample(shifted, grid, mode=interpolation, align_corners=False).add_(fill).round_().to(torch.uint8)
