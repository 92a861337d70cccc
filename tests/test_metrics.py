"""Metrics against scikit-learn's, and against numbers worked out by hand."""

import json
import math

import pytest
import torch
from sklearn import metrics as sklearn

from dltrain import metrics
from dltrain.errors import DataError, DivergedError


def split(images, classes, seed=0):
    """Probabilities `[N, K]` that are right more often than not, and labels `[N]`."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=random)
    logits = torch.randn(images, classes, generator=random)
    logits[torch.arange(images), labels] += 1
    return logits.softmax(1), labels


# 4 images, 3 classes; predicted 0 0 1 1 where 0 1 1 2 is true
PROBABILITIES = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.0, 0.7, 0.3]])
LABELS = torch.tensor([0, 1, 1, 2])


@pytest.mark.parametrize("classes", [2, 7])
def test_confusion_matrix_is_sklearns(classes):
    probabilities, labels = split(500, classes)
    predicted = probabilities.argmax(1)
    found = metrics.confusion_matrix(predicted, labels, classes)
    assert found.dtype == torch.int64
    assert found.tolist() == sklearn.confusion_matrix(labels, predicted, labels=range(classes)).tolist()


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    found = metrics.confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]), 3)
    assert found.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(("predicted", "label"), [(3, 0), (0, 3)])
def test_confusion_matrix_refuses_a_class_that_is_not_there(predicted, label):
    with pytest.raises(IndexError):
        metrics.confusion_matrix(torch.tensor([predicted]), torch.tensor([label]), 3)


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9])
def test_top_k_is_sklearns(k):
    probabilities, labels = split(500, 7)
    expected = sklearn.top_k_accuracy_score(labels, probabilities, k=k) if k < 7 else 1.0
    assert metrics.top_k(probabilities, labels, k) == pytest.approx(expected, abs=1e-12)


def test_top_k_gives_a_tie_to_the_lowest_label():
    tied = torch.full((4, 4), 0.25)
    labels = torch.arange(4)
    assert [metrics.top_k(tied, labels, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(3, (500, 6), generator=random).float()  # full of ties
    labels = torch.randint(6, (500,), generator=random)
    assert metrics.top_k(coarse, labels, 1) == (coarse.argmax(1) == labels).double().mean().item()


def test_top_k_counts_nan_as_wrong():
    probabilities = torch.tensor([[math.nan, math.nan, math.nan], [0.1, math.nan, 0.2]])
    assert metrics.top_k(probabilities, torch.tensor([0, 2]), 1) == 0.0


def test_per_class_is_sklearns():
    probabilities, labels = split(800, 6)
    predicted = probabilities.argmax(1)
    rows = metrics.per_class(metrics.confusion_matrix(predicted, labels, 6))
    precision, recall, _, _ = sklearn.precision_recall_fscore_support(labels, predicted)
    assert [row["precision"] for row in rows] == pytest.approx(precision)
    assert [row["recall"] for row in rows] == pytest.approx(recall)
    one_against_all = sklearn.multilabel_confusion_matrix(labels, predicted)
    assert [row["type_1_error"] for row in rows] == pytest.approx([fp / (fp + tn) for (tn, fp), _ in one_against_all])
    assert [row["type_2_error"] for row in rows] == pytest.approx([fn / (fn + tp) for _, (fn, tp) in one_against_all])


def test_per_class_by_hand_with_none_where_there_is_nothing_to_divide_by():
    rows = metrics.per_class(torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0]]))
    assert [list(row.values()) for row in rows] == [
        [3 / 5, 3 / 4, 2 / 11, 1 / 4],
        [4 / 10, 4 / 6, 6 / 9, 2 / 6],
        [None, None, 0.0, None],  # no image of it, and none taken for it
        [None, 0.0, 0.0, 1.0],
    ]
    assert list(rows[0]) == ["precision", "recall", "type_1_error", "type_2_error"]


def test_per_class_of_a_split_with_one_class_only():
    assert metrics.per_class(torch.tensor([[7, 0], [0, 0]]))[0]["type_1_error"] is None


def test_calibration_error_by_hand():
    # bins of a fifth: (0.8, 1] holds 0.9 right and 0.81 wrong; (0.6, 0.8] holds 0.7 right and 0.8 wrong
    confidence = torch.tensor([0.9, 0.81, 0.7, 0.8], dtype=torch.float64)
    probabilities = torch.stack((confidence, 1 - confidence), dim=1)
    expected = 2 / 4 * abs((0.9 + 0.81) / 2 - 1 / 2) + 2 / 4 * abs((0.7 + 0.8) / 2 - 1 / 2)
    assert metrics.calibration_error(probabilities, torch.tensor([0, 1, 0, 1]), bins=5) == pytest.approx(expected)


def test_calibration_error_of_the_sure():
    sure = torch.eye(3)
    assert metrics.calibration_error(sure, torch.tensor([0, 1, 2])) == 0.0
    assert metrics.calibration_error(sure, torch.tensor([1, 2, 0])) == 1.0


def test_calibration_error_against_a_loop_over_bins():
    probabilities, labels = split(2000, 4)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            expected += inside.double().mean() * (accuracy - confidence[inside].double().mean()).abs()
    assert expected > 0.01
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(float(expected))


def test_worst_mistakes_are_the_surest_wrong_ones():
    assert metrics.worst_mistakes(PROBABILITIES, LABELS, 9).tolist() == [3, 1]
    assert metrics.worst_mistakes(PROBABILITIES, LABELS, 1).tolist() == [3]
    assert metrics.worst_mistakes(PROBABILITIES, torch.tensor([0, 0, 1, 1]), 5).tolist() == []


def test_worst_mistakes_that_are_as_sure_keep_their_order():
    same = torch.tensor([[0.75, 0.25]]).repeat(100, 1)
    assert metrics.worst_mistakes(same, torch.ones(100, dtype=torch.int64), 100).tolist() == list(range(100))


def test_classification_by_hand():
    found = metrics.classification(PROBABILITIES, LABELS, ["a", "b", "c"])
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "images": 4,
        "accuracy": 0.5,
        "top5": None,
        "calibration_error": pytest.approx((0.1 + 0.6 + 0.2 + 0.7) / 4),  # each in a bin of its own
        "per_class": [
            {"class": "a", "images": 1, "precision": 0.5, "recall": 1.0, "type_1_error": 1 / 3, "type_2_error": 0.0},
            {"class": "b", "images": 2, "precision": 0.5, "recall": 0.5, "type_1_error": 0.5, "type_2_error": 0.5},
            {"class": "c", "images": 1, "precision": None, "recall": 0.0, "type_1_error": 0.0, "type_2_error": 1.0},
        ],
        "confusion_matrix": [[1, 0, 0], [1, 1, 0], [0, 1, 0]],
    }


@pytest.mark.parametrize(("classes", "given"), [(2, False), (5, False), (6, True), (10, True)])
def test_top5_is_given_where_it_says_something(classes, given):
    probabilities, labels = split(300, classes)
    found = metrics.classification(probabilities, labels, [str(i) for i in range(classes)])
    assert found["top5"] == (metrics.top_k(probabilities, labels, 5) if given else None)
    assert found["accuracy"] == sklearn.accuracy_score(labels, probabilities.argmax(1))


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="no images"):
        metrics.classification(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ["a", "b", "c"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(value):
    probabilities = PROBABILITIES.clone()
    probabilities[2, 1] = value
    with pytest.raises(DivergedError, match="1 of 4 images"):
        metrics.classification(probabilities, LABELS, ["a", "b", "c"])
