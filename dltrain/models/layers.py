"""The layers of a layer list, and how a list becomes a module.

A layer sees the shape of one input without the batch, `(C, H, W)` or `(F,)`, and the number of the model's outputs.
What comes out of it is found by running it once on zeros, so no layer states its output's shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field

from dltrain.lazy import nn, torch
from dltrain.models.activations import Finite, Shape
from dltrain.models.initial import start
from dltrain.registry import BelowOne, Component, Init, NonNegativeInt, PositiveInt, register

Width = PositiveInt | Literal["classes"]
Window = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Sides = Annotated[list[PositiveInt], Field(min_length=1, max_length=4)]
Connections = Annotated[list[Annotated[list[NonNegativeInt], Field(min_length=1)]], Field(min_length=1)]


def sequence(shape: Shape, outputs: int, layers: Sequence[Component]) -> nn.Sequential:
    """The layers one after another, each built for what the one before it gives.

    Raises ValueError for a layer that does not fit, with its index, its name and the shapes up to it.
    """
    from dltrain.modules import Layers

    modules = Layers()
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
    return sum(layer.args.get("times", 1) * max(1, written_out(list(_inside(layer)))) for layer in layers)


def _inside(layer: Component) -> Iterable[Component]:
    """The layers in a layer's own lists."""
    waiting: list[Any] = [value for value in layer.args.values() if isinstance(value, list)]
    while waiting:
        for each in waiting.pop():
            if isinstance(each, list):
                waiting.append(each)
            elif isinstance(each, Component):
                yield each


def show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def image(shape: Shape) -> tuple[int, int, int]:
    """Channels, height and width; raises ValueError where the shape is not an image's."""
    if len(shape) != 3:
        raise ValueError(f"needs an image (channels x height x width), got {show(shape)} numbers")
    channels, height, width = shape
    return channels, height, width


def check_groups(channels: int, width: int, groups: int) -> None:
    """Raises ValueError where a convolution's input and output channels cannot be split into so many groups."""
    if channels % groups or width % groups:
        raise ValueError(f"groups: {groups} divides not both {channels} input and {width} output channels")


