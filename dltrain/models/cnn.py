"""The convolutional network: any list of layers."""

from __future__ import annotations

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.layers import sequence, shape_after, show
from dltrain.registry import Layers, register


@register("model")
def cnn(shape: Shape, outputs: int, *, layers: Layers) -> nn.Module:
    """A network from a list of layers, whose input sizes are inferred.

    layers: what an image goes through; the last must give as many numbers as the model has outputs
    """
    model = sequence(shape, outputs, layers)
    after = shape_after(model, shape)
    if after != (outputs,):
        text = f"the layers end with {show(after)} numbers, the model needs {outputs}; end with `- linear: classes`"
        raise ValueError(text)
    return model
