"""Losses: outputs (logits) and what is true of each image -> one number to minimise.

`outputs` is float `[B, K]`, one logit per class, or `[B, 1]` where the model's output is a sigmoid between two classes.
`targets` is int64 `[B]`, the true class of each image in 0..classes-1, or float32 `[B, classes]`, a distribution over
the classes, where images were mixed (also for `[B, 1]`: two columns, the second one what the sigmoid is to say).  A
loss of margins has no meaning for a mixture and raises ValueError for one.

Of reconstruction, `targets` is float32 `[B, C, H, W]`, pixels in 0..1, and `outputs` as many numbers an image, whose
sigmoid is to be them.  Of transcription, `targets` is int64 `[B, L]`, with -1 after a line's end, and `outputs`
`[B, classes + 1, T]`, the last of them for none.  A loss names the tasks that it is for where it is registered.

Every loss is the mean over the batch's images of a term that depends on that image alone.  So the losses and gradients
of micro-batches, weighted by their sizes, add up to those of the whole batch exactly.  For this, class weights multiply
the terms and the sum is still divided by the number of images, not by the sum of the weights as torch's own mean does.
A loss of a mixture is the terms of its classes, each weighted by its share (and by its class).

`class_weights: balanced` is for the program to replace by `balanced_weights` of the training images; a loss takes the
list alone.

float16 and bfloat16 outputs are computed in float32.  No loss waits for the device.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

from pydantic import Field

from dltrain.errors import ConfigError
from dltrain.lazy import F, torch
from dltrain.registry import BelowOne, NonNegative, Positive, register

PIXELS = ("classification", "reconstruction")  # the tasks of losses that compare pixels too
ClassWeights = list[Positive] | Literal["balanced"] | None


@register("loss")
def cross_entropy(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    label_smoothing: BelowOne = 0.0,
    class_weights: ClassWeights = None,
) -> torch.Tensor:
    """Cross entropy between the softmax of the outputs and the true class.

    label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7)
    class_weights: one weight per class, in the order of the labels, or balanced (N / (K n_k): a class's images count as
        much as another's); an image counts by the weight of its class

    Raises ValueError where there is one output only, or not one weight per class.
    """
    outputs = _one_per_class(_at_least_float32(outputs))
    if targets.is_floating_point():
        targets = targets.to(outputs.dtype)
    if class_weights is None:
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    weights = _weights(class_weights, outputs.shape[1], outputs)
    total = F.cross_entropy(outputs, targets, weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(targets)


@register("loss")
def nll(outputs: torch.Tensor, targets: torch.Tensor, *, class_weights: ClassWeights = None) -> torch.Tensor:
    """Negative logarithm of the true class's probability.

    The outputs pass a log-softmax first, which leaves outputs that are log-probabilities already as they are: so this
    is torch's nll_loss for a model that ends with a log-softmax, and cross_entropy for one that does not.  Of a single
    output `[B, 1]` the probability is its sigmoid, and this is bce.

    class_weights: one weight per class, in the order of the labels, or balanced; an image counts by the weight of its
        class

    Raises ValueError where there is not one weight per class.
    """
    return _mean(-_log_probabilities(outputs), targets, class_weights)


@register("loss", tasks=PIXELS)
def bce(outputs: torch.Tensor, targets: torch.Tensor, *, class_weights: ClassWeights = None) -> torch.Tensor:
    """Binary cross entropy between the sigmoid of one output and the true one of two classes.

    Of reconstruction, between the sigmoid of each output and its pixel, as a mean over the pixels.

    class_weights: two weights, in the order of the labels, or balanced; an image counts by the weight of its class

    Raises ValueError where there is more than one output, or there are not two weights.
    """
    if targets.ndim == 4:
        if class_weights is not None:
            raise ValueError("class_weights: pixels have no class: leave it out")
        outputs = _at_least_float32(outputs).view_as(targets)
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))
    if outputs.shape[1] != 1:
        raise ValueError(
            f"needs one output for two classes, got {outputs.shape[1]} outputs: "
            "set `model.output: sigmoid` and keep two classes (`data.classes: [3, 7]` does), or `loss: cross_entropy`"
        )
    if class_weights is not None:
        return _mean(-_log_probabilities(outputs), targets, class_weights)
    outputs = _at_least_float32(outputs)
    return F.binary_cross_entropy_with_logits(outputs[:, 0], _second(targets).to(outputs.dtype))


@register("loss")
def kl_divergence(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the softmax (or sigmoid) of the outputs to the targets, KL(target || model).

    Cross entropy less the targets' own entropy, so that it is 0 where the model is right about a mixture too; for one
    true class an image, the same as cross entropy.
    """
    log_probabilities = _log_probabilities(outputs)
    shares = _shares(targets, log_probabilities)
    divergence: torch.Tensor = F.kl_div(log_probabilities, shares, reduction="batchmean")
    return divergence


@register("loss")
def focal(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    gamma: NonNegative = 2.0,
    class_weights: ClassWeights = None,
) -> torch.Tensor:
    """Cross entropy that fades as the true class becomes probable: (1 - p)^gamma (-log p) (Lin et al. 2017).

    Of a single output `[B, 1]` the probability is its sigmoid, as in the paper; of several, their softmax.

    gamma: how fast the terms fade; 0: not at all (cross entropy)
    class_weights: one weight per class, in the order of the labels (the paper's alpha: [1 - alpha, alpha]), or
        balanced; an image counts by the weight of its class

    Raises ValueError where there is not one weight per class.
    """
    log_probabilities = _log_probabilities(outputs)
    # below 1, gamma has an infinite slope where the rest is 0: clamped there, its slope is 0 and not a NaN
    rest = (-log_probabilities.expm1()).clamp(min=torch.finfo(log_probabilities.dtype).tiny)
    return _mean(-(rest**gamma) * log_probabilities, targets, class_weights)


@register("loss")
def poly1(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    epsilon: Annotated[float, Field(ge=-1, allow_inf_nan=False)] = 1.0,
    label_smoothing: BelowOne = 0.0,
    class_weights: ClassWeights = None,
) -> torch.Tensor:
    """Cross entropy plus epsilon (1 - p) of the true class's probability p (Poly-1 of Leng et al. 2022).

    Of a single output `[B, 1]` the probability is its sigmoid; of several, their softmax.

    epsilon: added to the first coefficient, 1, of cross entropy's expansion in powers of 1 - p, so that below -1 the
        loss would grow again as p nears 1
    label_smoothing: share of the target spread evenly over all classes, in both terms
    class_weights: one weight per class, in the order of the labels, or balanced; an image counts by the weight of its
        class

    Raises ValueError where there is not one weight per class.
    """
    log_probabilities = _log_probabilities(outputs)
    shares = _shares(targets, log_probabilities)
    shares = (1 - label_smoothing) * shares + label_smoothing / shares.shape[1]
    return _mean(-log_probabilities - epsilon * log_probabilities.expm1(), shares, class_weights)


@register("loss", tasks=PIXELS)
def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the outputs and one-hot targets: per image, the mean over the classes.

    The outputs are compared as they are, before any softmax.  A single output `[B, 1]` passes its sigmoid first and is
    compared with 0 or 1: regressed as it is it would decide at 0.5, where the sigmoid decides at 0.  Pixels of a
    reconstruction are compared with sigmoids likewise.
    """
    return F.mse_loss(*_regressed(outputs, targets))


@register("loss", tasks=PIXELS)
def huber(outputs: torch.Tensor, targets: torch.Tensor, *, delta: Positive = 1.0) -> torch.Tensor:
    """Half the squared error up to `delta`, straight beyond, between outputs and one-hot targets as in mse.

    The straight part is delta (|error| - delta / 2) (Huber 1964).

    delta: where the square ends, in units of the output
    """
    return F.huber_loss(*_regressed(outputs, targets), delta=delta)


@register("loss", tasks=PIXELS)
def smooth_l1(outputs: torch.Tensor, targets: torch.Tensor, *, beta: NonNegative = 1.0) -> torch.Tensor:
    """Absolute error with its corner rounded up to `beta`, between outputs and one-hot targets as in mse.

    Within beta it is error^2 / (2 beta), beyond it |error| - beta / 2: huber divided by its delta (Girshick 2015).

    beta: where the rounding ends, in units of the output; 0: none (the absolute error, L1)
    """
    return F.smooth_l1_loss(*_regressed(outputs, targets), beta=beta)


@register("loss")
def multi_margin(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    p: Literal[1, 2] = 1,
    margin: Positive = 1.0,
    class_weights: ClassWeights = None,
) -> torch.Tensor:
    """Hinge of each wrong class's output against the true one's: per image, their sum over the number of classes.

    max(0, margin - true output + wrong output)^p (Weston & Watkins 1999; as torch's MultiMarginLoss).

    p: 1, or 2 for the squared hinge
    margin: by how much the true class's output is to exceed the others
    class_weights: one weight per class, in the order of the labels, or balanced; an image counts by the weight of its
        class

    Raises ValueError where there is one output only, images are mixed, or there is not one weight per class.
    """
    outputs = _one_per_class(_at_least_float32(outputs))
    true = _true_class(outputs, targets)
    excess = margin - (outputs * true).sum(1, keepdim=True) + outputs
    terms = excess.clamp(min=0).masked_fill(true, 0) ** p  # [B, K]
    return _mean(terms.mean(1, keepdim=True).expand_as(terms), targets, class_weights)


@register("loss")
def hinge(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    p: Literal[1, 2] = 1,
    margin: Positive = 1.0,
    class_weights: ClassWeights = None,
) -> torch.Tensor:
    """Hinge of support vector machines: max(0, margin - lead)^p.

    The lead is by how much the true class's output exceeds the largest other (Crammer & Singer 2001).  Of a single
    output `[B, 1]` it is the output for the second class, and minus the output for the first: max(0, 1 - t y).

    p: 1, or 2 for the squared hinge
    margin: the lead beyond which nothing is lost
    class_weights: one weight per class, in the order of the labels, or balanced; an image counts by the weight of its
        class

    Raises ValueError where images are mixed, or there is not one weight per class.
    """
    outputs = _of_both_classes(outputs)
    terms = (margin - _lead(outputs, targets)).clamp(min=0) ** p  # [B, 1]
    return _mean(terms.expand_as(outputs), targets, class_weights)


@register("loss", tasks=("transcription",))
def ctc(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Connectionist temporal classification: how improbable a line is, in whichever places its symbols stand.

    The negative logarithm of the sum, over all ways to place the symbols with blanks between them, of their
    probability, divided by the number of symbols (Graves et al. 2006; torch's ctc_loss).
    """
    log_probabilities = F.log_softmax(_at_least_float32(outputs), 1).permute(2, 0, 1)  # [T, B, classes + 1]
    places, lines, numbers = log_probabilities.shape
    lengths = (targets >= 0).sum(1)
    found: torch.Tensor = F.ctc_loss(
        log_probabilities,
        targets.clamp(min=0),
        torch.full((lines,), places, device=targets.device),
        lengths,
        blank=numbers - 1,
    )
    return found


@register("loss")
def perceptron(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The perceptron's criterion: how far the largest other output exceeds the true class's, 0 where none does.

    A hinge without a margin.  Of a single output `[B, 1]` it is max(0, -t y), t being -1 for the first class and 1 for
    the second.  With one image a step and no momentum this is Rosenblatt's rule (1958): a wrong image moves the weights
    by the learning rate times its inputs, a right one does not.  A tie counts as wrong, so that weights may start at 0.

    Raises ValueError where images are mixed.
    """
    behind = -_lead(_of_both_classes(outputs), targets)
    return (behind * (behind >= 0)).mean()  # with a slope at 0, where a clamp has none


def balanced_weights(labels: torch.Tensor, classes: int) -> list[float]:
    """Class weights N / (K n_k), with which each class counts alike and an image 1 in the mean.

    The same as scikit-learn's class_weight="balanced".

    labels: int64 `[N]` in 0..classes-1, of the images that are trained on

    Raises ConfigError where a class has no images.  Waits for the device that the labels are on.
    """
    counts = torch.bincount(labels, minlength=classes).tolist()
    if 0 in counts:
        raise ConfigError(
            f"loss.class_weights: balanced needs an image of each class, and class {counts.index(0)} has none to train "
            "on: give a list of weights, or leave it out with data.classes"
        )
    return [len(labels) / (classes * count) for count in counts]


def _at_least_float32(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # float64 stays: gradients are checked in it


def _one_per_class(outputs: torch.Tensor) -> torch.Tensor:
    if outputs.shape[1] == 1:
        raise ValueError(
            "needs one output per class, got one output for two classes: set `loss: bce` (for margins `loss: hinge`), "
            "or `model.output: softmax`"
        )
    return outputs


def _log_probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """`[B, classes]`: of the softmax, or of a single output's sigmoid and what is left to 1."""
    outputs = _at_least_float32(outputs)
    if outputs.shape[1] == 1:  # more exact near 0 than a softmax of two
        return F.logsigmoid(torch.cat((-outputs, outputs), 1))
    return F.log_softmax(outputs, 1)


def _shares(targets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The targets as distributions `[B, classes]`, of the shape and dtype of `like`."""
    return (targets if targets.is_floating_point() else F.one_hot(targets, like.shape[1])).to(like.dtype)


def _mean(terms: torch.Tensor, targets: torch.Tensor, class_weights: ClassWeights) -> torch.Tensor:
    """The mean over the images of `terms` `[B, classes]`, weighted by the classes' shares in an image and weights."""
    shares = _shares(targets, terms)
    if class_weights is not None:
        shares = shares * _weights(class_weights, terms.shape[1], terms)
    return (shares * terms).sum() / len(terms)


def _weights(class_weights: ClassWeights, classes: int, like: torch.Tensor) -> torch.Tensor:
    """`[classes]`, of the dtype and on the device of `like`."""
    assert isinstance(class_weights, list), "the program replaces `balanced`"
    if len(class_weights) != classes:
        raise ValueError(f"class_weights: expected {classes} weights, one per class, got {len(class_weights)}")
    return _kept(tuple(class_weights), like.device, like.dtype)


@functools.lru_cache(maxsize=8)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The values as a tensor, kept: a copy to the device at each step would wait for it."""
    with torch.inference_mode(False):  # an evaluation may come first, and training cannot use what it would keep
        return torch.tensor(values, dtype=dtype, device=device)


def _regressed(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a regression compares: outputs and one-hot targets `[B, K]`, or a sigmoid and the second class's `[B]`.

    Of reconstruction, sigmoids and pixels `[B, C, H, W]`.
    """
    outputs = _at_least_float32(outputs)
    if targets.ndim == 4:
        return outputs.view_as(targets).sigmoid(), targets.to(outputs.dtype)
    if outputs.shape[1] > 1:
        return outputs, _shares(targets, outputs)
    return torch.sigmoid(outputs[:, 0]), _second(targets).to(outputs.dtype)


def _second(targets: torch.Tensor) -> torch.Tensor:
    """`[B]`: how far an image is of the second of two classes."""
    return targets[:, 1] if targets.is_floating_point() else targets


def _true_class(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """bool `[B, K]`: where the true class is."""
    if targets.is_floating_point():
        raise ValueError("needs one true class an image: leave out mixup and cutmix, or set `loss: cross_entropy`")
    return F.one_hot(targets, outputs.shape[1]).bool()


def _of_both_classes(outputs: torch.Tensor) -> torch.Tensor:
    """`[B, classes]`: a single output speaks for the second class against 0 for the first."""
    outputs = _at_least_float32(outputs)
    return torch.cat((torch.zeros_like(outputs), outputs), 1) if outputs.shape[1] == 1 else outputs


def _lead(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[B, 1]`: by how much the true class's output exceeds the largest other, of outputs `[B, classes]`."""
    true = _true_class(outputs, targets)
    own = (outputs * true).sum(1, keepdim=True)
    return own - outputs.masked_fill(true, -torch.inf).amax(1, keepdim=True)
