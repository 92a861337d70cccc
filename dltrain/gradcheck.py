"""`dltrain gradcheck`: what the backward pass computes, against differences of the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from dltrain.averaging import training_mode
from dltrain.build import Setup, build
from dltrain.config import Config
from dltrain.data.random import generator
from dltrain.errors import ConfigError, DivergedError, names_memory
from dltrain.modules import as_written

IMAGES = 8
NOISE = 0.01  # added to the inputs of layers, which are of the order of 1
INPUTS = 10  # numbers of each layer's input that are tried: a layer alone takes little time
# Of a central difference in float64: its error is about step^2 by the third derivative and 1e-16 / step by rounding, so
# that 1e-5 would do for smooth losses; a smaller one steps over fewer of the kinks of relu and max pooling
STEP, SMALLER_STEP = 1e-6, 1e-7
TOLERANCE = 1e-4  # of the relative error: mistakes of a backward pass are seldom below 1e-2
ROUNDING = 100 * torch.finfo(torch.float64).eps  # of a loss after some tens of layers, relative; measured: up to 14 eps

IN_FLOAT64 = "gradcheck wants all layers and the loss to compute in the precision that they are given, here float64"
MODEL, LOSS = "(model)", "(loss)"  # no module is called so

Value = Callable[[], torch.Tensor]


def gradcheck(config: Config, weights: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Compares analytic and numeric gradients of a config's first training images, in float64 on the CPU.

    The analytic gradient a is the backward pass's; the numeric one n = (L(w + h) - L(w - h)) / 2h, for a seeded choice
    of `weights` weights of each trained parameter and of numbers in each layer's input.  The model is in training mode:
    dropout draws the same mask each time, batch normalisation takes the statistics of the batch.  JSON-able:

    images, loss: how many, and their loss
    parameters: a row for each trained one, of the loss's gradient
    layers: a row for each module and the loss, of a random weighting of its output and with respect to its input alone,
        which tells in which layer a mistake is
    wrong: names of the layers with a mistake or, where all of these are right, of the parameters; ok: there are none

    A row: name, kind, size (numbers there are), tried, at_kink (of these: the loss bends so near that no difference can
    tell), gradient (the largest analytic one), error (the largest |a - n| / max(|a|, |n|, what rounding hides); None
    where all are at a kink), ok (it is at most TOLERANCE), worst (index, analytic and numeric gradient there).

    Raises DivergedError where the loss is not finite, ConfigError where it is not computed in float64.
    """
    # what is checked are the formulas, which are the same on every device
    train = config.train.model_copy(update={"device": "cpu", "precision": "fp32", "compile": "off"})
    setup = build(config.model_copy(update={"train": train}), note)
    count = min(IMAGES, len(setup.data.train))
    setup = dataclasses.replace(setup, step_size=count, micro_size=count)
    images, targets, _ = next(setup.batches().step(0, 0))
    images = images.double()
    targets = targets.double() if targets.is_floating_point() else targets
    model = setup.model.double()
    training_mode(model)

    def loss() -> torch.Tensor:
        return setup.forward(images, targets)[0]

    start = perf_counter()
    try:
        found = _repeated(loss)
    except RuntimeError as error:
        if names_memory(error):
            raise
        raise ConfigError(f"{IN_FLOAT64}: {str(error).splitlines()[0]}") from error
    if found.dtype != torch.float64:
        raise ConfigError(f"{IN_FLOAT64}: the loss comes out in {str(found.dtype).removeprefix('torch.')}")
    if not found.isfinite():
        raise DivergedError(f"the loss of the first {count} images is {found.item()}: there is no gradient to check")
    found.backward()
    seconds = perf_counter() - start
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    tried = sum(min(weights, each.numel()) for _, each in trained)
    modes = "dropout draws the same mask each time, batch normalisation takes the batch's statistics"
    note(f"{count} training images, float64 on the CPU; {modes}; {tried:,} weights: about {2 * tried * seconds:,.1f} s")
    size = found.abs().item()
    parameters = [
        _compare(name, "parameter", each, loss, size, weights, generator("gradcheck", config.seed, name))
        for name, each in trained
    ]
    layers = [
        _check_layer(*layer, generator("gradcheck input", config.seed, layer[0]))
        for layer in _layers(setup, images, targets)
    ]
    wrong = [row["name"] for row in layers if not row["ok"]]
    return {
        "config": config.name,
        "images": count,
        "loss": found.item(),
        "parameters": parameters,
        "layers": layers,
        "wrong": [name for name in wrong if not any(_is_inside(other, name) for other in wrong)]
        or [row["name"] for row in parameters if not row["ok"]],
        "ok": all(row["ok"] for row in parameters + layers),
    }


