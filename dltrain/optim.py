"""Optimizers chosen by name: torch's own, with their state and arithmetic, and those of `optimizers`.

Facts registered with them: `closure`, `step` takes a function that computes loss and gradient anew and returns the
loss; `averages`, a method `evaluation_weights() -> dict[Parameter, Tensor]` has the weights to evaluate in place of
those that are trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal

from dltrain.lazy import torch
from dltrain.registry import BelowOne, NonNegative, NonNegativeInt, Positive, PositiveInt, register


@cache
def _lean(base: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A class of optimizers without the import of torch._dynamo, which costs over a second.

    torch wraps these methods in functions that import its compiler only to tell it not to compile them.  The functions
    below the wrappers are what runs either way; `step` is then ours to keep out of autograd.
    """
    methods = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    step = torch.no_grad()(inspect.unwrap(base.step))
    step.hooked = True  # without this torch wraps it in a profiler's record, some 30 us a step
    return type(
        base.__name__, (base,), {method: inspect.unwrap(getattr(base, method)) for method in methods} | {"step": step}
    )


def _fused(name: str, params: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """All parameters are updated by one kernel, where torch has one for the device."""
    params = list(params)
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in params)
    return _plain(name, params, fused=fused, **settings)


def _plain(name: str, params: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    return _lean(getattr(torch.optim, name))(params, **settings)


def _own(name: str, params: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    from dltrain import optimizers  # imports torch

    return _lean(getattr(optimizers, name))(params, **settings)


@register("optim", elementwise=True)
def sgd(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive,
    momentum: BelowOne = 0.0,
    nesterov: bool = False,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Gradient descent, with momentum or Nesterov's momentum (Sutskever et al. 2013).

    lr: step size
    momentum: share of the last step that is kept
    nesterov: look ahead along the momentum before taking the gradient's step
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0")
    return _fused("SGD", params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


@register("optim", elementwise=True)
def adam(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-3,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015).

    lr: step size
    beta1: decay of the mean of gradients
    beta2: decay of the mean of squared gradients
    eps: added to the root of the second
    weight_decay: L2 penalty; this times the weight is added to the gradient
    amsgrad: divide by the largest second moment so far (Reddi et al. 2018)
    """
    betas = (beta1, beta2)
    return _fused("Adam", params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


@register("optim", elementwise=True)
def adamw(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-3,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.01,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    lr: step size
    beta1: decay of the mean of gradients
    beta2: decay of the mean of squared gradients
    eps: added to the root of the second
    weight_decay: each step shrinks the weights by lr times this
    amsgrad: divide by the largest second moment so far (Reddi et al. 2018)
    """
    betas = (beta1, beta2)
    return _fused("AdamW", params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


@register("optim", elementwise=True)
def rmsprop(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-2,
    alpha: BelowOne = 0.99,
    eps: Positive = 1e-8,
    momentum: BelowOne = 0.0,
    centered: bool = False,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """RMSprop (Tieleman & Hinton 2012).

    lr: step size
    alpha: decay of the mean of squared gradients
    eps: added to its root
    momentum: share of the last step that is kept
    centered: subtract the squared mean gradient, so that the variance divides
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    settings = {"alpha": alpha, "eps": eps, "momentum": momentum, "centered": centered, "weight_decay": weight_decay}
    return _plain("RMSprop", params, lr=lr, **settings)


@register("optim", elementwise=True)
def adagrad(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-2,
    lr_decay: NonNegative = 0.0,
    eps: Positive = 1e-10,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Adagrad (Duchi et al. 2011).

    lr: step size
    lr_decay: step t uses lr / (1 + (t - 1) lr_decay)
    eps: added to the root of the sum of squared gradients
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    return _fused("Adagrad", params, lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)


@register("optim", elementwise=True)
def adadelta(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1.0,
    rho: BelowOne = 0.9,
    eps: Positive = 1e-6,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Adadelta (Zeiler 2012), whose steps have the size of its last ones.

    lr: share of such a step that is taken
    rho: decay of the mean of squared gradients, and of squared steps
    eps: added to both before their roots are taken
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    return _plain("Adadelta", params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)


@register("optim", elementwise=True)
def adamax(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 2e-3,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """AdaMax (Kingma & Ba 2015): Adam, divided by the largest gradient of late.

    lr: step size
    beta1: decay of the mean of gradients
    beta2: decay of the largest gradient
    eps: added to the size of each gradient
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    return _plain("Adamax", params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


@register("optim", elementwise=True)
def nadam(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 2e-3,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    momentum_decay: NonNegative = 4e-3,
    weight_decay: NonNegative = 0.0,
    decoupled_weight_decay: bool = False,
) -> torch.optim.Optimizer:
    """Adam with Nesterov's momentum (Dozat 2016).

    lr: step size
    beta1: decay of the mean of gradients
    beta2: decay of the mean of squared gradients
    eps: added to the root of the second
    momentum_decay: step t looks ahead by beta1 (1 - 0.96^(t momentum_decay) / 2)
    weight_decay: this times the weight is added to the gradient
    decoupled_weight_decay: shrink the weights by lr times weight_decay instead, as adamw
    """
    settings = {"momentum_decay": momentum_decay, "decoupled_weight_decay": decoupled_weight_decay}
    return _plain("NAdam", params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **settings)


@register("optim", elementwise=True)
def radam(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-3,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    decoupled_weight_decay: bool = False,
) -> torch.optim.Optimizer:
    """Rectified Adam (Liu et al. 2020), which divides by a second moment once it has seen enough to estimate one.

    lr: step size
    beta1: decay of the mean of gradients
    beta2: decay of the mean of squared gradients
    eps: added to the root of the second
    weight_decay: this times the weight is added to the gradient
    decoupled_weight_decay: shrink the weights by lr times weight_decay instead, as adamw
    """
    settings = {"weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay}
    return _plain("RAdam", params, lr=lr, betas=(beta1, beta2), eps=eps, **settings)


@register("optim", averages=True, elementwise=True)
def asgd(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-2,
    lambd: NonNegative = 1e-4,
    alpha: NonNegative = 0.75,
    t0: NonNegativeInt = 1_000_000,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Averaged gradient descent (Polyak & Juditsky 1992): trains one set of weights, evaluates the mean of its path.

    lr: step size
    lambd: step t uses lr / (1 + lambd lr t)^alpha; also a decay of the weights, by this times that
    alpha: see lambd
    t0: the mean is that of the weights after this many steps, until then the weights themselves; torch's default, which
        few runs reach
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    params = list(params)
    on_device = all(p.is_cuda for p in params)  # its numbers stay there: reading them would wait at each step
    settings = {"alpha": alpha, "t0": t0, "weight_decay": weight_decay, "capturable": on_device}
    return _own("ASGD", params, lr=lr, lambd=lambd, **settings)


@register("optim", closure=True)
def lbfgs(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1.0,
    max_iterations: PositiveInt = 20,
    history: PositiveInt = 10,
    line_search: Literal["strong_wolfe", "none"] = "strong_wolfe",
) -> torch.optim.Optimizer:
    """L-BFGS (Liu & Nocedal 1989), for the loss of all images: descent.variant batch.

    A step stops early where no gradient is above 1e-7, or loss or weights move by less than 1e-9.

    lr: step size in units of the quasi-Newton step; a line search starts from it
    max_iterations: of a step; each computes loss and gradient at least once, a line search at most 25 times
    history: pairs of steps and gradients that curvature is estimated from; each costs memory for two copies of the
        weights
    line_search: strong_wolfe looks for a step size that makes loss and slope fall enough (Nocedal & Wright 2006,
        section 3.5); none takes lr
    """
    search = None if line_search == "none" else line_search
    budget = 1 + 25 * max_iterations  # torch's would end a step of few iterations in its first line search
    settings = {"max_iter": max_iterations, "max_eval": budget, "history_size": history, "line_search_fn": search}
    return _own("LBFGS", params, lr=lr, **settings)


@register("optim", elementwise=True)
def lion(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1e-4,
    beta1: BelowOne = 0.9,
    beta2: BelowOne = 0.99,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023): every weight moves by lr, in the direction of the sign of a momentum.

    lr: step size; a third to a tenth of adamw's, its weight decay three to ten times adamw's
    beta1: share of the mean of gradients in the momentum; the rest is the gradient
    beta2: decay of the mean of gradients
    weight_decay: each step shrinks the weights by lr times this
    """
    return _own("Lion", params, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)


@register("optim")
def muon(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 0.02,
    momentum: BelowOne = 0.95,
    nesterov: bool = True,
    weight_decay: NonNegative = 0.0,
    adjust_lr: Literal["original", "match_rms_adamw"] = "original",
    newton_schulz_steps: PositiveInt = 5,
    normalize_weights: bool = False,
) -> torch.optim.Optimizer:
    """Muon (Jordan 2024): the momentum of a matrix or convolution, its singular values brought to about 1.

    Biases and normalisations need another optimizer: optim.groups with ndim.

    lr: step size; about the most that a step changes the output of a square matrix, for an input of norm 1
    momentum: decay of the mean of gradients
    nesterov: add this step's gradient to the mean once more
    weight_decay: each step shrinks the weights by lr times this
    adjust_lr: original multiplies lr by the root of rows / columns where above 1; match_rms_adamw by 0.2 times the root
        of the larger of both, so that lr and weight_decay are those that suit adamw (Liu et al. 2025)
    newton_schulz_steps: that bring the singular values to 1
    normalize_weights: before each step, scale each weight to the norm of a matrix with rows of norm 1 (Jordan's
        airbench94_muon)
    """
    return _own(
        "Muon",
        params,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adjust_lr=adjust_lr,
        newton_schulz_steps=newton_schulz_steps,
        normalize_weights=normalize_weights,
    )


@register("optim", averages=True, elementwise=True)
def schedule_free_sgd(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: Positive = 1.0,
    beta: BelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Schedule-free gradient descent (Defazio et al. 2024): evaluates an average that makes a falling rate needless.

    Wants a constant schedule, with a warm-up at most.

    lr: step size; its authors suggest 10 to 50 times one that suits sgd
    beta: share of the average in the weights that gradients are taken at; the rest is the point that steps
    weight_decay: L2 penalty; this times the weight is added to the gradient
    """
    return _own("ScheduleFreeSGD", params, lr=lr, beta=beta, weight_decay=weight_decay)
