"""Normalisation of what goes through a network."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start
from dltrain.models.layers import image
from dltrain.registry import Component, Item, NonNegative, Positive, PositiveInt, register

WeightInit = Annotated[Component, Item("init")]


@register("layer")
def batchnorm(
    shape: Shape,
    outputs: int,
    *,
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1,
    eps: Positive = 1e-5,
    init: WeightInit | None = None,
) -> nn.Module:
    """Batch normalisation (Ioffe & Szegedy 2015) of channels (of a sequence, an image, a volume), or of features.

    momentum: share of a batch in the running statistics that evaluation uses
    eps: added to the variance
    init: how the learned scale starts; default: all 1
    """
    modules: dict[int, type[nn.Module]] = {3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    return start(modules.get(len(shape), nn.BatchNorm1d)(shape[0], eps=eps, momentum=momentum), init)


@register("layer")
def layernorm(shape: Shape, outputs: int, *, eps: Positive = 1e-5, init: WeightInit | None = None) -> nn.Module:
    """Layer normalisation (Ba et al. 2016) of a row's features, or of the channels at each pixel (or place).

    Of images it is ConvNeXt's (Liu et al. 2022); over all channels and pixels at once, `groupnorm: 1` normalises.

    eps: added to the variance
    init: how the learned scale starts; default: all 1
    """
    from dltrain.modules import ChannelNorm

    return start((ChannelNorm if len(shape) > 1 else nn.LayerNorm)(shape[0], eps=eps), init)


@register("layer")
def groupnorm(
    shape: Shape, outputs: int, *, groups: PositiveInt, eps: Positive = 1e-5, init: WeightInit | None = None
) -> nn.Module:
    """Group normalisation (Wu & He 2018): of each image alone, over the pixels of some channels at once.

    groups: parts that the channels are split into
    eps: added to the variance
    init: how the learned scale starts; default: all 1
    """
    return start(nn.GroupNorm(groups, shape[0], eps), init)


@register("layer")
def instancenorm(shape: Shape, outputs: int, *, eps: Positive = 1e-5, init: WeightInit | None = None) -> nn.Module:
    """Instance normalisation (Ulyanov et al. 2016): of each channel of each image over its pixels.

    eps: added to the variance
    init: how the learned scale starts; default: all 1
    """
    channels, _, _ = image(shape)
    return start(nn.InstanceNorm2d(channels, eps, affine=True), init)


@register("layer")
def local_response_norm(
    shape: Shape,
    outputs: int,
    *,
    size: PositiveInt = 5,
    alpha: NonNegative = 1e-4,
    beta: NonNegative = 0.75,
    k: Positive = 2.0,
) -> nn.Module:
    """x / (k + alpha S)^beta, where S sums the squares of neighbouring channels (Krizhevsky et al. 2012, section 3.3).

    size: how many channels are summed
    alpha: multiplies the sum
    beta: exponent
    k: added to it
    """
    image(shape)
    return nn.LocalResponseNorm(size, alpha * size, beta, k)  # torch's alpha multiplies the mean
