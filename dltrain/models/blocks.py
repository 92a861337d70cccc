"""Layers made of layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.layers import image, sequence, shape_after, show
from dltrain.registry import Layers, PositiveInt, register


@register("layer")
def repeat(shape: Shape, outputs: int, *, times: PositiveInt, layers: Layers) -> nn.Module:
    """The same layers several times, each time with weights of its own.

    times: how often
    layers: what is repeated
    """
    return sequence(shape, outputs, [*layers] * times)


@register("layer")
def residual(
    shape: Shape,
    outputs: int,
    *,
    layers: Layers,
    shortcut: Literal["identity", "projection", "pad", "auto"] = "identity",
    before: Layers | None = None,
) -> nn.Module:
    """The layers' output plus their input (He et al. 2016).

    layers: the path beside the shortcut
    shortcut: `identity` needs equal shapes; `projection` brings the input to the output's shape by a strided 1x1
        convolution and batch normalisation; `pad` by leaving out pixels and adding channels of zeros (option A of the
        paper); `auto` is a projection where the shapes differ
    before: layers ahead of the path, for pre-activation as in Zagoruyko & Komodakis 2016; a projection then takes what
        they give and is a convolution alone, while the other shortcuts take the input as it is
    """
    from dltrain.modules import PadShortcut, Residual

    first = sequence(shape, outputs, before or [])
    between = shape_after(first, shape)
    path = sequence(between, outputs, layers)
    after = shape_after(path, between)
    whole = nn.Sequential(first, path) if before else path
    if after == shape and shortcut in ("identity", "auto"):
        return Residual(whole, nn.Identity())
    if shortcut == "identity":
        text = f"the layers make {show(after)} of {show(shape)}; equal shapes, or another `shortcut`, are needed"
        raise ValueError(text)
    channels, height, _ = image(shape)
    wanted, smaller, _ = image(after)
    stride = -(-height // smaller)
    if shortcut == "pad":
        if channels > wanted:
            raise ValueError(f"padding makes no {wanted} channels of {channels}")
        _check_shortcut(PadShortcut(wanted, stride), shape, after)
        return Residual(whole, PadShortcut(wanted, stride))
    projection: nn.Module = nn.Conv2d(image(between)[0], wanted, 1, stride, bias=False)
    if not before:
        projection = nn.Sequential(projection, nn.BatchNorm2d(wanted))
    _check_shortcut(projection, between, after)
    return nn.Sequential(first, Residual(path, projection)) if before else Residual(path, projection)


def _check_shortcut(shortcut: nn.Module, shape: Shape, after: Shape) -> None:
    if shape_after(shortcut, shape) != after:
        raise ValueError(f"no strided shortcut makes {show(after)} of {show(shape)}")


@register("layer")
def concat(shape: Shape, outputs: int, *, branches: Annotated[list[Layers], Field(min_length=1)]) -> nn.Module:
    """The outputs of several lists of layers, one after another along the channels (Inception, DenseNet).

    branches: the lists; each takes the same input, and `[identity]` passes it on
    """
    from dltrain.modules import Concat

    built = [sequence(shape, outputs, layers) for layers in branches]
    shapes = [shape_after(branch, shape) for branch in built]
    if len({each[1:] for each in shapes}) > 1 or len({*map(len, shapes)}) > 1:
        raise ValueError(f"the branches make {', '.join(map(show, shapes))}, which differ in more than their channels")
    return Concat(built)


@register("layer")
def squeeze_excitation(shape: Shape, outputs: int, *, reduction: PositiveInt = 16) -> nn.Module:
    """Each channel times a number from 0 to 1 that a small network finds from all channels' means (Hu et al. 2018).

    reduction: how many times fewer hidden numbers than channels it has
    """
    from dltrain.modules import Gate

    channels, _, _ = image(shape)
    hidden = max(1, channels // reduction)
    return Gate(
        nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
    )
