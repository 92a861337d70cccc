"""The perceptron: one linear layer."""

from __future__ import annotations

from math import prod

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.registry import register


@register("model")
def perceptron(shape: Shape, outputs: int, *, bias: bool = True) -> nn.Module:
    """One layer from pixels to outputs; with softmax and cross entropy this is softmax regression.

    bias: add a number to each output
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), outputs, bias))
