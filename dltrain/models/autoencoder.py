"""The auto-encoder: two lists of layers, and a few numbers between them."""

from __future__ import annotations

from math import prod

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start_others
from dltrain.models.layers import sequence, shape_after, show
from dltrain.registry import Init, Layers, register


@register("model")
def autoencoder(shape: Shape, outputs: int, *, encoder: Layers, decoder: Layers, init: Init | None = None) -> nn.Module:
    """From an image to a few numbers, its code, and back (Hinton & Salakhutdinov 2006); for `task: reconstruction`.

    TensorBoard's projector (`tensorboard.embedding`) shows the codes.

    encoder: the layers from the image to its code
    decoder: the layers from the code to as many numbers as the image has, in the same order or in any shape;
        `linear: classes` gives so many
    init: how the weights of convolutions and linear layers start that have no `init` of their own, their biases then at
        zero; default: torch's
    """
    model = nn.Sequential()
    model.add_module("encoder", sequence(shape, outputs, encoder))
    code = shape_after(model, shape)
    try:
        model.add_module("decoder", sequence(code, outputs, decoder))
    except ValueError as error:
        raise ValueError(f"decoder: {error}") from None
    if prod(after := shape_after(model, shape)) != outputs:
        raise ValueError(f"decoder: ends with {show(after)} numbers, the model needs {outputs}")
    return start_others(model, init)
