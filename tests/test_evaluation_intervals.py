"""Confidence intervals: goldens, scipy as an oracle, coverage on distributions whose truth is known."""

import math

import numpy as np
import pytest
import scipy.stats

from ppo_jax.errors import InputError
from ppo_jax.evaluation import bootstrap_interval, preference_rate, wilson_interval, win_rate

# Wilson


def test_wilson_golden():
    # n = 4, p = 1/2, z = 2 (level 0.9545): center (1/2 + 4/8) / (1 + 4/4) = 1/2,
    # half width 2 sqrt(1/4 / 4 + 4 / 64) / 2 = sqrt(1/8) = 0.35355
    level = math.erf(2 / math.sqrt(2))
    low, high = wilson_interval(2, 4, level)
    assert low == pytest.approx(0.5 - math.sqrt(1 / 8), abs=1e-9)
    assert high == pytest.approx(0.5 + math.sqrt(1 / 8), abs=1e-9)


def test_wilson_agrees_with_scipy(rng):
    for _ in range(50):
        total = int(rng.integers(1, 500))
        successes, level = int(rng.integers(0, total + 1)), float(rng.uniform(0.5, 0.999))
        expected = scipy.stats.binomtest(successes, total).proportion_ci(level, "wilson")
        assert wilson_interval(successes, total, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_takes_half_a_success():
    between = wilson_interval(7.5, 20)
    assert wilson_interval(7, 20) < between < wilson_interval(8, 20)


def test_wilson_has_a_width_at_the_ends():
    # z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.27754; the rule of three says 3/10.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1, 0), "total"), ((-1, 4), "successes"), ((5, 4), "successes"), ((float("nan"), 4), "successes"),
     ((1, 4, 1.0), "level"), ((1, 4, 0.0), "level")],
)  # fmt: skip
def test_wilson_refuses(arguments, named):
    with pytest.raises(InputError, match=f"^{named}: got .*, expected "):
        wilson_interval(*arguments)


# Bootstrap


def test_bootstrap_of_the_mean_is_near_the_normal_interval(rng):
    values = rng.normal(rng.normal(), 3.0, 2000)
    half = 1.959964 * values.std() / math.sqrt(values.size)
    low, high = bootstrap_interval(values, rng=rng)
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)


def test_bootstrap_of_two_values_golden():
    # Of the samples of two values 0 and 1 with replacement a quarter has mean 0, a half 1/2, a quarter 1.
    # At a level of 40 % the ends are the quantiles 0.3 and 0.7, both in the middle half; at 60 %, 0.2 and 0.8, outside.
    assert bootstrap_interval([0, 1], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6) == (0.0, 1.0)


def test_bootstrap_covers_the_truth_as_often_as_it_says(rng):
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, 60), level=0.9, num=500, rng=rng)
        covered += low <= 1.0 <= high
    assert 240 <= covered <= 298  # 265 to 270 expected, standard deviation 5


def test_bootstrap_of_another_statistic(rng):
    values = rng.lognormal(size=400)
    low, high = bootstrap_interval(values, statistic=np.median, num=2000, rng=rng)
    assert low < np.median(values) < high < values.mean()  # the mean lies 5 standard errors above the median


def test_bootstrap_of_differences_is_narrower_than_of_sides_that_go_together(rng):
    skill = rng.normal(0, 5, 200)  # of the prompt: the same for both
    a, b = skill + rng.normal(1, 0.5, 200), skill + rng.normal(0, 0.5, 200)
    low, high = bootstrap_interval(a - b, rng=rng)
    assert low > 0.6
    assert high < 1.4
    assert bootstrap_interval(a, rng=rng).low < bootstrap_interval(b, rng=rng).high  # each alone tells nothing


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)


def test_bootstrap_is_the_same_for_the_same_seed(rng, seed):
    values = rng.normal(size=30)
    assert bootstrap_interval(values, rng=seed) == bootstrap_interval(values, rng=seed)
    assert bootstrap_interval(values, rng=seed) != bootstrap_interval(values, rng=seed + 1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_bootstrap_refuses(values):
    with pytest.raises(InputError, match=r"^values"):
        bootstrap_interval(values)


def test_bootstrap_refuses_a_wrong_level_or_number():
    with pytest.raises(InputError, match=r"^level: got 95, expected a number in"):
        bootstrap_interval([1, 2], level=95)
    with pytest.raises(InputError, match=r"^num: got 0, expected at least 1"):
        bootstrap_interval([1, 2], num=0)


# Win rate


def test_win_rate_golden():
    # wins at 1, 3; loss at 2; tie at 4: (2 + 1/2) / 4
    made = win_rate([1.0, 0.0, 5.0, 2.0], [0.0, 1.0, 4.0, 2.0])
    assert (made.wins, made.losses, made.ties, made.rate) == (2, 1, 1, 0.625)
    assert 0 <= made.low < made.rate < made.high <= 1


def test_win_rate_of_the_other_side_is_the_rest(rng, seed):
    a, b = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
    one, other = win_rate(a, b, rng=seed), win_rate(b, a, rng=seed)
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert one.wins == sum(x > y for x, y in zip(a, b, strict=True))
    assert one.rate + other.rate == pytest.approx(1.0)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)


def test_win_rate_of_one_against_itself_is_a_half(rng):
    scores = rng.normal(size=20)
    assert win_rate(scores, scores) == (0.5, 0.5, 0.5, 0, 0, 20)


def test_preferences_of_several_annotators():
    # 1: all for a; 2/3: most for a; 1/2: a tie; 1/3: most for b.  (1 + 2/3 + 1/2 + 1/3) / 4 = 0.625
    made = preference_rate([1.0, 2 / 3, 0.5, 1 / 3])
    assert made.rate == pytest.approx(0.625)
    assert (made.wins, made.losses, made.ties) == (2, 1, 1)


@pytest.mark.parametrize("preferences", [[0.5], [0.5, 1.5], [-0.1, 0.5], [float("nan"), 1.0]])
def test_preferences_that_cannot_be_are_refused(preferences):
    with pytest.raises(InputError, match=", expected "):
        preference_rate(preferences)


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        ([1, 2], [1, 2, 3], "scores_b: shape"),
        ([1, float("nan")], [1, 2], "scores_a"),
        ([1, 2], [float("inf"), 2], "scores_b"),
    ],
)
def test_win_rate_refuses(a, b, named):
    with pytest.raises(InputError, match=f"^{named}: got .*, expected "):
        win_rate(a, b)
