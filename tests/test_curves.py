"""ROC and PR curves and their thresholds against scikit-learn's, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn

from dltrain.curves import RULES, at, auc, average_precision, curve, points, threshold_for
from dltrain.errors import ConfigError

# positive at 0.9 0.7 0.7 0.2, negative at 0.8 0.7 0.4 0.4 0.1
SCORES = torch.tensor([0.2, 0.7, 0.4, 0.9, 0.8, 0.7, 0.1, 0.7, 0.4], dtype=torch.float64)
POSITIVE = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 0]).bool()


def drawn(images: int, levels: int | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that are higher for the class more often than not, of so many distinct values, and which are of it."""
    random = torch.Generator().manual_seed(seed)
    positive = torch.rand(images, generator=random) < 0.3
    scores = (torch.randn(images, generator=random, dtype=torch.float64) + positive).sigmoid()
    return (scores * levels).floor() / levels if levels else scores, positive


def test_a_curve_by_hand():
    found = curve(SCORES, POSITIVE)
    assert found.thresholds.tolist() == [0.9, 0.8, 0.7, 0.4, 0.2, 0.1]
    assert found.true_positives.tolist() == [1, 1, 3, 3, 4, 4]
    assert found.false_positives.tolist() == [0, 1, 2, 4, 4, 5]
    # pairs in which the positive is ahead: 5, 3.5, 3.5, 1 of 5
    assert auc(found) == 13 / 20
    assert average_precision(found) == pytest.approx(1 / 4 * 1 + 2 / 4 * 3 / 5 + 1 / 4 * 4 / 8)


@pytest.mark.parametrize("levels", [None, 50, 3, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_curves_and_areas_are_sklearns(levels, seed):
    scores, positive = drawn(700, levels, seed)
    found = curve(scores, positive)
    false_rate, true_rate, thresholds = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    assert found.thresholds.tolist() == thresholds[1:].tolist()  # its first is infinite
    np.testing.assert_allclose(found.rates["type_1_error"], false_rate[1:], rtol=1e-12)
    np.testing.assert_allclose(found.rates["recall"], true_rate[1:], rtol=1e-12)
    np.testing.assert_allclose(found.rates["type_2_error"], 1 - true_rate[1:], rtol=1e-9, atol=1e-15)
    precision, _, _ = sklearn.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(found.rates["precision"].flip(0), precision[:-1], rtol=1e-12)
    assert auc(found) == pytest.approx(sklearn.roc_auc_score(positive, scores), rel=1e-12)
    assert average_precision(found) == pytest.approx(sklearn.average_precision_score(positive, scores), rel=1e-12)


def test_auc_is_the_share_of_pairs_in_order():
    scores, positive = drawn(300, 20)
    ahead = scores[positive][:, None] - scores[~positive]
    twice = 2 * int((ahead > 0).sum()) + int((ahead == 0).sum())
    assert auc(curve(scores, positive)) == twice / (2 * ahead.numel())


@pytest.mark.parametrize(
    ("positive", "area", "precision"),
    [([1, 1, 0, 0], 1.0, 1.0), ([0, 0, 1, 1], 0.0, 1 / 2 * 1 / 3 + 1 / 2 * 2 / 4)],
)
def test_areas_of_a_perfect_and_of_a_reversed_order(positive, area, precision):
    found = curve(torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor(positive).bool())
    assert (auc(found), average_precision(found)) == (area, pytest.approx(precision))


def test_scores_that_are_all_the_same_tell_nothing():
    found = curve(torch.full((8,), 0.25), torch.tensor([1, 0, 0, 0, 1, 0, 0, 0]).bool())
    assert found.thresholds.tolist() == [0.25]
    assert (auc(found), average_precision(found)) == (0.5, 0.25)
    assert points(found) == {
        "threshold": [None, 0.25],
        "type_1_error": [0.0, 1.0],
        "recall": [0.0, 1.0],
        "precision": [None, 0.25],
    }


@pytest.mark.parametrize("all_positive", [True, False])
def test_where_the_class_or_the_rest_is_missing_there_is_no_curve(all_positive):
    positive = torch.full((3,), all_positive)
    found = curve(torch.tensor([0.5, 0.2, 0.9]), positive)
    assert (auc(found), average_precision(found), points(found)) == (None, None, None)
    numbers = "3 images of the class and 0 of the rest" if all_positive else "0 images of the class and 3 of the rest"
    for rate in RULES:
        with pytest.raises(ConfigError, match=f"no threshold can be chosen from {numbers}: both are needed"):
            threshold_for(found, rate, 0.5)
    rates = at(torch.tensor([0.5, 0.2, 0.9]), positive, 0.6)
    missing = {key for key, value in rates.items() if value is None}
    assert missing == ({"type_1_error"} if all_positive else {"type_2_error", "recall"})


def test_rates_at_a_threshold_by_hand():
    found = at(SCORES, POSITIVE, 0.7)  # the images of exactly 0.7 are called positive
    assert json.loads(json.dumps(found)) == {
        "images": 9,
        "true_positives": 3,
        "false_positives": 2,
        "false_negatives": 1,
        "true_negatives": 3,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "type_1_error": 2 / 5,
        "type_2_error": 1 / 4,
        "f1": 6 / 9,
        "accuracy": 6 / 9,
    }


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3, 0.7, math.nextafter(0.7, 1), 0.95])
def test_rates_at_a_threshold_are_sklearns(threshold):
    called = threshold <= SCORES
    found = at(SCORES, POSITIVE, threshold)
    counts = [found[f"{name}s"] for name in ("true_negative", "false_positive", "false_negative", "true_positive")]
    assert counts == sklearn.confusion_matrix(POSITIVE, called).ravel().tolist()
    assert found["f1"] == pytest.approx(sklearn.f1_score(POSITIVE, called))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(POSITIVE, called))
    assert found["precision"] == (pytest.approx(sklearn.precision_score(POSITIVE, called)) if called.any() else None)


