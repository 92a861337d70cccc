"""Augmentations of colours.  Images have one channel (grey) or three (red, green, blue)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dltrain.data.random import Random
from dltrain.lazy import torch
from dltrain.registry import Fraction, NonNegative, register


@register("augmentation")
def colour_jitter(
    images: torch.Tensor,
    random: Random,
    *,
    brightness: NonNegative = 0.0,
    contrast: NonNegative = 0.0,
    saturation: NonNegative = 0.0,
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0,
) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue, each by its own random amount, in this order.

    brightness: pixels are multiplied by a factor between 1 - brightness (at least 0) and 1 + brightness
    contrast: the distance from the image's mean grey is multiplied by a factor between 1 - contrast and 1 + contrast
    saturation: the distance from grey is multiplied by a factor between 1 - saturation and 1 + saturation
    hue: the hue is turned by up to this share of the colour circle, either way; 0.5 reaches every hue

    The formulas are torchvision's ColorJitter's, which draws the order too, and rounds down after each change where
    this one rounds once.  Images of one channel have no saturation and no hue, and keep to the others.

    Raises ValueError where all are 0, which would change nothing, and for images of neither one nor three channels.
    """
    if not (brightness or contrast or saturation or hue):
        raise ValueError("changes nothing: set brightness, contrast, saturation or hue above 0")

    def factor(spread: float) -> torch.Tensor:
        return random.uniform(len(images), 1, 1, 1, low=max(0.0, 1 - spread), high=1 + spread)

    coloured = has_colours(images)
    pixels = images.float()
    if brightness:
        pixels = (pixels * factor(brightness)).clamp_(0, 255)
    if contrast:
        mean = grey(pixels).mean((1, 2, 3), keepdim=True)
        pixels = torch.lerp(mean, pixels, factor(contrast)).clamp_(0, 255)
    if saturation and coloured:
        pixels = torch.lerp(grey(pixels), pixels, factor(saturation)).clamp_(0, 255)
    if hue and coloured:
        pixels = _turn_hue(pixels, random.uniform(len(images), 1, 1, low=-hue, high=hue))
    return pixels.round_().to(torch.uint8)


@register("augmentation")
def grayscale(images: torch.Tensor, random: Random, *, probability: Fraction = 0.1) -> torch.Tensor:
    """Takes the colours away, keeping three equal channels; images of one channel stay as they are.

    probability: share of the images that lose their colours

    Raises ValueError for images of neither one nor three channels.
    """
    chosen = random.uniform(len(images), 1, 1, 1) < probability
    return torch.where(chosen, grey(images).round_().to(torch.uint8), images) if has_colours(images) else images.clone()


def has_colours(images: torch.Tensor) -> bool:
    """Whether `[B, C, H, W]` has three channels and not one; raises ValueError where it has neither."""
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"colours need images of one channel or three, got {channels}")
    return channels == 3


def grey(images: torch.Tensor) -> torch.Tensor:
    """The luma (ITU-R BT.601) of uint8 or float32 `[B, C, H, W]`, in their range: float32 `[B, 1, H, W]`."""
    if not has_colours(images):
        return images.float()
    red, green, blue = images.split(1, 1)
    luma: torch.Tensor = (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luma


def _turn_hue(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turns the hue of float32 `[B, 3, H, W]` by shares of the colour circle, `[B, 1, 1]`, at the same HSV value and
    saturation.

    From RGB to hue and back by Smith's hexcone (1978): with h in sixths of the circle, a channel is
    max - chroma * clamp(min(k, 4 - k), 0, 1), k = (h + 5, 3, 1) mod 6.
    """
    red, green, blue = pixels.unbind(1)
    high = pixels.amax(1)
    chroma = high - pixels.amin(1)
    divisor = chroma.clamp(min=1e-6)  # where it is 0 there is no hue, and chroma undoes what comes of it
    from_green_or_blue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, from_green_or_blue) + 6 * turn
    k = (hue[:, None] + torch.arange(5, 0, -2, device=pixels.device)[:, None, None]).remainder_(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)
