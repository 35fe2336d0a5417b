"""How good a reward model is, from its scores on pairs that people have judged.

A pair has two responses, a and b. Its difference is score(a) - score(b), its probability sigmoid(difference) that a is
preferred (Bradley-Terry), its outcome whether a was. Which of the two is called a changes nothing here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.errors import check
from ppo_jax.evaluation.intervals import wilson_interval

Numbers = Sequence[float] | np.ndarray
Outcomes = Sequence[bool] | Sequence[int] | np.ndarray


class Accuracy(NamedTuple):
    """A share of pairs with its confidence interval (Wilson's)."""

    accuracy: float
    low: float
    high: float


def pair_accuracy(differences: Numbers, outcomes: Outcomes, level: float = 0.95) -> Accuracy:
    """Share of the pairs in which the preferred response has the higher score; equal scores count half.

    Args:
        differences: `[n]` score(a) - score(b), n >= 1.
        outcomes: `[n]` whether a was preferred.
        level: coverage of the interval, in (0, 1).

    Raises:
        InputError: no pairs, different numbers of both, or values that cannot be.
    """
    hits = _hits(*_checked("differences", differences, outcomes))
    return Accuracy(float(hits.mean()), *wilson_interval(float(hits.sum()), hits.size, level))


def reliability(probabilities: Numbers, outcomes: Outcomes, bins: int = 10) -> list[dict[str, Any]]:
    """How often the predicted response is the preferred one, by how sure the prediction was.

    The predicted side of a pair is the likelier one, with confidence max(p, 1 - p) in [1/2, 1], which is cut into bins
    of equal width, each with its upper edge; empty ones are left out.

    Args:
        probabilities: `[n]` in [0, 1], that a is preferred, n >= 1.
        outcomes: `[n]` whether a was preferred.
        bins: at least 1.

    Returns:
        Rows of `confidence` (mean of the bin), `accuracy` (p = 1/2 counts half) and `count`, by rising confidence.

    Raises:
        InputError: no pairs, different numbers of both, or values that cannot be.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2, for a choice between two.
    """
    probabilities, outcomes = _checked("probabilities", probabilities, outcomes)
    check("probabilities", probabilities, bool(((probabilities >= 0) & (probabilities <= 1)).all()), "in [0, 1]")
    check("bins", bins, bins >= 1, "at least 1")
    confidence, hits = np.maximum(probabilities, 1 - probabilities), _hits(probabilities - 0.5, outcomes)
    place = np.digitize(confidence, np.linspace(0.5, 1.0, bins + 1)[1:-1], right=True)
    groups = [place == i for i in range(bins) if np.any(place == i)]
    return [
        {
            "confidence": float(confidence[group].mean()),
            "accuracy": float(hits[group].mean()),
            "count": int(group.sum()),
        }
        for group in groups
    ]


def expected_calibration_error(probabilities: Numbers, outcomes: Outcomes, bins: int = 10) -> float:
    """Expected calibration error (ECE) of the predicted side: Σ count / n · |accuracy - confidence| over the rows of
    `reliability`.

    Args:
        probabilities: see `reliability`.
        outcomes: see `reliability`.
        bins: of equal width over [1/2, 1].

    Returns:
        A share in [0, 1]; 0 where the confidence is right.

    Raises:
        InputError: see `reliability`.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    rows = reliability(probabilities, outcomes, bins)
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    return sum(gaps) / sum(row["count"] for row in rows)


def accuracy_by_margin(differences: Numbers, outcomes: Outcomes, bins: int = 5) -> list[dict[str, Any]]:
    """Accuracy by how far apart the two scores are.

    The pairs are sorted by |difference| and cut into groups of equal size (to within one pair).

    Args:
        differences: `[n]` score(a) - score(b), n >= 1.
        outcomes: `[n]` whether a was preferred.
        bins: at least 1; fewer pairs than this are a group each.

    Returns:
        Rows of `low` and `high` (smallest and largest |difference| of the group), `accuracy` (equal scores count half)
        and `count`, by rising margin.

    Raises:
        InputError: no pairs, different numbers of both, or values that cannot be.
    """
    differences, outcomes = _checked("differences", differences, outcomes)
    check("bins", bins, bins >= 1, "at least 1")
    margins, hits = np.abs(differences), _hits(differences, outcomes)
    groups = np.array_split(np.argsort(margins, kind="stable"), min(bins, margins.size))
    return [
        {
            "low": float(margins[group[0]]),
            "high": float(margins[group[-1]]),
            "accuracy": float(hits[group].mean()),
            "count": group.size,
        }
        for group in groups
    ]


def length_correlation(scores: Numbers, lengths: Numbers) -> dict[str, float | None]:
    """Correlation of score and length: a reward model that likes length has found a way around the judgement.

    Args:
        scores: `[n]`.
        lengths: `[n]`, in any unit.

    Returns:
        `pearson` and `spearman`, in [-1, 1]; None where it is undefined (all scores or all lengths equal).

    Raises:
        InputError: different numbers of both, or one that is not finite.
    """
    import scipy.stats  # slow to import

    scores, lengths = np.asarray(scores, np.float64), np.asarray(lengths, np.float64)
    check("lengths: shape", lengths.shape, lengths.ndim == 1 and lengths.shape == scores.shape, f"{scores.shape}")
    for name, values in (("scores", scores), ("lengths", lengths)):
        check(name, values, bool(np.isfinite(values).all()), "finite numbers")
    if len(set(scores)) < 2 or len(set(lengths)) < 2:
        return {"pearson": None, "spearman": None}
    return {
        "pearson": float(scipy.stats.pearsonr(scores, lengths).statistic),
        "spearman": float(scipy.stats.spearmanr(scores, lengths).statistic),
    }


def _hits(differences: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """`[n]`: 1 where the sign of the difference is that of the outcome, 0 where it is not, 1/2 for no difference."""
    return (1 + np.sign(differences) * np.where(outcomes, 1, -1)) / 2


def _checked(name: str, values: Numbers, outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    values, outcomes = np.asarray(values, np.float64), np.asarray(outcomes)
    check(f"{name}: shape", values.shape, values.ndim == 1 and values.size >= 1, "one dimension, at least 1 pair")
    check("outcomes: shape", outcomes.shape, outcomes.shape == values.shape, f"{values.shape}, one a pair")
    check(name, values, bool(np.isfinite(values).all()), "finite numbers")
    check("outcomes", outcomes, bool(np.isin(outcomes, (0, 1)).all()), "0 or 1 (False or True)")
    return values, outcomes.astype(bool)
