"""Losses: outputs (logits) and the true classes -> one number to minimise.

`outputs` is float `[B, K]`, one logit per class, or `[B, 1]` where the model's output is a sigmoid between two classes;
`targets` is int64 `[B]` in 0..classes-1.

Every loss is the mean over the batch's images of a term that depends on that image alone.  So the losses and gradients
of micro-batches, weighted by their sizes, add up to those of the whole batch exactly.  For this, class weights multiply
the terms and the sum is still divided by the number of images, not by the sum of the weights as torch's own mean does.

float16 and bfloat16 outputs are computed in float32.  No loss waits for the device.
"""

from __future__ import annotations

import functools

from dltrain.lazy import F, torch
from dltrain.registry import BelowOne, Positive, register


@register("loss")
def cross_entropy(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    label_smoothing: BelowOne = 0.0,
    class_weights: list[Positive] | None = None,
) -> torch.Tensor:
    """Cross entropy between the softmax of the outputs and the true class.

    label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7)
    class_weights: one weight per class, in the order of the labels; an image counts by the weight of its class

    Raises ValueError where there is one output only, or not one weight per class.
    """
    classes = outputs.shape[1]
    if classes == 1:
        raise ValueError(
            "cross_entropy needs one output per class, got one output for two classes: "
            "set `loss: bce`, or `model.output: softmax`"
        )
    outputs = _at_least_float32(outputs)
    if class_weights is None:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    if len(class_weights) != classes:
        raise ValueError(f"loss.class_weights: expected {classes} weights, one per class, got {len(class_weights)}")
    weights = _weights(tuple(class_weights), outputs.device, outputs.dtype)
    total = F.cross_entropy(outputs, targets, weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(targets)


@register("loss")
def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the outputs and one-hot targets: per image, the mean over the classes.

    The outputs are compared as they are, before any softmax.  A single output `[B, 1]` passes its sigmoid first and is
    compared with 0 or 1: regressed as it is it would decide at 0.5, where the sigmoid decides at 0.
    """
    outputs = _at_least_float32(outputs)
    if outputs.shape[1] == 1:
        return F.mse_loss(torch.sigmoid(outputs[:, 0]), targets.to(outputs.dtype))
    return F.mse_loss(outputs, F.one_hot(targets, outputs.shape[1]).to(outputs.dtype))


@register("loss")
def bce(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy between the sigmoid of one output and the true one of two classes.

    Raises ValueError where there is more than one output.
    """
    if outputs.shape[1] != 1:
        raise ValueError(
            f"bce needs one output for two classes, got {outputs.shape[1]} outputs: "
            "set `model.output: sigmoid` and keep two classes (`data.classes: [3, 7]` does), or `loss: cross_entropy`"
        )
    outputs = _at_least_float32(outputs)
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype))


def _at_least_float32(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # float64 stays: gradients are checked in it


@functools.lru_cache(maxsize=8)
def _weights(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The weights as a tensor, kept: a copy to the device at each step would wait for it."""
    with torch.inference_mode(False):  # an evaluation may come first, and training cannot use what it would keep
        return torch.tensor(values, dtype=dtype, device=device)