def margins(window: Sequence[int], padding: int | str, dilation: int) -> tuple[int, ...]:
    """What a convolution adds at each side, in each dimension of its window: so many, none (valid), or to keep a size.

    Raises ValueError where `same` would add more at one side than at the other.
    """
    if isinstance(padding, int):
        return (padding,) * len(window)
    if padding == "valid":
        return (0,) * len(window)
    reach = [dilation * (size - 1) for size in window]
    if any(each % 2 for each in reach):
        kernel = "x".join(map(str, window))
        raise ValueError(f"padding: same needs an odd window; kernel {kernel} with dilation {dilation} is even")
    return tuple(each // 2 for each in reach)


def row(shape: Shape) -> int:
    """How many numbers; raises ValueError where they are not in a row."""
    if len(shape) != 1:
        raise ValueError(f"needs a row of numbers, got {show(shape)}; put `flatten` or `globalpool` before it")
    return shape[0]


@register("layer")
def conv(
    shape: Shape,
    outputs: int,
    *,
    out: Width,
    kernel: Window = 3,
    stride: PositiveInt = 1,
    padding: NonNegativeInt | Literal["same", "valid"] = "valid",
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    dilation: PositiveInt = 1,
    groups: PositiveInt | Literal["depthwise"] = 1,
    connections: Connections | None = None,
    bias: bool = True,
    init: Init | None = None,
) -> nn.Module:
    """Convolution of an image.

    out: output channels; `classes`: as many as the model has outputs
    kernel: height and width of the window: one number, or [height, width]
    stride: pixels between two windows
    padding: pixels around the image: how many, `valid` (none) or `same` (what makes the output as large as the input
        divided by the stride)
    padding_mode: what they are: zeros, the image mirrored (reflect), its outermost pixels (replicate), or its other
        side (circular)
    dilation: pixels between two taps of the window
    groups: parts that the channels are split into, each convolved alone; `depthwise`: each input channel alone
    connections: for each output channel the input channels, from 0, that it sees; default: all (as the table in LeCun
        et al. 1998, section II.B)
    bias: add a number to each output channel
    init: how the weights start, the bias then at zero; default: the model's `init`, else torch's
    """
    channels, _, _ = image(shape)
    width = outputs if out == "classes" else out
    groups = channels if groups == "depthwise" else groups
    check_groups(channels, width, groups)
    window = kernel if isinstance(kernel, list) else [kernel, kernel]
    settings: dict[str, Any] = {
        "kernel_size": tuple(window),
        "stride": stride,
        "padding": margins(window, padding, dilation),
        "padding_mode": padding_mode,
        "dilation": dilation,
        "bias": bias,
    }
    if connections is None:
        return start(nn.Conv2d(channels, width, groups=groups, **settings), init)
    from dltrain.modules import TableConv2d

    if len(connections) != width:
        raise ValueError(f"connections: {len(connections)} lists for {width} output channels")
    if groups != 1:
        raise ValueError("connections and groups exclude each other")
    for output, sources in enumerate(connections):
        if max(sources) >= channels or len({*sources}) < len(sources):
            text = f"list {output}, {sources}: expected different input channels of 0..{channels - 1}"
            raise ValueError(f"connections: {text}")
    return start(TableConv2d(channels, connections, **settings), init)


@register("layer")
def conv_transpose(
    shape: Shape,
    outputs: int,
    *,
    out: Width,
    kernel: PositiveInt = 3,
    stride: PositiveInt = 1,
    padding: NonNegativeInt = 0,
    output_padding: NonNegativeInt = 0,
    groups: PositiveInt = 1,
    bias: bool = True,
    init: Init | None = None,
) -> nn.Module:
    """Transposed convolution: each pixel spreads over a window, so that a stride makes the image larger.

    A side of n pixels becomes (n - 1) stride - 2 padding + kernel + output_padding.

    out: output channels; `classes`: as many as the model has outputs
    kernel: height and width of the window
    stride: pixels between two windows in the output
    padding: pixels cut off at each side of the output
    output_padding: pixels added at the right and at the bottom, fewer than the stride
    groups: parts that the channels are split into, each convolved alone
    bias: add a number to each output channel
    init: how the weights start, the bias then at zero; default: the model's `init`, else torch's
    """
    channels, _, _ = image(shape)
    width = outputs if out == "classes" else out
    check_groups(channels, width, groups)
    return start(nn.ConvTranspose2d(channels, width, kernel, stride, padding, output_padding, groups, bias=bias), init)


@register("layer")
def linear(shape: Shape, outputs: int, *, out: Width, bias: bool = True, init: Init | None = None) -> nn.Module:
    """Every output a weighted sum of all inputs: a fully connected layer.

    out: how many outputs; `classes`: as many as the model has
    bias: add a number to each output
    init: how the weights start, the bias then at zero; default: the model's `init`, else torch's
    """
    return start(nn.Linear(row(shape), outputs if out == "classes" else out, bias), init)


@register("layer")
def rbf(shape: Shape, outputs: int, *, out: Width) -> nn.Module:
    """Minus the squared distances to fixed random codes of +1 and -1, one for each output (LeCun et al. 1998, II.B).

    The codes are no parameters; LeNet-5 has them drawn by hand, and the paper allows random ones.

    out: how many codes; `classes`: as many as the model has outputs
    """
    from dltrain.modules import RadialBasis

    return RadialBasis(row(shape), outputs if out == "classes" else out)


@register("layer")
def scale(shape: Shape, outputs: int, *, value: Finite = 1.0, bias: bool = False) -> nn.Module:
    """Each channel times a number of its own, which is learned.

    After `sumpool`, with a bias, it is LeNet-5's subsampling (LeCun et al. 1998); at the end of a residual path, from a
    small value on, the layer scale of Touvron et al. 2021.

    value: where the numbers start
    bias: add a learned number to each channel, from 0 on
    """
    from dltrain.modules import Scale

    return Scale(shape, value, bias)


@register("layer")
def multiply(shape: Shape, outputs: int, *, factor: Finite) -> nn.Module:
    """Everything times a fixed number, such as the logits.

    factor: that number
    """
    from dltrain.modules import Multiply

    return Multiply(factor)


@register("layer")
def flatten(shape: Shape, outputs: int) -> nn.Module:
    """An image as one row of numbers."""
    from dltrain.modules import Flatten

    return Flatten()


@register("layer")
def reshape(shape: Shape, outputs: int, *, to: Sides) -> nn.Module:
    """The same numbers in another shape, as a decoder needs it before its first convolution.

    to: the shape, as [channels, height, width]
    """
    if prod(to) != prod(shape):
        text = f"is of {prod(to):,} numbers, and {prod(shape):,} come in ({show(shape)})"
        raise ValueError(f"to: {show(tuple(to))} {text}")
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, tuple(to)))


@register("layer")
def pad(
    shape: Shape,
    outputs: int,
    *,
    pixels: PositiveInt,
    mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
) -> nn.Module:
    """Pixels around the image.

    pixels: on each side
    mode: what they are: zeros, the image mirrored (reflect), its outermost pixels (replicate), or its other side
        (circular)
    """
    image(shape)
    modules: dict[str, type[nn.Module]] = {
        "zeros": nn.ZeroPad2d,
        "reflect": nn.ReflectionPad2d,
        "replicate": nn.ReplicationPad2d,
        "circular": nn.CircularPad2d,
    }
    return modules[mode](pixels)


@register("layer")
def upsample(
    shape: Shape, outputs: int, *, scale: PositiveInt = 2, mode: Literal["nearest", "bilinear"] = "nearest"
) -> nn.Module:
    """A larger image.

    scale: how many times as high and wide
    mode: each pixel repeated (nearest), or what lies between interpolated (bilinear)
    """
    image(shape)
    return nn.Upsample(scale_factor=scale, mode=mode)


@register("layer")
def dropout(shape: Shape, outputs: int, *, probability: BelowOne = 0.5) -> nn.Module:
    """Sets numbers to zero at random while training, and scales up the rest (Srivastava et al. 2014).

    probability: of each number to be set to zero
    """
    return nn.Dropout(probability)


@register("layer")
def drop_path(shape: Shape, outputs: int, *, probability: BelowOne) -> nn.Module:
    """Stochastic depth: as `dropout`, but of all numbers of an image at once (Huang et al. 2016).

    It is for the end of a residual path, which it then leaves out for some images of a batch.

    probability: of each image to be set to zero
    """
    from dltrain.modules import DropPath

    return DropPath(probability)
