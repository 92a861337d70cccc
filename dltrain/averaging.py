"""What follows the weights of a run, and the weights that it is evaluated at: its own, or an average of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dltrain.data.batches import Batches
from dltrain.device import Placement
from dltrain.optimizers import lookahead
from dltrain.state import Run

REESTIMATED_IMAGES = 10_000  # that batch norm's statistics are measured on; a mean of so many is exact to 1 %


class Followers:
    """The running average and the slow weights of a run, brought up to date after each step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        live = run.setup.model.state_dict()
        average = run.average or {}
        self.floats = [(each, live[name]) for name, each in average.items() if each.is_floating_point()]
        self.counts = [(each, live[name]) for name, each in average.items() if not each.is_floating_point()]
        self.fast = [live[name] for name in run.slow or {}]
        self.slow = [*(run.slow or {}).values()]

    @torch.no_grad()
    def follow(self) -> None:
        run, config = self.run, self.run.setup.config
        if config.optim.lookahead and run.global_step % config.optim.lookahead.every_steps == 0:
            lookahead(self.fast, self.slow, config.optim.lookahead.share)
        if config.train.average is None:
            return
        share = config.train.average(run.global_step, run.setup.steps_per_epoch, config.train.epochs)
        if not share:
            return
        means, weights = [mean for mean, _ in self.floats], [weight for _, weight in self.floats]
        if share == 1:
            torch._foreach_copy_(means, weights)
        else:
            torch._foreach_lerp_(means, weights, share)
        for count, live in self.counts:
            count.copy_(live)


@contextmanager
def evaluation_weights(run: Run, batches: Batches) -> Iterator[None]:
    """Within, the model holds what the run is evaluated at; after it, its own weights again, bit for bit."""
    optimizers, average = run.setup.optimizers, run.setup.config.train.average
    processes = run.setup.processes
    other = run.average or optimizers.evaluation_weights()
    if not other:
        processes.copy_first(run.setup.model.buffers())  # batch norm's running statistics, which nothing trains by
        yield
        return
    live = run.setup.model.state_dict()
    own = {name: tensor.clone() for name, tensor in live.items()}
    for name, tensor in other.items():
        live[name].copy_(tensor)
    try:
        if average is None or average.entry.facts.get("reestimates"):
            reestimate_batchnorm(run.setup.model, batches, run.setup.placement)
        processes.copy_first(run.setup.model.buffers())
        yield
    finally:
        for name, tensor in own.items():
            live[name].copy_(tensor)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Batches, placement: Placement) -> None:
    """Measures the running statistics anew, at the weights as they are, on the first batches of the first epoch.

    As torch.optim.swa_utils.update_bn: each statistic is the mean of what the batches have, all counted alike.
    """
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    norms = [each for each in norms if not is_frozen(each)]
    if not norms:
        return
    momenta = [each.momentum for each in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
        norm.train()
    for step in range(-(-min(REESTIMATED_IMAGES, batches.images) // batches.step_size)):
        for images, _, _ in batches.step(0, step):
            with placement.autocast():
                model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train()


def training_mode(model: nn.Module) -> None:
    """Puts the model in training mode, but for frozen normalisations, which keep their running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and is_frozen(module):
            module.eval()


def is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
