"""The convolutional network: any list of layers."""

from __future__ import annotations

from math import prod

from dltrain.lazy import nn
from dltrain.models.activations import Shape
from dltrain.models.initial import start_others
from dltrain.models.layers import sequence, shape_after, show, written_out
from dltrain.models.templates import Templated, Templates
from dltrain.registry import Init, Layers, register

MAX_LAYERS = 10_000  # a few bytes of `repeat` in `repeat` can ask for any number


@register("model", settings=Templated)
def cnn(
    shape: Shape,
    outputs: int,
    *,
    layers: Layers,
    define: Templates = {},  # noqa: B006  it is never changed, and always empty here: written out before
    init: Init | None = None,
) -> nn.Module:
    """A network from a list of layers, whose input sizes are inferred.

    layers: what an image goes through; the last must give as many numbers as the model has outputs
    define: templates: names for lists of layers that may stand in `layers`, as `block: [{conv: {out: 32}}, relu]`; with
        parameters as `block: {stride: 1, layers: [{conv: {out: $out, stride: $stride}}, relu]}`, where those without a
        value must be given; then `- block: {out: 32}` stands for its layers
    init: how the weights of convolutions and linear layers start that have no `init` of their own, their biases then at
        zero; default: torch's
    """
    if written_out(layers) > MAX_LAYERS:
        raise ValueError(f"more than {MAX_LAYERS:,} layers once each `repeat` is written out")
    model = sequence(shape, outputs, layers)
    after = shape_after(model, shape)
    if after != (outputs,) and len(after) != 2 and prod(after) != outputs:  # of places in a line; of pixels
        last = f"layer {len(layers) - 1} ({layers[-1].name})"
        text = f"ends with {show(after)} numbers, the model needs {outputs}; end with `- linear: classes`"
        raise ValueError(f"{last} {text}")
    return start_others(model, init)
