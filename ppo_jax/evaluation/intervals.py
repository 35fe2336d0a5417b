"""Confidence intervals: of a share, of any statistic of a sample, and of a win rate."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ppo_jax.errors import check

Statistic = Callable[..., np.ndarray]
"""`statistic(values, axis)` takes an axis away, as `np.mean` does."""


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class WinRate(NamedTuple):
    """How often one side is preferred over the other, a tie counting half."""

    rate: float  # (wins + ties / 2) / prompts
    low: float
    high: float
    wins: int
    losses: int
    ties: int


def wilson_interval(successes: float, total: float, level: float = 0.95) -> Interval:
    """Wilson's interval of a share.

    (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n), where p = successes / n. It stays within [0, 1] and has a
    width at 0 and at 1 too.

    Args:
        successes: from 0 to `total`; half ones (ties) are allowed.
        total: n, above 0.
        level: coverage, in (0, 1).

    Raises:
        InputError: a number outside its range.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    check("total", total, total > 0, "a number above 0")
    check("successes", successes, 0 <= successes <= total, f"a number from 0 to the total of {total}")
    _check_level(level)
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / (1 + z**2 / total)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    num: int = 10_000,
    rng: np.random.Generator | int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of independent values: its quantiles over samples drawn with replacement.

    For a comparison on the same prompts give the differences: pairs that are resampled together. Where all values are
    equal, so are the ends.

    Args:
        values: `[n]`, n >= 2.
        statistic: of the values.
        level: coverage, in (0, 1).
        num: samples drawn.
        rng: generator or seed.

    Raises:
        InputError: fewer than two values, one that is not finite, or a number outside its range.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    import scipy.stats  # slow to import

    values = np.asarray(values, np.float64)
    check("values: shape", values.shape, values.ndim == 1 and values.size >= 2, "one dimension, at least 2 values")
    check("values", values, bool(np.isfinite(values).all()), "finite numbers")
    check("num", num, num >= 1, "at least 1")
    _check_level(level)
    result = scipy.stats.bootstrap(
        (values,),
        statistic,
        method="percentile",
        confidence_level=level,
        n_resamples=num,
        batch=max(1, 10**7 // values.size),  # 80 MB of resampled values at a time
        rng=np.random.default_rng(rng),
    )
    return Interval(*(float(end) for end in result.confidence_interval))


def preference_rate(
    preferences: Sequence[float] | np.ndarray, level: float = 0.95, rng: np.random.Generator | int = 0
) -> WinRate:
    """Win rate of the first side from one preference a prompt, with a bootstrap interval over prompts.

    A side that wins every time has an interval without width; `wilson_interval` has one that is wider.

    Args:
        preferences: `[n]` in [0, 1], n >= 2: 1 where the first side is preferred, 0 where the second is, 1/2 for a tie;
            between them where several annotators disagree, which counts as a win above 1/2 and as a loss below.
        level: coverage, in (0, 1).
        rng: generator or seed.

    Raises:
        InputError: fewer than two preferences, or one outside [0, 1].
    """
    preferences = np.asarray(preferences, np.float64)
    check("preferences", preferences, bool(((preferences >= 0) & (preferences <= 1)).all()), "numbers in [0, 1]")
    interval = bootstrap_interval(preferences, level=level, rng=rng)
    counts = (int(np.sum(held)) for held in (preferences > 0.5, preferences < 0.5, preferences == 0.5))
    return WinRate(float(preferences.mean()), *interval, *counts)


def win_rate(
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    level: float = 0.95,
    rng: np.random.Generator | int = 0,
) -> WinRate:
    """Win rate of `a` over `b` by the scores of the same judge on the same prompts; the higher score wins.

    Args:
        scores_a: `[n]`, n >= 2.
        scores_b: `[n]`, in the same order of prompts.
        level: coverage, in (0, 1).
        rng: generator or seed.

    Raises:
        InputError: fewer than two scores, different numbers of them, or one that is not finite.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    check("scores_b: shape", b.shape, a.shape == b.shape, f"{a.shape}, that of scores_a")
    for name, scores in (("scores_a", a), ("scores_b", b)):
        check(name, scores, bool(np.isfinite(scores).all()), "finite numbers")
    return preference_rate((np.sign(a - b) + 1) / 2, level, rng)


def _check_level(level: float) -> None:
    check("level", level, 0 < level < 1, "a number in (0, 1)")
