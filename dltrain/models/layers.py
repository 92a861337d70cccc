"""The layers of a layer list, and how a list becomes a module.

A layer sees the shape of one input without the batch, `(C, H, W)` or `(F,)`, and the number of the model's outputs.
What comes out of it is found by running it once on zeros, so no layer states its output's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dltrain.lazy import nn, torch
from dltrain.models.activations import Shape
from dltrain.registry import BelowOne, Component, Layers, NonNegativeInt, Positive, PositiveInt, register


def sequence(shape: Shape, outputs: int, layers: Sequence[Component]) -> nn.Sequential:
    """The layers one after another, each built for what the one before it gives.

    Raises ValueError for a layer that does not fit, with its index, its name and the shapes up to it.
    """
    modules = nn.Sequential()
    shapes = [shape]
    for index, layer in enumerate(layers):
        try:
            module = layer(shapes[-1], outputs)
            shapes.append(shape_after(module, shapes[-1]))
        except (ValueError, RuntimeError) as error:
            so_far = " -> ".join(show(each) for each in shapes)
            reason = str(error).splitlines()[0]
            raise ValueError(f"layer {index} ({layer.name}): {reason} [shapes so far: {so_far}]") from None
        modules.add_module(f"{index}_{layer.name}", module)
    return modules


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """The shape of what the module makes of one input of that shape.

    Raises RuntimeError where it does not fit, or would leave nothing of it.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            result: Shape = tuple(module(torch.zeros(1, *shape)).shape[1:])
    finally:
        module.train(training)
    return result


def written_out(layers: Sequence[Component]) -> int:
    """How many layers there are once each `repeat` is written out."""
    return sum(
        layer.args.get("times", 1) * written_out(layer.args["layers"]) if "layers" in layer.args else 1
        for layer in layers
    )


def show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"needs an image (channels x height x width), got {show(shape)} numbers")
    channels, height, width = shape
    return channels, height, width


@register("layer")
def conv(
    shape: Shape,
    outputs: int,
    *,
    out: PositiveInt | Literal["classes"],
    kernel: PositiveInt = 3,
    stride: PositiveInt = 1,
    padding: NonNegativeInt | Literal["same", "valid"] = "valid",
    dilation: PositiveInt = 1,
    groups: PositiveInt = 1,
    bias: bool = True,
) -> nn.Module:
    """Convolution of an image.

    out: output channels; `classes`: as many as the model has outputs
    kernel: height and width of the window
    stride: pixels between two windows
    padding: zeros around the image: pixels, `valid` (none) or `same` (what makes the output as large as the input
        divided by the stride)
    dilation: pixels between two taps of the window
    groups: parts that the channels are split into, each convolved alone
    bias: add a number to each output channel
    """
    channels, _, _ = _image(shape)
    width = outputs if out == "classes" else out
    if channels % groups or width % groups:
        raise ValueError(f"groups: {groups} divides not both {channels} input and {width} output channels")
    if padding == "same":
        reach = dilation * (kernel - 1)
        if reach % 2:
            raise ValueError(f"padding: same needs an odd window; kernel {kernel} with dilation {dilation} is even")
        padding = reach // 2
    pixels = 0 if padding == "valid" else padding
    return nn.Conv2d(channels, width, kernel, stride, pixels, dilation, groups, bias)


@register("layer")
def maxpool(
    shape: Shape, outputs: int, *, size: PositiveInt = 2, stride: PositiveInt | None = None, padding: NonNegativeInt = 0
) -> nn.Module:
    """The largest value of each window.

    size: height and width of the window
    stride: pixels between two windows; default: the size
    padding: pixels around the image, at most half the size, never the largest
    """
    _image(shape)
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
    _image(shape)
    return nn.AvgPool2d(size, stride, padding)


@register("layer")
def globalpool(shape: Shape, outputs: int, *, kind: Literal["avg", "max"] = "avg") -> nn.Module:
    """One number for each channel, from all its pixels; the result is flat.

    kind: avg: their mean; max: the largest
    """
    _image(shape)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1) if kind == "avg" else nn.AdaptiveMaxPool2d(1), nn.Flatten())


@register("layer")
def batchnorm(shape: Shape, outputs: int, *, momentum: Positive = 0.1, eps: Positive = 1e-5) -> nn.Module:
    """Batch normalisation (Ioffe & Szegedy 2015) of channels, or of features after `flatten`.

    momentum: share of a batch in the running statistics that evaluation uses
    eps: added to the variance
    """
    return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], eps=eps, momentum=momentum)


@register("layer")
def dropout(shape: Shape, outputs: int, *, probability: BelowOne = 0.5) -> nn.Module:
    """Sets numbers to zero at random while training, and scales up the rest (Srivastava et al. 2014).

    probability: of each number to be set to zero
    """
    return nn.Dropout(probability)


@register("layer")
def flatten(shape: Shape, outputs: int) -> nn.Module:
    """An image as one row of numbers."""
    return nn.Flatten()


@register("layer")
def linear(shape: Shape, outputs: int, *, out: PositiveInt | Literal["classes"], bias: bool = True) -> nn.Module:
    """Every output a weighted sum of all inputs: a fully connected layer.

    out: how many outputs; `classes`: as many as the model has
    bias: add a number to each output
    """
    if len(shape) != 1:
        raise ValueError(f"needs a row of numbers, got {show(shape)}; put `flatten` or `globalpool` before it")
    return nn.Linear(shape[0], outputs if out == "classes" else out, bias)


@register("layer")
def repeat(shape: Shape, outputs: int, *, times: PositiveInt, layers: Layers) -> nn.Module:
    """The same layers several times, each time with weights of its own.

    times: how often
    layers: what is repeated
    """
    return sequence(shape, outputs, [*layers] * times)


@register("layer")
def residual(
    shape: Shape, outputs: int, *, layers: Layers, shortcut: Literal["identity", "projection"] = "identity"
) -> nn.Module:
    """The layers' output plus their input (He et al. 2016).

    layers: the path beside the shortcut
    shortcut: `identity` needs equal shapes; `projection` brings the input to the output's shape by a strided 1x1
        convolution and batch normalisation
    """
    from dltrain.modules import Residual

    path = sequence(shape, outputs, layers)
    after = shape_after(path, shape)
    if shortcut == "identity":
        if after != shape:
            text = (
                f"the layers make {show(after)} of {show(shape)}; equal shapes, or `shortcut: projection`, are needed"
            )
            raise ValueError(text)
        return Residual(path, nn.Identity())
    channels, height, _ = _image(shape)
    wanted, smaller, _ = _image(after)
    stride = -(-height // smaller)
    projection = nn.Sequential(nn.Conv2d(channels, wanted, 1, stride, bias=False), nn.BatchNorm2d(wanted))
    if shape_after(projection, shape) != after:
        raise ValueError(f"no strided projection makes {show(after)} of {show(shape)}")
    return Residual(path, projection)
