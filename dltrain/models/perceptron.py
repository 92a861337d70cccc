"""The perceptron: one linear layer."""

from __future__ import annotations

from math import prod

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start
from dltrain.registry import Init, register


@register("model")
def perceptron(shape: Shape, outputs: int, *, bias: bool = True, init: Init | None = None) -> nn.Module:
    """One layer from pixels to outputs; with softmax and cross entropy this is softmax regression.

    bias: add a number to each output
    init: how the weights start, the bias then at zero; default: torch's
    """
    return nn.Sequential(nn.Flatten(), start(nn.Linear(prod(shape), outputs, bias), init))
