"""Optimizers: torch's own, with their state and arithmetic, chosen by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

from dltrain.lazy import torch
from dltrain.registry import BelowOne, NonNegative, Positive, register


@cache
def _lean(name: str) -> type[torch.optim.Optimizer]:
    """torch.optim's class of that name without the import of torch._dynamo, which costs over a second.

    torch wraps these methods in functions that import its compiler only to tell it not to compile them.  The functions
    below the wrappers are what runs either way; `step` is then ours to keep out of autograd.
    """
    base = getattr(torch.optim, name)
    methods = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    step = torch.no_grad()(inspect.unwrap(base.step))
    step.hooked = True  # without this torch wraps it in a profiler's record, some 30 us a step
    return type(name, (base,), {method: inspect.unwrap(getattr(base, method)) for method in methods} | {"step": step})


def _build(
    name: str, params: Iterable[torch.nn.Parameter], fused: bool = True, **settings: Any
) -> torch.optim.Optimizer:
    """Fused: all parameters are updated by one kernel, where torch has one for the device."""
    params = list(params)
    if fused:
        settings["fused"] = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in params)
    return _lean(name)(params, **settings)


@register("optim")
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
    return _build("SGD", params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


@register("optim")
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
    return _build("Adam", params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


@register("optim")
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
    return _build("AdamW", params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


@register("optim")
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
    return _build("RMSprop", params, fused=False, lr=lr, **settings)


@register("optim")
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
    return _build("Adagrad", params, lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)
