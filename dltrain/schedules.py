"""Schedules: the position in a run and its length, both in epochs, -> the multiplier of the learning rate.

`epoch` is fractional, step / steps_per_epoch: 0 at the first step and just below `epochs` at the last.  A schedule that
follows results (kind "feedback") takes the losses of the epochs so far instead.

A warm-up runs over the first `warmup_epochs`, from 1/25 of the learning rate (where one_cycle starts too, so that the
first step is never one of zero) to all of it.  It is linear, but for one_cycle's, which is a cosine.  The schedule
proper begins where the warm-up ends and has the rest of the run.  Only epochs that are named one by one, multistep's
milestones and the knots', are counted from the start of the run; those beyond its end are not reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from dltrain.registry import BelowOne, Fraction, NonNegative, NonNegativeInt, Positive, register

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
    return ramp * _half_cosine(1, final, _done(epoch, epochs, warmup_epochs))


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


@register("schedule")
def multistep(
    epoch: float,
    epochs: float,
    *,
    milestones_epochs: Annotated[list[Positive], Field(min_length=1)],
    factor: Positive = 0.1,
    warmup_epochs: NonNegative = 0.0,
) -> float:
    """Multiplies the learning rate by `factor` at each of the milestones.

    milestones_epochs: the epochs of the changes, increasing, counted from the start of the run
    factor: what each change multiplies the learning rate by
    warmup_epochs: length of the warm-up

    Raises ValueError where the milestones do not increase, or the warm-up is not shorter than the run.
    """
    _check_increasing("milestones_epochs", "milestone", milestones_epochs)
    changes: int = sum(epoch >= milestone for milestone in milestones_epochs)
    return _warmup(epoch, epochs, warmup_epochs) * factor**changes


@register("schedule")
def linear(epoch: float, epochs: float, *, final: Fraction = 0.0, warmup_epochs: NonNegative = 0.0) -> float:
    """A straight line from the learning rate down to `final` of it.

    final: share of the learning rate at the end of the run
    warmup_epochs: length of the warm-up

    Raises ValueError where the warm-up is not shorter than the run.
    """
    ramp = _warmup(epoch, epochs, warmup_epochs)
    return ramp * (1 - (1 - final) * _done(epoch, epochs, warmup_epochs))


@register("schedule")
def polynomial(
    epoch: float, epochs: float, *, power: Positive = 2.0, final: Fraction = 0.0, warmup_epochs: NonNegative = 0.0
) -> float:
    """(1 - t)^power from the learning rate down to `final` of it, as t goes from 0 to 1.

    power: 1 is a line; You et al. 2017 (LARS) use 2, Chen et al. 2018 (DeepLab) 0.9
    final: share of the learning rate at the end of the run
    warmup_epochs: length of the warm-up

    Raises ValueError where the warm-up is not shorter than the run.
    """
    ramp = _warmup(epoch, epochs, warmup_epochs)
    return ramp * (final + (1 - final) * math.pow(1 - _done(epoch, epochs, warmup_epochs), power))


@register("schedule")
def exponential(epoch: float, epochs: float, *, factor: Positive, warmup_epochs: NonNegative = 0.0) -> float:
    """Multiplies the learning rate by `factor` in the course of each epoch, a little at every step.

    factor: what an epoch multiplies the learning rate by
    warmup_epochs: length of the warm-up

    Raises ValueError where the warm-up is not shorter than the run.
    """
    return _warmup(epoch, epochs, warmup_epochs) * math.pow(factor, max(epoch - warmup_epochs, 0))


@register("schedule")
def knots(
    epoch: float,
    epochs: float,
    *,
    knots: Annotated[list[Annotated[list[NonNegative], Field(min_length=2, max_length=2)]], Field(min_length=1)],
    warmup_epochs: NonNegative = 0.0,
) -> float:
    """Straight lines between free knots, and level before the first and after the last.

    knots: pairs [epoch, multiplier], their epochs increasing and counted from the start of the run
    warmup_epochs: length of a warm-up besides, which multiplies what the knots say

    Raises ValueError where the knots' epochs do not increase, or the warm-up is not shorter than the run.
    """
    _check_increasing("knots", "knot", (place for place, _ in knots))
    ramp = _warmup(epoch, epochs, warmup_epochs)
    for (start, low), (end, high) in pairwise(knots):
        if epoch < end:
            return ramp * (low + (high - low) * max(epoch - start, 0) / (end - start))
    return ramp * knots[-1][1]


@register("schedule")
def warm_restarts(
    epoch: float,
    epochs: float,
    *,
    period_epochs: Annotated[float, Field(ge=0.001, allow_inf_nan=False)],
    growth: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0,
    final: Fraction = 0.0,
    warmup_epochs: NonNegative = 0.0,
) -> float:
    """Half a cosine down to `final`, and again from the whole learning rate (SGDR, Loshchilov & Hutter 2017, eq. 5).

    The weights are at their best just before a restart, so that the run should end where a period does.

    period_epochs: length of the first period
    growth: how many times as long as the one before it each further period is
    final: share of the learning rate at the end of a period
    warmup_epochs: length of the warm-up, before the first period

    Raises ValueError where the warm-up is not shorter than the run.
    """
    ramp = _warmup(epoch, epochs, warmup_epochs)
    periods = max(epoch - warmup_epochs, 0) / period_epochs  # in lengths of the first
    passed = periods if growth == 1 else math.log1p(periods * (growth - 1)) / math.log(growth)
    restarts = math.floor(passed + 1e-9)  # 0.3 / 0.1 is 2.9999999999999996, and means three
    begin = restarts if growth == 1 else (growth**restarts - 1) / (growth - 1)  # 1 + growth + growth^2 + …
    return ramp * _half_cosine(1, final, (periods - begin) / growth**restarts)


@register("feedback")
def plateau(
    losses: Sequence[float],
    *,
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    patience_epochs: NonNegativeInt = 10,
    threshold: BelowOne = 1e-4,
    cooldown_epochs: NonNegativeInt = 0,
    final: Fraction = 0.0,
) -> float:
    """Multiplies the learning rate by `factor` when the loss has stopped falling (as torch's ReduceLROnPlateau).

    The loss is that of the images held out, else of training; `losses` has one for each epoch so far.

    factor: what each change multiplies the learning rate by
    patience_epochs: epochs in a row without a better loss that change nothing; the next one does
    threshold: share of the best loss so far by which a loss must be below it to be better
    cooldown_epochs: epochs after a change that are not counted
    final: share of the learning rate below which it never goes
    """
    multiplier, best, waited, cooldown = 1.0, math.inf, 0, 0
    for loss in losses:
        waited += 1
        if loss < best * (1 - threshold):
            best, waited = loss, 0
        if cooldown:
            cooldown, waited = cooldown - 1, 0
        if waited > patience_epochs:
            multiplier, waited, cooldown = max(multiplier * factor, final), 0, cooldown_epochs
    return multiplier


def _warmup(epoch: float, epochs: float, warmup_epochs: float) -> float:
    """The linear ramp from START, and 1 from its end on."""
    _check(epochs, warmup_epochs)
    return START + (1 - START) * epoch / warmup_epochs if epoch < warmup_epochs else 1.0


def _done(epoch: float, epochs: float, warmup_epochs: float) -> float:
    """How much of the schedule proper is over, 0..1."""
    return max(epoch - warmup_epochs, 0) / (epochs - warmup_epochs)


def _half_cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` as `done` goes from 0 to 1, flat at both."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def _check(epochs: float, warmup_epochs: float) -> None:
    if warmup_epochs >= epochs:
        raise ValueError(
            f"schedule.warmup_epochs: {warmup_epochs:g} leaves nothing of the run's {epochs:g} epochs: "
            "lower it or raise train.epochs"
        )


def _check_increasing(argument: str, what: str, places: Iterable[float]) -> None:
    for number, (place, after) in enumerate(pairwise(places), 2):
        if after <= place:
            raise ValueError(
                f"schedule.{argument}: the epochs are to increase, and {what} {number} at {after:g} follows one at "
                f"{place:g}: put them in order"
            )
