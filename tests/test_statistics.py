"""Intervals and tests, against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from dltrain.statistics import difference, interval, mcnemar

# Student's t at 0.975, of 1 to 4 degrees of freedom, as tables print it
T = {1: 12.7062, 2: 4.302653, 3: 3.182446, 4: 2.776445}


def test_the_interval_is_students() -> None:
    found = interval([0.90, 0.92, 0.94])
    assert found is not None
    assert (found["mean"], found["std"]) == pytest.approx((0.92, 0.02))
    assert found["half_width"] == pytest.approx(T[2] * 0.02 / 3**0.5)
    assert interval([0.9]) == {"mean": 0.9, "std": None, "half_width": None}
    assert interval([]) is None


def test_welchs_interval_by_hand() -> None:
    # variances 1 and 4 of three values each: s² = 1/3 + 4/3, and (s²)² / ((1/3)² / 2 + (4/3)² / 2) = 50 / 17 degrees of
    # freedom, between whose whole neighbours t lies
    found = difference([1, 2, 3], [3, 5, 7], paired=False)
    assert found["difference"] == 3
    assert T[3] < found["half_width"] / math.sqrt(5 / 3) < T[2]
    # of equal variances and numbers Welch's degrees of freedom are all, n + n - 2
    found = difference([1, 2, 3], [11, 12, 13], paired=False)
    assert found["half_width"] == pytest.approx(T[4] * math.sqrt(2 / 3), rel=1e-6)


def test_a_pairs_interval_by_hand() -> None:
    # differences 1, 2, 3, 4: mean 2.5, variance 5/3
    found = difference([10, 30, 20, 40], [11, 32, 23, 44], paired=True)
    assert found["difference"] == 2.5
    assert found["half_width"] == pytest.approx(T[3] * math.sqrt(5 / 3 / 4), rel=1e-6)
    # t of one degree of freedom is Cauchy's: p = 1 - 2 atan(t) / pi, here with t = 1.5 / 0.5
    found = difference([0, 0], [1, 2], paired=True)
    assert found["half_width"] == pytest.approx(T[1] * 0.5, rel=1e-5)
    assert found["p"] == pytest.approx(1 - 2 * math.atan(3) / math.pi)


@pytest.mark.parametrize(
    ("first", "second"), [([0.1, 0.5, 0.2], [0.4, 0.5, 0.9]), ([3, 1], [8, 9]), ([5, 6, 5, 7], [1, 2, 3, 9])]
)
def test_both_are_scipys(first: list[float], second: list[float]) -> None:
    for paired, test in (
        (True, stats.ttest_rel(second, first)),
        (False, stats.ttest_ind(second, first, equal_var=False)),
    ):
        found, within = difference(first, second, paired), test.confidence_interval(0.95)
        assert found["p"] == pytest.approx(test.pvalue)
        low, high = (found["difference"] + sign * found["half_width"] for sign in (-1, 1))
        assert (low, high) == pytest.approx((within.low, within.high))


@pytest.mark.parametrize("paired", [True, False])
def test_the_other_way_round_only_the_sign_is_other(paired: bool) -> None:
    first, second = [0.1, 0.5, 0.2], [0.4, 0.5, 0.9]
    there, back = difference(first, second, paired), difference(second, first, paired)
    assert there["difference"] == -back["difference"] == pytest.approx(1 / 3)
    assert (there["half_width"], there["p"]) == pytest.approx((back["half_width"], back["p"]))


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_covers_the_truth_as_often_as_it_says(paired: bool) -> None:
    drawn, trials = random.Random(0), 400
    covered = 0
    for _ in range(trials):
        common = [drawn.gauss(0, 1) for _ in range(4)]
        first = [each + drawn.gauss(0, 1) for each in common]
        second = [(each if paired else 0) + drawn.gauss(3, 2) for each in common]
        found = difference(first, second, paired)
        covered += abs(found["difference"] - 3) <= found["half_width"]
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [([0.5], [0.7]), ([0.5, 0.5], [0.7, 0.7]), ([0.1, 0.1], [0.1, 0.1])],
)
def test_too_little_to_tell(first: list[float], second: list[float], paired: bool) -> None:
    found = difference(first, second, paired)
    assert found == {"difference": pytest.approx(second[0] - first[0]), "half_width": None, "p": None}


def test_pairs_that_differ_by_the_same_show_no_spread_and_sets_do() -> None:
    assert difference([0.1, 0.7], [0.3, 0.9], paired=True)["half_width"] is None  # but for rounding
    assert difference([0.1, 0.7], [0.3, 0.9], paired=False)["half_width"] > 1
    assert difference([0.5, 0.5], [0.7, 0.8], paired=False)["half_width"] == pytest.approx(T[1] * 0.05, rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [(0, 5), (3, 9), (9, 3), (7, 7), (20, 41)])
def test_mcnemars_p_is_the_share_of_splits_at_least_as_uneven(first: int, second: int) -> None:
    n = first + second
    ways = sum(math.comb(n, each) for each in range(n + 1) if abs(2 * each - n) >= abs(first - second))
    assert mcnemar(first, second) == pytest.approx(ways / 2**n)


def test_of_no_image_that_one_alone_has_right_nothing_is_told() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 1) == 1  # nor of one