def _is_inside(name: str, other: str) -> bool:
    """Whether a module is part of another one."""
    return name.startswith(f"{other}.") or (other == MODEL and name not in (MODEL, LOSS))


def _layers(
    setup: Setup, images: torch.Tensor, targets: Any
) -> Iterator[tuple[str, str, Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """Name, kind, function and input of each module that makes one tensor of one, and of the loss."""
    inputs: dict[str, torch.Tensor] = {}
    modules = {name or MODEL: module for name, module in setup.model.named_modules()}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, given: tuple[Any, ...]) -> None:
            if len(given) == 1 and torch.is_tensor(given[0]) and given[0].dtype == torch.float64:
                inputs[name] = given[0].clone()  # the module may change it in place

        return see

    def forget(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            if not torch.is_tensor(output):
                inputs.pop(name, None)

        return see

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    hooks += [module.register_forward_hook(forget(name)) for name, module in modules.items()]
    with as_written(setup.model), torch.no_grad():
        outputs = setup.model(images)
    for hook in hooks:
        hook.remove()
    for name, given in inputs.items():
        yield name, type(modules[name]).__name__, modules[name], given
    yield LOSS, setup.loss.name, lambda outputs: setup.loss(outputs, targets), outputs


def _check_layer(
    name: str,
    kind: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    given: torch.Tensor,
    random: torch.Generator,
) -> dict[str, Any]:
    """The row that compares gradients of a random weighting of function(given), with respect to `given` moved a little.

    Where images are of one colour, many of max pooling's largest numbers are alike, and each stands at a kink.
    """
    given = (given + NOISE * torch.randn(given.shape, generator=random, dtype=given.dtype)).requires_grad_()
    output = _repeated(lambda: function(given.clone()))  # a clone, which it may change in place
    weighting = torch.randn(output.shape, generator=random, dtype=output.dtype)
    if output.requires_grad:
        output.backward(weighting)
    size = (output.detach() * weighting).norm().item()
    return _compare(name, kind, given, lambda: (function(given.clone()) * weighting).sum(), size, INPUTS, random)


def _compare(
    name: str, kind: str, tensor: torch.Tensor, value: Value, size: float, count: int, random: torch.Generator
) -> dict[str, Any]:
    """The row that compares the gradient that `tensor` has with differences of a value that depends on it.

    size: of the numbers that the value is a sum of: their rounding is what hides small gradients
    """
    gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    floor = max(size, 1.0) * ROUNDING / TOLERANCE / STEP

    def slopes(index: Any, step: float) -> tuple[float, float]:
        """To the left and to the right."""
        before = tensor[index].item()
        values = []
        for moved in (before - step, before + step):
            tensor[index] = moved
            values.append(_repeated(value).item())
        tensor[index] = before
        return (middle - values[0]) / step, (values[1] - middle) / step

    kinks, largest = 0, 0.0
    worst: tuple[float, dict[str, Any]] | None = None
    with torch.no_grad():
        middle = _repeated(value).item()
        for place in torch.randperm(tensor.numel(), generator=random)[:count].tolist():
            index = np.unravel_index(place, tensor.shape)
            analytic = gradient[index].item()
            left, right = slopes(index, STEP)
            numeric = (left + right) / 2
            if not math.isfinite(analytic - numeric):
                text = f"the backward pass gives {analytic}, differences of the loss {numeric}"
                raise DivergedError(f"{name}{list(map(int, index))}: {text}: no gradient can be checked")
            error = _error(analytic, numeric, floor)
            if error > TOLERANCE:
                left, right = slopes(index, SMALLER_STEP)
                before, numeric = numeric, (left + right) / 2
                error = _error(analytic, numeric, floor * STEP / SMALLER_STEP)
                # at a kink a backward pass gives some slope between those on its two sides, and of differences those
                # that span other kinks than the smaller ones are off from these
                doubt = max(abs(right - left) / 2, abs(numeric - before))
                if error > TOLERANCE and abs(analytic - numeric) <= 1.001 * doubt:
                    kinks += 1
                    continue
            largest = max(largest, abs(analytic))
            if worst is None or error > worst[0]:
                worst = error, {"index": [int(at) for at in index], "analytic": analytic, "numeric": numeric}
    return {
        "name": name,
        "kind": kind,
        "size": tensor.numel(),
        "tried": min(count, tensor.numel()),
        "at_kink": kinks,
        "gradient": largest,
        "error": worst[0] if worst else None,
        "ok": worst is None or worst[0] <= TOLERANCE,
        "worst": worst[1] if worst else None,
    }


def _error(analytic: float, numeric: float, floor: float) -> float:
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric), floor)


def _repeated(value: Value) -> torch.Tensor:
    """The value, with the same random numbers each time."""
    torch.manual_seed(0)
    return value()
