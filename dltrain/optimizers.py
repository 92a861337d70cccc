"""Optimizers that torch has none of, or not in the form needed here, and what wraps any optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Newton-Schulz (Jordan 2024, https://kellerjordan.github.io/posts/muon): the quintic a s + b s^3 + c s^5 whose slope at
# zero is the steepest that keeps what it is applied to again and again in about 0.7..1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# what Muon's learning rate is multiplied by for a matrix of so many rows and columns
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),  # Jordan 2024
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # Liu et al. 2025, arXiv 2502.16982
}
TINY = 1e-7  # below this a norm counts as this much, as in torch.optim.Muon


def _to_update(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
    """(settings, parameters that have a gradient, their gradients) of each group that has any."""
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if params:  # torch._foreach functions refuse an empty list
            yield group, params, [p.grad for p in params]


def _averages(optimizer: torch.optim.Optimizer, key: str) -> dict[Parameter, Tensor]:
    """Each parameter's state called `key`, not a copy; the parameter itself where it has had no gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: optimizer.state[p][key] if p in optimizer.state else p.detach() for p in params}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2); its state is `exp_avg`, of the parameter's shape."""

    def __init__(
        self, params: Iterable[Parameter], *, lr: float, beta1: float, beta2: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, params, grads in _to_update(self):
            for p in params:
                if p not in self.state:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            update = torch._foreach_lerp(averages, grads, 1 - group["beta1"])
            torch._foreach_sign_(update)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - group["beta2"])


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """About U V^T of each matrix U S V^T: its singular values go to about 0.7..1.2, its singular vectors stay.

    Those below some thousandth of the matrix's norm are still on their way there after five steps.

    matrices: `[n, rows, columns]`, of any floating type; steps: of Newton-Schulz
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) as torch.optim.Muon computes it, for weights of two and more dimensions.

    A weight `[O, I, kh, kw]` counts as a matrix `[O, I*kh*kw]`.  Weights that are matrices of one shape go through
    Newton-Schulz together: its products are small, and one at a time would wait for each other.  On CUDA they are in
    bfloat16, as published; elsewhere in the weights' own type, which costs little beside a CPU's forward pass.  Its
    state is `momentum_buffer`, of the parameter's shape.

    Raises ValueError for a parameter of less than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        adjust_lr: str,
        newton_schulz_steps: int,
        normalize_weights: bool,
    ) -> None:
        """adjust_lr: a name in ADJUST_LR"""
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self.adjust_lr = ADJUST_LR[adjust_lr]
        self.newton_schulz_steps = newton_schulz_steps
        self.normalize_weights = normalize_weights
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 4):
                    text = f"updates matrices and convolutions, not a parameter of shape {list(p.shape)}"
                    raise ValueError(f"{text}: give it another optimizer (optim.groups with ndim: {p.ndim})")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, params, _ in _to_update(self):
            alike: dict[Any, list[Tensor]] = {}
            for p in params:
                alike.setdefault((p.shape[0], p[0].numel(), p.dtype, p.device), []).append(p)
            for (rows, columns, _, _), some in alike.items():
                self._update(group, some, rows, columns)

    def _update(self, group: dict[str, Any], params: list[Tensor], rows: int, columns: int) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        stacked = torch.stack([update.flatten(1) for update in updates])  # [n, rows, columns]
        if stacked.is_cuda:
            stacked = stacked.bfloat16()
        stacked = orthogonalise(stacked, self.newton_schulz_steps).to(params[0].dtype)
        if self.normalize_weights:
            norms = torch.stack(torch._foreach_norm(params)).clamp(min=TINY)
            torch._foreach_mul_(params, list((math.sqrt(rows) / norms).unbind()))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        steps = [step.view(p.shape) for step, p in zip(stacked.contiguous(), params, strict=True)]
        torch._foreach_add_(params, steps, alpha=-lr * self.adjust_lr(rows, columns))


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024, arXiv 2405.15682, equations 3 to 5, weights c as in its algorithm 1).

        z <- z - lr g(y);  x <- x + c (z - x), c = lr^2 / (sum of lr^2 so far);  y <- (1 - beta) z + beta x

    The parameters are always y, where gradients are taken; `evaluation_weights` are x, their average.  Its state is
    `z` and `x`, of the parameter's shape, and `weight_sum`, a number.
    """

    def __init__(self, params: Iterable[Parameter], *, lr: float, beta: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, params, grads in _to_update(self):
            for p in params:
                if p not in self.state:
                    self.state[p].update(z=p.clone(), x=p.clone(), weight_sum=0.0)
            states = [self.state[p] for p in params]
            z, x = [state["z"] for state in states], [state["x"] for state in states]
            weight = group["lr"] ** 2
            for state in states:
                state["weight_sum"] += weight
            shares = [weight / state["weight_sum"] if weight else 0.0 for state in states]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_add_(z, grads, alpha=-group["lr"])
            torch._foreach_lerp_(x, z, shares)
            torch._foreach_copy_(params, torch._foreach_lerp(z, x, group["beta"]))

    def evaluation_weights(self) -> dict[Parameter, Tensor]:
        return _averages(self, "x")


class ASGD(torch.optim.ASGD):
    """torch's, and the averages that it keeps and never uses."""

    def evaluation_weights(self) -> dict[Parameter, Tensor]:
        return _averages(self, "ax")


class LBFGS(torch.optim.LBFGS):
    """torch's, also for gradients in channels_last, and with nothing in its state that its next step has no use for."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        params = self.param_groups[0]["params"]

        def contiguous() -> Any:
            loss = closure()
            for p in params:
                if p.grad is not None:
                    p.grad = p.grad.contiguous()  # torch's takes a view [numel] of it
            return loss

        loss = super().step(contiguous)  # type: ignore[no-untyped-call]
        self.state[params[0]].pop("al", None)  # scratch, one number for each pair of the history: torch makes it anew
        return loss


@torch.no_grad()
def ascend(params: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Sharpness-aware minimisation's first half (Foret et al. 2021, equation 2): weights += rho g / ||g||.

    ||g|| is the 2-norm of all gradients together.  Returns copies of the weights for `descend`; a gradient taken in
    between, at the weights with about the highest loss within rho, is the one to step along.
    """
    saved = [p.clone() for p in params]
    moved = [p for p in params if p.grad is not None]
    grads = [p.grad for p in moved if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    steps = torch._foreach_mul(grads, rho / (norm + 1e-12))  # 1e-12: for a gradient of zero
    torch._foreach_add_(moved, list(steps))
    return saved


@torch.no_grad()
def descend(params: Sequence[Tensor], saved: list[Tensor]) -> None:
    """Puts the weights back, bit for bit, to where they were before `ascend`."""
    torch._foreach_copy_(list(params), saved)


@torch.no_grad()
def lookahead(params: Sequence[Tensor], slow: Sequence[Tensor], share: float) -> None:
    """Lookahead (Zhang et al. 2019, algorithm 1): slow += share (weights - slow), then weights = slow.

    To be called after every so many steps.

    slow: at first copies of the weights; changed in place
    """
    torch._foreach_lerp_(list(slow), list(params), share)
    torch._foreach_copy_(list(params), list(slow))
