"""What several results say: the interval of their mean, and tests of whether two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import Any

CONFIDENCE = 0.95  # that the true value is within an interval

Found = dict[str, Any]


def interval(values: Sequence[float]) -> Found | None:
    """Mean, sample standard deviation, and the half width of the mean's 95 % interval by Student's t.

    None of no values; of one value there is a mean alone.
    """
    if not values:
        return None
    if len(values) == 1:
        return {"mean": values[0], "std": None, "half_width": None}
    half_width = _quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return {"mean": fmean(values), "std": stdev(values), "half_width": half_width}


def _quantile(freedom: float) -> float:
    """Of Student's t with so many degrees of freedom: 95 % lie between it and its negative."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def difference(first: Sequence[float], second: Sequence[float], paired: bool) -> Found:
    """Mean of the second less mean of the first, the half width of its 95 % interval, and the p of no difference.

    By Welch's t, which takes no two variances for equal, with the degrees of freedom of Welch 1947 (Biometrika 34).

    paired: by Student's t of the differences, each value of the one less that in the same place of the other

    Interval and p are None where there are fewer than two values of either, or where they show no spread: an interval
    of no width would claim a certainty that two or three equal values do not give.
    """
    found: Found = {"difference": fmean(second) - fmean(first), "half_width": None, "p": None}
    if min(len(first), len(second)) < 2:
        return found
    apart = [after - before for before, after in zip(first, second, strict=True)] if paired else []
    samples = [apart] if paired else [first, second]
    parts = [variance(each) / len(each) for each in samples]  # of each mean
    error = sum(parts) ** 0.5
    if error <= 1e-12 * max(map(abs, (*first, *second))):  # what rounding alone leaves
        return found
    freedom = error**4 / sum(part**2 / (len(each) - 1) for part, each in zip(parts, samples, strict=True))
    from scipy.special import stdtr

    p = 2 * float(stdtr(freedom, -abs(found["difference"]) / error))
    return {**found, "half_width": _quantile(freedom) * error, "p": p}


def mcnemar(only_first: int, only_second: int) -> float:
    """The p of McNemar's exact test: how likely so uneven a split is where two models are equally good.

    only_first, only_second: images that one of the two alone has right.  Those that both have right, or neither, say
    nothing of which is better.  McNemar 1947 (Psychometrika 12), with the binomial distribution itself.
    """
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue)