# at 0.9 0.8 0.7 0.4 0.2 0.1: type I error 0 .2 .4 .8 .8 1, recall .25 .25 .75 .75 1 1, precision 1 1/2 3/5 3/7 4/8 4/9
@pytest.mark.parametrize(
    ("rate", "wanted", "expected"),
    [
        ("type_1_error", 0, 0.9),
        ("type_1_error", 0.19, 0.9),
        ("type_1_error", 0.2, 0.8),
        ("type_1_error", 0.4, 0.7),
        ("type_1_error", 0.8, 0.2),
        ("type_1_error", 1, 0.1),
        ("type_2_error", 0, 0.2),
        ("type_2_error", 0.25, 0.7),
        ("type_2_error", 0.74, 0.7),
        ("type_2_error", 0.75, 0.9),
        ("recall", 1, 0.2),
        ("recall", 0.76, 0.2),
        ("recall", 0.75, 0.7),
        ("recall", 0, 0.9),
        ("precision", 1, 0.9),
        ("precision", 0.61, 0.9),
        ("precision", 0.6, 0.7),
        ("precision", 0.5, 0.2),  # though at 0.4 there is less
        ("precision", 0, 0.1),
    ],
)
def test_a_threshold_for_a_rate_by_hand(rate, wanted, expected):
    assert threshold_for(curve(SCORES, POSITIVE), rate, wanted) == expected


@pytest.mark.parametrize("rate", RULES)
@pytest.mark.parametrize("levels", [None, 12])
def test_a_threshold_for_a_rate_is_the_one_that_trying_all_finds(rate, levels):
    scores, positive = drawn(150, levels, seed=3)
    which, reach = RULES[rate]
    found = curve(scores, positive)
    tried = {threshold: at(scores, positive, threshold)[rate] for threshold in scores.tolist()}
    for wanted in (0.05, 0.2, 0.5, *list(tried.values())[:20]):
        good = [each for each, value in tried.items() if (value <= wanted if reach == "at most" else value >= wanted)]
        if good:
            assert threshold_for(found, rate, wanted) == (min(good) if which == "lowest" else max(good))
        else:
            with pytest.raises(ConfigError):
                threshold_for(found, rate, wanted)


@pytest.mark.parametrize(
    ("rate", "wanted", "message"),
    [
        ("type_1_error", 0.1, "no threshold has a type I error of at most 0.1: the best there is 0.5"),
        ("precision", 0.9, "no threshold has a precision of at least 0.9: the best there is 0.666667"),
    ],
)
def test_a_rate_that_no_threshold_reaches_is_said(rate, wanted, message):
    found = curve(torch.tensor([0.9, 0.6, 0.6, 0.1]), torch.tensor([False, True, True, False]))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        threshold_for(found, rate, wanted)


def test_a_curve_of_few_points_is_given_whole():
    assert points(curve(SCORES, POSITIVE)) == {
        "threshold": [None, 0.9, 0.8, 0.7, 0.4, 0.2, 0.1],
        "type_1_error": [0, 0, 0.2, 0.4, 0.8, 0.8, 1],
        "recall": [0, 0.25, 0.25, 0.75, 0.75, 1, 1],
        "precision": [None, 1, 1 / 2, 3 / 5, pytest.approx(3 / 7), 4 / 8, pytest.approx(4 / 9)],
    }


def test_a_curve_of_few_points_keeps_those_that_move_little():
    scores = torch.tensor([0.9, 0.8, 0.7, *[0.1] * 500])
    positive = torch.zeros(503).bool()
    positive[1] = positive[3:250] = True
    found = points(curve(scores, positive))
    assert found["threshold"][1:] == scores[:4].tolist()


@pytest.mark.parametrize("steps", [20, 200])
def test_a_long_curve_is_thinned_and_stays_near(steps):
    whole = curve(*drawn(20_000, None))
    found = points(whole, steps)
    assert steps / 2 < len(found["threshold"]) <= steps + 2
    assert {len(each) for each in found.values()} == {len(found["threshold"])}
    kept = torch.tensor(found["threshold"][1:], dtype=torch.float64)
    index = (whole.thresholds[:, None] == kept).nonzero()[:, 0]
    assert (len(index), int(index[0]), int(index[-1])) == (len(kept), 0, len(whole.thresholds) - 1)
    for name in ("type_1_error", "recall", "precision"):
        assert found[name][1:] == whole.rates[name][index].tolist()
    before = torch.searchsorted(index, torch.arange(len(whole.thresholds)), right=True) - 1
    moved = sum((whole.rates[name] - whole.rates[name][index[before]]).abs() for name in ("type_1_error", "recall"))
    assert float(moved.max()) < 2 / steps
