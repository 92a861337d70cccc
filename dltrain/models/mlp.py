"""The multi-layer perceptron."""

from __future__ import annotations

from math import prod

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start_others
from dltrain.registry import Activation, BelowOne, Component, Init, PositiveInt, register


@register("model")
def mlp(
    shape: Shape,
    outputs: int,
    *,
    hidden: list[PositiveInt],
    activation: Activation = Component("activation", "relu", {}),  # noqa: B008  it cannot be changed
    dropout: BelowOne = 0.0,
    batchnorm: bool = False,
    init: Init | None = None,
) -> nn.Module:
    """Fully connected layers from pixels to outputs.

    hidden: width of each hidden layer, from the pixels on; as many layers as there are numbers
    activation: after each hidden layer
    dropout: probability of each hidden number to be set to zero while training
    batchnorm: normalise before each activation; the layer then has no bias of its own
    init: how the weights start, the biases then at zero; default: torch's
    """
    modules: list[nn.Module] = [nn.Flatten()]
    before = prod(shape)
    for width in hidden:
        modules.append(nn.Linear(before, width, bias=not batchnorm))
        if batchnorm:
            modules.append(nn.BatchNorm1d(width))
        modules.append(activation((width,), outputs))
        if dropout:
            modules.append(nn.Dropout(dropout))
        before = width
    modules.append(nn.Linear(before, outputs))
    return start_others(nn.Sequential(*modules), init)
