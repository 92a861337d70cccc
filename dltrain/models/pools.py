"""Pooling: one number for each window of a channel."""

from __future__ import annotations

from typing import Literal

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.layers import image
from dltrain.registry import NonNegativeInt, PositiveInt, register


@register("layer")
def maxpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The largest value of each window.

    size: height and width of the window
    stride: pixels between two windows; default: the size
    padding: pixels around the image, at most half the size, never the largest
    """
    image(shape)
    return nn.MaxPool2d(size, stride, padding)


@register("layer")
def avgpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The mean of each window.

    size: height and width of the window
    stride: pixels between two windows; default: the size
    padding: zeros around the image, at most half the size, counted in the mean
    """
    image(shape)
    return nn.AvgPool2d(size, stride, padding)


@register("layer")
def sumpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The sum of each window.

    size: height and width of the window
    stride: pixels between two windows; default: the size
    padding: zeros around the image, at most half the size
    """
    image(shape)
    return nn.AvgPool2d(size, stride, padding, divisor_override=1)


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
    image(shape)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1) if kind == "avg" else nn.AdaptiveMaxPool2d(1), nn.Flatten())
