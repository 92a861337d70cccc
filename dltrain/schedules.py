"""Schedules: the position in a run and its length, both in epochs, -> the multiplier of the learning rate.

`epoch` is fractional, step / steps_per_epoch: 0 at the first step and just below `epochs` at the last.

A warm-up runs over the first `warmup_epochs`, from 1/25 of the learning rate (where one_cycle starts too, so that the
first step is never one of zero) to all of it.  It is linear, but for one_cycle's, which is a cosine.  The schedule
proper begins where the warm-up ends and has the rest of the run.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from dltrain.registry import Fraction, NonNegative, Positive, register

START = 1 / 25  # torch's OneCycleLR: div_factor
END = START / 1e4  # torch's OneCycleLR: final_div_factor


@register("schedule")
def constant(epoch: float, epochs: float, *, warmup_epochs: NonNegative = 0.0) -> float:
    """The same learning rate from the end of the warm-up on.

    warmup_epochs: length of the warm-up

    Raises ValueError where the warm-up is not shorter than the run.
    """
    return _warmup(epoch, epochs, warmup_epochs)


@register("schedule")
def step(
    epoch: float,
    epochs: float,
    *,
    every_epochs: Annotated[float, Field(ge=0.001)],
    factor: Positive = 0.1,
    warmup_epochs: NonNegative = 0.0,
) -> float:
    """Multiplies the learning rate by `factor` every `every_epochs`.

    every_epochs: epochs between two changes, counted from the end of the warm-up
    factor: what each change multiplies the learning rate by
    warmup_epochs: length of the warm-up

    Raises ValueError where the warm-up is not shorter than the run.
    """
    ramp = _warmup(epoch, epochs, warmup_epochs)
    changes = max(epoch - warmup_epochs, 0) / every_epochs
    return ramp * factor ** math.floor(changes + 1e-9)  # 0.3 / 0.1 is 2.9999999999999996, and means three


@register("schedule")
def cosine(epoch: float, epochs: float, *, warmup_epochs: NonNegative = 0.0, final: Fraction = 0.0) -> float:
    """Half a cosine from the learning rate down to `final` of it (Loshchilov & Hutter 2017, without restarts).

    warmup_epochs: length of the warm-up
    final: share of the learning rate at the end of the run

    Raises ValueError where the warm-up is not shorter than the run.
    """
    ramp = _warmup(epoch, epochs, warmup_epochs)
    return ramp * _half_cosine(1, final, max(epoch - warmup_epochs, 0) / (epochs - warmup_epochs))


@register("schedule")
def one_cycle(epoch: float, epochs: float, *, warmup_epochs: NonNegative | None = None) -> float:
    """Up from 1/25 of the learning rate, then down to 1/250000 of it (Smith 2018; as torch's OneCycleLR).

    Both ways are half cosines, and momentum stays as it is.

    warmup_epochs: length of the way up; left out, it is 30 % of the run

    Raises ValueError where the way up is not shorter than the run.
    """
    if warmup_epochs is None:
        warmup_epochs = 0.3 * epochs
    _check(epochs, warmup_epochs)
    if epoch < warmup_epochs:
        return _half_cosine(START, 1, epoch / warmup_epochs)
    return _half_cosine(1, END, (epoch - warmup_epochs) / (epochs - warmup_epochs))


def _warmup(epoch: float, epochs: float, warmup_epochs: float) -> float:
    """The linear ramp from START, and 1 from its end on."""
    _check(epochs, warmup_epochs)
    return START + (1 - START) * epoch / warmup_epochs if epoch < warmup_epochs else 1.0


def _half_cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` as `done` goes from 0 to 1, flat at both."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def _check(epochs: float, warmup_epochs: float) -> None:
    if warmup_epochs >= epochs:
        raise ValueError(
            f"schedule.warmup_epochs: {warmup_epochs:g} leaves nothing of the run's {epochs:g} epochs: "
            "lower it or raise train.epochs"
        )
