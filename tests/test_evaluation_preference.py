"""The statistics of a reward model: goldens with their arithmetic, identities, models whose calibration is known."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ppo_jax.errors import InputError
from ppo_jax.evaluation import (
    accuracy_by_margin,
    expected_calibration_error,
    length_correlation,
    pair_accuracy,
    reliability,
    wilson_interval,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def pairs(rng):
    """Differences, and outcomes drawn with the probabilities that they say."""
    differences = rng.normal(0, 2, 4000)
    return differences, rng.random(4000) < sigmoid(differences)


# Accuracy


def test_accuracy_golden():
    # right, wrong, right (b preferred and b higher), equal scores count half: 2.5 of 4
    made = pair_accuracy([1.5, -0.5, -2.0, 0.0], [True, True, False, False])
    assert made.accuracy == 0.625
    assert (made.low, made.high) == wilson_interval(2.5, 4)


def test_accuracy_does_not_depend_on_which_is_called_a(rng, pairs):
    differences, outcomes = pairs
    swapped = rng.random(differences.size) < 0.5
    again = pair_accuracy(np.where(swapped, -differences, differences), outcomes ^ swapped)
    assert again == pair_accuracy(differences, outcomes)


def test_accuracy_of_the_true_scores_is_the_mean_probability_of_the_likelier_side(pairs):
    made = pair_accuracy(*pairs, level=1 - 1e-7)
    assert made.low < np.mean(sigmoid(np.abs(pairs[0]))) < made.high


# Calibration


def test_reliability_golden():
    # Bins of the confidence: [0.5, 0.75] and (0.75, 1].
    # 0.6 a preferred: right, confidence 0.6.  0.3 a preferred: wrong, confidence 0.7.  0.5: half right.
    # 0.9 a preferred: right.  0.2 b preferred: right, confidence 0.8.
    rows = reliability([0.6, 0.3, 0.5, 0.9, 0.2], [1, 1, 0, 1, 0], bins=2)
    assert rows == [
        {"confidence": pytest.approx((0.6 + 0.7 + 0.5) / 3), "accuracy": pytest.approx(1.5 / 3), "count": 3},
        {"confidence": pytest.approx((0.9 + 0.8) / 2), "accuracy": 1.0, "count": 2},
    ]
    # 3/5 * |0.5 - 0.6| + 2/5 * |1 - 0.85| = 0.06 + 0.06
    assert expected_calibration_error([0.6, 0.3, 0.5, 0.9, 0.2], [1, 1, 0, 1, 0], bins=2) == pytest.approx(0.12)


def test_an_empty_bin_is_left_out_and_the_ends_have_their_place():
    rows = reliability([1.0, 0.0, 0.5], [1, 0, 1], bins=10)
    assert [(row["confidence"], row["accuracy"], row["count"]) for row in rows] == [(0.5, 0.5, 1), (1.0, 1.0, 2)]


def test_one_bin_is_the_whole(pairs):
    probabilities = sigmoid(pairs[0])
    (row,) = reliability(probabilities, pairs[1], bins=1)
    assert row["accuracy"] == pytest.approx(pair_accuracy(*pairs).accuracy)
    assert row["confidence"] == pytest.approx(np.maximum(probabilities, 1 - probabilities).mean())
    assert row["count"] == 4000


def test_bins_hold_every_pair_once_in_rising_confidence(rng, pairs):
    bins = int(rng.integers(2, 30))
    rows = reliability(sigmoid(pairs[0]), pairs[1], bins)
    edges = np.linspace(0.5, 1, bins + 1)
    assert sum(row["count"] for row in rows) == 4000
    assert all(np.any((edges[:-1] <= r["confidence"]) & (r["confidence"] <= edges[1:])) for r in rows)
    assert [row["confidence"] for row in rows] == sorted(row["confidence"] for row in rows)


def test_a_calibrated_model_has_a_small_error_and_a_confident_one_a_large(pairs):
    differences, outcomes = pairs
    honest = expected_calibration_error(sigmoid(differences), outcomes)
    boastful = expected_calibration_error(sigmoid(5 * differences), outcomes)
    assert honest < 0.04
    # It says close to 1 and is right as often as before.
    assert boastful == pytest.approx(np.mean(sigmoid(5 * np.abs(differences)) - sigmoid(np.abs(differences))), abs=0.05)
    assert boastful > 0.1


def test_calibration_does_not_depend_on_which_is_called_a(pairs):
    probabilities, outcomes = sigmoid(pairs[0]), pairs[1]
    swapped = expected_calibration_error(1 - probabilities, ~outcomes)
    assert swapped == pytest.approx(expected_calibration_error(probabilities, outcomes))


# Margins


def test_accuracy_by_margin_golden():
    # |d| sorted: 0 (half), 1 (wrong) | 2 (right), 3 (right), in two groups of two; the odd one goes to the first group.
    rows = accuracy_by_margin([3.0, -1.0, 0.0, 2.0], [1, 1, 1, 1], bins=2)
    assert rows == [
        {"low": 0.0, "high": 1.0, "accuracy": 0.25, "count": 2},
        {"low": 2.0, "high": 3.0, "accuracy": 1.0, "count": 2},
    ]
    assert [row["count"] for row in accuracy_by_margin([1, 2, 3, 4, 5], [1] * 5, bins=2)] == [3, 2]


def test_accuracy_rises_with_the_margin_of_true_scores(pairs):
    rows = accuracy_by_margin(*pairs, bins=4)
    assert [row["count"] for row in rows] == [1000] * 4
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies)
    assert np.mean(accuracies) == pytest.approx(pair_accuracy(*pairs).accuracy)
    assert all(a["high"] <= b["low"] for a, b in itertools.pairwise(rows))


def test_few_pairs_are_a_group_each():
    assert [row["low"] for row in accuracy_by_margin([2.0, -1.0], [1, 0], bins=5)] == [1.0, 2.0]


# Length


def test_length_correlation_golden():
    # lengths 1 2 3, scores 1 4 9: same order, so Spearman 1; Pearson: cov 8, variances 2 and 98/3, 8 / sqrt(196/3)
    made = length_correlation([1, 4, 9], [1, 2, 3])
    assert made == {"pearson": pytest.approx(8 / np.sqrt(196 / 3)), "spearman": pytest.approx(1.0)}
    assert length_correlation([-1, -4, -9], [1, 2, 3])["spearman"] == pytest.approx(-1.0)


def test_length_correlation_agrees_with_ranks(rng):
    scores, lengths = rng.normal(size=50), rng.integers(1, 20, 50)
    made = length_correlation(scores, lengths)
    assert made["pearson"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    ranks = [scipy.stats.rankdata(x) for x in (scores, lengths)]
    assert made["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(("scores", "lengths"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([1], [2])])
def test_a_correlation_that_is_undefined_is_none(scores, lengths):
    assert length_correlation(scores, lengths) == {"pearson": None, "spearman": None}


# Refusals


@pytest.mark.parametrize("statistic", [pair_accuracy, reliability, expected_calibration_error, accuracy_by_margin])
@pytest.mark.parametrize(
    ("values", "outcomes", "named"),
    [([], [], "shape"), ([0.5], [1, 0], "outcomes: shape"), ([float("nan")], [1], ""), ([0.5], [2], "outcomes"),
     ([0.5], [0.5], "outcomes"), ([[0.5]], [[1]], "shape")],
)  # fmt: skip
def test_pairs_that_cannot_be_are_refused(statistic, values, outcomes, named):
    with pytest.raises(InputError, match=f"{named}.*, expected "):
        statistic(values, outcomes)


@pytest.mark.parametrize("statistic", [reliability, expected_calibration_error])
def test_a_probability_is_in_the_unit_interval(statistic):
    with pytest.raises(InputError, match=r"probabilities: got .*, expected in"):
        statistic([1.5], [1])


@pytest.mark.parametrize("statistic", [reliability, expected_calibration_error, accuracy_by_margin])
def test_there_is_a_bin(statistic):
    with pytest.raises(InputError, match="bins: got 0, expected at least 1"):
        statistic([0.5], [1], bins=0)


def test_lengths_belong_to_scores():
    with pytest.raises(InputError, match="lengths: shape"):
        length_correlation([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match=r"^scores"):
        length_correlation([1, float("nan")], [1, 2])
