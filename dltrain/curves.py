"""One class against the rest at every threshold: scores float64 `[N]`, which are of the class bool `[N]` -> numbers.

A threshold is a value t, and an image is called positive where its score is at least t.  So the distinct scores are all
the thresholds there are: any other t calls the same images positive as the next score above it, and images of the same
score are called positive together.  Counts are whole numbers until a ratio is asked for, and a ratio whose denominator
is zero is None, as in `metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dltrain.errors import ConfigError
from dltrain.lazy import torch
from dltrain.metrics import confusion_matrix, per_class, ratio

# a rate -> which of the thresholds that reach it is taken, and what reaching it means: each time the one that does best
# by what the rate leaves open, the most true positives or the fewest false ones
RULES = {
    "type_1_error": ("lowest", "at most"),
    "type_2_error": ("highest", "at most"),
    "precision": ("lowest", "at least"),
    "recall": ("highest", "at least"),
}


@dataclass(frozen=True)
class Curve:
    """What is called positive at each threshold, from the highest score to the lowest, where everything is.

    thresholds: float64 `[T]`, the distinct scores, falling
    true_positives, false_positives: int64 `[T]`, rising
    """

    thresholds: torch.Tensor
    true_positives: torch.Tensor
    false_positives: torch.Tensor

    @property
    def positives(self) -> int:
        return int(self.true_positives[-1])

    @property
    def negatives(self) -> int:
        return int(self.false_positives[-1])

    @property
    def complete(self) -> bool:
        """Whether there are images of the class and of the rest; else there is nothing to tell apart."""
        return bool(self.positives and self.negatives)

    @cached_property
    def rates(self) -> dict[str, torch.Tensor]:
        """Each of the RULES' rates at each threshold, float64 `[T]`; NaN where its denominator is zero."""
        hits, alarms = self.true_positives.double(), self.false_positives.double()
        return {
            "type_1_error": alarms / self.negatives,
            "type_2_error": (self.positives - hits) / self.positives,
            "precision": hits / (hits + alarms),
            "recall": hits / self.positives,
        }


def curve(scores: torch.Tensor, positive: torch.Tensor) -> Curve:
    """The curve of at least one image."""
    ranked, order = scores.sort(descending=True)
    last = torch.ones_like(positive)  # of the images that share a score
    last[:-1] = ranked[1:] != ranked[:-1]
    called = last.nonzero()[:, 0] + 1
    hits = positive[order].cumsum(0)[last]
    return Curve(ranked[last], hits, called - hits)


def auc(curve: Curve) -> float | None:
    """Area under the ROC curve, straight between its points: exact, and None where the class or the rest is missing.

    It is the probability that an image of the class scores higher than one of the rest, a tie counting one half
    (Hanley & McNeil 1982).
    """
    hits, alarms = (_from_zero(each) for each in (curve.true_positives, curve.false_positives))
    twice = int((alarms.diff() * (hits[1:] + hits[:-1])).sum())  # the area, in pairs of images
    return ratio(twice, 2 * curve.positives * curve.negatives)


def average_precision(curve: Curve) -> float | None:
    """The mean of the precision at each threshold, weighted by the recall gained there; None as for `auc`.

    As scikit-learn's: the sum of (R_n - R_n-1) P_n, which unlike an area of trapezoids is never too optimistic
    (Davis & Goadrich 2006).
    """
    if not curve.complete:
        return None
    gained = _from_zero(curve.true_positives).diff()
    return float((gained * curve.rates["precision"]).sum()) / curve.positives


def _from_zero(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat((counts.new_zeros(1), counts))


def at(scores: torch.Tensor, positive: torch.Tensor, threshold: float) -> dict[str, Any]:
    """Counts and rates where images with a score of at least `threshold` are called positive, ready for JSON.

    type_1_error FP / (FP + TN)    precision TP / (TP + FP)    f1       2 TP / (2 TP + FP + FN)
    type_2_error FN / (FN + TP)    recall    TP / (TP + FN)    accuracy (TP + TN) / images
    """
    confusion = confusion_matrix((scores >= threshold).long(), positive.long(), 2)
    (true_negatives, false_positives), (false_negatives, true_positives) = confusion.tolist()
    return {
        "images": len(scores),
        "true_positives": true_positives,
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "true_negatives": true_negatives,
        **per_class(confusion)[1],
        "f1": ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        "accuracy": ratio(true_positives + true_negatives, len(scores)),
    }


def threshold_for(curve: Curve, rate: str, wanted: float) -> float:
    """The threshold that RULES name for a wanted rate, a distinct score.

    type_1_error: the lowest whose type I error is at most the wanted one, so that recall is the highest there is
    type_2_error: the highest whose type II error is at most the wanted one, so that there are the fewest false alarms
    precision: the lowest whose precision is at least the wanted one, so that recall is the highest there is
    recall: the highest whose recall is at least the wanted one

    Raises ConfigError where no threshold reaches it, or the class or the rest is missing.
    """
    if not curve.complete:
        text = f"{curve.positives:,} images of the class and {curve.negatives:,} of the rest"
        raise ConfigError(f"no threshold can be chosen from {text}: both are needed")
    which, reach = RULES[rate]
    values = curve.rates[rate]
    reached = (values <= wanted if reach == "at most" else values >= wanted).nonzero()[:, 0]
    if not len(reached):
        best = float(values.min() if reach == "at most" else values.max())
        raise ConfigError(f"no threshold has a {worded(rate)} of {reach} {wanted:g}: the best there is {best:.6g}")
    return float(curve.thresholds[reached[-1 if which == "lowest" else 0]])


def worded(rate: str) -> str:
    return {"type_1_error": "type I error", "type_2_error": "type II error"}.get(rate, rate)


def points(curve: Curve, steps: int = 200) -> dict[str, list[float | None]] | None:
    """Both curves as lists of the same length, ready for JSON: recall against type_1_error is ROC, precision against
    recall PR.

    The first point calls nothing positive (threshold None), the last everything.  Where there are more thresholds than
    `steps`, those in between that move recall and type I error together by less than 2 / steps are left out.  None
    where the class or the rest is missing.
    """
    if not curve.complete:
        return None
    kept = torch.arange(len(curve.thresholds))
    if len(kept) > steps:
        way = curve.rates["recall"] + curve.rates["type_1_error"]  # rises to 2
        kept = torch.searchsorted(way, torch.linspace(0, 2, steps + 1, dtype=torch.float64)).unique()
    shown = {name: curve.rates[name][kept].tolist() for name in ("type_1_error", "recall", "precision")}
    return {
        "threshold": [None, *curve.thresholds[kept].tolist()],
        "type_1_error": [0.0, *shown["type_1_error"]],
        "recall": [0.0, *shown["recall"]],
        "precision": [None, *shown["precision"]],
    }
