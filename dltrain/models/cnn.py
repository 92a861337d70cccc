"""The convolutional network: any list of layers."""

from __future__ import annotations

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.layers import sequence, shape_after, show, written_out
from dltrain.registry import Layers, register

MAX_LAYERS = 10_000  # a few bytes of `repeat` in `repeat` can ask for any number


@register("model")
def cnn(shape: Shape, outputs: int, *, layers: Layers) -> nn.Module:
    """A network from a list of layers, whose input sizes are inferred.

    layers: what an image goes through; the last must give as many numbers as the model has outputs
    """
    if written_out(layers) > MAX_LAYERS:
        raise ValueError(f"more than {MAX_LAYERS:,} layers once each `repeat` is written out")
    model = sequence(shape, outputs, layers)
    after = shape_after(model, shape)
    if after != (outputs,):
        last = f"layer {len(layers) - 1} ({layers[-1].name})"
        text = f"ends with {show(after)} numbers, the model needs {outputs}; end with `- linear: classes`"
        raise ValueError(f"{last} {text}")
    return model
