"""Averages of the weights: the position in a run -> the share of the weights in their running average.

`step` counts from 1, over the whole run, and is the step that has just been made; `epochs` is the length of the run.
The average begins as the weights do, and becomes average + share (weights - average) after the step: a share of 0
leaves it as it is, 1 puts the weights in its place.

A kind of average with the fact `reestimates` is of weights too far apart for an average of their batch-norm statistics
to be right: those are measured anew for it.
"""

from __future__ import annotations

import math

from dltrain.registry import BelowOne, PositiveInt, register


@register("average")
def ema(
    step: int, steps_per_epoch: int, epochs: float, *, decay: BelowOne = 0.999, every_steps: PositiveInt = 1
) -> float:
    """Exponential moving average: at each update the weights enter with a share of 1 - decay.

    So that the first weights do not weigh on a short run, the decay of update t is at most (1 + t) / (10 + t), as of
    TensorFlow's ExponentialMovingAverage with its num_updates; 0.99 is reached after 890 updates, 0.999 after 8990.

    decay: share of the average that an update keeps; 0.999 averages over the last 1,000 updates or so
    every_steps: steps from one update to the next; each costs a pass over all weights
    """
    updates, since = divmod(step, every_steps)
    return 0.0 if since else 1 - min(decay, (1 + updates) / (10 + updates))


@register("average", reestimates=True)
def swa(step: int, steps_per_epoch: int, epochs: float, *, start: BelowOne = 0.75) -> float:
    """Stochastic weight averaging: the equal average of the weights at the end of each epoch (Izmailov et al. 2018).

    The first weights in it are those at the end of the first `start` of the run; until then it is the last epoch's
    weights alone.  The learning rate is best kept high and level from there on: a schedule of knots can say so.

    start: share of the run before the averaging, rounded down to whole epochs, but at least one
    """
    epoch, since = divmod(step, steps_per_epoch)
    first = max(math.floor(start * epochs + 1e-9), 1)  # 0.29 * 100 is 28.999999999999996, and means 29
    return 0.0 if since else 1 / max(epoch - first + 1, 1)
