"""What can be said of a policy or a reward model from a sample, and how surely (floor 4).

`intervals` holds confidence intervals and win rates, `preference` the statistics of a reward model, `text` compares
responses with references.
"""

from ppo_jax.evaluation.intervals import (
    Interval,
    WinRate,
    bootstrap_interval,
    preference_rate,
    wilson_interval,
    win_rate,
)
from ppo_jax.evaluation.preference import (
    Accuracy,
    accuracy_by_margin,
    expected_calibration_error,
    length_correlation,
    pair_accuracy,
    reliability,
)
from ppo_jax.evaluation.text import ROUGE_TYPES, Bleu, bleu, rouge

__all__ = [
    "ROUGE_TYPES",
    "Accuracy",
    "Bleu",
    "Interval",
    "WinRate",
    "accuracy_by_margin",
    "bleu",
    "bootstrap_interval",
    "expected_calibration_error",
    "length_correlation",
    "pair_accuracy",
    "preference_rate",
    "reliability",
    "rouge",
    "wilson_interval",
    "win_rate",
]
