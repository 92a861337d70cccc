"""Metrics: probabilities float32 `[N, K]` and labels int64 `[N]` of a whole split, both on the CPU -> numbers.

Where several classes share a probability, the one with the lowest label comes first, as in `argmax`; so no tie is ever
counted in the model's favour by chance.  A ratio whose denominator is zero is None, never a 0 that looks measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dltrain.errors import DataError, DivergedError
from dltrain.lazy import torch


def classification(probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Everything that is reported of a classifier on a split, ready for JSON.

    Raises DataError where there are no images, DivergedError where a probability is not finite.
    """
    images, classes = probabilities.shape
    if not images:
        raise DataError("no images to evaluate: the split is empty")
    broken = images - int(probabilities.isfinite().all(1).sum())
    if broken:
        raise DivergedError(
            f"the model's outputs are not finite for {broken} of {images} images: its weights have diverged; "
            "train again with a lower optim.lr"
        )
    confusion = confusion_matrix(probabilities.argmax(1), labels, classes)
    rows = zip(class_names, confusion.sum(1).tolist(), per_class(confusion), strict=True)
    return {
        "images": images,
        "accuracy": top_k(probabilities, labels, 1),
        "top5": top_k(probabilities, labels, 5) if classes > 5 else None,
        "calibration_error": calibration_error(probabilities, labels),
        "per_class": [{"class": name, "images": count, **ratios} for name, count, ratios in rows],
        "confusion_matrix": confusion.tolist(),
    }


def top_k(probabilities: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Share of the images whose true class is among the `k` most probable (all of them, where there are no more)."""
    true = labels[:, None]  # [N, 1]
    own = probabilities.gather(1, true)
    later = torch.arange(probabilities.shape[1]) >= true
    behind = (probabilities < own) | ((probabilities == own) & later)  # a NaN is never behind
    return int(((~behind).sum(1) < k).sum()) / len(labels)


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts int64 `[classes, classes]`: row the true class, column the predicted one; both int64 `[N]`."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    return counts.index_put_((labels, predicted), torch.tensor(1), accumulate=True)


def per_class(confusion: torch.Tensor) -> list[dict[str, float | None]]:
    """Precision, recall, type I and type II error of each class against all others, from a confusion matrix.

    precision TP / (TP + FP)    type_1_error FP / (FP + TN), the false positive rate
    recall    TP / (TP + FN)    type_2_error FN / (FN + TP), the false negative rate
    """
    images = int(confusion.sum())
    counts = zip(confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    return [
        {
            "precision": ratio(hits, predicted),
            "recall": ratio(hits, true),
            "type_1_error": ratio(predicted - hits, images - true),
            "type_2_error": ratio(true - hits, true),
        }
        for hits, true, predicted in counts
    ]


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in 0..1 (Guo et al. 2017, eq. 3): how far confidence is from accuracy.

    Images fall by the probability of their predicted class into `bins` of equal width, ((i - 1) / bins, i / bins];
    each bin counts |mean confidence - accuracy|, weighted by its share of the images.
    """
    confidence, predicted = probabilities.double().max(1)
    excess = confidence - (predicted == labels).double()
    bin_index = (confidence * bins).ceil().long()  # 0 stays empty: no predicted class has a probability of 0
    return float(torch.bincount(bin_index, weights=excess).abs().sum()) / len(labels)


def worst_mistakes(probabilities: torch.Tensor, labels: torch.Tensor, n: int) -> torch.Tensor:
    """Indices int64 of the at most `n` wrong predictions with the highest probability, the highest first."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:n]


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """The fewest insertions, deletions and substitutions that make one sequence the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, symbol in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (symbol != wanted))
    return row[-1]
