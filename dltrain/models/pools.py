"""Pooling: one number for each window of a channel, in a sequence (C x L), an image or a volume (C x D x H x W)."""

from __future__ import annotations

from typing import Literal

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.layers import image, show
from dltrain.registry import NonNegativeInt, PositiveInt, register


@register("layer")
def maxpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The largest value of each window.

    size: each side of the window
    stride: pixels between two windows; default: the size
    padding: pixels around the image, at most half the size, never the largest
    """
    return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[_dimensions(shape) - 1](size, stride or size, padding)


@register("layer")
def avgpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The mean of each window.

    size: each side of the window
    stride: pixels between two windows; default: the size
    padding: zeros around the image, at most half the size, counted in the mean
    """
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[_dimensions(shape) - 1](size, stride or size, padding)


@register("layer")
def sumpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The sum of each window.

    size: each side of the window
    stride: pixels between two windows; default: the size
    padding: zeros around the image, at most half the size
    """
    from dltrain.modules import Multiply

    if _dimensions(shape) == 1:  # torch's mean of a sequence takes no divisor
        return nn.Sequential(nn.AvgPool1d(size, stride or size, padding), Multiply(size))
    return (nn.AvgPool2d, nn.AvgPool3d)[_dimensions(shape) - 2](size, stride or size, padding, divisor_override=1)


@register("layer")
def adaptive_avgpool(shape: Shape, outputs: int, *, size: PositiveInt) -> nn.Module:
    """The means of windows whose size is chosen so that an image of a given size comes out.

    size: height and width of what comes out
    """
    image(shape)
    return nn.AdaptiveAvgPool2d(size)


@register("layer")
def globalpool(shape: Shape, outputs: int, *, kind: Literal["avg", "max"] = "avg") -> nn.Module:
    """One number for each channel, from all its pixels; the result is flat.

    kind: avg: their mean; max: the largest
    """
    means = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    largest = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
    return nn.Sequential((means if kind == "avg" else largest)[_dimensions(shape) - 1](1), nn.Flatten())


def _dimensions(shape: Shape) -> int:
    """In which windows lie; raises ValueError where there is none."""
    if len(shape) not in (2, 3, 4):
        raise ValueError(
            f"needs an image (channels x height x width), a sequence or a volume, got {show(shape)} numbers"
        )
    return len(shape) - 1
