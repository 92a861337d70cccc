"""Convolutions of sequences and of volumes, and the layers that make an image one or the other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start
from dltrain.models.layers import Width, check_groups, image, margins, show
from dltrain.registry import Init, NonNegativeInt, PositiveInt, register

Sides = PositiveInt | Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]  # of a volume
Padding = NonNegativeInt | Literal["same", "valid"]


@register("layer")
def rows(shape: Shape, outputs: int) -> nn.Module:
    """An image C x H x W as the sequence of its rows, (C W) x H: each pixel of a row becomes a channel."""
    from dltrain.modules import Rows

    image(shape)
    return Rows()


@register("layer")
def columns(shape: Shape, outputs: int) -> nn.Module:
    """An image C x H x W as the sequence of its columns, (C H) x W: each pixel of a column becomes a channel."""
    image(shape)
    return nn.Flatten(1, 2)


@register("layer")
def volume(shape: Shape, outputs: int) -> nn.Module:
    """An image T x H x W whose channels are frames as a volume of one channel, 1 x T x H x W."""
    frames, _, _ = image(shape)
    return nn.Unflatten(1, (1, frames))


@register("layer")
def conv1d(
    shape: Shape,
    outputs: int,
    *,
    out: Width,
    kernel: PositiveInt = 3,
    stride: PositiveInt = 1,
    padding: Padding = "valid",
    dilation: PositiveInt = 1,
    groups: PositiveInt = 1,
    bias: bool = True,
    init: Init | None = None,
) -> nn.Module:
    """Convolution of a sequence, channels x length.

    out: output channels; `classes`: as many as the model has outputs
    kernel: length of the window
    stride: places between two windows
    padding: zeros at each end: how many, `valid` (none) or `same` (what makes the output as long as the input divided
        by the stride)
    dilation: places between two taps of the window
    groups: parts that the channels are split into, each convolved alone
    bias: add a number to each output channel
    init: how the weights start, the bias then at zero; default: the model's `init`, else torch's
    """
    channels = _channels(shape, 1, "a sequence (channels x length): put `rows` or `columns` before it")
    width = outputs if out == "classes" else out
    settings = _settings([kernel], stride, padding, dilation, (channels, width, groups))
    return start(nn.Conv1d(channels, width, bias=bias, **settings), init)


@register("layer")
def conv3d(
    shape: Shape,
    outputs: int,
    *,
    out: Width,
    kernel: Sides = 3,
    stride: Sides = 1,
    padding: Padding = "valid",
    dilation: PositiveInt = 1,
    groups: PositiveInt = 1,
    bias: bool = True,
    init: Init | None = None,
) -> nn.Module:
    """Convolution of a volume, channels x depth x height x width; of a film the depth is time.

    out: output channels; `classes`: as many as the model has outputs
    kernel: sides of the window: one number, or [depth, height, width]
    stride: places between two windows: one number, or [depth, height, width]
    padding: zeros at each face: how many, `valid` (none) or `same` (what makes the output as large as the input divided
        by the stride)
    dilation: places between two taps of the window
    groups: parts that the channels are split into, each convolved alone
    bias: add a number to each output channel
    init: how the weights start, the bias then at zero; default: the model's `init`, else torch's
    """
    channels = _channels(shape, 3, "a volume (channels x depth x height x width): put `volume` before it")
    width = outputs if out == "classes" else out
    window = kernel if isinstance(kernel, list) else [kernel] * 3
    steps = tuple(stride) if isinstance(stride, list) else stride
    settings = _settings(window, steps, padding, dilation, (channels, width, groups))
    return start(nn.Conv3d(channels, width, bias=bias, **settings), init)


def _channels(shape: Shape, dimensions: int, needed: str) -> int:
    if len(shape) != 1 + dimensions:
        raise ValueError(f"needs {needed}; got {show(shape)} numbers")
    return shape[0]


def _settings(
    window: list[int], stride: int | tuple[int, ...], padding: int | str, dilation: int, split: tuple[int, int, int]
) -> dict[str, Any]:
    """What torch's convolutions of any dimension take; split: input channels, output channels, groups."""
    channels, width, groups = split
    check_groups(channels, width, groups)
    return {
        "kernel_size": tuple(window),
        "stride": stride,
        "padding": margins(window, padding, dilation),
        "dilation": dilation,
        "groups": groups,
    }
