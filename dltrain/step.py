"""One training step after another: the gradient, what is made of it, and what is counted on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch

from dltrain.averaging import Followers
from dltrain.build import Setup
from dltrain.data.batches import Batches
from dltrain.errors import DivergedError
from dltrain.optimizers import ascend, descend
from dltrain.spans import each, span
from dltrain.state import Run

UNREAD = 1 << 20  # numbers that wait on the device to be counted: 4 MiB

Number = torch.Tensor | float  # a tensor [] where it is still on the device
Outputs = list[
    tuple[torch.Tensor, torch.Tensor]
]  # of the micro-batches: outputs [B, …], targets as `Batches` gives them


class Steps:
    """Takes a run's steps from where it stands.  What they gave stays on the device until `read`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batches = run.setup.batches()
        self._followers = Followers(run)
        run.setup.meet()
        self._unread: list[tuple[Number, Number, int]] = []  # loss, gradient's norm, images
        self._own: list[int] = []  # of each unread step's images, those of this process
        self._waiting = 0  # images of the unread steps
        self._outputs: Outputs = []
        self._norm = 0.0

    def take(self) -> None:
        """One step.  Raises DivergedError where its loss or gradient is not finite, on a CPU before it is taken."""
        run, at, setup, batches = self.run, self.run.progress, self.run.setup, self.batches
        setup.optimizers.set_rates(at.epoch + at.step / batches.steps, setup.config.train.epochs, at.losses)
        loss, norm = direction(setup, batches, at.epoch, at.step, self._outputs)
        known: Number = loss
        if _asks_each_step(setup.placement.device):
            known = loss.item()
            _check_finite(run, run.global_step + 1, known, float(norm))
        images = batches.images_in(at.step)
        self._unread.append((known, norm, images))
        self._own.append(batches.own_images_in(at.step))
        self._waiting += images
        with span("optimizer"):
            setup.optimizers.step(loss, self._again)
        at.step += 1
        self._followers.follow()
        if self._outputs[-1][0][0].numel() * self._waiting > UNREAD * setup.processes.world:
            self.read()

    def _again(self) -> torch.Tensor:
        return gradient(self.run.setup, self.batches, self.run.progress.epoch, self.run.progress.step)

    def read(self) -> float:
        """Adds what the steps gave to the run's sums, and gives the last step's gradient norm.

        This waits for the device.  Raises DivergedError where a loss or gradient since the last reading is not finite.
        """
        if not self._unread:
            return self._norm
        *numbers, _ = zip(*self._unread, strict=True)  # losses, norms
        if not _asks_each_step(self.run.setup.placement.device):
            numbers = torch.stack([torch.stack(each) for each in numbers]).tolist()
        losses, norms = numbers
        loss_sum, score_sum = self.run.sums.tolist()
        first = self.run.global_step - len(losses) + 1
        for step, (loss, norm, (_, _, images)) in enumerate(zip(losses, norms, self._unread, strict=True), first):
            _check_finite(self.run, step, loss, norm)
            loss_sum += loss * images  # one after another: to the same bits however often it is read
        outputs, targets = zip(*self._outputs, strict=True)
        scores = self.run.setup.task.scores(torch.cat(outputs), torch.cat(targets))
        if self.run.setup.processes.world > 1:
            each_step = torch.stack([part.sum(dtype=torch.float64) for part in scores.split(self._own)])
            scores = sum(self.run.setup.processes.gather(each_step.cpu()), torch.zeros_like(each_step, device="cpu"))
        # numbers that are not whole one after another too: to the same bits however often they are read
        score_sum = score_sum + scores.sum().item() if scores.dtype == torch.bool else sum(scores.tolist(), score_sum)
        self.run.sums[0], self.run.sums[1] = loss_sum, score_sum
        self._unread.clear()
        self._outputs.clear()
        self._own.clear()
        self._waiting = 0
        self._norm = norms[-1]
        return self._norm


def gradient(setup: Setup, batches: Batches, epoch: int, step: int, outputs: Outputs | None = None) -> torch.Tensor:
    """Computes the mean loss `[]` of a step's images and leaves its gradient in the parameters.

    outputs: to which what the model made of the images is added
    """
    for parameter in setup.parameters:
        parameter.grad = None
    total: torch.Tensor | None = None
    world = setup.processes.world
    left = batches.own_images_in(step)
    for images, targets, share in each("batch", batches.step(epoch, step)):  # [B, C, H, W], [B] or [B, classes]
        left -= len(images)
        with setup.unshared() if left and world > 1 else nullcontext():
            loss, found = setup.forward(images, targets)
            if share * world != 1:  # the processes' gradients are averaged, and the mean is to be that over all images
                loss = loss * (share * world)
            with span("backward"):
                loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
        if outputs is not None:
            outputs.append((found.detach(), targets))
    assert total is not None  # a step has images
    return setup.processes.add(total / world) if world > 1 else total


def direction(
    setup: Setup, batches: Batches, epoch: int, step: int, outputs: Outputs | None = None
) -> tuple[torch.Tensor, Number]:
    """Leaves what a step goes along in the parameters' gradients; gives the mean loss `[]` and the gradient's norm.

    That is the gradient, or at sharper weights (optim.sam_rho), and no longer than train.clip_norm; the norm is before.
    """
    config, parameters = setup.config, setup.parameters
    loss = gradient(setup, batches, epoch, step, outputs)
    if config.optim.sam_rho:
        _sharpen(setup.model, parameters, config.optim.sam_rho, lambda: gradient(setup, batches, epoch, step))
    with span("norm"):
        norm = _gradient_norm(parameters)
        if config.train.clip_norm:  # as torch.nn.utils.clip_grad_norm_
            scale = config.train.clip_norm / (norm + 1e-6)
            scale = scale.clamp(max=1) if isinstance(scale, torch.Tensor) else min(scale, 1.0)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
    return loss, norm


def _sharpen(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], rho: float, again: Callable[[], torch.Tensor]
) -> None:
    """Replaces the gradient by that at the worst weights within `rho` of these, to first order (Foret et al. 2021).

    Batch norm's running statistics are those of the weights themselves.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    weights = ascend(parameters, rho)
    again()
    descend(parameters, weights)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _gradient_norm(parameters: list[torch.nn.Parameter]) -> Number:
    """The 2-norm of all gradients together."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    if _asks_each_step(norms[0].device):
        return math.hypot(*(norm.item() for norm in norms))  # a tenth of the time of two more operations
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _asks_each_step(device: torch.device) -> bool:
    """Whether a number of the device's can be read without waiting for it; elsewhere log lines and saves ask."""
    return device.type == "cpu"


def _check_finite(run: Run, step: int, loss: float, norm: float) -> None:
    if not math.isfinite(loss + norm):
        raise diverged(run, step, f"the loss is {loss} and the gradient's norm {norm}")


def diverged(run: Run, step: int, what: str) -> DivergedError:
    """step: counted from 1"""
    rate = run.setup.optimizers.lr
    mend = "lower optim.lr, warm up (schedule.warmup_epochs) or clip the gradient (train.clip_norm: 1)"
    return DivergedError(f"step {step}: {what}, at learning rate {rate:.3g}; nothing was saved of it: {mend}")
