"""`dltrain lr-find`: the learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dltrain.averaging import training_mode
from dltrain.build import build
from dltrain.config import Config
from dltrain.errors import ConfigError, DivergedError
from dltrain.runs import describe
from dltrain.step import direction

SMOOTHING = 0.95  # share of the mean loss so far in the next one
DIVERGED = 4.0  # times the lowest mean loss so far: higher rates have nothing to tell
SHARE = 0.1  # of the rate with the lowest loss: there training is about to diverge, and a whole run is longer


def find(config: Config, lowest: float, highest: float, steps: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Trains one step at each of `steps` learning rates, each the same factor above the last (Smith 2017).

    Other groups' rates keep their ratio to `optim.lr`; lookahead and averages are left out.  Ends early where the loss
    goes up steeply.  JSON-able:

    lr: the rates that were tried; loss: of each step's images before the step; smoothed: its mean over the last
        twenty or so
    steepest: the rate at which the smoothed loss falls fastest, per factor; lowest: where it is lowest
    suggestion: a tenth of `lowest`

    Raises ConfigError where the optimizer searches for its rate itself, DivergedError where the loss never falls.
    """
    setup = build(config, note)
    for line in describe(setup):
        note(line)
    parts = setup.optimizers.parts
    if any(part.source.entry.facts.get("closure") for part in parts):
        raise ConfigError(f"{parts[0].source.name} finds the length of a step itself: no learning rate is to be found")
    batches = setup.batches()
    training_mode(setup.model)
    rates: list[float] = []
    losses: list[float] = []
    means: list[float] = []
    mean = 0.0
    for step in range(steps):
        rate = lowest * (highest / lowest) ** (step / (steps - 1))
        for part in parts:
            for group in part.optimizer.param_groups:
                group["lr"] = part.lr * rate / parts[0].lr
        loss, _ = direction(setup, batches, step // batches.steps, step % batches.steps)
        setup.optimizers.step(loss, lambda: loss)  # noqa: B023  called at once, if at all
        value = loss.item()  # waits for the device: each loss decides whether to go on
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed = mean / (1 - SMOOTHING ** (step + 1))  # as Adam corrects its means for beginning at 0
        if not math.isfinite(smoothed) or (means and smoothed > DIVERGED * min(means)):
            break
        rates.append(rate)
        losses.append(value)
        means.append(smoothed)
    if len(means) < 3 or min(means) > 0.99 * means[0]:
        text = "the loss does not fall at any of these learning rates"
        raise DivergedError(f"{text} ({lowest:g} to {rate:.3g}): widen --lowest and --highest, or raise --steps")
    best = rates[means.index(min(means))]
    return {
        "lr": rates,
        "loss": losses,
        "smoothed": means,
        "steepest": rates[_steepest(means)],
        "lowest": best,
        "suggestion": SHARE * best,
        "configured": parts[0].lr,
    }


def _steepest(means: Sequence[float]) -> int:
    """Where the loss falls fastest from one rate to the next; the rates' factors are all the same."""
    return min(range(1, len(means) - 1), key=lambda index: means[index + 1] - means[index - 1])
